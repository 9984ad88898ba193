"""Grids as Edits of a network."""

from __future__ import annotations

from torch import Tensor

from penjing.analysis.placement import Quantizer
from penjing.network.edits import QuantizeTensor
from penjing.tensors.grids import Grid


def weight_edit(name: str, grid: Grid, levels: Tensor | None = None) -> QuantizeTensor:
    """Stores a weight as the integers of its grid, or as codes of `levels` that its scales multiply."""
    return QuantizeTensor(
        tensor=name,
        scale=grid.scale,
        zero_point=grid.zero_point,
        dtype=_stored(grid),
        axis=grid.axis,
        group=grid.group,
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        levels=levels,
    )


def activation_edit(quantizer: Quantizer, grid: Grid) -> QuantizeTensor:
    """Puts a value on its grid."""
    return QuantizeTensor(
        tensor=quantizer.value,
        scale=float(grid.scale),
        zero_point=int(grid.zero_point),
        dtype=_stored(grid),
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        users=quantizer.users,
    )


def _stored(grid: Grid) -> str:
    return "int16" if grid.quant_max > 127 else "int8"
