"""A small network, packages of it, and servers that have them."""

import numpy as np
import pytest

from penjing.package import encode, manifest, save, split
from penjing.testing.forging import Forge


@pytest.fixture(scope="session")
def forge():
    return Forge


def network(seed=0, rows=24):
    """Topology and arrays of a small quantized network with every kind of tensor."""
    rng = np.random.default_rng(seed)
    grid = np.clip(np.rint(rng.normal(0, 20, (rows, 16, 3, 3))), -127, 127).astype(np.int8)
    sparse = np.where(rng.random((rows, 96)) < 0.8, 0, rng.integers(-127, 128, (rows, 96))).astype(np.int8)
    arrays = {
        "conv.weight": grid,
        "conv.weight_scale": rng.random(rows).astype(np.float32),
        "conv.weight_zero_point": np.zeros(rows, dtype=np.int64),
        "fc.weight": sparse,
        "fc.bias": rng.normal(size=rows).astype(np.float32),
        "table": rng.integers(0, 256, (5, 7)).astype(np.uint8),
        "mask": rng.random((4, 9)) < 0.5,
        "half": rng.normal(size=(6, 3)).astype(np.float16),
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "norm.weight": rng.normal(size=(10, 100)).astype(np.float32),
    }
    return '{"nodes": ["conv", "fc"]}', arrays


def same(left, right):
    """Equal to the last bit: names in order, element types, shapes, bytes."""
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape and left[k].tobytes() == right[k].tobytes()
        for k in left
    )


@pytest.fixture(scope="session")
def small():
    return network()


@pytest.fixture(scope="session")
def equal():
    return same


@pytest.fixture(scope="session")
def carried():
    """An encoded package of several parts, for transfers."""
    rng = np.random.default_rng(2)
    arrays = {f"{i}.weight": rng.integers(-127, 128, (900, 1200)).astype(np.int8) for i in range(4)}
    arrays |= {"wide": rng.normal(size=(700, 900)).astype(np.float32), "bias": rng.random(40).astype(np.float32)}
    return encode("a topology", arrays)


@pytest.fixture(scope="session")
def front(carried):
    return manifest.parse(carried)


@pytest.fixture(scope="module")
def web(carried, tmp_path_factory):
    """A folder with net.penjing, net/ and volumes of both kinds."""
    folder = tmp_path_factory.mktemp("web")
    save(carried, folder / "net.penjing")
    save(carried, folder / "net", layout="directory")
    split(folder / "net.penjing", folder / "files", into=3)
    split(folder / "net.penjing", folder / "hosts", into=3, layout="directory")
    return folder


@pytest.fixture(scope="module")
def server(web):
    from web_servers import hosting

    with hosting(web) as server:
        yield server


@pytest.fixture
def host(server):
    """The folder `web` on a real server, which lies if told so."""
    server.honest()
    return server


@pytest.fixture
def pull(tmp_path, monkeypatch):
    """Pulls URLs to `pull.out`, with little patience and, whatever the machine's settings, through no proxy."""
    from penjing.package import transfer

    def pull(*urls, **more):
        return transfer.pull(urls, pull.out, **{"patience": pull.quick, **more})

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    pull.out, pull.kept = tmp_path / "out.penjing", tmp_path / "out.penjing.pull"
    pull.quick = transfer.Patience(tries=3, pause=0.01, timeout=0.4)
    return pull
