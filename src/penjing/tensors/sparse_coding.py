"""How sparse integers are coded: the order of what is sent and the chance that each of it is given.

A tensor is a matrix, its first axis the rows, or the columns where turned. How many values of a row are not zero is
sent, roughly; which columns they are in is learned from the rows before: a column's share is the posterior mean of a
rate with a gamma prior (Gelman et al. 2013, "Bayesian data analysis", §2.6) that counts what the rows so far had there
against what their own densities let expect. Networks whose inputs or neurons died need no table to say so. The values
themselves follow a histogram that is learned on the way too, so that small tensors pay for no table either.

`run` does it with a coder: the package has one that makes bytes and one that reads them, `Meter` here only counts. All
chances come from sums, products and quotients of 64-bit floats in a fixed order, which every machine rounds alike. No
torch in here: packages are read without it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Symbols = NDArray[np.int32]

PRIORS = (0.125, 0.375, 1.0, 3.0)  # rows' worth of belief that all columns are alike
TURNED = 4  # added to a prior's number: that of a form
FORMS = 8
LIKELY = (1, 1 + TURNED)  # forms to try first: both ways round, under the likeliest prior
_ROOT = 1.4142135623730951
_SMALLEST, _LARGEST = 2.0**-16, 1 - 2.0**-8


class Coder(Protocol):
    """What `run` needs; gives back the symbols, those given or those read."""

    def symbols(self, given: Symbols | None, count: int, weights: Floats) -> Symbols:
        """`count` symbols, numbers of `weights`, under one model."""

    def flags(self, given: Symbols | None, chances: Floats) -> Symbols:
        """Truth values, each with its own chance of being one."""


def shape_of(size: int, row: int, form: int) -> tuple[int, int]:
    """The shape of `matrix`, of `size` values."""
    row = row if row and size % row == 0 else max(1, size)
    return (row, size // row) if form & TURNED else (size // row, row)


def matrix(values: NDArray[Any], row: int, form: int) -> NDArray[Any]:
    """Rows by columns as a form has them; values that do not make whole rows of that length are one row."""
    plain = values.reshape(shape_of(len(values), row, 0))
    return plain.T if form & TURNED else plain


def flat(values: NDArray[Any], form: int) -> NDArray[Any]:
    """Inverse of `matrix`."""
    return (values.T if form & TURNED else values).reshape(-1)


def run(coder: Coder, given: NDArray[Any] | None, shape: tuple[int, ...], form: int, most: int) -> NDArray[Any]:
    """Codes the matrix `given` of whole numbers within `most` of zero, or reads one of this shape."""
    rows, columns = shape
    out = np.zeros(shape, dtype=np.int32) if given is None else given
    if not most or not rows or not columns:
        return out
    density = densities(columns)
    prior = PRIORS[form % TURNED]
    seen, expected = np.full(columns, prior), prior
    levels = np.ones(len(density))
    # Small distances are likelier than large ones until the tensor says otherwise.
    names = np.concatenate([np.arange(-most, 0), np.arange(1, most + 1)])
    histogram = 1.0 / (names.astype(np.float64) * names)
    for i in range(rows):
        line = None if given is None else given[i]
        level = None if line is None else level_of(int(np.count_nonzero(line)))
        level = coder.symbols(None if level is None else np.array([level], dtype=np.int32), 1, levels)[0]
        levels = levels + (np.arange(len(levels)) == level)
        if not level:
            continue
        share = float(density[level])
        chances = np.clip(seen / expected * share, _SMALLEST, _LARGEST)
        differs = coder.flags(None if line is None else (line != 0).astype(np.int32), chances)
        places = np.flatnonzero(differs)
        known = None if line is None else np.searchsorted(names, line[places]).astype(np.int32)
        found = coder.symbols(known, len(places), histogram)
        if line is None:
            out[i, places] = names[found]
        seen = seen + differs
        expected += share
        histogram = histogram + np.bincount(found, minlength=len(names))
    return out


def densities(columns: int) -> Floats:
    """The share of a row that differs, by level: none, then 1, √2, 2, 2√2 … of its values."""
    steps = [0.0, 1.0]
    while steps[-1] < columns:
        steps.append(2.0 ** ((len(steps) - 1) // 2) * (_ROOT if len(steps) % 2 == 0 else 1.0))
    return np.minimum(np.array(steps) / columns, 1.0)


def level_of(count: int) -> int:
    """The level nearest to `count`: floor(2·log₂ count + 1/2) + 1 without a logarithm, 0 for none."""
    if not count:
        return 0
    # 2·log₂ n + ½ ≥ k where n⁴·2 ≥ 2^2k.
    return 1 + ((2 * count**4).bit_length() - 1) // 2


class Meter:
    """Stands in for a coder that encodes, and only counts bits."""

    def __init__(self) -> None:
        self.bits = 0.0

    @staticmethod
    def size(values: NDArray[Any], form: int) -> float:
        """Bits of a matrix."""
        meter = Meter()
        run(meter, values, values.shape, form, int(np.abs(values).max(initial=0)))
        return meter.bits

    def symbols(self, given: Symbols | None, count: int, weights: Floats) -> Symbols:
        given = np.zeros(0, dtype=np.int32) if given is None else given
        self.bits += count * float(np.log2(weights.sum())) - float(np.log2(weights[given]).sum())
        return given

    def flags(self, given: Symbols | None, chances: Floats) -> Symbols:
        given = np.zeros(0, dtype=np.int32) if given is None else given
        self.bits -= float(np.log2(np.where(given, chances, 1 - chances)).sum())
        return given


def coded_bits(values: NDArray[Any], row: int) -> float:
    """About the bits that flat whole numbers take in a package, rows of `row` of them sharing an output."""
    return min(Meter.size(matrix(values, row, form), form) for form in LIKELY)
