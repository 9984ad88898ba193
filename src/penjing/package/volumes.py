"""Split and join: the parts of a package divided among files or hosts, and put together in any order.

A volume is a file that holds the manifest and a run of the parts, or a directory package that lacks some of its parts.
`join` takes volumes of either kind, and whole packages, and wants each part once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from penjing.errors import InputError, PackageError
from penjing.files import appearing, appearing_folder
from penjing.package import directory
from penjing.package.directory import MANIFEST, file_of
from penjing.package.manifest import Manifest
from penjing.progress import SILENT, Progress

MAGIC = b"\x89PJV\r\n\x1a\n"
SUFFIX = ".pjv"
_HEAD = struct.Struct("<8sBIII")  # magic, version, first part, number of parts, bytes of the manifest
HEAD_SIZE = _HEAD.size
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeHead:
    """The first 21 bytes of a volume: which parts follow its manifest."""

    first: int
    count: int
    manifest_size: int

    def check(self, front: Manifest) -> None:
        """Raises PackageError unless this is the head of a volume with that manifest."""
        if len(front.data) != self.manifest_size or self.first + self.count > len(front.parts):
            raise PackageError("the volume's first bytes make no sense", hint="it is damaged: get it again")


def parse_head(data: bytes) -> VolumeHead | None:
    """What the first bytes of a file say; None where it is no volume. Raises PackageError for a newer one."""
    if data[: len(MAGIC)] != MAGIC or len(data) < HEAD_SIZE:
        return None
    _, version, first, count, size = _HEAD.unpack_from(data)
    if version != _VERSION:
        raise PackageError(f"the volume has version {version}, this penjing reads {_VERSION}", hint="update penjing")
    return VolumeHead(first=first, count=count, manifest_size=size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holding:
    """Where on this machine the parts of a package are: (file, position) by digest."""

    path: Path
    manifest: Manifest
    places: dict[bytes, tuple[Path, int]]


def holding(path: Path) -> Holding:
    """What a package, a directory or a volume holds. Raises PackageError where it is none of these."""
    try:
        if directory.is_package(path):
            front = directory.load_manifest(path)
            files = {p.digest: path / file_of(p) for p in front.parts}
            return Holding(path=path, manifest=front, places={d: (f, 0) for d, f in files.items() if f.is_file()})
        if not path.is_file():
            what = "is a folder without a manifest" if path.is_dir() else "does not exist"
            raise PackageError(f"{path} {what}", hint="name packages, or volumes that penjing split made")
        with path.open("rb") as file:
            return _in_file(path, file)
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror or error}") from error


def split(
    package: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    into: int | None = None,
    size: int | None = None,
    layout: str = "file",
    progress: Progress = SILENT,
) -> list[Path]:
    """Divides a package among `into` volumes of about equal bytes, or among volumes of at most `size` bytes each.

    package: a file or directory. out: the folder for the volumes, absent or empty: files NAME-1of3.pjv, or with
    layout="directory" a folder NAME-1of3 for each host. Each holds the manifest. Without `into` and `size`, `out`
    itself becomes the package in the directory layout. Returns what was written. The same input gives the same files.
    Raises InputError for a division that cannot be, PackageError for a damaged package, OutputError.
    """
    directory.check(layout)
    source, out = holding(Path(package)), Path(out)
    front = source.manifest
    if into is not None and size is not None:
        raise InputError("a package is split into a number of volumes or by their size, not both", hint="give one")
    if into is None and size is None:
        return [join([package], out, layout="directory", progress=progress)]
    runs = _even(front, into) if into is not None else _sized(front, size or 0)
    name = source.path.name.removesuffix(".penjing") or "package"
    with (
        appearing_folder(out, ours=lambda folder: False) as aside,
        progress.task("splitting", len(front.parts)) as advance,
    ):
        names = [f"{name}-{i}of{len(runs)}" for i in range(1, len(runs) + 1)]
        for volume, run in zip(names, runs, strict=True):
            payloads = _payloads([source], run)
            if layout == "directory":
                fill(aside / volume, front, run, payloads, advance)
                continue
            with (aside / (volume + SUFFIX)).open("wb") as file:
                file.write(_HEAD.pack(MAGIC, _VERSION, run.start, len(run), len(front.data)) + front.data)
                for payload in payloads:
                    file.write(payload)
                    advance(1)
    return [out / (volume if layout == "directory" else volume + SUFFIX) for volume in names]


def join(
    sources: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    layout: str = "file",
    progress: Progress = SILENT,
) -> Path:
    """Puts a package together from volumes, directories and packages, in any order, and returns its path.

    Every part is checked; one that is damaged in one source is taken from another. Raises PackageError that names the
    parts which are missing or damaged everywhere, or sources of different packages; OutputError.
    """
    directory.check(layout)
    found = [holding(Path(source)) for source in sources]
    if not found:
        raise InputError("there is nothing to join", hint="name the volumes")
    front, out = found[0].manifest, Path(out)
    for other in found[1:]:
        if other.manifest.data != front.data:
            raise PackageError(
                f"{other.path} belongs to another package than {found[0].path}", hint="name volumes of one package"
            )
    if missing := [n for n, p in enumerate(front.parts) if not any(p.digest in h.places for h in found)]:
        raise directory.lacking(front, missing)
    every = range(len(front.parts))
    with progress.task("joining", len(every)) as advance:
        if layout == "directory":
            with appearing_folder(out, ours=directory.is_ours) as folder:
                fill(folder, front, every, _payloads(found, every), advance)
            return out
        with appearing(out) as aside, aside.open("wb") as file:
            file.write(front.data)
            for payload in _payloads(found, every):
                file.write(payload)
                advance(1)
    return out


def _in_file(path: Path, file: BinaryIO) -> Holding:
    head = parse_head(file.read(HEAD_SIZE))
    if head is None:
        file.seek(0)
    front = directory.read_front(file)
    if head is not None:
        head.check(front)
    run = range(len(front.parts)) if head is None else range(head.first, head.first + head.count)
    shift = file.tell() - front.offsets[run.start]
    size, due = os.fstat(file.fileno()).st_size, front.offsets[run.stop] + shift
    if size != due:
        raise PackageError(
            f"{path} has {size} bytes instead of {due}", hint="it is damaged or a transfer broke off: get it again"
        )
    places = {front.parts[n].digest: (path, front.offsets[n] + shift) for n in run}
    return Holding(path=path, manifest=front, places=places)


def _payloads(found: Sequence[Holding], numbers: Iterable[int]) -> Iterator[bytes]:
    """The bytes of each part, from the first source in which they are undamaged."""
    front = found[0].manifest
    for number in numbers:
        part = front.parts[number]
        for each in found:
            payload = read_at(each.places.get(part.digest), part.stored)
            if payload is not None and hashlib.sha256(payload).digest() == part.digest:
                yield payload
                break
        else:
            held = any(part.digest in each.places for each in found)
            if not held:
                raise directory.lacking(front, [number])
            raise PackageError(f"{front.name(number)} does not match its SHA-256", hint="it is damaged: get it again")


def read_at(place: tuple[Path, int] | None, size: int) -> bytes | None:
    """The bytes of a part, from where a Holding says they are; None where they are not. Raises PackageError."""
    if place is None:
        return None
    path, at = place
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < at + size:
                return None
            file.seek(at)
            return file.read(size)
    except FileNotFoundError:  # the folder of a pull that came to its end just now
        return None
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror or error}") from error


def fill(
    folder: Path,
    front: Manifest,
    run: Iterable[int],
    payloads: Iterable[bytes],
    advance: Callable[[int], None],
) -> None:
    """Writes the manifest and the parts `run` into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(front.data)
    for number, payload in zip(run, payloads, strict=True):
        (folder / file_of(front.parts[number])).write_bytes(payload)
        advance(1)


def _even(front: Manifest, into: int) -> list[range]:
    """`into` runs of parts, cut where the bytes are nearest to even."""
    count = len(front.parts)
    if not 1 <= into <= count:
        raise InputError(
            f"a package of {count} parts cannot be split into {into}", hint=f"choose a number from 1 to {count}"
        )
    start, span = front.offsets[0], front.total - front.offsets[0]
    cuts = [0]
    for i in range(1, into):
        aim = start + span * i / into
        low, high = cuts[-1] + 1, count - (into - i)
        near = bisect_left(front.offsets, aim, low, high)
        cuts.append(near if near == low or front.offsets[near] - aim < aim - front.offsets[near - 1] else near - 1)
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], count], strict=True)]


def _sized(front: Manifest, size: int) -> list[range]:
    """As few runs as fit volumes of `size` bytes, filled in order."""
    room = size - HEAD_SIZE - len(front.data)
    least = size - room + max((p.stored for p in front.parts), default=0)
    if least > size:
        raise InputError(
            f"no volume of {size} bytes can hold the manifest and the largest part",
            hint=f"{least} bytes are the least for this package",
        )
    cuts = [0]
    for n in range(len(front.parts)):
        if front.offsets[n + 1] - front.offsets[cuts[-1]] > room:
            cuts.append(n)
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(front.parts)], strict=True)]
