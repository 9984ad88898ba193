"""An ONNX model without its numbers: its graph as plain values, each initializer as what it is of a network's tensors.

`package/onnx_model.py` puts the model together again.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from penjing.errors import ExportError

Array = np.ndarray[Any, Any]

_WRITTEN = 64  # bytes: tensors up to here stand in the graph itself
_GATES = [0, 3, 1, 2]  # of an LSTM: torch's order of them, as ONNX has them
_FIRST = 64  # values that are compared before all
_AXES = 4  # tensors of more axes are looked for in their own order alone


def skeleton(model: Any, arrays: Mapping[str, Array], held: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """The graph of `model` (onnx_ir) as plain JSON values, and the arrays that it needs besides `arrays`.

    held: how the names of those arrays begin. Raises ExportError for what has no plain form.
    """
    if model.functions:
        raise ExportError("the ONNX graph has functions of its own", hint="pack without a target")
    writer = _Writer(model.graph, arrays, held)
    described = {"ir": model.ir_version, "opsets": [[d, v] for d, v in model.opset_imports.items()]}
    return {**described, **writer.graph(model.graph)}, writer.held


class _Writer:
    def __init__(self, graph: Any, arrays: Mapping[str, Array], prefix: str) -> None:
        self._arrays, self._prefix = arrays, prefix
        self._by_bytes = {(a.nbytes, hash(a.tobytes())): n for n, a in reversed(list(arrays.items()))}
        self._names = {id(v): str(v.name) for v in (*graph.inputs, *graph.outputs)}
        taken = set(self._names.values())
        self._fresh = (name for name in map(str, itertools.count()) if name not in taken)
        self.held: dict[str, Array] = {}

    def graph(self, graph: Any) -> dict[str, Any]:
        return {
            "inputs": [self._port(v) for v in graph.inputs],
            "outputs": [self._port(v) for v in graph.outputs],
            "tensors": [self._tensor(v) for v in graph.initializers.values()],
            "nodes": [self._node(n) for n in graph],
        }

    def _name(self, value: Any) -> str:
        if value is None:
            return ""
        if id(value) not in self._names:
            self._names[id(value)] = next(self._fresh)
        return self._names[id(value)]

    def _port(self, value: Any) -> list[Any]:
        dims = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
        if value.dtype is None:
            raise ExportError(f"the ONNX graph has a value '{value.name}' of no type", hint="pack without a target")
        return [self._name(value), int(value.dtype), dims]

    def _node(self, node: Any) -> list[Any]:
        row: list[Any] = [node.op_type, [self._name(v) for v in node.inputs], [self._name(v) for v in node.outputs]]
        attributes = {a.name: self._attribute(a) for a in node.attributes.values()}
        if attributes or node.domain:
            row.append(attributes)
        return [*row, node.domain] if node.domain else row

    def _attribute(self, attribute: Any) -> Any:
        match attribute.type.name:
            case "INT" | "STRING":
                return attribute.value
            case "INTS":
                return list(attribute.value)
            case "FLOAT":
                return {"float": _shortest(attribute.value)}
            case "FLOATS":
                return {"floats": [_shortest(v) for v in attribute.value]}
            case "STRINGS":
                return {"strings": list(attribute.value)}
            case "TENSOR":
                tensor = attribute.value
                return {"tensor": [int(tensor.dtype), list(tensor.shape), _text(tensor.tobytes())]}
            case "GRAPH":
                return {"graph": self.graph(attribute.value)}
        raise ExportError(
            f"the ONNX graph has an attribute of type {attribute.type.name}", hint="pack without a target"
        )

    def _tensor(self, value: Any) -> list[Any]:
        tensor = value.const_value
        row = [self._name(value), int(tensor.dtype), list(tensor.shape)]
        return [*row, *self._source(tensor)]

    def _source(self, tensor: Any) -> list[Any]:
        data = tensor.tobytes()
        if len(data) <= _WRITTEN:
            return [None, _text(data)]
        name = self._by_bytes.get((len(data), hash(data)))
        if name is not None and self._arrays[name].tobytes() == data:
            return [name]
        found = next(self._seen_otherwise(tensor), None)
        if found is not None:
            return found
        name = f"{self._prefix}{len(self.held)}"
        self.held[name] = np.frombuffer(data, f"<{_KINDS.get(tensor.dtype.name, 'u1')}")
        self._by_bytes[len(data), hash(data)] = name
        self._arrays = {**self._arrays, name: self.held[name]}
        return [name]

    def _seen_otherwise(self, tensor: Any) -> Iterator[list[Any]]:
        """Arrays that are the tensor otherwise laid out, or its codes in another coding."""
        looks = list(_looks(tensor))
        for name, array in self._arrays.items():
            for coding, values, offset, mask in looks:
                if coding is None:
                    fits, known = array.size == values.size and array.dtype == values.dtype, array
                elif fits := array.dtype.itemsize == 1 and array.size in (values.size, values.size - mask // 15 % 2):
                    known = (array.view(np.uint8) + np.uint8(offset)) & np.uint8(mask)
                if not fits:
                    continue
                for steps, laid in _layouts(known, tuple(tensor.shape)):
                    if not np.array_equal(laid.flat[:_FIRST], values[: min(_FIRST, laid.size)]):
                        continue  # without a copy of the whole
                    if np.array_equal(laid.reshape(-1), values[: laid.size]) and not values[laid.size :].any():
                        yield [name, *steps, *([] if coding is None else [coding])]


def _looks(tensor: Any) -> Iterator[tuple[str | None, Array, int, int]]:
    """What a tensor's bytes may be: its values, or codes in a coding, with its offset and the bits of a code."""
    data = np.frombuffer(tensor.tobytes(), np.uint8)
    if tensor.dtype.name in _KINDS:
        yield None, data.view(f"<{_KINDS[tensor.dtype.name]}"), 0, 0
    if tensor.dtype.name == "UINT8":
        yield "uint8", data, 128, 255
    if tensor.dtype.name in ("UINT8", "INT8", "INT4", "UINT4"):
        nibbles = np.stack([data & 15, data >> 4], axis=1).reshape(-1)
        yield "int4", nibbles, 0, 15
        yield "uint4", nibbles, 8, 15


def _layouts(array: Array, shape: tuple[int, ...]) -> Iterator[tuple[list[Any], Array]]:
    """Ways that an array's values may be laid out in a tensor of `shape`: the steps, and the array after them."""
    starts: list[tuple[list[Any], Array]] = [([], array)]
    if len(shape) > 1 and array.shape != shape[::-1] and array.size == math.prod(shape):
        starts.append(([{"shape": list(shape[::-1])}], array.reshape(shape[::-1])))
    if array.ndim == 2 and array.dtype.itemsize == 1 and len(array) % len(_GATES) == 0:
        gates = array.reshape(len(_GATES), -1)[_GATES].reshape(array.shape)
        starts.append(([{"blocks": _GATES}], gates))
    for steps, start in starts:
        own = tuple(range(start.ndim))
        for order in itertools.permutations(own) if start.ndim <= _AXES else [own]:
            yield [*steps, *([] if order == own else [list(order)])], start.transpose(order)


_KINDS = {
    "FLOAT": "f4",
    "DOUBLE": "f8",
    "FLOAT16": "f2",
    "BFLOAT16": "u2",
    "INT8": "i1",
    "UINT8": "u1",
    "INT32": "i4",
    "INT64": "i8",
}


def _shortest(number: float) -> float | str:
    """The shortest decimal number that is the same in float32; JSON has no word for those that are not finite."""
    single = np.float32(number)
    return float(str(single)) if np.isfinite(single) else str(single)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
