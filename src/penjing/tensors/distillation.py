"""How far a student's outputs are from a teacher's.

Logits have their classes along `dim`, and one shape; every loss is a mean over everything else. The losses in
LOGIT_LOSSES are called with a `Softening`, and with labels where there are some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penjing.errors import RecipeError
from penjing.registry import Registry

#: The temperatures of "multi-level", as multiples of the one that is asked for (Jin et al. take 2 to 6 around 4).
_SPREAD = (0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True, kw_only=True)
class Softening:
    """Temperatures of teacher and student (None: the teacher's), the dimension of the classes, and the weights that
    "dkd" gives to the target class against the others and to the others among themselves."""

    temperature: float = 4.0
    student_temperature: float | None = None
    dim: int = 1
    target_weight: float = 1.0
    other_weight: float = 8.0


#: (student, teacher, softening, labels or None) → scalar.
LogitLoss = Callable[[Tensor, Tensor, Softening, Tensor | None], Tensor]
LOGIT_LOSSES: Registry[LogitLoss] = Registry("logit loss", error=RecipeError)


def soft_labels(
    student: Tensor, teacher: Tensor, temperature: float, dim: int = 1, student_temperature: float | None = None
) -> Tensor:
    """KL divergence of the teacher's class distribution at `temperature` from the student's at its own, times the
    product of both.

    Where they are one, the square keeps the gradient's size when the temperature changes (Hinton, Vinyals & Dean 2015,
    "Distilling the knowledge", §2).
    """
    own = student_temperature or temperature
    told, said = F.log_softmax(teacher / temperature, dim), F.log_softmax(student / own, dim)
    return (told.exp() * (told - said)).sum(dim).mean() * temperature * own


def matching(student: Tensor, teacher: Tensor, scale: float | None = None) -> Tensor:
    """Mean squared difference, relative to `scale` (None: the teacher's variance), for outputs that need not be logits.

    For logits this is the limit of soft labels at a high temperature (Hinton et al. 2015, §2.1).
    """
    return F.mse_loss(student, teacher) / (teacher.var().clamp_min(1e-12) if scale is None else scale)


def spread(teacher: Tensor) -> float:
    """What differences from a teacher's answers are measured by: their variance, their mean square where they are all
    alike, 1 where they are zero."""
    answers = teacher.detach().double()
    return float(answers.var(unbiased=False)) or float(answers.square().mean()) or 1.0


def standardized(logits: Tensor, dim: int = 1) -> Tensor:
    """Logits less their mean over the classes, over their standard deviation (Sun et al. 2024, "Logit standardization
    in knowledge distillation"): the student need not have the teacher's range, only its relations."""
    centred = logits - logits.mean(dim, keepdim=True)
    return centred / (logits.std(dim, keepdim=True) + 1e-7)


def decoupled(
    student: Tensor, teacher: Tensor, target: Tensor, temperatures: tuple[float, float]
) -> tuple[Tensor, ...]:
    """The two parts of the divergence of rows (n, classes) at `temperatures` (teacher's, student's), each (n,): of the
    target class against all others, and of the others among themselves; and the teacher's probability of the target.

    KL = first + (1 - probability) · second (Zhao et al. 2022, "Decoupled knowledge distillation", §3.1).
    """
    two, rest = [], []
    for logits, temperature in zip((teacher, student), temperatures, strict=True):
        chosen = F.one_hot(target, logits.shape[1]).bool()
        own = (logits / temperature)[chosen]
        others = (logits / temperature)[~chosen].reshape(len(logits), -1)
        both = torch.stack((own, others.logsumexp(1)), 1)
        two.append(F.log_softmax(both, 1))
        rest.append(F.log_softmax(others, 1))
    first, second = ((told.exp() * (told - said)).sum(1) for told, said in (two, rest))
    return first, second, two[0][:, 0].exp()


def merged(teachers: Sequence[Tensor], weights: Sequence[float], temperature: float, dim: int | None) -> Tensor:
    """What several teachers say together: logits whose distribution at `temperature` is the weighted mean of theirs, or
    the mean itself where the outputs are values (`dim` None). One teacher's outputs stay as they are."""
    if len(teachers) == 1:
        return teachers[0]
    total = sum(weights)
    if dim is None:
        return torch.stack([t * (w / total) for t, w in zip(teachers, weights, strict=True)]).sum(0)
    logs = [
        F.log_softmax(t / temperature, dim) + torch.tensor(w / total).log()
        for t, w in zip(teachers, weights, strict=True)
    ]
    return torch.stack(logs).logsumexp(0) * temperature


@LOGIT_LOSSES.register("soft-labels")
def _soft(student: Tensor, teacher: Tensor, how: Softening, labels: Tensor | None) -> Tensor:
    return soft_labels(student, teacher, how.temperature, how.dim, how.student_temperature)


@LOGIT_LOSSES.register("standardized")
def _standardized(student: Tensor, teacher: Tensor, how: Softening, labels: Tensor | None) -> Tensor:
    return _soft(standardized(student, how.dim), standardized(teacher, how.dim), how, labels)


@LOGIT_LOSSES.register("dkd")
def _dkd(student: Tensor, teacher: Tensor, how: Softening, labels: Tensor | None) -> Tensor:
    """Without labels (or where one is no class, as those to be ignored are) the target is the class that the teacher
    holds most likely."""
    said, told = (x.movedim(how.dim, -1).flatten(0, -2) for x in (student, teacher))
    target = told.argmax(1)
    if labels is not None:
        given = labels.flatten()
        if given.shape != target.shape or given.is_floating_point():
            raise RecipeError(
                "'dkd' compares with numbers of classes, and the labels are none", hint="logits: soft-labels"
            )
        target = torch.where((given >= 0) & (given < told.shape[1]), given, target)
    own = how.student_temperature or how.temperature
    first, second, _ = decoupled(said, told, target, (how.temperature, own))
    return (how.target_weight * first + how.other_weight * second).mean() * how.temperature * own


@LOGIT_LOSSES.register("multi-level")
def _multi_level(student: Tensor, teacher: Tensor, how: Softening, labels: Tensor | None) -> Tensor:
    """Soft labels at several temperatures, and with each the likeness of samples and that of classes (Jin, Wang & Lin
    2023, "Multi-level logit distillation"), without the paper's masks of unsure samples; every position of an output
    that has several is a batch of its own."""
    ratio = (how.student_temperature or how.temperature) / how.temperature
    said, told = (_rows(x, how.dim) for x in (student, teacher))
    parts = []
    for factor in _SPREAD:
        t = factor * how.temperature
        one, other = (x.softmax(-1) for x in (said / (t * ratio), told / t))
        samples, classes = one.shape[1:]
        across = (one @ one.mT - other @ other.mT).square().sum((1, 2)).mean() / samples
        if classes <= samples:
            between = (one.mT @ one - other.mT @ other).square().sum((1, 2))
        else:  # the same norm from the smaller products: ‖SᵀS - TᵀT‖² = ‖SSᵀ‖² - 2 ‖STᵀ‖² + ‖TTᵀ‖²
            squares = [(a @ b.mT).square().sum((1, 2)) for a, b in ((one, one), (one, other), (other, other))]
            between = squares[0] - 2 * squares[1] + squares[2]
        parts.append(soft_labels(said, told, t, -1, t * ratio) + across + between.mean() / classes)
    return torch.stack(parts).mean()


@LOGIT_LOSSES.register("matching")
def _matching(student: Tensor, teacher: Tensor, how: Softening, labels: Tensor | None) -> Tensor:
    return matching(student, teacher)


def _rows(logits: Tensor, dim: int) -> Tensor:
    """(positions, samples, classes)."""
    last = logits.movedim(dim, -1)
    return last.reshape(len(last), -1, last.shape[-1]).transpose(0, 1)
