"""Grids as Edits of a network."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx

from penjing.analysis.operators import PRODUCTS, operator_name
from penjing.analysis.placement import Placement, Quantizer
from penjing.network.edits import Edit, QuantizeTensor
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


def dynamic_edits(graph: fx.Graph, placement: Placement, weights: Collection[str]) -> list[Edit]:
    """Grids found in every run for what linear layers read whose weights are among `weights`."""
    linear = {x.node for x in placement.layers if x.kind == "linear" and x.parameter in weights}
    readers: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.name in linear:
            source = node.args[PRODUCTS[operator_name(node)][0]]
            readers.setdefault(source.name, []).append(node.name)
    return [
        QuantizeTensor(tensor=value, scale=1.0, zero_point=0, dtype="uint8", users=tuple(users), dynamic=True)
        for value, users in readers.items()
    ]


def _stored(grid: Grid) -> str:
    return "int16" if grid.quant_max > 127 else "int8"
