"""The zoo's register, and weights and statistics that hide nothing (no zeros, no ones, no constants)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.errors import InputError
from penjing.registry import did_you_mean

Inputs = tuple[Tensor, ...] | dict[str, Tensor]
Made = tuple[nn.Module, Inputs]


@dataclass(frozen=True)
class Architecture:
    """A small network of the zoo: how to make it, what kind it is, and whether analysing it takes under two seconds."""

    name: str
    kind: str
    make: Callable[[], Made]
    quick: bool


ZOO: dict[str, Architecture] = {}
IMAGE = (2, 3, 16, 16)


def entry(kind: str, *, quick: bool = False) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Registers a function that makes a network and inputs for a batch of two under its own name."""

    def register(function: Callable[[], Made]) -> Callable[[], Made]:
        if function.__name__ in ZOO:
            raise InputError(f"the zoo has a network called {function.__name__!r} already")
        ZOO[function.__name__] = Architecture(function.__name__, kind, function, quick)
        return function

    return register


def build(name: str) -> Made:
    """A network of the zoo with random weights and statistics, and inputs for a batch of two."""
    if name not in ZOO:
        raise InputError(f"the zoo has no network called {name!r}", hint=did_you_mean(name, ZOO))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = ZOO[name].make()
    randomise(model)
    return model, inputs


def randomise(model: nn.Module) -> None:
    """Draws all weights and running statistics anew, so that every channel matters and none equals another."""
    generator = torch.Generator().manual_seed(1)

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                continue
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
