"""Running the part of a graph behind some tensors again and again, with other values in them.

What lies before those tensors is computed once and kept; so many variants of one layer cost what lies behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from penjing.network.network import Network

Values = dict[fx.Node, Any]


class Tails:
    """One network on fixed batches, followed from its inputs to its outputs; `behind` gives the tail at some tensors.

    Tails have to be asked for in the order of `position`: what earlier ones needed is given up on the way.
    """

    def __init__(self, network: Network, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.tensors = network.tensors()
        graph = network.graph_module.graph
        self._nodes = [n for n in graph.nodes if n.op not in ("get_attr", "placeholder")]
        self._place = {n: i for i, n in enumerate(self._nodes)}
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self._values: list[Values] = [{n: batch[n.name] for n in inputs} for batch in batches]
        self._reads: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                self._reads.setdefault(str(node.target), []).append(node)
        self._next = 0

    def position(self, names: Iterable[str]) -> int:
        """Where the graph first reads one of the tensors `names`; the graph's length if it never does."""
        readers = (user for name in names for node in self._reads.get(name, ()) for user in node.users)
        return min((self._place[reader] for reader in readers), default=len(self._nodes))

    @torch.no_grad()
    def behind(self, names: Collection[str]) -> Tail:
        """The part of the graph that the tensors `names` have a say in."""
        start = self.position(names)
        if start < self._next:
            raise ValueError("tails must be asked for in the order of the graph")
        ahead = self._nodes[start:]
        wanted = {source for node in ahead for source in node.all_input_nodes}
        for values in self._values:
            found = _run(self._nodes[self._next : start], values, self.tensors, wanted)
            values.update(found)
            for gone in values.keys() - wanted:
                del values[gone]
        self._next = start
        changed: set[fx.Node] = {node for name in names for node in self._reads.get(name, ())}
        affected = []
        for node in ahead:
            if node.op == "output" or not changed.isdisjoint(node.all_input_nodes):
                changed.add(node)
                affected.append(node)
        beside = [node for node in ahead if node not in changed]
        needed = {source for node in affected for source in node.all_input_nodes}
        return Tail(
            affected,
            [{**values, **_run(beside, values, self.tensors, needed)} for values in self._values],
            self.tensors,
        )


class Tail:
    """The nodes that some tensors have a say in, and everything else that these nodes read."""

    def __init__(self, nodes: Sequence[fx.Node], values: Sequence[Values], tensors: Mapping[str, Tensor]) -> None:
        self._nodes, self._values, self._tensors = nodes, values, tensors

    @torch.no_grad()
    def run(self, batch: int, changed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The flat outputs for one batch with `changed` tensors in place of the network's own."""
        end = self._nodes[-1]
        found = _run(self._nodes, self._values[batch], {**self._tensors, **changed}, {end})
        return tuple(found[end])


def _run(
    nodes: Sequence[fx.Node], given: Mapping[fx.Node, Any], tensors: Mapping[str, Tensor], keep: Collection[fx.Node]
) -> Values:
    """Computes `nodes` in order from `given` values; returns those in `keep`, and drops the others when they are read
    for the last time."""
    found: Values = {}
    last = {source: node for node in nodes for source in node.all_input_nodes}
    ends: dict[fx.Node, list[fx.Node]] = {}
    for source, reader in last.items():
        ends.setdefault(reader, []).append(source)

    def load(source: fx.Node) -> Any:
        if source.op == "get_attr":
            return tensors[str(source.target)]
        return found[source] if source in found else given[source]

    for node in nodes:
        args, kwargs = fx.node.map_arg(node.args, load), fx.node.map_arg(node.kwargs, load)
        function: Any = node.target
        found[node] = args[0] if node.op == "output" else function(*args, **kwargs)
        for gone in ends.get(node, ()):
            if gone not in keep:
                found.pop(gone, None)
    return {node: value for node, value in found.items() if node in keep}
