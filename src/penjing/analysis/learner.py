"""Networks that train together as one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from penjing.analysis.features import Comparison
from penjing.training import call


class Learner(nn.Module):
    """What trains together: the student, its peers, what compares inner values; and the student's own average."""

    def __init__(
        self, student: nn.Module, peers: list[nn.Module], shadow: nn.Module | None, comparison: Comparison | None
    ) -> None:
        super().__init__()
        self.student, self.peers = student, nn.ModuleList(peers)
        self.shadow, self.comparison = shadow, comparison
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        if self.shadow is not None:
            self.shadow.eval()
        return self

    def forward(self, inputs: Any, told: Mapping[str, Tensor], plain: Any) -> tuple[list[Any], Any, Any]:
        """The outputs of student and peers, the average's, and the pairs of inner values made comparable."""
        outputs = [call(module, inputs) for module in (self.student, *self.peers)]
        answer, compared = None, None
        if self.shadow is not None:
            with torch.no_grad():
                answer = call(self.shadow, inputs if plain is None else plain)
        if self.comparison is not None:
            outputs[0], seen = outputs[0]
            if self.shadow is not None:
                answer, shown = cast(tuple[Any, Any], answer)
                told = told or shown
            compared = self.comparison(seen, told)
        return outputs, answer, compared

    @torch.no_grad()
    def follow(self, keep: float) -> None:
        """Moves the average after the student: less is kept in the first steps, as many as there are to average."""
        if self.shadow is None:
            return
        done = int(self.steps)
        now = {**dict(self.student.named_parameters()), **dict(self.student.named_buffers())}
        for name, mean in (*self.shadow.named_parameters(), *self.shadow.named_buffers()):
            if mean.is_floating_point():
                mean.lerp_(now[name], 1 - min(keep, (1 + done) / (10 + done)))
            else:
                mean.copy_(now[name])
        self.steps += 1
