"""How far a student's inner values are from a teacher's: (samples, …, channels) each, of one shape but for the channels
where a loss does not compare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penjing.errors import RecipeError
from penjing.registry import Registry
from penjing.tensors.distillation import matching

#: How alike two samples must be before they are told apart (van den Oord et al. 2018; Tian et al. take the same).
CONTRAST_TEMPERATURE = 0.07


@dataclass(frozen=True)
class FeatureLoss:
    """`compute(student, teacher)` gives a scalar. `adapts`: whether the student's values are first brought to the
    teacher's channels ("values"), both to vectors of one length ("vectors"), or nothing is learned beside (None).
    `positions`: whether it compares positions, of which there must then be several."""

    compute: Callable[[Tensor, Tensor], Tensor]
    adapts: str | None = None
    positions: bool = False


FEATURE_LOSSES: Registry[FeatureLoss] = Registry("feature loss", error=RecipeError)


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the maps of attention: the channels' mean square at each position, as a unit vector
    (Zagoruyko & Komodakis 2017, "Paying more attention to attention", activation-based, sum of squares); the mean over
    samples."""
    one, other = (F.normalize(x.square().mean(-1).flatten(1), dim=1) for x in (student, teacher))
    return (one - other).square().sum(1).mean()


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of how alike the samples of a batch are: inner products of their values, each row a unit
    vector (Tung & Mori 2019, "Similarity-preserving knowledge distillation")."""
    one, other = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher))
    return (one - other).square().mean()


def contrast(student: Tensor, teacher: Tensor, temperature: float = CONTRAST_TEMPERATURE) -> Tensor:
    """Cross-entropy of finding each sample's own teacher among those of the batch, and its own student among theirs, by
    the cosine of vectors (n, d). As contrastive representation distillation (Tian et al. 2020), with the batch as
    negatives and InfoNCE in place of a memory of other samples and noise-contrastive estimation."""
    alike = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T / temperature
    own = torch.arange(len(alike), device=alike.device)
    return (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2


# The teacher's variance is what one unit of error is: Romero et al. 2015, "FitNets", take the plain squared error.
FEATURE_LOSSES.register("fitnet")(FeatureLoss(matching, "values"))
FEATURE_LOSSES.register("attention")(FeatureLoss(attention, positions=True))
FEATURE_LOSSES.register("similarity")(FeatureLoss(similarity))
FEATURE_LOSSES.register("contrast")(FeatureLoss(contrast, "vectors"))
