"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from penjing.errors import OutputError


@contextmanager
def appearing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` at the end of the block, if that ends well.

    Folders on the way are made. Raises OutputError when the place cannot be written, when what stands there is no
    ordinary file (a folder, a device), or when the block raises an OSError such as a full disk's.
    """
    final = Path(path)
    if "\0" in str(final):
        raise OutputError(f"cannot write {str(final)!r}: no file can be called so", hint="name a file")
    aside: Path | None = None
    try:
        if final.exists() and not final.is_file():
            kind = "a folder" if final.is_dir() else "no ordinary file"
            raise OutputError(f"cannot write {final}: it is {kind}", hint="name a file")
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=f".part{final.suffix}", dir=final.parent)
        os.close(handle)
        aside = Path(name)
        aside.chmod(0o644)  # mkstemp makes private files
        yield aside
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, final)
    except OSError as error:
        raise OutputError(
            f"cannot write {final}: {error.strerror or error}", hint="is there room, and permission?"
        ) from error
    finally:  # also on Ctrl-C
        if aside is not None:
            with suppress(OSError):
                aside.unlink()
