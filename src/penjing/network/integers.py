"""How weights on integer grids are held in a graph: their codes, their scales, and the nodes that read them back.

One scale: codes → dequantize_per_tensor. A scale for each index of an axis: codes → dequantize_per_channel. A scale for
each group of values of a row (dimension 0; what is behind it is read as one row): codes → view(rows · groups, values)
→ dequantize_per_channel → view(shape), with a pad and a slice around it where the last group of a row is shorter. So
every runtime that knows grids with an axis knows groups, and the codes keep the shape of the weight.

Codes narrower than 8 bits are held in bytes; the limits of their grid say how wide they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from penjing.errors import EditError
from penjing.network.codebooks import check_free, codes_behind, packed_bytes
from penjing.network.graph import DEQUANTIZE

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
_LEAST_SCALE = float(torch.finfo(torch.float32).eps)
_AROUND = {aten.view.default, aten.constant_pad_nd.default, aten.slice.Tensor}


def quantize_weight(
    graph: fx.Graph,
    held: dict[str, Tensor],
    reads: Sequence[fx.Node],
    name: str,
    *,
    scale: Tensor,
    zero_point: Tensor,
    limits: tuple[int, int],
    dtype: torch.dtype,
    axis: int | None = None,
    group: int = 0,
) -> None:
    """Puts the codes of tensor `name` into `held` and dequantizing nodes behind the nodes that read it.

    Shapes: `scale` and `zero_point` are scalars, one value an index of `axis`, or (rows, groups a row) with `group`.
    Raises EditError for scales that do not fit the tensor, and where another tensor has their name.
    """
    value = held[name].detach().float()
    _check(name, value, scale, zero_point, limits, axis, group)
    if axis is not None or group:
        check_free(held, name, "_scale", "_zero_point")
    if axis is None and not group:
        grid = (float(scale), int(zero_point), *limits, dtype)
        held[name] = decomposed.quantize_per_tensor.default(value, *grid)
        with graph.inserting_after(reads[0]):
            real = graph.call_function(decomposed.dequantize_per_tensor.default, (reads[0], *grid))
    else:
        zero_point = zero_point.expand(scale.shape).reshape(-1).contiguous()
        scale = scale.reshape(-1).contiguous()
        rows = _cut(value, group) if group else value
        codes = decomposed.quantize_per_channel.default(rows, scale, zero_point, 0 if group else axis, *limits, dtype)
        held[name] = _joined(codes, value.shape) if group else codes
        held |= {f"{name}_scale": scale, f"{name}_zero_point": zero_point}
        real = _read_back(graph, reads[0], name, value.shape, limits, dtype, axis, group)
    new = _between(reads[0], real)
    for read in reads:
        read.replace_all_uses_with(real, delete_user_cb=lambda user: user not in new)


def _between(read: fx.Node, real: fx.Node) -> set[fx.Node]:
    """The nodes from a stored tensor to the one that holds its reals."""
    found: set[fx.Node] = set()
    node = real
    while node is not read:
        found.add(node)
        node = node.args[0]  # type: ignore[assignment]
    return found


def _check(
    name: str,
    value: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    limits: tuple[int, int],
    axis: int | None,
    group: int,
) -> None:
    if limits[0] >= limits[1]:
        raise EditError(f"a grid for {name} from {limits[0]} to {limits[1]} has no steps")
    if group < 0 or (group and axis not in (None, 0)):
        raise EditError(f"groups of {name} are cut from its rows (axis 0), not from axis {axis}")
    if group:
        wanted: tuple[int, ...] = (len(value), -(-value[0].numel() // group)) if value.ndim else ()
    else:
        wanted = () if axis is None else (value.shape[axis],)
    if not value.ndim and wanted != tuple(scale.shape):
        raise EditError(f"{name} is a single number and has no rows to cut")
    if tuple(scale.shape) != wanted:
        raise EditError(f"the scales of {name} have the shape {tuple(scale.shape)}; its grid wants {wanted}")
    if zero_point.ndim and zero_point.shape != scale.shape:
        raise EditError(f"the zero points of {name} have another shape than its scales")


def _cut(value: Tensor, group: int) -> Tensor:
    """(rows · groups, group): the rows of a tensor in groups, the last of each filled up with zeros."""
    rows = value.reshape(len(value), -1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).reshape(-1, group)


def _joined(groups: Tensor, shape: torch.Size) -> Tensor:
    rows = groups.reshape(shape[0], -1)
    return rows[:, : math.prod(shape[1:])].reshape(shape).contiguous()


def _read_back(
    graph: fx.Graph,
    read: fx.Node,
    name: str,
    shape: torch.Size,
    limits: tuple[int, int],
    dtype: torch.dtype,
    axis: int | None,
    group: int,
) -> fx.Node:
    """The nodes behind `read` that make reals of codes with one scale an index or a group."""
    columns = math.prod(shape[1:])
    missing = -columns % group if group else 0
    at = read

    def call(target: torch._ops.OpOverload, *arguments: object) -> fx.Node:
        nonlocal at
        with graph.inserting_after(at):
            at = graph.call_function(target, arguments)  # type: ignore[arg-type]
        return at

    current = read
    if missing:
        rows = call(aten.view.default, current, [shape[0], columns]) if len(shape) != 2 else current
        current = call(aten.constant_pad_nd.default, rows, [0, missing])
    if group:
        current = call(aten.view.default, current, [shape[0] * (columns + missing) // group, group])
    with graph.inserting_after(at):
        scales = at = graph.create_node("get_attr", f"{name}_scale")
    with graph.inserting_after(at):
        zeros = at = graph.create_node("get_attr", f"{name}_zero_point")
    place = 0 if group else axis
    current = call(decomposed.dequantize_per_channel.default, current, scales, zeros, place, *limits, dtype)
    if missing:
        current = call(aten.view.default, current, [shape[0], columns + missing])
        current = call(aten.slice.Tensor, current, 1, 0, columns)
        return call(aten.view.default, current, list(shape)) if len(shape) != 2 else current
    return call(aten.view.default, current, list(shape)) if group else current


def quantize_dynamically(graph: fx.Graph, node: fx.Node, place: fx.Node) -> fx.Node:
    """Nodes behind `place` that put `node`'s value on a uint8 grid of its own range in every run; returns the reals."""
    limits = (0, 255)
    with graph.inserting_after(place):
        found = graph.call_function(decomposed.choose_qparams.tensor, (node, *limits, _LEAST_SCALE, torch.uint8))
    with graph.inserting_after(found):
        scale = graph.call_function(operator.getitem, (found, 0))
    with graph.inserting_after(scale):
        zero = graph.call_function(operator.getitem, (found, 1))
    grid = (scale, zero, *limits, torch.uint8)
    with graph.inserting_after(zero):
        codes = graph.call_function(decomposed.quantize_per_tensor.tensor, (node, *grid))
    with graph.inserting_after(codes):
        return graph.call_function(decomposed.dequantize_per_tensor.tensor, (codes, *grid))


# --------------------------------------------------------------------------------------------------------- reading
def dynamically_read(node: fx.Node) -> bool:
    """Whether the first input of an operator stands on a grid that is found in every run."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.target is not decomposed.dequantize_per_tensor.tensor:
        return False
    scale = source.args[1]
    found = scale.args[0] if isinstance(scale, fx.Node) and scale.args else None
    return isinstance(found, fx.Node) and found.target is decomposed.choose_qparams.tensor


def codes_read(node: fx.Node, sources: tuple[str, ...] = ("get_attr",)) -> fx.Node | None:
    """The node (an operation of `sources`) whose stored codes a dequantizing node reads, cut into groups or not; None
    if it reads an activation."""
    if node.target not in DEQUANTIZE:
        return None
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target in _AROUND:
        source = source.args[0]
    return source if isinstance(source, fx.Node) and source.op in sources else None


def stored_behind(node: object) -> fx.Node | None:
    """The `get_attr` node of the tensor that `node` is, behind its dequantization (of groups as well) or the
    lookup of its levels; None if it is computed."""
    codes = codes_behind(node)
    if codes is not None:
        return codes
    seen = node
    while isinstance(seen, fx.Node) and seen.target in _AROUND:
        seen = seen.args[0]
    if not isinstance(seen, fx.Node):
        return None
    grouped = isinstance(seen.args[0], fx.Node) and seen.args[0].target in _AROUND if seen.args else False
    if seen is not node and not grouped:
        return None  # a view that is the network's own
    return codes_read(seen) if seen.op == "call_function" else seen if seen.op == "get_attr" else None


def grids_held(graph: fx.Graph) -> dict[str, tuple[int, int]]:
    """The smallest and largest code of the grid of each tensor that is stored as codes, by name."""
    found = {}
    for node in graph.nodes:
        read = codes_read(node) if node.op == "call_function" else None
        if read is not None:
            low, high = node.args[-3:-1]
            found[str(read.target)] = (int(low), int(high))
    return found


def code_bits(codes: Tensor, low: int, high: int) -> int:
    """Bits that one code of a grid takes when packed: 1 for codes that are all -1 or 1, 2 for -1, 0 and 1, else as many
    as the levels `low..high` need."""
    if (low, high) == (-1, 1):
        return 1 if bool((codes != 0).all()) else 2
    return max(1, (high - low).bit_length())


def code_kind(codes: Tensor, low: int, high: int) -> str:
    """ "int4", "ternary" or "binary": the type whose codes these are."""
    bits = code_bits(codes, low, high)
    return {1: "binary", 2: "ternary"}[bits] if (low, high) == (-1, 1) else f"int{bits}"


def stored_bytes(tensors: Mapping[str, Tensor], graph: fx.Graph) -> dict[str, int]:
    """Bytes of each tensor with codes packed to the width of their grid or table; zero points take the width of their
    codes, or nothing where all are 0."""
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    for name, (low, high) in grids_held(graph).items():
        bits = code_bits(tensors[name], low, high)
        sizes[name] = -(-tensors[name].numel() * bits // 8)
        zeros = tensors.get(f"{name}_zero_point")
        if zeros is not None:
            sizes[f"{name}_zero_point"] = -(-zeros.numel() * bits // 8) if bool(zeros.any()) else 0
    return sizes | packed_bytes(tensors, graph)
