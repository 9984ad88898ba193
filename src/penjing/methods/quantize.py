"""Quantize: weights, or weights and activations, on integer grids of 16 bits to one, after training, without labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from penjing.analysis.activation_grids import activation_grids
from penjing.analysis.level_grids import LEVELS, check_levels, level_grid
from penjing.analysis.operators import PRODUCTS, operator_name
from penjing.analysis.passes import fold_batch_norms, fold_pads
from penjing.analysis.placement import Layer, Placement, Quantizer, place
from penjing.analysis.twin import Twin
from penjing.analysis.weight_grids import SCALES, WEIGHT_TYPES, Scales, granularity, on_grid, shifts, weight_grid
from penjing.errors import DataError, InputError, RecipeError
from penjing.network.edits import Edit, QuantizeTensor, SetWeights
from penjing.network.network import Network
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.registry import did_you_mean
from penjing.tensors import grids
from penjing.tensors.grids import Grid, Ranges
from penjing.tensors.saturation import LIMIT, without_saturation

_BATCH, _BATCH_VALUES = 32, 2**19  # what fits a processor's caches is faster
_STATIC = ("int16", "int8", "int4")
_ACTIVATIONS = (*_STATIC, "dynamic", None)


@step
@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """Quantizes after training: batch norms folded, weights rounded to nearest, activation ranges from samples.

    `weights` are "int16", "int8", "int6", "int4", "int3", "int2", "ternary" (-1, 0, 1) or "binary" (-1, 1),
    `activations` "int16", "int8" or "int4"; "dynamic" finds the inputs' 8-bit grids of linear layers anew in every run,
    without samples; `activations=None` stores weights as integers and computes in float.
    `granularity`: a weight scale for each output "channel", for each "group:N" of N neighbouring weights of a row, or
    one for the "tensor". No integer kernel multiplies groups: what reads them computes in float. `symmetric` weights
    have zero point 0; activations are always asymmetric, one grid a tensor. `ranges` chooses what part of the values a
    grid covers: "minmax" all of it; "mse" what gives the least squared error; "percentile" all but 0.01 %; "entropy"
    what loses least information (Kullback-Leibler). Weights of less than 8 bits follow it; those of 8 and 16 follow
    "mse" and otherwise take all of their range, since with a scale a channel clipping only hurts them. Ternary and
    binary scales are those of least error (see analysis/weight_grids.py). `scales` "power-of-two" rounds each scale up
    to one, for hardware that shifts. `levels` "power-of-two" and "additive-powers-of-two" space weights of 2 to 8 bits
    unevenly, with scales of least error; what reads them computes in float. `samples` is how many samples are looked
    at.

    `headroom` makes neighbouring int8 weights small enough for kernels that add their products in 16 bits (x86 without
    VNNI would saturate), at the least squared error (see tensors/saturation.py). `correct_bias` moves
    biases so that every layer's mean output comes near that of the float network, layer after layer, as far as the
    samples agree on it (Nagel et al., "Data-free quantization through weight equalization and bias correction",
    2019).

    Refuses with RecipeError what does not exist, with DataError missing samples or samples that give infinite values.
    """

    weights: str = "int8"
    activations: str | None = "int8"
    granularity: str = "channel"
    symmetric: bool = True
    rounding: str = "nearest"
    ranges: str = "minmax"
    scales: str = "float"
    levels: str = "uniform"
    samples: int = 300
    headroom: bool = True
    correct_bias: bool = True

    def __post_init__(self) -> None:
        self.require_one_of("weights", WEIGHT_TYPES)
        if self.activations not in _ACTIVATIONS:
            known = tuple(a for a in _ACTIVATIONS if a is not None)
            words = ", ".join(repr(a) for a in _ACTIVATIONS)
            raise RecipeError(
                f"Quantize.activations must be one of {words}, got {self.activations!r}",
                hint=did_you_mean(str(self.activations), known),
            )
        if not isinstance(self.granularity, str) or granularity(self.granularity) is None:
            raise RecipeError(
                f"Quantize.granularity must be 'channel', 'tensor' or 'group:' and a number, got {self.granularity!r}",
                hint="for example granularity='group:128'",
            )
        self.require_one_of("rounding", ("nearest",))
        self.require_one_of("ranges", grids.RANGES)
        self.require_one_of("scales", SCALES)
        self.require_one_of("levels", LEVELS)
        check_levels(self.levels, self.weights, self.granularity, plain=self.scales == "float" and self.symmetric)
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise RecipeError(f"Quantize.samples must be a whole number of at least 1, got {self.samples!r}")
        for field in ("symmetric", "headroom", "correct_bias"):
            if not isinstance(getattr(self, field), bool):
                raise RecipeError(f"Quantize.{field} must be true or false, got {getattr(self, field)!r}")
        if not self.symmetric and self.weights in ("ternary", "binary"):
            raise RecipeError(
                f"{self.weights} weights are symmetric", hint="leave symmetric away, or use weights='int2'"
            )

    @property
    def is_static(self) -> bool:
        """Whether activations stand on grids that samples show."""
        return self.activations in _STATIC

    def check(self, context: Context) -> None:
        """Static activations need samples."""
        if self.is_static and context.data is None:
            raise DataError(
                "Quantize needs samples to find the ranges of the activations",
                hint="give data (a hundred samples without labels are enough), or use Quantize(activations=None)",
            )

    def plan(self, network: Network, context: Context) -> Plan:
        """Edits for folding, biases, weights and activations; a reason for every layer, with its SQNR in dB."""
        self.check(context)
        return _Planner(self, network, context).plan()


@dataclass(frozen=True)
class _Weight:
    grid: Grid
    rounded: Tensor  # its values on that grid; not always the nearest
    levels: Tensor | None = None  # what the scales multiply instead of integers


class _Planner:
    def __init__(self, settings: Quantize, network: Network, context: Context) -> None:
        self.settings, self.network, self.context = settings, network, context
        self.left: dict[str, str] = {}
        self.per_channel, self.group = granularity(settings.granularity) or (True, 0)

    def plan(self) -> Plan:
        folding = fold_pads(self.network)
        folded = self.network.apply(folding) if folding else self.network
        norms = fold_batch_norms(folded)
        folded = folded.apply(norms) if norms else folded
        placement = place(
            folded.graph_module,
            floating=[i.name for i in folded.inputs if i.dtype.is_floating_point],
            parameters=folded.parameter_names,
            selected=lambda name: matches(self.settings.where, name),
            activations=self.settings.is_static,
        )
        if not placement.layers:
            raise RecipeError(
                f"Quantize finds nothing to quantize in {self.network.name}",
                hint=f"where={self.settings.where!r} selects no layer with weights, or they are integers already",
            )
        weights = self._weights(folded, placement)
        activations: dict[int, Grid] = {}
        twin: Twin | None = None
        biases: dict[str, Tensor] = {}
        if self.settings.is_static:
            activations = self._activations(folded, placement)
            twin = self._compare(folded, placement, weights, activations)
            biases = twin.biases
        edits: list[Edit] = [*folding, *norms]
        edits += [SetWeights(parameter=name, value=value) for name, value in biases.items()]
        edits += _moved(folded.tensors(), weights)
        edits += [_weight_edit(name, weight, self.settings.weights) for name, weight in weights.items()]
        edits += [_activation_edit(q, activations[q.grid]) for q in placement.quantizers]
        if self.settings.activations == "dynamic":
            edits += _dynamic_edits(folded.graph_module.graph, placement, weights)
        reasons = self._reasons(folded, placement, weights, twin)
        return Plan(
            step=self.settings, edits=tuple(edits), reasons=reasons, notes=self._notes(norms, placement, biases)
        )

    # ----------------------------------------------------------------------------------------------------- weights
    def _weights(self, network: Network, placement: Placement) -> dict[str, _Weight]:
        """A grid for every parameter that only layers read; a parameter shared by several layers has one."""
        readers: dict[str, list[Layer]] = {}
        for layer in placement.layers:
            if layer.parameter is not None:
                readers.setdefault(layer.parameter, []).append(layer)
        shared = _uses(network.graph_module.graph)
        tensors, found = network.tensors(), {}
        for name, layers in readers.items():
            if not shared[name] <= {layer.node for layer in layers}:
                other = min(shared[name] - {layer.node for layer in layers})
                self.left |= {layer.node: f"{name} is also used by {other}" for layer in layers}
                continue
            axes = {layer.axis for layer in layers}
            axis = axes.pop() if len(axes) == 1 and self.per_channel else None
            found[name] = self._weight(name, tensors[name].detach(), axis, layers)
        return found

    def _weight(self, name: str, weight: Tensor, axis: int | None, layers: list[Layer]) -> _Weight:
        settings = self.settings
        ranges = cast(Ranges, settings.ranges)
        if settings.weights in ("int8", "int16") and ranges != "mse":
            ranges = "minmax"
        fixed = settings.scales == "power-of-two"
        try:
            if settings.levels != "uniform":
                return _Weight(*level_grid(weight, settings.levels, settings.weights, axis=axis))
            grid = weight_grid(
                weight,
                settings.weights,
                axis=axis,
                group=self.group,
                symmetric=settings.symmetric,
                ranges=ranges,
                scales=cast(Scales, settings.scales),
            )
        except ValueError as error:
            raise InputError(f"{name} cannot be quantized: {error}", hint="exclude it with where") from error
        eight = settings.weights == "int8" and not grid.group and settings.activations is not None
        if settings.headroom and settings.symmetric and eight:
            channels = {x.axis for x in layers if self._in_integers(x) and not x.depthwise}
            if len(channels) == 1 and (channel := channels.pop()) is not None:
                return _Weight(*without_saturation(weight, grid, channel, keep_scale=fixed))
            if channels:  # which values are neighbours differs from layer to layer: any two must fit
                half = LIMIT // 2
                coarse = replace(grid, scale=grid.scale * (2.0 if fixed else grid.quant_max / half))
                return _Weight(coarse, grids.fake_quantize(weight, replace(coarse, quant_min=-half, quant_max=half)))
        return _Weight(grid, on_grid(weight, grid, settings.weights))

    # ------------------------------------------------------------------------------------------------- activations
    def _activations(self, network: Network, placement: Placement) -> dict[int, Grid]:
        """Runs the samples through the float network and makes a grid of each class of values that share one."""
        settings = self.settings
        types = {q.grid: cast(str, settings.activations) for q in placement.quantizers}
        with self.context.progress.task("looking at activations", settings.samples) as advance:

            def shown() -> Iterator[Any]:
                for inputs in self._batches(network, settings.samples):
                    yield inputs
                    advance(len(next(iter(network.bind(inputs).values()))))

            ranges, scales = cast(Ranges, settings.ranges), cast(Scales, settings.scales)
            return activation_grids(network, placement, types, shown(), ranges=ranges, scales=scales)

    def _compare(
        self, network: Network, placement: Placement, weights: dict[str, _Weight], activations: dict[int, Grid]
    ) -> Twin:
        """Float and quantized network side by side on a few samples, biases corrected on the way."""
        small = all(torch.Size(i.shape[1:]).numel() <= 3 * 64 * 64 for i in network.inputs)
        count = min(self.settings.samples, 128 if small else 16)
        rows = [tuple(network.bind(i).values()) for i in self._batches(network, count)]
        together = rows[0] if not network.batch_is_dynamic else tuple(torch.cat(r) for r in zip(*rows, strict=True))
        quantizers = [(q.value, q.users, activations[q.grid]) for q in placement.quantizers]
        correct = {layer.node for layer in placement.layers if layer.integer} if self.settings.correct_bias else set()
        rounded = {name: weight.rounded for name, weight in weights.items()}
        twin = Twin(network.graph_module, rounded, quantizers, correct)
        with self.context.progress.task("comparing with the float network", None):
            twin.run(*together)
        return twin

    def _batches(self, network: Network, limit: int) -> Any:
        if self.context.data is None:
            raise DataError("Quantize needs samples")
        fixed = network.inputs[0].shape[0]
        size = min(_batch(network), limit) if network.batch_is_dynamic else fixed
        for inputs, _ in self.context.data.batches(size, limit=max(limit, size)):
            if network.batch_is_dynamic or len(next(iter(network.bind(inputs).values()))) == fixed:
                yield inputs

    def _in_integers(self, layer: Layer) -> bool:
        """Whether both factors of a layer stand on grids."""
        dynamic = layer.kind == "linear" if self.settings.activations == "dynamic" else self.settings.is_static
        return layer.integer and dynamic and self.settings.levels == "uniform"

    # ----------------------------------------------------------------------------------------------------- reasons
    def _reasons(
        self, network: Network, placement: Placement, weights: Mapping[str, _Weight], twin: Twin | None
    ) -> tuple[Reason, ...]:
        tensors, reasons = network.tensors(), []
        for layer in placement.layers:
            if layer.node in self.left:
                continue
            integer = self._in_integers(layer)
            words, choice = [], f"{self.settings.activations} inputs" if integer else ""
            score: float | None = None
            if layer.parameter is not None:
                weight = weights[layer.parameter]
                score = grids.sqnr(tensors[layer.parameter].detach(), weight.rounded)
                choice = f"{self.settings.weights} weights per {_kind(weight.grid)}" + (f", {choice}" if choice else "")
                words.append(f"weights {score:.1f} dB")
                if self.settings.scales == "power-of-two":
                    words[-1] += f" ({shifts(weight.grid)})"
                if weight.grid.group and layer.integer:
                    words.append("groups: computed in float")
                if weight.levels is not None:
                    words.append(f"{self.settings.levels} levels: computed in float")
            if twin is not None and layer.integer:
                words += [
                    f"inputs {twin.sqnr[s]:.1f} dB" for s in placement.sources.get(layer.node, ()) if s in twin.sqnr
                ]
                score = twin.sqnr.get(layer.node, score)
                words.append(f"output {score:.1f} dB" if score is not None else "")
            elif not integer:
                words.append(f"{layer.kind}: stored as integers, computed in float")
            reasons.append(
                Reason(layer=_title(layer), choice=choice, score=score, why=", ".join(w for w in words if w))
            )
        left = placement.left | self.left
        return (*reasons, *(Reason(layer=n, choice="float32", why=why) for n, why in left.items()))

    def _notes(self, norms: tuple[Edit, ...], placement: Placement, biases: Mapping[str, Tensor]) -> tuple[str, ...]:
        folded = sum(type(e).__name__ == "ReplaceLayer" and not getattr(e, "calls", ()) for e in norms)
        notes = [f"{folded} batch norms folded"] if folded else []
        if placement.quantizers:
            different = len({q.grid for q in placement.quantizers})
            notes.append(f"{len(placement.quantizers)} activations quantized on {different} grids")
        if biases:
            notes.append(f"{len(biases)} biases corrected")
        return tuple(notes)


def _batch(network: Network) -> int:
    values = sum(torch.Size(i.shape[1:]).numel() for i in network.inputs)
    return max(4, min(_BATCH, _BATCH_VALUES // max(1, values)))


def _moved(tensors: Mapping[str, Tensor], weights: Mapping[str, _Weight]) -> list[Edit]:
    """Weights that are to stand on other points of their grid than the nearest."""
    return [
        SetWeights(parameter=name, value=weight.rounded)
        for name, weight in weights.items()
        if not torch.equal(grids.fake_quantize(tensors[name].detach(), weight.grid), weight.rounded)
    ]


def _weight_edit(name: str, weight: _Weight, dtype: str) -> QuantizeTensor:
    grid = weight.grid
    return QuantizeTensor(
        tensor=name,
        scale=grid.scale,
        zero_point=grid.zero_point,
        dtype="int16" if dtype == "int16" else "int8",
        axis=grid.axis,
        group=grid.group,
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        levels=weight.levels,
    )


def _activation_edit(quantizer: Quantizer, grid: Grid) -> QuantizeTensor:
    return QuantizeTensor(
        tensor=quantizer.value,
        scale=float(grid.scale),
        zero_point=int(grid.zero_point),
        dtype="int16" if grid.quant_max > 127 else "int8",
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        users=quantizer.users,
    )


def _dynamic_edits(graph: fx.Graph, placement: Placement, weights: Mapping[str, _Weight]) -> list[Edit]:
    """Grids found in every run for what linear layers with stored weights read."""
    linear = {x.node for x in placement.layers if x.kind == "linear" and x.parameter in weights}
    readers: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.name in linear:
            readers.setdefault(node.args[PRODUCTS[operator_name(node)][0]].name, []).append(node.name)
    return [
        QuantizeTensor(tensor=value, scale=1.0, zero_point=0, dtype="uint8", users=tuple(users), dynamic=True)
        for value, users in readers.items()
    ]


def _uses(graph: fx.Graph) -> dict[str, set[str]]:
    """The nodes that use each tensor, looked for behind transpositions."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            waiting = list(node.users)
            while waiting:
                user = waiting.pop()
                if operator_name(user) in ("aten::t", "aten::transpose", "aten::permute", "aten::numpy_T"):
                    waiting += list(user.users)
                else:
                    found.setdefault(str(node.target), set()).add(user.name)
    return found


def _kind(grid: Grid) -> str:
    if grid.group:
        return f"group of {grid.group}"
    return "channel" if grid.axis is not None else "tensor"


def _title(layer: Layer) -> str:
    return layer.node if layer.parameter is None else layer.parameter.removesuffix(".weight")


__all__ = ["Quantize"]
