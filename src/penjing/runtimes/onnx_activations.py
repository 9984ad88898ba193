"""Grids of activations that are wider or narrower than the 8 bits of integer kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from penjing.runtimes.base import Widened
from penjing.runtimes.onnx_nodes import is_output, keep, replace_all
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
