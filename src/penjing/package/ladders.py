"""Ladders: in which steps the values of a tensor become known, from coarse to exact.

Of 8-bit integers every layer but the last has a list of cuts, the byte values at which a bin begins; the bins of a
layer are parts of those before it. Of 32-bit floats every layer has so many bytes, from the high end. docs/format.md
has the JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.package.claims import bad_index, field, naturals, shown
from penjing.package.models import Bytes, Floats, Model
from penjing.package.pieces import GRIDS, Piece, Tensor, in_part_order

MAX_LAYERS = 8
_MAX_LADDERS = 255
_FLOAT = "f"  # the element type that is cut into bytes
_PLANES = {1: "B", 2: "H"}  # element type of so many bytes of a float

Weights = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Bins:
    """Steps of an 8-bit tensor: for each layer but the last, ascending values of 1..255 at which a bin begins."""

    cuts: tuple[tuple[int, ...], ...]

    @property
    def layers(self) -> int:
        """Number of layers; the last has a bin for every value."""
        return len(self.cuts) + 1

    @cached_property
    def tables(self) -> tuple[Bytes, ...]:
        """For each layer, the bin of each byte value."""
        values = np.arange(256)
        found = [np.searchsorted(cuts, values, side="right").astype(np.uint8) for cuts in self.cuts]
        return (*found, values.astype(np.uint8))

    def parents(self, layer: int) -> Bytes:
        """The bin in layer `layer - 1` of each bin of layer `layer` (from 2)."""
        starts = np.flatnonzero(np.diff(self.tables[layer - 1].astype(np.int64), prepend=-1))
        return np.asarray(self.tables[layer - 2][starts])

    def folded(self, weights: Weights, layer: int) -> Weights:
        """The weights of a layer's bins, of those of 256 values."""
        starts = np.flatnonzero(np.diff(self.tables[layer - 1].astype(np.int64), prepend=-1))
        return np.asarray(np.add.reduceat(weights, starts))

    def table(self, models: Sequence[Model], layer: int) -> Bytes:
        """The value that stands for each bin of a layer under each model, (models, 256)."""
        return _table(self, tuple(models), layer)

    def values(self, weights: Weights, layer: int) -> Bytes:
        """The value that stands for each bin of a layer, (models, 256), with weights (models, 256): the one that has
        more than half of its bin's weight, else the mean, rounded. So zeros stay zeros where they are many."""
        table = self.tables[layer - 1]
        starts = np.flatnonzero(np.diff(table.astype(np.int64), prepend=-1))
        bins = table.astype(np.intp)
        own = np.where(np.add.reduceat(weights, starts, axis=1)[:, bins] > 0, weights, 1)
        total = np.add.reduceat(own, starts, axis=1)
        mean = (2 * np.add.reduceat(own * np.arange(256), starts, axis=1) + total) // (2 * total)
        out = np.zeros((len(weights), 256), dtype=np.uint8)
        out[:, : len(starts)] = mean
        models, most = np.nonzero(2 * own > total[:, bins])
        out[models, bins[most]] = most
        return out


@dataclasses.dataclass(frozen=True)
class Planes:
    """Steps of a tensor of 32-bit floats: bytes of each layer, from the high end."""

    bytes: tuple[int, ...]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.bytes)

    def code(self, layer: int) -> str:
        """The element type of what a layer holds."""
        return _PLANES[self.bytes[layer - 1]]

    def shift(self, layer: int) -> int:
        """Bits that are unknown after a layer."""
        return 32 - 8 * sum(self.bytes[:layer])

    def cut(self, bits: NDArray[np.uint32], layer: int) -> NDArray[Any]:
        """What a layer holds of floats given as their bits."""
        return (bits >> np.uint32(self.shift(layer))).astype(f"<u{self.bytes[layer - 1]}")

    def values(self, bits: NDArray[np.uint32], layer: int) -> NDArray[np.uint32]:
        """Floats, as bits, known up to a layer: in the middle of what they can be; zeros, infinities stay."""
        shift = self.shift(layer)
        exponent = bits >> np.uint32(23) & np.uint32(255)
        middle = np.uint32(1 << shift - 1 if shift else 0)
        return np.where((exponent > 0) & (exponent < 255), bits | middle, bits)


Ladder = Bins | Planes


def weights_of(model: Model) -> Weights:
    """How often a model expects each byte value, (256,)."""
    out = np.zeros(256, dtype=np.int64)
    width = 1 << model.low_bits
    spread = model.weights.repeat(width)
    out[model.start * width : model.start * width + len(spread)] = spread
    return out


@lru_cache(maxsize=256)  # tensors by the thousand share few ladders
def _table(bins: Bins, models: tuple[Model, ...], layer: int) -> Bytes:
    return bins.values(np.array([weights_of(model) for model in models], dtype=np.int64).reshape(-1, 256), layer)


def pack(chosen: Sequence[Ladder | None]) -> dict[str, Any]:
    """The JSON of the ladder of each tensor (None: it is whole in the first layer)."""
    every = list(dict.fromkeys(ladder for ladder in chosen if ladder is not None))
    rows = [[list(c) for c in x.cuts] if isinstance(x, Bins) else list(x.bytes) for x in every]
    return {"ladders": rows, "ladder": [0 if ladder is None else 1 + every.index(ladder) for ladder in chosen]}


def parse(front: Mapping[str, Any], tensors: Sequence[Tensor]) -> tuple[Ladder | None, ...]:
    """The ladder of each tensor; raises PackageError for what no writer makes."""
    rows, chosen = field(dict(front), "ladders", list), naturals(front.get("ladder"), "'ladder'")
    if len(rows) > _MAX_LADDERS or len(chosen) != len(tensors) or max(chosen, default=0) > len(rows):
        bad_index("it has not one ladder for each tensor")
    ladders = [None, *map(_ladder, rows)]
    out = []
    for number, tensor in zip(chosen, tensors, strict=True):
        ladder = ladders[number]
        kinds = {Bins: GRIDS, Planes: _FLOAT, type(None): tensor.code}[type(ladder)]
        if tensor.code not in kinds or (number and not tensor.size):
            bad_index(f"the ladder of tensor '{shown(tensor.name)}' is one for other types")
        out.append(ladder)
    return tuple(out)


def _ladder(row: Any) -> Ladder:
    if not isinstance(row, list) or not 0 < len(row) <= MAX_LAYERS:
        bad_index("a ladder is not understood")
    if not isinstance(row[0], list):
        sizes = naturals(row, "a ladder")
        if sum(sizes) != 4 or not set(sizes) <= set(_PLANES) or len(sizes) < 2:
            bad_index("a ladder does not make up a float")
        return Planes(tuple(sizes))
    cuts = [naturals(each, "a ladder") for each in row]
    if len(cuts) == MAX_LAYERS or any(a >= b for each in cuts for a, b in pairwise([0, *each, 256])):
        bad_index("the cuts of a ladder do not ascend")
    if any(not set(a) <= set(b) for a, b in pairwise(cuts)):
        bad_index("the bins of a ladder are not nested")
    return Bins(tuple(map(tuple, cuts)))


# -------------------------------------------------------------------------------------------------------- choosing
def nested(counts: Floats, price: float, within: Sequence[int] = ()) -> list[int]:
    """The cuts that make squared error + `price` × bits of `counts` smallest, all of `within` among them.

    counts: of magnitudes 0, 1, 2 …, both signs together; bins are the same on both sides, or layers' means would drift.
    The optimal scalar quantizer of a finite alphabet is a shortest path (Muresan and Effros 2008).
    """
    size = len(counts)
    values = np.arange(float(size))
    total = max(float(counts.sum()), 1.0)
    sums = [np.concatenate([[0.0], np.cumsum(counts * values**k)]) for k in range(3)]
    best = np.full(size + 1, math.inf)
    came = np.zeros(size + 1, dtype=np.int64)
    best[0] = 0.0
    walls = np.zeros(size + 1, dtype=np.int64)  # the last cut of `within` before each place: no bin reaches across it
    for cut in within:
        walls[cut + 1 :] = cut
    for end in range(1, size + 1):
        start = np.arange(walls[end], end)
        n, first, second = (s[end] - s[start] for s in sums)
        some = np.maximum(n, 1e-300)
        bits = n * (np.log2(total / some) + (start > 0))  # those around zero have no sign
        error = second - np.where(start > 0, first**2 / some, 0.0)
        cost = best[start] + np.where(n > 0, error + price * bits, 0.0)
        # Equal costs: the widest bin, so that what does not occur gets no bins.
        came[end] = start[int(np.argmin(np.rint(cost * 1024)))]
        best[end] = cost[came[end] - start[0]]
    cuts, at = [], size
    while at:
        at = int(came[at])
        cuts.append(at)
    return sorted(cuts[:-1])


def around(centre: int, cuts: Sequence[int]) -> list[int]:
    """The cuts of byte values that cut their distances from `centre`."""
    both = {centre + cut for cut in cuts} | {centre - cut + 1 for cut in cuts}
    return sorted(cut for cut in both if 0 < cut < 256)


# ------------------------------------------------------------------------------------------------ rows of the index
def has_layer(tensors: Sequence[Tensor], ladders: Sequence[Ladder | None], layer: int) -> list[int]:
    """Numbers of the tensors of which a layer from 2 on holds something, in the order in which parts do."""
    return [i for i in in_part_order(tensors) if (ladder := ladders[i]) is not None and layer <= ladder.layers]


def pack_row(layer: int, pieces: Sequence[Piece], tensors: Sequence[Tensor], places: Mapping[int, int]) -> list[int]:
    """What a part's row in the index says of its pieces; `places`: of tensors among those of `has_layer`."""
    first = places[pieces[0].tensor]
    if all(p.start == 0 and p.stop == tensors[p.tensor].size for p in pieces):
        return [layer, first, len(pieces)]
    return [layer, first, pieces[0].start, pieces[0].stop]


def parse_rows(
    rows: Sequence[list[int]], tensors: Sequence[Tensor], ladders: Sequence[Ladder | None]
) -> list[tuple[int, tuple[Piece, ...]]]:
    """Layer and pieces of every part from layer 2 on: each element once a layer, or PackageError."""
    most = max((ladder.layers for ladder in ladders if ladder is not None), default=1)
    lists = [has_layer(tensors, ladders, layer) for layer in range(2, most + 1)]
    ranges: list[dict[int, list[tuple[int, int]]]] = [{} for _ in lists]
    out: list[tuple[int, tuple[Piece, ...]]] = []
    before = 2
    for row in rows:
        layer, first = row[0], row[1]
        if not before <= layer <= most:
            bad_index(f"a part of layer {layer} stands where none can")
        before, members, held = layer, lists[layer - 2], ranges[layer - 2]
        chosen = members[first : first + (row[2] if len(row) == 3 else 1)]
        if not chosen or len(chosen) != (row[2] if len(row) == 3 else 1):
            bad_index(f"a part of layer {layer} holds tensors that do not exist")
        pieces = []
        for number in chosen:
            start, stop = (0, tensors[number].size) if len(row) == 3 else (row[2], row[3])
            # Whole tensors end at once where one comes twice: rows cannot make this long.
            if len(row) == 3 and number in held or not 0 <= start < stop <= tensors[number].size:
                bad_index(f"a part of layer {layer} overlaps another or goes beyond its tensor")
            held.setdefault(number, []).append((start, stop))
            pieces.append(Piece(tensor=number, start=start, stop=stop))
        out.append((layer, tuple(pieces)))
    for layer, (members, held) in enumerate(zip(lists, ranges, strict=True), 2):
        for number in members:
            edges = [0, *(edge for pair in sorted(held.get(number, [])) for edge in pair), tensors[number].size]
            if any(a != b for a, b in zip(edges[::2], edges[1::2], strict=True)):
                bad_index(f"layer {layer} of tensor '{shown(tensors[number].name)}' overlaps itself or has a gap")
    return out
