"""How operators change their constants when channels go: sizes of views, splits, slices, groups, pads, scales."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from penjing.errors import EditError
from penjing.network.integers import stored_behind

if TYPE_CHECKING:
    from penjing.network.channels.remove import _Shrinker

Ints = NDArray[np.int64]
Resize = Callable[["Resizing"], fx.Node | None]
RESIZE: dict[str, Resize] = {}
aten = torch.ops.aten


def resize(*names: str) -> Callable[[Resize], Resize]:
    """Register how operators are rewritten, by the name of their overload packet."""

    def register(function: Resize) -> Resize:
        for name in names:
            RESIZE[name if "::" in name else f"aten::{name}"] = function
        return function

    return register


class Resizing:
    """One call being rewritten: its old node, the new values of its arguments, and what its result should keep."""

    def __init__(self, shrinker: _Shrinker, node: fx.Node, name: str) -> None:
        self.shrinker, self.node, self.name = shrinker, node, name
        schema = getattr(node.target, "_schema", None)
        self.order = [a.name for a in schema.arguments] if schema is not None else []
        given = dict(zip(self.order, node.args, strict=False)) | dict(node.kwargs)
        self.args: dict[str, Any] = given
        self.defaults = {a.name: a.default_value for a in schema.arguments} if schema is not None else {}

    def touched(self) -> bool:
        """Whether anything this call reads or makes shrinks."""
        return any(self.changes(n) for n in (self.node, *self.node.all_input_nodes))

    def changes(self, node: fx.Node) -> bool:
        """Whether a value of the graph shrinks (or, for one without labels, has another shape now)."""
        if self.shrinker.kept(node) is not None:
            return True
        copy = self.shrinker.copies.get(node)
        value = None if copy is None else self.shrinker.after[copy]
        if isinstance(value, tuple | list):
            return any(
                self.changes(user) for user in node.users if user.target is operator.getitem
            ) or self.ends_change(node)
        before = self.shrinker.groups.shapes.get(node.name)
        return isinstance(value, Tensor) and before is not None and tuple(value.shape) != before

    def ends_change(self, node: fx.Node) -> bool:
        """Whether the parts of a split shrink."""
        return any(self.shrinker.kept(user) is not None for user in node.users)

    def value(self, argument: str) -> Any:
        """An argument's value in the new graph."""
        return fx.map_arg(
            self.args.get(argument, self.defaults.get(argument)), lambda n: self.shrinker.after[self.shrinker.copies[n]]
        )

    def old_shape(self, argument: str) -> tuple[int, ...]:
        """The shape an argument had."""
        return self.shrinker.groups.shapes[self.args[argument].name]

    def kept(self, argument: str | None = None) -> tuple[int, Ints] | None:
        """What an argument, or the result, keeps."""
        return self.shrinker.kept(self.node if argument is None else self.args[argument])

    def make(self, target: Any = None, /, **changed: Any) -> fx.Node:
        """The call in the new graph, with some arguments replaced (by new nodes or plain values)."""
        args = {k: fx.map_arg(v, lambda n: self.shrinker.copies[n]) for k, v in self.args.items()} | changed
        operator_called: Any = target or self.node.target
        schema = operator_called._schema
        positional = [a.name for a in schema.arguments if not a.kwarg_only]
        last = max((i for i, name in enumerate(positional) if name in args), default=-1)
        defaults = {a.name: a.default_value for a in schema.arguments}
        values = [args.get(name, defaults[name]) for name in positional[: last + 1]]
        keywords = {k: v for k, v in args.items() if k not in positional}
        return self.shrinker.insert(operator_called, *values, **keywords)

    def fitted(self, argument: fx.Node) -> fx.Node:
        """An operand that broadcasts to the result, cut to what the result keeps where it still has the old size."""
        copy = self.shrinker.copies[argument]
        for axis, indices in self.shrinker.all_kept(self.node):
            value = self.shrinker.after[copy]
            old = self.shrinker.groups.shapes[self.node.name]
            if not isinstance(value, Tensor):
                break
            dim = axis - (len(old) - value.dim())
            if dim >= 0 and value.shape[dim] not in (1, len(indices)) and value.shape[dim] == old[axis]:
                copy = self.chosen(copy, dim, indices)
        return copy

    def chosen(self, copy: fx.Node, dim: int, indices: Ints) -> fx.Node:
        """Positions of a value of the new graph along a dimension: a slice if they are neighbours."""
        if len(indices) and int(indices[-1]) - int(indices[0]) == len(indices) - 1 and (np.diff(indices) == 1).all():
            return self.shrinker.insert(aten.slice.Tensor, copy, dim, int(indices[0]), int(indices[-1]) + 1)
        value = self.shrinker.after[copy]
        if copy.op == "get_attr":
            return self.shrinker.constant(str(copy.target), value.detach().index_select(dim, torch.as_tensor(indices)))
        number = self.shrinker.constant(self.node.name, torch.as_tensor(indices))
        return self.shrinker.insert(aten.index_select.default, copy, dim, number)


@resize("pointwise::any", "masked_fill", "where", "addcmul", "addcdiv", "lerp", "expand_as")
def pointwise(call: Resizing) -> fx.Node | None:
    """Constants that still have the old size are cut where they are used."""
    fitted = {n: call.fitted(n) for n in call.node.all_input_nodes}
    if all(fitted[n] is call.shrinker.copies[n] for n in fitted):
        return None
    copy = call.shrinker.graph.node_copy(call.node, lambda n: fitted[n])
    call.shrinker.evaluate(copy)
    return copy


@resize("baddbmm", "addmm", "addbmm")
def added(call: Resizing) -> fx.Node | None:
    """A constant that is added to a product (ALiBi slopes) loses what the product loses."""
    bias = call.fitted(call.args["self"])
    return None if bias is call.shrinker.copies[call.args["self"]] else call.make(self=bias)


@resize("cat", "stack")
def cat(call: Resizing) -> fx.Node | None:
    """Along the dimensions the operands share."""
    kept = call.kept()
    shape = call.shrinker.groups.shapes[call.node.name]
    dim = int(call.value("dim") or 0) % len(shape)
    if kept is None:
        return None
    tensors = list(call.args["tensors"])
    if kept[0] != dim:
        axis = kept[0] - (1 if call.name == "aten::stack" and kept[0] > dim else 0)
        wide = [_cut(call, n, axis, shape[kept[0]], kept[1]) for n in tensors]
        return call.make(tensors=wide)
    if call.name == "aten::stack":
        return None
    start, parts = 0, []
    for n in tensors:
        size = call.shrinker.groups.shapes[n.name][dim]
        mine = kept[1][(kept[1] >= start) & (kept[1] < start + size)] - start
        parts.append(_cut(call, n, dim, size, mine))
        start += size
    return call.make(tensors=parts)


def _cut(call: Resizing, node: fx.Node, dim: int, size: int, kept: Ints) -> fx.Node:
    copy = call.shrinker.copies[node]
    value = call.shrinker.after[copy]
    if value.dim() <= dim or value.shape[dim] == len(kept) or value.shape[dim] != size:
        return copy
    return call.chosen(copy, dim, kept)


@resize("view", "reshape", "_unsafe_view", "expand", "unflatten", "_reshape_alias", "view_copy", "broadcast_to")
def sizes(call: Resizing) -> fx.Node | None:
    """Entries that name the dimension that shrinks; a symbolic one is scaled, since the batch may be in it."""
    name = "sizes" if "sizes" in call.args else "shape" if "shape" in call.args else "size"
    wanted = call.shrinker.expected(call.node)
    before = call.shrinker.groups.shapes[call.node.name]
    entries = list(call.args[name])
    now = list(call.value(name))
    if wanted is None:
        return None
    offset = int(call.value("dim")) % len(call.old_shape("self")) if name == "sizes" else 0
    changed = False
    for i, entry in enumerate(entries):
        new, old = wanted[offset + i], before[offset + i]
        if now[i] == new or now[i] == -1:
            entries[i] = call.shrinker.copies[entry] if isinstance(entry, fx.Node) else entry
            continue
        changed = True
        if isinstance(entry, fx.Node):
            divisor = math.gcd(new, old)
            product = call.shrinker.insert(operator.mul, call.shrinker.copies[entry], new // divisor)
            entries[i] = call.shrinker.insert(operator.floordiv, product, old // divisor)
        else:
            entries[i] = new
    if not changed:
        return None
    return call.make(
        aten.reshape.default if call.name in ("aten::view", "aten::_unsafe_view") else None,
        **_shape(call, name, entries),
    )


def _shape(call: Resizing, name: str, entries: list[Any]) -> dict[str, Any]:
    if call.name in ("aten::view", "aten::_unsafe_view"):
        call.args = {k: v for k, v in call.args.items() if k != name}
        return {"shape": entries}
    return {name: entries}


@resize("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split", "unbind")
def split(call: Resizing) -> fx.Node | None:
    """Every part keeps what its labels say."""
    if call.name == "aten::unbind":
        return None
    kept = call.kept("self")
    shape = call.old_shape("self")
    dim = int(call.value("dim") or 0) % len(shape)
    if kept is None or kept[0] != dim:
        return None
    lengths = _lengths(call, shape[dim])
    bounds = np.cumsum([0, *lengths])
    new = [int(((kept[1] >= a) & (kept[1] < b)).sum()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    if min(new) == 0:
        raise EditError(f"{call.name} ({call.node.name}) would have an empty part", hint="keep a channel in every part")
    return call.shrinker.insert(aten.split_with_sizes.default, call.shrinker.copies[call.args["self"]], new, dim)


def _lengths(call: Resizing, size: int) -> list[int]:
    if call.name == "aten::split_with_sizes":
        return list(call.value("split_sizes"))
    if call.name in ("aten::chunk", "aten::unsafe_chunk"):
        return [len(p) for p in torch.empty(size).chunk(int(call.value("chunks")))]
    if call.name == "aten::tensor_split":
        given = call.value("sections") if "sections" in call.args else call.value("indices")
        return [len(p) for p in torch.empty(size).tensor_split(given)]
    length = int(call.value("split_size"))
    return [min(length, size - start) for start in range(0, size, length)]


@resize("slice", "narrow")
def slices(call: Resizing) -> fx.Node | None:
    """The part that is left of a slice."""
    kept = call.kept("self")
    shape = call.old_shape("self")
    dim = int(call.value("dim") or 0) % len(shape)
    if kept is None or kept[0] != dim:
        return None
    numbers = torch.arange(shape[dim])
    extra = [call.value(name) for name in call.order[2:]]
    taken = call.node.target(numbers, 0, *extra).numpy()  # type: ignore[operator]
    if len(taken) == shape[dim] and extra[-1] == 1:
        return None
    mine = np.searchsorted(kept[1], taken[np.isin(taken, kept[1])])
    return call.chosen(call.shrinker.copies[call.args["self"]], dim, mine)


@resize("select", "index_select", "index")
def lookup(call: Resizing) -> fx.Node | None:
    """Constant positions move with what is left before them."""
    kept = call.kept("self")
    if kept is None:
        return None
    place = {int(old): new for new, old in enumerate(kept[1])}
    size = call.old_shape("self")[kept[0]]
    if call.name == "aten::index":
        indices = list(call.args["indices"])
        if kept[0] >= len(indices) or indices[kept[0]] is None:
            return None
        taken = call.value("indices")[kept[0]].reshape(-1).tolist()
        mine = torch.tensor([place[t % size] for t in taken if t % size in place])
        changed: list[Any] = [None if i is None else call.shrinker.copies[i] for i in indices]
        changed[kept[0]] = call.shrinker.constant(call.node.name, mine)
        return call.make(indices=changed)
    if int(call.value("dim")) % len(call.old_shape("self")) != kept[0]:
        return None
    if call.name == "aten::select":
        return call.make(index=place[int(call.value("index")) % size])
    taken = call.value("index").tolist()
    return call.make(
        index=call.shrinker.constant(call.node.name, torch.tensor([place[t] for t in taken if t in place]))
    )


@resize("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def normalized(call: Resizing) -> fx.Node | None:
    """The shape that is normalized over."""
    x = call.value("input")
    return call.make(normalized_shape=list(x.shape[x.dim() - len(call.value("normalized_shape")) :]))


@resize("group_norm")
def group_norm(call: Resizing) -> fx.Node | None:
    """Channels that are groups of their own change the number of groups."""
    if call.old_shape("input")[1] != call.value("num_groups"):
        return None
    return call.make(num_groups=call.value("input").shape[1])


@resize(
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
    "_convolution",
)
def convolution(call: Resizing) -> fx.Node | None:
    """Depthwise convolutions have as many groups as channels."""
    groups = int(call.value("groups") or 1)
    x, weight = call.value("input"), call.value("weight")
    channel = x.dim() - weight.dim() + 1
    if groups == 1 or call.old_shape("input")[channel] != groups:
        return None
    return call.make(groups=x.shape[channel])


@resize("scaled_dot_product_attention")
def attention(call: Resizing) -> fx.Node | None:
    """The scale stays what it was; a stored mask with one plane a head loses planes."""
    changed: dict[str, Any] = {}
    old = call.old_shape("query")
    if call.value("scale") is None and call.value("query").shape[-1] != old[-1]:
        changed["scale"] = 1.0 / math.sqrt(old[-1])
    mask = call.args.get("attn_mask")
    if isinstance(mask, fx.Node):
        kept, value = call.kept("query"), call.value("attn_mask")
        if kept is not None and kept[0] < len(old) - 2:
            dim = kept[0] - (len(old) - value.dim())
            if dim >= 0 and value.shape[dim] == old[kept[0]] and value.shape[dim] != len(kept[1]):
                changed["attn_mask"] = call.chosen(call.shrinker.copies[mask], dim, kept[1])
    return call.make(**changed) if changed else None


@resize("pad", "constant_pad_nd")
def pad(call: Resizing) -> fx.Node | None:
    """Channels padded in are counted by their labels."""
    kept = call.kept()
    if kept is None:
        return None
    dim, indices = kept
    amounts = list(call.value("pad"))
    i = len(call.old_shape("self")) - 1 - dim
    if 2 * i >= len(amounts) or amounts[2 * i] <= 0 and amounts[2 * i + 1] <= 0:
        return None
    size = call.old_shape("self")[dim]
    before, after = amounts[2 * i], amounts[2 * i + 1]
    amounts[2 * i] = int((indices < before).sum()) if before > 0 else before
    amounts[2 * i + 1] = int((indices >= before + size).sum()) if after > 0 else after
    return call.make(pad=amounts)


@resize("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def states(call: Resizing) -> fx.Node | None:
    """Initial states that are constants lose the units that go."""
    back = call.args["w_hh"] if "w_hh" in call.args else call.args["params"][1]
    size = call.shrinker.groups.shapes[back.name][1]
    stored = stored_behind(back)
    classes = None if stored is None else call.shrinker.groups.classes_of(str(stored.target), 1)
    if classes is None or not call.shrinker.gone[classes].any():
        return None
    kept = np.flatnonzero(~call.shrinker.gone[classes])
    hx = call.args["hx"]
    given = list(hx) if isinstance(hx, list | tuple) else [hx]
    cut = [_cut(call, n, call.shrinker.after[call.shrinker.copies[n]].dim() - 1, size, kept) for n in given]
    return call.make(hx=cut if isinstance(hx, list | tuple) else cut[0])


@resize("gather")
def gathered(call: Resizing) -> fx.Node | None:
    """Positions that are the same for every channel, or every head along the batch, are those of what is left."""
    x, index, dim = call.value("self"), call.value("index"), int(call.value("dim"))
    longer = [d for d in range(x.dim()) if d != dim % x.dim() and index.shape[d] > x.shape[d]]
    if not longer:
        return None
    copy = call.shrinker.copies[call.args["index"]]
    if copy.target is aten.expand.default:
        source, wanted = copy.args[:2]
        sizes: list[Any] = list(wanted)  # type: ignore[arg-type]
        for d in longer:
            sizes[d] = call.shrinker.insert(aten.sym_size.int, call.shrinker.copies[call.args["self"]], d)
        return call.make(index=call.shrinker.insert(aten.expand.default, source, sizes))
    for d, indices in call.shrinker.all_kept(call.node):
        if d in longer:
            copy = call.chosen(copy, d, indices)
    return call.make(index=copy)
