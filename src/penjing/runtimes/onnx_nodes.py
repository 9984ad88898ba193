"""Small operations on the nodes of an onnx_ir graph that the passes share."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def keep(graph: Any, name: str, array: Array) -> Any:
    """A new initializer; an equal one of that name is used again."""
    import onnx_ir as ir

    unique, count = name, 0
    while unique in graph.initializers:
        held = graph.initializers[unique]
        if held.const_value is not None:
            same = held.const_value.numpy()
            if same.dtype == array.dtype and same.shape == array.shape and np.array_equal(same, array):
                return held
        count += 1
        unique = f"{name}_{count}"
    tensor = ir.tensor(np.asarray(array, order="C"), name=unique)  # ascontiguousarray would give a scalar one dimension
    value = ir.Value(name=unique, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def replace_all(old: Any, new: Any) -> None:
    """Lets everything that reads one value read another."""
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)


def is_output(graph: Any, value: Any) -> bool:
    """Whether a value is an output of the graph."""
    return any(value is o for o in graph.outputs)


def attribute(node: Any, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def set_axis(node: Any, axis: int, block: int = 0) -> None:
    """Along which axis the scales of a DequantizeLinear lie; with `block`, one for so many values each."""
    import onnx_ir as ir

    if block:
        node.attributes["block_size"] = ir.AttrInt64("block_size", block)
    node.attributes["axis"] = ir.AttrInt64("axis", axis)


def dequantize(inputs: list[Any], like: Any) -> Any:
    """A DequantizeLinear whose output looks like that of another node."""
    import onnx_ir as ir

    old = like.outputs[0]
    made = ir.Node("", "DequantizeLinear", inputs, num_outputs=1, name=f"{like.name}_integers")
    made.outputs[0].name = f"{old.name}_integers"
    made.outputs[0].shape, made.outputs[0].type = old.shape, old.type
    return made
