"""Drawing masks from scores: patterns, thresholds and allocations put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penjing.tensors import sparsity
from penjing.tensors.sparsity import ALLOCATIONS, Layout, Pattern, Units


@dataclass(frozen=True)
class Judged:
    """The `scores` of one tensor's weights, how it is read as a matrix, and what an earlier mask `held` (None: all)."""

    scores: Tensor
    layout: Layout
    held: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How masks are drawn: by a `threshold` for scores, by a `pattern` of n in m neighbours, or otherwise by
    `allocation`, counting blocks of `pattern` (judged by `norm`) or weights, of which each row may keep as many."""

    pattern: Pattern = field(default_factory=Pattern)
    allocation: str = "global"
    per_row: bool = False
    norm: str = "l2"
    threshold: float | None = None

    def masks(self, judged: Mapping[str, Judged], share: float, part: float = 1.0) -> dict[str, Tensor]:
        """Masks in the tensors' shapes under which `share` of all weights are zero, with what was masked before.

        With `part` below 1 only that part of the zeros is made. Blocks go whole, until at least as many are zero.
        """
        units = {name: self._units(j) for name, j in judged.items()}
        pattern = self.pattern
        if pattern.group:
            keep = pattern.group - round(part * (pattern.group - pattern.keep))
            drawn = {name: sparsity.n_of_m(u.scores, keep, pattern.group) for name, u in units.items()}
        elif self.threshold is not None:
            limit = self.threshold
            drawn = {name: u.scores >= limit for name, u in units.items()}
        else:
            drawn = {name: self._best(units[name], count) for name, count in self._counts(judged, units, share * part)}
        return {name: self._mask(judged[name], mask) for name, mask in drawn.items()}

    def shares(self, judged: Mapping[str, Judged], share: float) -> dict[str, float]:
        """The share of each tensor that the allocation would keep."""
        units = {name: self._units(j) for name, j in judged.items()}
        return {name: count / judged[name].scores.numel() for name, count in self._counts(judged, units, share)}

    def _counts(self, judged: Mapping[str, Judged], units: Mapping[str, Units], share: float) -> list[tuple[str, int]]:
        total = sum(j.scores.numel() for j in judged.values())
        return list(ALLOCATIONS.get(self.allocation)(units, total - round(share * total)).items())

    def _best(self, units: Units, count: int) -> Tensor:
        if self.per_row and units.sizes is None:
            return sparsity.best_by_row(units.scores, count)
        return sparsity.best(units.scores, min(count, units.free), units.sizes)

    def _units(self, judged: Judged) -> Units:
        shape, matrix = judged.scores.shape, judged.layout.matrix(judged.scores)
        held = None if judged.held is None else judged.layout.matrix(judged.held)
        if not self.pattern.blocks:
            return Units(matrix if held is None else matrix.masked_fill(~held, -torch.inf), shape)
        whole = torch.ones(matrix.shape, dtype=torch.bool) if held is None else held
        sizes = sparsity.block_sizes(whole, self.pattern)
        scores = sparsity.block_scores(matrix * whole, self.pattern, self.norm)
        return Units(scores.masked_fill(sizes == 0, -torch.inf), shape, sizes)

    def _mask(self, judged: Judged, drawn: Tensor) -> Tensor:
        shape = judged.scores.shape
        if self.pattern.blocks:
            drawn = sparsity.spread_blocks(drawn, self.pattern, judged.layout.matrix(judged.scores).shape)
        mask = judged.layout.tensor(drawn, shape).contiguous()
        return mask if judged.held is None else mask & judged.held
