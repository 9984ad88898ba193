"""The lossless codec of everything that is no 8-bit grid: floats, large integers, truth values.

Elements of one width are put together and cut into byte planes, the sign turned to the low end first where that helps
(the exponent of a float32 or bfloat16 then fills one plane). Each plane takes the smallest of four forms. The idea is
that of ZipNN (Hershcovitch et al. 2024).

A part's bytes, for each width of 1, 2, 4, 8 bytes that occurs: u8 (1: sign turned); then for each plane, lowest first,
u8 form and: 0 the bytes; 1 a length and a zstd frame; 2 a length and a symbol model, a length and a stream of grids.py;
3 the one byte that fills it; 4 bytes of a unit, a length and symbol models, a length and a stream of grids.py. Lengths
are LEB128. Codec 8 alone may use form 4: layers differ in scale, and so do the exponents of their weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.errors import PackageError
from penjing.package import grids, leb128, zstd
from penjing.package.models import Bytes, best_model, pack_models, unpack_models
from penjing.package.pieces import Spec

_RAW, _ZSTD, _MODEL, _CONSTANT, _CLUSTERS = range(5)
_WIDTHS = (1, 2, 4, 8)
_UNIT = 256  # bytes that share a model, where there are several
_LEAST_UNIT = 64
_FLAT = 7.0  # bits of entropy of a plane which differs little from place to place


def encode(arrays: list[NDArray[np.generic]]) -> tuple[bytes, bool]:
    """One part's bytes, and whether they use several models for a plane; `arrays` are flat and little-endian."""
    out, clustered = bytearray(), False
    for width in _WIDTHS:
        chosen = [a for a in arrays if a.dtype.itemsize == width and a.size]
        if not chosen:
            continue
        values = np.concatenate([a.view(f"<u{width}") for a in chosen])
        plain = _split(values)
        turned = _split(_turn(values)) if width > 1 else plain
        better = _entropy(turned) < _entropy(plain)
        out.append(int(better))
        for plane in turned if better else plain:
            form = _encode_plane(np.ascontiguousarray(plane))
            out, clustered = out + form, clustered or form[0] == _CLUSTERS
    return bytes(out), clustered


def decode(payload: memoryview, specs: list[Spec], *, clustered: bool = False) -> list[NDArray[np.generic]]:
    """The flat little-endian arrays; raises PackageError for bytes that no writer makes."""
    cursor = _Cursor(payload)
    out: list[NDArray[np.generic]] = [np.zeros(s.size, dtype=s.dtype) for s in specs]
    for width in _WIDTHS:
        chosen = [a for a in out if a.dtype.itemsize == width and a.size]
        if not chosen:
            continue
        count = sum(a.size for a in chosen)
        turned = cursor.byte()
        if turned > (width > 1):
            raise _damaged()
        planes = np.empty((count, width), dtype=np.uint8)
        for i in range(width):
            planes[:, i] = _decode_plane(cursor, count, clustered)
        values = planes.reshape(-1).view(f"<u{width}")
        if turned:
            values = (values >> 1) | (values << (8 * width - 1))
        at = 0
        for array in chosen:
            array.view(f"<u{width}")[:] = values[at : at + array.size]
            at += array.size
    if cursor.left():
        raise _damaged()
    return out


def shares(payload: memoryview, specs: list[Spec]) -> list[float]:
    """About how many bytes of the part each piece takes: by its raw bytes among those of its width."""
    cursor = _Cursor(payload)
    rates = dict.fromkeys(_WIDTHS, 0.0)
    for width in _WIDTHS:
        count = sum(s.size for s in specs if s.dtype.itemsize == width)
        if count:
            before = cursor.left()
            cursor.byte()
            for _ in range(width):
                _skip_plane(cursor, count)
            rates[width] = (before - cursor.left()) / count
    return [s.size * rates[s.dtype.itemsize] for s in specs]


def _skip_plane(cursor: _Cursor, count: int) -> None:
    form = cursor.byte()
    if form > _CLUSTERS:
        raise _damaged()
    if form == _CLUSTERS:
        cursor.length()
    if form in (_MODEL, _CLUSTERS):
        cursor.take(cursor.length())
    cursor.take(count if form == _RAW else 1 if form == _CONSTANT else cursor.length())


def _turn(values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray((values << 1) | (values >> (8 * values.dtype.itemsize - 1)))


def _split(values: NDArray[Any]) -> list[Bytes]:
    planes = values.view(np.uint8).reshape(len(values), values.dtype.itemsize)
    return [planes[:, i] for i in range(values.dtype.itemsize)]


def _entropy(planes: list[Bytes]) -> float:
    total = 0.0
    for plane in planes:
        counts = np.bincount(plane[: 1 << 18], minlength=256)
        counts = counts[counts > 0]
        total += float((counts * (np.log2(counts.sum()) - np.log2(counts))).sum())
    return round(total, 3)


def _encode_plane(plane: Bytes) -> bytes:
    counts = np.bincount(plane, minlength=256)
    if counts.max() == len(plane):
        return bytes([_CONSTANT, int(plane[0])])
    forms = [bytes([_RAW]) + plane.tobytes()]
    # A plane without a pattern of its own (mantissa bits) is not worth a coder.
    entropy = _entropy([plane]) / min(len(plane), 1 << 18)
    if entropy < 7.98:
        model = best_model(counts)
        table = pack_models([model])
        single = grids.Assignment(models=np.zeros(1, dtype=np.uint8), single=True)
        stream = grids.encode([grids.Grid(values=plane, unit=len(plane))], [single], [model])
        forms.append(bytes([_MODEL]) + leb128.encode(len(table)) + table + leb128.encode(len(stream)) + stream)
    if entropy < _FLAT and len(plane) > _UNIT:
        units = [grids.Grid(values=plane, unit=_UNIT)]
        models, assigned = grids.plan(units, hurry=False)
        table, stream = pack_models(models), grids.encode(units, assigned, models)
        front = bytes([_CLUSTERS]) + leb128.encode(_UNIT) + leb128.encode(len(table)) + table
        forms.append(front + leb128.encode(len(stream)) + stream)
    frame = zstd.compress(plane.tobytes(), worth=min(map(len, forms)))
    if frame is not None:
        forms.append(bytes([_ZSTD]) + leb128.encode(len(frame)) + frame)
    return min(forms, key=len)


def _decode_plane(cursor: _Cursor, count: int, clustered: bool) -> Bytes:
    form = cursor.byte()
    if form == _RAW:
        return np.frombuffer(cursor.take(count), dtype=np.uint8)
    if form == _ZSTD:
        return np.frombuffer(zstd.decompress(cursor.take(cursor.length()), count), dtype=np.uint8)
    if form == _MODEL:
        models = unpack_models(cursor.take(cursor.length()))
        if len(models) != 1:
            raise _damaged()
        return grids.decode(cursor.take(cursor.length()), [(count, count)], models)[0]
    if form == _CLUSTERS and clustered:
        unit = cursor.length()
        models = unpack_models(cursor.take(cursor.length()))
        if unit < _LEAST_UNIT:
            raise _damaged()
        return grids.decode(cursor.take(cursor.length()), [(count, unit)], models)[0]
    if form == _CONSTANT:
        return np.full(count, cursor.byte(), dtype=np.uint8)
    raise _damaged()


class _Cursor:
    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> memoryview:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise _damaged()
        self._at += count
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def length(self) -> int:
        number = 0
        for shift in range(0, 35, 7):
            byte = self.byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise _damaged()

    def left(self) -> int:
        return len(self._data) - self._at


def _damaged() -> PackageError:
    return PackageError(
        "a lossless part cannot be decoded", hint="the package was made by a faulty writer; get it again"
    )
