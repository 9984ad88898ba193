"""The flat graph that every Network holds: building, copying, switching between training and eval, and its JSON text.

A flat graph has placeholders (one a tensor input), `get_attr` nodes (parameters, buffers and constants under their
original names), `call_function` nodes (ATen overloads and arithmetic on sizes) and one output node with a flat
tuple.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from penjing.errors import EditError

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

#: The operators that put a value on an integer grid and take it back.
QUANTIZE = {
    decomposed.quantize_per_tensor.default,
    decomposed.quantize_per_tensor.tensor,
    decomposed.quantize_per_tensor.tensor2,
    decomposed.quantize_per_channel.default,
}
DEQUANTIZE = {
    decomposed.dequantize_per_tensor.default,
    decomposed.dequantize_per_tensor.tensor,
    decomposed.dequantize_per_tensor.tensor2,
    decomposed.dequantize_per_channel.default,
}

#: Position of the argument that says whether an operator trains.
TRAINING_ARGUMENT: dict[Any, int] = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.native_dropout.default: 2,
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.rrelu.default: 3,
    aten.lstm.input: 6,
    aten.gru.input: 6,
    aten.rnn_tanh.input: 6,
    aten.rnn_relu.input: 6,
}
_NORMS_WITH_STATISTICS = (aten.batch_norm.default, aten.instance_norm.default)
_ATTENTION = aten.scaled_dot_product_attention.default
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{n}": getattr(operator, n) for n in dir(operator) if not n.startswith("_")},
    **{f"math.{n}": getattr(math, n) for n in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{n}": getattr(torch, n) for n in dir(torch) if n.startswith("sym_") or n == "_sym_sqrt"},
}
_FUNCTION_NAMES = {f: n for n, f in reversed(_FUNCTIONS.items())}


def build(
    graph: fx.Graph, tensors: Mapping[str, Tensor], *, kind: type[fx.GraphModule] = fx.GraphModule
) -> fx.GraphModule:
    """A GraphModule of `graph` that holds those of `tensors` that the graph reads (shared, not copied)."""
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    missing = sorted(read - set(tensors))
    if missing:
        raise EditError(f"the graph reads {missing[0]}, which the network does not hold")
    root: dict[str, Any] = {name: tensors[name] for name in tensors if name in read}
    return kind(root, graph)


def tensors_of(module: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor that the graph reads, by name, in the order of first use; nothing is copied."""
    found: dict[str, Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in found:
            found[str(node.target)] = get_tensor(module, str(node.target))
    return found


def get_tensor(module: torch.nn.Module, name: str) -> Tensor:
    """The tensor at a dotted path."""
    holder: Any = module
    for part in name.split("."):
        holder = getattr(holder, part)
    return cast(Tensor, holder)


def copy(module: fx.GraphModule, *, tensors: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """A copy whose graph can be edited; tensors are shared with the original (or taken from `tensors`)."""
    return build(copy_graph(module.graph), tensors_of(module) if tensors is None else tensors)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of the nodes with their names and metadata."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, lambda n: mapping[n])
        mapping[node].name = node.name
        mapping[node].meta = dict(node.meta)
    return new


# ------------------------------------------------------------------------------------------------ training and eval
def set_mode(graph: fx.Graph, training: bool) -> None:
    """Switches every operator of `graph` that behaves differently in training. Eval is deterministic.

    Attention keeps its dropout probability as a plain number: in eval it is 0 and the number waits in the node's
    metadata.
    """
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        place = TRAINING_ARGUMENT.get(node.target)
        if place is not None and len(node.args) > place:
            if node.target in _NORMS_WITH_STATISTICS and node.args[3] is None:
                continue  # no running statistics: it always uses the batch's own
            node.update_arg(place, training)
        elif node.target is _ATTENTION:
            _set_attention_dropout(node, training)


def _set_attention_dropout(node: fx.Node, training: bool) -> None:
    now = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    note = dict(node.meta.get("penjing", {}))
    if now and "dropout_p" not in note:
        note["dropout_p"] = now
        node.meta["penjing"] = note
    value = note.get("dropout_p", 0.0) if training else 0.0
    if len(node.args) > 4:
        node.update_arg(4, value)
    elif "dropout_p" in node.kwargs:
        node.update_kwarg("dropout_p", value)


def set_device(graph: fx.Graph, device: torch.device) -> None:
    """Points every device written into the graph as a constant to `device`."""

    def there(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.nodes:
        node.args = pytree.tree_map(there, node.args, is_leaf=lambda x: isinstance(x, fx.Node))
        node.kwargs = pytree.tree_map(there, node.kwargs, is_leaf=lambda x: isinstance(x, fx.Node))


class TrainableModule(fx.GraphModule):
    """What `Network.module()` gives: an ordinary module whose `train()` and `eval()` rewrite the graph's own flags."""

    def train(self, mode: bool = True) -> TrainableModule:
        changed = mode != getattr(self, "_graph_trains", None)
        super().train(mode)
        if changed and hasattr(self, "_graph"):
            set_mode(self.graph, mode)
            self.recompile()
            self._graph_trains = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> TrainableModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held = next(iter(self.state_dict(keep_vars=True).values()), None)
        if held is not None:
            set_device(self.graph, held.device)
            self.recompile()
        return self


def trainable(module: fx.GraphModule, structure_in: Any, structure_out: Any) -> TrainableModule:
    """A TrainableModule with its own copies of all tensors that takes and returns the original structures."""
    held = tensors_of(module)
    copies = {
        name: torch.nn.Parameter(t.detach().clone(), requires_grad=t.requires_grad)
        if isinstance(t, torch.nn.Parameter)
        else t.detach().clone()
        for name, t in held.items()
    }
    graph = copy_graph(module.graph)
    args, kwargs = structure_in
    _, in_spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    _, out_spec = pytree.tree_flatten(structure_out)
    names = [*(f"arg{i}" for i in range(len(args))), *kwargs]
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, out_spec)))
    result = cast(TrainableModule, build(graph, copies, kind=TrainableModule))
    result.eval()
    return result


# -------------------------------------------------------------------------------------------------------- JSON text
def target_name(target: Any) -> str:
    """`aten.conv2d.default` or `operator.add`; raises EditError for anything that has no such name."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise EditError(
        f"the graph calls {getattr(target, '__name__', target)!r}, neither an ATen operator nor arithmetic on sizes",
        hint="control flow that depends on values cannot be held; rewrite that part with torch.where",
    )


def find_target(name: str) -> Callable[..., Any]:
    """The function that `target_name` named; raises EditError if this torch has no such operator."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    with contextlib.suppress(AttributeError, ValueError):
        namespace, op, overload = name.split(".")
        found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise EditError(f"torch {torch.__version__} has no operator called {name!r}")


_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode(value: Any) -> Any:
    """An argument as JSON: nodes as "%name", everything that JSON lacks as a one-entry object."""
    if isinstance(value, fx.Node):
        return "%" + value.name
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, str):
        return {"str": value}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: encode(v) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # where it runs is decided by whoever runs it
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for word, kind in _NAMED.items():
        if isinstance(value, kind):
            return {word: str(value).removeprefix("torch.")}
    raise EditError(f"the graph holds an argument of type {type(value).__name__}, which cannot be saved")


def decode(value: Any, node: Callable[[str], Any]) -> Any:
    """What `encode` encoded; `node` finds a node by name."""
    if isinstance(value, str):
        return node(value[1:])
    if isinstance(value, list):
        return [decode(v, node) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise EditError("an argument of the graph is not readable")
    ((word, inner),) = value.items()
    if word in _NAMED and isinstance(found := getattr(torch, str(inner), None), _NAMED[word]):
        return found
    simple: dict[str, Callable[[], Any]] = {
        "float": lambda: float(inner),
        "str": lambda: str(inner),
        "tuple": lambda: tuple(decode(v, node) for v in inner),
        "dict": lambda: {k: decode(v, node) for k, v in inner.items()},
        "slice": lambda: slice(*(decode(v, node) for v in inner)),
        "device": lambda: torch.device(inner),
        "complex": lambda: complex(*inner),
    }
    if word not in simple:
        raise EditError(f"an argument of the graph has the unknown kind {word!r}")
    return simple[word]()


def graph_to_json(graph: fx.Graph) -> list[list[Any]]:
    """A row a node: [operation, name, target, arguments, keywords, notes], what is empty at the end left away."""
    rows = []
    for node in graph.nodes:
        target = target_name(node.target) if node.op == "call_function" else str(node.target)
        row: list[Any] = [node.op, node.name, target, [encode(a) for a in node.args]]
        row += [{k: encode(v) for k, v in node.kwargs.items()}, dict(node.meta.get("penjing", {}))]
        while row[-1] in ({}, []):
            row.pop()
        rows.append(row)
    return rows


def graph_from_json(rows: Iterable[list[Any]]) -> fx.Graph:
    """What `graph_to_json` wrote; raises EditError for rows that make no graph."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def find(name: str) -> fx.Node:
        if name not in nodes:
            raise EditError(f"the graph uses {name!r} before it is made")
        return nodes[name]

    for row in rows:
        defaults: tuple[Any, ...] = ([], {}, {})
        op, name, target, args, kwargs, notes = [*row, *defaults[len(row) - 3 :]]
        if op not in ("placeholder", "get_attr", "call_function", "output") or name in nodes:
            raise EditError(f"the graph has an unreadable node {name!r}")
        node = graph.create_node(
            op,
            find_target(target) if op == "call_function" else target,
            tuple(decode(a, find) for a in args),
            {k: decode(v, find) for k, v in kwargs.items()},
            name=name,
        )
        node.name = name
        if notes:
            node.meta["penjing"] = notes
        nodes[name] = node
    graph.lint()
    return graph
