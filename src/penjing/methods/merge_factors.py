"""MergeFactors: layers that follow each other with nothing in between become one, where that is smaller or faster."""

from __future__ import annotations

from dataclasses import dataclass

from penjing.analysis.chains import Chain, apart, as_one, find_chains
from penjing.analysis.footprint import footprint, shrinkage
from penjing.errors import RecipeError
from penjing.network import Network, ReplaceLayer
from penjing.network import graph as flat
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.runtimes import Target
from penjing.runtimes.layer_latency import latency_of_each


@step
@dataclass(frozen=True, kw_only=True)
class MergeFactors(Step):
    """Multiply the factors of chains into one layer each: what `Factorize` took apart, or was made like that.

    Chains are linear layers, an embedding and linear layers, or convolutions, that nothing else reads in between; the
    network computes the same, up to rounding. A chain becomes one layer where that has no more weights; with a
    `target`, where it is no slower there, each measured by itself for one sample; with `always`, everywhere. `where`
    selects weights; all of a chain must be selected.
    """

    always: bool = False
    target: str | None = None

    def __post_init__(self) -> None:
        self.require_one_of("always", (True, False))
        if self.target is not None:
            Target.parse(self.target)

    def plan(self, network: Network, context: Context) -> Plan:
        """Decides by size or time; a reason for every chain."""
        if network.is_quantized:
            raise RecipeError(
                "MergeFactors cannot change a network that is already quantized",
                hint="put MergeFactors before Quantize",
            )
        chains = [c for c in find_chains(network) if all(matches(self.where, w) for w in c.weights)]
        edits = {c: as_one(network, c) for c in chains}
        tensors, taken = network.tensors(), dict[str, tuple[float, float]]()
        if self.target is not None and not self.always and chains:
            taken = self._taken(network, chains, context)
        reasons, wanted, merged = list[Reason](), list[ReplaceLayer](), 0
        for chain, own in edits.items():
            name = next(iter(own[0].tensors))
            before, after = sum(tensors[w].numel() for w in chain.weights), own[0].tensors[name].numel()
            why = f"weights {before:,} → {after:,}"
            good = after <= before
            if name in taken:
                one, several = taken[name]
                good, why = one <= several, f"{why}; {several:.3g} ms → {one:.3g} ms on {self.target}"
            if good or self.always:
                wanted += own
                merged += 1
            reasons.append(Reason(layer=name, choice="merged" if good or self.always else "stays a chain", why=why))
        size = footprint(network)
        notes = (f"{merged} of {len(chains)} chains merged", *shrinkage(size, footprint(network.apply(wanted))))
        return Plan(step=self, edits=tuple(wanted), reasons=tuple(reasons), notes=notes)

    def _taken(self, network: Network, chains: list[Chain], context: Context) -> dict[str, tuple[float, float]]:
        """Milliseconds as one layer and as a chain, by the weight of the one layer; tables are left out."""
        chains = [c for c in chains if not c.looking]
        edits = [as_one(network, c)[0] for c in chains]
        tensors = network.tensors()
        ways = {
            next(iter(edit.tensors)): tuple(
                (flat.target_name(n.target), tuple(tensors[w].shape), tuple(n.args[3:]))
                for n, w in zip(chain.nodes, chain.weights, strict=True)
            )
            for edit, chain in zip(edits, chains, strict=True)
        }
        return latency_of_each(network.apply(edits), ways, apart, Target.parse(str(self.target)), context.progress)


__all__ = ["MergeFactors"]
