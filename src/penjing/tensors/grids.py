"""Affine integer grids: choosing their ranges, putting tensors on them and reading them back.

A grid is `scale * (q - zero_point)` for integers q in `quant_min..quant_max`. The rounding is that of PyTorch's own
`quantized_decomposed` operators (multiply by the reciprocal of the scale, round half to even, clamp), so that a tensor
quantized here equals the one the graph's own operators produce, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Ranges = Literal["minmax", "mse", "percentile", "entropy"]
RANGES: tuple[Ranges, ...] = ("minmax", "mse", "percentile", "entropy")

#: The scale of what is all zero: fine enough for biases, which runtimes round to a weight's scale times an input's.
_EMPTY = 2.0**-12
# Below this a scale would overflow when inverted in float32.
_TINY = float(torch.finfo(torch.float32).tiny) * 2**10

# Half of this fraction is cut off at each end by ranges="percentile".
TAIL = 1e-4


@dataclass(frozen=True)
class Grid:
    """An affine grid.

    Shapes: `scale` (float32) and `zero_point` (int64) are scalars when `axis` is None, else one value for each index of
    that axis of the tensor; with `group` > 0 they have the shape (channels, groups) and `axis` is 0: each row of the
    tensor, flattened, is cut into groups of that many values (the last one may be shorter).
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None = None
    group: int = 0

    @property
    def granularity(self) -> str:
        """What has a scale of its own, in words."""
        return f"group of {self.group}" if self.group else "channel" if self.axis is not None else "tensor"


def limits(dtype: str, *, narrow: bool = False) -> tuple[int, int]:
    """The smallest and largest integer of "int8", "uint4", "int2" …; `narrow` drops the lowest of a signed type, which
    makes it symmetric about zero."""
    signed = dtype.startswith("int")
    digits = dtype.removeprefix("u").removeprefix("int")
    if not digits.isdigit() or not 1 <= int(digits) <= 32:
        raise ValueError(f"{dtype!r} is not an integer type")
    bits = int(digits)
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1


def affine_grid(
    low: Tensor,
    high: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    group: int = 0,
) -> Grid:
    """The grid that covers `low..high` (elementwise, same shape) and holds zero exactly.

    Symmetric grids have their zero point at the middle of the integers (0 for signed types) and cover the larger of the
    two magnitudes. An empty range (all zero) gives the scale `_EMPTY`.
    """
    low, high = low.to(torch.float64).clamp(max=0.0), high.to(torch.float64).clamp(min=0.0)
    if symmetric:
        middle = (quant_min + quant_max + 1) // 2
        # On a full signed type the negative side has one step more: only that side may use it.
        scale = torch.maximum(-low / (middle - quant_min), high / (quant_max - middle))
        zero_point = torch.full_like(scale, float(middle))
    else:
        scale = (high - low) / (quant_max - quant_min)
        zero_point = torch.zeros_like(scale)
    empty = scale < _TINY
    scale = torch.where(empty, _EMPTY, scale).to(torch.float32)
    if not symmetric:
        zero_point = (quant_min - torch.round(low / scale.double())).clamp(quant_min, quant_max)
    return Grid(scale, zero_point.to(torch.int64), quant_min, quant_max, axis, group)


def quantize(x: Tensor, grid: Grid, dtype: torch.dtype = torch.int8) -> Tensor:
    """The integers of `x` on `grid`, in `x`'s shape: nearest, half to even, clamped to the grid's limits."""
    scale, zero_point = _spread(x, grid)
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, grid.quant_min, grid.quant_max).to(dtype)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """The float32 values of integers on `grid`."""
    scale, zero_point = _spread(q, grid)
    return (q.to(torch.float32) - zero_point) * scale


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """`x` moved to the nearest points of `grid`."""
    if grid.axis is None and not grid.group and x.dtype == torch.float32 and grid.scale.numel() == 1:
        zero = int(grid.zero_point)
        if grid.quant_min <= zero <= grid.quant_max:
            if x.requires_grad and torch.is_grad_enabled():
                return torch.fake_quantize_per_tensor_affine(x, float(grid.scale), zero, grid.quant_min, grid.quant_max)
            scale = float(grid.scale)  # in place: new memory costs more than the sums
            whole = (x * (1.0 / grid.scale).reshape(())).round_().clamp_(grid.quant_min - zero, grid.quant_max - zero)
            return whole.mul_(scale)
    return dequantize(quantize(x, grid, torch.int32), grid)


def sqnr(x: Tensor, y: Tensor) -> float:
    """Signal to quantization noise ratio of `y` standing in for `x`, in dB (inf when equal)."""
    signal, noise = _norm(x), _norm(x - y)
    if noise == 0.0:
        return math.inf
    return 20.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _norm(x: Tensor) -> float:
    fast = float(torch.linalg.vector_norm(x))
    if 1e-15 < fast < 1e15:
        return fast
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))  # squares may leave the range of x's own type


def tensor_grid(
    x: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
    group: int = 0,
    symmetric: bool = True,
    ranges: Ranges = "minmax",
) -> Grid:
    """A grid for a tensor that is wholly known (a weight): per tensor, per index of `axis`, or per `group` of each row.

    Raises ValueError when `x` is empty or holds NaN or infinities.
    """
    if x.numel() == 0:
        raise ValueError("the tensor is empty")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the tensor holds NaN or infinite values")
    rows, count = grid_rows(x, axis, group)
    low, high = rows.amin(1), rows.amax(1)
    if ranges == "mse":
        low, high = _by_error(rows, low, high, quant_min, quant_max, symmetric)
    elif ranges == "percentile":
        low, high = _by_quantile(rows, low, high)
    elif ranges == "entropy":
        low, high = _by_entropy(rows, low, high, quant_max - quant_min + 1, symmetric)
    if axis is None and not group:
        low, high = low[0], high[0]
    elif group:
        low, high = low.view(-1, count), high.view(-1, count)
    return affine_grid(low, high, quant_min, quant_max, symmetric=symmetric, axis=0 if group else axis, group=group)


def grid_rows(x: Tensor, axis: int | None, group: int) -> tuple[Tensor, int]:
    """(rows that get a grid each, shape (grids, values), short groups filled with zeros; groups per channel)"""
    x = x.detach().to(torch.float32)
    if group:
        flat = x.reshape(x.shape[0], -1)
        count = -(-flat.shape[1] // group)
        # Zeros belong to every grid, so padding with them changes no range.
        flat = torch.nn.functional.pad(flat, (0, count * group - flat.shape[1]))
        return flat.reshape(-1, group), count
    if axis is None:
        return x.reshape(1, -1), 1
    return x.movedim(axis, 0).reshape(x.shape[axis], -1), 1


def _by_error(
    rows: Tensor, low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Shrinks each range to the fraction with the least squared error (a search over 45 fractions from 1 to 0.12)."""
    best = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    for step in range(45):
        fraction = 1.0 - 0.02 * step
        grid = affine_grid(low * fraction, high * fraction, quant_min, quant_max, symmetric=symmetric, axis=0)
        error = (fake_quantize(rows, grid) - rows).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * fraction, best_low)
        best_high = torch.where(better, high * fraction, best_high)
    return best_low, best_high


def _by_quantile(rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    ordered = rows.sort(1).values
    cut = int(TAIL / 2 * rows.shape[1])
    return torch.maximum(low, ordered[:, cut]), torch.minimum(high, ordered[:, rows.shape[1] - 1 - cut])


def _by_entropy(rows: Tensor, low: Tensor, high: Tensor, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    lows, highs = low.clone(), high.clone()
    for i, row in enumerate(rows):
        edge = float(row.abs().amax())
        if edge == 0.0 or row.numel() < levels:
            continue  # with fewer values than levels every histogram is as good as any other
        one_sided = bool(low[i] >= 0.0) or bool(high[i] <= 0.0)
        # A one-sided range uses all its levels on one side, unless the grid is symmetric.
        steps = levels if one_sided and not symmetric else levels // 2
        counts = torch.histc(row.abs(), bins=2048, min=0.0, max=edge)
        clip = entropy_cut(counts, steps) / 2048 * edge
        lows[i], highs[i] = max(float(low[i]), -clip), min(float(high[i]), clip)
    return lows, highs


def entropy_cut(counts: Tensor, levels: int) -> int:
    """How many leading bins of a histogram of magnitudes to keep, so that `levels` levels lose the least information.

    The bin next to zero counts no more than its neighbour: zero is on every grid, however coarse. Minimises the
    Kullback-Leibler divergence between the clipped histogram and its version with `levels` levels
    (Migacz, "8-bit inference with TensorRT", 2017).
    """
    counts = counts.double().clone()
    counts[0] = torch.minimum(counts[0], counts[1])
    used = int(counts.nonzero().max()) + 1 if bool(counts.any()) else len(counts)
    if used <= levels:
        return used
    cumulative = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    filled = torch.cat([counts.new_zeros(1), (counts > 0).double().cumsum(0)])
    total = float(cumulative[-1])
    best, kept = math.inf, used
    for size in sorted({*range(levels, used, max(1, (used - levels) // 128)), used}):
        reference = counts[:size].clone()
        reference[-1] += total - cumulative[size]  # clipped values land in the last bin
        edges = torch.linspace(0, size, levels + 1).round().long()
        mass, support = cumulative[edges].diff(), filled[edges].diff()
        level = torch.bucketize(torch.arange(size), edges[1:], right=True)
        model = torch.where(counts[:size] > 0, (mass / support.clamp(min=1.0))[level], 0.0)
        p, q = reference / total, model / model.sum().clamp(min=1e-300)
        seen = p > 0
        divergence = float((p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum())
        if divergence < best:
            best, kept = divergence, size
    return kept


def _spread(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point shaped to broadcast against `x`."""
    if grid.group:
        inner = x[0].numel()
        scale = grid.scale.repeat_interleave(grid.group, 1)[:, :inner].reshape(x.shape)
        return scale, grid.zero_point.repeat_interleave(grid.group, 1)[:, :inner].reshape(x.shape)
    if grid.axis is None:
        return grid.scale, grid.zero_point
    shape = [1] * x.ndim
    shape[grid.axis] = -1
    return grid.scale.view(shape), grid.zero_point.view(shape)
