"""TrainQuantized: training with weights and activations on the grids that they will be stored on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from penjing.analysis.activation_grids import activation_grids, activation_types
from penjing.analysis.fake_quantize import Simulated, WeightGrid, quantizable, simulate, weight_grid
from penjing.analysis.grid_edits import activation_edit, weight_edit
from penjing.analysis.level_grids import LEVELS, check_levels
from penjing.analysis.passes import fold_batch_norms, fold_pads
from penjing.analysis.placement import Placement, place
from penjing.analysis.unfolded import folded_scales, in_front_of_folding, positive_norms
from penjing.analysis.weight_grids import WEIGHT_TYPES, granularity, made_ternary
from penjing.errors import DataError, InputError, RecipeError
from penjing.network import Edit, Network, SetWeights
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.samples import unlabelled
from penjing.tensors import grids
from penjing.tensors.grids import Grid

_WEIGHTS = tuple(t for t in WEIGHT_TYPES if t != "int16")
_ACTIVATIONS = ("int16", "int8", "int4", None)


@step
@dataclass(frozen=True, kw_only=True)
class TrainQuantized(Step):
    """Quantize and train at the same time: `finetune` (a Finetune) trains a copy whose weights and activations pass
    through their grids, the steps of the grids learned with it.

    `weights` are rounded on the way forward, gradients go straight through to the float weights behind them (Esser et
    al. 2020, "Learned step size quantization"): integer types of 8 to 2 bits, "ternary" (-1, 0, 1 times a scale; Li et
    al. 2016) or "binary" (-1, 1 times a scale; Rastegari et al. 2016, "XNOR-Net"). `granularity` is a scale for each
    output "channel", for the "tensor", or "group:N" for N weights of a row each. `edges` is the type of the first and
    the last layer's weights and inputs, which narrow grids would hurt most.

    `activations` below 8 bits are simulated with learned ranges (Bhalgat et al. 2020, "LSQ+"); wider ones cost no
    accuracy worth training for: their ranges are taken from `samples` samples once the weights are final. None leaves
    them float.

    `levels` "power-of-two" and "additive-powers-of-two" space weights of 8 to 2 bits unevenly, as in Quantize, the
    scale learned (Li et al. 2020, "Additive powers-of-two quantization"); what reads them computes in float.

    `lower` names wider types to go through first, ["int8", "int4"]: the epochs of `finetune` are shared evenly among
    all widths, each going on from the weights of the one before (Zhuang et al. 2018, "Towards effective
    low-bitwidth convolutional neural networks", §3.2). Batch norms learn as usual and are folded afterwards, which
    only changes the scales. Weights that an earlier step masked stay exactly zero.
    """

    learns: ClassVar[bool] = True

    finetune: Step
    weights: str = "int4"
    activations: str | None = "int8"
    granularity: str = "channel"
    levels: str = "uniform"
    edges: str = "int8"
    lower: list[str] = field(default_factory=list)
    samples: int = 300

    def __post_init__(self) -> None:
        if not isinstance(self.finetune, Step) or not self.finetune.learns or not hasattr(self.finetune, "epochs"):
            got = self.finetune.name if isinstance(self.finetune, Step) else repr(self.finetune)
            raise RecipeError(
                f"TrainQuantized.finetune must be a Step that trains, got {got}", hint="finetune: Finetune"
            )
        self.require_one_of("weights", _WEIGHTS)
        self.require_one_of("activations", _ACTIVATIONS)
        self.require_one_of("edges", _WEIGHTS)
        self.require_whole("samples", 1)
        if not isinstance(self.granularity, str) or granularity(self.granularity) is None:
            raise RecipeError(
                f"TrainQuantized.granularity must be 'channel', 'tensor' or 'group:' and a number, "
                f"got {self.granularity!r}",
                hint="for example granularity='group:64'",
            )
        unknown = [t for t in self.lower if t not in _WEIGHTS] if isinstance(self.lower, list) else [self.lower]
        if unknown:
            raise RecipeError(
                f"TrainQuantized.lower must be a list of types of weights, got {unknown[0]!r}",
                hint=f"of {', '.join(_WEIGHTS)}",
            )
        self.require_one_of("levels", LEVELS)
        for dtype in (self.weights, self.edges, *self.lower):
            check_levels(self.levels, dtype, self.granularity, step=self.name)
        order = [_WEIGHTS.index(t) for t in (*self.lower, self.weights)]
        if any(a >= b for a, b in itertools.pairwise(order)):
            raise RecipeError(
                f"TrainQuantized.lower must go from wide to narrow and end above weights={self.weights!r}, "
                f"got {self.lower!r}",
                hint=f"for example lower={list(_WEIGHTS[: _WEIGHTS.index(self.weights)][:2])!r}",
            )

    def check(self, context: Context) -> None:
        """What the training needs; activations need samples."""
        if context.data is None:
            raise DataError(
                "TrainQuantized needs samples and no data was given", hint="give data, best what it was trained on"
            )
        self.finetune.check(context)

    def plan(self, network: Network, context: Context) -> Plan:
        """Trains a copy; the Plan folds, sets and quantizes."""
        self.check(context)
        if network.is_quantized:
            raise RecipeError(
                "TrainQuantized needs a float network, and this one is quantized", hint="leave Quantize away before it"
            )
        return _Planner(self, network, context).plan()


class _Planner:
    def __init__(self, settings: TrainQuantized, network: Network, context: Context) -> None:
        self.settings, self.context = settings, context
        self.per_channel, self.group = granularity(settings.granularity) or (True, 0)
        self.start: list[Edit] = [*fold_pads(network)]
        self.network = network.apply(self.start) if self.start else network
        self._add(positive_norms(self.network))
        self._look()
        if None in self.axes.values() and self.folded is not self.network:
            # One scale for all channels outlives folding only where the folding comes first.
            self._add(fold_batch_norms(self.network))
            self._look()

    def _look(self) -> None:
        """Where quantizers go, which weights have grids, and which are those of the first and the last layer."""
        self.folded = self._fold(self.network)
        self.placement = self._place(self.folded)
        axes = quantizable(self.folded, self.placement)
        if not axes:
            raise RecipeError(
                f"TrainQuantized finds nothing to quantize in {self.network.name}",
                hint=f"where={self.settings.where!r} selects no layer with weights of its own",
            )
        layers = [layer for layer in self.placement.layers if layer.parameter in axes]
        self.ends = {layers[0].node, layers[-1].node}
        self.outer = {str(layers[0].parameter), str(layers[-1].parameter)}
        self.axes = {name: axis if self.per_channel else None for name, axis in axes.items()}

    def _add(self, edits: tuple[Edit, ...]) -> None:
        if edits:
            self.start += edits
            self.network = self.network.apply(edits)

    @staticmethod
    def _fold(network: Network) -> Network:
        norms = fold_batch_norms(network)
        return network.apply(norms) if norms else network

    def _place(self, folded: Network) -> Placement:
        return place(
            folded.graph_module,
            floating=[i.name for i in folded.inputs if i.dtype.is_floating_point],
            parameters=folded.parameter_names,
            selected=lambda name: matches(self.settings.where, name),
            activations=self.settings.activations is not None,
        )

    # -------------------------------------------------------------------------------------------------------- training
    def plan(self) -> Plan:
        stages = [*self.settings.lower, self.settings.weights]
        epochs = cast(float, self.settings.finetune.epochs) / len(stages)  # type: ignore[attr-defined]
        current, notes = self.network, []
        activations = self._narrow(self.network)
        for number, dtype in enumerate(stages):
            made = self._simulate(current, dtype, activations)
            one = replace(self.settings.finetune, **{"epochs": epochs})  # type: ignore[arg-type]
            context = replace(self.context, seed=self.context.seed + number)
            plan = one.plan(made.network, context)
            tensors = made.network.apply(plan.edits).tensors()
            notes += [f"{dtype}: {note}" for note in plan.notes]
            activations = made.activations(tensors)
            names = current.tensors()
            changed = [SetWeights(parameter=n, value=tensors[n].detach()) for n in names if tensors[n] is not names[n]]
            current = current.apply(changed)
        return self._result(current, made.weights(tensors), activations, notes)

    def _simulate(self, network: Network, dtype: str, activations: Mapping[int, Grid]) -> Simulated:
        tensors, weights = network.tensors(), {}
        for name, axis in self.axes.items():
            own = self.settings.edges if name in self.outer else dtype
            # A scale for each group needs rows; what has its channels elsewhere keeps one for each channel.
            group = self.group if axis == 0 else 0
            try:
                weights[name] = weight_grid(
                    tensors[name].detach(), own, axis=axis, group=group, levels=self.settings.levels
                )
            except ValueError as error:
                raise InputError(f"{name} cannot be quantized: {error}", hint="exclude it with where") from error
        quantizers = in_front_of_folding(network, self.folded, self.placement.quantizers)
        return simulate(network, weights, quantizers, activations)

    def _narrow(self, network: Network) -> dict[int, Grid]:
        """Grids of the activations that are worth simulating: those below 8 bits."""
        types = self._types()
        narrow = {number for number, dtype in types.items() if grids.limits(dtype)[1] < 127}
        if not narrow:
            return {}
        found = activation_grids(
            self._fold(network), self.placement, types, unlabelled(network, self.context, self.settings.samples)
        )
        return {number: grid for number, grid in found.items() if number in narrow}

    def _types(self) -> dict[int, str]:
        if self.settings.activations is None:
            return {}
        edges = self.settings.edges if self.settings.edges.startswith("int") else "int8"
        return activation_types(self.placement, self.settings.activations, edges=edges, ends=self.ends)

    # ---------------------------------------------------------------------------------------------------------- result
    def _result(
        self,
        current: Network,
        weights: Mapping[str, tuple[Tensor, WeightGrid]],
        learned: Mapping[int, Grid],
        notes: list[str],
    ) -> Plan:
        """Rounded weights into the float network, folded; then the grids, whose scales the folding has changed."""
        rounded = current.apply([SetWeights(parameter=n, value=v) for n, (v, _) in weights.items()])
        before, after = self.network.tensors(), rounded.tensors()
        sets: list[Edit] = [
            SetWeights(parameter=n, value=t.detach()) for n, t in after.items() if not torch.equal(t, before[n])
        ]
        norms = fold_batch_norms(rounded)
        folded = rounded.apply(norms) if norms else rounded
        edits: list[Edit] = [*self.start, *sets, *norms]
        tensors, reasons = folded.tensors(), []
        for name, (value, weight) in weights.items():
            grid, clipped = folded_scales(value, tensors[name].detach(), weight)
            edits.append(weight_edit(name, grid, weight.levels))
            reasons.append(self._reason(name, value, current.tensors()[name].detach(), grid, clipped))
        if self.placement.quantizers:
            types = self._types()
            found = activation_grids(
                folded, self.placement, types, unlabelled(folded, self.context, self.settings.samples)
            ) | dict(learned)
            edits += [activation_edit(q, found[q.grid]) for q in self.placement.quantizers]
        left = [Reason(layer=n, choice="float32", why=why) for n, why in self.placement.left.items()]
        said = f"first and last layer: {self.settings.edges}"
        return Plan(step=self.settings, edits=tuple(edits), reasons=(*reasons, *left), notes=(*notes, said))

    def _reason(self, name: str, value: Tensor, latent: Tensor, grid: Grid, clipped: int) -> Reason:
        kind = self.settings.edges if name in self.outer else self.settings.weights
        score = grids.sqnr(latent, value)
        why = f"{score:.1f} dB from the float weights that were trained"
        why += "" if self.settings.levels == "uniform" else f", {self.settings.levels} levels: computed in float"
        why += f", {clipped} codes clipped by a norm of negative weight" if clipped else ""
        if pruned := made_ternary(value, kind):
            why += f", {pruned}"
        return Reason(layer=name.removesuffix(".weight"), choice=f"{kind} weights", score=score, why=why)


__all__ = ["TrainQuantized"]
