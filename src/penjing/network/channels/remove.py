"""Removing channels: kept labels → new tensors, new sizes, new constants, and a graph that has been run.

No shape is propagated twice: the classes of `Groups` say what every value keeps, and every node is run as it is
rewritten, so that
each result is compared with the shape its labels promise.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from penjing.errors import EditError
from penjing.network.channels.groups import Groups, kept_by, single, units_of
from penjing.network.channels.resize import RESIZE, Resizing

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Removed:
    """A shrunk graph, and for every tensor that shrank the positions kept along each dimension that did."""

    graph_module: fx.GraphModule
    kept: dict[str, dict[int, Ints]]


def remove(graph_module: fx.GraphModule, groups: Groups, removals: Sequence[tuple[str, int, Sequence[int]]]) -> Removed:
    """Remove units of channel groups from a graph.

    Args:
        graph_module: the graph that `groups` was made from; it is not changed.
        groups: the result of `analyse`.
        removals: (parameter, dimension, indices) triples; each is closed over its units.

    Returns:
        A new graph (tensors that did not change are shared) and the positions kept.

    Raises:
        EditError: something asked for must stay, a group would lose its last unit, or an operator cannot be rewritten.
    """
    gone = units_of(groups, removals)
    kept = kept_by(groups, gone)
    if not kept:
        return Removed(graph_module, {})
    tensors = _tensors(graph_module)
    new = {name: _shrink(tensor, kept.get(name, {})) for name, tensor in tensors.items()}
    try:
        graph, extra = _Shrinker(graph_module, groups, gone, tensors, new, single(groups.example)).run()
    except (RuntimeError, IndexError, ValueError, EditError):  # a batch size written into the graph
        try:
            graph, extra = _Shrinker(graph_module, groups, gone, tensors, new, groups.example).run()
        except (RuntimeError, IndexError, ValueError) as error:
            raise EditError(f"the network does not run without these channels: {str(error).splitlines()[0]}") from error
    new.update(extra)
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    root: dict[str, Any] = {name: tensor for name, tensor in new.items() if name in read}
    return Removed(fx.GraphModule(root, graph), {name: dims for name, dims in kept.items() if name in read})


def _tensors(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    names = dict.fromkeys(str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr")
    return {name: operator.attrgetter(name)(graph_module) for name in names}


def _shrink(tensor: Tensor, kept: Mapping[int, Ints]) -> Tensor:
    if not kept:
        return tensor
    small = tensor.detach()
    for dim, indices in kept.items():
        small = small.index_select(dim, torch.as_tensor(indices, device=small.device))
    small = small.contiguous()
    return nn.Parameter(small, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small


class _Shrinker:
    """Copies a graph node by node, running both the old and the new one."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        groups: Groups,
        gone: NDArray[np.bool_],
        tensors: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> None:
        self.source, self.groups, self.gone = graph_module.graph, groups, gone
        self.tensors, self.new, self.inputs = tensors, new, inputs
        self.graph = fx.Graph()
        self.names = {node.name for node in self.source.nodes}
        self.extra: dict[str, Tensor] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.before: dict[fx.Node, tuple[int, ...] | None] = {}
        self.after: dict[fx.Node, Any] = {}

    def run(self) -> tuple[fx.Graph, dict[str, Tensor]]:
        with torch.no_grad():
            for node in self.source.nodes:
                self.step(node)
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
        self.graph.lint()
        return self.graph, self.extra

    # what every value keeps -------------------------------------------------------------------------------------------
    def kept(self, node: fx.Node) -> tuple[int, Ints] | None:
        """The first dimension of a value that shrinks and the positions kept, or None."""
        return next(iter(self.all_kept(node)), None)

    def all_kept(self, node: fx.Node) -> list[tuple[int, Ints]]:
        """Every dimension of a value that shrinks: one of an activation, several of a product of parameters."""
        axes = self.groups.solution.axes
        names = [node.name] if node.name in axes else [f"{node.name}@{i}" for i in range(8)]
        found = [axes[name] for name in names if name in axes]
        return [(dim, np.flatnonzero(~self.gone[classes])) for dim, classes in found if self.gone[classes].any()]

    def expected(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape a value should have, or None if it keeps its shape or says nothing of it."""
        kept = self.all_kept(node)
        if not kept:
            return None
        shape = list(self.groups.shapes[node.name])
        for dim, indices in kept:
            shape[dim] = len(indices)
        return tuple(shape)

    # one node ---------------------------------------------------------------------------------------------------------
    def step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            copy = self.graph.node_copy(node)
            self.place(
                node, copy, self.inputs[node.name] if node.name in self.inputs else self.inputs[str(node.target)]
            )
        elif node.op == "get_attr":
            self.place(node, self.graph.node_copy(node), self.new[str(node.target)])
        elif node.op == "output":
            self.copies[node] = self.graph.node_copy(node, lambda n: self.copies[n])
        else:
            self.call(node)

    def place(self, node: fx.Node, copy: fx.Node, value: Any) -> None:
        copy.name = node.name
        copy.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "example_value")}
        self.copies[node], self.after[copy] = copy, value

    def call(self, node: fx.Node) -> None:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        resizing = Resizing(self, node, name)
        function = RESIZE.get(name)
        if function is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            function = RESIZE.get("pointwise::any")
        copy = function(resizing) if function is not None and resizing.touched() else None
        if copy is None:
            copy = self.graph.node_copy(node, lambda n: self.copies[n])
            self.evaluate(copy)
        value = self.after[copy]
        self.place(node, copy, value)
        wanted = self.expected(node)
        if wanted is not None and isinstance(value, Tensor) and tuple(value.shape) != wanted:
            raise EditError(
                f"{name} ({node.name}) would give the shape {tuple(value.shape)} instead of {wanted}",
                hint="this is a fault of penjing's channel rules; exclude the layer with `where`",
            )

    def evaluate(self, copy: fx.Node) -> Any:
        """Run one node of the new graph."""
        args = fx.map_arg(copy.args, lambda n: self.after[n])
        kwargs = fx.map_arg(copy.kwargs, lambda n: self.after[n])
        self.after[copy] = copy.target(*args, **kwargs)  # type: ignore[operator]
        return self.after[copy]

    def insert(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node at the end of the graph so far, run at once."""
        copy = self.graph.call_function(target, args, kwargs)
        copy.name = self.unused_name(f"{copy.name}_kept")
        self.evaluate(copy)
        return copy

    def unused_name(self, stem: str) -> str:
        """A name that no node of the old graph has: nodes that are copied keep theirs."""
        name, number = stem, 1
        while name in self.names:
            name, number = f"{stem}_{number}", number + 1
        self.names.add(name)
        return name

    def constant(self, stem: str, value: Tensor) -> fx.Node:
        """A new stored tensor."""
        name = stem.replace(".", "_") + "_kept"
        while name in self.tensors or name in self.extra:
            name += "_"
        self.extra[name] = value
        copy = self.graph.get_attr(name)
        copy.name = self.unused_name(copy.name)
        self.after[copy] = value
        return copy
