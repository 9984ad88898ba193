"""Quantize: weights, or weights and activations, on integer grids of 16 bits to one, after training, without labels."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from penjing.analysis.activation_grids import activation_grids, activation_types
from penjing.analysis.dynamic_grids import dynamic_edits, dynamic_layers
from penjing.analysis.fake_quantize import weight_readers
from penjing.analysis.footprint import footprint
from penjing.analysis.grid_edits import activation_edit, weight_edit
from penjing.analysis.level_grids import LEVELS, check_levels, level_grid
from penjing.analysis.passes import fold_batch_norms, fold_pads, outputs_first, own_weights, simplified
from penjing.analysis.placement import Layer, Placement, place
from penjing.analysis.twin import Twin
from penjing.analysis.weight_grids import SCALES, WEIGHT_TYPES, Scales, granularity, on_grid, weight_grid
from penjing.analysis.weight_rounding import (
    ROUNDINGS,
    RoundedNetwork,
    RoundedWeight,
    Rounding,
    moved,
    own_scales,
    round_by_outputs,
)
from penjing.errors import DataError, InputError, RecipeError
from penjing.network.edits import Edit, SetWeights
from penjing.network.network import Network
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.quantized_layers import layer_reasons, unread
from penjing.recipe.samples import bound_samples, unlabelled
from penjing.registry import did_you_mean
from penjing.tensors import grids
from penjing.tensors.grids import Grid, Ranges
from penjing.tensors.saturation import LIMIT, without_saturation

_BATCH = 32
_STATIC = ("int16", "int8", "int4")
_ACTIVATIONS = (*_STATIC, "dynamic", None)


@step
@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """Quantizes after training: batch norms folded, weights rounded, activation ranges from samples.

    `weights` are "int16", "int8", "int6", "int4", "int3", "int2", "ternary" (-1, 0, 1) or "binary" (-1, 1), or types by
    pattern ({"*": "int4", "head.*": "int8"}: the last that matches; what none matches stays float). `edges` is the type
    of the first and the last layer's weights and inputs, if it is to be another. `activations` are "int16", "int8" or
    "int4"; "dynamic" finds 8-bit grids for what linear layers and LSTMs read anew in every run, without samples; None
    stores weights as integers and computes in float. Activations of 4 bits are those that layers read; what only sums,
    pools and outputs read has 8.

    `granularity`: a weight scale for each output "channel", for each "group:N" of N neighbouring weights of a row, or
    one for the "tensor". No integer kernel multiplies groups: what reads them computes in float. `symmetric` weights
    have zero point 0; activations are always asymmetric, one grid a tensor.

    `rounding` of weights, beside "nearest", looks at what layers give on samples, in the network quantized so far
    (activations that are "dynamic" are float there); no labels, no gradients through the whole network (1000 samples do
    well):

    - "gptq": layer by layer in closed form, each making up for those before it (Frantar et al. 2023, "GPTQ", on
      asymmetric targets: see analysis/quantized_reconstruct.py). Fast; also the scales are chosen by the outputs.
    - "adaround": up or down is learned, layer by layer (Nagel et al. 2020).
    - "brecq": the same by residual blocks, and the activations' scales too (Li et al. 2021, "BRECQ", with the random
      rounding of Wei et al. 2022, "QDrop"). The best for activations of few bits; `steps` steps a block.

    `ranges` chooses what part of the values a grid covers: "minmax" all of it; "mse" what gives the least squared
    error; "percentile" all but 0.01 %; "entropy" what loses least information (Kullback-Leibler); "auto" is "mse" for
    activations and for weights that are rounded by outputs, else "minmax". Weights of 8 and 16 bits follow "mse" only
    and otherwise take all of their range, since with a scale a channel clipping only hurts them. Ternary and binary
    scales are those of least error (see analysis/weight_grids.py). `scales` "power-of-two" rounds each scale up to one,
    for hardware that shifts. `levels` "power-of-two" and "additive-powers-of-two" space weights of 2 to 8 bits
    unevenly, with scales of least error; what reads them computes in float. `samples` is how many are looked at (300;
    1024 if rounding looks at outputs).

    `headroom` makes neighbouring int8 weights small enough for kernels that add their products in 16 bits (x86 without
    VNNI would saturate), at the least squared error (see tensors/saturation.py). `correct_bias` moves biases so that
    every layer's mean output comes near that of the float network, layer after layer, as far as the samples agree on it
    (Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019), `correct_scale` the
    scales of channels so that outputs spread as there: what re-estimating batch norms does, which are folded here. Both
    need static activations, and leave alone what "gptq" has fitted.

    Refuses with RecipeError what does not exist, with DataError missing samples or samples that give infinite values.
    """

    weights: str | dict[str, str] = "int8"
    activations: str | None = "int8"
    granularity: str = "channel"
    symmetric: bool = True
    rounding: str = "nearest"
    ranges: str = "auto"
    scales: str = "float"
    levels: str = "uniform"
    edges: str | None = None
    samples: int | None = None
    steps: int = 200
    headroom: bool = True
    correct_bias: bool = True
    correct_scale: bool = True

    def __post_init__(self) -> None:
        kinds = list(self.weights.values()) if isinstance(self.weights, dict) else [self.weights]
        for dtype in kinds:
            if dtype not in WEIGHT_TYPES:
                raise RecipeError(
                    f"Quantize.weights must be one of {', '.join(WEIGHT_TYPES)}, got {dtype!r}",
                    hint=did_you_mean(str(dtype), WEIGHT_TYPES),
                )
        self.require_one_of("activations", _ACTIVATIONS)
        if not isinstance(self.granularity, str) or granularity(self.granularity) is None:
            raise RecipeError(
                f"Quantize.granularity must be 'channel', 'tensor' or 'group:' and a number, got {self.granularity!r}",
                hint="for example granularity='group:128'",
            )
        self.require_one_of("rounding", ROUNDINGS)
        self.require_one_of("ranges", ("auto", *grids.RANGES))
        self.require_one_of("edges", (None, *WEIGHT_TYPES))
        self.require_whole("steps", 1)
        self.require_one_of("scales", SCALES)
        self.require_between("samples", 1, float("inf"))
        self.require_one_of("levels", LEVELS)
        for dtype in (*kinds, *([] if self.edges is None else [self.edges])):
            check_levels(self.levels, dtype, self.granularity, plain=self.scales == "float" and self.symmetric)
        if self.levels != "uniform" and self.rounding != "nearest":
            raise RecipeError(
                f"Quantize.levels {self.levels!r} are rounded to nearest, not by {self.rounding!r}",
                hint="leave rounding or levels away",
            )
        for field in ("symmetric", "headroom", "correct_bias", "correct_scale"):
            if not isinstance(getattr(self, field), bool):
                raise RecipeError(
                    f"Quantize.{field} must be true or false, got {getattr(self, field)!r}", hint="left away it is True"
                )
        few = {"ternary", "binary"} & {self.edges, *kinds}
        if not self.symmetric and few:
            raise RecipeError(f"{min(few)} weights are symmetric", hint="leave symmetric away, or use weights='int2'")

    @property
    def count(self) -> int:
        """How many samples are looked at."""
        return self.samples or (300 if self.rounding == "nearest" else 1024)

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
        if self.rounding != "nearest" and context.data is None:
            raise DataError(
                f"Quantize needs samples for rounding={self.rounding!r}",
                hint="give data (a thousand samples without labels), or use rounding='nearest'",
            )

    def plan(self, network: Network, context: Context) -> Plan:
        """Edits for folding, biases, weights and activations; a reason for every layer, with its SQNR in dB."""
        self.check(context)
        return _Planner(self, network, context).plan()


class _Planner:
    def __init__(self, settings: Quantize, network: Network, context: Context) -> None:
        self.settings, self.network, self.context = settings, network, context
        self.left: dict[str, str] = {}
        self.per_channel, self.group = granularity(settings.granularity) or (True, 0)

    def plan(self) -> Plan:
        settings = self.settings
        # What is rounded by outputs, or cut into groups, has its output channels first.
        turned = [outputs_first] if self.group or settings.rounding != "nearest" else []
        folded, folding = simplified(self.network, self._owned, fold_pads, *turned)
        folded, norms = simplified(folded, fold_batch_norms)
        placement = place(
            folded.graph_module,
            floating=[i.name for i in folded.inputs if i.dtype.is_floating_point],
            parameters=folded.parameter_names,
            selected=lambda name: matches(settings.where, name),
            activations=settings.is_static,
        )
        if not placement.layers:
            raise self._nothing()
        self.ends = {layer.node for layer in (placement.layers[0], placement.layers[-1])}
        readers = self._readers(folded, placement)
        weighty = [
            x for x in placement.layers if x.parameter is not None and (settings.weights or not settings.is_static)
        ]
        if weighty and all(self._type(cast(str, x.parameter), [x]) is None for x in weighty):
            raise self._nothing()
        self.integer = self._integer(folded, placement, readers)
        tensors = folded.tensors()
        weights = {name: self._weight(name, tensors[name].detach(), layers) for name, layers in readers.items()}
        made = RoundedNetwork(weights, self._activations(folded, placement) if settings.is_static else {})
        twin: Twin | None = None
        if settings.rounding != "nearest":
            made = self._by_outputs(folded, placement, made)
        if settings.is_static:
            twin = self._compare(folded, placement, made)
            made.biases |= twin.biases
            made.weights |= {name: made.weights[name].times(gain) for name, gain in twin.gains.items()}
        edits: list[Edit] = [*folding, *norms]
        edits += [SetWeights(parameter=name, value=value) for name, value in made.biases.items()]
        edits += [SetWeights(parameter=n, value=v) for n, v in moved(folded.tensors(), made.weights).items()]
        edits += [weight_edit(name, weight.grid, weight.levels) for name, weight in made.weights.items()]
        edits += [activation_edit(q, made.activations[q.grid]) for q in placement.quantizers]
        edits += dynamic_edits(folded.graph_module.graph, () if settings.is_static else self.integer)
        reasons = layer_reasons(settings, placement, made.weights, tensors, self.integer, twin)
        left = placement.left | self.left | unread(folded, placement, lambda n: matches(settings.where, n))
        reasons += [Reason(layer=name, choice="float32", why=why) for name, why in left.items()]
        shared = len(self.network.shared_levels()) - len(folded.shared_levels())
        notes = (
            *self._notes(norms, placement, made),
            *([f"{shared} weights share no values any more"] if shared else []),
        )
        return Plan(step=settings, edits=tuple(edits), reasons=tuple(reasons), notes=notes)

    def _owned(self, network: Network) -> tuple[Edit, ...]:
        return own_weights(network, lambda n: matches(self.settings.where, n) and self._type(n, ()) is not None)

    def _nothing(self) -> RecipeError:
        settings = self.settings
        done = self.network.has_integer_grids or bool(self.network.shared_levels())
        what = "what is selected stands on grids already" if done else "no layer's weight is selected"
        return RecipeError(
            f"Quantize finds nothing to quantize in {self.network.name}",
            hint=f"{what} (where={settings.where!r}, weights={settings.weights!r})",
        )

    # ----------------------------------------------------------------------------------------------------- weights
    def _type(self, name: str, layers: Sequence[Layer]) -> str | None:
        """The type of a weight; None: float."""
        settings = self.settings
        if settings.edges is not None and any(layer.node in self.ends for layer in layers):
            return settings.edges
        if isinstance(settings.weights, str):
            return settings.weights
        return next((t for pattern, t in reversed(settings.weights.items()) if matches(pattern, name)), None)

    def _readers(self, network: Network, placement: Placement) -> dict[str, list[Layer]]:
        """The layers that read each parameter that is to be stored as integers: one that only layers read."""
        readers: dict[str, list[Layer]] = {}
        for layer in placement.layers:
            if layer.parameter is not None:
                readers.setdefault(layer.parameter, []).append(layer)
        shared = weight_readers(network.graph_module.graph)
        for name, layers in list(readers.items()):
            others = shared[name] - {layer.node for layer in layers}
            why = f"{name} is also used by {min(others)}" if others else "no pattern of weights matches it"
            if others or self._type(name, layers) is None:
                self.left |= {x.node if x.integer else f"{x.node} ({name})": why for x in layers}
                del readers[name]
        return readers

    def _integer(self, network: Network, placement: Placement, readers: Mapping[str, list[Layer]]) -> Collection[str]:
        """The layers of which both factors stand on grids, by node."""
        settings = self.settings
        uniform = settings.levels == "uniform"
        if settings.is_static:
            return {x.node for x in placement.layers if x.integer and (uniform or x.parameter is None)}
        if settings.activations is None or not uniform:
            return ()
        types = {n: cast(str, self._type(n, layers)) for n, layers in readers.items() if not self.group}
        plain = settings.symmetric or not self.per_channel
        return dynamic_layers(network.graph_module.graph, placement, types, plain=plain)

    def _weight(self, name: str, weight: Tensor, layers: list[Layer]) -> RoundedWeight:
        dtype, axes = cast(str, self._type(name, layers)), {layer.axis for layer in layers}
        axis = axes.pop() if len(axes) == 1 and self.per_channel else None
        settings = self.settings
        ranges = self._ranges(wide=dtype in ("int8", "int16"))
        fixed = settings.scales == "power-of-two"
        try:
            if settings.levels != "uniform":
                return RoundedWeight(dtype, *level_grid(weight, settings.levels, dtype, axis=axis))
            grid = weight_grid(
                weight,
                dtype,
                axis=axis,
                group=self.group,
                symmetric=settings.symmetric,
                ranges=ranges,
                scales=cast(Scales, settings.scales),
            )
        except ValueError as error:
            raise InputError(f"{name} cannot be quantized: {error}", hint="exclude it with where") from error
        eight = dtype == "int8" and not grid.group and settings.activations is not None
        if settings.headroom and settings.symmetric and eight:
            channels = {x.axis for x in layers if x.node in self.integer and not x.depthwise}
            if len(channels) == 1 and (channel := channels.pop()) is not None:
                return RoundedWeight(dtype, *without_saturation(weight, grid, channel, keep_scale=fixed))
            if channels:  # which values are neighbours differs from layer to layer: any two must fit
                half = LIMIT // 2
                coarse = replace(grid, scale=grid.scale * (2.0 if fixed else grid.quant_max / half))
                rounded = grids.fake_quantize(weight, replace(coarse, quant_min=-half, quant_max=half))
                return RoundedWeight(dtype, coarse, rounded)
        return RoundedWeight(dtype, grid, on_grid(weight, grid, dtype))

    def _ranges(self, *, wide: bool) -> Ranges:
        """What part of a weight a grid covers; `wide` ones are clipped only if that is asked for."""
        asked = self.settings.ranges
        if asked == "auto":
            asked = "minmax" if wide or self.settings.rounding == "nearest" else "mse"
        return cast(Ranges, "minmax" if wide and asked != "mse" else asked)

    def _by_outputs(self, network: Network, placement: Placement, made: RoundedNetwork) -> RoundedNetwork:
        """Weights rounded anew by what they do to outputs; those of 8 bits keep their headroom."""
        settings = self.settings
        batches = bound_samples(network, self.context, footprint(network), settings.count, [], _BATCH)
        return round_by_outputs(
            cast(Rounding, settings.rounding),
            network,
            made.weights,
            placement,
            made.activations,
            batches,
            ranges=self._ranges(wide=False),
            symmetric=settings.symmetric,
            shifts=settings.scales == "power-of-two",
            steps=settings.steps,
            seed=self.context.seed,
            progress=self.context.progress,
        )

    # ------------------------------------------------------------------------------------------------- activations
    def _activations(self, network: Network, placement: Placement) -> dict[int, Grid]:
        """Runs the samples through the float network and makes a grid of each class of values that share one."""
        settings = self.settings
        dtype, edges = cast(str, settings.activations), settings.edges
        outer = edges if edges in _STATIC and edges is not None else "int8" if edges else dtype
        types = activation_types(placement, dtype, edges=outer, ends=self.ends)
        ranges = "mse" if settings.ranges == "auto" else settings.ranges
        with self.context.progress.task("looking at activations", settings.count) as advance:

            def shown() -> Iterator[Any]:
                for inputs in unlabelled(network, self.context, settings.count):
                    yield inputs
                    advance(len(next(iter(network.bind(inputs).values()))))

            scales = cast(Scales, settings.scales)
            return activation_grids(network, placement, types, shown(), ranges=cast(Ranges, ranges), scales=scales)

    def _compare(self, network: Network, placement: Placement, made: RoundedNetwork) -> Twin:
        """Float and quantized network side by side on a few samples, biases corrected that nothing has fitted."""
        small = all(torch.Size(i.shape[1:]).numel() <= 3 * 64 * 64 for i in network.inputs)
        count = min(self.settings.count, 128 if small else 16)
        rows = [tuple(network.bind(i).values()) for i in unlabelled(network, self.context, count)]
        together = rows[0] if not network.batch_is_dynamic else tuple(torch.cat(r) for r in zip(*rows, strict=True))
        quantizers = [(q.value, q.users, made.activations[q.grid]) for q in placement.quantizers]
        layers = {layer.node for layer in placement.layers if layer.integer}
        fitted = {layer.node for layer in placement.layers if layer.parameter in made.fitted}
        correct = layers - fitted if self.settings.correct_bias else set()
        free = self.settings.correct_scale and self.settings.scales == "float"
        rescale = own_scales(placement, made) if free else {}
        given = {name: weight.values for name, weight in made.weights.items()} | made.biases
        twin = Twin(network.graph_module, given, quantizers, correct, layers, rescale)
        with self.context.progress.task("comparing with the float network", None):
            twin.run(*together)
        return twin

    def _notes(self, norms: tuple[Edit, ...], placement: Placement, made: RoundedNetwork) -> tuple[str, ...]:
        folded = sum(type(e).__name__ == "ReplaceLayer" and not getattr(e, "calls", ()) for e in norms)
        placed, different = len(placement.quantizers), len({q.grid for q in placement.quantizers})
        found = {
            f"{folded} batch norms folded": folded,
            f"{placed} activations quantized on {different} grids": placed,
            f"{len(made.rounded)} of {len(made.weights)} weights rounded by {self.settings.rounding}": made.rounded,
            f"{len(made.biases)} biases corrected": made.biases,
        }
        if isinstance(self.settings.weights, dict):
            names = [layer.parameter for layer in placement.layers if layer.parameter is not None]
            for pattern in self.settings.weights:
                found[f"no weight matches {pattern!r}"] = not any(matches(pattern, name) for name in names)
        return tuple(words for words, there in found.items() if there)


__all__ = ["Quantize"]
