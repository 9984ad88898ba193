"""PruneHeads: fewer attention heads, whole ones, and the projections behind them refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from penjing.analysis.footprint import Footprint, footprint, shrinkage
from penjing.analysis.ranking import Ranked
from penjing.analysis.reconstruct import Refit, refit_readers
from penjing.analysis.shrinking import Shrunk, removals_of, shrink_evenly
from penjing.errors import RecipeError
from penjing.network import Network, SetWeights
from penjing.network.channels.groups import Group
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.samples import bound_samples, ranked, require_labels
from penjing.tensors.allocation import CostModel, Share, greedy
from penjing.tensors.criteria import CRITERIA, ELIMINATION, require_samples

_SCOPES = ("layer", "global")


@step
@dataclass(frozen=True, kw_only=True)
class PruneHeads(Step):
    """Remove the attention heads that matter least (Michel et al. 2019, "Are sixteen heads really better than one?").

    The share `ratio` of the heads goes: of every layer's, or, with `scope="global"`, of all together, where the outputs
    suffer least (without samples: where a head is weakest beside the others of its layer). Which: `criterion`, any of
    `penjing.tensors.criteria`; "taylor" is what the paper uses. Where several queries share keys and values, a
    key-value head goes with all queries that ask it. With `reconstruct` and samples, the output projections are
    refitted by least squares, without labels (`penjing.analysis.reconstruct`). `min_heads` stay in each layer. `where`
    selects the layers that make queries, keys and values; heads are touched only if all of their makers are selected.
    """

    amounts: ClassVar[Mapping[str, str]] = {"ratio": "goes"}

    ratio: float = 0.5
    criterion: str = "l2"
    scope: str = "layer"
    reconstruct: bool = True
    samples: int = 1000
    min_heads: int = 1

    def __post_init__(self) -> None:
        self.require_between("ratio", 0, 1, open_high=True)
        self.require_one_of("criterion", CRITERIA.names())
        self.require_one_of("scope", _SCOPES)
        self.require_one_of("reconstruct", (True, False))
        self.require_between("samples", 1, float("inf"))
        self.require_between("min_heads", 1, float("inf"))

    def check(self, context: Context) -> None:
        """Criteria may need samples, or labels and a task."""
        require_samples(self.criterion, samples=context.data is not None, labels=context.task is not None)
        require_labels(self.criterion, context)

    def plan(self, network: Network, context: Context) -> Plan:
        """Decides on the heads and refits what reads them."""
        self.check(context)
        if network.is_quantized:
            raise RecipeError(
                "PruneHeads cannot change a network that is already quantized", hint="put PruneHeads before Quantize"
            )
        groups = [g for g in network.groups() if self._selected(g)]
        if not groups:
            raise RecipeError(
                f"there are no attention heads of {network.name} that PruneHeads(where={self.where!r}) may remove",
                hint="it takes layers with several heads, several key-value heads where those are shared; "
                "print(network.groups()) lists what can be removed",
            )
        notes: list[str] = []
        size = footprint(network)
        batches = self._samples(network, context, size, notes)
        judged = ranked(
            network,
            context,
            groups,
            self.criterion,
            batches,
            size,
            by_cost=self.scope == "global",
            refitted=self.reconstruct,
        )
        shrunk = self._shrink(network, judged)
        refit = self._refit(network, judged, shrunk, batches, context)
        refitted = tuple(SetWeights(parameter=name, value=value) for name, value in refit.tensors.items())
        had, kept = sum(g.size for g in groups), sum(shrunk.counts.values())
        notes[:0] = [
            f"heads {had} → {kept}",
            *shrinkage(size, footprint(shrunk.network)),
        ]
        reasons = tuple(self._reason(r, shrunk.counts[r.group.name], refit) for r in judged)
        return Plan(step=self, edits=(*shrunk.removals, *refitted), reasons=reasons, notes=tuple(notes))

    def _selected(self, group: Group) -> bool:
        makers = group.producers or group.members
        return group.heads and group.size > 1 and all(matches(self.where, m.parameter) for m in makers)

    def _samples(
        self, network: Network, context: Context, size: Footprint, notes: list[str]
    ) -> list[dict[str, Tensor]]:
        """Bound inputs to judge and refit on; none without data."""
        if context.data is None:
            if self.reconstruct:
                notes.append("no samples were given: output projections keep their other weights as they were")
            if self.criterion == ELIMINATION:
                notes.append("no samples were given: criterion 'obs' judges by 'l2' instead")
            return []
        return bound_samples(network, context, size, self.samples, notes)

    def _shrink(self, network: Network, ranked: Sequence[Ranked]) -> Shrunk:
        if self.scope == "layer":
            return shrink_evenly(network, ranked, self.ratio, None, self.min_heads)
        sizes = {r.group.name: r.group.size for r in ranked}
        heads = CostModel(0.0, [Share(n, (n,), {0: ((g, 1),)}) for g, n in sizes.items()])
        left = sum(sizes.values()) - round(self.ratio * sum(sizes.values()))
        counts = greedy(sizes, {r.group.name: r.errors for r in ranked}, [(heads, left)], None, self.min_heads)
        removals = removals_of(ranked, counts)
        return Shrunk(removals, counts, network.apply(removals))

    def _refit(
        self,
        network: Network,
        ranked: Sequence[Ranked],
        shrunk: Shrunk,
        batches: list[dict[str, Tensor]],
        context: Context,
    ) -> Refit:
        if not (self.reconstruct and batches and shrunk.removals):
            return Refit()
        smaller = [r.group for r in ranked if shrunk.counts[r.group.name] < r.group.size]
        return refit_readers(network, shrunk.network, shrunk.removals, smaller, batches, context.progress)

    def _reason(self, r: Ranked, kept: int, refit: Refit) -> Reason:
        size = r.group.size
        why = self.criterion
        if r.sensitivity is not None:
            why = f"output error {r.sensitivity:.3g} without half of them"
        if gone := sorted(r.order[: size - kept]):
            why += f"; without {', '.join(map(str, gone))}"
        fitted = [refit.errors[m.parameter] for m in r.group.consumers if m.parameter in refit.errors]
        if fitted:
            why += f"; projection refitted, error {max(f[0] for f in fitted):.3g} → {max(f[1] for f in fitted):.3g}"
        return Reason(layer=r.group.name, score=r.sensitivity, choice=f"{kept}/{size} heads kept", why=why)
