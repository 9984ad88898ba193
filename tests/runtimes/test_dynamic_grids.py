"""Activations on grids that are found in every run: the numbers, the kernels that run, and what else may be done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.network import Network, QuantizeTensor, RemoveChannels
from penjing.recipe import Context
from penjing.runtimes import get_runtime

X = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(0))


class Rows(nn.Module):
    """A convolution, two linear layers with biases (one as Gemm) and a product without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 3, 3, padding=1)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.first(x)).relu()).flatten(1))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return pj.capture(Rows().eval(), (X[:2],))


def dynamic(network: Network, **fields: object) -> Network:
    step = pj.Quantize(activations="dynamic", **fields)  # type: ignore[arg-type]
    return network.apply(step.plan(network, Context(original=network)).edits)


def test_the_graph_computes_what_torch_says(network: Network) -> None:
    node = next(n for n in network.graph_module.graph.nodes if "relu" in n.name).name
    edit = QuantizeTensor(tensor=node, scale=1.0, zero_point=0, dtype="uint8", dynamic=True)
    held = {n: t.detach() for n, t in network.tensors().items()}
    x = nn.functional.conv1d(X, held["first.weight"], held["first.bias"], padding=1)
    x = nn.functional.linear(x, held["up.weight"], held["up.bias"]).relu()
    scale = float(x.max()) / 255
    x = torch.fake_quantize_per_tensor_affine(x, scale, 0, 0, 255)
    x = nn.functional.linear(nn.functional.linear(x, held["down.weight"]).flatten(1), held["head.weight"])
    torch.testing.assert_close(network.apply([edit]).run(X)[0], x + held["head.bias"], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integer_products_run(network: Network, weights: str, symmetric: bool, tmp_path: Path) -> None:
    quantized = dynamic(network, weights=weights, symmetric=symmetric)
    engine = get_runtime("onnxruntime")
    artifact = engine.export(quantized, tmp_path / "net.onnx", samples=X)
    executed = Counter(e.op for e in engine.load(artifact.path).executed())
    assert executed["DynamicQuantizeMatMul"] == 3, executed
    assert not executed["DequantizeLinear"], "what stays float is widened once, at loading"
    assert artifact.parity.rms_rel < 1e-4, "the grids are the network's own"
    small = get_runtime("openvino").export(quantized, tmp_path / "net2.onnx", samples=X)
    assert {w.kind for w in small.widened} == {"dynamic"} and len(small.widened) == 3


def test_no_samples_are_needed_and_reasons_say_what_is_dynamic(network: Network) -> None:
    plan = pj.Quantize(activations="dynamic").plan(network, Context(original=network))
    choices = {r.layer: (r.choice, r.why) for r in plan.reasons}
    assert choices["up"][0] == "int8 weights per channel, dynamic inputs"
    assert "dynamic" not in choices["first"][0] and "computed in float" in choices["first"][1]


def test_kept_and_pruned_further(network: Network, tmp_path: Path) -> None:
    quantized = dynamic(network)
    again = Network.load(quantized.save(tmp_path / "net.safetensors"))
    torch.testing.assert_close(again.run(X), quantized.run(X), rtol=0, atol=0)
    smaller = quantized.apply([RemoveChannels(parameter="first.weight", dim=0, indices=(1,))])
    assert smaller.tensors()["head.weight"].shape == (5, 64)
    assert smaller.run(X)[0].shape == (6, 5)
