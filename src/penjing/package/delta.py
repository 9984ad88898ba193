"""Deltas: packages that hold only what changed from one network to its next version.

Tensors that stay are left out. Of those that change, integers are kept as differences from the parent's, floats as
differences of their bits, whatever is new or of another shape as it is; the topology points into the parent's. The
delta names parent and child by their digests (penjing.digests): it is applied to that parent alone, and what comes out
is that child or an error.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.digests import digest
from penjing.errors import InputError, PackageError
from penjing.package import archive, directory, layout
from penjing.package.assembly import Assembly
from penjing.package.claims import bad_index, field, is_unicode, shown
from penjing.package.layout import Index
from penjing.progress import SILENT, Progress

Array = NDArray[Any]
Paths = str | os.PathLike[str]
Packed = tuple[str, Mapping[str, Array], Mapping[str, Any]]  # topology, arrays, metadata

_WHOLE, _DIFFERENT = "wd"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What a delta says of itself.

    parent, child: digests of the networks, in hexadecimal. names: of the child's tensors in order, None: the parent's.
    kinds: for each tensor in the delta "w", whole, or "d", a difference. The others are the parent's.
    """

    parent: str
    child: str
    names: tuple[str, ...] | None
    kinds: str


def diff(old: Paths, new: Paths, out: Paths, *, layout: str = "file", progress: Progress = SILENT) -> int:
    """Writes what changed from the package `old` to the package `new` as the package `out`; returns its bytes.

    Raises PackageError for packages that cannot be read, OutputError.
    """
    directory.check(layout)
    return directory.save(encode(archive.read(old), archive.read(new), progress=progress), out, layout=layout)


def patch(old: Paths, delta: Paths, out: Paths, *, layout: str = "file", progress: Progress = SILENT) -> int:
    """Writes the new package, made of the old one and the delta; returns its bytes.

    Topology, tensors and metadata are those that `diff` was given, so it has the same bytes where the same zstd release
    packs it (layers apart: it has none). Raises PackageError where the delta is one of another network, or damaged.
    """
    directory.check(layout)
    topology, arrays, metadata = read(old, delta, progress=progress)
    return directory.save(archive.encode(topology, arrays, metadata=metadata, progress=progress), out, layout=layout)


def read(old: Paths, delta: Paths, *, progress: Progress = SILENT) -> tuple[str, dict[str, Array], dict[str, Any]]:
    """What `patch` writes, as plain values."""
    return decode(archive.load(delta), archive.read(old), progress=progress)


def encode(old: Packed, new: Packed, *, progress: Progress = SILENT) -> bytes:
    """The bytes of a delta between two networks as plain values. Raises InputError for what a package cannot hold."""
    before, (topology, arrays, metadata) = old[1], new
    held: dict[str, Array] = {}
    kinds = ""
    for name, array in arrays.items():
        archive.described(name, array)
        earlier = before.get(name)
        comparable = earlier is not None and earlier.shape == array.shape and earlier.dtype == array.dtype
        if earlier is not None and comparable and np.array_equal(_bits_of(earlier), _bits_of(array)):
            continue
        apart = _difference(earlier, array) if earlier is not None and comparable and array.dtype != bool else None
        if apart is not None and _bits(apart) < _bits(array):
            held[name], kinds = apart, kinds + _DIFFERENT
        else:
            held[name], kinds = array, kinds + _WHOLE
    record: dict[str, Any] = {
        "parent": digest(old[0], before),
        "child": digest(topology, arrays),
        "kinds": kinds,
    }
    if list(arrays) != list(before):
        record["names"] = list(arrays)
    told = {key: value for key, value in metadata.items() if key != archive.LADDER}
    return archive.encode(topology, held, metadata=told, delta=record, parent=old[0], progress=progress)


def decode(
    delta: bytes | memoryview, old: Packed, *, progress: Progress = SILENT
) -> tuple[str, dict[str, Array], dict[str, Any]]:
    """The new network as plain values. Raises InputError where `delta` is none, PackageError where it is one of another
    network than `old`, or does not give the network that it names."""
    header, index, payloads = archive.open_bytes(bytes(delta))
    if header.required & layout.SEALED:
        archive.refuse_other_kinds(header)
    if not header.required & layout.DELTA:
        raise InputError("the package is no delta", hint="penjing diff OLD NEW DELTA makes one")
    told = changes(index)
    before = old[1]
    found = digest(old[0], before)
    if found != told.parent:
        raise PackageError(
            f"the delta changes the network {told.parent[:12]}…, and this one is {found[:12]}…",
            hint="name the very version that the delta was made from",
        )
    names = list(before) if told.names is None else list(told.names)
    inside = {t.name for t in index.tensors}
    if not inside <= set(names) or not set(names) <= inside | set(before):
        bad_index("it names tensors that are nowhere")
    assembly = Assembly(index)
    with progress.task("decoding the delta", len(index.parts)) as advance:
        for number, payload in enumerate(payloads[1:]):
            assembly.take(number, payload)
            advance(1)
    held = assembly.arrays()
    for kind, name in zip(told.kinds, list(held), strict=True):
        if kind == _DIFFERENT:
            held[name] = _added(name, before.get(name), held[name])
    topology = archive.topology_text(index, payloads[0], old[0])
    arrays = {name: held[name] if name in held else np.array(before[name]) for name in names}
    if digest(topology, arrays) != told.child:
        raise PackageError(
            "the delta does not give the network that it names", hint="it was made by a faulty writer; get it again"
        )
    return topology, arrays, index.metadata


def changes(index: Index) -> Changes:
    """What the index of a delta says. Raises PackageError for what no writer makes."""
    record = index.delta or {}
    parent, child, kinds = (field(record, key, str) for key in ("parent", "child", "kinds"))
    names = tuple(field(record, "names", list)) if "names" in record else None
    if not _DIGEST.fullmatch(parent) or not _DIGEST.fullmatch(child):
        bad_index("a digest of the delta is none")
    if len(kinds) != len(index.tensors) or set(kinds) - {_WHOLE, _DIFFERENT}:
        bad_index("the delta does not say what each tensor is")
    if names is not None and (any(not isinstance(n, str) for n in names) or len(set(names)) != len(names)):
        bad_index("two tensors share a name")
    if not is_unicode(names):
        bad_index("a tensor's name is no valid Unicode")
    return Changes(parent=parent, child=child, names=names, kinds=kinds)


def _difference(old: Array, new: Array) -> Array:
    """What must be added: int8 for 8-bit values; else unsigned, of the values' bits, small magnitudes of both signs as
    small numbers."""
    width = new.dtype.itemsize
    apart = _bits_of(new) - _bits_of(old)
    if width == 1:
        return apart.view(np.int8)
    signed = apart.view(f"i{width}")
    return np.asarray((apart << 1) ^ (signed >> (8 * width - 1)).view(apart.dtype))


def _added(name: str, old: Array | None, apart: Array) -> Array:
    if old is None or old.shape != apart.shape or old.dtype == bool or _kind(old.dtype) != apart.dtype:
        raise PackageError(
            f"the delta changes tensor '{shown(name)}' in a way that does not fit it",
            hint="it was made by a faulty writer; get it again",
        )
    if apart.dtype == np.int8:
        steps = apart.view(np.uint8)
    else:
        steps = (apart >> 1) ^ (np.zeros_like(apart) - (apart & 1))
    return np.asarray(_bits_of(old) + steps).view(old.dtype)


def _kind(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of differences between tensors of a type."""
    return np.dtype(np.int8) if dtype.itemsize == 1 else np.dtype(f"u{dtype.itemsize}")


def _bits_of(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(array.shape).view(f"u{array.dtype.itemsize}")


def _bits(array: Array) -> float:
    """About the bits that a tensor takes when coded: the entropies of its bytes' planes."""
    planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize)
    total = 0.0
    for plane in planes.T:
        counts = np.bincount(plane, minlength=256)
        counts = counts[counts > 0]
        total += float(counts @ (np.log2(max(int(counts.sum()), 1)) - np.log2(counts))) + 6 * len(counts)
    return total
