"""Small networks of many families, with weights and statistics that hide nothing (no zeros, no ones, no constants)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

ZOO: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {}
IMAGE = (2, 3, 16, 16)


def entry(
    function: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]],
) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    ZOO[function.__name__] = function
    return function


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of the zoo with random weights and statistics, and inputs for a batch of two."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = ZOO[name]()
    randomise(model)
    return model, inputs


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            last = name.rpartition(".")[2]
            if p.dim() > 1 and p.numel() > max(p.shape):
                p.copy_(normal(p) * 1.5 / (p.numel() / p.shape[0]) ** 0.5)
            elif "weight" in last or "gamma" in last or "scale" in last or "original" in last:
                p.copy_(1 + 0.3 * normal(p))
            else:
                p.copy_(0.3 * normal(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * normal(b))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator))
