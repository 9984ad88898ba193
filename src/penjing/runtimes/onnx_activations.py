"""Grids of activations that are wider or narrower than the 8 bits of integer kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from penjing.runtimes.base import Widened
from penjing.runtimes.onnx_nodes import attribute, is_output, keep, replace_all
from penjing.runtimes.onnx_views import constant

Array = np.ndarray[Any, Any]


def wide_to_float(graph: Any) -> tuple[Widened, ...]:
    """Grids of 16 bits → their range in float: no runtime has kernels for them (OpenVINO drops them, range and all).

    What is left away is a rounding to 65536 steps.
    """
    import onnx_ir as ir

    found = []
    for node in list(graph):
        grid = _grid(graph, node)
        if grid is None or grid[1].dtype not in (np.int16, np.uint16):
            continue
        scale, zero = grid
        readers = [user for user, _ in node.outputs[0].uses()]
        limits = np.iinfo(zero.dtype)
        ends = [np.float32((int(end) - int(zero)) * float(scale)) for end in (limits.min, limits.max)]
        inputs = [keep(graph, f"{node.name}_{n}", np.asarray(e)) for n, e in zip(("low", "high"), ends, strict=True)]
        clip = ir.Node("", "Clip", [node.inputs[0], *inputs], name=f"{node.name}_range")
        clip.outputs[0].name = f"{node.outputs[0].name}_range"
        clip.outputs[0].shape, clip.outputs[0].type = node.inputs[0].shape, node.inputs[0].type
        graph.insert_before(node, clip)
        for reader in readers:
            replace_all(reader.outputs[0], clip.outputs[0])
        found.append(Widened(node.inputs[0].name or "", "int16", "float32", "no 16-bit kernel"))
    return tuple(found)


def clip_codes(graph: Any) -> None:
    """Clip → QuantizeLinear to int8 becomes QuantizeLinear to uint8 → Clip of the codes, which then begin at 0.

    The grid's lowest code is 0 then, so rounding does what a relu in front of it does, and runtimes drop the relu.
    """
    import onnx_ir as ir

    for node in list(graph):
        grid, clip = _grid(graph, node), node.inputs[0].producer() if node.inputs and node.inputs[0] else None
        if grid is None or grid[1].dtype != np.int8 or clip is None or clip.op_type != "Clip" or len(clip.inputs) != 3:
            continue
        (scale, zero), ends = grid, [constant(v) for v in clip.inputs[1:]]
        if any(e is None for e in ends) or is_output(graph, clip.outputs[0]):
            continue
        low, high = (float(e) / float(scale) + int(zero) for e in ends if e is not None)
        first, last = round(low), round(high)
        if abs(low - first) > 1e-3 or abs(high - last) > 1e-3 or not first < last <= first + 254:
            continue  # a clamp of the network's own
        middle = keep(graph, f"zero_{int(zero) - first}", np.asarray(int(zero) - first, dtype=np.uint8))
        if not 0 <= int(zero) - first <= 255:
            continue
        readers = [user for user, _ in node.outputs[0].uses()]
        top = keep(graph, f"codes_{last - first}", np.asarray(last - first, dtype=np.uint8))
        clipped = ir.Node("", "Clip", [node.outputs[0], None, top], name=f"{node.name}_codes")
        clipped.outputs[0].name = f"{node.outputs[0].name}_codes"
        node.replace_input_with(0, clip.inputs[0])
        node.replace_input_with(2, middle)
        node.attributes.pop("output_dtype", None)
        node.outputs[0].type = clipped.outputs[0].type = middle.type
        clipped.outputs[0].shape = node.outputs[0].shape
        graph.insert_after(node, clipped)
        for reader in readers:
            reader.replace_input_with(0, clipped.outputs[0])
            reader.replace_input_with(2, middle)


def translations() -> dict[Any, Any]:
    """How the exporter writes grids that are found in every run; it knows none by itself."""
    import torch
    from onnxscript import opset21 as op

    def choose(x: Any, low: int, high: int, eps: float, dtype: int) -> Any:
        _, scale, zero = op.DynamicQuantizeLinear(x)
        return scale, zero

    def quantize(x: Any, scale: Any, zero: Any, low: int, high: int, dtype: int) -> Any:
        return op.QuantizeLinear(x, scale, zero)

    def dequantize(x: Any, scale: Any, zero: Any, low: int, high: int, dtype: int, out_dtype: int = -1) -> Any:
        return op.DequantizeLinear(x, scale, zero)

    decomposed = torch.ops.quantized_decomposed
    return {
        decomposed.choose_qparams.tensor: choose,
        decomposed.quantize_per_tensor.tensor: quantize,
        decomposed.dequantize_per_tensor.tensor: dequantize,
    }


def dynamic_grids(graph: Any, *, kernels: bool) -> tuple[Widened, ...]:
    """Grids found in every run: the codes come from DynamicQuantizeLinear itself. Without `kernels` for them they go:
    the runtime puts activations on grids of its own, where it has faster kernels for that."""
    import onnx_ir as ir

    found = []
    for node in list(graph):
        source = node.inputs[1].producer() if node.op_type == "QuantizeLinear" else None
        if source is None or source.op_type != "DynamicQuantizeLinear":
            continue
        for value, kind in zip(source.outputs[1:], (ir.DataType.FLOAT, ir.DataType.UINT8), strict=True):
            # PyTorch's operator gives a double and a long of one dimension.
            value.shape, value.type = ir.Shape([]), ir.TensorType(kind)
        readers = [user for user, _ in node.outputs[0].uses()]
        if kernels:
            source.outputs[0].shape, source.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
            replace_all(node.outputs[0], source.outputs[0])
        else:
            for reader in readers:
                replace_all(reader.outputs[0], node.inputs[0])
            found.append(Widened(node.inputs[0].name or "", "dynamic", "float32", "the runtime finds grids itself"))
    return tuple(found)


def dynamic_products(graph: Any) -> None:
    """MatMul or Gemm of a grid found in every run and a stored weight → MatMulInteger, scaled back to float."""
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        factors: list[Any] = [v.producer() for v in node.inputs[:2]]
        if any(f is None or f.op_type != "DequantizeLinear" for f in factors):
            continue
        x, w = factors
        made = x.inputs[0].producer()
        plain = node.op_type == "MatMul" or [attribute(node, n, 1.0) for n in ("alpha", "beta")] == [1.0, 1.0]
        if made is None or made.op_type != "DynamicQuantizeLinear" or attribute(w, "block_size", 0) or not plain:
            continue
        turned = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        scale, rank = constant(w.inputs[1]), len(w.inputs[0].shape or ())
        if scale is None or rank != 2 or (scale.ndim and attribute(w, "axis", 1) % 2 != (0 if turned else 1)):
            continue
        _product(graph, node, x, w, turned)


def _product(graph: Any, node: Any, x: Any, w: Any, turned: bool) -> None:
    import onnx_ir as ir

    old = node.outputs[0]
    new: list[Any] = []

    def call(kind: str, *inputs: Any, **attributes: Any) -> Any:
        made = ir.Node(
            "", kind, list(inputs), ir.convenience.convert_attributes(attributes), name=f"{old.name}_{len(new)}_{kind}"
        )
        made.outputs[0].name = f"{old.name}_{kind}_{len(new)}"
        new.append(made)
        return made.outputs[0]

    codes = call("Transpose", w.inputs[0], perm=[1, 0]) if turned else w.inputs[0]
    sums = call("MatMulInteger", x.inputs[0], codes, x.inputs[2], *w.inputs[2:3])
    real = call("Mul", call("Cast", sums, to=1), call("Mul", x.inputs[1], w.inputs[1]))
    if node.op_type == "Gemm" and len(node.inputs) > 2:
        real = call("Add", real, node.inputs[2])
    real.shape, real.type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, [old], [real])


def _grid(graph: Any, node: Any) -> tuple[Array, Array] | None:
    """Scale and zero point of a QuantizeLinear with one scale whose codes only DequantizeLinear reads."""
    if node.op_type != "QuantizeLinear" or len(node.inputs) < 3 or is_output(graph, node.outputs[0]):
        return None
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
    readers = [user for user, _ in node.outputs[0].uses()]
    if (
        scale is None
        or zero is None
        or scale.ndim
        or zero.ndim
        or any(r.op_type != "DequantizeLinear" for r in readers)
    ):
        return None
    return None if any(is_output(graph, r.outputs[0]) for r in readers) else (scale, zero)
