"""Biases and weights that ONNX Runtime would round by itself: what it computes is the network's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.data import Data
from penjing.network import Network
from penjing.recipe import Context
from penjing.runtimes import get_runtime

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantized(model: nn.Module, inputs: Tensor = X, **fields: object) -> Network:
    network = pj.capture(model.eval(), (inputs[:2],))
    plan = pj.Quantize(**fields).plan(network, Context(original=network, data=Data(inputs)))  # type: ignore[arg-type]
    return network.apply(plan.edits)


def decibels(network: Network, path: Path, inputs: Tensor = X) -> float:
    """Signal to noise of a file in ONNX Runtime as users open it, against the network's own outputs."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    (wanted,) = network.run(network.bind(inputs))
    noise = np.square(found - wanted.numpy(), dtype=np.float64).sum()
    return float(10 * np.log10(wanted.double().square().sum() / max(noise, 1e-30)))


def uneven() -> nn.Module:
    """Weights whose channels are a thousand times apart: int8 with one scale would lose half of them."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 2, 2)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Flatten(), nn.Linear(2048, 10))
    with torch.no_grad():
        layers[1].weight *= torch.logspace(0, -3, 16)[:, None, None, None]
        layers[2].weight *= torch.logspace(0, 3, 16)[:, None, None, None]
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": "int16"},
        {"weights": {}},
        {"weights": "int8", "granularity": "group:4"},
        {"weights": "int4", "granularity": "group:4"},
        {"weights": "int4", "levels": "power-of-two"},
    ],
)
def test_float_and_wide_weights_stay_so_beside_integer_activations(tmp_path: Path, fields: dict[str, object]) -> None:
    network = quantized(uneven(), **fields)
    get_runtime("onnxruntime").export(network, tmp_path / "net.onnx")
    assert decibels(network, tmp_path / "net.onnx") > 60, "a weight on 8 bits would give 30"


def test_a_float_weight_without_bias_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.ConvTranspose2d(8, 6, 2, 2, groups=2, bias=False)
    last = nn.Linear(864, 10, bias=False)
    network = quantized(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Flatten(), last), weights={})
    get_runtime("onnxruntime").export(network, tmp_path / "net.onnx")
    assert decibels(network, tmp_path / "net.onnx") > 60


def weak(kind: str, factor: float) -> tuple[nn.Module, nn.Module]:
    """A network, and its layer with one output that has small weights and a bias of 1."""
    torch.manual_seed(0)
    layer: nn.Conv2d | nn.Linear | nn.ConvTranspose2d = {
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=2),
        "plain": nn.Conv2d(8, 8, 3, padding=1),
        "transposed": nn.ConvTranspose2d(8, 8, 3, padding=1),
    }.get(kind) or nn.Linear(512, 5)
    with torch.no_grad():
        outputs = layer.weight.swapaxes(0, 1) if kind == "transposed" else layer.weight
        outputs[0] *= factor
        layer.bias[0] = 1.0  # type: ignore[index]
    front = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    if kind == "linear":
        return nn.Sequential(*front, nn.Flatten(), layer), layer
    return nn.Sequential(*front, layer, nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)), layer


@pytest.mark.parametrize("factor", [1e-5, 1e-30, 0.0])
@pytest.mark.parametrize("kind", ["depthwise", "grouped", "plain", "linear", "transposed"])
def test_weak_outputs_keep_their_bias(tmp_path: Path, kind: str, factor: float) -> None:
    network = quantized(weak(kind, factor)[0])
    artifact = get_runtime("onnxruntime").export(network, tmp_path / "net.onnx", samples=X)
    assert decibels(network, artifact.path) > 50, "an overflow gives 5"
    executed = [e.op for e in get_runtime("onnxruntime").load(artifact.path).executed()]
    assert executed.count("QLinearConv") + executed.count("QGemm") >= 2, "and still integer kernels"


@pytest.mark.parametrize("kind", ["plain", "linear", "transposed"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_layer_of_zeros_keeps_its_bias(tmp_path: Path, kind: str, granularity: str) -> None:
    model, layer = weak(kind, 1.0)
    nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    network = quantized(model, granularity=granularity)
    get_runtime("onnxruntime").export(network, tmp_path / "net.onnx", samples=X)
    assert decibels(network, tmp_path / "net.onnx") > 50


def test_biases_that_fit_leave_the_scales_alone(tmp_path: Path) -> None:
    network = quantized(weak("plain", 1.0)[0])
    get_runtime("onnxruntime").export(network, tmp_path / "net.onnx")
    held = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "net.onnx").graph.initializer}
    scales = network.tensors()["2.weight_scale"].numpy()
    assert any(np.array_equal(v, scales) for v in held.values() if v.shape == scales.shape)
