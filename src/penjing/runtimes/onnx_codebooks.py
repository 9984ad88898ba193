"""Weights that share levels in an ONNX model: codes of 4 or 8 bits, a table, and the nodes that look the levels up.

Cast(codes) → Gather(levels, ·), with a table a row Cast → Add(where each begins) → Gather → Reshape; Mul by the scales
where there are some. ONNX Runtime and OpenVINO fold all of it into one float constant at loading (OpenVINO would not
fold GatherElements): the file is small, and what runs is as fast as in float. Whatever the exporter made of the
lookups, computed or folded, is put aside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import fx

from penjing.runtimes.base import Widened
from penjing.runtimes.onnx_nodes import keep, replace_all
from penjing.runtimes.trace import tensor_names

if TYPE_CHECKING:
    from penjing.network import Network

Array = np.ndarray[Any, Any]
_NARROW = 16  # levels whose codes fit in 4 bits


@dataclass(frozen=True)
class Shared:
    """A weight that shares levels. `values`: the names that its reals may have in the file, the surest first; `codes`
    in the weight's shape, `levels` (rows, K), `scale` in a shape that broadcasts (None: there is none)."""

    name: str
    kind: str
    values: tuple[str, ...]
    codes: Array
    levels: Array
    scale: Array | None


def shared(network: Network, traced: torch.export.ExportedProgram) -> tuple[Shared, ...]:
    """The weights of `network` that share levels, and what they are called in its traced program."""
    books, kinds, tensors = network.shared_levels(), network.code_kinds(), network.tensors()
    owners = {book.levels: book for book in books.values()}
    names = tensor_names(traced)
    found = []
    for node in traced.graph.nodes:
        table = node.args[0] if node.target is torch.ops.aten.gather.default else None
        book = owners.get(names.get(str(table.target), "")) if isinstance(table, fx.Node) else None
        if book is None:
            continue
        levels, codes = (tensors[n].detach().numpy() for n in (book.levels, book.codes))
        scale = None if book.scale is None else tensors[book.scale].detach().numpy()
        found.append(Shared(book.codes, kinds[book.codes], _ends(node, book.scale, names), codes, levels, scale))
    return tuple(found)


def _ends(node: fx.Node, scale: str | None, names: dict[str, str]) -> tuple[str, ...]:
    """The nodes that hold the looked-up weight in its own shape, last first: views that change nothing may be gone."""
    view = next(iter(node.users))
    if scale is None:
        return view.name, node.name
    product = [u for u in view.users if any(names.get(str(a.target)) == scale for a in u.all_input_nodes)]
    return tuple(p.name for p in product)


def look_up(graph: Any, weights: Iterable[Shared]) -> tuple[Widened, ...]:
    """Puts the lookups of `weights` in front of a graph; says which codes had to be widened."""
    held = {v.name: v for node in graph for v in node.outputs} | dict(graph.initializers)
    first = next(iter(graph), None)
    widened = []
    for weight in weights:
        old = next((held[n] for n in weight.values if n in held and _fits(held[n], weight)), None)
        factor = None if old is None or old.const_value is None else _factor(weight, old.const_value.numpy())
        if old is None or first is None or factor is False:
            widened.append(Widened(weight.name, weight.kind, str(weight.levels.dtype), "the exporter folded its table"))
            continue
        real, stored = _real(graph, first, weight, factor)
        real.shape, real.type = old.shape, old.type
        replace_all(old, real)
        count = weight.levels.shape[1]
        if count not in (_NARROW, 256) and (count - 1).bit_length() not in (4, 8):
            widened.append(Widened(weight.name, weight.kind, stored, f"no codes of {(count - 1).bit_length()} bits"))
    return tuple(widened)


def _fits(value: Any, weight: Shared) -> bool:
    return value.shape is not None and tuple(value.shape) == weight.codes.shape


def _factor(weight: Shared, folded: Array) -> Array | Literal[False] | None:
    """What a lookup that the exporter folded was multiplied with, for each index of one of the first two dimensions (a
    batch norm behind small weights); None for nothing, False if it was something else."""
    codes = weight.codes.reshape(len(weight.levels), -1).astype(np.int64)
    plain = np.take_along_axis(weight.levels, codes, 1).reshape(weight.codes.shape)
    plain = plain if weight.scale is None else plain * weight.scale
    if np.array_equal(plain, folded):
        return None
    for axis in range(min(2, plain.ndim)):
        others = tuple(d for d in range(plain.ndim) if d != axis)
        square = np.square(plain, dtype=np.float64).sum(others, keepdims=True)
        factor = (plain.astype(np.float64) * folded).sum(others, keepdims=True) / np.where(square, square, 1.0)
        factor = np.asarray(factor, dtype=np.float32)
        if np.allclose(plain * factor, folded, rtol=1e-5, atol=1e-6 * float(np.abs(folded).max(initial=0))):
            return factor
    return False


def _real(graph: Any, first: Any, weight: Shared, factor: Array | None) -> tuple[Any, str]:
    """The value that a weight's looked-up levels are, and the type of its codes in the file."""
    import ml_dtypes
    import onnx_ir as ir

    narrow = weight.levels.shape[1] <= _NARROW
    single = len(weight.levels) == 1
    codes = weight.codes if single else weight.codes.reshape(len(weight.levels), -1)
    kept = keep(graph, weight.name, codes.astype(ml_dtypes.uint4 if narrow else np.uint8))
    levels = keep(graph, f"{weight.name}_levels", weight.levels.reshape(-1))

    def then(kind: str, inputs: list[Any], *attributes: Any) -> Any:
        made = ir.Node("", kind, inputs, list(attributes), name=f"{weight.name}.{kind}")
        made.outputs[0].name = f"{weight.name}.{kind.lower()}"
        graph.insert_before(first, made)
        return made.outputs[0]

    index = then("Cast", [kept], ir.AttrInt64("to", ir.DataType.INT32))
    if not single:  # where each row's own table begins
        begins = np.arange(len(weight.levels), dtype=np.int32)[:, None] * np.int32(weight.levels.shape[1])
        index = then("Add", [index, keep(graph, f"{weight.name}.begins", begins)])
    real = then("Gather", [levels, index], ir.AttrInt64("axis", 0))
    if not single:
        shape = np.array(weight.codes.shape, dtype=np.int64)
        real = then("Reshape", [real, keep(graph, f"{weight.name}.shape", shape)])
    scales = [s for s in (weight.scale, factor) if s is not None]
    if scales:
        real = then("Mul", [real, keep(graph, f"{weight.name}_scale", np.asarray(math.prod(scales)))])
    return real, "uint4" if narrow else "uint8"
