"""PruneChannels: fewer channels, neurons or heads, so that the network really is smaller; then the rest made good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from penjing.analysis.blockwise import optimise_blocks
from penjing.analysis.costs import exact_costs, stored_bytes
from penjing.analysis.footprint import Footprint, footprint, shrinkage
from penjing.analysis.ranking import Ranked
from penjing.analysis.reconstruct import Refit, refit_readers
from penjing.analysis.shrinking import Shrunk, shrink_evenly, shrink_to, vector_multiples
from penjing.errors import RecipeError
from penjing.network import Network, SetWeights
from penjing.network.channels.groups import Group, kept_values
from penjing.progress import Progress
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.samples import bound_samples, ranked, require_labels
from penjing.runtimes import Target
from penjing.runtimes.layer_latency import latency_cost
from penjing.tensors.criteria import CRITERIA, ELIMINATION, require_samples

#: Samples a step of block-wise optimisation looks at.
_BLOCK_BATCH = 32


@step
@dataclass(frozen=True, kw_only=True)
class PruneChannels(Step):
    """Remove the channels that matter least, with everything that is coupled to them.

    How many: `ratio` of every group's units go (0.5 if nothing is said), or as many as it takes for the network's
    multiply-accumulates (`keep_macs`), parameters (`keep_params`), stored bytes (`keep_bytes`; above 1 it is their
    number) or latency for one sample on `target` (`keep_latency`; measured, layer by layer and as a whole:
    `penjing.runtimes.layer_latency`) to fall to that share of now; all that are given hold. With samples a group loses
    the less the more the outputs suffer from losing half of it; without, all groups lose the same share. Which:
    `criterion`, any of `penjing.tensors.criteria` ("obs": what the layers behind can do without, judged on samples).
    With `reconstruct` and samples, the layers that lost inputs are refitted, without labels
    (`penjing.analysis.reconstruct`); `reconstruct="blockwise"` then trains block after block, `block_steps` steps each
    at the rate `block_lr`, towards what the original gives there (`penjing.analysis.blockwise`). Counts are rounded up
    to multiples of `round_to`, with "auto" to the floats of a vector register, in groups that have room for some;
    `min_channels` stay everywhere. `where` selects the layers that make the channels; a group is touched only if all of
    its makers are selected.
    """

    amounts: ClassVar[Mapping[str, str]] = {
        "ratio": "goes",
        "keep_macs": "macs",
        "keep_params": "parameters",
        "keep_bytes": "stays",
        "keep_latency": "stays",
    }

    ratio: float | None = None
    keep_macs: float | None = None
    keep_params: float | None = None
    keep_bytes: float | None = None
    keep_latency: float | None = None
    target: str | None = None
    criterion: str = "l2"
    reconstruct: bool | str = True
    round_to: int | str | None = None
    min_channels: int = 1
    samples: int = 2000
    block_steps: int = 200
    block_lr: float = 2e-3

    def __post_init__(self) -> None:
        self.require_between("ratio", 0, 1, open_high=True)
        for field in ("keep_macs", "keep_params", "keep_latency"):
            self.require_between(field, 0, 1, open_low=True)
        self.require_between("keep_bytes", 0, float("inf"), open_low=True)
        if self.ratio is not None and self._budgets:
            raise RecipeError(
                f"PruneChannels takes either ratio or {self._budgets[0]}, got both",
                hint="ratio is the share of channels that goes; keep_… are shares that stay",
            )
        self.require_one_of("criterion", CRITERIA.names())
        if isinstance(self.round_to, str):
            self.require_one_of("round_to", ("auto",))
        else:
            self.require_between("round_to", 1, float("inf"))
        if self.keep_latency is not None and self.target is None:
            raise RecipeError(
                "PruneChannels.keep_latency needs a target to measure on", hint="for example target='openvino'"
            )
        if self.target is not None:
            Target.parse(self.target)
        self.require_between("min_channels", 1, float("inf"))
        self.require_between("samples", 1, float("inf"))
        self.require_one_of("reconstruct", (True, False, "blockwise"))
        self.require_between("block_steps", 1, float("inf"))
        self.require_between("block_lr", 0, float("inf"), open_low=True)

    def check(self, context: Context) -> None:
        """Criteria may need samples, or labels and a task."""
        require_samples(self.criterion, samples=context.data is not None, labels=context.task is not None)
        require_labels(self.criterion, context)

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
        judged = ranked(
            network,
            context,
            groups,
            self.criterion,
            batches,
            size,
            by_cost=bool(self._budgets),
            refitted=bool(self.reconstruct),
        )
        shrunk = self._shrink(network, judged, size, context.progress)
        refit = self._refit(network, judged, shrunk, batches, context) if self.reconstruct and batches else Refit()
        refitted = tuple(SetWeights(parameter=name, value=value) for name, value in refit.tensors.items())
        notes[:0] = [*shrinkage(size, footprint(shrunk.network)), *shrunk.notes]
        reasons = self._reasons(network, judged, shrunk.counts, refit)
        return Plan(step=self, edits=(*shrunk.removals, *refitted), reasons=reasons, notes=tuple(notes))

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
        most = _BLOCK_BATCH if self.reconstruct == "blockwise" else 100
        return bound_samples(network, context, size, self.samples, notes, most)

    @property
    def _budgets(self) -> list[str]:
        fields = ("keep_macs", "keep_params", "keep_bytes", "keep_latency")
        return [f for f in fields if getattr(self, f) is not None]

    def _shrink(self, network: Network, ranked: Sequence[Ranked], size: Footprint, progress: Progress) -> Shrunk:
        asked = {"macs": self.keep_macs, "parameters": self.keep_params, "bytes": self.keep_bytes}
        wholes = {"macs": size.macs, "parameters": size.parameters, "bytes": stored_bytes(network)}
        limits = {w: keep * (wholes[w] if keep <= 1 else 1) for w, keep in asked.items() if keep is not None}
        groups = [r.group for r in ranked]
        round_to = vector_multiples(groups) if self.round_to == "auto" else cast(int | None, self.round_to)
        costs = list(exact_costs(network, groups, size, limits))
        if self.keep_latency is not None:
            target = Target.parse(cast(str, self.target))
            costs.append(latency_cost(network, groups, target, self.keep_latency, progress))
        if costs:
            return shrink_to(network, ranked, costs, round_to, self.min_channels)
        ratio = 0.5 if self.ratio is None else self.ratio
        return shrink_evenly(network, ranked, ratio, round_to, self.min_channels)

    def _refit(
        self,
        network: Network,
        ranked: Sequence[Ranked],
        shrunk: Shrunk,
        batches: list[dict[str, Tensor]],
        context: Context,
    ) -> Refit:
        """What the layers behind make good of what went."""
        if not shrunk.removals:
            return Refit()
        smaller = [r.group for r in ranked if shrunk.counts[r.group.name] < r.group.size]
        refit = refit_readers(network, shrunk.network, shrunk.removals, smaller, batches, context.progress)
        if self.reconstruct != "blockwise":
            return refit
        fitted = shrunk.network.apply(SetWeights(parameter=n, value=v) for n, v in refit.tensors.items())
        gone = [(e.parameter, e.dim, e.indices) for e in shrunk.removals]
        values = {name: (dim, torch.as_tensor(i)) for name, (dim, i) in kept_values(network.groups(), gone).items()}
        blocks = optimise_blocks(
            network, fitted, values, batches, lr=self.block_lr, steps=self.block_steps, seed=context.seed,
            progress=context.progress,
        )  # fmt: skip
        return Refit({**refit.tensors, **blocks.tensors}, {**refit.errors, **blocks.errors})

    def _reasons(
        self, network: Network, ranked: Sequence[Ranked], counts: Mapping[str, int], refit: Refit
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
