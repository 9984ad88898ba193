"""How tensors are laid out over parts, and parts over tensors: bundles of small ones, ranges of large ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

MAX_PART = 4 << 20  # raw bytes that a part may hold; a reader allocates no more than this at a time
_TARGET = 2 << 20  # raw bytes that the writer aims at; a larger tensor shares no part, which readers must know
_LEAST = 256 << 10  # raw bytes below which the writer goes on, so that coded parts are worth a request each
_UNIT = 64  # least number of symbols that share a model

CODES = "?bBhHiIqQefd"  # numpy's and struct's letters for the element types a package holds
GRIDS = "bB"  # those that are integer grids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Name, element type (one letter of `CODES`) and shape."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The element type, little-endian."""
        return np.dtype(self.code).newbyteorder("<")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Raw bytes."""
        return self.size * self.dtype.itemsize

    @property
    def unit(self) -> int:
        """Number of neighbouring elements that share a symbol model: whole rows (first axis), at least 64 elements."""
        return self.row * -(-_UNIT // self.row) if len(self.shape) > 1 else max(_UNIT, self.size)

    @property
    def row(self) -> int:
        """Number of elements of a row: of one index of the first axis."""
        return max(1, math.prod(self.shape[1:]) if len(self.shape) > 1 else self.size)

    @property
    def taps(self) -> int:
        """Number of elements of a kernel: of one index of the first two axes."""
        return max(1, math.prod(self.shape[2:]))

    @property
    def is_grid(self) -> bool:
        """Whether it holds 8-bit integers."""
        return self.code in GRIDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements `start` to `stop`, in C order, of tensor number `tensor`."""

    tensor: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a codec must know of a piece: element type, number of elements, elements that share a symbol model,
    elements of a row (first axis) and of a kernel (first two axes)."""

    code: str
    size: int
    unit: int
    row: int
    taps: int

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The element type, little-endian."""
        return np.dtype(self.code).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        """Raw bytes."""
        return self.size * self.dtype.itemsize


def spec(tensors: Sequence[Tensor], piece: Piece) -> Spec:
    """The Spec of a piece."""
    tensor = tensors[piece.tensor]
    size = piece.stop - piece.start
    return Spec(code=tensor.code, size=size, unit=tensor.unit, row=tensor.row, taps=tensor.taps)


def in_part_order(tensors: Sequence[Tensor]) -> list[int]:
    """Numbers of the tensors in the order in which parts hold them: 8-bit grids first, then the others; in both, first
    those that can share a part, then those too large for that (else each small one between large ones had its own)."""
    return sorted(range(len(tensors)), key=lambda i: (not tensors[i].is_grid, _is_large(tensors[i])))


def _is_large(tensor: Tensor) -> bool:
    return tensor.nbytes > _TARGET


def divide(tensors: Sequence[Tensor]) -> list[tuple[Piece, ...]]:
    """The pieces of each part."""
    parts: list[tuple[Piece, ...]] = []
    kinds = groupby(in_part_order(tensors), key=lambda i: (tensors[i].is_grid, _is_large(tensors[i])))
    for (_, large), numbers in kinds:
        if large:
            parts += [(piece,) for i in numbers for piece in ranges(i, tensors[i])]
        else:
            parts += _bundles(tensors, list(numbers))
    return parts


def _bundles(tensors: Sequence[Tensor], numbers: list[int]) -> list[tuple[Piece, ...]]:
    """Neighbours together, none of the bundles small unless all is."""
    bundles: list[list[Piece]] = []
    filled = 0
    for i in numbers:
        piece = Piece(tensor=i, start=0, stop=tensors[i].size)
        if bundles and (filled + tensors[i].nbytes <= _TARGET or filled < _LEAST):
            bundles[-1].append(piece)
            filled += tensors[i].nbytes
        else:
            bundles.append([piece])
            filled = tensors[i].nbytes
    if len(bundles) > 1 and filled < _LEAST:
        last = bundles.pop()
        bundles[-1] += last
    return [tuple(bundle) for bundle in bundles]


def ranges(number: int, tensor: Tensor) -> list[Piece]:
    """Even ranges of whole rows, where rows are not huge."""
    number_of = -(-tensor.nbytes // _TARGET)
    step = -(-tensor.size // number_of)
    row = math.prod(tensor.shape[1:])
    if row * tensor.dtype.itemsize <= _TARGET // 2:
        step = -(-step // row) * row
    return [Piece(tensor=number, start=s, stop=min(s + step, tensor.size)) for s in range(0, tensor.size, step)]
