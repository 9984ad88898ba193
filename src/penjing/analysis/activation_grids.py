"""Grids for activations: how wide each is to be, and what range samples give it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from penjing.analysis.half_run import HalfRun
from penjing.analysis.placement import Placement
from penjing.analysis.weight_grids import Scales, power_of_two
from penjing.errors import DataError
from penjing.network.network import Network
from penjing.tensors import grids
from penjing.tensors.grids import Grid, Ranges
from penjing.tensors.observers import Observer


def activation_types(placement: Placement, dtype: str, *, edges: str, ends: Collection[str]) -> dict[int, str]:
    """The integer type of each activation grid, by number: `dtype` where it feeds a layer, `edges` in front of the
    layers (by node) in `ends`.

    What only additions, pools and outputs read stays at 8 bits at least: they gain nothing by narrow numbers, and what
    a residual sum loses is lost for all layers behind it.
    """
    layers = {source for sources in placement.sources.values() for source in sources}
    outer = {source for node in ends for source in placement.sources.get(node, ())}
    wide = dtype if grids.limits(dtype)[1] > 127 else "int8"
    chosen: dict[int, str] = {}
    for q in placement.quantizers:
        own = edges if q.value in outer else dtype if q.value in layers else wide
        held = chosen.get(q.grid, own)
        chosen[q.grid] = max(own, held, key=lambda t: grids.limits(t)[1])  # a shared grid suits all who share it
    return chosen


def activation_grids(
    network: Network,
    placement: Placement,
    types: Mapping[int, str],
    batches: Iterable[Any],
    *,
    ranges: Ranges = "mse",
    scales: Scales = "float",
) -> dict[int, Grid]:
    """An asymmetric grid for each number, of the type in `types`, with the range of what `batches` (a network's
    inputs) make there.

    Raises DataError when there are no samples, or values that are NaN or infinite.
    """
    seen = {q.value: Observer(histogram=ranges != "minmax") for q in placement.quantizers}
    # Ends of ranges are as right in bfloat16 as grids of 8 bits need them.
    watcher = _Watcher(network.graph_module, seen, half=all(grids.limits(t)[1] <= 127 for t in types.values()))
    empty = True
    with torch.no_grad():
        for inputs in batches:
            watcher.run(*network.bind(inputs).values())
            empty = False
    if empty:
        raise DataError("the data holds no samples", hint="grids of activations want some, without labels")
    merged: dict[int, Observer] = {}
    for q in placement.quantizers:
        observer = seen[q.value]
        if observer.broken:
            raise DataError(
                f"{observer.broken} values at '{q.value}' are NaN or infinite on these samples",
                hint="check the samples and the network's outputs before quantizing",
            )
        if observer.count == 0:
            raise DataError(f"no value was seen at '{q.value}'", hint="the samples must not be empty")
        merged.setdefault(q.grid, Observer(histogram=ranges != "minmax")).merge(observer)
    found = {}
    for number, observer in merged.items():
        low, high = grids.limits(types[number])
        ends = observer.range(ranges, high - low + 1)
        grid = grids.affine_grid(torch.tensor(ends[0]), torch.tensor(ends[1]), low, high)
        found[number] = power_of_two(grid) if scales == "power-of-two" else grid
    return found


class _Watcher(HalfRun):
    """Runs a graph and shows chosen values to their observers."""

    def __init__(self, module: fx.GraphModule, observers: Mapping[str, Observer], *, half: bool) -> None:
        super().__init__(module, half=half)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.observers and isinstance(value, Tensor):
            self.observers[n.name].update(value)
        return value
