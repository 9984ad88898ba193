"""From what torch.export gives to a flat graph: wrappers inlined, checks dropped, in-place operators made
functional.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from penjing.errors import CaptureError
from penjing.network import graph as flat

aten = torch.ops.aten

_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_NOTHING = {aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default, aten.alias.default}
_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
_COPIES = {aten.contiguous.default}  # the tensor itself if it lies in order, else a copy
_SCATTER = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}


def flatten(
    module: fx.GraphModule, program: ExportedProgram, examples: Sequence[Any]
) -> tuple[fx.Graph, dict[str, Tensor], Any]:
    """Flat graph, its tensors by name, and the structure of its outputs (leaves are output names)."""
    graph = fx.Graph()
    tensors: dict[str, Tensor] = {}
    outputs = _inline(graph, module, None, tensors, "")
    if any(not isinstance(e, Tensor) for e in examples):
        raise CaptureError("the exported program takes inputs that are not tensors")
    structure_out, kept = _output_structure(program.call_spec.out_spec, outputs)
    if not kept:
        raise CaptureError("the network returns no tensor")
    graph.output(tuple(kept))
    _make_functional(graph)
    graph.eliminate_dead_code()
    graph.lint()
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return graph, {n: t for n, t in tensors.items() if n in read}, structure_out


def _inline(
    graph: fx.Graph, module: torch.nn.Module, given: Sequence[Any] | None, tensors: dict[str, Tensor], prefix: str
) -> list[Any]:
    """Copies the nodes of `module` into `graph`; `given` stands for its placeholders. Returns what it outputs."""
    values: dict[fx.Node, Any] = {}
    waiting = iter(given) if given is not None else None
    source: Any = module
    for node in source.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.node_copy(node, lambda n: values[n]) if waiting is None else next(waiting)
        elif node.op == "output":
            return list(torch.fx.node.map_arg(node.args[0], lambda n: values[n]))
        elif node.op == "get_attr":
            held = flat.get_tensor(module, str(node.target))
            if isinstance(held, Tensor):
                values[node] = _get_tensor(graph, node, held, tensors, prefix)
            else:
                values[node] = held  # the body of a wrapper
        elif node.op == "call_module" or node.target in _CHECKS:
            continue  # guards on the inputs: bind() checks those itself
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            values[node] = _inline_wrapper(graph, node, values, tensors, prefix)
        elif _name_of(node.target) == "getitem" and isinstance(values.get(node.args[0]), list):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.target in _NOTHING:
            values[node] = values[node.args[0]]
        elif _counts_batches(node):
            continue
        else:
            flat.target_name(node.target)  # raises for what cannot be held
            values[node] = graph.node_copy(node, lambda n: values[n])
    raise CaptureError("the exported graph has no output")


def _get_tensor(graph: fx.Graph, node: fx.Node, held: Tensor, tensors: dict[str, Tensor], prefix: str) -> fx.Node:
    same = next((n for n, t in tensors.items() if t is held), None)  # tied weights keep one name
    name = same or (
        f"{prefix}{node.target}" if not prefix or not isinstance(held, torch.nn.Parameter) else str(node.target)
    )
    tensors.setdefault(name, held)
    made = graph.get_attr(name)
    made.meta = dict(node.meta)
    return made


def _inline_wrapper(
    graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any], tensors: dict[str, Tensor], prefix: str
) -> list[Any]:
    name = cast(Any, node.target).name()
    place = _WRAPPERS.get(name)
    if place is None:
        raise CaptureError(
            f"the network holds control flow ({name}), which cannot be held{_line_of(node)}",
            hint="rewrite that part with torch.where",
        )
    args: list[Any] = [torch.fx.node.map_arg(a, lambda n: values[n]) for a in node.args]
    inner = _inline(graph, args[place], args[place + 1 :], tensors, f"{prefix}{node.name}.")
    if name == "wrap_with_set_grad_enabled" and not args[0]:
        inner = [graph.call_function(aten.detach.default, (v,)) if isinstance(v, fx.Node) else v for v in inner]
    return inner


def _counts_batches(node: fx.Node) -> bool:
    first = node.args[0] if node.args else None
    return (
        node.target is aten.add_.Tensor
        and isinstance(first, fx.Node)
        and first.op == "get_attr"
        and str(first.target).endswith("num_batches_tracked")
    )


def _name_of(target: Any) -> str:
    return str(getattr(target, "__name__", ""))


def _line_of(node: fx.Node) -> str:
    trace = [line.strip() for line in str(node.meta.get("stack_trace", "")).splitlines() if line.strip()]
    return f" ({trace[-2]}: {trace[-1]})" if len(trace) > 1 else ""


# ---------------------------------------------------------------------------------------------------------- outputs
def _output_structure(spec: Any, outputs: Sequence[Any]) -> tuple[Any, list[fx.Node]]:
    """Plain containers with output names as leaves, and the nodes of those leaves.

    Data classes of libraries (ModelOutput) become dictionaries; cache objects are dropped: they are not outputs of
    interest and would pin the channels they hold.
    """
    waiting: Iterator[Any] = iter(outputs)
    kept: list[fx.Node] = []
    names: set[str] = set()

    def leaf(path: str) -> str | None:
        value = next(waiting)
        if not isinstance(value, fx.Node):
            return None
        name = path or "output"
        while name in names:
            name += "_"
        names.add(name)
        kept.append(value)
        return name

    def children(part: Any) -> list[Any]:
        found = part.children
        return list(found() if callable(found) else found)

    def walk(part: Any, path: str) -> Any:
        if part.is_leaf():
            return leaf(path)
        inner, kind, context = children(part), part.type, part.context
        if "Cache" in getattr(kind, "__name__", ""):
            for c in inner:
                for _ in range(c.num_leaves):
                    next(waiting)
            return None
        if isinstance(context, list) and all(isinstance(k, str) for k in context) and len(context) == len(inner):
            keys: list[str] | None = list(context)
        else:
            keys = list(getattr(kind, "_fields", ())) or None
        if keys:
            named = {k: walk(c, f"{path}_{k}" if path else k) for k, c in zip(keys, inner, strict=True)}
            return {k: v for k, v in named.items() if v is not None}
        listed = [walk(c, f"{path}_{i}" if path else f"output_{i}") for i, c in enumerate(inner)]
        listed = [v for v in listed if v is not None]
        return listed if kind is list else tuple(listed)

    return walk(spec, ""), kept


# -------------------------------------------------------------------------------------------------- functional form
def _make_functional(graph: fx.Graph) -> None:
    """Replaces in-place operators: `relu_(x)` becomes `relu(x)` and later readers of x read the result.

    Writes through slices and selections are scattered back into what they were taken from.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable or _is_norm(node.target):
            continue
        _replace_in_place(graph, node, order)


def _is_norm(target: Any) -> bool:
    return target in flat.TRAINING_ARGUMENT  # updates its running statistics: that is its job


def _replace_in_place(graph: fx.Graph, node: fx.Node, order: dict[fx.Node, int]) -> None:
    target: Any = node.target
    name, overload = target._schema.name.split("::")[1], target._overloadname
    plain = getattr(getattr(aten, name[:-1], None), overload, None) if name.endswith("_") else None
    written = node.args[0]
    if plain is None or not isinstance(written, fx.Node):
        raise CaptureError(
            f"the network changes a tensor in place by {target}, which has no functional form{_line_of(node)}"
        )
    if written.op == "get_attr":
        raise CaptureError(f"the network changes its buffer {written.target} while running{_line_of(node)}")
    with graph.inserting_before(node):
        new = graph.call_function(plain, node.args, node.kwargs)
        new.meta = dict(node.meta)
    order[new] = order[node]
    node.replace_all_uses_with(new)
    position = order[node]
    graph.erase_node(node)
    _forward_value(graph, written, new, position, order)


def _forward_value(graph: fx.Graph, old: fx.Node, new: fx.Node, position: int, order: dict[fx.Node, int]) -> None:
    """From `position` on, `old` has the value `new`; so have the tensors that `old` is a view of."""

    def later(user: fx.Node) -> bool:
        return user is not new and order.get(user, position) > position

    old.replace_all_uses_with(new, delete_user_cb=later)
    for view in list(old.users):
        if view is not new and _is_view(view) and any(later(u) for u in view.users):
            raise CaptureError(f"the network writes to a tensor while a view of it is in use{_line_of(new)}")
    if not _is_view(old):
        return
    base = old.args[0]
    if not isinstance(base, fx.Node) or not (any(later(u) for u in base.users) or _is_view(base)):
        return
    if old.target in _COPIES and not _aliases(base):
        return
    if old.target in _COPIES:
        _forward_value(graph, base, new, position, order)
        return
    if old.target not in _SCATTER:
        raise CaptureError(f"the network writes through a view made by {old.target}{_line_of(new)}")
    with graph.inserting_after(new):
        merged = graph.call_function(_SCATTER[old.target], (base, new, *old.args[1:]))
    order[merged] = position
    _forward_value(graph, base, merged, position, order)


def _aliases(base: fx.Node) -> bool:
    value = base.meta.get("val")
    return not isinstance(value, Tensor) or value.is_contiguous()


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or not node.args:
        return False
    returned = target._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
