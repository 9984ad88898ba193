"""Weights stored (inputs, outputs), as GPT-2's are: products become linear layers, and what rounds by outputs works."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.analysis.passes import outputs_first, simplified
from penjing.data import Data
from penjing.network import MaskWeights, Network
from penjing.recipe import Context, Plan
from penjing.runtimes import get_runtime

X = torch.randn(40, 6, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    12, 12, generator=torch.Generator().manual_seed(1)
)


class Block(nn.Module):
    """A norm, `addmm` over rows as in transformers' Conv1D, a product without bias, and one whose weight is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.bias = nn.Parameter(torch.randn(12, 20) / 4), nn.Parameter(torch.randn(20))
        self.down, self.twice = nn.Parameter(torch.randn(20, 12) / 4), nn.Parameter(torch.randn(12, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.bias, self.norm(x).view(-1, 12), self.up).relu() @ self.down
        return (x @ self.twice).tanh() @ self.twice


@functools.cache
def network() -> Network:
    torch.manual_seed(0)
    return pj.capture(Block().eval(), (X[:2],))


def operators(network: Network) -> list[str]:
    names = [str(n.target) for n in network.graph_module.graph.nodes]
    return [n.split(".")[1] for n in names if n.split(".")[1:2] in (["addmm"], ["mm"], ["matmul"], ["linear"])]


def planned(step: pj.Step) -> tuple[Plan, Network]:
    plan = step.plan(network(), Context(original=network(), data=Data(X)))
    return plan, network().apply(plan.edits)


def test_nothing_changes_but_the_layout(tmp_path: Path) -> None:
    mask = torch.rand(12, 20, generator=torch.Generator().manual_seed(2)) > 0.5
    masked = network().apply([MaskWeights(parameter="up", mask=mask)])
    turned, edits = simplified(masked, outputs_first)
    assert operators(turned)[:2] == ["linear", "linear"] and "linear" not in operators(turned)[2:]
    torch.testing.assert_close(turned.run(X)[0], masked.run(X)[0])
    held = turned.tensors()
    assert {n: tuple(held[n].shape) for n in ("up", "down", "twice")} == {
        "up": (20, 12),
        "down": (12, 20),
        "twice": (12, 12),
    }
    assert torch.equal(turned.masks["up"], mask.T) and set(turned.parameter_names) == set(masked.parameter_names)
    assert len(edits) == 3 and not outputs_first(turned)
    assert tuple(masked.tensors()["up"].shape) == (12, 20), "the network given is never changed"
    Plan(step=pj.Quantize(), edits=edits, reasons=()).save(tmp_path / "plan.safetensors")


@pytest.mark.parametrize("granularity", ["channel", "group:4"])
def test_gptq_rounds_them(granularity: str) -> None:
    off = {}
    for rounding in ("nearest", "gptq"):
        step = pj.Quantize(weights="int3", activations=None, rounding=rounding, granularity=granularity)
        plan, quantized = planned(step)
        off[rounding] = float((quantized.run(X)[0] - network().run(X)[0]).square().mean().sqrt())
    assert "3 of 3 weights rounded by gptq" in plan.notes or "2 of 3 weights rounded by gptq" in plan.notes
    assert off["gptq"] < 0.85 * off["nearest"], off
    assert quantized.tensors()["up"].shape == (20, 12) and not quantized.tensors()["up"].is_floating_point()


def test_awq_scales_what_they_read() -> None:
    plan, scaled = planned(pj.Equalize(criterion="awq", weights="int3", granularity="group:4"))
    assert [r.layer for r in plan.reasons] == ["norm", "up"] and "1 of" in plan.notes[0] or "2 of" in plan.notes[0]
    torch.testing.assert_close(scaled.run(X)[0], network().run(X)[0], rtol=1e-4, atol=1e-5)


def test_they_leave_as_blocks(tmp_path: Path) -> None:
    quantized = planned(pj.Quantize(weights="int4", activations=None, granularity="group:4"))[1]
    artifact = get_runtime("onnxruntime").export(quantized, tmp_path / "net.onnx", samples=(X,))
    assert artifact.parity.max_rel < 1e-5
