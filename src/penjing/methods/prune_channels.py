"""PruneChannels: fewer channels, neurons or heads, so that the network really is smaller; then the rest made good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penjing.analysis.costs import cost_models
from penjing.analysis.elimination import (
    Reader,
    eliminate_units,
    readers_of,
    watch_inputs,
    without_units,
    zeroed_units,
)
from penjing.analysis.footprint import Footprint, footprint
from penjing.analysis.reconstruct import Refit, reconstruct
from penjing.data import Data
from penjing.errors import RecipeError
from penjing.network import Network, RemoveChannels, SetWeights
from penjing.network.channels.groups import Group, kept_indices
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.tensors.allocation import CostModel, greedy, refill, uniform
from penjing.tensors.criteria import CRITERIA, ELIMINATION, NEED_GRADIENTS, Slices
from penjing.training import call

#: Most entries of one value that are kept for all samples together while layers are refitted (float32: 1 GiB).
_ENTRIES = 1 << 28
#: Multiply-accumulates that measuring the groups' sensitivities may take.
_SENSITIVITY_WORK = 6e11
_GRADIENT_BATCHES = 6


@dataclass(frozen=True)
class _Ranked:
    """A group with its units cheapest first, the error as they go, and how much half of it matters to the outputs."""

    group: Group
    order: list[int]
    errors: list[float]
    sensitivity: float | None = None


@step
@dataclass(frozen=True, kw_only=True)
class PruneChannels(Step):
    """Remove the channels that matter least, with everything that is coupled to them.

    How many: `ratio` of every group's units go (0.5 if nothing is said), or as many as it takes for the network's
    multiply-accumulates (`keep_macs`) or parameters (`keep_params`) to fall to that share of now; both may be given,
    and both then hold. With samples a group loses the less the more the outputs suffer from losing half of it;
    without, all groups lose the same share. Which: `criterion` ("l1", "l2", "bn_scale", "taylor", "random", or "obs":
    what the layers behind can do without, judged on samples). With `reconstruct` and samples, the layers that lost
    inputs are refitted, without labels (`penjing.analysis.reconstruct`). Counts are rounded up to multiples of
    `round_to`; `min_channels` stay everywhere. `where` selects the layers that make the channels; a group is touched
    only if all of its makers are selected.
    """

    ratio: float | None = None
    keep_macs: float | None = None
    keep_params: float | None = None
    criterion: str = "l2"
    reconstruct: bool = True
    round_to: int | None = None
    min_channels: int = 1
    samples: int = 1000

    def __post_init__(self) -> None:
        self.require_between("ratio", 0, 1, open_high=True)
        for field in ("keep_macs", "keep_params"):
            self.require_between(field, 0, 1, open_low=True)
        if self.ratio is not None and (self.keep_macs is not None or self.keep_params is not None):
            other = "keep_macs" if self.keep_macs is not None else "keep_params"
            raise RecipeError(
                f"PruneChannels takes either ratio or {other}, got both",
                hint="ratio is the share of channels that goes; keep_macs and keep_params are shares that stay",
            )
        self.require_one_of("criterion", CRITERIA.names())
        self.require_between("round_to", 1, float("inf"))
        self.require_between("min_channels", 1, float("inf"))
        self.require_between("samples", 1, float("inf"))

    def check(self, context: Context) -> None:
        """Criteria that look at gradients need labelled samples."""
        if self.criterion in NEED_GRADIENTS and (context.data is None or context.task is None):
            raise RecipeError(
                f"criterion '{self.criterion}' needs samples with labels and a task",
                hint="give data and task, or use 'l2', which needs neither",
            )

    def plan(self, network: Network, context: Context) -> Plan:
        """Decides on the channels, tries them out on copies, and refits what reads them."""
        self.check(context)
        if network.is_quantized:
            raise RecipeError(
                "PruneChannels cannot change a network that is already quantized",
                hint="put PruneChannels before Quantize",
            )
        notes: list[str] = []
        groups = [g for g in network.groups() if self._selected(g)]
        if not groups:
            raise RecipeError(
                f"there is no channel of {network.name} that PruneChannels(where={self.where!r}) may remove",
                hint="print(network.groups()) lists what can be removed, and why the rest stays",
            )
        size = footprint(network)
        batches = self._samples(network, context, size, notes)
        ranked = self._rank(network, groups, context, batches, size)
        removals, kept_counts, pruned = self._remove(network, ranked, size)
        edits: list[RemoveChannels | SetWeights] = list(removals)
        refit = Refit()
        if self.reconstruct and batches and removals:
            kept = _kept(network, removals)
            readers = {
                m.parameter for r in ranked if kept_counts[r.group.name] < r.group.size for m in r.group.consumers
            }
            # Where single weights are pinned to zero, a dense fit would be cut to pieces: those layers stay as they
            # are.
            readers -= set(network.masks)
            refit = reconstruct(network, pruned, kept, batches, only=readers, progress=context.progress)
            edits += [SetWeights(parameter=name, value=value) for name, value in refit.tensors.items()]
        after = footprint(pruned)
        notes.insert(
            0, f"parameters {size.parameters:,} → {after.parameters:,} ({after.parameters / size.parameters:.1%})"
        )
        notes.insert(1, f"multiply-accumulates {size.macs:,} → {after.macs:,} ({after.macs / max(size.macs, 1):.1%})")
        reasons = self._reasons(network, ranked, kept_counts, refit)
        return Plan(step=self, edits=tuple(edits), reasons=reasons, notes=tuple(notes))

    def _selected(self, group: Group) -> bool:
        makers = group.producers or group.members
        return group.size > 1 and all(matches(self.where, m.parameter) for m in makers)

    def _samples(
        self, network: Network, context: Context, size: Footprint, notes: list[str]
    ) -> list[dict[str, Tensor]]:
        """Bound inputs to judge and refit on; none without data."""
        if context.data is None:
            if self.reconstruct:
                notes.append("no samples were given: layers that lost inputs keep their other weights as they were")
            if self.criterion == ELIMINATION:
                notes.append("no samples were given: criterion 'obs' judges by 'l2' instead")
            return []
        count = max(2, min(self.samples, _ENTRIES // max(size.largest, 1)))
        if count < self.samples:
            notes.append(f"{count} samples instead of {self.samples}, to fit in memory")
        batch = max(1, min(100, (1 << 24) // max(size.largest, 1)))
        fixed = None if network.batch_is_dynamic else network.inputs[0].shape[0]
        drawn = context.data.batches(fixed or batch, shuffle=True, seed=context.seed, limit=count)
        bound = (network.bind(inputs) for inputs, _ in drawn)
        return [b for b in bound if fixed is None or b[network.inputs[0].name].shape[0] == fixed]

    # ------------------------------------------------------------------------------------------------------------ which
    def _rank(
        self,
        network: Network,
        groups: Sequence[Group],
        context: Context,
        batches: list[dict[str, Tensor]],
        size: Footprint,
    ) -> list[_Ranked]:
        tensors = network.tensors()
        gradients = _gradients(network, context.data, context) if self.criterion in NEED_GRADIENTS else {}
        gains = _gains(network)
        weights = [m.parameter for g in groups for m in g.consumers]
        by_cost = self.keep_macs is not None or self.keep_params is not None
        watch = bool(batches) and (by_cost or self.criterion == ELIMINATION)
        seen = watch_inputs(network, weights, batches, context.progress) if watch else {}
        looked_at = _first(batches, int(_SENSITIVITY_WORK / max(size.macs * len(groups), 1)))
        if batches and not network.batch_is_dynamic:
            looked_at = batches[0]
        wanted = network.run(looked_at) if by_cost and batches else ()
        ranked = []
        with context.progress.task("judging channels", len(groups)) as advance:
            for number, group in enumerate(groups):
                readers = readers_of(group, seen, tensors)
                generator = torch.Generator().manual_seed(context.seed * 100_003 + number)
                slices = [
                    Slices(m.parameter, tensors[m.parameter], m.dim, torch.as_tensor(m.indices), m.parameter in gains,
                           tuple(g[m.parameter] for g in gradients))
                    for m in group.members
                    if m.parameter in network.parameter_names
                ]  # fmt: skip
                ranked.append(self._rank_one(network, group, slices, readers, generator, looked_at, wanted))
                advance(1)
        return ranked

    def _rank_one(
        self,
        network: Network,
        group: Group,
        slices: Sequence[Slices],
        readers: Sequence[Reader],
        generator: torch.Generator,
        samples: dict[str, Tensor],
        wanted: tuple[Tensor, ...],
    ) -> _Ranked:
        half, tensors = group.size // 2, network.tensors()
        scores = CRITERIA.get(self.criterion)(slices, generator)
        order = torch.argsort(scores).tolist()
        errors = [0.0, *torch.cumsum(scores[order], 0).tolist()]
        trial: tuple[SetWeights, ...] = ()
        if readers:
            free = self.criterion == ELIMINATION
            gone = eliminate_units(readers, 1, half, None if free else order)
            order, errors = gone.order, [*gone.errors, gone.errors[-1]]
            # A reader that could not be watched would still read what is to go: then the units are silenced where
            # they are made.
            if self.reconstruct and {r.layer.weight for r in readers} == {m.parameter for m in group.consumers}:
                trial = without_units(readers, gone.weights[half], tensors)
        if not wanted:
            return _Ranked(group, order, errors)
        trial = trial or zeroed_units(group, order[:half], tensors)
        got = network.apply(trial).run(samples)
        sensitivity = sum(
            float((a.float() - b.float()).square().mean() / b.float().var().clamp_min(1e-12))
            for a, b in zip(got, wanted, strict=True)
            if b.is_floating_point()
        )
        scale = sensitivity / max(errors[half], 1e-30)
        return _Ranked(group, order, [e * scale for e in errors], sensitivity)

    # --------------------------------------------------------------------------------------------------------- how many
    def _remove(
        self, network: Network, ranked: Sequence[_Ranked], size: Footprint
    ) -> tuple[list[RemoveChannels], dict[str, int], Network]:
        """Edits, counts that stay, and the shrunk network, whose real cost is what was asked for."""
        sizes = {r.group.name: r.group.size for r in ranked}
        asked = [
            (what, share * whole)
            for what, share, whole in (
                ("macs", self.keep_macs, size.macs),
                ("parameters", self.keep_params, size.parameters),
            )
            if share is not None
        ]
        if not asked:
            share = 0.5 if self.ratio is None else self.ratio
            counts = uniform(sizes, share, self.round_to, self.min_channels)
            edits = _removals(ranked, counts)
            return edits, counts, network.apply(edits)
        limits = dict(asked)
        models = cost_models(network, [r.group for r in ranked], size)
        for _ in range(8):
            counts = self._allocate(ranked, sizes, models, limits)
            pruned = network.apply(_removals(ranked, counts))
            now = footprint(pruned)
            over = {what: getattr(now, what) / limit for what, limit in asked}
            if all(o <= 1 for o in over.values()):
                counts, pruned = self._give_back(network, ranked, models, asked, counts, pruned)
                return _removals(ranked, counts), counts, pruned
            # The model leaves out what attention and the like save or keep; aim lower by what was missed.
            limits = {what: limits[what] * min(1.0, 0.998 / over[what]) for what in limits}
        least = {what: getattr(now, what) / getattr(size, what) for what, _ in asked}
        said = ", ".join(f"{what} {share:.1%}" for what, share in least.items())
        raise RecipeError(
            f"PruneChannels cannot bring {network.name} down to what is asked; the least it can leave is {said}",
            hint="ask for less, widen 'where', or lower min_channels and round_to",
        )

    def _give_back(
        self,
        network: Network,
        ranked: Sequence[_Ranked],
        models: Mapping[str, CostModel],
        asked: Sequence[tuple[str, float]],
        counts: dict[str, int],
        pruned: Network,
    ) -> tuple[dict[str, int], Network]:
        """Units come back for what the shrunk network really saves beyond the model: attention."""
        if any(r.sensitivity is None for r in ranked):
            return counts, pruned  # all groups lose the same share
        sizes = {r.group.name: r.group.size for r in ranked}
        curves = {r.group.name: r.errors for r in ranked}
        part = 1.0
        for _ in range(8):
            now = footprint(pruned)
            gone = {g: sizes[g] - kept for g, kept in counts.items()}
            room = [(models[w], models[w].total(gone) + part * (limit - getattr(now, w))) for w, limit in asked]
            more = refill(sizes, counts, curves, room, self.round_to)
            if more == counts:
                break
            trial = network.apply(_removals(ranked, more))
            if all(getattr(footprint(trial), w) <= limit for w, limit in asked):
                counts, pruned = more, trial
            else:
                part /= 2  # what came back costs more than the model says
        return counts, pruned

    def _allocate(
        self,
        ranked: Sequence[_Ranked],
        sizes: Mapping[str, int],
        models: Mapping[str, CostModel],
        limits: Mapping[str, float],
    ) -> dict[str, int]:
        if all(r.sensitivity is not None for r in ranked):
            curves = {r.group.name: r.errors for r in ranked}
            return greedy(
                sizes, curves, [(models[w], limit) for w, limit in limits.items()], self.round_to, self.min_channels
            )
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            counts = uniform(sizes, middle, self.round_to, self.min_channels)
            gone = {g: sizes[g] - kept for g, kept in counts.items()}
            low, high = (
                (low, middle) if all(models[w].total(gone) <= limit for w, limit in limits.items()) else (middle, high)
            )
        return uniform(sizes, high, self.round_to, self.min_channels)

    def _reasons(
        self, network: Network, ranked: Sequence[_Ranked], counts: Mapping[str, int], refit: Refit
    ) -> tuple[Reason, ...]:
        reasons = []
        for r in ranked:
            kept = counts[r.group.name]
            fitted = [refit.errors[m.parameter] for m in r.group.consumers if m.parameter in refit.errors]
            why = (
                f"output error {r.sensitivity:.3g} without half of it" if r.sensitivity is not None else self.criterion
            )
            if fitted:
                why += (
                    f"; layers behind refitted, error {max(f[0] for f in fitted):.3g} → {max(f[1] for f in fitted):.3g}"
                )
            if r.group.inexact:
                why += f"; a statistic crosses the channels ({r.group.inexact})"
            reasons.append(
                Reason(layer=r.group.name, score=r.sensitivity, choice=f"{kept}/{r.group.size} kept", why=why)
            )
        chosen = {r.group.name for r in ranked}
        reasons += [
            Reason(layer=g.name, choice=f"{g.size}/{g.size} kept", why="not selected by where")
            for g in network.groups()
            if g.name not in chosen
        ]
        stay: dict[str, str] = {}
        for pinned in network.groups().pinned:
            why = f"{pinned.operator} has no rule" if pinned.operator else pinned.reason
            for parameter, dim in pinned.axes:
                if pinned.operator or "kernel" not in pinned.reason:
                    stay.setdefault(f"{parameter} dim {dim}", why)
        return (*reasons, *(Reason(layer=layer, choice="stays", why=why) for layer, why in stay.items()))


def _removals(ranked: Sequence[_Ranked], counts: Mapping[str, int]) -> list[RemoveChannels]:
    edits = []
    for r in ranked:
        going = r.order[: r.group.size - counts[r.group.name]]
        member = (r.group.producers or r.group.members)[0]
        if going:
            indices = tuple(sorted(int(i) for i in np.unique(member.indices[going])))
            edits.append(RemoveChannels(parameter=member.parameter, dim=member.dim, indices=indices))
    return edits


def _kept(network: Network, removals: Sequence[RemoveChannels]) -> dict[str, dict[int, Tensor]]:
    kept = kept_indices(network.groups(), [(e.parameter, e.dim, e.indices) for e in removals])
    return {name: {dim: torch.as_tensor(i) for dim, i in dims.items()} for name, dims in kept.items()}


def _gains(network: Network) -> set[str]:
    """The multipliers of all norms."""
    places = {"batch_norm": 1, "instance_norm": 1, "layer_norm": 2, "group_norm": 2, "rms_norm": 2}
    found = set()
    for node in network.graph_module.graph.nodes:
        place = places.get(str(getattr(node.target, "__name__", "")).split(".")[0])
        if place is not None and len(node.args) > place and getattr(node.args[place], "op", "") == "get_attr":
            found.add(str(node.args[place].target))
    return found


def _gradients(network: Network, data: Data | None, context: Context) -> list[dict[str, Tensor]]:
    """Gradients of the task's loss by parameter, one dictionary a batch."""
    if data is None or context.task is None:
        return []
    module, found = network.module(), []
    for inputs, labels in data.batches(64, shuffle=True, seed=context.seed, limit=64 * _GRADIENT_BATCHES):
        module.zero_grad(set_to_none=True)
        torch.autograd.backward(context.task.loss(call(module, inputs), labels))
        found.append({
            n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in module.named_parameters()
        })  # fmt: skip
    return found


def _first(batches: Sequence[dict[str, Tensor]], samples: int) -> dict[str, Tensor]:
    """About `samples` samples (at least 4, at most 256) as one batch."""
    if not batches:
        return {}
    shapes = [{name: value.shape[1:] for name, value in b.items()} for b in batches[:3]]
    alike = [b for b, shape in zip(batches, shapes, strict=False) if shape == shapes[0]]
    whole = {name: torch.cat([b[name] for b in alike]) for name in batches[0]}
    return {name: value[: max(4, min(256, samples))] for name, value in whole.items()}
