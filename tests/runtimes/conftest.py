"""Networks that several tests of runtimes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.network import Network, QuantizeTensor


class Pictures(nn.Module):
    """Convolution, batch norm, residual, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.block(x) + x
        return self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))


class Small(nn.Module):
    """Asymmetric padding, depthwise and ordinary convolutions, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.first = nn.Conv2d(3, 16, 3, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, stride=2)
        self.last = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.pad(x)).relu()
        x = self.depthwise(self.pad(x)).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


LAYERS = ("first", "depthwise", "last", "head")


def _quantized(*, dtype: str, limit: int) -> Network:
    """Small on grids made by hand: weights within ±`limit`, one grid for each activation."""
    torch.manual_seed(0)
    network = pj.capture(Small(), (torch.rand(2, 3, 16, 16),))
    low, high = (-128, 127) if dtype == "int8" else (0, 255)
    values: dict[str, torch.Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Watch(network.graph_module).run(*network.bind(network.example(16)).values())
    nodes = list(network.graph_module.graph.nodes)
    edits: list[Any] = []
    for node in nodes:
        wanted = node.op == "placeholder" or any(w in str(node.target) for w in ("relu", "mean"))
        if not wanted:
            continue
        value = values[node.name]
        least, most = min(0.0, float(value.min())), float(value.max())
        scale = (most - least) / 255
        zero = round(low - least / scale)
        edits.append(
            QuantizeTensor(
                tensor=node.name,
                scale=torch.tensor(scale),
                zero_point=torch.tensor(zero),
                dtype=dtype,
                axis=None,
                quant_min=low,
                quant_max=high,
            )
        )
    for layer in LAYERS:
        weight = network.tensors()[f"{layer}.weight"].detach()
        scale = weight.abs().flatten(1).amax(1) / limit
        edits.append(
            QuantizeTensor(
                tensor=f"{layer}.weight",
                scale=scale,
                zero_point=torch.zeros(len(scale), dtype=torch.int64),
                dtype="int8",
                axis=0,
                quant_min=-limit,
                quant_max=limit,
            )
        )
    return network.apply(edits)


@pytest.fixture(scope="session")
def pictures() -> Network:
    torch.manual_seed(0)
    model = Pictures()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.data.uniform_(0.02, 0.1)
            layer.running_mean.data.normal_(0, 0.1)
    return pj.capture(model, (torch.rand(2, 3, 16, 16),))


@pytest.fixture(scope="session")
def quantized() -> Callable[..., Network]:
    return _quantized
