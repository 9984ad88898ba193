"""The codec of small networks' integer grids: every value under a model of its own, made from those before it.

expectation.py has the order and the chances; it takes about a microsecond a value, so packages of large networks leave
this codec alone, and no package may hold more than MOST values in it.

A part's bytes: for each piece u8 form (bit 0: turned, rows and columns exchanged; above it the level of the mean
magnitude), u8 usual value, u8 largest distance from it; then the words of a stack (models.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from penjing.errors import PackageError
from penjing.package.expectation import LEVELS, Integers, Kinship, Shape, arrange, run
from penjing.package.models import Bytes, Decoder, Encoder, Floats

MOST = 1 << 20  # values
_HEAD = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """Values of one piece (int8 with the sign bit turned over), the length of the tensor's rows and of its kernels."""

    values: Bytes
    row: int
    taps: int


def encode(sheets: Sequence[Sheet], worth: int) -> bytes | None:
    """One part's bytes; None if they would not come below `worth`."""
    heads, steps, bits, kinship = bytearray(), list[_Step](), 0.0, Kinship()
    for sheet in sheets:
        usual = int(np.bincount(sheet.values, minlength=1).argmax()) if len(sheet.values) else 0
        apart = (sheet.values - np.uint8(usual)).view(np.int8).astype(np.int64)
        most = int(np.abs(apart).max(initial=0))
        level, shape = _level(apart, most), arrange(len(apart), sheet.row, sheet.taps)
        forms = (2 * level, 2 * level + 1)
        tried = {form: _recorded(apart, shape, form, most, kinship) for form in forms}
        form = min(tried, key=lambda f: tried[f].bits)
        heads += bytes([form, usual, most])
        steps += tried[form].steps
        kinship = tried[form].kinship
        bits += tried[form].bits
        if len(heads) + bits / 8 >= worth:
            return None
    encoder = Encoder()
    for symbols, again in reversed(steps):
        encoder.push_each(symbols, again())
    coded = bytes(heads) + encoder.words()
    return coded if len(coded) < worth else None


def decode(payload: memoryview, shapes: Sequence[tuple[int, int, int]]) -> list[Bytes]:
    """Values of each piece, `shapes` being (values, row, taps); raises PackageError for bytes that no writer makes."""
    heads, words = payload[: _HEAD * len(shapes)], payload[_HEAD * len(shapes) :]
    if len(heads) != _HEAD * len(shapes):
        raise _damaged()
    reader, out, kinship = _Reader(words), [], Kinship()
    for number, (size, row, taps) in enumerate(shapes):
        form, usual, most = heads[_HEAD * number : _HEAD * (number + 1)]
        if most > 128:
            raise _damaged()
        rows, columns, taps = arrange(size, row, taps)
        shape = (columns, rows, taps) if form & 1 else (rows, columns, taps)
        apart = _turned(run(reader, None, shape, most, form >> 1, kinship), form & 1).reshape(-1)
        out.append(apart.astype(np.int8).view(np.uint8) + np.uint8(usual))
    reader.finish()
    return out


def shares(payload: memoryview, shapes: Sequence[tuple[int, int, int]]) -> list[float]:
    """About how many bytes of the part each piece takes; the values are decoded for it."""
    out, kinship = [], Kinship()
    for number, (values, shape) in enumerate(zip(decode(payload, shapes), shapes, strict=True)):
        form, usual, most = payload[_HEAD * number : _HEAD * (number + 1)]
        apart = (values - np.uint8(usual)).view(np.int8).astype(np.int64)
        recorder = _recorded(apart, arrange(*shape), form, most, kinship)
        out.append(_HEAD + recorder.bits / 8)
        kinship = recorder.kinship
    return out


def _recorded(apart: Integers, shape: Shape, form: int, most: int, kinship: Kinship) -> _Recorder:
    values, recorder = _turned(apart.reshape(shape), form & 1), _Recorder(kinship)
    run(recorder, values, values.shape, most, form >> 1, recorder.kinship)
    return recorder


def _level(apart: Integers, most: int) -> int:
    mean = float(np.abs(apart).sum()) / max(1, apart.size)
    return min(max(round(256 * mean / max(1, most)) - 1, 0), LEVELS - 1)


def _turned(values: Integers, turned: int) -> Integers:
    return np.ascontiguousarray(values.transpose(1, 0, 2)) if turned else values


_Step = tuple[Integers, Callable[[], Floats]]


class _Recorder:
    """Counts bits, and keeps what is to be pushed: what is popped first goes onto the stack last."""

    def __init__(self, kinship: Kinship) -> None:
        self.bits, self.steps, self.kinship = 0.0, list[_Step](), dict(kinship)

    def symbols(self, given: Integers | None, weights: Floats, again: Callable[[], Floats]) -> Integers:
        given = np.zeros(0, dtype=np.int64) if given is None else given
        chosen = np.take_along_axis(weights, given[:, None], axis=1)[:, 0]
        self.bits += float(np.log2(weights.sum(axis=1) / chosen).sum())
        self.steps.append((given, again))
        return given


class _Reader:
    """Pops symbols."""

    def __init__(self, words: memoryview) -> None:
        self._decoder = Decoder(words)

    def symbols(self, given: Integers | None, weights: Floats, again: Callable[[], Floats]) -> Integers:
        return self._decoder.pop_each(weights)

    def finish(self) -> None:
        """Raises PackageError unless all words are used up."""
        self._decoder.finish()


def _damaged() -> PackageError:
    return PackageError(
        "a part with expected integer grids cannot be decoded",
        hint="the package was made by a faulty writer; get it again",
    )
