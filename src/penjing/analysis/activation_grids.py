"""Grids for activations: how wide each is to be, and what range samples give it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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

#: How much of a range its ends may be off for a run in bfloat16 to be trusted.
_ALIKE = 0.05


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
    histogram = ranges != "minmax"
    seen = {q.value: Observer(histogram=histogram) for q in placement.quantizers}
    # Ends of ranges are as right in bfloat16 as grids of 8 bits need them.
    short = all(grids.limits(t)[1] <= 127 for t in types.values())
    if not _look(network, seen, batches, short=short, histogram=histogram):
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
        merged.setdefault(q.grid, Observer(histogram=histogram)).merge(observer)
    found = {}
    for number, observer in merged.items():
        low, high = grids.limits(types[number])
        ends = observer.range(ranges, high - low + 1)
        grid = grids.affine_grid(torch.tensor(ends[0]), torch.tensor(ends[1]), low, high)
        found[number] = power_of_two(grid) if scales == "power-of-two" else grid
    return found


@torch.no_grad()
def _look(network: Network, seen: dict[str, Observer], batches: Iterable[Any], *, short: bool, histogram: bool) -> int:
    """Shows all values on `batches` to `seen`, with `short` in a HalfRun, as long as that says the same as a run in
    float32: its ranges on the first batch, and that values are finite. Returns how many batches there were."""
    plain, fast = _Watcher(network.graph_module), _Watcher(network.graph_module, half=short)
    quick, count = fast.half, 0
    for count, inputs in enumerate(batches, 1):
        bound = tuple(network.bind(inputs).values())
        found = (fast if quick else plain).show(bound, seen, histogram)
        if quick and (count == 1 or any(o.broken for o in found.values())):
            exact = plain.show(bound, seen, histogram)
            quick = _alike(exact, found)
            found = found if quick else exact
        for name, observer in seen.items():
            observer.merge(found[name])
    return count


def _alike(wanted: Mapping[str, Observer], found: Mapping[str, Observer]) -> bool:
    def near(a: Observer, b: Observer) -> bool:
        off = max(abs(a.low - b.low), abs(a.high - b.high)) if a.count else 0.0
        return a.broken == b.broken and off <= _ALIKE * (max(a.high, 0.0) - min(a.low, 0.0))

    return all(near(observer, found[name]) for name, observer in wanted.items())


class _Watcher(HalfRun):
    """Runs a graph and shows chosen values to observers."""

    def __init__(self, module: fx.GraphModule, *, half: bool = False) -> None:
        super().__init__(module, half=half)
        self._observers: dict[str, Observer] = {}

    def show(self, bound: Sequence[Tensor], names: Iterable[str], histogram: bool) -> dict[str, Observer]:
        """What one batch, and nothing before it, shows of the values called `names`."""
        found = self._observers = {name: Observer(histogram=histogram) for name in names}
        self.run(*bound)
        return found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._observers and isinstance(value, Tensor):
            self._observers[n.name].update(value)
        return value
