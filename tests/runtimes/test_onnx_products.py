"""Layers that stand on integer grids and run in float are named, from what the runtime executed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.data import Data
from penjing.evaluation import LatencySettings
from penjing.network import Network
from penjing.recipe import Context
from penjing.runtimes import get_runtime

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
QUICK = LatencySettings(warm_up=1, seconds=0.01, least_rounds=3, most_rounds=3)
FLOATS = {"f32", "bf16", "f16"}


class Pixels(nn.Module):
    """Ordinary and transposed convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(1024, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.first(x).relu()).relu().flatten(1))


class Outer(nn.Module):
    """A product of two activations between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.matmul(self.left(x).unsqueeze(2), self.right(x).unsqueeze(1))
        return self.head(product.flatten(1))


def quantized(model: nn.Module, inputs: Tensor, **fields: object) -> Network:
    torch.manual_seed(0)
    network = pj.capture(model.eval(), (inputs[:2],))
    plan = pj.Quantize(**fields).plan(network, Context(original=network, data=Data(inputs)))  # type: ignore[arg-type]
    return network.apply(plan.edits)


def named(network: Network, runtime: str, folder: Path) -> dict[str, str]:
    engine = get_runtime(runtime)
    path = engine.export(network, folder / "net.onnx").path
    return engine.in_float(network, path, engine.load(path))


@pytest.mark.parametrize(
    ("runtime", "fields", "layers"),
    [
        ("onnxruntime", {}, {"up"}),  # it has no integer kernel for transposed convolutions
        ("openvino", {}, set()),
        ("onnxruntime", {"weights": "int16"}, {"first", "up", "head"}),
        ("openvino", {"weights": "int16"}, {"first", "up", "head"}),
        ("onnxruntime", {"weights": "int8", "granularity": "group:3"}, {"first", "up", "head"}),
        ("onnxruntime", {"weights": {"first.*": "int8"}}, set()),  # the others are float by the plan itself
        ("onnxruntime", {"activations": None}, set()),
        ("openvino", {"activations": None}, set()),
    ],
)
def test_layers_on_integer_grids_that_ran_in_float(
    tmp_path: Path, runtime: str, fields: dict[str, object], layers: set[str]
) -> None:
    found = named(quantized(Pixels(), X, **fields), runtime, tmp_path)
    assert set(found) == layers and set(found.values()) <= FLOATS


def test_a_product_of_activations_has_the_name_of_its_value(tmp_path: Path) -> None:
    network = quantized(Outer(), ROWS)
    assert named(network, "onnxruntime", tmp_path) == {}
    found = named(network, "openvino", tmp_path)
    executed = get_runtime("openvino").load(tmp_path / "net.onnx").executed()
    assert {e.precision for e in executed if e.op == "MatMul"} == {found["matmul"]}


def test_products_of_bits_are_products_of_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(384, 200), nn.ReLU(), nn.Linear(200, 3))
    network = quantized(wide, torch.randn(16, 384), weights="int4", granularity="group:128")
    found = named(network, "onnxruntime", tmp_path)
    assert found["0"] == "f32"


def test_reports_name_them() -> None:
    network = quantized(Pixels(), X)
    report = pj.evaluate(network, Data(X), target="onnxruntime", latency=QUICK, memory=False)
    assert report.to_dict()["targets"][0]["in_float"] == {"up": "f32"}
    assert "On onnxruntime 1 layer on integer grids really ran in f32: up." in str(report)
