"""Where the channels between layers can be scaled without changing what a network computes.

A *link* is something that makes channels (a layer, or a norm with a weight) and the layers that read them, with nothing
in between but operators that let a positive factor through: relu, pooling, views, products with something else. Its
channels can be divided by any positive numbers where they are made if the readers' columns are multiplied by them
(Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", §4.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from penjing.analysis.operators import CONVOLUTIONS, POOLS, argument, convolution_form, operator_name
from penjing.network.network import Network

_NORMS = {"aten::layer_norm": (2, 3), "aten::rms_norm": (2, None), "aten::batch_norm": (1, 2)}
_ALIKE = {
    "aten::alias", "aten::clone", "aten::contiguous", "aten::detach", "aten::dropout", "aten::feature_dropout",
    "aten::leaky_relu", "aten::leaky_relu_", "aten::max_pool1d", "aten::max_pool2d", "aten::max_pool3d", "aten::relu",
    "aten::relu_", "aten::to", "aten::upsample_nearest1d", "aten::upsample_nearest2d", "aten::upsample_nearest3d",
    *(POOLS - {"aten::mean"}),
}  # fmt: skip
#: Layers that are products: the places of weight and bias.
_PRODUCTS = {"aten::linear": (1, 2), "aten::addmm": (2, 0)}
_RESHAPES = {"aten::flatten", "aten::reshape", "aten::squeeze", "aten::unsqueeze", "aten::view"}


@dataclass(frozen=True)
class Reader:
    """A layer that reads a link's channels from `source`: they are the axis `axis` of its `weight`, every channel
    `spread` neighbouring columns (of a flattened picture: its positions)."""

    node: fx.Node
    source: fx.Node
    weight: str
    axis: int
    spread: int = 1

    @property
    def product(self) -> bool:
        """Whether it reads the last axis, not the first behind the batch."""
        return operator_name(self.node) in _PRODUCTS


@dataclass(frozen=True)
class Link:
    """`channels` made by `maker` (its `tensors`, with the axis of the channels, scale them) and read by `readers`;
    `layer` tells a layer from a norm."""

    maker: fx.Node
    tensors: tuple[tuple[str, int], ...]
    readers: tuple[Reader, ...]
    channels: int
    layer: bool

    @property
    def weight(self) -> str:
        """The weight that makes the channels."""
        return self.tensors[0][0]

    @property
    def parameters(self) -> tuple[str, ...]:
        """All weights and biases that scaling changes."""
        return (*(name for name, _ in self.tensors), *(r.weight for r in self.readers))


def find_links(network: Network) -> list[Link]:
    """Every link of `network`, in the order of the graph; no weight in it is read anywhere else."""
    return _Finder(network).links()


def rescaled(link: Link, scale: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New values of the link's `tensors`: channels divided by `scale` (channels,; positive), readers multiplied."""
    new = {name: tensors[name] / _along(scale, tensors[name], axis) for name, axis in link.tensors}
    for reader in link.readers:
        held = new.get(reader.weight, tensors[reader.weight])
        new[reader.weight] = held * _along(scale.repeat_interleave(reader.spread), held, reader.axis)
    return new


def column_maxima(reader: Reader, weight: Tensor, channels: int) -> Tensor:
    """The largest magnitude of the weights that read each channel (channels,)."""
    return weight.abs().movedim(reader.axis, 0).reshape(channels, -1).amax(1)


def _along(scale: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = [1] * like.ndim
    shape[axis] = -1
    return scale.to(like.dtype).view(shape)


class _Refused(Exception):
    """The channels run into something that a factor does not pass."""


class _Finder:
    def __init__(self, network: Network) -> None:
        self.graph = network.graph_module.graph
        self.tensors = network.tensors()
        self.trainable = set(network.parameter_names)
        self.readers: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self.readers[str(node.target)] = self.readers.get(str(node.target), 0) + len(node.users)
        watcher = _Shapes(network.graph_module)
        with torch.no_grad():
            watcher.run(*network.bind(network.example(2)).values())
        self.shapes = watcher.shapes

    def links(self) -> list[Link]:
        found = []
        for node in self.graph.nodes:
            made = self._maker(node)
            if made is None:
                continue
            tensors, axis, layer = made
            channels = self.shapes[node][axis]
            passed: list[fx.Node] = []
            try:
                readers = self._follow(node, axis, 1, passed)
            except _Refused:
                continue
            if any(sum(a in passed for a in n.all_input_nodes) > 1 for n in passed):
                continue  # the channels meet themselves, where a factor would count twice
            weights = [name for name, _ in tensors] + [r.weight for r in readers]
            if readers and len(set(weights)) == len(weights):
                found.append(Link(node, tensors, tuple(readers), channels, layer))
        return found

    def _own(self, value: Any) -> str | None:
        """The name of a trainable tensor that nothing else reads."""
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        name = str(value.target)
        floating = self.tensors[name].is_floating_point()
        return name if name in self.trainable and self.readers[name] == 1 and floating else None

    def _maker(self, node: fx.Node) -> tuple[tuple[tuple[str, int], ...], int, bool] | None:
        """The tensors that scale what `node` makes, the axis of its channels, and whether it is a layer."""
        name = operator_name(node)
        if node not in self.shapes:
            return None
        last = len(self.shapes[node]) - 1
        if name in CONVOLUTIONS or name in _PRODUCTS:
            transposed, groups = convolution_form(node) if name in CONVOLUTIONS else (name == "aten::addmm", 1)
            places = _PRODUCTS.get(name, (1, 2))
            weight, bias = self._own(node.args[places[0]]), argument(node, places[1], "bias", None)
            if weight is None or (transposed and groups > 1) or (bias is not None and self._own(bias) is None):
                return None
            biases = () if bias is None else ((str(bias.target), 0),)
            return ((weight, int(transposed)), *biases), 1 if name in CONVOLUTIONS else last, True
        if name in _NORMS:
            at, behind = _NORMS[name]
            weight = self._own(argument(node, at, "weight", None))
            bias = None if behind is None else argument(node, behind, "bias", None)
            if weight is None or self.tensors[weight].ndim != 1 or (bias is not None and self._own(bias) is None):
                return None
            biases = () if bias is None else ((str(bias.target), 0),)
            return ((weight, 0), *biases), 1 if name == "aten::batch_norm" else last, False
        if name == "aten::mul":  # a norm written out: something times a weight
            for value in node.args[:2]:
                weight = self._own(value)
                if weight is not None and self.tensors[weight].shape == self.shapes[node][last:]:
                    return ((weight, 0),), last, False
        return None

    def _follow(self, value: fx.Node, axis: int, spread: int, passed: list[fx.Node]) -> list[Reader]:
        """All readers of the channels at `axis` of `value`, and what they `passed`; raises _Refused where there are
        others."""
        found: list[Reader] = []
        passed.append(value)
        for user in value.users:
            name = operator_name(user)
            if name == "aten::sym_size":
                continue
            if name in CONVOLUTIONS or name in _PRODUCTS:
                found.append(self._reader(user, value, axis, spread))
                continue
            where, wide = self._through(user, name, value, axis, spread)
            found += self._follow(user, where, wide, passed)
        return list({(r.node, r.weight): r for r in found}.values())

    def _reader(self, node: fx.Node, value: fx.Node, axis: int, spread: int) -> Reader:
        product = operator_name(node) if operator_name(node) in _PRODUCTS else ""
        weight = self._own(node.args[2 if product == "aten::addmm" else 1])
        if node.args[1 if product == "aten::addmm" else 0] is not value or weight is None:
            raise _Refused
        shape = self.tensors[weight].shape
        if product:
            if axis != len(self.shapes[value]) - 1:
                raise _Refused
            return Reader(node, value, weight, 1 if product == "aten::linear" else 0, spread)
        transposed, groups = convolution_form(node)
        depthwise = not transposed and groups == shape[0] and shape[1] == 1
        if axis != 1 or spread != 1 or (groups != 1 and not depthwise):
            raise _Refused
        return Reader(node, value, weight, 0 if transposed or depthwise else 1)

    def _through(self, node: fx.Node, name: str, value: fx.Node, axis: int, spread: int) -> tuple[int, int]:
        """Where the channels are behind `node`: (axis, spread)."""
        if node not in self.shapes:
            raise _Refused
        before, after = self.shapes[value], self.shapes[node]
        if name in _ALIKE:
            return axis, spread
        if name in ("aten::clamp_min", "aten::clamp"):
            low, high = argument(node, 1, "min", None), argument(node, 2, "max", None) if name[-1] == "p" else None
            if low == 0 and high is None:
                return axis, spread
        if name == "aten::mean":
            dims, kept = argument(node, 1, "dim", None), bool(argument(node, 2, "keepdim", False))
            gone = {int(d) % len(before) for d in dims} if isinstance(dims, list | tuple) and dims else {axis}
            if axis not in gone:
                return axis - (0 if kept else sum(d < axis for d in gone)), spread
        if name in ("aten::mul", "aten::div") and self._factor(node, name, value):
            if len(after) == len(before) and after[axis] == before[axis]:
                return axis, spread
        if name in ("aten::transpose", "aten::permute"):
            return self._turned(node, name, axis, len(before)), spread
        if name in _RESHAPES:
            rest = math.prod(before[axis + 1 :])
            for place, size in enumerate(after):
                if math.prod(after[:place]) == math.prod(before[:axis]):
                    if size == before[axis]:
                        return place, spread
                    if size == before[axis] * rest:
                        return place, spread * rest
        raise _Refused

    def _factor(self, node: fx.Node, name: str, value: fx.Node) -> bool:
        """Whether `value` is one factor of a product, or what is divided, and the rest does not depend on it."""
        others = [a for a in node.args[:2] if a is not value]
        if len(others) != 1 or (name == "aten::div" and node.args[0] is not value) or len(node.args) > 2:
            return False
        # A gate made from the channels by layers with weights is fine: those are readers, too, and give the same.
        return isinstance(others[0], int | float | fx.Node)

    def _turned(self, node: fx.Node, name: str, axis: int, ndim: int) -> int:
        if name == "aten::permute":
            return [int(d) % ndim for d in node.args[1]].index(axis)  # type: ignore[union-attr, arg-type]
        a, b = (int(d) % ndim for d in node.args[1:3])  # type: ignore[arg-type]
        return b if axis == a else a if axis == b else axis


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shapes of all floating tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point():
            self.shapes[n] = value.shape
        return value


__all__: Sequence[str] = ("Link", "Reader", "column_maxima", "find_links", "rescaled")
