"""LSTMs whose inputs stand on grids found in every run → DynamicQuantizeLSTM of ONNX Runtime.

The kernel takes floats: it puts all inputs of a layer on one uint8 grid, and in every step the hidden states of the
samples that a thread works on, multiplies by integer weights and goes on in float. A grid of the inputs is therefore
left to it; what comes out depends a little on how many samples run at once, and on how many threads. There is no such
kernel for GRUs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from penjing.network.integers import dynamically_read
from penjing.runtimes.base import Widened
from penjing.runtimes.onnx_nodes import attribute, keep
from penjing.runtimes.onnx_views import constant
from penjing.runtimes.onnx_weights import Stored

if TYPE_CHECKING:
    from torch import fx

Array = np.ndarray[Any, Any]
_LSTM = torch.ops.aten.lstm.input
_LEADING = ("Slice", "Concat", "Unsqueeze")  # what the exporter puts gates in order with


def marked(traced: torch.export.ExportedProgram) -> frozenset[str]:
    """The values that are weights of LSTMs with grids found in every run in front of them, by their names in the file;
    not those that another LSTM reads in float."""
    nodes = [n for n in traced.graph.nodes if n.target is _LSTM]
    found = {w for n in nodes if dynamically_read(n) for w in _weights(n)}
    return frozenset(found - {w for n in nodes if not dynamically_read(n) for w in _weights(n)})


def _weights(node: fx.Node) -> list[str]:
    return [weight.name for weight in cast(Any, node.args[2])]


@dataclass(frozen=True)
class _Codes:
    """Integers (directions, 4 · hidden, inputs) or parts of them, with a scale and zero point for each row; the values
    that dequantizing gives (`names`)."""

    codes: Array
    scale: Array
    zero: Array
    names: tuple[str, ...]

    def each(self, change: Callable[[Array], Array]) -> _Codes:
        """The same change of the leading axes everywhere."""
        return _Codes(change(self.codes), change(self.scale), change(self.zero), self.names)


def integer_lstms(
    graph: Any,
    marks: Collection[str],
    stored: Mapping[str, Stored],
    unsigned: Callable[[Array, bool], bool],
) -> tuple[Widened, ...]:
    """Writes the LSTMs whose weights are among `marks` for the kernel; what it cannot multiply stays float, and its
    inputs as well. `stored` and `unsigned`: see `onnx_weights.gather` and `Dialect`."""
    found: list[Widened] = []
    for node in list(graph):
        if node.op_type != "LSTM":
            continue
        names = _read(node)
        if not names & set(marks):
            continue
        source = _floating(graph, node.inputs[0])
        factors = [_codes(v) for v in node.inputs[1:3]]
        # The kernel wants both matrices of one type.
        shifted = any(f is not None and unsigned(f.codes.reshape(-1, f.codes.shape[-1]), False) for f in factors)
        grids = [None if f is None else _grid(f, shifted) for f in factors]
        plain = not attribute(node, "layout", 0) and all(v is None for v in node.inputs[7:8])
        if any(g is None for g in grids) or not plain:
            node.replace_input_with(0, source)
            found.append(Widened(source.name or "", "dynamic", "float32", "DynamicQuantizeLSTM cannot say its weights"))
            continue
        held = [stored[n] for f in factors if f is not None for n in f.names if n in stored]
        found += [_widened(w) for w in held if w.kind != "int8"]
        _put(graph, node, source, [g for g in grids if g is not None])
    return tuple(found)


def _widened(weight: Stored) -> Widened:
    if weight.kind == "int4":
        return Widened(weight.name, weight.kind, "int8", "at loading: no 4-bit kernel")
    stored = "int8" if weight.kind == "int6" else "int4"
    return Widened(weight.name, weight.kind, stored, f"no {weight.kind} in the file")


def _read(node: Any) -> set[str]:
    """The names of the values that an LSTM's weights are put together of."""
    found: set[str] = set()
    waiting = [v for v in node.inputs[1:3] if v is not None]
    while waiting:
        value = waiting.pop()
        found.add(value.name)
        source = value.producer()
        if source is not None and source.op_type in _LEADING:
            waiting += source.inputs if source.op_type == "Concat" else source.inputs[:1]
    return found


def _codes(value: Any) -> _Codes | None:
    """The integers behind a weight whose rows were put in order; None if any part is not stored in 8 bits."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        codes, scale = (constant(v) for v in node.inputs[:2])
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(())
        if codes is None or scale is None or zero is None or codes.dtype != np.int8 or codes.ndim != 2:
            return None
        if attribute(node, "block_size", 0) or (scale.ndim and attribute(node, "axis", 1) % 2):
            return None
        rows = len(codes)
        return _Codes(codes, np.broadcast_to(scale, rows), np.broadcast_to(zero.astype(np.int16), rows), (value.name,))
    if node.op_type == "Slice":
        limits = [constant(v) for v in node.inputs[1:]]
        part = _codes(node.inputs[0])
        if part is None or len(limits) not in (3, 4) or any(v is None or v.size != 1 for v in limits):
            return None
        first, last, axis, step = (int(v.item()) for v in (*limits, np.ones(1))[:4] if v is not None)
        return part.each(lambda a: a[first:last:step]) if axis == 0 else None
    if node.op_type == "Unsqueeze":
        part, axes = _codes(node.inputs[0]), constant(node.inputs[1])
        return part.each(lambda a: a[None]) if part is not None and axes is not None and not axes.any() else None
    if node.op_type != "Concat" or attribute(node, "axis", 0) != 0:
        return None
    parts = [p for v in node.inputs if (p := _codes(v)) is not None]
    if len(parts) < len(node.inputs):
        return None
    codes, scale, zero = (np.concatenate([getattr(p, name) for p in parts]) for name in ("codes", "scale", "zero"))
    return _Codes(codes, scale, zero, tuple(dict.fromkeys(n for p in parts for n in p.names)))


def _grid(factor: _Codes, shifted: bool) -> _Codes | None:
    """Codes as the kernel wants them (int8, or `shifted` to uint8): one scale and zero point for each direction, or
    scales a row and the zero point 0; None for zero points that differ from row to row."""
    codes, scale, zero = factor.codes, factor.scale, factor.zero
    if (scale == scale[:, :1]).all() and (zero == zero[:, :1]).all():
        scale, zero = scale[:, 0], zero[:, 0]
    elif zero.any():
        return None
    if shifted:
        moved = (codes.astype(np.int16) + 128).astype(np.uint8)
        return _Codes(moved, scale, (zero + 128).astype(np.uint8), factor.names)
    return _Codes(codes, scale, zero.astype(np.int8), factor.names)


def _floating(graph: Any, value: Any) -> Any:
    """An LSTM's input without the grid found in every run: transpositions are made anew in front of it."""
    import onnx_ir as ir

    node = value.producer()
    if node is None:
        return value
    made = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if node.op_type == "DequantizeLinear" and made is not None and made.op_type == "DynamicQuantizeLinear":
        return made.inputs[0]
    if node.op_type != "Transpose":
        return value
    source = _floating(graph, node.inputs[0])
    if source is node.inputs[0]:
        return value
    moved = ir.Node("", "Transpose", [source], list(node.attributes.values()), name=f"{node.name}_float")
    moved.outputs[0].name = f"{value.name}_float"
    moved.outputs[0].shape, moved.outputs[0].type = value.shape, value.type
    graph.insert_before(node, moved)
    return moved.outputs[0]


def _put(graph: Any, node: Any, source: Any, grids: list[_Codes]) -> None:
    """DynamicQuantizeLSTM in the place of an LSTM."""
    import onnx_ir as ir

    codes, parts = [], []
    for factor, letter in zip(grids, ("input", "hidden"), strict=True):
        name = f"{node.outputs[0].name}.weight_{letter}"
        codes.append(_held(graph, node, name, factor.codes.swapaxes(1, 2)))
        parts += [keep(graph, f"{name}_scale", factor.scale), keep(graph, f"{name}_zero_point", factor.zero)]
    others = [*node.inputs[3:], *[None] * 5][:5]  # bias, lengths, initial hidden and cell states, peepholes
    kept = [a for name, a in node.attributes.items() if name != "layout"]
    made = ir.Node(
        "com.microsoft",
        "DynamicQuantizeLSTM",
        [source, *codes, *others, *parts],
        kept,
        num_outputs=len(node.outputs),
        name=f"{node.name}_integers",
    )
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.opset_imports.setdefault("com.microsoft", 1)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made], list(node.outputs), list(made.outputs))


def _held(graph: Any, node: Any, name: str, codes: Array) -> Any:
    """Codes as an initializer; those that fit in 4 bits are stored so and widened at loading."""
    import ml_dtypes
    import onnx_ir as ir

    if codes.dtype != np.int8 or codes.min(initial=0) < -8 or codes.max(initial=0) > 7:
        return keep(graph, name, codes)
    narrow = keep(graph, f"{name}.int4", codes.astype(ml_dtypes.int4))
    made = ir.Node("", "Cast", [narrow], [ir.AttrInt64("to", ir.DataType.INT8)], name=f"{name}_widened")
    made.outputs[0].name, made.outputs[0].shape = f"{name}_int8", narrow.shape
    made.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    graph.insert_before(node, made)
    return made.outputs[0]
