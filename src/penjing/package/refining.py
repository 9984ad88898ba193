"""A network that runs from its first layer on, and gets better as parts come in."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from penjing.errors import InputError, PackageError
from penjing.package import archive, directory, layout
from penjing.package.assembly import Assembly
from penjing.package.claims import bad_index
from penjing.package.manifest import Manifest
from penjing.package.volumes import Holding, holding, read_at

Array = NDArray[Any]


class Refining:
    """A package of which parts may still be missing: a file, a directory, or the folder of a pull under way."""

    def __init__(self, path: str | os.PathLike[str], *, layers: int | None = None) -> None:
        """Reads the manifest; of the parts, those of the first `layers` are wanted. Raises PackageError, InputError."""
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
            raise InputError(f"layers must be at least 1, got {layers!r}", hint="1 is the coarsest network that runs")
        self._path = Path(path)
        front = self._found().manifest
        archive.refuse_other_kinds(layout.parse_header(front.data))
        self._front = front
        self._assembly = Assembly(front.index)
        self._here: dict[bytes, int] = {}  # bytes of the parts taken
        self._raw = 0  # and how many they became
        every = front.index.layers
        self.wanted = every if layers is None else min(layers, every)

    @property
    def manifest(self) -> Manifest:
        """What every part is held against."""
        return self._front

    @property
    def layers(self) -> int:
        """How many layers are here whole."""
        return self._assembly.layers

    def refresh(self) -> int:
        """Takes the parts that came since; returns how many. Raises PackageError for a damaged one."""
        places, taken = self._found().places, 0
        for number, part in enumerate(self._front.parts):
            if part.layer > self.wanted or not self._assembly.fits(number):
                continue
            payload = read_at(places.get(part.digest), part.stored)
            if payload is None:
                continue
            if hashlib.sha256(payload).digest() != part.digest:
                raise PackageError(
                    f"{self._front.name(number)} does not match its SHA-256",
                    hint="the package is damaged: get it again",
                )
            self._here[part.digest] = part.stored
            self._raw += sum(
                (p.stop - p.start) * self._front.index.tensors[p.tensor].dtype.itemsize
                for p in part.pieces
                if part.layer == 1
            )
            if self._raw > layout.raw_limit(here := len(self._front.data) + sum(self._here.values())):
                bad_index(f"it claims to hold {self._raw} bytes in parts of {here}")
            self._assembly.take(number, memoryview(payload))
            taken += 1
        return taken

    def _found(self) -> Holding:
        """What is here now: of a pull that came to its end meanwhile, its result."""
        try:
            return holding(self._path)
        except PackageError:
            whole = self._path.with_name(self._path.name.removesuffix(directory.PULL))
            if whole == self._path or not whole.exists():
                raise
            return holding(whole)

    def read(self) -> tuple[str, dict[str, Array], dict[str, Any]]:
        """Topology, arrays as they are known, and metadata. Raises PackageError before the first layer is here."""
        text = archive.topology_text(self._front.index, self._front.topology)
        return text, self._assembly.arrays(), self._front.index.metadata

    def require(self) -> None:
        """Raises PackageError that names the parts which are wanted and not here."""
        if missing := self.missing():
            raise directory.lacking(self._front, missing)

    def missing(self) -> list[int]:
        """Numbers of the parts that are wanted and not here."""
        return [n for n, p in enumerate(self._front.parts) if p.layer <= self.wanted and not self._assembly.has(n)]


def read(path: str | os.PathLike[str], *, layers: int) -> tuple[str, dict[str, Array], dict[str, Any]]:
    """Topology, arrays and metadata after so many layers, further parts may be missing. Raises PackageError."""
    found = Refining(path, layers=layers)
    found.refresh()
    found.require()
    return found.read()
