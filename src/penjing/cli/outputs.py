"""FILE and DIR arguments that a verb will write: what cannot work is refused before the long work starts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from penjing.errors import OutputError

_MARK = "provenance.json"  # in every bundle


def output_file(text: str, *, suffixes: tuple[str, ...] = ()) -> Path:
    """The path of a file to write; raises OutputError where writing cannot succeed, and checks the suffix if given."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise OutputError(f"{text} is a folder", hint="name a file to write")
    if path.exists() and not path.is_file():
        raise OutputError(f"{text} is not an ordinary file", hint="name an ordinary file to write")
    if suffixes and path.suffix not in suffixes:
        raise OutputError(f"{text} must end in {' or '.join(suffixes)}", hint=f"for example {path.stem}{suffixes[0]}")
    _probe(path.parent, text)
    return path


def output_folder(text: str, *, files: Collection[str] = (), ours: Callable[[Path], bool] | None = None) -> Path:
    """The path of a folder to write, which is absent, empty, an earlier result of penjing, or holds only `files`.

    `ours` tells what an earlier result is (default: a bundle, or a folder of bundles). A folder of anything else is
    refused: nothing of somebody's is ever overwritten.
    """
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{text} exists and is not a folder", hint="name another folder with --out")
    held = {each.name for each in path.iterdir()} if path.is_dir() else set()
    if held - set(files) and not (ours or _is_ours)(path):
        raise OutputError(f"{text} holds other files", hint="name a new or empty folder with --out")
    _probe(path.parent, text)
    return path


def output_package(text: str, layout: str) -> Path:
    """Where a package goes that is written in `layout`; raises InputError for another layout, OutputError."""
    from penjing.package import directory

    directory.check(layout)
    if layout == "directory":
        return output_folder(text, ours=directory.is_ours)
    return output_file(text, suffixes=(".penjing",))


def _is_ours(folder: Path) -> bool:
    return (folder / _MARK).is_file() or any(folder.glob(f"*/{_MARK}"))


def _probe(parent: Path, text: str) -> None:
    """Raises OutputError unless a file can be made in `parent`, or in its nearest ancestor that exists."""
    folder = parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {text}: {folder} is not a folder", hint="name another place")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".penjing-"):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {text}: {(error.strerror or str(error)).lower()}",
            hint="name another place, or free some room",
        ) from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {text}: {folder} may not be written", hint="name another place")
