"""How many units every channel group keeps, so that the shrunk network really costs what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from penjing.analysis.costs import Cost
from penjing.analysis.ranking import Ranked
from penjing.errors import RecipeError
from penjing.network import Network, RemoveChannels
from penjing.network.channels.groups import Group
from penjing.tensors.allocation import CostModel, Rounding, greedy, refill, uniform

#: Whole networks that are exported and timed before a budget counts as out of reach.
_ATTEMPTS = 6
#: The share of a timed limit that is aimed at when correcting, and the least share with which one is content.
_AIM, _NEARLY = 0.98, 0.95


@dataclass(frozen=True)
class Shrunk:
    """What goes (`removals`), the units that stay by group (`counts`), the network without them, and what was measured
    on the way (`notes`)."""

    removals: list[RemoveChannels]
    counts: dict[str, int]
    network: Network
    notes: tuple[str, ...] = ()


def shrink_evenly(network: Network, ranked: Sequence[Ranked], ratio: float, round_to: Rounding, least: int) -> Shrunk:
    """Every group loses the share `ratio` of its units, but keeps at least `least`."""
    counts = uniform({r.group.name: r.group.size for r in ranked}, ratio, round_to, least)
    removals = removals_of(ranked, counts)
    return Shrunk(removals, counts, network.apply(removals))


def shrink_to(
    network: Network, ranked: Sequence[Ranked], costs: Sequence[Cost], round_to: Rounding, least: int
) -> Shrunk:
    """Shrinks until every one of `costs` keeps its limit on the real network.

    Groups with a measured sensitivity shrink where it hurts least, otherwise all by the same share; at least `least`
    units of each stay. A timed cost is measured on whole networks, and what the model is asked for is corrected by what
    came out, until it holds and little is left unused. Raises RecipeError, naming what could be reached, if the limits
    are out of reach.
    """
    exact, timed = [c for c in costs if not c.timed], [c for c in costs if c.timed]
    aims = {c.what: c.limit for c in timed}
    if not timed:
        return _hold(network, ranked, exact, [], aims, round_to, least)
    best: tuple[float, Shrunk] | None = None
    reached: dict[tuple[int, ...], float] = {}
    said: tuple[str, ...] = ()
    for _ in range(4 * _ATTEMPTS):
        shrunk = _hold(network, ranked, exact, timed, aims, round_to, least)
        key = tuple(shrunk.counts[r.group.name] for r in ranked)
        if key in reached:
            if best is not None:
                break
            aims = {what: aim * 0.9 for what, aim in aims.items()}
            continue
        if len(reached) == _ATTEMPTS:
            break
        gone = {r.group.name: r.group.size - shrunk.counts[r.group.name] for r in ranked}
        predicted = {c.what: c.model.total(gone) for c in timed}
        now = {c.what: c.measure(shrunk.network) for c in timed}
        fullest = reached[key] = max(now[c.what] / c.limit for c in timed)
        if fullest == min(reached.values()):
            said = tuple(c.share(now[c.what]) for c in timed)
        if fullest <= 1 and (best is None or fullest > best[0]):
            notes = tuple(
                f"{c.share(now[c.what])} measured, {predicted[c.what] / c.whole:.1%} predicted; "
                f"at most {c.limit / c.whole:.1%} was asked for"
                for c in timed
            )
            best = fullest, replace(shrunk, notes=notes)
        if _NEARLY <= fullest <= 1:
            break
        # What the model said of this network stands for what was measured.
        aims = {c.what: predicted[c.what] * _AIM * c.limit / now[c.what] for c in timed}
    if best is not None:
        return best[1]
    raise _out_of_reach(network, ", ".join(said))


def _hold(
    network: Network,
    ranked: Sequence[Ranked],
    exact: Sequence[Cost],
    timed: Sequence[Cost],
    aims: Mapping[str, float],
    round_to: Rounding,
    least: int,
) -> Shrunk:
    """Shrinks until the exact costs keep their limits on the real network, and the timed ones their aims by model."""
    sizes = {r.group.name: r.group.size for r in ranked}
    limits = [(c.model, c.limit) for c in exact] + [(c.model, aims[c.what]) for c in timed]
    over: dict[str, float] = {}
    for _ in range(8):
        counts = _allocate(ranked, sizes, limits, round_to, least)
        pruned = network.apply(removals_of(ranked, counts))
        over = {c.what: c.measure(pruned) / c.limit for c in exact}
        if all(o <= 1 for o in over.values()):
            counts, pruned = _give_back(network, ranked, exact, timed, aims, counts, pruned, round_to)
            return Shrunk(removals_of(ranked, counts), counts, pruned)
        # The model leaves out what attention and the like save or keep; aim lower by what was missed.
        limits[: len(exact)] = [
            (m, limit * min(1.0, 0.998 / over[c.what]))
            for (m, limit), c in zip(limits[: len(exact)], exact, strict=True)
        ]
    raise _out_of_reach(network, ", ".join(c.share(over[c.what] * c.limit) for c in exact))


def _out_of_reach(network: Network, said: str) -> RecipeError:
    return RecipeError(
        f"PruneChannels cannot bring {network.name} down to what is asked; the least it can leave is {said}",
        hint="ask for less, widen 'where', or lower min_channels and round_to",
    )


def _give_back(
    network: Network,
    ranked: Sequence[Ranked],
    exact: Sequence[Cost],
    timed: Sequence[Cost],
    aims: Mapping[str, float],
    counts: dict[str, int],
    pruned: Network,
    round_to: Rounding,
) -> tuple[dict[str, int], Network]:
    """Units come back for what the shrunk network really saves beyond the model: attention."""
    if any(r.sensitivity is None for r in ranked):
        return counts, pruned  # all groups lose the same share
    sizes = {r.group.name: r.group.size for r in ranked}
    curves = {r.group.name: r.errors for r in ranked}
    part = 1.0
    for _ in range(8):
        gone = {g: sizes[g] - kept for g, kept in counts.items()}
        room = [(c.model, c.model.total(gone) + part * (c.limit - c.measure(pruned))) for c in exact]
        room += [(c.model, aims[c.what]) for c in timed]
        more = refill(sizes, counts, curves, room, round_to)
        if more == counts:
            break
        trial = network.apply(removals_of(ranked, more))
        if all(c.measure(trial) <= c.limit for c in exact):
            counts, pruned = more, trial
        else:
            part /= 2  # what came back costs more than the model says
    return counts, pruned


def _allocate(
    ranked: Sequence[Ranked],
    sizes: Mapping[str, int],
    limits: Sequence[tuple[CostModel, float]],
    round_to: Rounding,
    least: int,
) -> dict[str, int]:
    if all(r.sensitivity is not None for r in ranked):
        return greedy(sizes, {r.group.name: r.errors for r in ranked}, limits, round_to, least)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        counts = uniform(sizes, middle, round_to, least)
        gone = {g: sizes[g] - kept for g, kept in counts.items()}
        low, high = (low, middle) if all(m.total(gone) <= limit for m, limit in limits) else (middle, high)
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


def vector_multiples(groups: Sequence[Group]) -> dict[str, int]:
    """For each group the multiple its count should end on: as many floats as fit a vector register (AVX-512 16, AVX2
    and others 8), half or a quarter of that in groups that would have fewer than four steps."""
    most = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    fitting = {g.name: [m for m in (most, most // 2, most // 4) if 4 * m <= g.size * _channels(g)] for g in groups}
    return {g.name: max(1, (fitting[g.name] or [1])[0] // _channels(g)) for g in groups}


def _channels(group: Group) -> int:
    """Channels a unit."""
    return int((group.producers or group.members)[0].indices.shape[1])
