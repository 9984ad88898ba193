"""The five Edits: all that ever changes a graph.

`RemoveChannels` and what hangs on it, `MaskWeights`, `SetWeights`, `QuantizeTensor`, `ReplaceLayer`. Planners in
`penjing.methods` decide which; correctness lives here and in `remove.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from penjing.errors import EditError
from penjing.network import graph as flat
from penjing.network.channels.groups import Groups, analyse
from penjing.network.channels.remove import remove
from penjing.network.codebooks import share_weight
from penjing.network.integers import quantize_dynamically, quantize_weight

decomposed = torch.ops.quantized_decomposed
INTEGERS = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}


@dataclass(frozen=True, kw_only=True)
class RemoveChannels:
    """Removes `indices` along `dim` of a parameter, and everything that is coupled with them through the channel
    groups.
    """

    parameter: str
    dim: int
    indices: tuple[int, ...]
    heads: Literal["heads", "dims"] = "heads"


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskWeights:
    """Keeps the weights where `mask` (bool, the parameter's shape) is true and pins the others to zero from now on."""

    parameter: str
    mask: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class SetWeights:
    """Gives a parameter or buffer new values of the same shape."""

    parameter: str
    value: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizeTensor:
    """Puts a tensor on an integer grid: real = (integer - zero_point) · scale.

    `tensor` is a parameter, which is stored as integers afterwards (with an `axis`, its scales as `<name>_scale`
    and its zero points as `<name>_zero_point`), or the name of a graph node or input, behind which a quantize and a
    dequantize node are put, for all of its users or for those named in `users` only. `axis` is the dimension with a
    scale of its own each (None: one scale). With `group`, a parameter's rows (dimension 0, the others flattened) are
    cut into groups of that many values, the last one may be shorter, and `scale` has the shape (rows, groups).
    With `dynamic` a node's scale and zero point are found anew in every run, over all of the tensor (uint8); those
    given are not looked at. `dtype` is what the codes are held in; `quant_min` and `quant_max` say how wide they
    really are.

    With `levels` a parameter is stored as uint8 codes of a table of at most 256 levels instead: real = levels[code] ·
    scale; (K,) one table, or (rows, K) one for each row (dimension 0). The table is a trainable parameter
    `<name>_levels`, of which levels of zero are pinned; if there are scales other than one number 1, they
    (`<name>_scale`) are trainable and the levels stay. A masked parameter needs a level of zero, whose code then says
    what its mask said. Zero points, types, limits and groups are not looked at.
    """

    tensor: str
    scale: Tensor | float
    zero_point: Tensor | int
    dtype: str = "int8"
    axis: int | None = None
    quant_min: int = -128
    quant_max: int = 127
    users: tuple[str, ...] | None = None
    group: int = 0
    dynamic: bool = False
    levels: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operator of a replacement: `arguments` are JSON as in `graph.encode`; "%" is what the call before gives
    (for the first: the replaced layer's `source`), "%name" a node of the graph, "@name" a tensor."""

    operator: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplaceLayer:
    """Replaces the graph node `node` by a chain of calls that begins with its input `source` (None: its first; "@name":
    a tensor), or by that input where there are no calls. `tensors` are new parameters or buffers; one that takes the
    place of another of another shape loses its mask.
    """

    node: str
    calls: tuple[Call, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    source: str | None = None


Edit = RemoveChannels | MaskWeights | SetWeights | QuantizeTensor | ReplaceLayer
EDITS: dict[str, type[Edit]] = {
    c.__name__: c for c in (RemoveChannels, MaskWeights, SetWeights, QuantizeTensor, ReplaceLayer)
}


@dataclass(kw_only=True)
class Draft:
    """A network while it is being edited: its own copy of the graph, tensors shared until they change.

    `groups` are the channel groups known of the graph as it is now, by the treatment of heads.
    """

    graph_module: fx.GraphModule
    masks: dict[str, Tensor]
    example: dict[str, Tensor]
    groups: dict[str, Groups] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph


def _rebuild(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    return fx.GraphModule(dict(tensors), graph)


def apply(draft: Draft, edits: Iterable[Edit]) -> None:
    """Makes `edits` on `draft` in order. Consecutive removals are made together; the graph is checked at the end."""
    for kind, run in itertools.groupby(edits, key=type):
        several: Sequence[Any] = list(run)
        _APPLY[kind](draft, several)
        draft.groups = {}
    graph = draft.graph
    # What is drawn at random (dropout, attention) would not count as dead by itself.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    draft.graph_module = flat.copy(draft.graph_module)
    read = flat.tensors_of(draft.graph_module)
    draft.masks = {name: mask for name, mask in draft.masks.items() if name in read}


def _remove_channels(draft: Draft, edits: Sequence[RemoveChannels]) -> None:
    for heads, run in itertools.groupby(edits, key=lambda e: e.heads):
        groups = draft.groups.get(heads) or analyse(draft.graph_module, draft.example, heads=heads)
        draft.groups = {}
        removed = remove(draft.graph_module, groups, [(e.parameter, e.dim, e.indices) for e in run])
        draft.graph_module = removed.graph_module
        for name, mask in draft.masks.items():
            for dim, kept in removed.kept.get(name, {}).items():
                mask = mask.index_select(dim, torch.as_tensor(kept))
            draft.masks[name] = mask


def _with_data(old: Tensor, new: Tensor) -> Tensor:
    new = new.detach().to(old.dtype)
    return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new


def _set_weights(draft: Draft, edits: Sequence[SetWeights | MaskWeights]) -> None:
    held = flat.tensors_of(draft.graph_module)
    for edit in edits:
        if edit.parameter not in held:
            raise EditError(f"the network has no tensor called '{edit.parameter}'")
        old = held[edit.parameter]
        given = edit.mask if isinstance(edit, MaskWeights) else edit.value
        if given.shape != old.shape:
            raise EditError(f"{edit.parameter} has the shape {tuple(old.shape)}; the edit brings {tuple(given.shape)}")
        if isinstance(edit, MaskWeights):
            mask = given.bool() & draft.masks.get(edit.parameter, torch.ones_like(given, dtype=torch.bool))
            draft.masks[edit.parameter] = mask
            held[edit.parameter] = _with_data(old, old.detach() * mask)
        else:
            if given.is_floating_point() and not torch.isfinite(given).all() and torch.isfinite(old).all():
                raise EditError(f"the new values of {edit.parameter} hold NaN or infinite numbers")
            mask_or_none = draft.masks.get(edit.parameter)
            held[edit.parameter] = _with_data(old, given if mask_or_none is None else given * mask_or_none)
    draft.graph_module = _rebuild(draft.graph, held)


def _quantize_tensors(draft: Draft, edits: Sequence[QuantizeTensor]) -> None:
    held = flat.tensors_of(draft.graph_module)
    nodes = {n.name: n for n in draft.graph.nodes}
    reads: dict[str, list[fx.Node]] = {}
    for node in draft.graph.nodes:
        if node.op == "get_attr":
            reads.setdefault(str(node.target), []).append(node)
    for edit in edits:
        dtype = INTEGERS.get(edit.dtype)
        if dtype is None:
            raise EditError(f"there is no integer type called {edit.dtype!r}")
        if edit.tensor in held and edit.tensor in reads and edit.levels is not None:
            _share_levels(draft, held, reads[edit.tensor], edit)
        elif edit.tensor in held and edit.tensor in reads:
            _quantize_parameter(draft.graph, held, reads[edit.tensor], edit, dtype)
        elif edit.tensor in nodes and edit.levels is None:
            _quantize_activation(draft.graph, nodes[edit.tensor], edit, dtype)
        else:
            kinds = "neither a parameter nor a node" if edit.levels is None else "no parameter"
            raise EditError(f"the network has {kinds} called '{edit.tensor}'")
    draft.graph_module = _rebuild(draft.graph, held)


def _quantize_parameter(
    graph: fx.Graph, held: dict[str, Tensor], reads: list[fx.Node], edit: QuantizeTensor, dtype: torch.dtype
) -> None:
    if not held[edit.tensor].is_floating_point():
        raise EditError(f"{edit.tensor} is stored as integers already")
    quantize_weight(
        graph,
        held,
        reads,
        edit.tensor,
        scale=torch.as_tensor(edit.scale, dtype=torch.float32),
        zero_point=torch.as_tensor(edit.zero_point, dtype=torch.int64),
        limits=(edit.quant_min, edit.quant_max),
        dtype=dtype,
        axis=edit.axis,
        group=edit.group,
    )


def _share_levels(draft: Draft, held: dict[str, Tensor], reads: list[fx.Node], edit: QuantizeTensor) -> None:
    if not held[edit.tensor].is_floating_point():
        raise EditError(f"{edit.tensor} is stored as integers already")
    levels, scale = torch.as_tensor(edit.levels), torch.as_tensor(edit.scale, dtype=torch.float32)
    mask = draft.masks.get(edit.tensor)
    free = share_weight(draft.graph, held, reads, edit.tensor, levels=levels, scale=scale, axis=edit.axis)
    table = held[f"{edit.tensor}_levels"]
    if mask is not None and bool((table[:, 0] == 0).all()):
        del draft.masks[edit.tensor]  # code 0 is zero, and codes do not train: they say all that the mask said
    elif mask is not None and not bool(mask.all()):
        raise EditError(f"{edit.tensor} is masked, and its levels hold no zero")
    if free is not None:
        draft.masks[f"{edit.tensor}_levels"] = free


def _quantize_activation(graph: fx.Graph, node: fx.Node, edit: QuantizeTensor, dtype: torch.dtype) -> None:
    grid = (float(edit.scale), int(edit.zero_point), edit.quant_min, edit.quant_max, dtype)
    chosen = [u for u in node.users if edit.users is None or u.name in edit.users]
    if not chosen:
        raise EditError(
            f"nothing uses '{edit.tensor}' as the edit wants: {', '.join(edit.users or ()) or 'no users at all'}"
        )
    place = [n for n in graph.nodes if n.op == "placeholder"][-1] if node.op == "placeholder" else node
    if edit.dynamic:
        real = quantize_dynamically(graph, node, place)
    else:
        with graph.inserting_after(place):
            integers = graph.call_function(decomposed.quantize_per_tensor.default, (node, *grid))
        with graph.inserting_after(integers):
            real = graph.call_function(decomposed.dequantize_per_tensor.default, (integers, *grid))
    for user in chosen:
        user.replace_input_with(node, real)


def _replace_layers(draft: Draft, edits: Sequence[ReplaceLayer]) -> None:
    held = flat.tensors_of(draft.graph_module)
    graph = draft.graph
    nodes = {n.name: n for n in graph.nodes}
    for edit in edits:
        if edit.node not in nodes:
            raise EditError(f"the graph has no node called '{edit.node}'")
        old = nodes[edit.node]
        if old.op != "call_function" or not old.all_input_nodes:
            raise EditError(f"'{edit.node}' is not a layer that can be replaced")
        clash = [
            n for n, t in edit.tensors.items() if n in held and held[n].shape != t.shape and _readers(graph, n, old)
        ]
        if clash:
            raise EditError(f"'{clash[0]}' is used by other layers than '{edit.node}' and cannot change its shape")
        sources = {n.name: n for n in old.all_input_nodes}
        stored = edit.source is not None and edit.source.startswith("@")
        if edit.source is not None and not stored and edit.source not in sources:
            raise EditError(f"'{edit.source}' is not an input of '{edit.node}'")
        for name in edit.tensors.keys() & draft.masks.keys():
            if draft.masks[name].shape != edit.tensors[name].shape:
                del draft.masks[name]  # it says nothing of a tensor of another shape
        held.update(edit.tensors)
        with graph.inserting_before(old):
            if stored:
                sources[str(edit.source)] = graph.create_node("get_attr", str(edit.source)[1:])
            current = old.all_input_nodes[0] if edit.source is None else sources[edit.source]
            for call in edit.calls:
                current = _insert_call(graph, call, current, nodes, held)
        current.meta.setdefault("penjing", {}).update(old.meta.get("penjing", {}))
        if edit.calls:
            nodes[current.name] = current
        old.replace_all_uses_with(current, delete_user_cb=lambda user, new=current: user is not new)
        graph.erase_node(old)
        del nodes[edit.node]
    draft.graph_module = _rebuild(graph, held)


def _readers(graph: fx.Graph, name: str, besides: fx.Node) -> bool:
    return any(u is not besides for n in graph.nodes if n.op == "get_attr" and n.target == name for u in n.users)


def _insert_call(
    graph: fx.Graph, call: Call, current: fx.Node, nodes: Mapping[str, fx.Node], held: Mapping[str, Tensor]
) -> fx.Node:
    read: dict[str, fx.Node] = {}

    def find(name: str) -> fx.Node:
        if name == "":
            return current
        if name.startswith("@"):
            return read[name[1:]]
        if name in nodes:
            return nodes[name]
        raise EditError(f"a replacement uses '{name}', which the graph does not have")

    wanted = [
        str(a)[1:] for a in (*call.arguments, *call.keywords.values()) if isinstance(a, str) and a.startswith("@")
    ]
    for name in wanted:
        if name not in held:
            raise EditError(f"a replacement uses the tensor '{name}', which the network does not have")
        read[name] = graph.create_node("get_attr", name)

    def plain(value: Any) -> Any:
        return flat.decode("%" + value if isinstance(value, str) and value.startswith("@") else value, find)

    arguments = tuple(plain(a) for a in call.arguments)
    return graph.call_function(
        flat.find_target(call.operator), arguments, {k: plain(v) for k, v in call.keywords.items()}
    )


_APPLY: dict[type[Any], Any] = {
    RemoveChannels: _remove_channels,
    MaskWeights: _set_weights,
    SetWeights: _set_weights,
    QuantizeTensor: _quantize_tensors,
    ReplaceLayer: _replace_layers,
}
