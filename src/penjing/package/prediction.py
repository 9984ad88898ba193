"""Linear prediction inside kernels: a weight is expected from those before it in its kernel, and what is left is coded.

Trained kernels are smooth: neighbouring taps agree in sign and size. A predictor holds, for each tap but the first, the
weights of up to 8 taps before it, in 64ths; a value less its prediction takes its place in the parts. This is
differential pulse code modulation (Cutler 1952) in its open-loop form: coarse differences make coarse kernels.
All of it is integer arithmetic, so every machine restores the same values. docs/format.md has the JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.package.claims import bad_index, field, naturals
from penjing.package.models import Bytes, Floats
from penjing.package.pieces import Tensor

Weights = tuple[tuple[int, ...], ...]  #: for each tap from the second on, those of the nearest before it

MAX_TAPS = 64
_REACH = 8
_SHIFT = 6  # weights are 64ths
_MAX_PREDICTORS = 65_535
_CHUNK = 1 << 17  # values worked on at a time: a level 2 cache holds them
_SAMPLE = 1 << 16  # kernels of a tensor that a predictor is fitted to, about
_FRONT_BITS = 200.0  # what a predictor costs to send, besides `_WEIGHT_BITS` for each of its weights
_WEIGHT_BITS = 8.0
_PLAIN_BITS = 12.0  # and what the number of a kernel does
_USUAL = 0.5  # a tensor with more values alike than this share is the sparse codec's, or small anyway


@dataclasses.dataclass(frozen=True)
class Predictor:
    """How the kernels of a tensor are predicted. plain: the numbers of those that are coded as they are, ascending."""

    weights: Weights
    plain: tuple[int, ...] = ()

    @property
    def taps(self) -> int:
        """Number of taps of a kernel."""
        return len(self.weights) + 1

    def part(self, start: int, stop: int) -> Predictor:
        """Of kernels `start` to `stop` alone."""
        return Predictor(self.weights, tuple(k - start for k in self.plain if start <= k < stop))


def taps(tensor: Tensor) -> int:
    """Number of taps of a tensor's kernels (axes from the third on); 0 where nothing can be predicted."""
    count = math.prod(tensor.shape[2:]) if len(tensor.shape) > 2 and tensor.is_grid else 0
    return count if 2 <= count <= MAX_TAPS and tensor.size else 0


def choose(tensors: Sequence[Tensor], values: Mapping[int, Bytes]) -> tuple[tuple[Predictor | None, ...], list[Bytes]]:
    """The predictor of each tensor that pays for itself, and the bytes to code of all those in `values`, in its order.

    values: the bytes of 8-bit tensors by number (int8 with the sign bit turned over). Kernels of a size share weights,
    or have their own where that saves more than it costs. () for none at all.
    """
    chosen: dict[int, Predictor] = {}
    coded = dict(values)
    for size in sorted({taps(tensors[i]) for i in values} - {0}):
        members = [i for i in values if taps(tensors[i]) == size and not _is_sparse(values[i])]
        if not members:
            continue
        grams = [_gram(values[i], size) for i in members]
        shared, saved, cost = _fitted(sum(grams)), 0.0, _FRONT_BITS + _WEIGHT_BITS * _count(size)
        by_shared: dict[int, tuple[Predictor, Bytes]] = {}
        for i, gram in zip(members, grams, strict=True):
            plain = _bits(values[i])
            near, own = apart(values[i], shared), apart(values[i], _fitted(gram))
            near_bits, own_bits = _cost(near), _cost(own) + cost
            if own_bits < min(plain, near_bits):
                chosen[i], coded[i] = own
            elif near_bits < plain:
                by_shared[i], saved = near, saved + plain - near_bits
        if saved > cost:
            for i, (predictor, bytes_) in by_shared.items():
                chosen[i], coded[i] = predictor, bytes_
    predictors = tuple(chosen.get(i) for i in range(len(tensors))) if chosen else ()
    return predictors, [coded[i] for i in values]


def apart(values: Bytes, weights: Weights) -> tuple[Predictor, Bytes]:
    """What to code of whole kernels: 128 + value - prediction; kernels in which that is no byte stay plain.

    A reader could tell such values by modulo 256, but not while it knows their neighbours coarsely.
    """
    kernels = values.reshape(-1, len(weights) + 1)
    out, odd = np.empty_like(kernels), np.zeros(len(kernels), dtype=bool)
    for span, planes in _chunks(values, len(weights) + 1):
        out[span, 0] = planes[0] + 128
        for tap, own in enumerate(weights, 1):
            left = planes[tap] - _predicted(planes, tap, own) + 128
            out[span, tap] = left.astype(np.uint8)
            odd[span] |= (left < 0) | (left > 255)
    out[odd] = kernels[odd]
    return Predictor(weights, tuple(np.flatnonzero(odd).tolist())), out.reshape(-1)


def restore(coded: Sequence[Bytes], predictors: Sequence[Predictor]) -> list[Bytes]:
    """The values of tensors whose predictors have the same weights, of what `apart` made of them.

    What is known coarsely may lead out of the range; it is cut off there.
    """
    size, weights = predictors[0].taps, predictors[0].weights
    together = np.concatenate(coded)
    out = np.empty((len(together) // size, size), dtype=np.uint8)
    for span, planes in _chunks(together, size):
        for tap, own in enumerate(weights, 1):
            planes[tap] += _predicted(planes, tap, own)
            np.clip(planes[tap], -128, 127, out=planes[tap])
        out[span] = (planes + 128).astype(np.uint8).T
    first = 0
    for predictor, bytes_ in zip(predictors, coded, strict=True):
        plain = np.array(predictor.plain, dtype=np.intp)
        out[first + plain] = bytes_.reshape(-1, size)[plain]
        first += len(bytes_) // size
    return np.split(out.reshape(-1), np.cumsum([len(c) for c in coded])[:-1])


def _chunks(values: Bytes, size: int) -> Iterator[tuple[slice, NDArray[np.int16]]]:
    """Kernels, some at a time, as one array a tap, with their signs."""
    kernels = values.reshape(-1, size)
    step = _CHUNK // size
    for start in range(0, len(kernels), step):
        span = slice(start, start + step)
        planes = kernels[span].T.astype(np.int16, order="C")
        planes -= 128
        yield span, planes


def _predicted(planes: NDArray[np.int16], tap: int, weights: Sequence[int]) -> NDArray[np.int16]:
    """Sums wrap around at 16 bits, for a reader as for a writer."""
    total = np.full(planes.shape[1], 1 << _SHIFT - 1, dtype=np.int16)
    for before, weight in enumerate(weights, tap - len(weights)):
        if weight:
            total += planes[before] * np.int16(weight)
    total >>= _SHIFT
    return total


# ------------------------------------------------------------------------------------------------------- choosing
def _is_sparse(values: Bytes) -> bool:
    return int(np.bincount(values).max()) >= _USUAL * len(values)


def _gram(values: Bytes, size: int) -> Floats:
    """Sums of products of taps with each other; integers, and so the same on every machine."""
    kernels = values.reshape(-1, size)
    kernels = kernels[:: -(-len(kernels) // _SAMPLE)].astype(np.float64) - 128
    return np.asarray(kernels.T @ kernels)


def _fitted(gram: Floats) -> Weights:
    """Least squares for each tap, a little damped."""
    size, out = len(gram), []
    damping = np.eye(size) * (1e-3 * np.trace(gram) / size + 1.0)
    for tap in range(1, size):
        near = slice(max(0, tap - _REACH), tap)
        weights = np.linalg.solve(gram[near, near] + damping[near, near], gram[near, tap])
        out.append(tuple(np.clip(np.rint(weights * (1 << _SHIFT)), -127, 127).astype(int).tolist()))
    return tuple(out)


def _cost(made: tuple[Predictor, Bytes]) -> float:
    return _bits(made[1]) + _PLAIN_BITS * len(made[0].plain)


def _bits(values: Bytes) -> float:
    counts = np.bincount(values, minlength=256)
    counts = counts[counts > 0]
    return float(counts @ (np.log2(len(values)) - np.log2(counts)))


# ---------------------------------------------------------------------------------------------------------- index
def pack(chosen: Sequence[Predictor | None]) -> dict[str, Any]:
    """The JSON of the predictor of each tensor (None: its values are coded as they are)."""
    used = [predictor for predictor in chosen if predictor is not None]
    numbers = {weights: n for n, weights in enumerate(dict.fromkeys(p.weights for p in used), 1)}
    return {
        "predictors": [[w for own in weights for w in own] for weights in numbers],
        "predictor": [0 if predictor is None else numbers[predictor.weights] for predictor in chosen],
        "plain": [np.diff(p.plain, prepend=0).tolist() for p in used],
    }


def parse(front: Mapping[str, Any], tensors: Sequence[Tensor]) -> tuple[Predictor | None, ...]:
    """The predictor of each tensor; raises PackageError for what no writer makes."""
    rows, plain = (field(dict(front), key, list) for key in ("predictors", "plain"))
    chosen = naturals(front.get("predictor"), "'predictor'")
    if len(chosen) != len(tensors) or max(chosen, default=0) > len(rows) or len(rows) > _MAX_PREDICTORS:
        bad_index("it has not one predictor for each tensor")
    if len(plain) != sum(number > 0 for number in chosen):
        bad_index("it does not say which kernels of each tensor are plain")
    known, left = [_weights(row) for row in rows], iter(plain)
    out: list[Predictor | None] = []
    for number, tensor in zip(chosen, tensors, strict=True):
        if not number:
            out.append(None)
            continue
        weights, gaps = known[number - 1], naturals(next(left), "'plain'")
        if taps(tensor) != len(weights) + 1:
            bad_index(f"the predictor of tensor '{tensor.name}' is one for other kernels")
        if sum(gaps) * taps(tensor) >= tensor.size or 0 in gaps[1:]:
            bad_index(f"tensor '{tensor.name}' has no such kernels")
        out.append(Predictor(weights, tuple(accumulate(gaps))))
    return tuple(out)


def _weights(row: Any) -> Weights:
    if not isinstance(row, list) or any(type(w) is not int or not -128 < w < 128 for w in row):
        bad_index("a predictor is not understood")
    size = next((size for size in range(2, MAX_TAPS + 1) if _count(size) == len(row)), 0)
    if not size:
        bad_index("a predictor fits no kernel")
    weights = iter(row)
    return tuple(tuple(next(weights) for _ in range(min(tap, _REACH))) for tap in range(1, size))


def _count(size: int) -> int:
    """Number of weights for kernels of `size` taps."""
    return sum(min(tap, _REACH) for tap in range(1, size))
