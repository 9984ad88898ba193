"""The codec of layered 8-bit tensors: bins under the same symbol models as whole values, then what is in each bin.

A model says how often it expects every byte value; summed over bins it is a model of the first layer, and inside of one
bin, once that is known, of the next. So layers need no models of their own, and all of them together take the bits that
the values would take at once.

First layer, a part's bytes: u8 form; u32 count of words; the words; a byte for each piece and weights of models as in
grids.py; if the form is 1, a part of sparse.py that holds the bins. Popped from the words: the models of the units; in
form 0 then, by model and ladder, the bins. Further layers: words alone; popped by model, ladder and bin of the layer
before.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from penjing.errors import PackageError
from penjing.package import grids, sparse
from penjing.package.ladders import Bins, Weights, weights_of
from penjing.package.models import Bytes, Decoder, Encoder, Model

_PLAIN, _SPARSE = range(2)
WHOLE = Bins(())  # the ladder of a tensor that the first layer holds whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Elements of one piece: (values,) and (units,), or for reading the sizes; the ladder, and the length of rows."""

    size: int
    unit: int
    row: int
    ladder: Bins


def spread(names: NDArray[np.uint8], size: int, unit: int) -> Bytes:
    """The model of each element, of those of its piece's units."""
    return names.repeat(min(unit, max(size, 1)))[:size]


def encode_first(runs: Sequence[Run], values: Sequence[Bytes], assigned: Sequence[grids.Assignment],
                 models: Sequence[Model]) -> bytes:  # fmt: skip
    """One part's bytes for the first layer of some pieces."""
    bins = [run.ladder.tables[0][v] for run, v in zip(runs, values, strict=True)]
    used = [spread(a.models, run.size, run.unit) for run, a in zip(runs, assigned, strict=True)]
    encoder = Encoder()
    _push(encoder, bins, list(_groups(runs, used, None, models, 1)))
    plain = struct.pack("<B", _PLAIN) + _stream(encoder, assigned, models)
    sheets = [sparse.Sheet(values=b, row=run.row) for run, b in zip(runs, bins, strict=True)]
    if sparse.worthwhile(sheets):
        front = struct.pack("<B", _SPARSE) + _stream(Encoder(), assigned, models)
        coded = sparse.encode(sheets, worth=len(plain) - len(front))
        if coded is not None and len(front) + len(coded) < len(plain):
            return front + coded
    return plain


def encode_next(
    runs: Sequence[Run], values: Sequence[Bytes], used: Sequence[Bytes], models: Sequence[Model], layer: int
) -> bytes:
    """One part's bytes for a further layer; `used`: the model of each element."""
    tables = [run.ladder.tables for run in runs]
    before = [t[layer - 2][v] for t, v in zip(tables, values, strict=True)]
    bins = [t[layer - 1][v] for t, v in zip(tables, values, strict=True)]
    encoder = Encoder()
    _push(encoder, bins, list(_groups(runs, used, before, models, layer)))
    return encoder.words()


def decode_first(
    payload: memoryview, runs: Sequence[Run], models: Sequence[Model]
) -> tuple[list[Bytes], list[NDArray[np.uint8]]]:
    """The bins of each piece, and the models of its elements. Raises PackageError for bytes that no writer makes."""
    if not len(payload) or payload[0] > _SPARSE:
        raise _damaged()
    opened = grids.open_units(payload[1:], [(run.size, run.unit) for run in runs], models)
    used = [spread(names, run.size, run.unit) for run, names in zip(runs, opened.assigned, strict=True)]
    if payload[0] == _SPARSE:
        bins = sparse.decode(opened.rest, [(run.size, run.row) for run in runs])
        if any(b.size and b.max() > run.ladder.tables[0][-1] for run, b in zip(runs, bins, strict=True)):
            raise _damaged()
    else:
        bins = [np.empty(run.size, dtype=np.uint8) for run in runs]
        _pop(opened.decoder, bins, _groups(runs, used, None, models, 1))
        if len(opened.rest):
            raise _damaged()
    opened.decoder.finish()
    return bins, used


def decode_next(
    payload: memoryview,
    runs: Sequence[Run],
    before: Sequence[Bytes],
    used: Sequence[Bytes],
    models: Sequence[Model],
    layer: int,
) -> list[Bytes]:
    """The bins of each piece in a further layer, from those in the layer before."""
    decoder = Decoder(payload)
    bins = [np.empty(run.size, dtype=np.uint8) for run in runs]
    _pop(decoder, bins, _groups(runs, used, before, models, layer))
    decoder.finish()
    return bins


@dataclasses.dataclass(frozen=True)
class _Group:
    """Elements that are coded in one go: where they are (piece, places in it); the bin that counts as 0; how often each
    occurs."""

    places: list[tuple[int, NDArray[np.intp]]]
    first: int
    weights: Weights

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(len(places) for _, places in self.places)


def _groups(
    runs: Sequence[Run], used: Sequence[Bytes], before: Sequence[Bytes] | None, models: Sequence[Model], layer: int
) -> Iterator[_Group]:
    """By model, ladder (in the order in which pieces name them) and bin before."""
    numbers = {ladder: i for i, ladder in enumerate(dict.fromkeys(run.ladder for run in runs))}
    ladders = list(numbers)
    found: dict[tuple[int, int, int], list[tuple[int, NDArray[np.intp]]]] = {}
    for piece, (run, names) in enumerate(zip(runs, used, strict=True)):
        keys = names.astype(np.uint16) << 8
        if before is not None:
            keys |= before[piece]
        order, ladder = np.argsort(keys, kind="stable"), numbers[run.ladder]
        starts = np.flatnonzero(np.diff(keys[order].astype(np.int64), prepend=-1)).tolist()
        for start, stop in pairwise([*starts, len(order)]):
            first = int(keys[order[start]])
            found.setdefault((first >> 8, ladder, first & 255), []).append((piece, order[start:stop]))
    for (model, ladder), members in groupby(sorted(found), key=lambda key: key[:2]):
        weights = ladders[ladder].folded(weights_of(models[model]), layer)
        parents = None if before is None else ladders[ladder].parents(layer)
        for key in members:
            own, low = weights, 0
            if parents is not None:
                inside = np.flatnonzero(parents == key[2])
                own, low = weights[inside], int(inside[0])
            yield _Group(found[key], low, own if own.any() else np.ones_like(own))


def _push(encoder: Encoder, bins: Sequence[Bytes], groups: list[_Group]) -> None:
    for group in reversed(groups):
        symbols = np.concatenate([bins[piece][places] for piece, places in group.places])
        encoder.push(symbols - np.uint8(group.first), group.weights)


def _pop(decoder: Decoder, bins: Sequence[Bytes], groups: Iterator[_Group]) -> None:
    for group in groups:
        found = decoder.pop(group.size, group.weights).astype(np.uint8) + np.uint8(group.first)
        at = 0
        for piece, places in group.places:
            bins[piece][places] = found[at : at + len(places)]
            at += len(places)


def _stream(encoder: Encoder, assigned: Sequence[grids.Assignment], models: Sequence[Model]) -> bytes:
    kinds = grids.push_units(encoder, assigned, len(models))
    words = encoder.words()
    return struct.pack("<I", len(words) // 4) + words + kinds


def _damaged() -> PackageError:
    return PackageError(
        "a layer of integer grids cannot be decoded", hint="the package was made by a faulty writer; get it again"
    )
