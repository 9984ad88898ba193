"""The files of a bundle's folder, each by its SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path

from penjing.errors import InputError
from penjing.package.claims import shown

INNER = "network.penjing"  # the package in the folder


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a bundle, by name within it. Raises InputError for what is no ordinary file."""
    found = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    if strange := next((p for p in found if not p.is_file()), None):  # a pipe, say, would never end
        raise InputError(
            f"{shown(strange.relative_to(folder).as_posix())} in {folder} cannot be read: it is no file",
            hint="a bundle holds ordinary files: take it out",
        )
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in found}


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle that holds a package."""
    return path.is_dir() and (path / INNER).is_file()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}", hint="is it there, and readable?"
        ) from error
