"""An ONNX model put together from a package: the topology holds its graph as JSON, the arrays hold its numbers.

A client needs nothing but this package's reader and a runtime. ONNX is protobuf, of which a writer for the messages of
a model takes a page (field numbers: onnx/onnx.proto, version 1.16).
"""

from __future__ import annotations

import base64
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.errors import PackageError
from penjing.files import appearing
from penjing.package import archive, leb128, refining
from penjing.package.claims import shown

Array = NDArray[Any]
Chunks = list[bytes | memoryview]  # of one message: joined once, at the end

KEY = "onnx"  # in the topology
HELD = "onnx:"  # begins the names of arrays that the graph alone needs

#: How codes of 8 bits stand in a model that keeps them otherwise: offset, bits.
_CODINGS = {"uint8": (128, 8), "int4": (0, 4), "uint4": (8, 4)}
#: Bits of an element by TensorProto.DataType, of those types that a package can hold.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}

_TIMES, _SPARE = 4, 1 << 20  # a hostile graph may name one array a million times
_HINT = "it was packed without target=, or by another writer; pack it again"


def load(path: str | os.PathLike[str], *, layers: int | None = None) -> bytes:
    """The ONNX model in a package that was packed for a runtime.

    path: a file, a directory or, with `layers`, the folder of a pull that is not done; layers: only so many of its
    quality layers. Raises PackageError, also for packages that hold no ONNX graph.
    """
    topology, arrays, _ = archive.read(path) if layers is None else refining.read(path, layers=layers)
    return assemble(topology, arrays)


def write(package: str | os.PathLike[str], out: str | os.PathLike[str], *, layers: int | None = None) -> int:
    """Writes the ONNX model in `package` to the file `out`, which appears whole or not at all; returns its bytes.
    Raises PackageError, OutputError."""
    data = load(package, layers=layers)
    with appearing(Path(out)) as aside:
        aside.write_bytes(data)
    return len(data)


def joined(topology: str, graph: Mapping[str, Any]) -> str:
    """A topology with an ONNX graph in it, as runtimes/onnx_skeleton.py describes one."""
    return json.dumps({**json.loads(topology), KEY: graph}, separators=(",", ":"), ensure_ascii=False)


def assemble(topology: str, arrays: Mapping[str, Array]) -> bytes:
    """A serialized ModelProto of what a package holds. Raises PackageError where it holds no ONNX graph, or no sound
    one."""
    try:
        described = json.loads(topology).get(KEY)
        if described is None:
            raise PackageError("the package holds no ONNX graph", hint="penjing pack --target onnxruntime puts one in")
        return b"".join(_model(described, _Numbers(arrays)))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, struct.error, RecursionError) as error:
        raise PackageError(f"the package's ONNX graph is not understood: {shown(repr(error))}", hint=_HINT) from error


def _model(described: Mapping[str, Any], numbers: _Numbers) -> Chunks:
    out = [*_int(1, described["ir"]), *_text(2, "penjing")]
    out += _message(7, _graph(described, numbers))
    for domain, version in described["opsets"]:
        out += _message(8, [*_text(1, domain), *_int(2, version)])
    return out


def _graph(described: Mapping[str, Any], numbers: _Numbers) -> Chunks:
    out: Chunks = []
    for node in described["nodes"]:
        out += _message(1, _node(*node, numbers=numbers))
    out += _text(2, "graph")
    for name, kind, shape, source, *how in described["tensors"]:
        out += _message(5, _tensor(kind, shape, numbers.data(source, how), name))
    for number, key in ((11, "inputs"), (12, "outputs")):
        for name, kind, dims in described[key]:
            out += _message(number, [*_text(1, name), *_message(2, _type(kind, dims))])
    return out


def _node(
    operator: str,
    inputs: list[str],
    outputs: list[str],
    attributes: Mapping[str, Any] | None = None,
    domain: str = "",
    *,
    numbers: _Numbers,
) -> Chunks:
    out: Chunks = []
    for name in inputs:
        out += _text(1, name)
    for name in outputs:
        out += _text(2, name)
    out += _text(4, operator)
    for name, value in (attributes or {}).items():
        out += _message(5, [*_text(1, name), *_attribute(value, numbers)])
    return [*out, *_text(7, domain)] if domain else out


def _attribute(value: Any, numbers: _Numbers) -> Chunks:
    """Integers, texts and lists of integers stand for themselves, all else under its kind."""
    match value:
        case int():
            return [*_int(3, value), *_int(20, 2)]
        case str():
            return [*_text(4, value), *_int(20, 3)]
        case list():
            return [*(c for v in value for c in _int(8, v)), *_int(20, 7)]
        case {"float": number}:
            return [*_float(2, number), *_int(20, 1)]
        case {"floats": numbers}:
            return [*(c for v in numbers for c in _float(7, v)), *_int(20, 6)]
        case {"strings": texts}:
            return [*(c for v in texts for c in _text(9, v)), *_int(20, 8)]
        case {"tensor": [kind, shape, data]}:
            return [*_message(5, _tensor(kind, shape, base64.b64decode(data))), *_int(20, 4)]
        case {"graph": described}:
            return [*_message(6, _graph(described, numbers)), *_int(20, 5)]
    raise ValueError(f"an attribute is {value!r}")


def _type(kind: int, dims: list[int | str | None] | None) -> Chunks:
    shape: Chunks = []
    for size in dims or []:
        shape += _message(1, [] if size is None else _int(1, size) if isinstance(size, int) else _text(2, size))
    return _message(1, [*_int(1, kind), *([] if dims is None else _message(2, shape))])


def _tensor(kind: int, shape: list[int], data: bytes | memoryview, name: str = "") -> Chunks:
    if len(data) != (math.prod(shape) * _BITS[kind] + 7) // 8:
        raise ValueError(f"{len(data)} bytes for a tensor of shape {shape}")
    out = [c for size in shape for c in _int(1, size)] + _int(2, kind)
    return [*out, *(_text(8, name) if name else []), *_message(9, [data])]


class _Numbers:
    """The arrays of a package, of which a graph makes its tensors: as many bytes as they have, and some to spare."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays
        self._left = _SPARE + _TIMES * sum(a.nbytes for a in arrays.values())

    def data(self, source: str | None, how: list[Any]) -> bytes | memoryview:
        """A tensor's bytes: written out, or an array's after some steps."""
        if source is None:
            return base64.b64decode(how[0])
        array = self._arrays[source]
        self._left -= array.nbytes
        if self._left < 0:
            raise ValueError("it takes the same numbers again and again")
        for step in how:
            match step:
                case {"shape": shape}:
                    array = array.reshape(shape)
                case {"blocks": order}:  # of rows: an LSTM's gates
                    if sorted(order) != list(range(len(order))):  # else it may be any number of rows
                        raise ValueError("rows in no order")
                    array = array.reshape(len(order), -1)[order].reshape(array.shape)
                case list():
                    array = array.transpose(step)
                case _:
                    array = _coded(array, step)
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def _coded(array: Array, coding: str) -> Array:
    """Signed codes of 8 bits in another of _CODINGS: unsigned ones, or two to a byte, the first in its low half."""
    offset, bits = _CODINGS[coding]
    codes = array.reshape(-1).view(np.uint8) + np.uint8(offset)
    if bits == 8:
        return codes
    codes = np.pad(codes & 15, (0, codes.size % 2))
    return codes[::2] | codes[1::2] << 4


def _int(number: int, value: int) -> Chunks:
    return [leb128.encode(number << 3) + leb128.encode(value & (1 << 64) - 1)]


def _float(number: int, value: float | str) -> Chunks:
    return [leb128.encode(number << 3 | 5) + struct.pack("<f", float(value))]


def _text(number: int, text: str) -> Chunks:
    return _message(number, [text.encode()])


def _message(number: int, chunks: Iterable[bytes | memoryview]) -> Chunks:
    held = list(chunks)
    return [leb128.encode(number << 3 | 2) + leb128.encode(sum(map(len, held))), *held]
