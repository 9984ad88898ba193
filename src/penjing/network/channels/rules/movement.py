"""Pure movements of data: executed literally, on labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from penjing.network.channels.labels import Labels, Slots, along, compact, core, is_free, varying
from penjing.network.channels.rules.base import Call, opaque, rule


def _layers(call: Call, labels: Labels, move: Any) -> Any:
    """Apply a movement to every layer of labels."""
    if isinstance(labels, Tensor):
        return move(labels)
    moved = [move(layer) for layer in labels.layers]
    if moved and isinstance(moved[0], list | tuple):
        return tuple(_slots([m[i] for m in moved]) for i in range(len(moved[0])))
    return _slots(moved)


def _slots(layers: list[Tensor]) -> Slots:
    return Slots(tuple(layers[0].shape), tuple(layer for layer in map(compact, layers) if not is_free(layer)))


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "_reshape_alias",
    "view_copy",
    "ravel",
    "squeeze_",
    "unsqueeze_",
    "reshape_as",
)
def reshape(call: Call) -> Any:
    """Another shape for the same elements in the same order."""
    return _layers(call, next(iter(call.labels.values())), lambda labels: labels.reshape(call.shape))


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Any:
    """Repeats along dimensions of size 1."""
    return _layers(call, call.labels["self"], lambda labels: labels.expand(call.shape))


@rule(
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "adjoint",
    "matrix_H",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "slice",
    "narrow",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "chunk",
    "unsafe_chunk",
    "unbind",
    "tensor_split",
    "flip",
    "repeat",
    "tile",
    "repeat_interleave",
    "unfold",
    "diagonal",
    "rot90",
    "pixel_unshuffle",
    "transpose_",
    "t_",
    "hsplit",
    "vsplit",
    "permute_copy",
    "channel_shuffle",
    "native_channel_shuffle",
)
def literal(call: Call) -> Any:
    """The operator itself, run on labels."""
    first = next(k for k, v in call.labels.items() if isinstance(v, Tensor | Slots))
    if any(
        isinstance(v, Tensor | Slots) and not (isinstance(v, Tensor) and is_free(v))
        for k, v in call.labels.items()
        if k != first
    ):
        return opaque(call)
    return _layers(call, call.labels[first], lambda labels: _run(call, labels))


def _run(call: Call, labels: Tensor) -> Any:
    holder = object()
    node = call.node
    source = node.all_input_nodes[0]

    def fetch(n: fx.Node) -> Any:
        return holder if n is source else call.values[next(k for k, v in call.nodes.items() if v is n)]

    def place(value: Any) -> Any:
        return labels if value is holder else value

    args = [
        place(fx.map_arg(a, fetch)) if isinstance(a, fx.Node) else fx.map_arg(a, lambda n: _symbol(call, n))
        for a in node.args
    ]
    kwargs = {k: fx.map_arg(v, lambda n: _symbol(call, n)) for k, v in node.kwargs.items()}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _symbol(call: Call, node: fx.Node) -> Any:
    """The real value of a size used inside a list of arguments."""
    for name, given in call.nodes.items():
        if given is node:
            return call.values[name]
        if isinstance(given, list | tuple) and node in given:
            return call.values[name][list(given).index(node)]
    raise KeyError(node)


@rule("select", "select_copy")
def select(call: Call) -> Any:
    """One position of a dimension."""
    return literal(call)


@rule("roll")
def roll(call: Call) -> Any:
    """A cyclic shift; shifting channels themselves keeps them all."""
    labels = call.labels["self"]
    if isinstance(labels, Tensor):
        dims = [d % labels.dim() for d in call.values["dims"]]
        if not [d for d in dims if d in varying(labels)] and dims:
            return labels
    return opaque(call)


@rule("index", "index_select", "gather", "take_along_dim")
def index(call: Call) -> Any:
    """Lookups by constant positions are movements; positions computed from data keep what they choose among."""
    labels = call.labels["self"]
    kind = call.name.removeprefix("aten::")
    layers = labels.layers if isinstance(labels, Slots) else (labels,)
    if kind == "index":
        indices = call.values["indices"]
        dims = [d for d, i in enumerate(indices) if i is not None]
        nodes = [i for i in call.nodes["indices"] if isinstance(i, fx.Node)]
        if any(i is not None and i.dtype == torch.bool for i in indices):
            return opaque(call)
    else:
        dims, nodes = [int(call.values["dim"]) % len(call.values["self"].shape)], [call.nodes["index"]]
    chosen = [layer for layer in layers if set(varying(layer)) & set(dims)]
    stored = all(n.op == "get_attr" for n in nodes)
    if kind == "gather" and call.static and getattr(call.nodes["self"], "op", "") == "get_attr":
        # A table of levels that weights share: its rows belong to codes, which carry no labels.
        pinned = call.tape.pin(labels, "weights that share levels", call.node.name)
        return torch.tensor(pinned).expand(call.shape)
    if isinstance(labels, Slots):
        for layer in chosen:
            call.pin(layer, f"{call.name} looks positions up")
    elif chosen and (not stored or kind != "index_select" and len(dims) > 1 or kind == "gather"):
        return opaque(call)

    def move(layer: Tensor) -> Any:
        if kind == "index":
            return torch.ops.aten.index.Tensor(layer.contiguous(), [None if i is None else i for i in indices])
        if kind == "index_select":
            return layer.index_select(dims[0], call.values["index"])
        return layer.gather(dims[0], call.values["index"])

    return _layers(call, labels, move)


@rule("cat", "concat", "concatenate", "stack")
def cat(call: Call) -> Any:
    """Values side by side: dimensions they share must agree, the dimension they are joined along is the sum."""
    operands: list[Labels] = call.labels["tensors"]
    shapes = [tuple(t.shape) for t in call.values["tensors"]]
    ndim = len(call.shape)
    dim = int(call.values.get("dim") or 0) % ndim
    if any(isinstance(t, Slots) for t in operands):
        if not call.static:
            return _cat(call, [call.tape.elements(t) for t in operands], dim)
        return _cat_weights(call, [call.tape.as_slots(t) for t in operands], dim)
    kept = [t for t, shape in zip(operands, shapes, strict=True) if shape != (0,) or ndim == 1]
    return _cat(call, [call.tape.elements(t) for t in kept], dim)


def _cat(call: Call, operands: list[Tensor], dim: int) -> Tensor:
    if call.name == "aten::stack":
        operands = [t.unsqueeze(dim) for t in operands]
    known = [t for t in operands if not is_free(t)]
    over = {tuple(varying(t)) for t in known if varying(t)}
    if len(over) == 1 and dim not in next(iter(over)):
        # the same channels for every position, so that what follows sees one dimension of channels and not two
        labels = [core(t) for t in known]
        for other in labels[1:]:
            call.tape.union(labels[0], other)
        widest = max(labels, key=lambda t: t.numel())
        return widest.expand(call.shape)
    parts = []
    shape = [1] * len(call.shape)
    for t in operands:
        for d in varying(t):
            shape[d] = t.shape[d]
    for t in operands:
        size = list(shape)
        size[dim] = t.shape[dim]
        parts.append(core(t).expand(size))
    return torch.cat(parts, dim).expand(call.shape)


def _cat_weights(call: Call, operands: list[Slots], dim: int) -> Any:
    if call.name == "aten::stack":
        return opaque(call)
    layers = []
    for d in range(len(call.shape)):
        vectors = [call.tape.axis(t, d) for t in operands]
        if d == dim:
            vector = torch.cat(vectors)
        else:
            vector = vectors[0]
            for other in vectors[1:]:
                call.tape.union(vector, other)
                vector = torch.where(vector == 0, other, vector)
        if vector.any():
            layers.append(along(vector, d, call.shape))
    return Slots(call.shape, tuple(layers))


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Tensor:
    """r² channels become one channel of r × r positions, and go together."""
    labels = call.label("self")
    factor = int(call.values["upscale_factor"]) ** 2
    dim = labels.dim() - 3
    split = core(labels)
    shape = split.shape
    many = shape[dim] > 1
    split = split.reshape(*shape[:dim], -1, factor, *shape[dim + 1 :]) if many else split.unsqueeze(dim + 1)
    return call.tape.join_along(split, dim + 1).squeeze(dim + 1).expand(call.shape)


@rule("im2col")
def unfold(call: Call) -> Tensor:
    """Patches as columns: every channel becomes k × k rows."""
    source = call.label("self")
    moved = call.node.target(source.double(), *[call.values[k] for k in list(call.values)[1:]])  # type: ignore[operator]
    rows = moved.long().amax(-1, keepdim=True)
    labels: Tensor = rows.expand(call.shape)
    return labels


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Tensor:
    """Padding of positions keeps channels; channels that are padded in get labels of their own."""
    labels = call.label("self")
    amounts = [int(n) for n in call.values["pad"]]
    mode, value = call.values.get("mode") or "constant", call.values.get("value")
    over = varying(labels)
    result = core(labels)
    for i in range(len(amounts) // 2):
        d = labels.dim() - 1 - i
        before, after = amounts[2 * i], amounts[2 * i + 1]
        if d not in over or (before == 0 and after == 0):
            continue
        if mode != "constant" or value not in (None, 0, 0.0):
            call.pin(labels, f"{call.name} of channels with values")
        if before < 0 or after < 0:
            result = torch.nn.functional.pad(result.double(), [0, 0] * i + [min(0, before), min(0, after)]).long()
        shape = list(result.shape)
        parts = []
        for amount in (before, after):
            shape[d] = max(0, amount)
            parts.append(call.tape.fresh(shape))
        result = torch.cat([parts[0], result, parts[1]], d)
    return result.expand(call.shape)
