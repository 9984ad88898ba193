"""Weights whose products fit into the 16 bits that x86 without VNNI adds them in.

Without VNNI instructions, kernels multiply unsigned activations (at most 255) by signed weights and add two
neighbouring products in int16 (vpmaddubsw): 255 · 128 ≤ 32767 fits, 255 · 129 does not. Only neighbours along the sum
meet. Which those are was probed on both runtimes with an output channel for each pair of weights, all others zero
(AVX2, OpenVINO 2026.4 and ONNX Runtime 1.31; plain, strided, pointwise, grouped and transposed convolutions, products;
tests/runtimes/test_neighbours.py looks again):

- oneDNN's blocked kernels: input channels (2j, 2j+1) at one tap;
- ONNX Runtime, and oneDNN where it multiplies matrices: elements (2k, 2k+1) in the order (tap, input channel), the
  same pairs when the number of input channels is even;
- oneDNN's product of matrices, for 256 < K < 512: the same from 0 up to ⌈K/2⌉ and from there on, as it halves the sum.

Depthwise convolutions with one filter a channel have kernels of their own that do not saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.tensors.grids import Grid, dequantize, quantize

#: What two neighbouring integers of one sign may add up to.
LIMIT = 128

# Scales that are tried, from that of the grid given (0) to the one that makes every pair safe alone (1).
_FRACTIONS = tuple(i / 12 for i in range(13))


def may_saturate(codes: Tensor, axis: int) -> bool:
    """Whether two neighbouring products of uint8 activations with these integers can leave 16 bits.

    `codes` is the weight of a product or convolution, `axis` its output channels; the next axis left holds the input
    channels (of one group).
    """
    rows, inner = _rows(codes.to(torch.int32), axis)
    return any(bool((rows[:, pairs].sum(-1).abs() > LIMIT).any()) for pairs in _neighbours(inner, rows.shape[1]))


def without_saturation(x: Tensor, grid: Grid, axis: int, *, keep_scale: bool = False) -> tuple[Grid, Tensor]:
    """(a grid, values on it) close to `x` with no two neighbouring integers that add to more than 128 in magnitude.

    `grid` is symmetric about 0 with limits in ±127, one scale or one for each index of `axis`, the output channels.
    Pairs that are too large are moved to the nearest point that is not; each scale is the one, between that of `grid`
    and the one that no pair exceeds, that leaves the least squared error (with `keep_scale` that of `grid`). Zeros stay
    zero.
    """
    rows, inner = _rows(x.detach().to(torch.float32), axis)
    pairs = _neighbours(inner, rows.shape[1])
    low = grid.scale.reshape(-1, 1)
    held = rows.clamp(-low * grid.quant_max, low * grid.quant_max)  # what lies beyond is clipped in any case
    sums = [held[:, p].sum(-1).abs().amax(1, keepdim=True) for p in pairs if len(p)]
    high = torch.stack(sums).amax(0) / LIMIT if sums else low
    high = torch.maximum(high.amax() if grid.axis is None else high, low)
    large = _large(held, low, pairs)
    best, chosen, scale = torch.full_like(low, torch.inf), torch.zeros_like(rows), low
    for fraction in _FRACTIONS[:1] if keep_scale else _FRACTIONS:
        tried = low * (high / low) ** fraction
        codes = _separated(rows, tried, large, grid)
        error = (codes * tried - rows).square().sum(1, keepdim=True)
        error = error.sum().view(1, 1) if grid.axis is None else error
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        chosen = torch.where(better, codes, chosen)
    found = Grid(scale.view(grid.scale.shape), grid.zero_point, grid.quant_min, grid.quant_max, grid.axis)
    codes = chosen.view(x.movedim(axis, 0).shape).movedim(0, axis)
    return found, dequantize(codes, found)


def _large(held: Tensor, low: Tensor, pairs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each list those pairs that may be too large with scales `low` or coarser: (rows, positions (n, 2))."""
    found = []
    for pair in pairs:
        row, number = (held[:, pair].sum(-1).abs() > (LIMIT - 1) * low).nonzero(as_tuple=True)  # rounding adds up to 1
        found.append((row, pair[number]))
    return found


def _separated(rows: Tensor, scale: Tensor, large: list[tuple[Tensor, Tensor]], grid: Grid) -> Tensor:
    """The integers of `rows`, as float32, with the pairs that are too large moved to the nearest that are not."""
    middle = torch.zeros(len(scale), dtype=torch.int64)
    codes = quantize(rows, Grid(scale.flatten(), middle, grid.quant_min, grid.quant_max, 0), torch.float32)
    scales = scale.expand(len(rows), 1)
    for row, pair in large:  # moving a pair only makes it smaller: what is done stays done
        at = (row[:, None], pair)
        both = codes[at]
        aim = torch.minimum((rows[at] / scales[row]).abs(), both.abs() + 0.5)
        first = (LIMIT / 2 + (aim[:, 0] - aim[:, 1]) / 2).round().clamp(LIMIT - grid.quant_max, grid.quant_max)
        fitting = torch.stack([first, LIMIT - first], -1) * both.sign()
        codes[at] = torch.where(both.sum(-1, keepdim=True).abs() > LIMIT, fitting, both)
    return codes


def _neighbours(inner: int, count: int) -> list[Tensor]:
    """Pairs of positions that kernels add, (pairs, 2) each, in rows of (input channels · taps); disjoint in each."""
    index = torch.arange(count).view(inner, -1)
    blocked = torch.stack([index[: inner - inner % 2 : 2], index[1::2]], -1).view(-1, 2)
    along, half = index.T.flatten(), -(-count // 2)
    found = [blocked]
    if inner % 2:
        found.append(_in_twos(along))
    if 256 < count < 512 and half % 2:
        found.append(_in_twos(along[half:]))
    return found


def _in_twos(index: Tensor) -> Tensor:
    return index[: len(index) - len(index) % 2].view(-1, 2)


def _rows(x: Tensor, axis: int) -> tuple[Tensor, int]:
    """(output channels, input channels · taps) and the number of input channels."""
    moved = x.movedim(axis, 0)
    return moved.reshape(len(moved), -1), moved.shape[1]
