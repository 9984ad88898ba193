"""The codec of sparse integer grids: first where the values are that differ from the usual one, then what they are.

penjing/tensors/sparse_coding.py has the order and the chances; zero is a piece's usual value there.

A part's bytes: for each piece u8 form (bits 0-1: number of the prior, bit 2: turned), u8 usual value, u8 largest
distance from it; then the words of a stack (models.py). As empty rows take time but next to no bytes, a part has a
limited number of rows for each of its bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from penjing.errors import PackageError
from penjing.package.models import Bytes, Decoder, Encoder
from penjing.tensors.sparse_coding import (
    FORMS,
    LIKELY,
    PRIORS,
    TURNED,
    Floats,
    Meter,
    Symbols,
    flat,
    matrix,
    run,
    shape_of,
)

_HEAD = 3
_WORTH = 0.5  # a part with fewer usual values than this share is left to the other codecs
_ROWS = 16  # of pieces that hold more than their usual value, for each byte of a part
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
        sizes = {form: Meter.size(matrix(apart, sheet.row, form), form) for form in LIKELY}
        able = [f for f in sizes if 2 * len(matrix(apart, sheet.row, f)) <= _ROWS * (_HEAD + sizes[f] / 8) or not most]
        if not able:
            return None
        best = min(able, key=lambda k: sizes[k])
        bits += sizes[best]
        heads += bytes([best, usual, most])
        chosen.append(apart)
    # The priors that are not tried yet change a percent or two.
    if len(heads) + bits / 8 > 1.05 * worth:
        return None
    coder = _Coder()
    for number, (sheet, apart) in enumerate(zip(sheets, chosen, strict=True)):
        form, _, most = heads[_HEAD * number : _HEAD * (number + 1)]
        if len(apart) <= _FEW:
            forms = range(form & TURNED, (form & TURNED) + len(PRIORS))
            form = min(forms, key=lambda f: Meter.size(matrix(apart, sheet.row, f), f))
            heads[_HEAD * number] = form
        values = matrix(apart, sheet.row, form)
        run(coder, values, values.shape, form, most)
    out = bytes(heads) + coder.words()
    return out if _rows(heads, [(len(s.values), s.row) for s in sheets]) <= _ROWS * len(out) else None


def decode(payload: memoryview, shapes: Sequence[tuple[int, int]]) -> list[Bytes]:
    """Values of each piece, `shapes` being (values, row); raises PackageError for bytes that no writer makes."""
    heads, words = payload[: _HEAD * len(shapes)], payload[_HEAD * len(shapes) :]
    if len(heads) != _HEAD * len(shapes) or len(words) % 4:
        raise _damaged()
    if any(form >= FORMS for form in heads[::_HEAD]) or any(most > 128 for most in heads[2::_HEAD]):
        raise _damaged()
    if _rows(heads, shapes) > _ROWS * len(payload):
        raise PackageError(f"{_WHAT} has more rows than its bytes can tell of", hint="it was made to harm")
    coder, out = _Coder(words), []
    for number, (size, row) in enumerate(shapes):
        form, usual, most = heads[_HEAD * number : _HEAD * (number + 1)]
        shape = shape_of(size, row, form)
        apart = flat(run(coder, None, shape, form, most), form)
        out.append(apart.astype(np.int8).view(np.uint8) + np.uint8(usual))
    coder.finish()
    return out


def _rows(heads: bytes | bytearray | memoryview, shapes: Sequence[tuple[int, int]]) -> int:
    """Rows to go through."""
    forms = zip(shapes, heads[::_HEAD], heads[2::_HEAD], strict=True)
    return sum(shape_of(size, row, form)[0] for (size, row), form, most in forms if most)


def shares(payload: memoryview, shapes: Sequence[tuple[int, int]]) -> list[float]:
    """About how many bytes of the part each piece takes; the values are decoded for it."""
    out = []
    for number, (values, (_, row)) in enumerate(zip(decode(payload, shapes), shapes, strict=True)):
        form, usual, _ = payload[_HEAD * number : _HEAD * (number + 1)]
        apart = (values - np.uint8(usual)).view(np.int8).astype(np.int32)
        out.append(_HEAD + Meter.size(matrix(apart, row, form), form) / 8)
    return out


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


_WHAT = "a part with sparse integer grids"


def _damaged() -> PackageError:
    return PackageError(f"{_WHAT} cannot be decoded", hint="the package was made by a faulty writer; get it again")
