"""What weights in training will cost in a package, in bits, with a gradient: the rate term of low-entropy training.

Oktay et al. 2020, "Scalable model compression by entropy penalized reparameterization", learn a density for every layer
and count bits under it; here the density is the one that the coder for sparse grids will see (sparse_coding.py), taken
anew from the rounded weights in each step: shares of rows and columns, and a histogram of magnitudes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: What an empty row or column counts as, of the mean one: it may come back, at a price.
_EMPTY_ROW, _EMPTY_COLUMN = 0.02, 0.05


def rate(place: Tensor, most: int) -> Tensor:
    """About the bits that weights take, `place` (any shape, first axis outputs) being weights divided by their step.

    Between whole numbers the cost runs along straight lines, so that its slope is what the next whole number costs more:
    towards zero everywhere, steepest next to it and where rows and columns are nearly empty. Magnitudes go up to `most`.
    """
    size = (place.reshape(len(place), -1) if place.ndim > 1 else place.reshape(1, -1)).abs()
    first, further = _costs(size.detach().round().clamp_(max=most), most)
    bits = (first * size.clamp(max=1.0)).sum()
    large = size[size > 1].clamp(max=most)
    if large.numel():
        below = large.detach().floor().clamp_(max=most - 1).long()
        steps = further.diff()[below - 1]
        bits = bits + (further[below - 1] - further[0] + steps * (large - below)).sum()
    return bits


def _costs(codes: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Bits between a zero and a one at each place of a matrix, and bits of each magnitude (1…most) with its sign."""
    there = codes > 0
    total = there.sum().clamp_min(1).to(codes.dtype)
    rows = there.sum(1, dtype=codes.dtype) + _EMPTY_ROW * total / codes.shape[0]
    columns = there.sum(0, dtype=codes.dtype) + _EMPTY_COLUMN * total / codes.shape[1]
    magnitudes = torch.arange(1, most + 1, dtype=codes.dtype, device=codes.device)
    counts = magnitudes.square().reciprocal() + torch.bincount(codes[there].long(), minlength=most + 1)[1:]
    # A larger magnitude never costs less: what the gradient follows must lead to zero.
    further = torch.cummax((counts.sum() / counts).log2() + 1, 0).values
    empty = math.log2(max(1 - float(total) / codes.numel(), 1e-3))
    first = total.log2() - rows.log2()[:, None] - columns.log2()[None] + (empty + further[0])
    return first.clamp_min_(0.0), further
