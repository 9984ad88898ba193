"""The loss of networks that learn by what others answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penjing.task import primary
from penjing.tensors.distillation import LOGIT_LOSSES, Softening, matching


@dataclass(frozen=True)
class AnswerLoss:
    """How far answers are from the teachers', from each other's and from the labels.

    `logits` names a loss for classes along `softening.dim`; without it values are matched, by `scale`. Teachers and the
    others weigh `alpha`, `by_labels(outputs, labels)` the rest; without it only teachers and the others are followed.
    """

    logits: str | None
    softening: Softening
    alpha: float
    by_labels: Callable[[Any, Any], Tensor] | None
    scale: float | None = None

    def reads(self, labels: Any) -> bool:
        """Whether labels are looked at: at `alpha` = 1 they may be anything."""
        return self.by_labels is not None and labels is not None and self.alpha < 1

    def __call__(self, outputs: Sequence[Any], teacher: Tensor | None, labels: Any) -> Tensor:
        """The sum over the networks that learn together, each by its own whole outputs."""
        said = [primary(o) for o in outputs]
        parts = []
        for number, whole in enumerate(outputs):
            others = [s.detach() for i, s in enumerate(said) if i != number]
            told = [*([] if teacher is None else [teacher]), *others]
            soft = torch.stack([self._soft(said[number], t, labels) for t in told]).mean()
            if self.by_labels is None or not self.reads(labels):
                parts.append(soft)
            else:
                parts.append(self.alpha * soft + (1 - self.alpha) * self.by_labels(whole, labels))
        return torch.stack(parts).sum()

    def _soft(self, student: Tensor, teacher: Tensor, labels: Any) -> Tensor:
        if self.logits is None:
            return matching(student, teacher, self.scale)
        known = torch.as_tensor(labels) if self.reads(labels) else None
        return LOGIT_LOSSES.get(self.logits)(student, teacher, self.softening, known)
