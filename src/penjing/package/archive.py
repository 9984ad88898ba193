"""Plain values to one .penjing file and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.errors import InputError, PackageError
from penjing.package import codecs, directory, grids, layout, prediction
from penjing.package.assembly import Assembly
from penjing.package.claims import is_deep
from penjing.package.layout import HEADER_SIZE, Header, Index, Part
from penjing.package.manifest import tensors_in
from penjing.package.pieces import CODES, Tensor, divide, spec
from penjing.package.prediction import Predictor
from penjing.progress import SILENT, Progress

Array = NDArray[Any]

LADDER = "ladder"  # the key of metadata that says how good the layers of a package were found to be

_WORTH = 0.975  # of what faster codecs need: for less the slow one is not taken

_CODE_OF = {np.dtype(code).str[1:]: code for code in reversed(CODES)}


def encode(
    topology: str,
    arrays: Mapping[str, Array],
    *,
    metadata: Mapping[str, Any] | None = None,
    delta: Mapping[str, Any] | None = None,
    parent: str = "",
    progress: Progress = SILENT,
) -> bytes:
    """The bytes of a package.

    topology: any text. arrays: numpy arrays of bool, integers or floats (bfloat16 as its uint16 bits), of any shape;
    8-bit integers are coded as grids, everything else losslessly too. metadata: plain JSON values.
    delta: what delta.py says of itself where the arrays are changes; parent: the topology that this one may point into.
    The same input gives the same bytes (of the same zstandard release). Raises InputError for other values.
    """
    tensors = tuple(described(name, array) for name, array in arrays.items())
    text = utf8(topology)
    whole = [flat(array) for array in arrays.values()]
    values = list(whole)
    predictors = predicted(tensors, values)
    bundles = divide(tensors)
    on_grid = [p for pieces in bundles for p in pieces if tensors[p.tensor].is_grid]
    with progress.task("coding tensors", len(bundles)) as advance:
        models, assigned = grids.plan(
            [
                grids.Grid(values=grids.symbols(values[p.tensor][p.start : p.stop]), unit=tensors[p.tensor].unit)
                for p in on_grid
            ]
        )
        by_piece = dict(zip(on_grid, assigned, strict=True))
        parts, payloads = [], []
        for pieces in bundles:
            chosen = [values[p.tensor][p.start : p.stop] for p in pieces]
            known = [by_piece[p] for p in pieces] if pieces[0] in by_piece else None
            codec, payload = codecs.encode(chosen, [spec(tensors, p) for p in pieces], known, models)
            parts.append(Part(codec=codec, stored=len(payload), digest=_sha256(payload), pieces=pieces))
            payloads.append(payload)
            advance(1)
        if codecs.is_small(tensors) and _expect(tensors, whole, parts, payloads):
            values, predictors = whole, ()
    _keep_honest(parts, payloads, values, sum(t.nbytes for t in tensors) + len(text))
    if not any(part.codec == codecs.GRID for part in parts):
        models = ()
    codec, frame = codecs.encode_text(text, utf8(parent))
    index = Index(
        tensors=tensors,
        topology=Part(codec=codec, stored=len(frame), digest=_sha256(frame), pieces=()),
        topology_raw=len(text),
        parts=tuple(parts),
        models=models,
        metadata=plain(metadata),
        predictors=predictors,
        delta=None if delta is None else plain(delta),
    )
    return b"".join([layout.pack(index), frame, *payloads])


def _expect(tensors: Sequence[Tensor], values: list[Array], parts: list[Part], payloads: list[bytes]) -> bool:
    """Puts parts of expected grids in the place of all parts of grids, where that takes well less in all."""
    places = [i for i, part in enumerate(parts) if part.pieces and tensors[part.pieces[0].tensor].is_grid]
    left = int(_WORTH * sum(len(payloads[i]) for i in places))
    found = {}
    for i in places:
        pieces = parts[i].pieces
        chosen = [values[p.tensor][p.start : p.stop] for p in pieces]
        payload = codecs.encode_expected(chosen, [spec(tensors, p) for p in pieces], left)
        if payload is None:
            return False
        found[i] = payload
        left -= len(payload)
    for i, payload in found.items():
        payloads[i] = payload
        parts[i] = dataclasses.replace(parts[i], codec=codecs.EXPECTED, stored=len(payload), digest=_sha256(payload))
    return bool(found)


def predicted(tensors: Sequence[Tensor], values: list[Array]) -> tuple[Predictor | None, ...]:
    """The predictors of tensors, if any; puts what they leave in the place of those tensors' flat values."""
    on_grid = {i: grids.symbols(values[i]) for i, tensor in enumerate(tensors) if tensor.is_grid}
    predictors, coded = prediction.choose(tensors, on_grid)
    for i, symbols in zip(on_grid, coded, strict=True):
        if predictors and predictors[i] is not None:
            values[i] = grids.values(symbols, tensors[i].code)
    return predictors


def _keep_honest(parts: list[Part], payloads: list[bytes], values: list[Array], raw: int) -> None:
    """Stores some parts as they are where a network is so empty that readers would take it for a memory bomb."""
    for i, part in enumerate(parts):
        if raw <= layout.raw_limit(sum(map(len, payloads))):
            return
        payloads[i] = b"".join(values[p.tensor][p.start : p.stop].tobytes() for p in part.pieces)
        parts[i] = Part(codec=codecs.STORED, stored=len(payloads[i]), digest=_sha256(payloads[i]), pieces=part.pieces)


def decode(
    data: bytes | memoryview, *, layers: int | None = None, progress: Progress = SILENT
) -> tuple[str, dict[str, Array], dict[str, Any]]:
    """Topology, arrays (in the order they were given) and metadata; bit-exact, unless only the first `layers` of a
    layered package are wanted. Raises PackageError, also for sealed packages and deltas."""
    header, index, payloads = _open(memoryview(data))
    refuse_other_kinds(header)
    wanted = [n for n, part in enumerate(index.parts) if layers is None or part.layer <= layers]
    assembly = Assembly(index)
    with progress.task("decoding tensors", len(wanted)) as advance:
        for number in wanted:
            assembly.take(number, payloads[1 + number])
            advance(1)
    return topology_text(index, payloads[0]), assembly.arrays(), index.metadata


def refuse_other_kinds(header: Header) -> None:
    """Raises PackageError for packages that hold no network by themselves."""
    if header.required & layout.SEALED:
        raise PackageError("the package is sealed", hint="penjing decrypt opens it for its recipients")
    if header.required & layout.DELTA:
        raise PackageError(
            "the package holds only what changed in a network", hint="penjing patch OLD DELTA NEW gives the new one"
        )


def write(
    path: str | os.PathLike[str],
    topology: str,
    arrays: Mapping[str, Array],
    *,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> int:
    """Writes a package and returns its bytes; the file appears whole or not at all. Raises OutputError, InputError."""
    return directory.save(encode(topology, arrays, metadata=metadata, progress=progress), path)


def read(path: str | os.PathLike[str], *, progress: Progress = SILENT) -> tuple[str, dict[str, Array], dict[str, Any]]:
    """Topology, arrays and metadata of a file or directory. Raises PackageError for all but a whole, sound package."""
    return decode(load(path), progress=progress)


def verify(path: str | os.PathLike[str]) -> None:
    """Checks the index and the SHA-256 of every part of a package; raises PackageError at the first that is wrong."""
    _open(memoryview(load(path)))


def load(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file that starts as a package does and has the length that its header and index say; or those
    that the parts of a directory make together."""
    path = Path(path)
    try:
        if directory.is_package(path):
            return directory.load(path)
        if not path.is_file():
            raise PackageError(
                f"{path} is a folder or no ordinary file" if path.exists() else f"there is no file {path}",
                hint="name a .penjing file",
            )
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEADER_SIZE)
            body = file.read(layout.parse_header(head).index_size)
            layout.parse_index(head, body, size)
            file.seek(0)
            return file.read(size)
    except (OSError, ValueError) as error:
        raise PackageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def open_bytes(data: bytes) -> tuple[Header, Index, list[memoryview]]:
    """Header, index and the bytes of topology and parts, every digest checked."""
    return _open(memoryview(data))


def _open(data: memoryview) -> tuple[Header, Index, list[memoryview]]:
    data = data.cast("B") if data.format != "B" else data
    header = layout.parse_header(data)
    end = HEADER_SIZE + header.index_size
    index = layout.parse_index(data[:HEADER_SIZE], data[HEADER_SIZE:end], len(data))
    payloads = list(_payloads(index, data[end:]))
    return header, index, payloads


def _payloads(index: Index, rest: memoryview) -> Iterator[memoryview]:
    at = 0
    for number, part in enumerate((index.topology, *index.parts)):
        payload = rest[at : at + part.stored]
        at += part.stored
        if _sha256(payload) != part.digest:
            what = "the topology" if number == 0 else f"part {number - 1} ({tensors_in(index, part)})"
            raise PackageError(f"{what} does not match its SHA-256", hint="the package is damaged: get it again")
        yield payload


def topology_text(index: Index, payload: memoryview, parent: str = "") -> str:
    """The topology; `parent`: the text that one coded against another points into. Raises PackageError."""
    raw = codecs.decode_text(index.topology.codec, payload, index.topology_raw, parent.encode())
    try:
        if len(raw) != index.topology_raw:
            raise PackageError("the topology has another length than declared", hint="get the package again")
        return raw.decode()
    except UnicodeDecodeError as error:
        raise PackageError("the topology is no text", hint="the package was made by a faulty writer") from error


def described(name: str, array: Array) -> Tensor:
    """What the index says of an array; raises InputError where a package cannot hold it."""
    if not isinstance(name, str):
        raise InputError(f"a tensor's name must be a text, got {name!r}")
    utf8(name)
    code = _CODE_OF.get(array.dtype.str[1:]) if isinstance(array, np.ndarray | np.generic) else None
    if code is None:
        kind = getattr(array, "dtype", type(array).__name__)
        raise InputError(
            f"tensor '{name}' is {kind}, which a package cannot hold",
            hint="use numpy arrays of bool, integers or floats up to 64 bits; bfloat16 as its uint16 bits",
        )
    if not layout.fits(list(array.shape)):
        raise InputError(f"tensor '{name}' has shape {array.shape}, which a package cannot hold")
    return Tensor(name=name, code=code, shape=tuple(int(d) for d in array.shape))


def flat(array: Array) -> Array:
    """An array's elements in C order, little-endian."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)


def utf8(text: str) -> bytes:
    """A text's bytes; raises InputError where it has none."""
    if not isinstance(text, str):
        raise InputError(f"the topology must be a text, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError("a text of the package is no valid Unicode") from error


def plain(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metadata as JSON holds them; raises InputError for other values."""
    try:
        text = json.dumps(dict(metadata or {}), allow_nan=False, ensure_ascii=False)
        text.encode()
        plain: dict[str, Any] = json.loads(text)
        if is_deep(plain):
            raise ValueError("it is nested too deep")
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the metadata is no plain JSON: {error}", hint="use text, numbers, lists and dicts"
        ) from error
    return plain


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()
