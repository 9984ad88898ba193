"""The front of a package, byte by byte: header and index. docs/format.md describes it for writers of other readers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from typing import Any, NoReturn

from penjing.errors import InputError, PackageError
from penjing.package import zstd
from penjing.package.codecs import NAMES, PHRASES, STORED, ZSTD
from penjing.package.models import Model, pack_models, unpack_models
from penjing.package.pieces import CODES, MAX_PART, Piece, Tensor, in_part_order

MAGIC = b"\x89PJG\r\n\x1a\n"
VERSION = 1
SEALED = 1 << 2  # required feature: the parts are encrypted (package/sealing.py)
KNOWN_REQUIRED = SEALED  # bits of required features that this reader has
_HEADER = struct.Struct("<8sBHHIII")
HEADER_SIZE = _HEADER.size + 32

_MAX_INDEX = 256 << 20
_MAX_TENSORS = 1_000_000
_MAX_DIMS = 32
_FREE = 256 << 20  # raw bytes that any package may declare
_RATIO = 1000  # and how many times its own size a larger one may


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A content-addressed run of bytes: codec, size in the file, SHA-256, and the pieces of tensors that it holds."""

    codec: int
    stored: int
    digest: bytes
    pieces: tuple[Piece, ...]


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
    """All that is known before the first part is read. The topology is the first part; `pieces` of it is empty."""

    tensors: tuple[Tensor, ...]
    topology: Part
    topology_raw: int
    parts: tuple[Part, ...]
    models: tuple[Model, ...]
    metadata: dict[str, Any]

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
        "parts": [_pack_part(part, index.tensors) for part in index.parts],
    }
    if index.metadata:
        front["metadata"] = index.metadata
    text = json.dumps(front, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    coded = zstd.compress(text) or b""
    digests = b"".join(p.digest for p in (index.topology, *index.parts))
    body = coded + digests + pack_models(index.models)
    if len(body) > _MAX_INDEX or len(text) > _json_limit(len(coded)):
        raise InputError("the tensors' names and the metadata are too large for a package")
    head = _HEADER.pack(MAGIC, VERSION, required, optional, len(body), len(coded), len(text))
    return head + hashlib.sha256(head + body).digest() + body


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
        _bad_index("it has format version 0")
    unknown = required & ~KNOWN_REQUIRED
    if unknown:
        bits = ", ".join(str(i) for i in range(16) if unknown >> i & 1)
        raise PackageError(
            f"the package needs feature {bits} that this penjing does not have", hint="update penjing to read it"
        )
    if index_size > _MAX_INDEX or json_stored > index_size or json_raw > _json_limit(json_stored):
        _bad_index("it declares an absurd size for its index")
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
    front = _load_json(zstd.decompress(body[: header.json_stored], header.json_raw))
    tensors = _tensors(front)
    parts = _field(front, "parts", list)
    digests = bytes(body[header.json_stored : header.json_stored + 32 * (len(parts) + 1)])
    if len(digests) != 32 * (len(parts) + 1):
        _bad_index("it has fewer digests than parts")
    topology, topology_raw = _topology(front, digests[:32])
    index = Index(
        tensors=tensors,
        topology=topology,
        topology_raw=topology_raw,
        parts=_parts(parts, tensors, digests),
        models=unpack_models(body[header.json_stored + len(digests) :]),
        metadata=_field(front, "metadata", dict) if "metadata" in front else {},
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
        _bad_index(f"it claims to hold {index.raw} bytes in a file of {size}")
    return index


def _json_limit(stored: int) -> int:
    return min(_MAX_INDEX, max(1 << 20, 256 * stored))


def _load_json(text: bytes) -> dict[str, Any]:
    try:
        front = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        _bad_index("it is no JSON text")
    if not isinstance(front, dict):
        _bad_index("it is no JSON object")
    return front


def _no_constant(word: str) -> NoReturn:
    raise ValueError(word)


def _field(front: dict[str, Any], key: str, kind: type) -> Any:
    value = front.get(key)
    if not isinstance(value, kind):
        _bad_index(f"'{key}' is missing or of the wrong kind")
    return value


def _naturals(values: Any, what: str) -> list[int]:
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        _bad_index(f"{what} is no list of numbers")
    return values


def _tensors(front: dict[str, Any]) -> tuple[Tensor, ...]:
    names, types, shapes = _field(front, "names", list), _field(front, "types", str), _field(front, "shapes", list)
    if not len(names) == len(types) == len(shapes) <= _MAX_TENSORS:
        _bad_index("it has not one name, type and shape for each tensor")
    if any(not isinstance(n, str) for n in names) or len(set(names)) != len(names):
        _bad_index("two tensors share a name")
    if any(t not in CODES for t in types):
        _bad_index("a tensor has an unknown element type")
    out = []
    for name, code, shape in zip(names, types, shapes, strict=True):
        dims = _naturals(shape, "a shape")
        if not fits(dims):
            _bad_index(f"tensor '{name}' has an absurd shape")
        out.append(Tensor(name=name, code=code, shape=tuple(dims)))
    return tuple(out)


def fits(shape: list[int]) -> bool:
    """Whether a shape is one that numpy can hold on any machine (empty axes do not excuse huge ones)."""
    return len(shape) <= _MAX_DIMS and max(shape, default=0) < 1 << 48 and math.prod(d for d in shape if d) < 1 << 56


def _topology(front: dict[str, Any], digest: bytes) -> tuple[Part, int]:
    values = _naturals(_field(front, "topology", list), "'topology'")
    if len(values) != 3 or values[0] not in (STORED, ZSTD, PHRASES):
        _bad_index("'topology' is not understood")
    codec, stored, raw = values
    return Part(codec=codec, stored=stored, digest=digest, pieces=()), raw


def _parts(rows: list[Any], tensors: tuple[Tensor, ...], digests: bytes) -> tuple[Part, ...]:
    """The parts, each tensor covered exactly once: no gap, no overlap, nothing left out."""
    order = in_part_order(tensors)
    out: list[Part] = []
    at = done = 0  # position in `order`; elements of that tensor which earlier parts hold
    for number, row in enumerate(rows):
        values = _naturals(row, f"part {number}")
        if len(values) not in (3, 4):
            _bad_index(f"part {number} is not understood")
        if values[0] >= len(NAMES):
            raise PackageError(
                f"part {number} uses codec {values[0]}, which this penjing does not have",
                hint="update penjing to read it",
            )
        if len(values) == 3:
            chosen = order[at : at + values[2]]
            if done or len(chosen) != values[2]:
                _bad_index(f"part {number} overlaps another or holds tensors that do not exist")
            pieces = tuple(Piece(tensor=i, start=0, stop=tensors[i].size) for i in chosen)
            at += len(chosen)
        else:
            start, stop = values[2:]
            size = tensors[order[at]].size if at < len(order) else 0
            if start != done or not start < stop <= size:
                _bad_index(f"part {number} overlaps another, leaves a gap or goes beyond its tensor")
            pieces = (Piece(tensor=order[at], start=start, stop=stop),)
            at, done = (at + 1, 0) if stop == size else (at, stop)
        if sum((p.stop - p.start) * tensors[p.tensor].dtype.itemsize for p in pieces) > MAX_PART:
            _bad_index(f"part {number} holds more than {MAX_PART} bytes")
        digest = digests[32 * (number + 1) : 32 * (number + 2)]
        out.append(Part(codec=values[0], stored=values[1], digest=digest, pieces=pieces))
    if at != len(order) or done:
        _bad_index("it leaves tensors without a part")
    return tuple(out)


def cut_short(size: int, expected: int) -> PackageError:
    """The error for a file that ends early."""
    return PackageError(
        f"the package is cut short: {size} bytes of at least {expected}", hint="the transfer broke off: get it again"
    )


def _bad_index(why: str) -> NoReturn:
    raise PackageError(f"the package's index makes no sense: {why}", hint="it is damaged or was made to harm")
