"""What a unit of a channel group is worth: one function a criterion, units → scores, the lowest go first.

A unit (one channel, one head) owns slices of several tensors and makes values. Scores are compared inside a group only;
how much each group loses is the allocation's business (`penjing.tensors.allocation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Activity:
    """What the units' values did on samples, (units,) each, as the layers behind read them: after a norm or
    nonlinearity, if there is one.

    `mean`, `magnitude` (mean of absolute values) and `deviation` over samples and positions; `zeros`: the share that
    is exactly zero; `rank`: the mean rank of a unit's maps, one a sample (None: not asked for, or they are no maps).
    """

    mean: Tensor
    magnitude: Tensor
    deviation: Tensor
    zeros: Tensor
    rank: Tensor | None = None


@dataclass(frozen=True)
class Units:
    """The units of one group as a criterion sees them: what they own, and what they did, where that was asked for."""

    slices: tuple[Slices, ...]
    activity: Activity | None = None

    def __len__(self) -> int:
        return self.slices[0].index.shape[0]

    @property
    def weights(self) -> list[Slices]:
        """The slices of matrices and kernels; all slices where there is no matrix."""
        return [s for s in self.slices if s.tensor.ndim > 1] or list(self.slices)


Judge = Callable[[Units, torch.Generator], Tensor]

#: What a criterion may need besides the weights: gradients of the task's loss, or values on samples (with their ranks).
NEEDS = ("gradients", "activity", "ranks")


@dataclass(frozen=True)
class Criterion:
    """A registered criterion: calls `judge(units, generator)` for one score a unit, float64."""

    judge: Judge
    needs: frozenset[str] = field(default_factory=frozenset)

    def __call__(self, units: Units, generator: torch.Generator) -> Tensor:
        return self.judge(units, generator)


CRITERIA: Registry[Criterion] = Registry("criterion", error=RecipeError)

#: Decided by `penjing.tensors.least_squares.eliminate` on the inputs of the layers behind; falls back to `l2` without
#: data.
ELIMINATION = "obs"


def criterion(name: str, *, needs: Sequence[str] = ()) -> Callable[[Judge], Judge]:
    """Decorator: registers a criterion, which says what it `needs` besides weights (of `NEEDS`)."""
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise RecipeError(f"criterion '{name}' cannot need '{unknown[0]}'", hint=f"known: {', '.join(NEEDS)}")

    def add(judge: Judge) -> Judge:
        CRITERIA.register(name)(Criterion(judge, frozenset(needs)))
        return judge

    return add


def require_samples(name: str, *, samples: bool, labels: bool) -> None:
    """Raises RecipeError if the criterion called `name` needs samples, or labels and a task, that are not there."""
    needs = CRITERIA.get(name).needs
    if "gradients" in needs and not (samples and labels):
        raise RecipeError(
            f"criterion '{name}' needs samples with labels and a task",
            hint="give data and task, or use 'l2', which needs neither",
        )
    if needs and not samples:
        raise RecipeError(f"criterion '{name}' needs samples", hint="give data, or use 'l2', which needs none")


def _mean_share(parts: Sequence[Tensor], units: int) -> Tensor:
    """Mean of the parts, each scaled to mean 1 over the units, so that no tensor outshouts the others."""
    total = torch.zeros(units, dtype=torch.float64)
    for part in parts:
        total += part.double() / part.double().mean().clamp_min(1e-30)
    return total / max(len(parts), 1)


def _norm(units: Units, order: int) -> Tensor:
    return _mean_share([s.of(s.tensor).double().norm(p=order, dim=1) for s in units.weights], len(units))


def _seen(units: Units, name: str) -> Activity:
    if units.activity is None:
        raise RecipeError(f"criterion '{name}' needs samples", hint="give data, or use 'l2', which needs none")
    return units.activity


@criterion("l1")
def l1(units: Units, generator: torch.Generator) -> Tensor:
    """Sum of absolute weights (Li et al. 2017, "Pruning filters for efficient ConvNets"), over all coupled tensors."""
    return _norm(units, 1)


@criterion("l2")
def l2(units: Units, generator: torch.Generator) -> Tensor:
    """Euclidean norm of the weights, over all coupled tensors (Fang et al. 2023, "DepGraph")."""
    return _norm(units, 2)


@criterion("bn_scale")
def bn_scale(units: Units, generator: torch.Generator) -> Tensor:
    """Size of the norm's multiplier (Liu et al. 2017, "Network slimming"); a group without a norm is judged by `l2`."""
    gains = [s.of(s.tensor).abs().mean(1) for s in units.slices if s.gain]
    return _mean_share(gains, len(units)) if gains else l2(units, generator)


@criterion("fpgm")
def fpgm(units: Units, generator: torch.Generator) -> Tensor:
    """Sum of the distances to all other units' weights: what lies near the geometric median can be said by the others
    (He et al. 2019, "Filter pruning via geometric median"), over all coupled tensors."""
    parts = []
    for s in units.weights:
        rows = s.of(s.tensor).double()
        # Not by products: those lose the small distances, which decide.
        parts.append(torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1))
    return _mean_share(parts, len(units))


@criterion("degree")
def degree(units: Units, generator: torch.Generator) -> Tensor:
    """How many channels of the layers before and behind a unit is linked to.

    In the graph whose nodes are channels, two are linked where the kernel between them is stronger (Euclidean norm)
    than the mean kernel of its layer. Units that many depend on stay. Only counted: how strong a link is has no say.
    """
    parts = []
    for s in units.weights:
        strength = s.tensor.detach().double()
        if s.tensor.ndim > 2 and s.dim < 2:
            strength = strength.flatten(2).norm(dim=2)
        parts.append(s.of((strength.abs() > strength.abs().mean()).double()).sum(1))
    return _mean_share(parts, len(units))


def _with_gradients(units: Units, name: str) -> list[Slices]:
    found = [s for s in units.slices if s.gradients]
    if not found:
        raise RecipeError(
            f"criterion '{name}' needs samples with labels and a task",
            hint="give data and task, or use 'l2', which needs neither",
        )
    return found


@criterion("taylor", needs=["gradients"])
def taylor(units: Units, generator: torch.Generator) -> Tensor:
    """First-order change of the loss, squared and averaged over batches (Molchanov et al. 2019, "Importance estimation
    for neural network pruning"), of all the unit's entries together."""
    score = torch.zeros(len(units), dtype=torch.float64)
    for s in _with_gradients(units, "taylor"):
        for gradient in s.gradients:
            # Tensor by tensor: over the whole unit the terms of a layer and the next cancel by their scale symmetry.
            score += (s.of(gradient).double() * s.of(s.tensor).double()).sum(1).square() / len(s.gradients)
    return score


@criterion("hessian", needs=["gradients"])
def hessian(units: Units, generator: torch.Generator) -> Tensor:
    """Second-order change of the loss, ½ Σ h·w² over the unit's entries (LeCun et al. 1990, "Optimal brain damage"),
    the diagonal h of the Hessian taken from the empirical Fisher information: the mean squared gradient over batches.
    """
    score = torch.zeros(len(units), dtype=torch.float64)
    for s in _with_gradients(units, "hessian"):
        for gradient in s.gradients:
            score += (s.of(gradient).double() * s.of(s.tensor).double()).square().sum(1) / (2 * len(s.gradients))
    return score


@criterion("apoz", needs=["activity"])
def apoz(units: Units, generator: torch.Generator) -> Tensor:
    """One less the average percentage of zeros among a unit's values (Hu et al. 2016, "Network trimming"); a group
    whose values are never zero is judged by `mean_activation`."""
    seen = _seen(units, "apoz")
    return 1 - seen.zeros if bool(seen.zeros.any()) else seen.magnitude


@criterion("mean_activation", needs=["activity"])
def mean_activation(units: Units, generator: torch.Generator) -> Tensor:
    """Mean absolute value (Molchanov et al. 2017, "Pruning convolutional neural networks", for rectified values)."""
    return _seen(units, "mean_activation").magnitude


@criterion("feature_rank", needs=["activity", "ranks"])
def feature_rank(units: Units, generator: torch.Generator) -> Tensor:
    """Mean rank of a unit's maps (Lin et al. 2020, "HRank"); a group whose units make no maps is judged by `l2`."""
    rank = _seen(units, "feature_rank").rank
    return l2(units, generator) if rank is None else rank


@criterion("random")
def random(units: Units, generator: torch.Generator) -> Tensor:
    """A draw: the baseline that every other criterion must beat."""
    return torch.rand(len(units), generator=generator, dtype=torch.float64)


@criterion(ELIMINATION)
def obs(units: Units, generator: torch.Generator) -> Tensor:
    """Stands for group Optimal Brain Surgeon; where a group has no layer behind it to ask, `l2` answers."""
    return l2(units, generator)
