"""How many units every group keeps: uniform, greedy under a model of what a network costs, or along error curves."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Counts = Mapping[str, int]  #: group → units that stay
Rounding = int | Mapping[str, int] | None  #: the multiple that counts end on: one for all groups, or by group


class Part(Protocol):
    """A part of a cost that depends on the groups in `owners`, by dimension: (group, entries a unit)."""

    @property
    def owners(self) -> Mapping[int, tuple[tuple[str, int], ...]]: ...

    def cost(self, gone: Mapping[str, int]) -> float:
        """The cost left when `gone[group]` units have left."""
        ...


@dataclass(frozen=True)
class Share:
    """A tensor's part in a cost: it costs `base` while whole, and shrinks by the product over its dimensions of the
    entries that are left. `owners[d]` lists (group, entries a unit) of dimension d; `sizes[d]` is its length."""

    base: float
    sizes: tuple[int, ...]
    owners: Mapping[int, tuple[tuple[str, int], ...]]

    def cost(self, gone: Mapping[str, int]) -> float:
        """The cost left when `gone[group]` units have left."""
        left = self.base
        for dim, owners in self.owners.items():
            left *= 1 - sum(gone.get(group, 0) * entries for group, entries in owners) / self.sizes[dim]
        return left


@dataclass(frozen=True)
class CostModel:
    """A cost as a function of the units that stay: a constant and a sum of parts."""

    constant: float
    shares: Sequence[Part]
    _by_group: dict[str, list[Part]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for share in self.shares:
            for group in {g for owners in share.owners.values() for g, _ in owners}:
                self._by_group.setdefault(group, []).append(share)

    def total(self, gone: Mapping[str, int]) -> float:
        """The cost of the whole network when `gone[group]` units have left."""
        return self.constant + sum(share.cost(gone) for share in self.shares)

    def saving(self, gone: Mapping[str, int], group: str, more: int) -> float:
        """What is saved by taking `more` units out of `group`."""
        after = {**gone, group: gone.get(group, 0) + more}
        return sum(share.cost(gone) - share.cost(after) for share in self._by_group.get(group, ()))


def rounded(count: int, size: int, round_to: int | None, minimum: int) -> int:
    """`count` raised to `minimum` and to the next multiple of `round_to`, at most `size`."""
    count = max(count, min(minimum, size))
    if round_to:
        count = -(-count // round_to) * round_to
    return min(count, size)


def multiple(round_to: Rounding, group: str) -> int:
    """The multiple that the count of a group ends on."""
    return max(1, round_to.get(group, 1) if isinstance(round_to, Mapping) else round_to or 1)


def uniform(sizes: Counts, ratio: float, round_to: Rounding, minimum: int) -> dict[str, int]:
    """Every group gives up the share `ratio` of its units."""
    return {g: rounded(round(size * (1 - ratio)), size, multiple(round_to, g), minimum) for g, size in sizes.items()}


def greedy(
    sizes: Counts,
    errors: Mapping[str, Sequence[float]],
    models: Sequence[tuple[CostModel, float]],
    round_to: Rounding,
    minimum: int,
) -> dict[str, int]:
    """Take units one step at a time where the error rises least for what is saved, until every cost is at its limit.

    `errors[group][i]` is the error with i units gone (not falling); `models` are (cost, limit) pairs, and a saving
    counts relative to what each cost has to lose in all, and the more of that is left the more. Groups shrink in
    steps that end on multiples of `round_to`; steps that save nothing by themselves (the flat of a staircase) are taken
    together with the next. What the last steps took too much is given back (`refill`). Stops early
    when nothing is left to take; the caller sees by the model whether the limits were reached.
    """
    gone = dict.fromkeys(sizes, 0)
    totals = [model.total(gone) for model, _ in models]
    starts = list(totals)

    def excess() -> list[float]:
        return [
            max(0.0, (total - limit) / max(start - limit, 1e-12))
            for total, start, (_, limit) in zip(totals, starts, models, strict=True)
        ]

    def offer(group: str) -> tuple[float, int] | None:
        left = sizes[group] - gone[group]
        each = multiple(round_to, group)
        now = excess()
        most = max(now)
        after, saved = left, 0.0
        while saved <= 0:
            after = (after - 1) // each * each
            if after < max(minimum, each):
                return None
            saved = sum(
                over / most * model.saving(gone, group, left - after) / max(start - limit, 1e-12)
                for (model, limit), start, over in zip(models, starts, now, strict=True)
                if over > 0
            )
        more = left - after
        curve = errors[group]
        rise = curve[min(gone[group] + more, len(curve) - 1)] - curve[gone[group]]
        return max(rise, 0.0) / saved, more

    heap: list[tuple[float, str]] = [(0.0, g) for g in sizes]
    heapq.heapify(heap)
    while heap and any(over > 0 for over in excess()):
        # Lazily: a neighbour's shrinking changes what a group would save, so every price is looked at again when it
        # wins.
        _, group = heapq.heappop(heap)
        now = offer(group)
        if now is None:
            continue
        if heap and now[0] > heap[0][0]:
            heapq.heappush(heap, (now[0], group))
            continue
        gone[group] += now[1]
        totals = [model.total(gone) for model, _ in models]
        heapq.heappush(heap, (now[0], group))
    return refill(sizes, {g: sizes[g] - gone[g] for g in sizes}, errors, models, round_to)


def refill(
    sizes: Counts,
    kept: Counts,
    errors: Mapping[str, Sequence[float]],
    models: Sequence[tuple[CostModel, float]],
    round_to: Rounding,
) -> dict[str, int]:
    """Give units back for as long as one step of any group fits into every limit: a large unit may have saved too much.

    First the step that spares most error for the part of the free cost that it takes; arguments as for `greedy`.
    """
    gone = {g: size - kept[g] for g, size in sizes.items()}
    while True:
        free = [limit - model.total(gone) for model, limit in models]
        best: tuple[float, str, int] | None = None
        for group in sorted(sizes):
            left = sizes[group] - gone[group]
            each = multiple(round_to, group)
            after = min((left // each + 1) * each, sizes[group])
            trial = {**gone, group: sizes[group] - after}
            costs = [model.saving(trial, group, after - left) for model, _ in models]
            if after == left or any(cost > room for cost, room in zip(costs, free, strict=True)):
                continue
            curve = errors[group]
            spared = curve[min(gone[group], len(curve) - 1)] - curve[min(trial[group], len(curve) - 1)]
            share = sum(cost / room for cost, room in zip(costs, free, strict=True) if cost > 0)
            worth = max(spared, 0.0) / max(share, 1e-12)
            if best is None or worth > best[0]:
                best = worth, group, trial[group]
        if best is None:
            return {g: size - gone[g] for g, size in sizes.items()}
        gone[best[1]] = best[2]


def along_curves(curves: Mapping[str, Sequence[tuple[int, float]]], gone: int) -> dict[str, int]:
    """How many entries each tensor gives up so that `gone` go in all and the summed error rises least.

    `curves[name]` are (entries gone, error) points, both rising, the last with all that may go; between them errors are
    taken to rise evenly. Every curve is followed on its lower hull, the flattest pieces first.
    """
    pieces = []
    for name, points in curves.items():
        hull: list[tuple[int, float]] = [(0, 0.0)]
        for point in sorted(p for p in points if p[0] > 0):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        pieces += [(_slope(a, b), b[0] - a[0], name) for a, b in zip(hull, hull[1:], strict=False)]
    taken = dict.fromkeys(curves, 0)
    for _, entries, name in sorted(pieces):
        taken[name] += min(entries, gone)
        gone -= min(entries, gone)
    return taken


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else float("inf")
