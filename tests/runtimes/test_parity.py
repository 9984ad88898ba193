"""The gate refuses a file that computes something else, and says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import penjing as pj
from penjing.errors import ParityError
from penjing.network import Network, SetWeights
from penjing.runtimes import RUNTIMES


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer(x) + x
        return self.head(x.mean((2, 3)))


def _network() -> Network:
    torch.manual_seed(0)
    return pj.capture(Deep(), (torch.rand(2, 8, 12, 12),), name="deep")


def _tamper(path: Path, word: str) -> None:
    """Halves the first large initializer whose name holds `word`."""
    model = onnx.load(path)
    for held in model.graph.initializer:
        array = numpy_helper.to_array(held)
        if word in held.name and array.ndim >= 2 and array.size >= 32:
            held.CopyFrom(numpy_helper.from_array((array // 2 if array.dtype.kind in "iu" else array * 0.5), held.name))
            onnx.save(model, path)
            return
    raise AssertionError(f"no initializer like {word}")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("layer", ["body.2.0", "head"])
def test_tampered_weight_is_found(runtime: str, layer: str, tmp_path: Path) -> None:
    network, engine, path = _network(), RUNTIMES.get(runtime), tmp_path / "net.onnx"
    engine.export(network, path)
    engine.verify(network, path)
    _tamper(path, f"{layer}.weight")
    with pytest.raises(ParityError, match=rf"output 'output' of deep .*departs first at {layer} ") as caught:
        engine.verify(network, path)
    assert "allowed 0.0005" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_tampered_integer_weight_is_found(runtime: str, tmp_path: Path, quantized: Callable[..., Network]) -> None:
    network, engine, path = quantized(dtype="int8", limit=64), RUNTIMES.get(runtime), tmp_path / "net.onnx"
    engine.export(network, path)
    _tamper(path, "last.weight")
    with pytest.raises(ParityError, match="departs first at last "):
        engine.verify(network, path)


def test_another_network_is_refused_in_torch_too(tmp_path: Path) -> None:
    network, engine = _network(), RUNTIMES.get("torch")
    path = tmp_path / "net.pt2"
    value = network.tensors()["body.1.0.weight"].detach() * 0.5
    other = network.apply([SetWeights(parameter="body.1.0.weight", value=value)])
    engine.export(other, path)
    with pytest.raises(ParityError, match=r"departs first at body\.1\.0 "):
        engine.verify(network, path)


def test_refused_file_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, path = RUNTIMES.get("onnxruntime"), tmp_path / "net.onnx"
    write = type(engine)._write

    def spoiled(self: object, network: Network, aside: Path) -> None:
        write(engine, network, aside)
        _tamper(aside, "body.0.0.weight")

    monkeypatch.setattr(type(engine), "_write", spoiled)
    with pytest.raises(ParityError):
        engine.export(_network(), path)
    assert list(tmp_path.iterdir()) == []


def test_real_samples_are_used(tmp_path: Path) -> None:
    samples = torch.rand(40, 8, 12, 12)
    artifact = RUNTIMES.get("onnxruntime").export(_network(), tmp_path / "net.onnx", samples=samples)
    assert artifact.parity.n == 33  # 32 at once and one alone
    assert artifact.parity.agreement == 1.0
    assert artifact.parity.worst_output == "output"


def test_infinite_and_nan_outputs_count_as_departure(tmp_path: Path) -> None:
    network, engine, path = _network(), RUNTIMES.get("onnxruntime"), tmp_path / "net.onnx"
    engine.export(network, path)
    model = onnx.load(path)
    for held in model.graph.initializer:
        if held.name == "head.bias":
            held.CopyFrom(numpy_helper.from_array(np.full(5, np.nan, np.float32), held.name))
    onnx.save(model, path)
    with pytest.raises(ParityError, match="relative difference inf"):
        engine.verify(network, path)
