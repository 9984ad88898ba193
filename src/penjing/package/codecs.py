"""The codecs of parts, by number. A new coder takes the next number; older readers refuse a number they do not know.

0 stored: the pieces' little-endian bytes. 1 zstd: one frame of the same. 2 grids: grids.py. 3 planes: planes.py.
4 sparse: sparse.py. 5 phrases: zstd that may point into phrases.txt; of texts, the topology. 6 nested: nested.py, of
layered packages. 7 parent: zstd that may point into another text; of the topology of deltas. 8 clusters: planes with
several models for one plane. 9 numbers: texts.py, of texts. 10 expected: expected.py, of small networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penjing.errors import PackageError
from penjing.package import expected, grids, planes, sparse, texts, zstd
from penjing.package.models import Model
from penjing.package.pieces import GRIDS, Spec, Tensor

STORED, ZSTD, GRID, PLANES, SPARSE, PHRASES, NESTED, PARENT, CLUSTERS, NUMBERS, EXPECTED = range(11)
NAMES = (
    "stored",
    "zstd",
    "grids",
    "planes",
    "sparse",
    "phrases",
    "nested",
    "parent",
    "clusters",
    "numbers",
    "expected",
)

Array = NDArray[np.generic]


def encode_text(text: bytes, parent: bytes = b"") -> tuple[int, bytes]:
    """The codec that makes a text smallest, and its bytes; with the text of a `parent` to point into."""
    forms = [
        (STORED, text),
        (ZSTD, zstd.compress(text)),
        (PHRASES, zstd.compress(text, phrases=True)),
        (NUMBERS, texts.encode(text)),
    ]
    if parent:
        forms.append((PARENT, zstd.compress(text, known=parent)))
    return min(((codec, data) for codec, data in forms if data is not None), key=lambda form: len(form[1]))


def decode_text(codec: int, payload: memoryview, size: int, parent: bytes = b"") -> bytes:
    """The `size` bytes of a text; raises PackageError for bytes that no writer makes."""
    if codec == STORED:
        return bytes(payload)
    if codec == NUMBERS:
        return texts.decode(payload, size)
    return zstd.decompress(payload, size, phrases=codec == PHRASES, known=parent if codec == PARENT else b"")


def is_small(tensors: Sequence[Tensor]) -> bool:
    """Whether a package of these tensors may hold expected grids."""
    return sum(t.size for t in tensors if t.is_grid) <= expected.MOST


def encode_expected(arrays: Sequence[Array], specs: Sequence[Spec], worth: int) -> bytes | None:
    """A part of 8-bit grids by the slow codec of small networks; None unless it is shorter than `worth`."""
    pairs = zip(arrays, specs, strict=True)
    return expected.encode([expected.Sheet(values=grids.symbols(a), row=s.row, taps=s.taps) for a, s in pairs], worth)


def encode(
    arrays: list[Array], specs: list[Spec], assigned: list[grids.Assignment] | None, models: Sequence[Model]
) -> tuple[int, bytes]:
    """The codec that makes this part smallest, and its bytes. `assigned`: where all pieces are 8-bit grids."""
    raw = b"".join(a.tobytes() for a in arrays)
    forms = [(STORED, raw)]
    if assigned is not None:
        wanted = [grids.Grid(values=grids.symbols(a), unit=s.unit) for a, s in zip(arrays, specs, strict=True)]
        forms.append((GRID, grids.encode(wanted, assigned, models)))
        sheets = [sparse.Sheet(values=g.values, row=s.row) for g, s in zip(wanted, specs, strict=True)]
        if sparse.worthwhile(sheets):
            found = sparse.encode(sheets, worth=min(len(data) for _, data in forms))
            forms += [] if found is None else [(SPARSE, found)]
    else:
        coded, clustered = planes.encode(arrays)
        forms.append((CLUSTERS if clustered else PLANES, coded))
    frame = zstd.compress(raw, worth=min(len(data) for _, data in forms), hurry=assigned is not None)
    if frame is not None:
        forms.append((ZSTD, frame))
    return min(forms, key=lambda form: len(form[1]))


def decode(codec: int, payload: memoryview, specs: list[Spec], models: Sequence[Model]) -> list[Array]:
    """The flat little-endian arrays of a part's pieces; raises PackageError for bytes that no writer makes."""
    if codec in (GRID, SPARSE, EXPECTED):
        _only_grids(specs)
        out: list[Array] = []
        if codec == GRID:
            found = grids.decode(payload, _sizes(specs), models)
        else:
            found = sparse.decode(payload, _rows(specs)) if codec == SPARSE else expected.decode(payload, _taps(specs))
        for values, spec in zip(found, specs, strict=True):
            out.append(grids.values(values, spec.code))
    elif codec in (PLANES, CLUSTERS):
        out = planes.decode(payload, specs, clustered=codec == CLUSTERS)
    elif codec in (NESTED, PARENT, NUMBERS):
        raise PackageError(
            f"a part uses the codec {NAMES[codec]} where it cannot be", hint="the package was made by a faulty writer"
        )
    else:
        raw: bytes | memoryview = payload
        size = sum(s.nbytes for s in specs)
        if codec != STORED:
            raw = zstd.decompress(payload, size, phrases=codec == PHRASES)
        if len(raw) != size:
            raise PackageError(f"a stored part holds {len(raw)} bytes instead of {size}", hint="get the package again")
        out, at = [], 0
        for spec in specs:
            out.append(
                np.frombuffer(raw, dtype=spec.dtype, count=spec.size, offset=at)
                if spec.size
                else np.zeros(0, dtype=spec.dtype)
            )
            at += spec.nbytes
    if any(s.code == "?" and a.size and a.view(np.uint8).max() > 1 for a, s in zip(out, specs, strict=True)):
        raise PackageError("a truth value is neither 0 nor 1", hint="the package was made by a faulty writer")
    return out


def shares(codec: int, payload: memoryview, specs: list[Spec], models: Sequence[Model]) -> list[float]:
    """Relative sizes of the pieces inside a part; nothing is decoded for it, but for sparse and expected grids."""
    if codec == GRID:
        _only_grids(specs)
        return grids.shares(payload, _sizes(specs), models)
    if codec == SPARSE:
        _only_grids(specs)
        return sparse.shares(payload, _rows(specs))
    if codec == EXPECTED:
        _only_grids(specs)
        return expected.shares(payload, _taps(specs))
    if codec in (PLANES, CLUSTERS):
        return planes.shares(payload, specs)
    return [float(s.nbytes) for s in specs]


def _sizes(specs: list[Spec]) -> list[tuple[int, int]]:
    return [(s.size, s.unit) for s in specs]


def _rows(specs: list[Spec]) -> list[tuple[int, int]]:
    return [(s.size, s.row) for s in specs]


def _taps(specs: list[Spec]) -> list[tuple[int, int, int]]:
    return [(s.size, s.row, s.taps) for s in specs]


def _only_grids(specs: list[Spec]) -> None:
    if any(s.code not in GRIDS for s in specs):
        raise PackageError(
            "a part of integer grids holds other tensors", hint="the package was made by a faulty writer"
        )
