"""Which parameters of a network are weights of layers, and how each is read as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from penjing.analysis.operators import CONVOLUTIONS, PRODUCTS, RECURRENT, convolution_form, operator_name
from penjing.network.network import Network
from penjing.tensors import sparsity
from penjing.tensors.sparsity import Layout

_PERMUTATIONS = {"aten::t", "aten::transpose", "aten::permute", "aten::numpy_T"}
_VIEWS = _PERMUTATIONS | {
    "aten::alias",
    "aten::chunk",
    "aten::clone",
    "aten::contiguous",
    "aten::expand",
    "aten::narrow",
    "aten::reshape",
    "aten::select",
    "aten::slice",
    "aten::split",
    "aten::split_with_sizes",
    "aten::squeeze",
    "aten::unbind",
    "aten::unflatten",
    "aten::unsqueeze",
    "aten::view",
}
_WEIGHT_OF = {"aten::linear": 1, "aten::bilinear": 2, "aten::embedding": 0, **dict.fromkeys(CONVOLUTIONS, 1)}


@dataclass(frozen=True)
class Reader:
    """A layer that reads a weight, `through` views of it (none: as it is stored)."""

    node: fx.Node
    source: fx.Node
    through: tuple[fx.Node, ...] = ()

    @property
    def operator(self) -> str:
        """`aten::conv2d`"""
        return operator_name(self.node)

    @property
    def place(self) -> int | None:
        """The argument of the layer that the tensor, or a list with it, is the weight of; None if it is none."""
        read, node, name = self.through[-1] if self.through else self.source, self.node, self.operator
        if name in RECURRENT:
            lists = (i for i, a in enumerate(node.args) if i > 1 and isinstance(a, list | tuple) and read in a)
            return next(lists, None)
        places = (_WEIGHT_OF[name],) if name in _WEIGHT_OF else PRODUCTS.get(name, ())
        return next((p for p in places if len(node.args) > p and node.args[p] is read), None)

    def seen(self, tensor: Tensor) -> Tensor:
        """The weight as the layer would see it, were it stored as `tensor`."""
        values: dict[fx.Node, Any] = {self.source: tensor}
        last = self.source
        for last in self.through:
            args, kwargs = fx.node.map_arg((last.args, last.kwargs), lambda n: values[n])
            function: Any = last.target
            values[last] = function(*args, **kwargs)
        result: Tensor = values[last]
        return result


@dataclass(frozen=True)
class Weight:
    """A parameter of at least two dimensions that layers multiply with, or look rows up in (`embedding`)."""

    name: str
    layout: Layout
    readers: tuple[Reader, ...]

    @property
    def embedding(self) -> bool:
        """Whether it is a table of which rows are looked up."""
        return any(r.operator == "aten::embedding" for r in self.readers)


@dataclass(frozen=True)
class Weights:
    """The weights of a network by name, and for other parameters of two dimensions or more why they are none."""

    found: dict[str, Weight]
    left: dict[str, str]


def find_weights(network: Network) -> Weights:
    """The weights of convolutions, linear, bilinear and recurrent layers, products and embeddings, in the order of the
    graph; not biases, norms and other parameters."""
    tensors, trainable = network.tensors(), set(network.parameter_names)
    found: dict[str, Weight] = {}
    left: dict[str, str] = {}
    for node in network.graph_module.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or name not in trainable or tensors[name].ndim < 2:
            continue
        before = found[name].readers if name in found else ()
        readers = [r for r in _readers(node) if r.place is not None]
        if not readers and not before:
            other = next((operator_name(u) for u in node.users), "nothing")
            left[name] = f"read by {other.removeprefix('aten::') or 'arithmetic'}, which is no layer"
        if readers:
            layout = found[name].layout if before else _layout(readers[0], tensors[name])
            found[name] = Weight(name, layout, (*before, *readers))
    return Weights(found, {n: why for n, why in left.items() if n not in found})


def _readers(source: fx.Node) -> list[Reader]:
    """What uses a tensor, looked for behind views."""
    result: list[Reader] = []
    waiting: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(source, ())]
    while waiting:
        node, chain = waiting.pop(0)
        for user in node.users:
            if operator_name(user) in _VIEWS or "getitem" in str(user.target):
                waiting.append((user, (*chain, user)))
            elif user.op == "call_function":
                result.append(Reader(user, source, chain))
    return result


def _layout(reader: Reader, tensor: Tensor) -> Layout:
    stored = tuple(range(tensor.ndim))
    order = _permutation(reader.through, stored)
    if order is None:
        return sparsity.plain(tensor.shape)
    seen = tensor.permute(order).shape
    layout = _layout_seen(reader, seen)
    if order == stored:
        return layout
    if layout.view != tuple(seen):
        return sparsity.plain(tensor.shape)
    return Layout(tuple(tensor.shape), tuple(order[d] for d in layout.order), layout.rows)


def _layout_seen(reader: Reader, shape: torch.Size) -> Layout:
    if reader.operator in CONVOLUTIONS:
        transposed, groups = convolution_form(reader.node)
        return sparsity.transposed_convolution(shape, groups) if transposed else sparsity.convolution(shape)
    if reader.operator in PRODUCTS and reader.operator != "aten::linear":
        first = reader.place == PRODUCTS[reader.operator][0]
        return Layout(tuple(shape), tuple(range(len(shape))), len(shape) - 1) if first else sparsity.product(shape)
    return sparsity.plain(shape)


def _permutation(chain: tuple[fx.Node, ...], order: tuple[int, ...]) -> tuple[int, ...] | None:
    """Which stored dimension each seen one is; None if the views do more than permute."""
    held = list(order)
    for node in chain:
        name = operator_name(node)
        if name in ("aten::t", "aten::numpy_T"):
            held.reverse()
        elif name == "aten::transpose":
            a, b = (int(i) for i in node.args[1:3])  # type: ignore[arg-type]
            held[a], held[b] = held[b], held[a]
        elif name == "aten::permute":
            held = [held[int(i)] for i in node.args[1]]  # type: ignore[union-attr, arg-type]
        elif name not in ("aten::alias", "aten::clone", "aten::contiguous"):
            return None
    return tuple(held)
