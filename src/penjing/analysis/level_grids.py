"""Weights on levels that are not evenly spaced but cheap to multiply with: powers of two, and sums of them."""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.errors import RecipeError
from penjing.tensors import codebooks
from penjing.tensors.grids import Grid, grid_rows

#: How the levels of a weight are spaced; all but "uniform" have tables (`penjing.tensors.codebooks`).
LEVELS = ("uniform", "additive-powers-of-two", "power-of-two")
_TABLES = {"additive-powers-of-two": codebooks.additive_powers_of_two, "power-of-two": codebooks.powers_of_two}
#: The types whose bits such levels may have.
LEVEL_TYPES = ("int8", "int6", "int4", "int3", "int2")


def check_levels(spacing: str, weights: str, granularity: str, *, plain: bool = True, step: str = "Quantize") -> None:
    """Raises RecipeError for fields of a `step` that uneven levels cannot follow; `plain`: no others say a grid."""
    if spacing == "uniform":
        return
    if weights not in LEVEL_TYPES:
        raise RecipeError(
            f"{step}.levels {spacing!r} are for weights of 2 to 8 bits, got {weights!r}",
            hint="for example weights='int4'",
        )
    if granularity not in ("channel", "tensor") or not plain:
        raise RecipeError(
            f"{step}.levels {spacing!r} come with a scale for each channel or tensor and no other grid",
            hint="set granularity='channel'" if plain else "leave scales and symmetric away",
        )


def level_grid(weight: Tensor, spacing: str, dtype: str, *, axis: int | None = None) -> tuple[Grid, Tensor, Tensor]:
    """(scales of least squared error, `weight` on those levels, the levels (K,) that the scales multiply).

    The scale is one, or one for each index of `axis`; `dtype`, one of LEVEL_TYPES, says how many bits a code may take,
    one of them for the sign (Miyashita et al. 2016, "Logarithmic data representation"; Li, Dong & Wang 2020, "Additive
    powers-of-two quantization"). Zero is a level. Raises ValueError when `weight` is empty or holds NaN or infinities,
    or for a type or a spacing without a table.
    """
    if spacing not in _TABLES or dtype not in LEVEL_TYPES:
        raise ValueError(f"there are no levels of {spacing} for {dtype}")
    if not weight.numel():
        raise ValueError("the tensor is empty")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the tensor holds NaN or infinite values")
    levels = _TABLES[spacing](int(dtype.removeprefix("int")))
    rows, _ = grid_rows(weight, axis, 0)
    scale = codebooks.scaled(rows, levels)
    spread = scale.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
    values = codebooks.nearest(weight.detach().float() / spread, levels) * spread
    scale = scale[0] if axis is None else scale
    zero = torch.zeros(scale.shape, dtype=torch.int64)
    return Grid(scale, zero, 0, len(levels) - 1, axis), values, levels
