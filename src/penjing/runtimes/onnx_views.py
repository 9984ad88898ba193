"""Quantizers behind operators that only move values: ONNX Runtime fuses "dequantize → operator → quantize", no less."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: Operators whose outputs lie on the grid that their inputs lie on, as far as their first input goes.
VIEWS = {
    "DepthToSpace",
    "Flatten",
    "MaxPool",
    "Pad",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


def constant(value: Any) -> Array | None:
    """A value's number if it is a constant of the graph."""
    if value is None:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return np.asarray(node.attributes["value"].value.numpy())
    return None


def carry_grids(graph: Any) -> None:
    """Puts the inputs' own grid behind every view and concatenation; rounding there changes nothing."""
    import onnx_ir as ir

    outputs = set(graph.outputs)
    for node in list(graph):
        grid = _grid(node)
        if grid is None or len(node.outputs) != 1 or node.outputs[0] in outputs:
            continue
        made = node.outputs[0]
        users = list(made.uses())
        if not users or all(user.op_type == "QuantizeLinear" for user, _ in users):
            continue
        quantized = ir.Node("", "QuantizeLinear", [made, *grid], name=f"{made.name}_quantize")
        real = ir.Node("", "DequantizeLinear", [quantized.outputs[0], *grid], name=f"{made.name}_dequantize")
        for fresh, word, kind in ((quantized, "quantized", grid[1].type), (real, "dequantized", made.type)):
            fresh.outputs[0].name = f"{made.name}_{word}"
            fresh.outputs[0].type = kind
            fresh.outputs[0].shape = None if made.shape is None else ir.Shape(list(made.shape))
        for user, index in users:
            user.replace_input_with(index, real.outputs[0])
        graph.insert_after(node, [quantized, real])


def _grid(node: Any) -> tuple[Any, Any] | None:
    """(scale, zero point) that all inputs of a view or concatenation share, per tensor."""
    if node.op_type == "Concat":
        inputs = list(node.inputs)
    elif node.op_type in VIEWS:
        inputs = [node.inputs[0]]
    else:
        return None
    if node.op_type == "Pad" and not _pads_with_zeros(node):
        return None
    found: list[tuple[Any, Any]] = []
    for value in inputs:
        source = None if value is None else value.producer()
        if source is None or source.op_type != "DequantizeLinear" or len(source.inputs) < 3:
            return None
        if source.inputs[0].producer() is None:
            return None  # a stored tensor
        found.append((source.inputs[1], source.inputs[2]))
    numbers = [tuple(constant(v) for v in pair) for pair in found]
    if any(n is None or n.size != 1 for pair in numbers for n in pair):
        return None
    first = numbers[0]
    same = all(a == b and a.dtype == b.dtype for pair in numbers for a, b in zip(first, pair, strict=True))  # type: ignore[union-attr]
    return found[0] if same else None


def _pads_with_zeros(node: Any) -> bool:
    mode = node.attributes["mode"].value if "mode" in node.attributes else "constant"
    if mode != "constant":
        return True  # copies of what is there
    fill = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    return fill is not None and not fill.any()
