"""The codec of sparse integer grids: first where the values are that differ from the usual one, then what they are.

A tensor is a matrix, its first axis the rows, or the columns where `turned`. How many values of a row differ is sent,
roughly; which columns they are in is learned from the rows before: a column's share is the posterior mean of a rate
with a gamma prior (Gelman et al. 2013, "Bayesian data analysis", §2.6) that counts what the rows so far had there
against what their own densities let expect. Networks whose inputs or neurons died need no table to say so. The values
themselves follow a histogram that is learned on the way too, so that small tensors pay for no table either.

A part's bytes: for each piece u8 (bits 0-1: index of the prior's weight, bit 2: turned), u8 usual value, u8 largest
distance from it; then the words of a stack (models.py). All probabilities come from sums,
products and quotients of 64-bit floats in a fixed order, which every machine rounds alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.errors import PackageError
from penjing.package.models import Bytes, Decoder, Encoder, Floats

Symbols = NDArray[np.int32]

_HEAD = 3
_PRIORS = (0.125, 0.375, 1.0, 3.0)  # rows' worth of belief that all columns are alike
_ROOT = 1.4142135623730951
_SMALLEST, _LARGEST = 2.0**-16, 1 - 2.0**-8
_WORTH = 0.5  # a part with fewer usual values than this share is left to the other codecs
_FIRST = (1, 5)  # both ways round, under the likeliest prior
_FEW = 1 << 18  # values up to which the other priors are tried


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """Values of one piece (int8 with the sign bit turned over) and the length of the tensor's rows."""

    values: Bytes
    row: int


def worthwhile(sheets: Sequence[Sheet]) -> bool:
    """Whether so many values are alike that this codec may win."""
    total = sum(len(s.values) for s in sheets)
    usual = sum(int(np.bincount(s.values).max()) for s in sheets if len(s.values))
    return total > 0 and usual >= _WORTH * total


def encode(sheets: Sequence[Sheet], *, worth: int) -> bytes | None:
    """One part's bytes; None if they would not come below `worth`."""
    heads, chosen, bits = bytearray(), [], 0.0
    for sheet in sheets:
        usual = int(np.bincount(sheet.values, minlength=1).argmax()) if len(sheet.values) else 0
        apart = (sheet.values - np.uint8(usual)).view(np.int8).astype(np.int32)
        most = int(np.abs(apart).max(initial=0))
        sizes = {kind: _Meter.size(_matrix(apart, sheet.row, kind), kind, most) for kind in _FIRST}
        best = min(sizes, key=lambda k: sizes[k])
        bits += sizes[best]
        heads += bytes([best, usual, most])
        chosen.append(apart)
    # The priors that are not tried yet change a percent or two.
    if len(heads) + bits / 8 > 1.05 * worth:
        return None
    coder = _Coder()
    for number, (sheet, apart) in enumerate(zip(sheets, chosen, strict=True)):
        kind, _, most = heads[_HEAD * number : _HEAD * (number + 1)]
        if len(apart) <= _FEW:
            kinds = range(kind & 4, (kind & 4) + len(_PRIORS))
            kind = min(kinds, key=lambda k: _Meter.size(_matrix(apart, sheet.row, k), k, most))
            heads[_HEAD * number] = kind
        matrix = _matrix(apart, sheet.row, kind)
        _run(coder, matrix, matrix.shape, kind, most)
    return bytes(heads) + coder.words()


def decode(payload: memoryview, shapes: Sequence[tuple[int, int]]) -> list[Bytes]:
    """Values of each piece, `shapes` being (values, row); raises PackageError for bytes that no writer makes."""
    heads, words = payload[: _HEAD * len(shapes)], payload[_HEAD * len(shapes) :]
    if len(heads) != _HEAD * len(shapes) or len(words) % 4:
        raise _damaged()
    coder, out = _Coder(words), []
    for number, (size, row) in enumerate(shapes):
        kind, usual, most = heads[_HEAD * number : _HEAD * (number + 1)]
        if kind >= 2 * len(_PRIORS) or most > 128:
            raise _damaged()
        shape = _matrix(np.zeros(size, dtype=np.int8), row, kind).shape
        matrix = _run(coder, None, shape, kind, most)
        apart = (matrix.T if _turned(kind) else matrix).reshape(-1)
        out.append(apart.astype(np.int8).view(np.uint8) + np.uint8(usual))
    coder.finish()
    return out


def shares(payload: memoryview, shapes: Sequence[tuple[int, int]]) -> list[float]:
    """About how many bytes of the part each piece takes; the values are decoded for it."""
    out = []
    for number, (values, (_, row)) in enumerate(zip(decode(payload, shapes), shapes, strict=True)):
        kind, usual, most = payload[_HEAD * number : _HEAD * (number + 1)]
        apart = (values - np.uint8(usual)).view(np.int8).astype(np.int32)
        out.append(_HEAD + _Meter.size(_matrix(apart, row, kind), kind, most) / 8)
    return out


def _turned(kind: int) -> bool:
    return bool(kind & 4)


def _matrix(values: NDArray[Any], row: int, kind: int) -> NDArray[Any]:
    """Rows by columns as they are coded; a piece that is not made of whole rows is one row."""
    row = row if row and len(values) % row == 0 else max(1, len(values))
    matrix = values.reshape(-1, row)
    return matrix.T if _turned(kind) else matrix


def _run(coder: _Coder | _Meter, given: NDArray[Any] | None, shape: tuple[int, ...], kind: int, most: int) -> Any:
    """Codes the matrix `given`, or decodes one of this shape: the one place that knows the order and the models."""
    rows, columns = shape
    out = np.zeros(shape, dtype=np.int32) if given is None else given
    if not most or not rows or not columns:
        return out
    density = _densities(columns)
    prior = _PRIORS[kind & 3]
    seen, expected = np.full(columns, prior), prior
    levels = np.ones(len(density))
    # Small distances are likelier than large ones until the tensor says otherwise.
    names = np.concatenate([np.arange(-most, 0), np.arange(1, most + 1)])
    histogram = 1.0 / (names.astype(np.float64) * names)
    for i in range(rows):
        line = None if given is None else given[i]
        level = None if line is None else _level(int(np.count_nonzero(line)))
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


def _densities(columns: int) -> Floats:
    """The share of a row that differs, by level: none, then 1, √2, 2, 2√2 … of its values."""
    steps = [0.0, 1.0]
    while steps[-1] < columns:
        steps.append(2.0 ** ((len(steps) - 1) // 2) * (_ROOT if len(steps) % 2 == 0 else 1.0))
    return np.minimum(np.array(steps) / columns, 1.0)


def _level(count: int) -> int:
    """The level nearest to `count`: floor(2·log₂ count + 1/2) + 1 without a logarithm, 0 for none."""
    if not count:
        return 0
    # 2·log₂ n + ½ ≥ k where n⁴·2 ≥ 2^2k.
    return 1 + ((2 * count**4).bit_length() - 1) // 2


class _Coder:
    """Codes symbols if it was made without words, and decodes them otherwise."""

    def __init__(self, words: bytes | memoryview | None = None) -> None:
        self._decoder = None if words is None else Decoder(words)
        self._encoder, self._waiting = Encoder(), list[Callable[[], None]]()

    def symbols(self, given: Symbols | None, count: int, weights: Floats) -> Symbols:
        """`count` symbols under one model."""
        if self._decoder is not None:
            return self._decoder.pop(count, weights)
        if given is not None:
            self._waiting.append(lambda: self._encoder.push(given, weights))
        return np.zeros(count, dtype=np.int32) if given is None else given

    def flags(self, given: Symbols | None, chances: Floats) -> Symbols:
        """Truth values, each with its own chance of being one."""
        if self._decoder is not None:
            return self._decoder.pop_flags(chances)
        if given is not None:
            self._waiting.append(lambda: self._encoder.push_flags(given, chances))
        return np.zeros(len(chances), dtype=np.int32) if given is None else given

    def words(self) -> bytes:
        """What was encoded: what is popped first goes onto the stack last."""
        for push in reversed(self._waiting):
            push()
        return self._encoder.words()

    def finish(self) -> None:
        """Raises PackageError unless the words decoded are used up."""
        if self._decoder is not None:
            self._decoder.finish()


class _Meter:
    """Stands in for a coder that encodes, and only counts bits."""

    def __init__(self) -> None:
        self.bits = 0.0

    @staticmethod
    def size(matrix: NDArray[Any], kind: int, most: int) -> float:
        """Bits of a matrix."""
        meter = _Meter()
        _run(meter, matrix, matrix.shape, kind, most)
        return meter.bits

    def symbols(self, given: Symbols | None, count: int, weights: Floats) -> Symbols:
        given = np.zeros(0, dtype=np.int32) if given is None else given
        self.bits += count * float(np.log2(weights.sum())) - float(np.log2(weights[given]).sum())
        return given

    def flags(self, given: Symbols | None, chances: Floats) -> Symbols:
        given = np.zeros(0, dtype=np.int32) if given is None else given
        self.bits -= float(np.log2(np.where(given, chances, 1 - chances)).sum())
        return given


_WHAT = "a part with sparse integer grids"


def _damaged() -> PackageError:
    return PackageError(f"{_WHAT} cannot be decoded", hint="the package was made by a faulty writer; get it again")
