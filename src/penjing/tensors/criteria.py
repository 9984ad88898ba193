"""What a unit of a channel group is worth: one function a criterion, slices → scores.

A unit (one channel, one head) owns slices of several tensors. Scores are compared inside a group only; how much each
group loses is the allocation's business (`penjing.tensors.allocation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.errors import RecipeError
from penjing.registry import Registry


@dataclass(frozen=True)
class Slices:
    """What a group owns of one tensor: `index` (units, k) along `dim`. `gradients` are those of a few batches, if asked
    for; `gain` says that the tensor is the multiplier of a norm."""

    name: str
    tensor: Tensor
    dim: int
    index: Tensor
    gain: bool = False
    gradients: tuple[Tensor, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The entries of a tensor of the same shape that each unit owns: (units, entries)."""
        return (
            tensor.detach().movedim(self.dim, 0).flatten(1)[self.index].flatten(1)
            if tensor.ndim > 1
            else tensor.detach()[self.index]
        )


Criterion = Callable[[Sequence[Slices], torch.Generator], Tensor]
CRITERIA: Registry[Criterion] = Registry("criterion", error=RecipeError)

#: Criteria that need gradients (data with labels and a task).
NEED_GRADIENTS = frozenset({"taylor"})
#: Decided by `penjing.tensors.least_squares.eliminate` on the inputs of the layers behind; falls back to `l2` without
#: data.
ELIMINATION = "obs"


def _mean_share(parts: Sequence[Tensor], units: int) -> Tensor:
    """Mean of the parts, each scaled to mean 1 over the units, so that no tensor outshouts the others."""
    total = torch.zeros(units, dtype=torch.float64)
    for part in parts:
        total += part.double() / part.double().mean().clamp_min(1e-30)
    return total / max(len(parts), 1)


def _units(slices: Sequence[Slices]) -> int:
    return slices[0].index.shape[0]


def _norm(slices: Sequence[Slices], order: int) -> Tensor:
    weights = [s for s in slices if s.tensor.ndim > 1] or list(slices)
    return _mean_share([s.of(s.tensor).double().norm(p=order, dim=1) for s in weights], _units(slices))


@CRITERIA.register("l1")
def l1(slices: Sequence[Slices], generator: torch.Generator) -> Tensor:
    """Sum of absolute weights (Li et al. 2017, "Pruning filters for efficient ConvNets"), over all coupled tensors."""
    return _norm(slices, 1)


@CRITERIA.register("l2")
def l2(slices: Sequence[Slices], generator: torch.Generator) -> Tensor:
    """Euclidean norm of the weights, over all coupled tensors (Fang et al. 2023, "DepGraph")."""
    return _norm(slices, 2)


@CRITERIA.register("bn_scale")
def bn_scale(slices: Sequence[Slices], generator: torch.Generator) -> Tensor:
    """Size of the norm's multiplier (Liu et al. 2017, "Network slimming"); a group without a norm is judged by `l2`."""
    gains = [s for s in slices if s.gain]
    return (
        _mean_share([s.of(s.tensor).abs().mean(1) for s in gains], _units(slices)) if gains else l2(slices, generator)
    )


@CRITERIA.register("taylor")
def taylor(slices: Sequence[Slices], generator: torch.Generator) -> Tensor:
    """First-order change of the loss, squared and averaged over batches (Molchanov et al. 2019, "Importance estimation
    for neural network pruning"), of all the unit's entries together."""
    with_gradients = [s for s in slices if s.gradients]
    if not with_gradients:
        raise RecipeError(
            "criterion 'taylor' needs data with labels and a task", hint="give data and task, or use 'l2'"
        )
    batches = len(with_gradients[0].gradients)
    score = torch.zeros(_units(slices), dtype=torch.float64)
    for batch in range(batches):
        for s in with_gradients:
            # Tensor by tensor: over the whole unit the terms of a layer and the next cancel by their scale symmetry.
            score += (s.of(s.gradients[batch]).double() * s.of(s.tensor).double()).sum(1).square()
    return score / batches


@CRITERIA.register("random")
def random(slices: Sequence[Slices], generator: torch.Generator) -> Tensor:
    """A draw: the baseline that every other criterion must beat."""
    return torch.rand(_units(slices), generator=generator, dtype=torch.float64)


@CRITERIA.register(ELIMINATION)
def obs(slices: Sequence[Slices], generator: torch.Generator) -> Tensor:
    """Stands for group Optimal Brain Surgeon; where a group has no layer behind it to ask, `l2` answers."""
    return l2(slices, generator)
