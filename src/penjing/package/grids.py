"""The codec of integer grids: rows grouped under shared symbol models, each group coded in one go.

A part's bytes: u32 count of entropy-coded words; the words; a byte for each piece (its model, or 255: a model for each
unit); where there is such a piece, a byte of weight for each model; the raw low bits of each model's symbols.
Popped from the words: the models of the units, then the symbols of model 0, of model 1 and so on.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penjing.errors import PackageError
from penjing.package.clusters import Clusters, centres, fit
from penjing.package.models import (
    Bytes,
    Decoder,
    Encoder,
    Floats,
    Model,
    best_model,
    low_size,
    pack_low,
    unpack_low,
)

_BY_UNIT = 255
_SAMPLE = 2000  # rows looked at to find the clusters
_KEPT = 20_000  # rows whose histograms are kept for a second round
_MANY = 1_000_000  # symbols from which decoding speed is worth some of the bytes
_SLACK = 0.004


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Symbols of one piece (int8 values with the sign bit turned over) and the size of its units."""

    values: Bytes
    unit: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """The model of each unit of a piece."""

    models: NDArray[np.uint8]
    single: bool


def symbols(array: NDArray[np.generic]) -> Bytes:
    """int8 becomes 0..255 in order; uint8 stays."""
    values = array.reshape(-1).view(np.uint8)
    turned: Bytes = values ^ np.uint8(0x80) if array.dtype == np.int8 else values
    return turned


def values(symbols: Bytes, code: str) -> NDArray[np.generic]:
    """What `symbols` was made of, an array of type `code`."""
    return (symbols ^ np.uint8(0x80)).view(np.int8) if code == "b" else symbols


def _blocks(values: Bytes, unit: int) -> list[tuple[slice, Bytes]]:
    """The whole units as a matrix, and the shorter last one as another; slices are of unit numbers."""
    whole = len(values) // unit
    out = [(slice(0, whole), values[: whole * unit].reshape(whole, unit))] if whole else []
    if len(values) % unit:
        out.append((slice(whole, whole + 1), values[whole * unit :].reshape(1, -1)))
    return out


def _histograms(grid: Grid, every: int = 1) -> Floats:
    """(units, 256) counts; of each `every`-th unit."""
    out = []
    for _, block in _blocks(grid.values, grid.unit):
        rows = block[::every]
        flat = rows + (np.arange(len(rows), dtype=np.int64) << 8)[:, None]
        out.append(np.bincount(flat.reshape(-1), minlength=len(rows) << 8).reshape(-1, 256))
    return np.concatenate(out).astype(np.float64) if out else np.zeros((0, 256))


def plan(grids: Sequence[Grid], *, hurry: bool = True) -> tuple[tuple[Model, ...], list[Assignment]]:
    """The models for all of a network's grids, and who uses which. hurry: whether many are made fast to decode."""
    total = sum(len(g.values) for g in grids)
    if not total:
        return (), [Assignment(models=np.zeros(0, dtype=np.uint8), single=True) for _ in grids]
    units = sum(-(-len(g.values) // g.unit) for g in grids)
    sample = np.concatenate([_histograms(g, every=max(1, units // _SAMPLE)) for g in grids])
    clusters = fit(sample, share=float(sample.sum()) / total)
    kept = [_histograms(g) for g in grids] if units <= _KEPT else None
    assigned, counts = _assign(grids, clusters, kept)
    if kept is not None:
        rows = np.bincount(np.concatenate([a.models for a in assigned]), minlength=len(counts))
        held = rows > 0
        assigned, counts = _assign(grids, centres(counts[held], rows[held]), kept)
    used = np.flatnonzero(counts.sum(axis=1))
    slack = _SLACK if hurry and total >= _MANY else 0.0
    models = tuple(best_model(counts[k].astype(np.int64), slack=slack) for k in used)
    renumber = np.zeros(len(counts), dtype=np.uint8)
    renumber[used] = np.arange(len(used))
    return models, [Assignment(models=renumber[a.models], single=a.single) for a in assigned]


def _assign(grids: Sequence[Grid], clusters: Clusters, kept: list[Floats] | None) -> tuple[list[Assignment], Floats]:
    counts = np.zeros((len(clusters.bits), 256))
    assigned = []
    for i, grid in enumerate(grids):
        histograms = _histograms(grid) if kept is None else kept[i]
        models, single = clusters.assign(histograms) if len(histograms) else (np.zeros(0, dtype=np.uint8), True)
        counts += (models == np.arange(len(counts))[:, None]).astype(np.float64) @ histograms
        assigned.append(Assignment(models=models, single=single))
    return assigned, counts


def encode(grids: Sequence[Grid], assigned: Sequence[Assignment], models: Sequence[Model]) -> bytes:
    """One part's bytes."""
    streams = _gather(grids, assigned, len(models))
    encoder = Encoder()
    for k in range(len(models) - 1, -1, -1):
        model = models[k]
        model.push(encoder, (streams[k] >> model.low_bits) - np.uint8(model.start))
    units = push_units(encoder, assigned, len(models))
    words = encoder.words()
    low = b"".join(pack_low(stream, m.low_bits) for stream, m in zip(streams, models, strict=True))
    return struct.pack("<I", len(words) // 4) + words + units + low


def push_units(encoder: Encoder, assigned: Sequence[Assignment], number: int) -> bytes:
    """Adds the models of units, of `number`, where a piece has several; returns the bytes that stand for pieces."""
    kinds = bytes(int(a.models[0]) if a.single and len(a.models) else 0 if a.single else _BY_UNIT for a in assigned)
    named = [a.models for a in assigned if not a.single]
    if not named:
        return kinds
    names = np.concatenate(named)
    counts = np.bincount(names, minlength=number)
    table = np.where(counts > 0, np.maximum(1, counts * 255 // counts.max()), 0)
    encoder.push(names, table)
    return kinds + bytes(table.tolist())


def _rows(names: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.intp] | None]]:
    """The models that a block's units use, each with its rows (None: all)."""
    counts = np.bincount(names).tolist()
    if len(names) in counts:
        return [(counts.index(len(names)), None)]
    order = np.argsort(names, kind="stable")
    out: list[tuple[int, NDArray[np.intp] | None]] = []
    at = 0
    for k, count in enumerate(counts):
        if count:
            out.append((k, order[at : at + count]))
            at += count
    return out


def _gather(grids: Sequence[Grid], assigned: Sequence[Assignment], number: int) -> list[Bytes]:
    """The symbols of each model: piece by piece, in each the units in order."""
    out: list[list[Bytes]] = [[] for _ in range(number)]
    for grid, assignment in zip(grids, assigned, strict=True):
        for span, block in _blocks(grid.values, grid.unit):
            for k, rows in _rows(assignment.models[span]):
                out[k].append((block if rows is None else block[rows]).reshape(-1))
    return [np.concatenate(part) if part else np.zeros(0, dtype=np.uint8) for part in out]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """The models of each piece's units, what pops the symbols, and the bytes behind."""

    assigned: list[NDArray[np.uint8]]
    decoder: Decoder
    rest: memoryview


def open_units(payload: memoryview, shapes: Sequence[tuple[int, int]], models: Sequence[Model]) -> Opened:
    """Reads what precedes the symbols; `shapes` are (symbols, unit) of each piece."""
    if len(payload) < 4:
        raise _damaged()
    (count,) = struct.unpack_from("<I", payload)
    words, rest = payload[4 : 4 + 4 * count], payload[4 + 4 * count :]
    if len(words) != 4 * count or len(rest) < len(shapes):
        raise _damaged()
    decoder = Decoder(words)
    kinds, rest = rest[: len(shapes)], rest[len(shapes) :]
    units = [-(-size // unit) for size, unit in shapes]
    named = sum(n for n, kind in zip(units, kinds, strict=True) if kind == _BY_UNIT)
    names = np.zeros(0, dtype=np.uint8)
    if _BY_UNIT in kinds:
        table = np.frombuffer(rest[: len(models)], dtype=np.uint8).astype(np.int64)
        if len(table) != len(models) or not table.any():
            raise _damaged()
        names, rest = decoder.pop(named, table).astype(np.uint8), rest[len(models) :]
    assigned, at = [], 0
    for number, kind in zip(units, kinds, strict=True):
        if kind == _BY_UNIT:
            assigned.append(names[at : at + number])
            at += number
        elif kind < max(1, len(models)):
            assigned.append(np.full(number, kind, dtype=np.uint8))
        else:
            raise _damaged()
    if not models and any(units):
        raise _damaged()
    return Opened(assigned=assigned, decoder=decoder, rest=rest)


def decode(payload: memoryview, shapes: Sequence[tuple[int, int]], models: Sequence[Model]) -> list[Bytes]:
    """Symbols of each piece; raises PackageError for bytes that no writer makes."""
    opened = open_units(payload, shapes, models)
    out = [np.empty(size, dtype=np.uint8) for size, _ in shapes]
    low = opened.rest
    targets: list[list[tuple[Bytes, NDArray[np.intp] | None]]] = [[] for _ in models]
    for values, (_, unit), names in zip(out, shapes, opened.assigned, strict=True):
        for span, block in _blocks(values, unit):
            for k, rows in _rows(names[span]):
                targets[k].append((block, rows))
    for model, blocks in zip(models, targets, strict=True):
        counts = [block.shape[1] * (len(block) if rows is None else len(rows)) for block, rows in blocks]
        stream = _stream(opened.decoder, low, sum(counts), model)
        low = low[low_size(len(stream), model.low_bits) :]
        at = 0
        for (block, rows), count in zip(blocks, counts, strict=True):
            part = stream[at : at + count].reshape(-1, block.shape[1])
            at += count
            if rows is None:
                block[:] = part
            else:
                block[rows] = part
    opened.decoder.finish()
    if len(low):
        raise _damaged()
    return out


def _stream(decoder: Decoder, low: memoryview, count: int, model: Model) -> Bytes:
    size = low_size(count, model.low_bits)
    if len(low) < size:
        raise _damaged()
    stream = model.pop(decoder, count)
    stream += np.uint8(model.start)
    if model.low_bits:
        stream <<= np.uint8(model.low_bits)
        stream |= unpack_low(low[:size], count, model.low_bits)
    return stream


def shares(payload: memoryview, shapes: Sequence[tuple[int, int]], models: Sequence[Model]) -> list[float]:
    """About how many bits of the part each piece takes, from its units' models; no symbol is decoded."""
    bits = [m.entropy() for m in models]
    out = []
    for (size, unit), names in zip(shapes, open_units(payload, shapes, models).assigned, strict=True):
        sizes = np.full(len(names), unit)
        if len(sizes) and size % unit:
            sizes[-1] = size % unit
        out.append(float(sum(bits[k] * sizes[names == k].sum() for k in np.unique(names))))
    return out


def _damaged() -> PackageError:
    return PackageError(
        "a part with integer grids cannot be decoded", hint="the package was made by a faulty writer; get it again"
    )
