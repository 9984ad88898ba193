"""What weights in training will cost in a package, in bits, with a gradient: the rate term of low-entropy training.

Oktay et al. 2020, "Scalable model compression by entropy penalized reparameterization", learn a density for every layer
and count bits under it; here the density is the one that the coder for sparse grids will see (sparse_coding.py), taken
anew from the rounded weights in each step: shares of rows and columns, and a histogram of magnitudes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: What an empty row or column counts as, of the mean one: it may come back, at a price.
_EMPTY_ROW, _EMPTY_COLUMN = 0.02, 0.05


def rate(place: Tensor, most: int) -> Tensor:
    """About the bits that weights take, `place` (any shape, first axis outputs) being weights divided by their step.

    Between whole numbers the cost runs along straight lines, so that its slope is what the next whole number costs
    more: towards zero everywhere, steepest next to it and where rows and columns are nearly empty. Magnitudes go up to
    `most`; the chances themselves get no gradient.
    """
    bits: Tensor = _Rate.apply(place.reshape(len(place), -1) if place.ndim > 1 else place.reshape(1, -1), most)  # type: ignore[no-untyped-call]
    return bits


class _Rate(torch.autograd.Function):
    """All at once, because every operator on its own would take as long as a layer."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, most: int) -> Tensor:
        size = place.abs()
        there = size >= 0.5
        slope = _first(there)
        large = torch.nonzero(size.flatten() > 1).flatten()
        some = size.flatten()[large].clamp_(max=most)
        codes = some.round().long()
        ones = there.sum() - (codes > 1).sum()
        counts = torch.bincount(codes, minlength=most + 1)[1:]
        counts[0] = ones
        further = _magnitudes(counts)
        slope.add_(further[0]).clamp_min_(0.0)
        bits = (slope * size.clamp(max=1.0)).sum()
        below = some.floor().clamp_(max=most - 1).long()
        steps = further.diff()[below - 1]
        bits = bits + (further[below - 1] - further[0] + steps * (some - below)).sum()
        slope.view(-1)[large] = steps
        ctx.save_for_backward(slope.mul_(place.sign()))
        return bits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grads[0], None


def _first(there: Tensor) -> Tensor:
    """Bits between a zero and something else at each place of a matrix, by the shares of rows and columns."""
    rows, columns = there.sum(1, dtype=torch.float32), there.sum(0, dtype=torch.float32)
    total = rows.sum().clamp_min(1)
    rows, columns = rows + _EMPTY_ROW * total / len(rows), columns + _EMPTY_COLUMN * total / len(columns)
    empty = math.log2(max(1 - float(total) / there.numel(), 1e-3))
    return (total.log2() + empty - rows.log2())[:, None] - columns.log2()[None]


def _magnitudes(counts: Tensor) -> Tensor:
    """Bits of the magnitudes 1, 2 … with a sign, which have been seen so often."""
    seen = counts + torch.arange(1, len(counts) + 1, device=counts.device).square().reciprocal()
    # A larger magnitude never costs less: what the gradient follows must lead to zero.
    return torch.cummax((seen.sum() / seen).log2() + 1, 0).values
