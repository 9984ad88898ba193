"""How weights that share levels are held in a graph: a code for each weight, a table of levels, and the nodes that look
the levels up.

codes (uint8, the weight's shape) → reshape(rows, values) → int64 → gather(levels (rows, K), 1, ·) → reshape(shape), and
with a scale → mul. Rows are those of dimension 0, or one for all of the tensor. `<name>_levels` is a parameter: what
trains it sums the gradients of all weights with the same code (Han, Mao & Dally 2016, "Deep compression", §3). With
a scale (`<name>_scale`) the levels are fixed, a buffer, and the scale is what trains.

Code 0 is the level of exactly zero where there is one, so that a weight is zero where its code is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from penjing.errors import EditError
from penjing.tensors.codebooks import encode

aten = torch.ops.aten
MOST = 256  # levels whose codes fit in a byte
_ON_THE_WAY = {aten.reshape.default, aten.view.default, aten._to_copy.default, aten.to.dtype}


@dataclass(frozen=True)
class Codebook:
    """The tensors of a weight that shares levels: names of its codes, its levels, its scale (None: it has none)."""

    codes: str
    levels: str
    scale: str | None = None


def share_weight(
    graph: fx.Graph,
    held: dict[str, Tensor],
    reads: list[fx.Node],
    name: str,
    *,
    levels: Tensor,
    scale: Tensor,
    axis: int | None = None,
) -> Tensor | None:
    """Puts codes, levels and scale of tensor `name` into `held`, and nodes that look them up behind what reads it.

    Shapes: `levels` (K,) in any order, or (rows, K) for the rows of dimension 0; `scale` a scalar, or one value an
    index of `axis`. A scalar 1 is left away. Returns where levels may train (bool, like the levels), None if all may.
    Raises EditError for what does not fit the tensor, and where another tensor has the name of its levels or scale.
    """
    old = held[name]
    value = old.detach().float()
    scaled = bool(scale.ndim) or float(scale) != 1.0
    _check(name, value, levels, scale, axis)
    check_free(held, name, "_levels", *(["_scale"] if scaled else []))
    table = levels.detach().float().reshape(-1, levels.shape[-1])
    if len(table) == 1:
        table = torch.unique(table)[None]
    spread = scale.reshape([-1 if d == axis else 1 for d in range(value.ndim)]) if scale.ndim else scale
    codes, table = _coded((value / spread).reshape(len(table), -1), table)
    held[name] = codes.to(torch.uint8).reshape(value.shape)
    held[f"{name}_levels"] = table.to(old.dtype) if scaled else _like(old, table)
    if scaled:
        held[f"{name}_scale"] = _like(old, spread.clone())
    new = _look_up(graph, reads[0], name, (len(table), value.numel() // len(table)), value.shape, scaled)
    for read in reads:
        read.replace_all_uses_with(new[-1], delete_user_cb=lambda user: user not in new)
    still = table == 0
    return ~still if bool(still.any()) and not scaled else None


def _like(old: Tensor, value: Tensor) -> Tensor:
    return torch.nn.Parameter(value.to(old.dtype), requires_grad=getattr(old, "requires_grad", True))


def _check(name: str, value: Tensor, levels: Tensor, scale: Tensor, axis: int | None) -> None:
    if levels.ndim not in (1, 2) or not 1 <= levels.shape[-1] <= MOST:
        raise EditError(f"the levels of {name} have the shape {tuple(levels.shape)}; (K,) or (rows, K), K at most 256")
    if not bool(torch.isfinite(levels).all()) or not bool(torch.isfinite(value).all()):
        raise EditError(f"{name} or its levels hold NaN or infinite numbers")
    if levels.ndim == 2 and (not value.ndim or len(levels) != len(value)):
        raise EditError(f"{name} has the shape {tuple(value.shape)}; there are levels for {len(levels)} rows")
    if axis is not None and not -value.ndim <= axis < value.ndim:
        raise EditError(f"{name} has {value.ndim} dimensions and none that is called {axis}")
    wanted = () if axis is None else (value.shape[axis],)
    if tuple(scale.shape) != wanted:
        raise EditError(f"the scales of {name} have the shape {tuple(scale.shape)}; its grid wants {wanted}")
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise EditError(f"the scales of {name} are not all positive numbers")


def check_free(held: Mapping[str, Tensor], name: str, *endings: str) -> None:
    """Raises EditError if the network has a tensor already that is called `name` with one of the endings."""
    for new in (name + ending for ending in endings):
        if any(other == new or other.startswith(f"{new}.") for other in held):
            raise EditError(
                f"{name} cannot be stored as codes: the network has a tensor of its own called '{new}'",
                hint="give it another name in the module, and capture that again",
            )


def _coded(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(the code of the level nearest to each value, the levels in the order of their codes: zero, then ascending)"""
    ascending = table.sort(1).values
    codes = encode(rows, ascending)
    zero = ascending == 0
    first = torch.where(zero.any(1), zero.int().argmax(1), -1)[:, None]
    # What was below zero moves up by one place; where no level is zero all stay.
    order = torch.arange(table.shape[1]).expand_as(table)
    order = torch.where(order == first, -1, order).sort(dim=1, stable=True).indices
    return torch.where(codes == first, 0, codes + (codes < first).long()), ascending.gather(1, order)


def _look_up(
    graph: fx.Graph, read: fx.Node, name: str, rows: tuple[int, int], shape: torch.Size, scaled: bool
) -> list[fx.Node]:
    """The nodes behind `read` that make reals of codes; the last one holds them."""
    new: list[fx.Node] = []

    def put(target: torch._ops.OpOverload | str, *arguments: object, **keywords: object) -> fx.Node:
        with graph.inserting_after(new[-1] if new else read):
            if isinstance(target, str):
                new.append(graph.create_node("get_attr", target))
            else:
                new.append(graph.call_function(target, arguments, keywords))  # type: ignore[arg-type]
        return new[-1]

    codes = put(aten._to_copy.default, put(aten.reshape.default, read, list(rows)), dtype=torch.int64)
    found = put(aten.gather.default, put(f"{name}_levels"), 1, codes)
    found = put(aten.reshape.default, found, list(shape))
    if scaled:
        put(aten.mul.Tensor, found, put(f"{name}_scale"))
    return new


# --------------------------------------------------------------------------------------------------------- reading
def codebook_behind(node: object) -> Codebook | None:
    """The codebook whose looked-up weight a node of a network's graph is; None for anything else."""
    if not isinstance(node, fx.Node):
        return None
    scale = node.args[1] if node.target is aten.mul.Tensor else None
    seen = node.args[0] if scale is not None else node
    if isinstance(seen, fx.Node) and seen.target is aten.reshape.default:
        held = _read(seen.args[0])
        if held is not None and scale is None:
            return held
        if held is not None and isinstance(scale, fx.Node) and scale.target == f"{held.codes}_scale":
            return Codebook(held.codes, held.levels, str(scale.target))
    return None


def _read(node: object) -> Codebook | None:
    if not isinstance(node, fx.Node) or node.target is not aten.gather.default:
        return None
    levels, _, codes = node.args[:3]
    while isinstance(codes, fx.Node) and codes.target in _ON_THE_WAY:
        codes = codes.args[0]
    if not isinstance(levels, fx.Node) or not isinstance(codes, fx.Node):
        return None
    # The name tells it from a gather of the network's own.
    if levels.op != "get_attr" or codes.op != "get_attr" or levels.target != f"{codes.target}_levels":
        return None
    return Codebook(str(codes.target), str(levels.target))


def codebooks_held(graph: fx.Graph) -> dict[str, Codebook]:
    """The codebook of each weight that shares levels, by the weight's name."""
    found: dict[str, Codebook] = {}
    for node in graph.nodes:
        book = codebook_behind(node) if node.op == "call_function" else None
        if book is not None and (book.codes not in found or book.scale is not None):
            found[book.codes] = book
    return found


def looked_up(book: Codebook, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that codes, levels and scale stand for, in the codes' shape."""
    codes, levels = tensors[book.codes], tensors[book.levels]
    found = levels.gather(1, codes.reshape(len(levels), -1).long()).reshape(codes.shape)
    return found if book.scale is None else found * tensors[book.scale]


def codes_behind(node: object) -> fx.Node | None:
    """The `get_attr` node of the codes of the looked-up weight that `node` is; None for anything else."""
    book = codebook_behind(node)
    while book is not None and isinstance(node, fx.Node) and node.target != book.codes:
        node = node.args[2 if node.target is aten.gather.default else 0]
    return node if book is not None and isinstance(node, fx.Node) else None


def level_bits(levels: Tensor) -> int:
    """Bits that one code takes when packed."""
    return max(1, (levels.shape[-1] - 1).bit_length())


def packed_bytes(tensors: Mapping[str, Tensor], graph: fx.Graph) -> dict[str, int]:
    """Bytes of the codes of every codebook, packed."""
    return {
        name: math.ceil(tensors[name].numel() * level_bits(tensors[book.levels]) / 8)
        for name, book in codebooks_held(graph).items()
    }
