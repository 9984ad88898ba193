"""A person's working folder, and the command line run in it."""

import functools
import http.server
import json
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from penjing.cli.app import main

NET = '''
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net().eval()


def samples(n=96):
    """Four classes, each with its own bright quarter: easy to learn."""
    g = torch.Generator().manual_seed(1)
    y = torch.arange(n) % 4
    x = torch.rand(n, 1, 8, 8, generator=g) * 0.3
    for i, c in enumerate(y.tolist()):
        x[i, 0, 4 * (c // 2) : 4 * (c // 2) + 4, 4 * (c % 2) : 4 * (c % 2) + 4] += 0.7
    return TensorDataset(x, y)


def wrong_shape():
    return TensorDataset(torch.rand(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))


def empty():
    return TensorDataset(torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))


def not_samples():
    return 7


def raises():
    raise ValueError("the weights are on another disk")


def leaves():
    raise SystemExit(3)


def number():
    return 42


def nan():
    net = build()
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    return net


def chatty():
    print("loading the weights, please wait")
    return build()


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x.flatten(1)


def branches():
    return Branches()
'''


@dataclass
class Done:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one JSON object on standard output."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"standard output holds {len(lines)} lines: {self.out[:500]}"
        return json.loads(lines[0])


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with net.py (networks and samples) and samples.npz, which is the working directory."""
    (tmp_path / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "samples.npz", x=rng.random((12, 1, 8, 8), dtype=np.float32), y=np.arange(12) % 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def penjing(desk: Path, capfd: pytest.CaptureFixture):
    """Runs `penjing ARGS` in the folder `desk`."""

    def run(*args: str) -> Done:
        capfd.readouterr()
        code = main([str(a) for a in args])
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return run


@pytest.fixture
def hosted(monkeypatch):
    """Puts a folder on the standard library's web server, which knows no ranges; its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ExitStack() as stack:

        def host(folder):
            handler = functools.partial(Handler, directory=str(folder))
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield host
