"""A package as a folder that any static web server hosts: a file `manifest`, and a file for each part.

The manifest is the first bytes of the single file: header, index, topology. A part's file holds its bytes and is named
by their SHA-256 in lower-case hexadecimal. Manifest and parts, in the index's order, are the single file again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from penjing.errors import InputError, PackageError
from penjing.files import appearing, appearing_folder
from penjing.package import manifest
from penjing.package.layout import Part, cut_short
from penjing.package.manifest import Manifest

MANIFEST = "manifest"
LAYOUTS = ("file", "directory")
PULL = ".pull"  # ends the name of the folder in which a pull to that name gathers its parts
_PART = re.compile(r"[0-9a-f]{64}")


def file_of(part: Part) -> str:
    """The name of a part's file."""
    return part.digest.hex()


def is_package(folder: Path) -> bool:
    """Whether a folder is a package in the directory layout, whole or not."""
    return (folder / MANIFEST).is_file()


def is_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but a package, so that another may take its place."""
    return is_package(folder) and all(f.name == MANIFEST or _PART.fullmatch(f.name) for f in folder.iterdir())


def others(folder: Path, parts: Iterable[Part]) -> list[str]:
    """Names in a folder that are no files of its package."""
    return sorted({f.name for f in folder.iterdir()} - {MANIFEST, *map(file_of, parts)})


def check(layout: str) -> None:
    """Raises InputError for a layout that there is not."""
    if layout not in LAYOUTS:
        raise InputError(f"layout must be {' or '.join(LAYOUTS)}, got {layout!r}", hint="file is the usual one")


def save(data: bytes, path: str | os.PathLike[str], *, layout: str = "file") -> int:
    """Writes an encoded package in a layout and returns its bytes; it appears whole or not at all.

    Raises InputError for another layout, OutputError where it cannot be written.
    """
    check(layout)
    if layout == "file":
        with appearing(path) as aside:
            return aside.write_bytes(data)
    front = manifest.parse(data)
    with appearing_folder(Path(path), ours=is_ours) as folder:
        size = (folder / MANIFEST).write_bytes(front.data)
        for part, at in zip(front.parts, front.offsets, strict=False):
            file = folder / file_of(part)
            if not file.exists():  # parts of equal bytes share a file
                size += file.write_bytes(data[at : at + part.stored])
    return size


def load(folder: Path) -> bytes:
    """The bytes of the single file. Raises PackageError where a part is missing or damaged."""
    front = load_manifest(folder)
    payloads = [front.data]
    if missing := [n for n, p in enumerate(front.parts) if not (folder / file_of(p)).is_file()]:
        raise lacking(front, missing)
    for number, part in enumerate(front.parts):
        file = folder / file_of(part)
        payload = file.read_bytes() if file.stat().st_size == part.stored else b""  # a huge file allocates nothing
        if len(payload) != part.stored or hashlib.sha256(payload).digest() != part.digest:
            raise PackageError(
                f"{front.name(number)} does not match its SHA-256", hint="the package is damaged: get it again"
            )
        payloads.append(payload)
    return b"".join(payloads)


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a directory. Raises PackageError."""
    with (folder / MANIFEST).open("rb") as file:
        front = read_front(file)
        rest = _size(file) - len(front.data)
    if rest > 0:
        raise PackageError(f"{folder / MANIFEST} has {rest} bytes too many", hint="get the package again")
    return front


def read_front(file: BinaryIO) -> Manifest:
    """The manifest at a file's position, which then is behind it. Raises PackageError."""
    data = b""
    while len(data) < (wanted := manifest.extent(data)):
        more = file.read(min(wanted - len(data), _size(file)))  # a lie about sizes allocates nothing
        if not more:
            raise cut_short(len(data), wanted)
        data += more
    return manifest.parse(data)


def lacking(front: Manifest, numbers: list[int]) -> PackageError:
    """The error for parts that are not here."""
    coarse = "; --layers N takes the first N layers alone" if front.index.layers > 1 else ""
    return PackageError(
        f"{len(numbers)} of {len(front.parts)} parts are missing: {front.names(numbers)}",
        hint=f"penjing pull and penjing join complete a package{coarse}",
    )


def _size(file: BinaryIO) -> int:
    return max(1, os.fstat(file.fileno()).st_size)
