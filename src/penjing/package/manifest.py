"""The manifest of a package: its first bytes, all but the parts. Whoever has it knows what every part must be."""

from __future__ import annotations

import dataclasses
import hashlib
from itertools import accumulate

from penjing.errors import PackageError
from penjing.package.claims import bad_index, shown
from penjing.package.layout import HEADER_SIZE, MAGIC, Index, Part, parse_header, parse_index, raw_limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Header, index and topology as bytes, and the index read.

    `offsets` says where in the single file each part begins; its last entry is the end of the file.
    """

    data: bytes
    index: Index
    offsets: tuple[int, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order of the single file."""
        return self.index.parts

    @property
    def topology(self) -> memoryview:
        """The bytes in the topology's place."""
        return memoryview(self.data)[len(self.data) - self.index.topology.stored :]

    @property
    def total(self) -> int:
        """Bytes of the package as a single file."""
        return self.offsets[-1]

    def name(self, number: int) -> str:
        """What messages call a part: its number and the tensors in it."""
        return f"part {number} ({tensors_in(self.index, self.parts[number])})"

    def names(self, numbers: list[int]) -> str:
        """The first parts of `numbers` by name, and how many more there are."""
        named = ", ".join(self.name(n) for n in numbers[:3])
        return named + (f" and {len(numbers) - 3} more" if len(numbers) > 3 else "")


def extent(data: bytes) -> int:
    """Bytes of the manifest that `data` begins with, as far as `data` tells: ask again once so many are there.

    Raises PackageError where `data` begins no package.
    """
    if len(data) < HEADER_SIZE:
        if data[: len(MAGIC)] != MAGIC[: len(data)]:
            parse_header(data)  # says what it is not
        return HEADER_SIZE
    front = HEADER_SIZE + parse_header(data).index_size
    return front if len(data) < front else front + _index(data, front).topology.stored


def parse(data: bytes) -> Manifest:
    """The manifest that `data` begins with, its digests checked. Raises PackageError."""
    front = HEADER_SIZE + parse_header(data).index_size
    index = _index(data, front)
    topology = data[front : front + index.topology.stored]
    if hashlib.sha256(topology).digest() != index.topology.digest:
        raise PackageError("the topology does not match its SHA-256", hint="the package is damaged: get it again")
    size = front + index.topology.stored
    offsets = tuple(accumulate((part.stored for part in index.parts), initial=size))
    # Outside of a single file parts of equal bytes are there once, however often they are named.
    held = size + sum({part.digest: part.stored for part in index.parts}.values())
    if max(index.raw, offsets[-1]) > raw_limit(held):
        bad_index(f"it claims to hold {max(index.raw, offsets[-1])} bytes in parts of {held}")
    return Manifest(data=data[:size], index=index, offsets=offsets)


def tensors_in(index: Index, part: Part) -> str:
    """The first tensors of a part, and how many more there are."""
    names = [shown(index.tensors[p.tensor].name) for p in part.pieces[:2]]
    return ", ".join(names) + (f" and {len(part.pieces) - 2} more" if len(part.pieces) > 2 else "") or "sealed"


def _index(data: bytes, front: int) -> Index:
    return parse_index(data[:HEADER_SIZE], data[HEADER_SIZE:front], None)
