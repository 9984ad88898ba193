"""The parts of a package that have arrived: a folder in the directory layout, in which a part under way ends in .part.

Nothing but this folder is remembered of a transfer: what was killed at any moment goes on from it. A part takes its
name only after its SHA-256 was found right, and is checked again by whoever opens the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from penjing.errors import OutputError
from penjing.files import appearing, replace_folder
from penjing.package.claims import shown
from penjing.package.directory import MANIFEST, file_of, is_ours, others
from penjing.package.layout import Part
from penjing.package.manifest import Manifest
from penjing.package.volumes import Holding, join, read_at
from penjing.progress import SILENT, Progress

_UNDERWAY = ".part"
_LOCK = ".lock"
_OURS = re.compile(rf"{MANIFEST}|[0-9a-f]{{64}}({_UNDERWAY})?|\..*")


class Arrivals:
    """What has arrived of one package; `wanted` are the numbers of the parts to fetch, in order."""

    def __init__(
        self,
        folder: Path,
        front: Manifest,
        wanted: list[int],
        *,
        earlier: Holding | None = None,
        besides: int = 0,
    ) -> None:
        """Opens or makes the folder. Parts of the package that it held before, or of `earlier`, are kept where this one
        has them too. besides: bytes that will be written beside the parts.

        Raises OutputError where it cannot be written, or has too little room for what is wanted.
        """
        self.folder = folder
        self.front = front
        self.fetched = 0  # bytes that have arrived since this was made
        self._lock = FileLock(folder / _LOCK, blocking=False)
        self._whole: set[bytes] = set()
        self._begun: dict[bytes, int] = {}
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            if strange := [f.name for f in folder.iterdir() if not _is_ours(f)]:
                raise OutputError(
                    f"{folder} holds other files: {shown(strange[0])}", hint="name another place with --out"
                )
            self._acquire()
        try:
            with self._writing():
                self._open({part.digest: part for part in map(front.parts.__getitem__, wanted)}, earlier, besides)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, *error: object) -> None:
        (self.folder / _LOCK).unlink(missing_ok=True)
        self._lock.release()

    def has(self, number: int) -> bool:
        """Whether a part is here, whole and right."""
        return self.front.parts[number].digest in self._whole

    def missing(self) -> list[int]:
        """Numbers of the parts that are not here whole."""
        return [n for n in range(len(self.front.parts)) if not self.has(n)]

    def begun(self, part: Part) -> int:
        """Bytes of a part that are here, from its start."""
        return part.stored if part.digest in self._whole else self._begun.get(part.digest, 0)

    def take(self, part: Part, data: bytes) -> bool:
        """Appends to a part; False if it is full then and its SHA-256 is wrong, which takes it away again."""
        file = self.folder / (file_of(part) + _UNDERWAY)
        with self._writing():
            with file.open("ab") as stream:
                stream.write(data)
            self.fetched += len(data)
            self._begun[part.digest] = self.begun(part) + len(data)
            if self._begun[part.digest] < part.stored:
                return True
            del self._begun[part.digest]
            if not _is_right(file, part):
                file.unlink()
                return False
            os.replace(file, self.folder / file_of(part))
            self._whole.add(part.digest)
            return True

    def finish(self, out: Path, layout: str, progress: Progress = SILENT) -> None:
        """Makes the package of the arrivals, which must be all there; the folder is gone afterwards."""
        with self._writing():
            for name in others(self.folder, self.front.parts):
                (self.folder / name).unlink()
            if layout == "directory":
                if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not is_ours(out))):
                    raise OutputError(f"{out} holds other files", hint="name a new or empty folder")
                replace_folder(self.folder, out)
                return
            join([self.folder], out, progress=progress)
            shutil.rmtree(self.folder)

    def _open(self, wanted: dict[bytes, Part], earlier: Holding | None, besides: int) -> None:
        manifest = self.folder / MANIFEST
        if not manifest.is_file() or manifest.read_bytes() != self.front.data:
            with appearing(manifest) as aside:
                aside.write_bytes(self.front.data)
        for part in self.front.parts:
            self._look(part)
        room = shutil.disk_usage(self.folder).free
        needed = sum(part.stored - self.begun(part) for part in wanted.values()) + besides
        if needed > room:
            raise OutputError(
                f"{needed:,} bytes are to be written, and {self.folder} has room for {room:,}", hint="free some room"
            )
        if earlier is not None:
            for part in wanted.values():
                self._adopt(part, earlier)

    def _adopt(self, part: Part, earlier: Holding) -> None:
        """Takes a part over, if it is whole there."""
        place = earlier.places.get(part.digest)
        payload = None if part.digest in self._whole else read_at(place, part.stored)
        if payload is not None and hashlib.sha256(payload).digest() == part.digest:
            with appearing(self.folder / file_of(part)) as aside:
                aside.write_bytes(payload)
            (self.folder / (file_of(part) + _UNDERWAY)).unlink(missing_ok=True)
            self._begun.pop(part.digest, None)
            self._whole.add(part.digest)

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise OutputError(
                f"another pull is writing to {self.folder}", hint="wait for its end, or name another place with --out"
            ) from None

    def _look(self, part: Part) -> None:
        """Finds out how much of a part is here."""
        file = self.folder / file_of(part)
        if part.digest in self._whole or part.digest in self._begun:
            return
        if file.is_file():
            if _is_right(file, part):
                self._whole.add(part.digest)
                return
            file.unlink()
        underway = self.folder / (file_of(part) + _UNDERWAY)
        if part.stored == 0:
            self.take(part, b"")
        elif underway.is_file():
            if underway.stat().st_size < part.stored:
                self._begun[part.digest] = underway.stat().st_size
            else:
                underway.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write {self.folder}: {error.strerror or error}", hint="is there room, and permission?"
            ) from error


class Intake:
    """Bytes of the single file, or of a part of it, as they stream in: dealt to the parts that lack them."""

    def __init__(self, arrivals: Arrivals, numbers: list[int], advance: Callable[[int], None]) -> None:
        """`numbers`: the parts wanted of this stream, ascending."""
        self._arrivals = arrivals
        self._left = list(reversed(numbers))
        self._advance = advance
        self.wrong: list[int] = []

    def feed(self, at: int, data: bytes) -> int:
        """Takes the bytes that stand at `at` of the single file and returns how many of them were of use.

        Bytes that are here already, or that nobody wants, are dropped. A part whose SHA-256 turns out wrong is noted in
        `wrong`, and the stream goes on behind it.
        """
        offsets, parts = self._arrivals.front.offsets, self._arrivals.front.parts
        used = 0
        while self._left:
            number = self._left[-1]
            part = parts[number]
            if not self._arrivals.has(number):
                lacks = offsets[number] + self._arrivals.begun(part)
                piece = data[lacks - at : offsets[number + 1] - at] if lacks >= at else b""
                if not piece:
                    break
                right = self._arrivals.take(part, piece)
                used += len(piece)
                self._advance(len(piece))
                if not right:
                    self._advance(-part.stored)
                    self.wrong.append(number)
                elif not self._arrivals.has(number):
                    break
            self._left.pop()
        return used

    @property
    def done(self) -> bool:
        """Whether nothing is left to wait for."""
        return all(map(self._arrivals.has, self._left))


def _is_ours(file: Path) -> bool:
    """Whether a file may be one of a transfer: no link, which would lead elsewhere, nor a pipe, which never ends."""
    return _OURS.fullmatch(file.name) is not None and file.is_file() and not file.is_symlink()


def _is_right(file: Path, part: Part) -> bool:
    if file.stat().st_size != part.stored:
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest() == part.digest
