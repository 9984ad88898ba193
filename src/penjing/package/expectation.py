"""How likely each value of a small network's integer grid is, given those that came before it.

A tensor is a matrix of rows (outputs) and columns (inputs) of taps (places of a kernel). Neighbouring taps of a kernel
go together, so a value is predicted from the taps before it, by least squares over all earlier rows (adaptive linear
prediction, as in lossless audio and image coding: Wu, Barthel & Zhang 1998, "Piecewise 2D autoregression for
predictive image coding"). How far values lie from their predictions differs by tap, row and column: the spread is a
product of three factors, each a mean of what was seen so far. Around the prediction chances fall off as Student's t
distribution of 5 degrees of freedom does, corrected by how often the smallest magnitudes came up against what was
expected. So nothing travels but the values, and three numbers a tensor.

All of it is sums, products and quotients of 64-bit floats in a fixed order, which every machine rounds alike; chances
become whole numbers before they are summed. No torch in here: packages are read without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Shape = tuple[int, int, int]  # rows, columns, taps

LEVELS = 128
_TOGETHER = 32  # least number of values, where there are so many rows, that are coded under what was known before
_MOST_TAPS = 128  # of a kernel; longer ones are columns
_BEFORE = 8  # taps that a value is predicted from
_CHUNK = 256  # values whose chances are held at once
_KINDS = 5  # magnitudes 0 … 4, and all above, that are corrected
_WHOLE = float(1 << 24)
# What counts as seen beforehand: kernels like those of the tensor before, and some whose taps do not go together; rows,
# columns and taps of factor 1; magnitudes that come up as expected.
_KIN, _RIDGE, _ROW, _COLUMN, _TAP, _MAGNITUDE = 48.0, 8.0, 8.0, 16.0, 128.0, 16.0


class Coder(Protocol):
    """What `run` needs; gives back the symbols, those given or those read."""

    def symbols(self, given: Integers | None, weights: Floats, again: Callable[[], Floats]) -> Integers:
        """A symbol for each row of `weights` (n, symbols); `again` makes these weights anew."""


def arrange(size: int, row: int, taps: int) -> Shape:
    """The matrix that `size` values of a tensor are taken for, its rows of `row` values and kernels of `taps`."""
    if not row or size % row:
        return 1, size, 1
    if taps > _MOST_TAPS or size // taps < _TOGETHER:
        taps = 1
    return size // row, row // taps, taps


#: By number of taps how they went together in the tensor before: sums of products over their mean square.
Kinship = dict[int, Floats]


def run(
    coder: Coder,
    given: Integers | None,
    shape: Shape,
    most: int,
    level: int,
    kinship: Kinship,
) -> Integers:
    """Codes whole numbers `given` (rows, columns, taps) within `most` of zero, or reads them.

    `level` from 0: the mean magnitude is taken for `most * (level + 1) / 256` at first. `kinship` is of the tensors
    before, and is told of this one.
    """
    rows, columns, taps = shape
    out = np.zeros(shape, dtype=np.int64) if given is None else given
    if not most or not out.size:
        return out
    chances, products = _Chances(most), _Products(taps, kinship)
    unit = most * (level + 1) / 256
    across, across_seen = np.full(columns, _COLUMN), _COLUMN
    along, along_seen = np.full(taps, _TAP), np.full(taps, _TAP)
    together = -(-_TOGETHER // columns)
    for start in range(0, rows, together):
        block = out[start : start + together]
        slopes, by_column = products.slopes(), across / across_seen
        down, down_seen = np.full(len(block), _ROW), _ROW
        for tap in range(taps):
            mean = np.zeros(block.shape[:2])
            for j in range(1, min(tap, _BEFORE) + 1):
                mean = mean + slopes[tap, j - 1] * block[:, :, tap - j]
            by_tap, by_row = along[tap] / along_seen[tap], down / down_seen
            spread = (unit * by_tap * by_row)[:, None] * by_column
            line = None if given is None else block[:, :, tap].reshape(-1)
            found = chances.run(coder, line, mean.reshape(-1), spread.reshape(-1)).reshape(mean.shape)
            if given is None:
                block[:, :, tap] = found
            off = np.abs(found - mean) / spread
            by_rows = _total(off.T)
            down, down_seen = down + by_row * by_rows, down_seen + columns
            along[tap] += by_tap * float(_total(by_rows))
            along_seen[tap] += off.size
            across, across_seen = across + by_column * _total(off), across_seen + len(block)
        products.add(block)
    kinship[taps] = products.relative()
    return out


def _total(values: Floats) -> Any:
    """The sum over the first axis, one value after the other on every machine."""
    return np.add.accumulate(values, axis=0)[-1]


class _Chances:
    """Models of values, and how the smallest magnitudes fared under them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._names = np.arange(-most, most + 1, dtype=np.float64)
        self._kinds = np.minimum(np.abs(np.arange(-most, most + 1)), _KINDS)
        self._seen = np.full(_KINDS + 1, _MAGNITUDE)
        self._expected = np.full(_KINDS + 1, _MAGNITUDE)

    def run(self, coder: Coder, given: Integers | None, mean: Floats, spread: Floats) -> Integers:
        """Values with the given means and mean distances from them."""
        factors, found, shares = self._seen / self._expected, [], []
        for start in range(0, len(mean), _CHUNK):
            part = slice(start, start + _CHUNK)
            again = partial(self._weights, mean[part], spread[part], factors)
            weights = again()
            line = None if given is None else given[part] + self._most
            found.append(coder.symbols(line, weights, again))
            total = weights.sum(axis=1)  # of whole numbers, so exact in any order
            shares.append(self._by_kind(weights, total) / total)
        symbols = np.concatenate(found)
        self._expected = self._expected + _total(np.concatenate(shares, axis=1).T) / factors
        self._seen = self._seen + np.bincount(self._kinds[symbols], minlength=_KINDS + 1)
        return symbols - self._most

    def _weights(self, mean: Floats, spread: Floats, factors: Floats) -> Floats:
        off = self._names - mean[:, None]
        wide = 1.625 * spread + 0.0625
        wide = 3.0 * wide * wide
        near = wide[:, None] / (wide[:, None] + off * off)
        weights: Floats = np.floor(near * near * near * (_WHOLE * factors[self._kinds])) + 1.0
        return weights

    def _by_kind(self, weights: Floats, total: Floats) -> Floats:
        """(kinds, n) sums of weights."""
        sums = np.zeros((_KINDS + 1, len(weights)))
        sums[0] = weights[:, self._most]
        for kind in range(1, min(self._most + 1, _KINDS)):
            sums[kind] = weights[:, self._most - kind] + weights[:, self._most + kind]
        sums[_KINDS] = total - sums[:_KINDS].sum(axis=0)
        return sums


class _Products:
    """Sums of products of each tap with itself and those before it, and the least squares that they make."""

    def __init__(self, taps: int, kinship: Kinship) -> None:
        self._before = kinship.get(taps, np.zeros((taps, _BEFORE + 1)))
        self._sums, self._count = np.zeros((taps, _BEFORE + 1), dtype=np.int64), 0
        # For tap k and distances a, b from 1: where the sum of the products of taps k - a and k - b is.
        tap, a, b = np.ogrid[:taps, 1 : _BEFORE + 1, 1 : _BEFORE + 1]
        self._exists = (tap >= a) & (tap >= b)
        self._places = np.where(self._exists, tap - np.minimum(a, b), 0), np.abs(a - b)

    def add(self, block: Integers) -> None:
        """Takes rows (n, columns, taps) into account."""
        taps = block.shape[2]
        self._count += block.shape[0] * block.shape[1]
        for j in range(min(taps, _BEFORE + 1)):
            self._sums[j:, j] += (block[:, :, j:] * block[:, :, : taps - j]).sum(axis=(0, 1))

    def relative(self) -> Floats:
        """Mean products over the mean square; nothing yet where that is too small to tell."""
        return self._sums / (self._count * self._square())

    def _square(self) -> float:
        taps = len(self._sums)
        return max(int(self._sums[:, 0].sum()) / (self._count * taps), 0.015625) if self._count else 1.0

    def slopes(self) -> Floats:
        """(taps, 8): what one tap before, two, … weigh in the prediction."""
        taps = len(self._sums)
        slopes = np.zeros((taps, _BEFORE))
        if taps == 1:
            return slopes
        square = self._square()
        sums = self._sums + (_KIN * square) * self._before
        system = np.where(self._exists, sums[self._places], 0.0) + (_RIDGE * square) * np.eye(_BEFORE)
        return _solved(system, np.where(self._exists[:, :, 0], sums[:, 1:], 0.0))


def _solved(system: Floats, right: Floats) -> Floats:
    """Solves (n, m, m) positive definite systems by Gaussian elimination, all at once and one step after the other."""
    system, right, size = system.copy(), right.copy(), right.shape[1]
    for j in range(size):
        share = system[:, j + 1 :, j] / system[:, j, j, None]
        system[:, j + 1 :] = system[:, j + 1 :] - share[:, :, None] * system[:, j, None]
        right[:, j + 1 :] = right[:, j + 1 :] - share * right[:, j, None]
    for j in range(size - 1, -1, -1):
        right[:, j] = right[:, j] / system[:, j, j]
        right[:, :j] = right[:, :j] - system[:, :j, j] * right[:, j, None]
    return right
