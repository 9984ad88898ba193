"""Costs that were measured at a few sizes and are interpolated between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Table:
    """A cost by rows and columns: bilinear between what was measured, straight on beyond it, never below zero.

    `rows` and `columns` are the sizes measured at, ascending (one size: the cost does not depend on that); `values` is
    (rows, columns).
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, measured: Mapping[tuple[int, int], float]) -> Table:
        """From (row, column) → cost on a full grid. Costs that fall as sizes rise are raised to the smaller size's:
        more work is not done in less time, and an allocation must not be led on by noise."""
        rows = sorted({r for r, _ in measured})
        columns = sorted({c for _, c in measured})
        grid = np.array([[measured[r, c] for c in columns] for r in rows], np.float64)
        grid = np.maximum.accumulate(np.maximum.accumulate(grid, 0), 1)
        return cls(tuple(rows), tuple(columns), tuple(tuple(float(v) for v in row) for row in grid))

    def __call__(self, row: float, column: float) -> float:
        """The cost at any size."""
        above, part = _place(self.rows, row)
        right, share = _place(self.columns, column)
        low, high = self.values[max(above - 1, 0)], self.values[above]
        left = max(right - 1, 0)
        first = low[left] + share * (low[right] - low[left])
        second = high[left] + share * (high[right] - high[left])
        return max(0.0, first + part * (second - first))


def _place(levels: Sequence[int], at: float) -> tuple[int, float]:
    """The upper neighbour of a size, and how far it lies from the lower towards that."""
    if len(levels) == 1:
        return 0, 0.0
    above = min(max(bisect_right(levels, at), 1), len(levels) - 1)
    return above, (at - levels[above - 1]) / (levels[above] - levels[above - 1])


@dataclass(frozen=True)
class TableShare:
    """A layer's part in a cost, by a table of what it costs with so many outputs (rows) and inputs (columns).

    `sizes` are (outputs, inputs) of the whole layer, `owners[0]` and `owners[1]` list the (group, entries a unit) of
    each, `factor` scales the table.
    """

    table: Table
    sizes: tuple[int, int]
    owners: Mapping[int, tuple[tuple[str, int], ...]]
    factor: float = 1.0

    def cost(self, gone: Mapping[str, int]) -> float:
        """The cost left when `gone[group]` units have left."""
        outputs, inputs = (
            size - sum(gone.get(group, 0) * entries for group, entries in self.owners.get(dim, ()))
            for dim, size in enumerate(self.sizes)
        )
        return self.factor * self.table(outputs, inputs)
