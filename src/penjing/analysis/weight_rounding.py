"""Weights on their grids by what they do to the outputs: one front for the ways of rounding that look at samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from penjing.analysis.fake_quantize import WeightGrid
from penjing.analysis.learned_rounding import learn_rounding
from penjing.analysis.placement import Placement
from penjing.analysis.quantized_reconstruct import round_layers
from penjing.analysis.weight_grids import limits, power_of_two
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.tensors.gptq import GridRule
from penjing.tensors.grids import Grid, Ranges, fake_quantize

Rounding = Literal["nearest", "gptq", "adaround", "brecq"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "gptq", "adaround", "brecq")
#: Types whose neighbours are so near that looking at outputs gains nothing, and whose headroom must stay.
_WIDE = ("int16", "int8")


@dataclass(frozen=True)
class RoundedWeight:
    """A weight's type (one of `weight_grids.WEIGHT_TYPES`), its grid, and its values on it: not always the nearest.
    With `levels`, these and not integers are what the scales multiply."""

    dtype: str
    grid: Grid
    values: Tensor
    levels: Tensor | None = None

    def times(self, gain: Tensor) -> RoundedWeight:
        """With the same codes and the scales of each row (dimension 0) multiplied by its `gain`."""
        rows = self.values * gain.view(-1, *[1] * (self.values.ndim - 1))
        return replace(self, grid=replace(self.grid, scale=self.grid.scale * gain), values=rows)


@dataclass
class RoundedNetwork:
    """All `weights` by name, activation grids by number, biases that changed, the weights that were `rounded` by their
    outputs, and those of them whose biases are right already (`fitted`)."""

    weights: dict[str, RoundedWeight]
    activations: dict[int, Grid]
    biases: dict[str, Tensor] = field(default_factory=dict)
    rounded: frozenset[str] = frozenset()
    fitted: frozenset[str] = frozenset()


def own_scales(placement: Placement, made: RoundedNetwork) -> dict[str, str]:
    """Layers whose output channels have scales that are theirs alone, and that nothing has fitted, with the weights."""
    read = Counter(layer.parameter for layer in placement.layers)
    found = {}
    for layer in placement.layers:
        name = layer.parameter
        if name in made.weights and layer.integer and read[name] == 1 and name not in made.fitted and layer.axis == 0:
            grid = made.weights[name].grid
            if grid.axis == 0 and not grid.group:
                found[layer.node] = name
    return found


@dataclass(frozen=True)
class _ShiftRule(GridRule):
    """A grid whose scales are powers of two."""

    def grid(self, rows: Tensor) -> Grid:
        return power_of_two(super().grid(rows))


def round_by_outputs(
    how: Rounding,
    network: Network,
    weights: Mapping[str, RoundedWeight],
    placement: Placement,
    activations: Mapping[int, Grid],
    batches: Sequence[dict[str, Tensor]],
    *,
    ranges: Ranges = "mse",
    symmetric: bool = True,
    shifts: bool = False,
    steps: int = 200,
    seed: int = 0,
    progress: Progress = SILENT,
) -> RoundedNetwork:
    """`weights` of a float `network` (batch norms folded), rounded to nearest, rounded anew by `how`.

    "gptq": layer by layer on the running quantized network (`quantized_reconstruct`), which chooses grids anew by
    `ranges`, `symmetric` and, for scales that are powers of two, `shifts`. "adaround" and "brecq": learned, layer by
    layer or block by block, in `steps` steps each, with the grids given (`learned_rounding`). `batches` are bound
    inputs; `activations` the grids of `placement`'s quantizers, by number.
    """
    if how == "gptq":
        return _by_gptq(network, weights, placement, activations, list(batches), ranges, symmetric, shifts, progress)
    others = {n: w.values for n, w in weights.items() if w.dtype in _WIDE}
    started = {n: WeightGrid(w.grid, w.dtype == "binary") for n, w in weights.items() if n not in others}
    found = learn_rounding(
        network,
        started,
        placement,
        activations,
        batches,
        others=others,
        how=how,
        steps=steps,
        seed=seed,
        progress=progress,
    )
    made = {n: replace(weights[n], grid=g.grid, values=v) for n, (v, g) in found.weights.items()}
    return RoundedNetwork(
        {**weights, **made}, {**activations, **found.activations}, found.biases, rounded=frozenset(made)
    )


def rule_of(
    dtype: str, grid: Grid, *, ranges: Ranges = "mse", symmetric: bool = True, shifts: bool = False
) -> GridRule | None:
    """How "gptq" finds the grid of a weight that would have `grid` if it were rounded to nearest; None where that is
    all there is: wide types, binary ones, output channels that do not come first."""
    if dtype in (*_WIDE, "binary") or grid.axis not in (0, None):
        return None
    # Ranges by the outputs' error find scales of their own: powers of two stay what they are with the whole range.
    kind, ranges = (_ShiftRule, "minmax") if shifts else (GridRule, ranges)
    low, high = limits(dtype, symmetric)
    axis: Literal[0] | None = None if grid.axis is None else 0
    return kind(low, high, axis=axis, group=grid.group, symmetric=symmetric, ranges=ranges)


def _by_gptq(
    network: Network,
    weights: Mapping[str, RoundedWeight],
    placement: Placement,
    activations: Mapping[int, Grid],
    batches: list[dict[str, Tensor]],
    ranges: Ranges,
    symmetric: bool,
    shifts: bool,
    progress: Progress,
) -> RoundedNetwork:
    rules, others = {}, {}
    for name, weight in weights.items():
        rule = rule_of(weight.dtype, weight.grid, ranges=ranges, symmetric=symmetric, shifts=shifts)
        if rule is None:
            others[name] = weight.values
        else:
            rules[name] = rule
    quantizers = [(q.value, q.users, activations[q.grid]) for q in placement.quantizers if q.grid in activations]
    found = round_layers(network, rules, batches, quantizers=quantizers, others=others, progress=progress)
    made = {
        n: replace(weights[n], grid=found.grids[n], values=v.to(weights[n].values.dtype))
        for n, v in found.values.items()
    }
    rounded = frozenset(made) - frozenset(found.nearest)
    return RoundedNetwork({**weights, **made}, dict(activations), found.biases, rounded, frozenset(found.errors))


def moved(tensors: Mapping[str, Tensor], weights: Mapping[str, RoundedWeight]) -> dict[str, Tensor]:
    """The weights that stand elsewhere on their grid than at the point nearest to what they are."""
    return {
        name: weight.values
        for name, weight in weights.items()
        if not torch.equal(fake_quantize(tensors[name].detach(), weight.grid), weight.values)
    }
