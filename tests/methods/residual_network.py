"""A small residual network, its samples, and what a Step makes of it: for tests of rounding."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import penjing as pj
from penjing.data import Data
from penjing.network import Network
from penjing.recipe import Context, Plan

# Neighbouring pixels are alike: on white noise nearest rounding would be the best there is.
X = nn.functional.avg_pool2d(torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0)), 5, 1) * 5
LAYERS = ("stem", "a", "b", "head")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.b(self.a(x).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


@functools.cache
def network() -> Network:
    torch.manual_seed(0)
    module = Residual()
    module(X)  # gives the batch norm something to remember
    return pj.capture(module.eval(), inputs=(X[:2],))


def planned(step: pj.Step, start: Network | None = None) -> tuple[Plan, Network]:
    start = start or network()
    plan = step.plan(start, Context(original=start, data=Data(X)))
    return plan, start.apply(plan.edits)


def off(quantized: Network) -> float:
    """Mean squared difference of the outputs on samples."""
    return float((quantized(X) - network()(X)).square().mean())
