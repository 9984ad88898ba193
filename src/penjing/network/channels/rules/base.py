"""The labelled run of a graph, and the table of rules it consults."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from penjing.network.channels.labels import Labels, Slots, Tape, along, compact, core, free, is_free

Rule = Callable[["Call"], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by the name of their overload packet (`aten::conv2d`)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name if "::" in name else f"aten::{name}"] = function
        return function

    return register


@dataclass(frozen=True)
class Call:
    """One operator call: its arguments by name, as real values and as labels, and its result."""

    tape: Tape
    node: fx.Node
    name: str
    nodes: Mapping[str, Any]
    values: Mapping[str, Any]
    labels: Mapping[str, Any]
    result: Any
    static: bool

    def label(self, argument: str) -> Tensor:
        """Element labels of an argument."""
        return self.tape.elements(self.labels[argument])

    def has(self, argument: str) -> bool:
        """Whether an optional tensor argument was given."""
        return isinstance(self.values.get(argument), Tensor)

    def weights(self, argument: str) -> Slots:
        """Weight-like labels of an argument; buffers get labels of their own here."""
        node = self.nodes[argument]
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.tape.slots(str(node.target))
        return self.tape.as_slots(self.labels[argument])

    def vector(self, argument: str) -> Tensor:
        """The labels of a one-dimensional weight or buffer."""
        return self.tape.axis(self.weights(argument), 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape."""
        return tuple(self.result.shape)

    def tensors(self) -> list[Labels]:
        """The labels of all tensor arguments, lists flattened."""
        found: list[Labels] = []
        for value in self.labels.values():
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Tensor | Slots):
                    found.append(item)
        return found

    def pin(self, labels: Labels, reason: str) -> None:
        """Keep these labels because of this call."""
        self.tape.pin(labels, reason, self.node.name)


def spread(result: Any, label: Tensor) -> Any:
    """One label over every tensor of a result."""
    if isinstance(result, Tensor):
        return label.expand(result.shape)
    if isinstance(result, list | tuple):
        return tuple(spread(item, label) for item in result)
    return None


def opaque(call: Call) -> Any:
    """No rule: everything the operator touches stays, and the operator is named."""
    known = [t for t in call.tensors() if isinstance(t, Slots) or not is_free(t)]
    if not known:
        return spread(call.result, torch.zeros((), dtype=torch.int64))
    label = 0
    for labels in known:
        label = call.tape.pin(labels, f"no rule for {call.name}", call.node.name, call.name)
    return spread(call.result, torch.tensor(label))


def trace(graph_module: fx.GraphModule, inputs: Mapping[str, Tensor]) -> Tape:
    """Run the graph on real inputs with labels beside the values.

    Args:
        graph_module: a flat graph of ATen calls, in eval form.
        inputs: a tensor for every placeholder, by its name.
    """
    tensors: dict[str, Tensor] = dict(graph_module.named_parameters(remove_duplicate=False))
    parameters = frozenset(tensors)
    tensors.update(graph_module.named_buffers(remove_duplicate=False))
    tape = Tape(tensors, parameters)
    return _Tracer(graph_module, tape, inputs).trace()


class _Tracer:
    def __init__(self, graph_module: fx.GraphModule, tape: Tape, inputs: Mapping[str, Tensor]) -> None:
        self.graph_module, self.tape, self.inputs = graph_module, tape, inputs
        self.values: dict[fx.Node, Any] = {}
        self.labels: dict[fx.Node, Any] = {}
        self.static: dict[fx.Node, bool] = {}

    def trace(self) -> Tape:
        last = _last_uses(self.graph_module.graph)
        with torch.no_grad():
            for node in self.graph_module.graph.nodes:
                self.step(node)
                for used in last.get(node, ()):
                    del self.values[used], self.labels[used]
        return self.tape

    def step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            value = self.inputs[node.name] if node.name in self.inputs else self.inputs[str(node.target)]
            self.values[node], self.static[node] = value, False
            if isinstance(value, Tensor):
                pinned = self.tape.pin(free(()), f"input {node.target} of the network", node.name)
                self.record(node, torch.tensor(pinned if value.is_floating_point() else 0).expand(value.shape))
            else:
                self.record(node, None)
        elif node.op == "get_attr":
            name = str(node.target)
            self.static[node] = True
            if name not in self.tape.tensors:
                self.tape.tensors[name] = operator.attrgetter(name)(self.graph_module)
            self.values[node] = self.tape.tensors[name]
            self.record(node, self.tape.attribute(name))
        elif node.op == "output":
            for used in node.all_input_nodes:
                for labels in _flat(self.labels[used]):
                    self.tape.pin(labels, "an output of the network", used.name)
        else:
            self.call(node)

    def call(self, node: fx.Node) -> None:
        args = fx.map_arg(node.args, lambda n: self.values[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self.values[n])
        target: Any = node.target
        result = target(*args, **kwargs)
        self.values[node] = result
        self.static[node] = all(self.static[n] for n in node.all_input_nodes)
        if target is operator.getitem:
            source: Any = node.args[0]
            part: Any = node.args[1]
            labels = self.labels[source]
            self.record(node, labels[part] if isinstance(labels, tuple | list) else None)
            return
        if not any(isinstance(leaf, Tensor) for leaf in _leaves(result)):
            self.record(node, None)
            return
        self.record(node, self.judge(node, result))

    def judge(self, node: fx.Node, result: Any) -> Any:
        schema = node.target._schema  # type: ignore[union-attr]
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        nodes = {a.name: given.get(a.name, a.default_value) for a in schema.arguments}
        values = {k: fx.map_arg(v, lambda n: self.values[n]) for k, v in nodes.items()}
        labels = {k: _labels_of(v, self.labels) for k, v in nodes.items()}
        call = Call(self.tape, node, schema.name, nodes, values, labels, result, self.static[node])
        known = call.tensors()
        function = RULES.get(schema.name)
        uses_buffers = schema.name in BUFFERED
        if not uses_buffers and all(isinstance(t, Tensor) and is_free(t) for t in known):
            return spread(result, torch.zeros((), dtype=torch.int64))
        if function is None and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
            function = RULES["pointwise::any"]
        return (function or opaque)(call)

    def record(self, node: fx.Node, labels: Any) -> None:
        if isinstance(self.values[node], Tensor):
            self.tape.shapes[node.name] = tuple(self.values[node].shape)
        if isinstance(labels, Tensor):
            labels = compact(labels)
            if not is_free(labels):
                self.tape.values[node.name] = (tuple(labels.shape), core(labels).numpy().copy())
        elif isinstance(labels, Slots):
            labels = Slots(labels.shape, tuple(compact(layer) for layer in labels.layers))
            for i, layer in enumerate(labels.layers):
                self.tape.values[f"{node.name}@{i}"] = (labels.shape, core(layer).numpy().copy())
        self.labels[node] = labels


BUFFERED = {"quantized_decomposed::dequantize_per_channel", "quantized_decomposed::dequantize_per_tensor"}
"""Operators whose rule gives labels to buffers, so that it is asked even where every argument is constant."""


def _labels_of(value: Any, labels: Mapping[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return labels[value]
    if isinstance(value, list | tuple):
        return [_labels_of(item, labels) for item in value]
    return None


def _leaves(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list | tuple) else [value]


def _flat(labels: Any) -> list[Labels]:
    return [leaf for leaf in _leaves(labels) if isinstance(leaf, Tensor | Slots)]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(list(graph.nodes)):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
    return last


def together(call: Call, known: list[Labels]) -> Slots:
    """Labels of weight-like values that broadcast against one another."""
    layers: list[Tensor] = []
    operands = [call.tape.as_slots(t) for t in known]
    for dim in range(len(call.shape)):
        found: Tensor | None = None
        for slots in operands:
            d = dim - (len(call.shape) - len(slots.shape))
            if d < 0 or slots.shape[d] != call.shape[dim]:
                continue
            vector = call.tape.axis(slots, d)
            if not vector.any():
                continue
            if found is not None:
                call.tape.union(found, vector)
            found = vector if found is None else found
        if found is not None:
            layers.append(along(found, dim, call.shape))
    return Slots(call.shape, tuple(layers))
