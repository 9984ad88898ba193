"""Grids that a runtime would misread in their plain form: the numbers of the network on the real runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.data import Data
from penjing.errors import ExportError, InputError, ParityError
from penjing.network import Network
from penjing.recipe import Context
from penjing.runtimes import RUNTIMES, get_runtime

BOTH = ("onnxruntime", "openvino")
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 20, (16, 7), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    """An embedding, a recurrent layer of two directions and a linear one."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(24, 20)
        self.layer = kind(16, 12, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.table(tokens))[0])


class Attention(nn.Module):
    """Self-attention, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


def pictures(middle: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    last = nn.Conv2d(middle.out_channels, 4, 1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), middle, nn.ReLU(), last)


def quantized(model: nn.Module, inputs: Tensor, **fields: object) -> Network:
    network = pj.capture(model.eval(), (inputs[:2],), name="net")
    plan = pj.Quantize(**fields).plan(network, Context(original=network, data=Data(inputs)))  # type: ignore[arg-type]
    return network.apply(plan.edits)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("kind", ["transposed", "lstm", "gru"])
def test_openvino_keeps_zero_points(tmp_path: Path, kind: str, granularity: str) -> None:
    torch.manual_seed(0)
    if kind == "transposed":
        model, inputs, layer = pictures(nn.ConvTranspose2d(8, 4, 2, 2)), X, "2."
    else:
        model, inputs, layer = Recurrent(nn.LSTM if kind == "lstm" else nn.GRU), TOKENS, "layer."
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * parameter.abs().max()  # so that every grid has its zero elsewhere
    network = quantized(model, inputs, symmetric=False, granularity=granularity)
    artifact = get_runtime("openvino").export(network, tmp_path / "net.onnx", samples=inputs)
    assert artifact.parity.rms_rel < 2e-3, "without zero points it is 0.05 to 0.6"
    wide = {w.tensor for w in artifact.widened if (w.kind, w.stored) == ("int8", "float32")}
    assert wide and all(name.startswith(layer) for name in wide)
    assert wide == {n for n, k in network.code_kinds().items() if n.startswith(layer) and k == "int8"}


@pytest.mark.parametrize("weights", ["int8", "int6", "int4"])
@pytest.mark.parametrize("runtime", BOTH)
def test_grouped_convolutions_with_groups_of_weights(tmp_path: Path, runtime: str, weights: str) -> None:
    torch.manual_seed(0)
    network = quantized(pictures(nn.Conv2d(8, 8, 3, groups=2)), X, weights=weights, granularity="group:4")
    artifact = get_runtime(runtime).export(network, tmp_path / "net.onnx", samples=X)
    assert artifact.parity.rms_rel < 2e-3


@pytest.mark.parametrize("fields", [{"symmetric": False}, {"headroom": False}, {"weights": "int4"}])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
@pytest.mark.parametrize("runtime", BOTH)
def test_a_layer_used_twice(tmp_path: Path, runtime: str, kind: str, fields: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer, inputs = (nn.Conv2d(3, 3, 3, padding=1), X) if kind == "convolution" else (nn.Linear(8, 8), ROWS[:, 0])
    network = quantized(Twice(layer), inputs, **fields)
    artifact = get_runtime(runtime).export(network, tmp_path / "net.onnx", samples=inputs)
    assert artifact.parity.rms_rel < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["channel", "group:4"])
@pytest.mark.parametrize("weights", ["int16", "int8"])
def test_attention_on_grids_found_in_every_run(tmp_path: Path, weights: str, granularity: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    fields = {"weights": weights, "granularity": granularity, "symmetric": symmetric}
    network = quantized(Attention(), ROWS, activations="dynamic", **fields)
    path = get_runtime("onnxruntime").export(network, tmp_path / "net.onnx", samples=ROWS).path
    (found,) = get_runtime("onnxruntime").load(path).run({"x": ROWS.numpy()})
    wanted = network(ROWS).detach().numpy()
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_a_file_of_its_own_that_does_not_open_is_penjings_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = RUNTIMES.get("onnxruntime")
    write = type(engine)._write

    def spoiled(self: object, network: Network, aside: Path) -> object:
        widened = write(engine, network, aside)
        aside.write_bytes(aside.read_bytes().replace(b"Relu", b"Relo"))
        return widened

    monkeypatch.setattr(type(engine), "_write", spoiled)
    network = pj.capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (ROWS[:2, 0],), name="net")
    with pytest.raises(ExportError, match="penjing's file of net is not one that onnxruntime opens: .*Relo") as caught:
        engine.export(network, tmp_path / "net.onnx")
    assert "report" in (caught.value.hint or "") and ".part" not in caught.value.message
    assert str(tmp_path) not in caught.value.message
    (tmp_path / "other.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"cannot open 'other.onnx'") as refused:
        engine.load(tmp_path / "other.onnx")
    assert "damaged" in (refused.value.hint or "")


def test_what_the_runtime_raises_while_it_runs_is_a_parity_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = RUNTIMES.get("onnxruntime")
    write = type(engine)._write

    def spoiled(self: object, network: Network, aside: Path) -> object:
        return write(engine, pj.capture(nn.Embedding(4, 3), (TOKENS[:2] % 4,)), aside)

    monkeypatch.setattr(type(engine), "_write", spoiled)
    with pytest.raises(ParityError, match="onnxruntime cannot run it") as caught:
        engine.export(pj.capture(nn.Embedding(20, 3), (TOKENS[:2],)), tmp_path / "net.onnx", samples=TOKENS)
    assert caught.value.hint
    assert capfd.readouterr().err == ""
