"""The front of a package, byte by byte: header and index. docs/format.md describes it for writers of other readers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from typing import Any, NoReturn

from penjing.errors import InputError, PackageError
from penjing.package import ladders, prediction, zstd
from penjing.package.claims import bad_index, field, is_deep, is_unicode, naturals, shown
from penjing.package.codecs import EXPECTED, NAMES, NESTED, NUMBERS, PARENT, PHRASES, STORED, ZSTD, is_small
from penjing.package.ladders import Ladder
from penjing.package.models import Model, pack_models, unpack_models
from penjing.package.pieces import CODES, MAX_PART, Piece, Tensor, in_part_order
from penjing.package.prediction import Predictor

MAGIC = b"\x89PJG\r\n\x1a\n"
VERSION = 1
LAYERED = 1 << 0  # required feature: parts hold layers of tensors (package/ladders.py)
DELTA = 1 << 1  # required feature: tensors are differences from those of another package (package/delta.py)
SEALED = 1 << 2  # required feature: the parts are encrypted (package/sealing.py)
PREDICTED = 1 << 3  # required feature: kernels are coded as what prediction leaves (package/prediction.py)
KNOWN_REQUIRED = LAYERED | DELTA | SEALED | PREDICTED  # bits of required features that this reader has
_HEADER = struct.Struct("<8sBHHIII")
HEADER_SIZE = _HEADER.size + 32

_MAX_INDEX = 256 << 20
_MAX_TENSORS = 1_000_000
_MAX_DIMS = 32
_FREE = 256 << 20  # raw bytes that any package may declare
_RATIO = 1000  # and how many times its own size a larger one may
_VALUE = 64  # bytes that a value of the index's JSON takes in memory, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A content-addressed run of bytes: codec, size in the file, SHA-256, the pieces of tensors that it holds, and of
    which layer."""

    codec: int
    stored: int
    digest: bytes
    pieces: tuple[Piece, ...]
    layer: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The first 57 bytes."""

    version: int
    required: int
    optional: int
    index_size: int
    json_stored: int
    json_raw: int
    digest: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """All that is known before the first part is read. The topology is the first part; `pieces` of it is empty.

    ladders: of a layered package, that of each tensor; predictors: that of each tensor, where any has one. delta: of a
    delta, what it says of its parent.
    """

    tensors: tuple[Tensor, ...]
    topology: Part
    topology_raw: int
    parts: tuple[Part, ...]
    models: tuple[Model, ...]
    metadata: dict[str, Any]
    ladders: tuple[Ladder | None, ...] = ()
    predictors: tuple[Predictor | None, ...] = ()
    delta: dict[str, Any] | None = None

    @property
    def layers(self) -> int:
        """Number of quality layers."""
        return max((p.layer for p in self.parts), default=1)

    @property
    def stored(self) -> int:
        """Bytes of all parts together."""
        return self.topology.stored + sum(p.stored for p in self.parts)

    @property
    def raw(self) -> int:
        """Bytes of the topology and all tensors after decoding."""
        return self.topology_raw + sum(t.nbytes for t in self.tensors)


def raw_limit(size: int) -> int:
    """Raw bytes that a package of `size` bytes may declare."""
    return max(_FREE, _RATIO * size)


def pack(index: Index, *, required: int = 0, optional: int = 0) -> bytes:
    """Header and index."""
    front: dict[str, Any] = {
        "names": [t.name for t in index.tensors],
        "types": "".join(t.code for t in index.tensors),
        "shapes": [list(t.shape) for t in index.tensors],
        "topology": [index.topology.codec, index.topology.stored, index.topology_raw],
        "parts": _pack_parts(index),
    }
    if index.ladders:
        required |= LAYERED
        front |= ladders.pack(index.ladders)
    if index.predictors:
        required |= PREDICTED
        front |= prediction.pack(index.predictors)
    if index.delta is not None:
        required |= DELTA
        front["delta"] = index.delta
    if index.metadata:
        front["metadata"] = index.metadata
    text = json.dumps(front, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    coded = zstd.compress(text) or b""
    digests = b"".join(p.digest for p in (index.topology, *index.parts))
    body = coded + digests + pack_models(index.models)
    if (
        len(body) > _MAX_INDEX
        or len(text) > _json_limit(len(coded))
        or _in_memory(text) > raw_limit(HEADER_SIZE + len(body))
    ):
        raise InputError("the tensors' names and the metadata are too large for a package")
    head = _HEADER.pack(MAGIC, VERSION, required, optional, len(body), len(coded), len(text))
    return head + hashlib.sha256(head + body).digest() + body


def _pack_parts(index: Index) -> list[list[int]]:
    places: dict[int, dict[int, int]] = {}
    rows = []
    for part in index.parts:
        if part.layer == 1:
            rows.append(_pack_part(part, index.tensors))
            continue
        if part.layer not in places:
            members = ladders.has_layer(index.tensors, index.ladders, part.layer)
            places[part.layer] = {number: place for place, number in enumerate(members)}
        row = ladders.pack_row(part.layer, part.pieces, index.tensors, places[part.layer])
        rows.append([part.codec, part.stored, *row])
    return rows


def _pack_part(part: Part, tensors: tuple[Tensor, ...]) -> list[int]:
    whole = all(p.start == 0 and p.stop == tensors[p.tensor].size for p in part.pieces)
    if whole:
        return [part.codec, part.stored, len(part.pieces)]
    return [part.codec, part.stored, part.pieces[0].start, part.pieces[0].stop]


def parse_header(data: bytes | memoryview) -> Header:
    """Reads the first 57 bytes; raises PackageError where this reader must not go on."""
    data = bytes(data[:HEADER_SIZE])
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise PackageError("this is not a .penjing package", hint="packages are made by `penjing pack`")
    if len(data) > len(MAGIC) and data[len(MAGIC)] > VERSION:
        raise PackageError(
            f"the package has format version {data[len(MAGIC)]}, this penjing reads up to {VERSION}",
            hint="update penjing, or pack the network with an older one",
        )
    if len(data) < HEADER_SIZE:
        raise cut_short(len(data), HEADER_SIZE)
    _, version, required, optional, index_size, json_stored, json_raw = _HEADER.unpack_from(data)
    if version == 0:
        bad_index("it has format version 0")
    unknown = required & ~KNOWN_REQUIRED
    if unknown:
        bits = ", ".join(str(i) for i in range(16) if unknown >> i & 1)
        raise PackageError(
            f"the package needs feature {bits} that this penjing does not have", hint="update penjing to read it"
        )
    if index_size > _MAX_INDEX or json_stored > index_size or json_raw > _json_limit(json_stored):
        bad_index("it declares an absurd size for its index")
    return Header(
        version=version,
        required=required,
        optional=optional,
        index_size=index_size,
        json_stored=json_stored,
        json_raw=json_raw,
        digest=data[_HEADER.size :],
    )


def parse_index(head: bytes | memoryview, body: bytes | memoryview, size: int | None) -> Index:
    """Reads and checks the index.

    head: the first 57 bytes; body: the `index_size` bytes behind them; size: bytes of the whole file, or None where the
    parts are elsewhere. Nothing that the index declares is allocated before it fits the file's size.
    """
    header = parse_header(head)
    front_size = HEADER_SIZE + header.index_size
    if len(body) < header.index_size:
        raise cut_short(len(head) + len(body), front_size)
    if hashlib.sha256(bytes(head[: _HEADER.size]) + bytes(body)).digest() != header.digest:
        raise PackageError("the package's index does not match its SHA-256", hint="it is damaged: get it again")
    front = _load_json(zstd.decompress(body[: header.json_stored], header.json_raw), raw_limit(front_size))
    tensors = _tensors(front)
    parts = field(front, "parts", list)
    digests = bytes(body[header.json_stored : header.json_stored + 32 * (len(parts) + 1)])
    if len(digests) != 32 * (len(parts) + 1):
        bad_index("it has fewer digests than parts")
    is_delta = bool(header.required & DELTA)
    topology, topology_raw = _topology(front, digests[:32], is_delta)
    steps = ladders.parse(front, tensors) if header.required & LAYERED else ()
    index = Index(
        tensors=tensors,
        topology=topology,
        topology_raw=topology_raw,
        parts=_parts(parts, tensors, steps, digests),
        models=unpack_models(body[header.json_stored + len(digests) :]),
        metadata=_metadata(front),
        ladders=steps,
        predictors=prediction.parse(front, tensors) if header.required & PREDICTED else (),
        delta=field(front, "delta", dict) if is_delta else None,
    )
    total = front_size + index.stored
    size = total if size is None else size
    if size < total:
        raise cut_short(size, total)
    if size > total:
        raise PackageError(
            f"{size - total} bytes follow the end of the package", hint="something was appended to it: get it again"
        )
    if index.raw > raw_limit(size):
        bad_index(f"it claims to hold {index.raw} bytes in a file of {size}")
    return index


def _json_limit(stored: int) -> int:
    return min(_MAX_INDEX, max(1 << 20, 256 * stored))


def _in_memory(text: bytes) -> int:
    """About the bytes that a JSON text takes once it is read."""
    return _VALUE * sum(map(text.count, (b",", b"[", b"{")))


def _load_json(text: bytes, room: int) -> dict[str, Any]:
    """The index's JSON; `room`: bytes that it may take in memory, where a value is far larger than in the text."""
    if _in_memory(text) > room:
        bad_index("it declares an absurd size for its index")
    try:
        front = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        bad_index("it is no JSON text")
    if not isinstance(front, dict):
        bad_index("it is no JSON object")
    return front


def _no_constant(word: str) -> NoReturn:
    raise ValueError(word)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_constant(text)


def _metadata(front: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = field(front, "metadata", dict) if "metadata" in front else {}
    if is_deep(metadata):
        bad_index("its metadata are nested too deep")
    if not is_unicode(metadata):
        bad_index("its metadata are no valid Unicode")
    return metadata


def _tensors(front: dict[str, Any]) -> tuple[Tensor, ...]:
    names, types, shapes = field(front, "names", list), field(front, "types", str), field(front, "shapes", list)
    if not len(names) == len(types) == len(shapes) <= _MAX_TENSORS:
        bad_index("it has not one name, type and shape for each tensor")
    if any(not isinstance(n, str) for n in names) or len(set(names)) != len(names):
        bad_index("two tensors share a name")
    if not is_unicode(names):
        bad_index("a tensor's name is no valid Unicode")
    if any(t not in CODES for t in types):
        bad_index("a tensor has an unknown element type")
    out = []
    for name, code, shape in zip(names, types, shapes, strict=True):
        dims = naturals(shape, "a shape")
        if not fits(dims):
            bad_index(f"tensor '{shown(name)}' has an absurd shape")
        out.append(Tensor(name=name, code=code, shape=tuple(dims)))
    return tuple(out)


def fits(shape: list[int]) -> bool:
    """Whether a shape is one that numpy can hold on any machine (empty axes do not excuse huge ones)."""
    return len(shape) <= _MAX_DIMS and max(shape, default=0) < 1 << 48 and math.prod(d for d in shape if d) < 1 << 56


def _topology(front: dict[str, Any], digest: bytes, is_delta: bool) -> tuple[Part, int]:
    values = naturals(field(front, "topology", list), "'topology'")
    known = (STORED, ZSTD, PHRASES, NUMBERS, *((PARENT,) if is_delta else ()))
    if len(values) != 3 or values[0] not in known:
        bad_index("'topology' is not understood")
    codec, stored, raw = values
    if raw > raw_limit(stored):
        bad_index(f"it claims to hold {raw} bytes of topology in {stored}")
    return Part(codec=codec, stored=stored, digest=digest, pieces=()), raw


def _parts(
    rows: list[Any], tensors: tuple[Tensor, ...], steps: tuple[Ladder | None, ...], digests: bytes
) -> tuple[Part, ...]:
    """The parts, each tensor covered exactly once in every layer: no gap, no overlap, nothing left out."""
    checked, small = [], is_small(tensors)
    for number, row in enumerate(rows):
        values = naturals(row, f"part {number}")
        if len(values) not in (3, 4, *((5, 6) if steps else ())):
            bad_index(f"part {number} is not understood")
        if values[0] >= len(NAMES):
            raise PackageError(
                f"part {number} uses codec {values[0]}, which this penjing does not have",
                hint="update penjing to read it",
            )
        if values[0] in (PARENT, NUMBERS) or (values[0] == NESTED and not steps):
            bad_index(f"part {number} uses the codec {NAMES[values[0]]} where it cannot be")
        if values[0] == EXPECTED and not small:
            bad_index(f"part {number} uses the codec {NAMES[EXPECTED]}, which large networks cannot")
        checked.append(values)
    first = next((n for n, values in enumerate(checked) if len(values) > 4), len(checked))
    if any(len(values) < 5 for values in checked[first:]):
        bad_index("a part of the first layer stands behind others")
    held = [(1, pieces) for pieces in _first_layer(checked[:first], tensors)]
    if steps:
        held += ladders.parse_rows([values[2:] for values in checked[first:]], tensors, steps)
    out = []
    for number, (values, (layer, pieces)) in enumerate(zip(checked, held, strict=True)):
        if sum((p.stop - p.start) * tensors[p.tensor].dtype.itemsize for p in pieces) > MAX_PART:
            bad_index(f"part {number} holds more than {MAX_PART} bytes")
        digest = digests[32 * (number + 1) : 32 * (number + 2)]
        out.append(Part(codec=values[0], stored=values[1], digest=digest, pieces=pieces, layer=layer))
    return tuple(out)


def _first_layer(rows: list[list[int]], tensors: tuple[Tensor, ...]) -> list[tuple[Piece, ...]]:
    order = in_part_order(tensors)
    out: list[tuple[Piece, ...]] = []
    at = done = 0  # position in `order`; elements of that tensor which earlier parts hold
    for number, values in enumerate(rows):
        if len(values) == 3:
            chosen = order[at : at + values[2]]
            if done or len(chosen) != values[2]:
                bad_index(f"part {number} overlaps another or holds tensors that do not exist")
            out.append(tuple(Piece(tensor=i, start=0, stop=tensors[i].size) for i in chosen))
            at += len(chosen)
        else:
            start, stop = values[2:]
            size = tensors[order[at]].size if at < len(order) else 0
            if start != done or not start < stop <= size:
                bad_index(f"part {number} overlaps another, leaves a gap or goes beyond its tensor")
            out.append((Piece(tensor=order[at], start=start, stop=stop),))
            at, done = (at + 1, 0) if stop == size else (at, stop)
    if at != len(order) or done:
        bad_index("it leaves tensors without a part")
    return out


def cut_short(size: int, expected: int) -> PackageError:
    """The error for a file that ends early."""
    return PackageError(
        f"the package is cut short: {size} bytes of at least {expected}", hint="the transfer broke off: get it again"
    )
