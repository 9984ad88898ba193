"""What a single weight is worth: one function a criterion, evidence → scores, of which the lowest go.

How scores are compared, in a row, a tensor or the whole network, is decided in `penjing.tensors.sparsity`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penjing.errors import RecipeError
from penjing.registry import Registry

Needs = Literal["gradients", "inputs", "movement", "reconstruction"]


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at of one tensor; all of the shape of `weight`, None where it did not ask for it or it
    could not be had.

    `gradient` is the root mean square of the loss's gradient over batches, `inputs` the Euclidean norm, over samples
    and positions, of what each weight multiplies, `movement` how far it moved from zero in a short training.
    """

    weight: Tensor
    gradient: Tensor | None = None
    inputs: Tensor | None = None
    movement: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class WeightCriterion:
    """A way to judge weights: `score` gives a tensor of the weight's shape; `needs` is the evidence it asks for.

    `allocation` and `per_row` say how its scores are meant to be compared where nothing else is asked for. Criteria
    that need "reconstruction" also give the weights that stay new values; `score` then stands in for layers that cannot
    be reconstructed.
    """

    score: Callable[[Evidence, torch.Generator], Tensor]
    needs: Needs | None = None
    allocation: str = "global"
    per_row: bool = False


WEIGHT_CRITERIA: Registry[WeightCriterion] = Registry("criterion", error=RecipeError)


def magnitude(seen: Evidence, generator: torch.Generator) -> Tensor:
    """|w| (Han et al. 2015, "Learning both weights and connections")."""
    return seen.weight.detach().float().abs()


def gradient(seen: Evidence, generator: torch.Generator) -> Tensor:
    """How much the loss feels the weight: the root mean square of its gradient over batches."""
    return _asked(seen.gradient, "gradient").float()


def taylor(seen: Evidence, generator: torch.Generator) -> Tensor:
    """First-order change of the loss without the weight, √E[(w·∂L/∂w)²] over batches (Molchanov et al. 2019,
    "Importance estimation for neural network pruning")."""
    return gradient(seen, generator) * magnitude(seen, generator)


def movement(seen: Evidence, generator: torch.Generator) -> Tensor:
    """-Σ w·∂L/∂w over a short training under the mask (Sanh et al. 2020, "Movement pruning"); see
    `penjing.analysis.saliency.movement`."""
    return _asked(seen.movement, "movement").float()


def random(seen: Evidence, generator: torch.Generator) -> Tensor:
    """A draw: the baseline that every other criterion must beat."""
    return torch.rand(seen.weight.shape, generator=generator)


def wanda(seen: Evidence, generator: torch.Generator) -> Tensor:
    """|w|·‖x‖ (Sun et al. 2023, "A simple and effective pruning approach for large language models"); |w| where the
    inputs cannot be seen."""
    size = magnitude(seen, generator)
    return size if seen.inputs is None else size * seen.inputs


def _asked(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise RecipeError(
            f"criterion '{name}' needs samples and a task", hint="or use 'magnitude', which needs neither"
        )
    return value


for _name, _criterion in {
    "magnitude": WeightCriterion(score=magnitude),
    "gradient": WeightCriterion(score=gradient, needs="gradients"),
    "taylor": WeightCriterion(score=taylor, needs="gradients"),
    "movement": WeightCriterion(score=movement, needs="movement"),
    "random": WeightCriterion(score=random),
    "wanda": WeightCriterion(score=wanda, needs="inputs", allocation="uniform", per_row=True),
    "obc": WeightCriterion(score=magnitude, needs="reconstruction"),
    "sparsegpt": WeightCriterion(score=magnitude, needs="reconstruction"),
    "chita": WeightCriterion(score=magnitude, needs="reconstruction"),
}.items():
    WEIGHT_CRITERIA.register(_name)(_criterion)
