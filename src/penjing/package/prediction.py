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

from penjing.package.claims import bad_index, field, naturals, shown
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
_LOW, _HIGH = np.int16(-128), np.int16(127)
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
        members = [i for i in values if taps(tensors[i]) == size]
        plain = {i: np.bincount(values[i], minlength=256) for i in members}
        members = [i for i in members if plain[i].max() < _USUAL * len(values[i])]
        if not members:
            continue
        cost = _FRONT_BITS + _WEIGHT_BITS * _count(size)
        common, *weights = _fitted(members, values, size, cost)
        for shared in dict.fromkeys([common, *weights]):
            group = [i for i, own in zip(members, weights, strict=True) if own == shared]
            made = apart([values[i] for i in group], shared) if group else []
            saved = {i: _bits(plain[i]) - _cost(*m) for i, m in zip(group, made, strict=True)}
            if sum(max(bits, 0.0) for bits in saved.values()) > cost:
                for i, (predictor, left) in zip(group, made, strict=True):
                    if saved[i] > 0:
                        chosen[i], coded[i] = predictor, left
    predictors = tuple(chosen.get(i) for i in range(len(tensors))) if chosen else ()
    return predictors, [coded[i] for i in values]


def apart(values: Sequence[Bytes], weights: Weights) -> list[tuple[Predictor, Bytes]]:
    """What to code of whole kernels: 128 + value - prediction; kernels in which that is no byte stay plain.

    A reader could tell such values by modulo 256, but not while it knows their neighbours coarsely.
    """
    size = len(weights) + 1
    kernels = np.concatenate(values).reshape(-1, size)
    out, odd = np.empty_like(kernels), np.zeros(len(kernels), dtype=bool)
    for span, planes in _chunks(kernels):
        left = np.empty_like(planes)
        left[0] = planes[0] + 128
        for tap, own in enumerate(weights, 1):
            np.subtract(planes[tap] + 128, _predicted(planes, tap, own), out=left[tap])
        out[span] = left.astype(np.uint8).T
        odd[span] = (left.view(np.uint16) > 255).any(axis=0)
    out[odd] = kernels[odd]
    edges = np.cumsum([len(v) // size for v in values])[:-1]
    return [
        (Predictor(weights, tuple(np.flatnonzero(own).tolist())), left.reshape(-1))
        for own, left in zip(np.split(odd, edges), np.split(out, edges), strict=True)
    ]


def restore(coded: Sequence[Bytes], predictors: Sequence[Predictor]) -> list[Bytes]:
    """The values of tensors whose predictors have the same weights, of what `apart` made of them.

    What is known coarsely may lead out of the range; it is cut off there.
    """
    size, weights = predictors[0].taps, predictors[0].weights
    together = np.concatenate(coded).reshape(-1, size)
    out = np.empty_like(together)
    for span, planes in _chunks(together):
        for tap, own in enumerate(weights, 1):
            total = planes[tap]
            total += _predicted(planes, tap, own)
            np.minimum(np.maximum(total, _LOW, out=total), _HIGH, out=total)
        planes += 128
        out[span] = planes.astype(np.uint8).T
    first = 0
    for predictor, values in zip(predictors, coded, strict=True):
        plain = first + np.array(predictor.plain, dtype=np.intp)
        out[plain] = together[plain]
        first += len(values) // size
    return np.split(out.reshape(-1), np.cumsum([len(c) for c in coded])[:-1])


def _chunks(kernels: Bytes) -> Iterator[tuple[slice, NDArray[np.int16]]]:
    """Kernels, some at a time, as one array a tap, with their signs."""
    step = _CHUNK // kernels.shape[1]
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
def _fitted(members: Sequence[int], values: Mapping[int, Bytes], size: int, cost: float) -> list[Weights]:
    """The weights to share, then each tensor's: the shared ones, or its own where that saves more bits than `cost`."""
    grams = np.array([_gram(values[i], size) for i in members])
    together = grams.sum(axis=0)[None]
    shared, own = _solved(together, grams), _solved(grams, grams)
    counts = np.array([len(values[i]) / size for i in members])
    # Bits between Gaussians of the two variances, for each tap.
    gained = counts * np.log2(shared[1] / own[1]).sum(axis=1) / 2
    common = _rows(shared[0][0])
    return [common, *(_rows(own[0][n]) if gained[n] > cost else common for n in range(len(members)))]


def _gram(values: Bytes, size: int) -> Floats:
    """Sums of products of taps with each other; integers, and so the same on every machine."""
    kernels = values.reshape(-1, size)
    some = kernels[:: -(-len(kernels) // _SAMPLE)].astype(np.float64) - 128
    return np.asarray(some.T @ some)


def _solved(grams: Floats, tried: Floats) -> tuple[Floats, Floats]:
    """Least squares for each tap, a little damped: (grams, taps, taps) weights in 64ths, tap by tap before it, and the
    variances, up to a factor, (tried, taps - 1) that they leave where the products are `tried`."""
    size = grams.shape[1]
    out = np.zeros((len(grams), size, size))
    left = np.empty((len(tried), size - 1))
    damped = grams + np.eye(size) * (1e-3 * np.trace(grams, axis1=1, axis2=2) / size + 1.0)[:, None, None]
    for tap in range(1, size):
        near = slice(max(0, tap - _REACH), tap)
        found = np.linalg.solve(damped[:, near, near], grams[:, near, tap, None])[..., 0]
        out[:, tap, near] = np.clip(np.rint(found * (1 << _SHIFT)), -127, 127)
        error = np.eye(size)[tap] - out[:, tap] / (1 << _SHIFT)
        left[:, tap - 1] = np.maximum(((tried @ error[:, :, None])[..., 0] * error).sum(axis=1), 1.0)
    return out, left


def _rows(weights: Floats) -> Weights:
    whole = weights.astype(int).tolist()
    return tuple(tuple(whole[tap][max(0, tap - _REACH) : tap]) for tap in range(1, len(whole)))


def _cost(predictor: Predictor, left: Bytes) -> float:
    return _bits(np.bincount(left, minlength=256)) + _PLAIN_BITS * len(predictor.plain)


def _bits(counts: NDArray[np.intp]) -> float:
    counts = counts[counts > 0]
    return float(counts @ (np.log2(counts.sum()) - np.log2(counts)))


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
            bad_index(f"the predictor of tensor '{shown(tensor.name)}' is one for other kernels")
        if sum(gaps) * taps(tensor) >= tensor.size or 0 in gaps[1:]:
            bad_index(f"tensor '{shown(tensor.name)}' has no such kernels")
        out.append(Predictor(weights, tuple(accumulate(gaps))))
    return tuple(out)


def _weights(row: Any) -> Weights:
    if not isinstance(row, list) or any(type(w) is not int or not -128 < w < 128 for w in row):
        bad_index("a predictor is not understood")
    if len(row) not in _SIZES:
        bad_index("a predictor fits no kernel")
    weights = iter(row)
    return tuple(tuple(next(weights) for _ in range(min(tap, _REACH))) for tap in range(1, _SIZES[len(row)]))


def _count(size: int) -> int:
    """Number of weights for kernels of `size` taps."""
    return sum(min(tap, _REACH) for tap in range(1, size))


_SIZES = {_count(size): size for size in range(2, MAX_TAPS + 1)}
