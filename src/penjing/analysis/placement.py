"""Where quantizers go, so that integer kernels run from end to end and nothing is quantized twice.

Pure graph analysis; grids and ranges are chosen elsewhere (methods/quantize.py). The rules:

- *Integer layers* (convolutions and matrix products) want every activation operand on a grid. A convolution's result
  goes on a grid too, behind the relu or clamp that follows it: runtimes fuse convolution, activation and quantizer.
- *Light operators* (residual addition, average pooling, concatenation) are worth doing in integers only between others
  that do: an addition whose result goes to layer normalisation stays float.
- *Views* (max-pooling, reshaping, slicing, zero padding …) commute with a quantizer. What passes through them stays on
  the grid it came with, so the quantizer sits where the value is made, once.
- A concatenation and all its inputs share one grid.
- Values that depend on no floating input and on no parameter (masks, positions, rotary angles) are left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from penjing.analysis.operators import (
    ADDITIONS,
    CONCATENATIONS,
    CONVOLUTIONS,
    FUSED,
    POOLS,
    PRODUCTS,
    RECURRENT,
    VIEWS,
    argument,
    convolution_form,
    operator_name,
    quantizes,
)
from penjing.network.graph import get_tensor


@dataclass(frozen=True)
class Layer:
    """An operator with a weight (or two activation factors) and what quantization can do for it.

    `parameter` is None for a product of two activations. `axis` is the parameter's axis of output channels, None where
    a kernel wants one scale for the whole tensor. `integer` says that both factors can be integers; otherwise the
    weight is only stored as integers. `depthwise`: one filter for each input channel, which kernels treat apart.
    """

    node: str
    parameter: str | None
    axis: int | None
    integer: bool
    kind: str
    depthwise: bool = False


@dataclass(frozen=True)
class Quantizer:
    """A quantizer behind the node `value`, for the nodes `users` only (None: all); equal `grid` numbers share one."""

    value: str
    users: tuple[str, ...] | None
    grid: int


@dataclass(frozen=True)
class Placement:
    """All layers, all quantizers, what stays float and why, and the quantizers that each layer's inputs come from."""

    layers: tuple[Layer, ...]
    quantizers: tuple[Quantizer, ...]
    left: dict[str, str] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)


def place(
    module: fx.GraphModule,
    *,
    floating: Collection[str],
    parameters: Collection[str],
    selected: Callable[[str], bool] = lambda name: True,
    activations: bool = True,
) -> Placement:
    """Finds layers and quantizers of a flat graph in eval form with batch norms folded.

    `floating` names the floating inputs, `parameters` the trainable tensors, `selected` tells by a parameter's name
    (for products of two activations: by the node's) whether the layer takes part; with `activations` off only weights
    do.
    """
    return _Placer(module, set(floating), set(parameters), selected, activations).result()


class _Placer:
    def __init__(
        self,
        module: fx.GraphModule,
        floating: set[str],
        parameters: set[str],
        selected: Callable[[str], bool],
        activations: bool,
    ) -> None:
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.module, self.selected, self.parameters = module, selected, parameters
        self.left: dict[str, str] = {}
        self.active = self._active(floating)
        self.layers: dict[fx.Node, Layer] = {}
        self.weights: list[Layer] = []
        for node in self.nodes:
            self._layer(node)
        self.light: set[fx.Node] = set()
        self.integer_made: dict[fx.Node, bool] = {}
        self.grids = _Classes()
        self.on_grid: dict[fx.Node, int] = {}
        self.pending: dict[fx.Node, list[int]] = {}  # concatenations: grids that only they see
        self.quantizers: list[Quantizer] = []
        if activations:
            for node in reversed(self.nodes):
                if operator_name(node) in POOLS | ADDITIONS | CONCATENATIONS and self._worth(node):
                    self.light.add(node)
            self._insert()

    def result(self) -> Placement:
        quantizers = tuple(Quantizer(q.value, q.users, self.grids.root(q.grid)) for q in self.quantizers)
        placed = {q.value for q in quantizers}
        sources = {
            layer.node: tuple(s.name for o in self._operands(node) if (s := self._made_at(o)).name in placed)
            for node, layer in self.layers.items()
            if layer.integer
        }
        return Placement((*self.layers.values(), *self.weights), quantizers, self.left, sources)

    # -------------------------------------------------------------------------------------------- what is what
    def _active(self, floating: set[str]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder":
                if str(node.target) in floating or node.name in floating:
                    found.add(node)
            elif node.op == "call_function" and operator_name(node) not in ("aten::sym_size", "aten::arange"):
                own = any(a.op == "get_attr" and str(a.target) in self.parameters for a in node.all_input_nodes)
                if own or any(a in found for a in node.all_input_nodes):
                    found.add(node)
        # What is computed from parameters alone is a weight, not an activation.
        fed: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(a in fed for a in node.all_input_nodes):
                fed.add(node)
        return found & fed

    def _layer(self, node: fx.Node) -> None:
        name = operator_name(node)
        if name in CONVOLUTIONS:
            self._convolution(node, name)
        elif name in PRODUCTS:
            self._product(node, name)
        elif name == "aten::embedding":
            self._weight_only(node, node.args[0], "embedding")
        elif name in RECURRENT:
            for weight in _flatten(node.args[2]):
                if weight.op == "get_attr" and get_tensor(self.module, str(weight.target)).ndim == 2:
                    self._weight_only(node, weight, name.removeprefix("aten::"))
        elif name == "aten::scaled_dot_product_attention":
            self.left[node.name] = "attention runs fused in float"

    def _convolution(self, node: fx.Node, name: str) -> None:
        weight, found = node.args[1], None
        if isinstance(weight, fx.Node):
            found = self._parameter_of(weight)
        if found is None:
            self.left[node.name] = "its weight is computed, not stored"
            return
        parameter, _ = found
        shape = get_tensor(self.module, parameter).shape
        transposed, groups = convolution_form(node)
        axis: int | None = (1 if groups == 1 else None) if transposed else 0
        kind = "conv_transpose" if transposed else "conv"
        self._add(node, parameter, axis, kind, depthwise=not transposed and 1 < groups == shape[0] and shape[1] == 1)

    def _product(self, node: fx.Node, name: str) -> None:
        first, second = (node.args[i] for i in PRODUCTS[name])
        if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
            return
        if first in self.active and second in self.active:
            if self.selected(node.name):
                self.layers[node] = Layer(node.name, None, None, True, "product")
            return
        found = self._parameter_of(second)
        if found is None or first not in self.active:
            if first in self.active or second in self.active:
                self.left[node.name] = "one factor is neither an activation nor a stored weight"
            return
        parameter, order = found
        # The axis of the output channels, seen through the transpositions between the parameter and the product.
        axis = order[0 if name == "aten::linear" else -1]
        self._add(node, parameter, axis if len(order) == 2 else None, "linear")

    def _add(self, node: fx.Node, parameter: str, axis: int | None, kind: str, *, depthwise: bool = False) -> None:
        if not self.selected(parameter):
            self.left[node.name] = f"{parameter} is excluded by where"
        else:
            self.layers[node] = Layer(node.name, parameter, axis, True, kind, depthwise)

    def _weight_only(self, node: fx.Node, weight: Any, kind: str) -> None:
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target) in self.parameters:
            if self.selected(str(weight.target)):
                self.weights.append(Layer(node.name, str(weight.target), 0, False, kind))
            else:
                self.left[f"{node.name} ({weight.target})"] = f"{weight.target} is excluded by where"

    def _parameter_of(self, node: fx.Node) -> tuple[str, tuple[int, ...]] | None:
        """The parameter behind transpositions, and the parameter's axis at each axis of `node`."""
        if node.op == "get_attr":
            if str(node.target) not in self.parameters:
                return None
            return str(node.target), tuple(range(get_tensor(self.module, str(node.target)).ndim))
        name = operator_name(node)
        if name not in ("aten::t", "aten::transpose", "aten::permute", "aten::numpy_T", "aten::alias", "aten::clone"):
            return None
        found = self._parameter_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if found is None:
            return None
        parameter, order = found
        if name in ("aten::t", "aten::numpy_T"):
            return parameter, order[::-1]
        if name == "aten::transpose":
            swapped = list(order)
            a, b = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
            swapped[a], swapped[b] = swapped[b], swapped[a]
            return parameter, tuple(swapped)
        if name == "aten::permute":
            return parameter, tuple(order[int(d)] for d in node.args[1])  # type: ignore[union-attr, arg-type]
        return parameter, order

    # ---------------------------------------------------------------------------------------- who wants a grid
    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The activations that an integer layer or light operator wants on a grid."""
        name = operator_name(node)
        if name in CONVOLUTIONS:
            places: tuple[int, ...] = (0,)
        elif name in PRODUCTS:
            places = PRODUCTS[name] if self.layers[node].parameter is None else PRODUCTS[name][:1]
        elif name in CONCATENATIONS:
            return list(dict.fromkeys(_flatten(node.args[0])))
        else:
            places = (0, 1) if name in ADDITIONS else (0,)
        return list(dict.fromkeys(a for i in places if isinstance(a := node.args[i], fx.Node)))

    def _wants(self, value: fx.Node, user: fx.Node) -> bool:
        if user in self.layers or user in self.light:
            return value in self._operands(user)
        return self._view(user) and user.all_input_nodes[0] is value and self._all_want(user)

    def _all_want(self, value: fx.Node) -> bool:
        return bool(value.users) and all(self._wants(value, user) for user in value.users)

    def _view(self, node: fx.Node) -> bool:
        name = operator_name(node)
        if name in ("aten::pad", "aten::constant_pad_nd"):
            mode = argument(node, 2, "mode", "constant") if name == "aten::pad" else "constant"
            fill = argument(node, 3 if name == "aten::pad" else 2, "value", None)
            return mode != "constant" or not fill
        if _is_item(node):
            return operator_name(node.all_input_nodes[0]) in VIEWS
        return name in VIEWS and node in self.active

    def _end(self, node: fx.Node) -> fx.Node:
        """The activation function fused behind `node`, or `node`."""
        users = list(node.users)
        if len(users) == 1 and operator_name(users[0]) in FUSED and users[0].args[0] is node:
            return users[0]
        return node

    def _worth(self, node: fx.Node) -> bool:
        """Whether a light operator runs in integers. Called in reverse order: its users are decided already."""
        operands = self._operands(node)
        if not operands or any(o not in self.active for o in operands):
            return False
        name = operator_name(node)
        if name in ADDITIONS:
            plain = len(node.args) == 2 and len(operands) == 2 and argument(node, 2, "alpha", 1) == 1
            return plain and self._all_want(self._end(node))
        if name in CONCATENATIONS:
            return self._all_want(self._end(node))
        return argument(node, 3, "dtype", None) is None and self._integer_made(operands[0])

    def _made_at(self, node: fx.Node) -> fx.Node:
        while self._view(node):
            node = node.all_input_nodes[0]
        return node

    def _integer_made(self, node: fx.Node) -> bool:
        """Whether a value comes from a convolution, through activations, additions, concatenations and pools."""
        if node not in self.integer_made:
            self.integer_made[node] = self._looks_integer_made(node)
        return self.integer_made[node]

    def _looks_integer_made(self, node: fx.Node) -> bool:
        node = self._made_at(node)
        name = operator_name(node)
        if name in FUSED:
            node = self._made_at(node.all_input_nodes[0])
            name = operator_name(node)
        if name in CONVOLUTIONS:
            return node in self.layers
        if name in ADDITIONS | CONCATENATIONS | POOLS:
            operands = [a for a in node.all_input_nodes if a in self.active]
            return bool(operands) and all(self._integer_made(a) for a in operands)
        return False

    # ----------------------------------------------------------------------------------------------- inserting
    def _insert(self) -> None:
        ends = {self._end(n) for n, layer in self.layers.items() if layer.kind.startswith("conv")}
        ends |= {self._end(n) for n in self.light if operator_name(n) in ADDITIONS}
        for node in self.nodes:
            if node.op == "output" or node not in self.active or node in self.on_grid:
                continue
            if self._view(node) and (grid := self.on_grid.get(node.all_input_nodes[0])) is not None:
                self.on_grid[node] = grid
            elif node in self.light and operator_name(node) in CONCATENATIONS:
                self._concatenate(node)
            elif _is_quantized(node) or any(_is_item(u) for u in node.users):
                continue  # done already; or a tuple, whose items are looked at
            elif node in ends and node.users:
                self._put(node, None)
            else:
                wanting = tuple(u.name for u in node.users if self._wants(node, u))
                if wanting and not any(quantizes(u) for u in node.users):
                    self._put(node, None if len(wanting) == len(node.users) else wanting)

    def _put(self, node: fx.Node, users: tuple[str, ...] | None) -> None:
        grid = self.grids.new()
        self.quantizers.append(Quantizer(node.name, users, grid))
        if users is None:
            self.on_grid[node] = grid
        else:
            self._partial(node, grid)

    def _partial(self, node: fx.Node, grid: int) -> None:
        """A grid for some users only: those that are views carry it on."""
        for user in node.users:
            if self._wants(node, user) and self._view(user):
                self.on_grid[user] = grid
            elif user in self.light and operator_name(user) in CONCATENATIONS:
                self.pending.setdefault(user, []).append(grid)

    def _concatenate(self, node: fx.Node) -> None:
        grids = [self.on_grid[o] for o in self._operands(node) if o in self.on_grid]
        grids += self.pending.pop(node, [])
        for other in grids[1:]:
            self.grids.join(grids[0], other)
        if grids:
            self.on_grid[node] = grids[0]


class _Classes:
    """Disjoint sets of grid numbers."""

    def __init__(self) -> None:
        self.parent: list[int] = []

    def new(self) -> int:
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def root(self, number: int) -> int:
        while self.parent[number] != number:
            number = self.parent[number]
        return number

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        self.parent[max(a, b)] = min(a, b)


def _is_quantized(node: fx.Node) -> bool:
    return quantizes(node) or any(quantizes(u) for u in node.users)


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _flatten(value: Any) -> list[fx.Node]:
    return [v for v in _walk(value) if isinstance(v, fx.Node)]


def _walk(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for v in value:
            yield from _walk(v)
    else:
        yield value
