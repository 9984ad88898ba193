"""The grid of a weight by the name of its type, and the weight's values on it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from penjing.tensors import grids
from penjing.tensors.grids import Grid, Ranges

#: The types a weight can be stored as. "ternary": codes -1, 0 and 1; "binary": -1 and 1.
WEIGHT_TYPES = ("int16", "int8", "int6", "int4", "int3", "int2", "ternary", "binary")
Scales = Literal["float", "power-of-two"]
SCALES: tuple[Scales, ...] = ("float", "power-of-two")
_GROUP = re.compile(r"group:([1-9][0-9]*)")


def granularity(text: str) -> tuple[bool, int] | None:
    """(a scale for each channel, values a group) of "channel", "tensor" or "group:128"; None for another text."""
    if text in ("channel", "tensor"):
        return text == "channel", 0
    found = _GROUP.fullmatch(text)
    return (True, int(found[1])) if found else None


def limits(dtype: str, symmetric: bool) -> tuple[int, int]:
    """The smallest and largest code of a weight type.

    Symmetric types of 8 and 16 bits leave out the lowest code, which kernels ask for; of the few codes of narrower ones
    none is left out.
    """
    if dtype in ("ternary", "binary"):
        return -1, 1
    return grids.limits(dtype, narrow=symmetric and dtype in ("int8", "int16"))


def weight_grid(
    weight: Tensor,
    dtype: str,
    *,
    axis: int | None = None,
    group: int = 0,
    symmetric: bool = True,
    ranges: Ranges = "minmax",
    scales: Scales = "float",
) -> Grid:
    """The grid for a weight of one of WEIGHT_TYPES: one scale, one an index of `axis`, or one a `group` of its rows.

    Integers cover what `ranges` says. Ternary scales are those of least squared error (Li and Liu, "Ternary weight
    networks", 2016, with the exact threshold instead of 0.7 times the mean magnitude); binary ones are the mean
    magnitude (Rastegari et al., "XNOR-Net", 2016); both leave weights of exactly zero out, and are symmetric. Scales
    that are to be powers of two are rounded up, so that no range shrinks. Raises ValueError when `weight` is empty or
    holds NaN or infinities.
    """
    low, high = limits(dtype, symmetric)
    if group and group >= weight[0].numel():
        group, axis = 0, 0  # one group a row is one scale a row
    if dtype in ("ternary", "binary"):
        grid = grids.tensor_grid(weight, low, high, axis=axis, group=group)  # checks, and gives the shape of the scales
        scale = _ternary_scale if dtype == "ternary" else _binary_scale
        found = scale(grids.grid_rows(weight, axis, group)[0]).view(grid.scale.shape)
        grid = replace(grid, scale=torch.where(found > 0.0, found, torch.ones_like(found)))
    else:
        grid = grids.tensor_grid(weight, low, high, axis=axis, group=group, symmetric=symmetric, ranges=ranges)
    return power_of_two(grid) if scales == "power-of-two" else grid


def on_grid(weight: Tensor, grid: Grid, dtype: str) -> Tensor:
    """The values of `weight` on its grid: the nearest; for binary ones the sign, where zeros stay zeros."""
    if dtype != "binary":
        return grids.fake_quantize(weight, grid)
    return grids.dequantize(weight.sign().to(torch.int8), grid)


def made_ternary(values: Tensor, dtype: str) -> str:
    """What the zeros among "binary" weights, which pruning leaves, make of them, in words; "" without."""
    zeros = int((values == 0).sum()) if dtype == "binary" else 0
    return f"its {zeros} zeros stay, so that it is stored as ternary (-1, 0, 1)" if zeros else ""


def power_of_two(grid: Grid) -> Grid:
    """The grid with every scale rounded up to a power of two; it covers at least the same range."""
    mantissa, exponent = torch.frexp(grid.scale)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
    low = (grid.quant_min - grid.zero_point) * grid.scale.double()
    middle = (grid.quant_min - torch.round(low / scale.double())).clamp(grid.quant_min, grid.quant_max)
    centred = grid.zero_point == (grid.quant_min + grid.quant_max + 1) // 2
    zero_point = torch.where(centred, grid.zero_point, middle.to(torch.int64))
    return replace(grid, scale=scale, zero_point=zero_point)


def shifts(grid: Grid) -> str:
    """The scales of a grid of powers of two in words: `shift 7`, `shifts 5 to 9` (scale 2^-7, …)."""
    exponents = torch.log2(grid.scale).round().to(torch.int64)
    most, least = -int(exponents.min()), -int(exponents.max())
    return f"shift {least}" if least == most else f"shifts {least} to {most}"


def _ternary_scale(rows: Tensor) -> Tensor:
    """The scale of least squared error of each row: the mean of the k largest magnitudes, for the best k."""
    total = rows.abs().sort(1, descending=True).values.double().cumsum(1)
    count = torch.arange(1, rows.shape[1] + 1)
    # ‖w - s·t‖² with the k largest in t is ‖w‖² - (their sum)² / k at s = their sum / k.
    best = (total.square() / count).argmax(1, keepdim=True)
    return (total.gather(1, best) / (best + 1)).squeeze(1).to(torch.float32)


def _binary_scale(rows: Tensor) -> Tensor:
    """The mean magnitude of the weights of each row that are not exactly zero."""
    return rows.abs().sum(1) / (rows != 0.0).sum(1).clamp(min=1)
