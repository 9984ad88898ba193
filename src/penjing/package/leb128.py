"""Whole numbers in as few bytes as they need, 7 bits in each (LEB128, which protobuf calls varint)."""

from __future__ import annotations


def encode(number: int) -> bytes:
    """The bytes of a number of at least 0, lowest bits first."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
