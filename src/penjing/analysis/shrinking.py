"""How many units every channel group keeps, so that the shrunk network really costs what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from penjing.analysis.costs import cost_models
from penjing.analysis.footprint import Footprint, footprint
from penjing.analysis.ranking import Ranked
from penjing.errors import RecipeError
from penjing.network import Network, RemoveChannels
from penjing.tensors.allocation import CostModel, greedy, refill, uniform


@dataclass(frozen=True)
class Shrunk:
    """What goes (`removals`), the units that stay by group (`counts`), and the network without them."""

    removals: list[RemoveChannels]
    counts: dict[str, int]
    network: Network


def shrink_evenly(network: Network, ranked: Sequence[Ranked], ratio: float, round_to: int | None, least: int) -> Shrunk:
    """Every group loses the share `ratio` of its units, but keeps at least `least`."""
    counts = uniform({r.group.name: r.group.size for r in ranked}, ratio, round_to, least)
    removals = removals_of(ranked, counts)
    return Shrunk(removals, counts, network.apply(removals))


def shrink_to(
    network: Network,
    ranked: Sequence[Ranked],
    size: Footprint,
    asked: Sequence[tuple[str, float]],
    round_to: int | None,
    least: int,
) -> Shrunk:
    """Shrinks until every cost in `asked`, pairs of ("macs" or "parameters", limit), holds for the real network.

    Groups with a measured sensitivity shrink where it hurts least, otherwise all by the same share; at least `least`
    units of each stay. Raises RecipeError, naming what could be reached, if the limits are out of reach.
    """
    sizes = {r.group.name: r.group.size for r in ranked}
    limits = dict(asked)
    models = cost_models(network, [r.group for r in ranked], size)
    for _ in range(8):
        counts = _allocate(ranked, sizes, models, limits, round_to, least)
        pruned = network.apply(removals_of(ranked, counts))
        now = footprint(pruned)
        over = {what: getattr(now, what) / limit for what, limit in asked}
        if all(o <= 1 for o in over.values()):
            counts, pruned = _give_back(network, ranked, models, asked, counts, pruned, round_to)
            return Shrunk(removals_of(ranked, counts), counts, pruned)
        # The model leaves out what attention and the like save or keep; aim lower by what was missed.
        limits = {what: limits[what] * min(1.0, 0.998 / over[what]) for what in limits}
    reached = {what: getattr(now, what) / getattr(size, what) for what, _ in asked}
    said = ", ".join(f"{what} {share:.1%}" for what, share in reached.items())
    raise RecipeError(
        f"PruneChannels cannot bring {network.name} down to what is asked; the least it can leave is {said}",
        hint="ask for less, widen 'where', or lower min_channels and round_to",
    )


def _give_back(
    network: Network,
    ranked: Sequence[Ranked],
    models: Mapping[str, CostModel],
    asked: Sequence[tuple[str, float]],
    counts: dict[str, int],
    pruned: Network,
    round_to: int | None,
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
        more = refill(sizes, counts, curves, room, round_to)
        if more == counts:
            break
        trial = network.apply(removals_of(ranked, more))
        if all(getattr(footprint(trial), w) <= limit for w, limit in asked):
            counts, pruned = more, trial
        else:
            part /= 2  # what came back costs more than the model says
    return counts, pruned


def _allocate(
    ranked: Sequence[Ranked],
    sizes: Mapping[str, int],
    models: Mapping[str, CostModel],
    limits: Mapping[str, float],
    round_to: int | None,
    least: int,
) -> dict[str, int]:
    if all(r.sensitivity is not None for r in ranked):
        curves = {r.group.name: r.errors for r in ranked}
        return greedy(sizes, curves, [(models[w], limit) for w, limit in limits.items()], round_to, least)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        counts = uniform(sizes, middle, round_to, least)
        gone = {g: sizes[g] - kept for g, kept in counts.items()}
        low, high = (
            (low, middle) if all(models[w].total(gone) <= limit for w, limit in limits.items()) else (middle, high)
        )
    return uniform(sizes, high, round_to, least)


def removals_of(ranked: Sequence[Ranked], counts: Mapping[str, int]) -> list[RemoveChannels]:
    """The Edits that take the first units of each group's order until `counts` are left."""
    edits = []
    for r in ranked:
        going = r.order[: r.group.size - counts[r.group.name]]
        member = (r.group.producers or r.group.members)[0]
        if going:
            indices = tuple(sorted(int(i) for i in np.unique(member.indices[going])))
            edits.append(RemoveChannels(parameter=member.parameter, dim=member.dim, indices=indices))
    return edits
