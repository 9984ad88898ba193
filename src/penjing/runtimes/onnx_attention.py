"""Attention as torch's exporter writes it, in the form that runtimes fuse: a plain transposition instead of reshapes.

torch's translation of scaled_dot_product_attention swaps the last two axes of the keys as Reshape → Transpose → Reshape
with sizes taken from Shape at every run; runtimes cannot see through that.
"""

from __future__ import annotations

from typing import Any

from penjing.runtimes.onnx_views import constant


def plain_transpositions(graph: Any) -> None:
    """Reshape(Transpose(Reshape(keys))) that swaps the last two of four axes → Transpose(keys)."""
    import onnx_ir as ir

    for node in list(graph):
        keys = _swapped(node)
        if keys is None or any(node.outputs[0] is o for o in graph.outputs):
            continue
        order = ir.AttrInt64s("perm", [0, 1, 3, 2])
        made = ir.Node("", "Transpose", [keys], [order], name=f"{node.name}_swapped")
        made.outputs[0].name = f"{node.outputs[0].name}_swapped"
        made.outputs[0].type = keys.type
        graph.insert_before(node, made)
        for user, index in list(node.outputs[0].uses()):
            user.replace_input_with(index, made.outputs[0])


def _swapped(last: Any) -> Any | None:
    """The keys whose last two axes a Reshape is the end of swapping, or None."""
    middle = _producer(last.inputs[0], "Transpose") if last.op_type == "Reshape" else None
    first = _producer(middle.inputs[0], "Reshape") if middle is not None else None
    if middle is None or first is None or tuple(middle.attributes["perm"].value) != (0, 2, 1):
        return None
    keys = first.inputs[0]
    flat, split = _producer(first.inputs[1], "Concat"), _producer(last.inputs[1], "Concat")
    if flat is None or split is None or len(flat.inputs) != 3 or len(split.inputs) != 3:
        return None
    if keys.shape is None or len(keys.shape) != 4:
        return None
    batch = constant(flat.inputs[0])
    if batch is None or batch.ravel().tolist() != [-1]:
        return None
    wanted = ((flat.inputs[1], 2, 3), (flat.inputs[2], 3, 4), (split.inputs[0], 0, 2), (split.inputs[1], 3, 4))
    parts = (*wanted, (split.inputs[2], 2, 3))
    return keys if all(_takes(value, keys, begin, end) for value, begin, end in parts) else None


def _takes(value: Any, keys: Any, begin: int, end: int) -> bool:
    """Whether a value is the sizes `begin` to `end` of four-dimensional `keys`."""
    node = _producer(value, "Slice")
    shape = _producer(node.inputs[0], "Shape") if node is not None else None
    if node is None or shape is None or shape.inputs[0] is not keys or _from_middle(shape):
        return False
    limits = [constant(v) for v in node.inputs[1:3]]
    if any(v is None or v.size != 1 for v in limits):
        return False
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 else None
    if steps is not None and steps.ravel().tolist() != [1]:
        return False
    found = slice(*(int(v.ravel()[0]) for v in limits if v is not None)).indices(4)
    return found[:2] == (begin, end)


def _producer(value: Any, kind: str) -> Any | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _from_middle(shape: Any) -> bool:
    """Whether a Shape gives only a part of the sizes."""
    return "end" in shape.attributes or ("start" in shape.attributes and shape.attributes["start"].value != 0)
