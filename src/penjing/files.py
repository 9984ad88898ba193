"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
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
        aside = final.parent / f".{secrets.token_hex(8)}.part{final.suffix}"
        # Not mkstemp's, which are private: as open to others as the umask wants files to be.
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)  # safetensors, for one, puts a private file in its place
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


@contextmanager
def appearing_folder(out: Path, *, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to fill, which becomes `out` only if the block ends well; otherwise nothing remains of it.

    Folders on the way are made. `ours` tells whether a folder that stands there may be replaced. Raises OutputError
    when it may not, or when the place cannot be written.
    """
    if "\0" in str(out):
        raise OutputError(f"cannot write {str(out)!r}: no folder can be called so", hint="name a folder")
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise OutputError(f"{out} exists and is not a folder", hint="name another folder")
        if out.is_dir() and any(out.iterdir()) and not ours(out):
            raise OutputError(f"{out} holds other files", hint="name a new or empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.parent / f".{out.name}.{secrets.token_hex(8)}"
        aside.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}", hint="name another place") from error
    try:
        yield aside
        replace_folder(aside, out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}", hint="name another place") from error
    finally:  # also on Ctrl-C
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(aside: Path, out: Path) -> None:
    """Renames `aside` to `out`; what stood there is gone, or back in its place if that fails (OSError)."""
    if not out.exists():
        os.rename(aside, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        os.rename(out, old / "old")
        try:
            os.rename(aside, out)
        except BaseException:
            os.rename(old / "old", out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
