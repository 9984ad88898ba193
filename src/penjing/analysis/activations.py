"""What the units of channel groups do on samples: statistics of the values they make, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from penjing.analysis.lane import Lane
from penjing.network.channels.groups import Group, Groups
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.tensors.criteria import Activity

#: Operators that only move, pick or pool what was made before them.
_MOVES = frozenset(
    "view reshape flatten unflatten permute transpose t contiguous clone squeeze unsqueeze expand dropout "
    "feature_dropout alpha_dropout max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d mean slice select "
    "_unsafe_view".split()
)
#: Multiplications that the ranks of one value's maps may take: samples × channels × height × width × the smaller.
_RANK_WORK = 1e8


@dataclass
class _Tally:
    """Running sums over the values of one node, by position along `dim`."""

    dim: int
    ranks: bool
    count: int = 0
    maps: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, 1, dtype=torch.float64))
    rank: Tensor | None = None

    def add(self, value: Tensor) -> None:
        others = [d for d in range(value.ndim) if d != self.dim]
        self.count += value.numel() // max(value.shape[self.dim], 1)
        size = value.abs()
        # Squares are summed in float64: their sum cancels against the mean's square.
        parts = (value.sum(others, dtype=torch.float64), size.sum(others, dtype=torch.float64),
                 value.double().square().sum(others), (size == 0).sum(others).double())  # fmt: skip
        self.sums = self.sums + torch.stack(parts)
        if self.ranks and value.ndim > 3 and self.dim > 0:
            self._add_ranks(value.movedim(self.dim, 1).flatten(3).float())

    def _add_ranks(self, maps: Tensor) -> None:
        _, channels, high, wide = maps.shape
        most = max(4, int(_RANK_WORK / max(channels * high * wide * min(high, wide), 1)))
        chosen = maps[: max(0, most - self.maps)]
        if min(high, wide) > 1 and len(chosen):
            self.maps += len(chosen)
            found = torch.linalg.matrix_rank(chosen).sum(0).double()
            self.rank = found if self.rank is None else self.rank + found


@torch.no_grad()
def watch_values(
    network: Network,
    groups: Sequence[Group],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    ranks: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Activity]:
    """The Activity of the units of `groups` (some of `network.groups()`) on `batches` (bound inputs), by group.

    Looked at are the values that layers outside of the group read, before they are pooled, moved or reshaped: behind
    the norm or the nonlinearity, if there is one; the statistics of several such values are averaged. A unit of several
    positions (a head) has the mean of its positions. Groups that make no value of floating point are left out.
    """
    analysed = network.groups()
    made = made_by(network, groups)
    names = [n.name for n in network.graph_module.graph.nodes if any(n.name in found for found in made.values())]
    tallies = {name: _Tally(analysed.solution.axes[name][0], ranks) for name in names}
    with progress.task("watching channels", len(batches)) as advance:
        for batch in batches:
            lane = Lane(network, [batch])
            for name in names:
                (value,) = lane.value(name)
                if isinstance(value, Tensor) and value.is_floating_point():
                    tallies[name].add(value)
            advance(1)
    seen = {}
    for group in groups:
        parts = [
            _by_unit(tallies[n], group, analysed.solution.axes[n][1]) for n in made[group.name] if tallies[n].count
        ]
        if parts:
            mean, magnitude, square, zeros = torch.stack([sums for sums, _ in parts]).mean(0)
            known = [rank for _, rank in parts if rank is not None]
            deviation = (square - mean.square()).clamp_min(0).sqrt()
            rank = torch.stack(known).mean(0) if known else None
            seen[group.name] = Activity(mean, magnitude, deviation, zeros, rank)
    return seen


def made_by(network: Network, groups: Sequence[Group]) -> dict[str, list[str]]:
    """For each group the graph nodes that hold its units' values as layers outside of the group read them."""
    analysed = network.groups()
    owner = np.full(len(analysed.solution.classes), -1)
    for number, group in enumerate(groups):
        owner[group.classes] = number
    holds = _holders(network, analysed, owner)
    found: dict[str, list[str]] = {}
    for number, group in enumerate(groups):
        inside = {node for node, numbers in holds.items() if number in numbers}
        reading = {m.parameter for m in group.consumers}
        ends = [n for n in inside if any(_reads(u, reading) or (u not in inside and _looks(u)) for u in n.users)]
        origins = {_origin(node, inside) for node in ends}
        found[group.name] = sorted(n.name for n in origins)
    return found


def _holders(network: Network, analysed: Groups, owner: NDArray[np.int64]) -> dict[fx.Node, set[int]]:
    """The activations that hold units of groups, and which groups."""
    holds: dict[fx.Node, set[int]] = {}
    moving: set[fx.Node] = set()  # depends on the inputs: no product of parameters
    for node in network.graph_module.graph.nodes:
        if node.op == "placeholder" or any(s in moving for s in node.all_input_nodes):
            moving.add(node)
        axis = analysed.solution.axes.get(node.name)
        if axis is not None and node.op == "call_function" and node in moving and node.name in analysed.shapes:
            numbers = set(owner[np.unique(axis[1])].tolist()) - {-1}
            if numbers:
                holds[node] = numbers
    return holds


def _reads(node: fx.Node, weights: Collection[str]) -> bool:
    """Whether a node multiplies its input with one of these (its output may be a channel of the same group again)."""
    return any(s.op == "get_attr" and s.target in weights for s in node.all_input_nodes)


def _looks(node: fx.Node) -> bool:
    """Whether a node looks at its inputs' values, not at their sizes alone."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target is not torch.ops.aten.sym_size.int


def _origin(node: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """Back over what only moves or pools."""
    while str(getattr(node.target, "__name__", "")).split(".")[0] in _MOVES:
        before = [s for s in node.all_input_nodes if s in inside]
        if len(before) != 1:
            break
        node = before[0]
    return node


def _by_unit(tally: _Tally, group: Group, classes: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
    """Means by unit, (4, units), from sums by position; and the units' ranks."""
    place = {int(c): u for u, c in enumerate(group.classes)}
    units = torch.tensor([place.get(int(c), -1) for c in classes])
    ours = units >= 0
    per_unit = torch.zeros(group.size, dtype=torch.float64).index_add_(
        0, units[ours], torch.ones(int(ours.sum())).double()
    )

    def mean(values: Tensor) -> Tensor:
        total = torch.zeros(*values.shape[:-1], group.size, dtype=torch.float64)
        return total.index_add_(-1, units[ours], values[..., ours]) / per_unit.clamp_min(1)

    rank = mean(tally.rank / tally.maps) if tally.rank is not None else None
    return mean(tally.sums / tally.count), rank
