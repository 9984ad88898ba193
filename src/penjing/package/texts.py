"""The codec of texts that hold numbers which look random: digests and float32 values are kept as bits beside the text.

A digest of 64 hexadecimal digits takes about 40 bytes of a zstd frame and a float32 written out as a double 7; as bits
they take 32 and 4. What stays of the text points into phrases.txt, and into what goes before and behind such numbers.

A text's bytes: LEB128 number of digests, LEB128 number of floats; the digests, the floats; a zstd frame without its
magic number. In the frame's text byte 1 stands for the next digest and byte 2 for the next float.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from penjing.errors import PackageError
from penjing.package import leb128, zstd

_NUMBERS = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])|(?<![0-9.])\d+\.\d{7,}(?![0-9.e])")
_MARKS = re.compile(rb"[\1\2]")
_MAGIC = bytes.fromhex("28b52ffd")  # of every zstd frame
_DIGEST, _FLOAT = b"\1", b"\2"
#: What the dictionary has besides phrases.txt, nearest to the text.
_AROUND = (
    b'},"seed":0,"before":"\1"},{"event":"step","name":"Quantize","settings":{"activations":null},"seed":0,"before":"\1"}],'
    b'"graph":[["get_attr","_0_weight","0.weight"],["call_function","dequantize_per_tensor_default",'
    b'"quantized_decomposed.dequantize_per_tensor.default",["%_0_weight",\2,0,-127,127,{"dtype":"int8"}]],'
    b'["get_attr","_0_bias","0.bias"],["call_function","dequantize_per_tensor_default_1",'
    b'"quantized_decomposed.dequantize_per_tensor.default",["%_0_bias",\2,0,-127,127,{"dtype":"int8"}]],'
)


def encode(text: bytes) -> bytes | None:
    """The bytes of a text; None for one without such numbers, or with a byte that stands for one here."""
    if _MARKS.search(text):
        return None
    digests: list[bytes] = []
    floats: list[bytes] = []

    def taken(match: re.Match[bytes]) -> bytes:
        number = match[0]
        if len(number) == 64 and b"." not in number:
            digests.append(bytes.fromhex(number.decode()))
            return _DIGEST
        value = np.array(float(number), dtype="<f4")
        if np.isfinite(value) and _written(value.tobytes()) == number:
            floats.append(value.tobytes())
            return _FLOAT
        return number

    with np.errstate(over="ignore"):
        left = _NUMBERS.sub(taken, text)
    if not digests and not floats:
        return None
    front = leb128.encode(len(digests)) + leb128.encode(len(floats)) + b"".join(digests + floats)
    return front + (zstd.compress(left, known=_known()) or b"").removeprefix(_MAGIC)


def decode(payload: memoryview, size: int) -> bytes:
    """The `size` bytes of a text; raises PackageError for bytes that no writer makes."""
    number, at = _number(payload, 0)
    count, at = _number(payload, at)
    middle = at + 32 * number
    end = middle + 4 * count
    if end > len(payload):
        raise _damaged()
    left = zstd.decompress(_MAGIC + payload[end:], size, less=True, known=_known())
    numbers = {
        _DIGEST: [payload[i : i + 32].hex().encode() for i in range(at, middle, 32)],
        _FLOAT: [_written(bytes(payload[i : i + 4])) for i in range(middle, end, 4)],
    }
    if any(left.count(mark) != len(found) for mark, found in numbers.items()):
        raise _damaged()
    queues = {mark: iter(found) for mark, found in numbers.items()}
    text = _MARKS.sub(lambda match: next(queues[match[0]]), left)
    if len(text) != size:
        raise _damaged()
    return text


@cache
def _known() -> bytes:
    return zstd.phrases_text() + _AROUND


def _written(bits: bytes) -> bytes:
    """A float32 as JSON has it: the shortest decimal number that is its value as a double."""
    return repr(float(np.frombuffer(bits, dtype="<f4")[0])).encode()


def _number(payload: memoryview, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 35, 7):
        if at >= len(payload):
            break
        byte = payload[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise _damaged()


def _damaged() -> PackageError:
    return PackageError("the topology cannot be decoded", hint="the package was made by a faulty writer; get it again")
