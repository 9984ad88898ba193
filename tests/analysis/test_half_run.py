"""Graphs run in bfloat16 and channels-last give about what they give in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import penjing as pj
from penjing.analysis import half_run
from penjing.analysis.half_run import HalfRun
from penjing.testing.oracles import captured, inputs_of


class Written(nn.Module):
    """Writes into values that are read again, and views what convolutions give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.mul_(2.0).exp_().relu_()
        return self.last(y.view(len(y), -1).log1p())


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_run, "fast_bfloat16", lambda: True)


@pytest.mark.parametrize("name", ["resnet", "vit", "lstm", "generator", "bert", "shufflenet"])
def test_values_are_close_to_those_of_float32(name: str) -> None:
    network = captured(name)
    _check(network, tuple(inputs_of(network).values()))


def test_what_is_written_in_place_and_viewed() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    _check(pj.capture(Written().eval(), inputs=x), (x,))


def test_int_and_double_stay() -> None:
    network = pj.capture(nn.Sequential(nn.Linear(4, 4)).double().eval(), inputs=torch.randn(2, 4).double())
    x = torch.randn(2, 4).double()
    torch.testing.assert_close(HalfRun(network.graph_module, half=True).run(x)[0], network.run(x)[0])


class Cancelling(nn.Module):
    """Finite in float32; with inputs of bfloat16 the root's argument falls below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * 0.1 + 3
        centres = torch.arange(64.0, device=x.device).view(8, 8) / 100 + 2.7
        return self.last(((y * y).sum(1, keepdim=True) + (centres * centres).sum(1) - 2 * y @ centres.t()).sqrt())


@pytest.mark.parametrize("batches", [1, 4])
def test_ranges_of_what_cancels_are_those_of_float32(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Also where only a later batch shows it."""
    torch.manual_seed(0)
    x = torch.randn(32 * batches, 8) * torch.tensor([0.01] * 32 * (batches - 1) + [3.0] * 32)[:, None]
    data = torch.utils.data.TensorDataset(x, torch.zeros(len(x), dtype=torch.int64))
    network = pj.capture(Cancelling().eval(), inputs=x[:2])
    assert bool(torch.isfinite(network.run(x)[0]).all())
    recipe = pj.Recipe(pj.Quantize(correct_bias=False, correct_scale=False))
    found = pj.compress(network, recipe, data=data).network(x)
    monkeypatch.setattr(half_run, "fast_bfloat16", lambda: False)
    wanted = pj.compress(network, recipe, data=data).network(x)
    assert (found - wanted).norm() < 0.01 * wanted.norm()


def _check(network: pj.Network, x: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        wanted, given = (pytree.tree_leaves(HalfRun(network.graph_module, half=half).run(*x)) for half in (False, True))
    for plain, short in zip(wanted, given, strict=True):
        assert plain.shape == short.shape
        assert 0 < (short.float() - plain.float()).norm() < 0.03 * plain.float().norm()
