"""Symbol models: the histograms of the integer grids, small enough to travel, and the coder that uses them.

A model says how often each byte value occurs. The lowest `low_bits` of a value are stored as they are (on a smooth
histogram they hold no information that a model could take out); the rest are coded by asymmetric numeral systems
(Duda 2009), by the library `constriction`, with the model's weights as probabilities.

Weights are small floats (an exponent and `precision` bits of mantissa) and travel as differences of neighbouring codes
under a two-sided geometric model. All of it is integer arithmetic, so every machine gets the same probabilities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import constriction
import numpy as np
from numpy.typing import NDArray

from penjing.errors import PackageError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
T = TypeVar("T")

MAX_MODELS = 64
MAX_LOW_BITS = 7
MAX_PRECISION = 3
MAX_EXPONENT = 23
_HEAD = 5  # bytes of each model in front of the coded differences
_SPREADS = tuple(range(2, 32, 2))  # decay of the differences, in 32nds
_LIMIT = 255  # differences of codes lie in [-255, 255]
_WIDTHS = (0, 1, 2, 4, 8, 16)  # smoothing windows that the search tries, in symbols


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Frequencies of the values `start << low_bits` and up; `codes` are the small floats (0: does not occur).

    apart: whether a symbol is the most frequent one or not is coded first, in one bit's worth of work; in sparse
    grids most symbols then need no search in the table.
    """

    low_bits: int
    start: int
    precision: int
    codes: tuple[int, ...]
    apart: bool = False

    @property
    def weights(self) -> NDArray[np.int64]:
        """Relative frequencies of the coded symbols, as integers."""
        return small_floats(np.array(self.codes, dtype=np.int64), self.precision)

    def push(self, encoder: Encoder, symbols: NDArray[Any]) -> None:
        """Adds symbols (counted from `start`), to be popped by one `pop`."""
        if not self.apart:
            encoder.push(symbols, self.weights)
            return
        peak, rest, flags = self._split()
        others = symbols[symbols != peak]
        encoder.push(others - (others > peak), rest)
        encoder.push(symbols == peak, flags)

    def pop(self, decoder: Decoder, count: int) -> Bytes:
        """The next `count` symbols."""
        if not self.apart:
            return decoder.pop(count, self.weights).astype(np.uint8)
        peak, rest, flags = self._split()
        others = np.flatnonzero(decoder.pop(count, flags) == 0)
        found = decoder.pop(len(others), rest).astype(np.uint8)
        symbols = np.full(count, peak, dtype=np.uint8)
        symbols[others] = found + (found >= peak)
        return symbols

    def _split(self) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        weights = self.weights
        peak = int(weights.argmax())
        rest = np.delete(weights, peak)
        return peak, rest, np.array([rest.sum(), weights[peak]])

    def entropy(self) -> float:
        """Bits per symbol that data following this model takes."""
        weights = self.weights.astype(np.float64)
        p = weights[weights > 0] / weights.sum()
        return float(-(p * np.log2(p)).sum()) + self.low_bits


def small_floats(codes: NDArray[np.int64], precision: int) -> NDArray[np.int64]:
    """Code 0 is 0; code c > 0 is (2^precision + low bits of c-1) shifted by the high bits of c-1."""
    value = np.maximum(codes - 1, 0)
    mantissa = (1 << precision) + (value & ((1 << precision) - 1))
    return np.where(codes > 0, mantissa << (value >> precision), 0)


def guarded(action: Callable[[], T], what: str) -> T:
    """Runs a call into the coding library; whatever it makes of hostile bytes becomes a PackageError."""
    try:
        return action()
    except PackageError:
        raise
    except (ValueError, OverflowError, IndexError, TypeError, RuntimeError, MemoryError) as error:
        raise _damaged(what) from error
    except BaseException as error:
        # A Rust panic arrives as pyo3_runtime.PanicException, which is no Exception and cannot be imported.
        if type(error).__name__ == "PanicException":
            raise _damaged(what) from error
        raise


def _damaged(what: str) -> PackageError:
    return PackageError(f"{what} cannot be decoded", hint="the package was made by a faulty writer; get it again")


class Encoder:
    """A stack of symbols: what is pushed last is popped first."""

    def __init__(self) -> None:
        self._coder: Any = constriction.stream.stack.AnsCoder()

    def push(self, symbols: NDArray[Any], weights: NDArray[np.int64] | Floats) -> None:
        """Adds `symbols` (indices into `weights`), to be popped in the same order by one `Decoder.pop`."""
        if len(symbols) and len(weights) > 1:
            self._coder.encode_reverse(symbols.astype(np.int32), _categorical(weights))

    def push_flags(self, flags: NDArray[np.int32], chances: Floats) -> None:
        """Adds truth values, each with its own chance of being one; popped by one `Decoder.pop_flags`."""
        self._coder.encode_reverse(flags, _FLAG, chances)

    def push_each(self, symbols: NDArray[Any], weights: Floats) -> None:
        """Adds `symbols`, each an index into its own row of `weights`; popped by one `Decoder.pop_each`."""
        self._coder.encode_reverse(symbols.astype(np.int32), _OWN, weights)

    def words(self) -> bytes:
        """The stack as little-endian 32-bit words."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())


class Decoder:
    """Pops what an `Encoder` pushed."""

    def __init__(self, words: bytes | memoryview) -> None:
        if len(words) % 4:
            raise _damaged("an entropy-coded stream")
        array = np.frombuffer(words, dtype="<u4").astype(np.uint32)
        self._coder: Any = guarded(lambda: constriction.stream.stack.AnsCoder(array), "an entropy-coded stream")

    def pop(self, count: int, weights: NDArray[np.int64] | Floats) -> NDArray[np.int32]:
        """The next `count` symbols."""
        if count == 0 or len(weights) == 1:
            return np.zeros(count, dtype=np.int32)
        decoded = guarded(lambda: self._coder.decode(_categorical(weights), count), "an entropy-coded stream")
        return np.asarray(decoded, dtype=np.int32)

    def pop_flags(self, chances: Floats) -> NDArray[np.int32]:
        """The next truth values, one for each of `chances`."""
        decoded = guarded(lambda: self._coder.decode(_FLAG, chances), "an entropy-coded stream")
        return np.asarray(decoded, dtype=np.int32)

    def pop_each(self, weights: Floats) -> NDArray[np.int64]:
        """The next symbols, one for each row of `weights`."""
        decoded = guarded(lambda: self._coder.decode(_OWN, weights), "an entropy-coded stream")
        return np.asarray(decoded, dtype=np.int64)

    def finish(self) -> None:
        """Raises PackageError unless everything was popped."""
        if not self._coder.is_empty():
            raise _damaged("an entropy-coded stream")


#: Of two outcomes; the chance of the second comes with each of them.
_FLAG = constriction.stream.model.Bernoulli(perfect=False)
#: Of symbols that come with weights of their own each.
_OWN = constriction.stream.model.Categorical(perfect=False)


def _categorical(weights: NDArray[np.int64] | Floats) -> Any:
    return constriction.stream.model.Categorical(weights.astype(np.float64), perfect=False)


def pack_low(values: Bytes, width: int) -> bytes:
    """The lowest `width` bits of each value: fields of 4, 2 and 1 bits, each spread planar over its bytes."""
    out = []
    shift = 0
    for field in (4, 2, 1):
        if width & field:
            per = 8 // field
            stride = -(-len(values) // per)
            padded = np.zeros(stride * per, dtype=np.uint8)
            padded[: len(values)] = (values >> shift) & ((1 << field) - 1)
            packed = np.zeros(stride, dtype=np.uint8)
            for i in range(per):
                packed |= padded[i * stride : (i + 1) * stride] << (i * field)
            out.append(packed.tobytes())
            shift += field
    return b"".join(out)


def low_size(count: int, width: int) -> int:
    """Bytes that `pack_low` gives for `count` values."""
    return sum(-(-count // (8 // field)) for field in (4, 2, 1) if width & field)


def unpack_low(data: bytes | memoryview, count: int, width: int) -> Bytes:
    """Inverse of `pack_low`; `data` holds exactly `low_size(count, width)` bytes."""
    out = np.zeros(count, dtype=np.uint8)
    shift = position = 0
    for field in (4, 2, 1):
        if width & field:
            per = 8 // field
            stride = -(-count // per)
            packed = np.frombuffer(data, dtype=np.uint8, count=stride, offset=position)
            for i in range(per):
                target = out[i * stride : (i + 1) * stride]
                target |= ((packed[: len(target)] >> (i * field)) & ((1 << field) - 1)) << shift
            position += stride
            shift += field
    return out


@cache
def _difference_weights(spread: int) -> NDArray[np.int64]:
    side = [1 << 20]
    for _ in range(_LIMIT):
        side.append(max(1, side[-1] * spread // 32))
    return np.array(side[:0:-1] + side, dtype=np.int64)


@cache
def _difference_bits() -> Floats:
    """Cost of a difference of each size (columns) under each spread (rows)."""
    rows = []
    for spread in _SPREADS:
        weights = _difference_weights(spread).astype(np.float64)
        rows.append(np.log2(weights.sum()) - np.log2(weights[_LIMIT:]))
    return np.array(rows)


def _cheapest_spread(codes: NDArray[np.int64]) -> tuple[int, float]:
    cost = _difference_bits()[:, np.abs(np.diff(codes))].sum(axis=1)
    best = int(cost.argmin())
    return _SPREADS[best], float(cost[best])


def best_model(counts: NDArray[np.int64], *, slack: float = 0.0) -> Model:
    """The model that makes table and data together smallest.

    counts: (256,) occurrences of each byte value. `slack`: up to this part of the size is given away for more raw low
    bits, which decode faster (the search in the coder is one step shorter for each).
    """
    candidates = [_best_of(counts, 0)]
    for low_bits in range(1, 5):
        candidates.append(_best_of(counts, low_bits))
        allowed = min(size for size, _ in candidates) * (1 + slack)
        if candidates[-1][0] > 1.01 * allowed:
            break
    model = max((c for c in candidates if c[0] <= allowed), key=lambda c: (c[1].low_bits, -c[0]))[1]
    weights = model.weights
    apart = len(weights) > 4 and 2 * int(weights.max()) > int(weights.sum())
    return dataclasses.replace(model, apart=apart)


def _best_of(counts: NDArray[np.int64], low_bits: int) -> tuple[float, Model]:
    """Smallest size in bits and its model: first the smoothing is chosen, then the precision."""
    folded = counts.reshape(-1, 1 << low_bits).sum(axis=1)
    used = np.flatnonzero(folded)
    seen = folded[used[0] : used[-1] + 1]

    def tried(width: int, precision: int) -> tuple[float, int, int, NDArray[np.int64]]:
        codes = _nearest_codes(_smoothed(seen, width), precision)
        weights = small_floats(codes, precision).astype(np.float64)
        present = seen > 0
        data = float(seen[present] @ (np.log2(weights.sum()) - np.log2(weights[present])))
        return data + _cheapest_spread(codes)[1], width, precision, codes

    first = min((tried(width, 2) for width in (_WIDTHS if len(seen) > 8 else (0,))), key=lambda t: t[0])
    size, _, precision, codes = min([first] + [tried(first[1], p) for p in (0, 1, 3)], key=lambda t: t[0])
    model = Model(low_bits=low_bits, start=int(used[0]), precision=precision, codes=tuple(codes.tolist()))
    return size + low_bits * float(counts.sum()), model


def _smoothed(seen: NDArray[np.int64], width: int) -> Floats:
    """Counts after a box filter; symbols far above or below their neighbourhood keep their own count."""
    values = seen.astype(np.float64)
    if width == 0:
        return values
    span = 2 * width + 1
    padded = np.concatenate([[0.0], np.full(width, values[0]), values, np.full(width, values[-1])])
    total = np.cumsum(padded)
    mean = (total[span:] - total[:-span]) / span
    return np.where(np.abs(values - mean) > 4 * np.sqrt(mean + 1), values, np.where(mean > 0, mean, values))


def _nearest_codes(values: Floats, precision: int) -> NDArray[np.int64]:
    """Codes of the small floats nearest to `values` (scaled as a whole); what is above 0 stays above 0."""
    scaled = values * (2.0 ** (MAX_EXPONENT + precision) / values.max())
    exponent = np.maximum(np.frexp(scaled)[1].astype(np.int64) - 1 - precision, 0)
    code = (exponent << precision) + np.rint(scaled / 2.0**exponent).astype(np.int64) - (1 << precision) + 1
    top = (MAX_EXPONENT + 1) << precision
    code = np.where(values > 0, np.minimum(np.maximum(code, 1), top), 0)
    # The smallest code in use needs no empty octaves below it.
    low = int(code[code > 0].min()) - 1 >> precision
    return np.where(code > 0, code - (low << precision), 0)


def pack_models(models: Sequence[Model]) -> bytes:
    """The models as bytes: a head of 5 bytes each, then all differences in one entropy-coded stream."""
    if not models:
        return b""
    heads = [bytes([len(models)])]
    encoder = Encoder()
    for model in reversed(models):
        codes = np.array(model.codes, dtype=np.int64)
        spread, _ = _cheapest_spread(codes)
        encoder.push(np.diff(codes) + _LIMIT, _difference_weights(spread))
    for model in models:
        spread, _ = _cheapest_spread(np.array(model.codes, dtype=np.int64))
        kind = model.low_bits | model.precision << 3 | model.apart << 5
        heads.append(bytes([kind, model.start, len(model.codes) - 1, spread, model.codes[0]]))
    return b"".join(heads) + encoder.words()


def unpack_models(data: bytes | memoryview) -> tuple[Model, ...]:
    """Inverse of `pack_models`; raises PackageError for anything that no writer makes."""
    if not len(data):
        return ()
    number = data[0]
    if not 0 < number <= MAX_MODELS or len(data) < 1 + _HEAD * number:
        raise _damaged("the table of symbol models")
    decoder = Decoder(data[1 + _HEAD * number :])
    models = []
    for i in range(number):
        kind, start, last, spread, first = data[1 + _HEAD * i : 1 + _HEAD * (i + 1)]
        low_bits, precision, apart = kind & 7, kind >> 3 & 3, kind >> 5
        if apart > 1 or start + last >= 256 >> low_bits or not 1 <= spread < 32:
            raise _damaged("the table of symbol models")
        steps = decoder.pop(last, _difference_weights(spread)).astype(np.int64) - _LIMIT
        codes = first + np.concatenate([[0], np.cumsum(steps)])
        if codes.min() < 0 or codes.max() > (MAX_EXPONENT + 1) << precision or codes.max() == 0:
            raise _damaged("the table of symbol models")
        if apart and np.count_nonzero(codes) < 2:
            raise _damaged("the table of symbol models")
        models.append(
            Model(
                low_bits=low_bits,
                start=start,
                precision=precision,
                codes=tuple(int(c) for c in codes),
                apart=bool(apart),
            )
        )
    decoder.finish()
    return tuple(models)
