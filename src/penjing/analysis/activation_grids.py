"""Grids of activations from what samples show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from penjing.analysis.placement import Quantizer
from penjing.analysis.weight_grids import Scales, power_of_two
from penjing.errors import DataError
from penjing.tensors import grids
from penjing.tensors.grids import Grid, Ranges
from penjing.tensors.observers import Observer


def activation_grids(
    module: fx.GraphModule,
    quantizers: Sequence[Quantizer],
    batches: Iterable[tuple[Tensor, ...]],
    *,
    dtype: str,
    ranges: Ranges,
    scales: Scales = "float",
) -> dict[int, Grid]:
    """Runs flat `batches` through a float graph and makes a grid of each class of values that share one, by its number.

    Raises DataError when there are no samples or they give NaN or infinite values.
    """
    observers = {q.value: Observer(histogram=ranges != "minmax") for q in quantizers}
    seen = 0
    watcher = _Watcher(module, observers)
    with torch.no_grad():
        for flat in batches:
            watcher.run(*flat)
            seen += len(flat[0])
    if seen == 0:
        raise DataError("the data holds no samples", hint="Quantize looks at the first samples of data")
    merged: dict[int, Observer] = {}
    for q in quantizers:
        observer = observers[q.value]
        if observer.broken:
            raise DataError(
                f"{observer.broken} values at '{q.value}' are NaN or infinite on these samples",
                hint="check the samples and the network's outputs before quantizing",
            )
        if observer.count == 0:
            raise DataError(f"no value was seen at '{q.value}'", hint="the samples must not be empty")
        merged.setdefault(q.grid, Observer(histogram=ranges != "minmax")).merge(observer)
    return {number: _grid(observer, dtype, ranges, scales) for number, observer in merged.items()}


def _grid(observer: Observer, dtype: str, ranges: Ranges, scales: Scales) -> Grid:
    low, high = grids.limits(dtype)
    covered = observer.range(ranges, high - low + 1)
    grid = grids.affine_grid(torch.tensor(covered[0]), torch.tensor(covered[1]), low, high)
    return power_of_two(grid) if scales == "power-of-two" else grid


class _Watcher(fx.Interpreter):
    """Runs a graph and shows chosen values to their observers."""

    def __init__(self, module: fx.GraphModule, observers: Mapping[str, Observer]) -> None:
        super().__init__(module)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.observers and isinstance(value, Tensor):
            self.observers[n.name].update(value)
        return value
