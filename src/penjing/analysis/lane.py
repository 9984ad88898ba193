"""Running a graph piece by piece over many batches at once, with tensors that may change on the way.

A Lane keeps only the values that are still to be read, so that a network can be followed from its inputs to its outputs
in a single pass while something is done at many of its nodes: layers fitted, ranges collected, errors compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from penjing.network.network import Network

#: What the nodes named (None: all that read a value) get instead of the value.
View = tuple[tuple[str, ...] | None, Callable[[Tensor], Tensor]]


class Lane:
    """The values of one network on fixed batches, computed on demand.

    `tensors` (name → tensor) are what the graph reads; change an entry and everything computed afterwards uses the new
    one (a node already computed is not computed again). Values in `hold` stay until `release`. `views` (by the node
    whose value they change) stand between a value and the nodes that read it, as quantizers do.
    """

    def __init__(
        self,
        network: Network,
        batches: Sequence[Mapping[str, Tensor]],
        hold: Iterable[str] = (),
        views: Mapping[str, Sequence[View]] | None = None,
    ) -> None:
        self.tensors = network.tensors()
        self._batches = batches
        self._nodes = {n.name: n for n in network.graph_module.graph.nodes}
        self._depends = _dependencies(network.graph_module.graph)
        self._place = {n: i for i, n in enumerate(self._nodes.values())}
        self._hold = set(hold)
        self._views = views or {}
        self._held: dict[str, list[Any]] = {}
        self._values: dict[fx.Node, list[Any]] = {}
        self._unread = {n: len(n.users) for n in self._nodes.values()}
        self._done: set[fx.Node] = set()

    @torch.no_grad()
    def value(self, name: str) -> list[Any]:
        """The value of node `name`, one a batch. It must not have been given up already: hold it, or ask in time."""
        node = self._nodes[name]
        if name in self._held:
            return self._held[name]
        if node.op == "get_attr":
            return [self.tensors[str(node.target)]] * len(self._batches)
        for pending in self._pending(node):
            self._compute(pending)
        return self._held[name] if name in self._held else self._values[node]

    def seen(self, name: str, by: str) -> list[Any]:
        """The value of node `name` as node `by` reads it, one a batch; `value` is what was computed."""
        return [self._through(name, by, v) for v in self.value(name)]

    def release(self, name: str) -> None:
        """Give a held value up."""
        self._hold.discard(name)
        self._held.pop(name, None)

    def _pending(self, node: fx.Node) -> list[fx.Node]:
        """What has still to be computed for `node`, itself included, in the graph's order."""
        found, stack = set(), [node]
        while stack:
            current = stack.pop()
            if current in self._done or current in found:
                continue
            found.add(current)
            stack.extend(self._depends[current])
        return sorted(found, key=self._place.__getitem__)

    def _compute(self, node: fx.Node) -> None:
        self._done.add(node)
        if node.op == "get_attr":
            return
        if node.op == "placeholder":
            results: list[Any] = [batch[node.name] for batch in self._batches]
        else:
            results = [self._call(node, index) for index in range(len(self._batches))]
        self._values[node] = results
        if node.name in self._hold:
            changed = any(_mutates(user) for user in node.users)
            self._held[node.name] = [r.clone() if changed and isinstance(r, Tensor) else r for r in results]
        for source in node.all_input_nodes:
            self._unread[source] -= 1
            if not self._unread[source]:
                self._values.pop(source, None)

    def _call(self, node: fx.Node, index: int) -> Any:
        def load(source: fx.Node) -> Any:
            if source.op == "get_attr":
                return self.tensors[str(source.target)]
            return self._through(source.name, node.name, self._values[source][index])

        args = fx.node.map_arg(node.args, load)
        kwargs = fx.node.map_arg(node.kwargs, load)
        if node.op == "output":
            return args[0]
        function: Any = node.target
        return function(*args, **kwargs)

    def _through(self, name: str, reader: str, value: Any) -> Any:
        for users, view in self._views.get(name, ()):
            if users is None or reader in users:
                value = view(value)
        return value


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _dependencies(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """What must be computed before each node: its inputs, and the order that in-place operators ask for."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    depends = {n: list(n.all_input_nodes) for n in graph.nodes}
    for node in graph.nodes:
        if not (_mutates(node) and node.args and isinstance(node.args[0], fx.Node)):
            continue
        for other in node.args[0].users:
            if place[other] < place[node]:
                depends[node].append(other)
            elif place[other] > place[node]:
                depends[other].append(node)
    return depends
