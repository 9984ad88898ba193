"""Quantized networks: integers in the file, integers in the kernels, the numbers of the network itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import penjing as pj
from penjing.data import Data
from penjing.methods.quantize import Quantize
from penjing.network import Network, QuantizeTensor
from penjing.recipe import Context
from penjing.runtimes import RUNTIMES, Executed, Target

Quantized = Callable[..., Network]
INTEGERS = ("onnxruntime", "openvino")


LAYERS = ("first", "depthwise", "last", "head")


def _products(rows: list[Executed]) -> Counter[str]:
    words = ("Conv", "Gemm", "MatMul", "FullyConnected")
    return Counter(r.precision for r in rows if any(w in r.op for w in words))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("runtime", INTEGERS)
def test_products_run_in_integers(runtime: str, dtype: str, tmp_path: Path, quantized: Quantized) -> None:
    network = quantized(dtype=dtype, limit=64)
    engine = RUNTIMES.get(runtime)
    artifact = engine.export(network, tmp_path / "net.onnx")
    assert artifact.parity.measure == "rms_rel"
    assert artifact.parity.rms_rel < 0.01  # so small a network differs by single steps only
    session = engine.load(artifact.path, f"{runtime}:threads=1")
    assert session.precision == "int8"
    assert _products(session.executed()) == {"int8": len(LAYERS)}
    flat = network.bind(network.example(5, seed=3))
    (want,), (got,) = network.run(flat), session.run({k: v.numpy() for k, v in flat.items()})
    assert np.sqrt(((got - want.numpy()) ** 2).mean()) < 0.01 * want.pow(2).mean().sqrt()


@pytest.mark.parametrize("runtime", INTEGERS)
def test_weights_leave_as_integers(runtime: str, tmp_path: Path, quantized: Quantized) -> None:
    network = quantized(dtype="int8", limit=64)
    artifact = RUNTIMES.get(runtime).export(network, tmp_path / "net.onnx")
    graph = onnx.load(artifact.path).graph
    held = {i.name: i for i in graph.initializer}
    tensors = network.tensors()
    for layer in LAYERS:
        name = f"{layer}.weight"
        found = [
            v for k, v in held.items() if k.startswith(name) and v.data_type in (TensorProto.INT8, TensorProto.UINT8)
        ]
        found = [v for v in found if np.prod(v.dims) == tensors[name].numel()]
        assert len(found) == 1, name
        assert found[0].data_type == TensorProto.INT8  # ±64 cannot overflow: the fast kernel is right
    floats = sum(int(np.prod(i.dims)) for i in held.values() if i.data_type == TensorProto.FLOAT)
    assert floats < 0.4 * sum(tensors[f"{layer}.weight"].numel() for layer in LAYERS)
    assert "Pad" not in {n.op_type for n in graph.node}  # folded through the grid in front of the convolution
    grids = {i.data_type for i in held.values() if i.name.startswith("zero_")}
    assert grids == {TensorProto.UINT8}


def test_full_range_weights_are_exact_in_onnxruntime(tmp_path: Path, quantized: Quantized) -> None:
    """uint8 weights with zero point 128: right on every CPU. Depthwise ones keep their faster int8 kernel."""
    network = quantized(dtype="int8", limit=127)
    artifact = RUNTIMES.get("onnxruntime").export(network, tmp_path / "net.onnx")
    assert artifact.parity.rms_rel < 0.01
    held = {i.name: i.data_type for i in onnx.load(artifact.path).graph.initializer}
    kinds = {
        layer: {t for n, t in held.items() if n.startswith(f"{layer}.weight") and t in (2, 3) and "zero" not in n}
        for layer in LAYERS
    }
    assert kinds["last"] == kinds["first"] == {TensorProto.UINT8}
    assert kinds["depthwise"] == {TensorProto.INT8}
    session = RUNTIMES.get("onnxruntime").load(artifact.path)
    assert _products(session.executed()) == {"int8": len(LAYERS)}


class Orders(nn.Module):
    """Weights with their outputs on the first and on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, stride=2)
        self.second = nn.Linear(12, 24)
        self.third = nn.Parameter(torch.randn(24, 16) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu().mean((2, 3))
        return self.second(x).relu() @ self.third


@pytest.mark.parametrize("runtime", INTEGERS)
def test_separated_weights_keep_the_fast_kernels(runtime: str, tmp_path: Path) -> None:
    """What Quantize makes may hold large weights, only not beside each other: it leaves as int8 and is exact."""
    torch.manual_seed(0)
    x = torch.rand(64, 3, 16, 16)
    network = pj.capture(Orders(), (x[:2],))
    plan = Quantize().plan(network, Context(original=network, data=Data(x)))
    network = network.apply(plan.edits)
    artifact = RUNTIMES.get(runtime).export(network, tmp_path / "net.onnx")
    assert artifact.parity.rms_rel < 0.02
    held = [
        i for i in onnx.load(artifact.path).graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) > 1
    ]
    assert sorted(np.prod(i.dims) for i in held) == [12 * 24, 12 * 27, 24 * 16]
    for initializer in held:
        rows = numpy_helper.to_array(initializer).astype(int)
        assert np.sort(np.abs(rows).ravel())[-2:].sum() > 140  # too large, if they were neighbours


def test_narrow_grids_keep_their_range(tmp_path: Path) -> None:
    """A 4-bit grid in an int8 container: ONNX has no quant_min and quant_max, the clamp must be there."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    network = pj.capture(One(), (torch.randn(2, 8),))
    name = network.inputs[0].name
    edit = QuantizeTensor(
        tensor=name,
        scale=torch.tensor(0.1),
        zero_point=torch.tensor(1),
        dtype="int8",
        axis=None,
        quant_min=-8,
        quant_max=7,
    )
    network = network.apply([edit])
    for runtime in INTEGERS:
        artifact = RUNTIMES.get(runtime).export(network, tmp_path / f"{runtime}.onnx")
        session = RUNTIMES.get(runtime).load(artifact.path, Target(runtime=runtime, precision="f32"))
        x = np.linspace(-3, 3, 32, dtype=np.float32).reshape(4, 8)
        np.testing.assert_allclose(session.run({name: x})[0], network.run(torch.from_numpy(x))[0], atol=1e-5)


@pytest.mark.parametrize("runtime", INTEGERS)
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Identity()], ids=["max", "mean", "none"])
def test_a_linear_layer_behind_flatten_runs_in_integers(pool: nn.Module, runtime: str, tmp_path: Path) -> None:
    """What stands between a grid and the last product only moves values: it must not hide the grid."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), pool, nn.Flatten())
    x = torch.rand(64, 1, 8, 8)
    model = nn.Sequential(features, nn.Linear(features(x[:1]).shape[1], 10)).eval()
    network = pj.compress(pj.capture(model, (x[:2],)), pj.Recipe(pj.Quantize()), data=[(x, None)]).network
    artifact = RUNTIMES.get(runtime).export(network, tmp_path / "net.onnx")
    assert artifact.parity.rms_rel < 0.01
    executed = RUNTIMES.get(runtime).load(artifact.path, f"{runtime}:threads=1").executed()
    assert _products(executed) == {"int8": 2}
    assert sum(e.op in ("QGemm", "FullyConnected") for e in executed) == 1
    assert isinstance(pool, nn.AdaptiveAvgPool2d) or "DequantizeLinear" not in {e.op for e in executed}


@pytest.mark.parametrize("runtime", INTEGERS)
def test_quantize_step_gives_integer_products(runtime: str, tmp_path: Path, pictures: Network) -> None:
    """The Step's own placement, an LSTM left in float, weights alone as integers."""
    network = pictures
    data = [(torch.rand(16, 3, 16, 16), None)]
    small = pj.compress(network, pj.Recipe(pj.Quantize()), data=data).network
    session = RUNTIMES.get(runtime).load(RUNTIMES.get(runtime).export(small, tmp_path / "a.onnx").path)
    assert set(_products(session.executed())) == {"int8"}
    stored = pj.compress(network, pj.Recipe(pj.Quantize(activations=None))).network
    artifact = RUNTIMES.get(runtime).export(stored, tmp_path / "b.onnx")
    assert artifact.parity.measure == "max_rel"
    session = RUNTIMES.get(runtime).load(artifact.path, f"{runtime}:precision=f32")
    assert session.precision == "f32"
    assert "DequantizeLinear" not in {e.op for e in session.executed()}  # widened once, at loading
