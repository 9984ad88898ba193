"""The average of the weights over the steps of a training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Average:
    """An exponential moving average of a module's floating tensors (Polyak & Juditsky 1992, "Acceleration of
    stochastic approximation by averaging")."""

    def __init__(self, module: nn.Module, keep: float) -> None:
        self._keep = keep
        named = (*module.named_parameters(), *module.named_buffers())
        now = {n: t.detach() for n, t in named if t.is_floating_point()}
        self._now = list(now.values())
        self._mean = [t.clone() for t in self._now]
        self.by_name = dict(zip(now, self._mean, strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number `step`."""
        # Of few steps all count about the same: an average from the start on would hold on to what was not trained.
        keep = min(self._keep, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mean, self._now, 1 - keep)

    @torch.no_grad()
    def apply(self) -> None:
        """Gives the module the average."""
        torch._foreach_copy_(self._now, self._mean)

    @torch.no_grad()
    def put_back(self, kept: Mapping[str, Tensor]) -> None:
        """Goes on from an average that was kept."""
        for name, mean in self.by_name.items():
            mean.copy_(kept[name])
