"""Streaming statistics of activations, in memory that does not grow with the number of samples."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from penjing.tensors.grids import TAIL, Ranges, entropy_cut

BINS = 4096  # on each side of zero
#: Values of one sample (an index of dimension 0) that a histogram counts; of larger ones it takes so many at random.
MOST = 8192


class Observer:
    """Exact minimum, maximum and count, and (unless `histogram` is off) a histogram about zero, of at most `MOST`
    values of each sample: always the same places, so that batches may be of any size.

    The histogram's bins have a width of a power of two: when a larger value arrives, neighbours are merged until it
    fits. So what is seen does not depend on order or size of the batches, and two observers merge without any loss.
    Non-finite values are counted in `broken` and otherwise left out.
    """

    def __init__(self, *, histogram: bool = True) -> None:
        self.low, self.high, self.count, self.broken = math.inf, -math.inf, 0, 0
        self._exponent: int | None = None  # the bins are 2**exponent wide
        self._counts = torch.zeros(2 * BINS, dtype=torch.int64) if histogram else None

    def update(self, x: Tensor) -> None:
        """Adds every value of `x` (any shape, floating)."""
        x = x.detach()
        x = x if x.is_floating_point() else x.float()
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)  # as it lies in memory, so that nothing is copied
        if x.numel() == 0:
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = x[torch.isfinite(x)]
            self.broken += x.numel() - finite.numel()
            return self.update(finite)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += x.numel()
        if self._counts is not None:
            self._grow(_exponent(max(abs(low), abs(high))))
            width = 2.0 ** (self._exponent or 0)
            index = (_some(x).float() / width).floor_().to(torch.int32) + BINS  # by a power of two, so exact
            self._counts += torch.bincount(index.clamp_(0, 2 * BINS - 1), minlength=2 * BINS)
        return None

    def merge(self, other: Observer) -> None:
        """Adds everything that `other` has seen (which is not changed)."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count, self.broken = self.count + other.count, self.broken + other.broken
        if self._counts is None or other._counts is None or other._exponent is None:
            return
        copy = Observer()
        copy._exponent, copy._counts = other._exponent, other._counts.clone()
        self._grow(other._exponent)
        copy._grow(self._exponent or 0)
        self._counts += copy._counts

    def range(self, ranges: Ranges, levels: int = 256) -> tuple[float, float]:
        """The (low, high) a grid of `levels` levels should cover.

        Raises ValueError when nothing was seen, or when `ranges` needs the histogram that was not kept.
        """
        if self.count == 0:
            raise ValueError("no value was observed")
        if ranges == "minmax" or self.low == self.high:
            return self.low, self.high
        if self._counts is None or self._exponent is None:
            raise ValueError(f"ranges={ranges!r} needs a histogram")
        counts, width = self._counts.double(), 2.0**self._exponent
        if ranges == "percentile":
            low, high = self._percentile(counts, width)
        elif ranges == "mse":
            low, high = self._least_error(counts, width, levels)
        else:
            magnitudes = counts[BINS:] + counts[:BINS].flip(0)
            one_sided = self.low >= 0.0 or self.high <= 0.0
            clip = entropy_cut(magnitudes, levels if one_sided else levels // 2) * width
            low, high = -clip, clip
        return max(low, self.low), min(high, self.high)

    def _percentile(self, counts: Tensor, width: float) -> tuple[float, float]:
        cumulative = counts.cumsum(0) / counts.sum()
        first = int((cumulative <= TAIL / 2).sum())
        last = int((cumulative < 1.0 - TAIL / 2).sum())
        return (first - BINS) * width, (last + 1 - BINS) * width

    def _least_error(self, counts: Tensor, width: float, levels: int) -> tuple[float, float]:
        """The range with the least expected squared error, each end moved in alone, in turn (coordinate descent)."""
        used = counts.nonzero().flatten()
        weight, centre = counts[used], (used.double() + 0.5 - BINS) * width

        def error(low: float, high: float) -> float:
            step = (min(high, math.inf) - low) / (levels - 1)
            if step <= 0.0:
                return math.inf
            outside = (centre - centre.clamp(low, high)).square()
            # Inside, rounding errors are uniform: a histogram coarser than the grid cannot show them itself.
            inside = ((centre >= low) & (centre <= high)).double() * step * step / 12
            return float((weight * (outside + inside)).sum())

        low, high = min(self.low, 0.0), max(self.high, 0.0)
        for _ in range(3):
            before = (low, high)
            high = min((high * (1.0 - 0.02 * i) for i in range(45)), key=lambda end: error(low, end))
            low = min((low * (1.0 - 0.02 * i) for i in range(45)), key=lambda end: error(end, high))
            if (low, high) == before:
                break
        return low, high

    def _grow(self, exponent: int) -> None:
        """Makes the bins at least 2**exponent wide, merging neighbours."""
        if self._exponent is None:
            self._exponent = exponent
        while self._counts is not None and self._exponent < exponent:
            merged = torch.zeros_like(self._counts)
            merged[BINS // 2 : BINS + BINS // 2] = self._counts.view(-1, 2).sum(1)
            self._counts, self._exponent = merged, self._exponent + 1


def _some(x: Tensor) -> Tensor:
    """At most `MOST` values of each sample, flat."""
    rows = x.flatten(1) if x.ndim > 1 else x[None]
    if rows.shape[1] <= MOST:
        return rows.flatten()
    return rows[:, _places(rows.shape[1])].flatten()


@lru_cache(maxsize=256)
def _places(values: int) -> Tensor:
    return torch.randint(values, (MOST,), generator=torch.Generator().manual_seed(0)).sort().values


def _exponent(magnitude: float) -> int:
    """The smallest exponent whose bins hold values up to `magnitude`."""
    if magnitude < 2.0**-100:
        return -112
    return math.frexp(magnitude)[1] - int(math.log2(BINS))
