"""Several files for fuzz.py: directories, volumes, what has arrived of a pull. An input has them all in one."""

from __future__ import annotations

import os
import random
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fuzz_packages import KNOWN, KNOWN_LAYERED, LAYERED, PACKAGES, Wrong, check_arrays

from penjing.errors import PenjingError
from penjing.package import archive, directory, layout, volumes
from penjing.package.arrivals import Arrivals, Intake
from penjing.package.manifest import parse
from penjing.package.refining import Refining
from penjing.testing.forging import Mutator, forged, mutated

Files = dict[str, bytes]

# ------------------------------------------------------------------------------------------------------- many files
ROOM = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
_NAMED = set("0123456789abcdefghijklmnopqrstuvwxyz.-_")
PIPE, LINK, FOLDER = b"\0pipe", b"\0link", b"\0folder"


def sealed_up(files: Mapping[str, bytes]) -> bytes:
    """Files by name as one run of bytes."""
    return b"".join(
        struct.pack("<HI", len(n.encode()), len(data)) + n.encode() + data for n, data in sorted(files.items())
    )


def files_of(data: bytes) -> Files:
    """The files in a run of bytes, as far as it makes sense."""
    found: Files = {}
    at = 0
    while at + 6 <= len(data):
        name, size = struct.unpack_from("<HI", data, at)
        key = data[at + 6 : at + 6 + name].decode("latin1")
        if key and set(key) <= _NAMED and key.strip(".") and len(key) < 200:
            found[key] = data[at + 6 + name : at + 6 + name + size]
        at += 6 + name + size
    return found


def change_files(data: bytes, rng: random.Random, mutate: Mutator) -> bytes:
    """A file changed, or gone, twice, empty, a pipe, a link, a folder, another's content, or one too many."""
    files = files_of(data)
    if not files:
        return mutate(data, rng)
    name, kind = rng.choice(sorted(files)), rng.randrange(12)
    if kind < 4:
        front = "manifest" if "manifest" in files else name
        files[front] = forged(files[front], rng, mutate)
    elif kind < 7:
        files[name] = mutate(files[name], rng)
    elif kind == 7:
        del files[name]
    elif kind == 8:
        files[name] = rng.choice((PIPE, LINK, FOLDER, b""))
    elif kind == 9:
        files[name] = files[rng.choice(sorted(files))]
    elif kind == 10:
        files[f"{rng.randrange(1 << 256):064x}" + rng.choice(("", ".part"))] = files[name]
    else:
        files[name + ".part"] = files.pop(name)
    return sealed_up(files)


def laid_out(data: bytes) -> Path:
    """The files as a folder, which takes the place of the one before."""
    folder = ROOM / "in"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, held in files_of(data).items():
        place = folder / name
        if held == PIPE:
            os.mkfifo(place)
        elif held == LINK:
            place.symlink_to("/dev/zero")
        elif held == FOLDER:
            place.mkdir()
        else:
            place.write_bytes(held)
    return folder


def as_directory(package: bytes) -> Files:
    front = parse(package)
    parts = {
        directory.file_of(p): package[at : at + p.stored] for p, at in zip(front.parts, front.offsets, strict=False)
    }
    return {directory.MANIFEST: front.data, **parts}


def read_directory(data: bytes) -> str:
    """A directory: read whole, and refined from what is there."""
    folder = laid_out(data)
    try:
        arriving = Refining(folder, layers=1)
        arriving.refresh()
        arriving.read()
    except PenjingError:
        pass
    whole = archive.load(folder)
    return check_arrays(whole, archive.decode(whole)[1], KNOWN_LAYERED | KNOWN)


def in_volumes(package: bytes) -> bytes:
    place = ROOM / "split"
    shutil.rmtree(place, ignore_errors=True)
    (ROOM / "net.penjing").write_bytes(package)
    into = len(parse(package).parts)
    return sealed_up({p.name: p.read_bytes() for p in volumes.split(ROOM / "net.penjing", place, into=into)})


def change_volumes(data: bytes, rng: random.Random, mutate: Mutator) -> bytes:
    """A volume's head, manifest or parts changed, in one or in all; or files as anywhere."""
    files = files_of(data)
    if not files or rng.random() < 0.4:
        return change_files(data, rng, mutate)
    size, state, everywhere = volumes.HEAD_SIZE, rng.getstate(), rng.random() < 0.7
    for name in sorted(files) if everywhere else [rng.choice(sorted(files))]:
        rng.setstate(state)  # the same lie in each
        head, rest = files[name][:size], files[name][size:]
        try:
            front = parse(rest).data
            changed = forged(front, rng, mutated)
            head = head[:-4] + struct.pack("<I", len(changed))
            files[name] = head + changed + rest[len(front) :]
        except PenjingError:
            files[name] = mutated(files[name], rng)
    return sealed_up(files)


def read_volumes(data: bytes) -> str:
    """Volumes, joined."""
    folder, out = laid_out(data), ROOM / "joined"
    names = sorted(p for p in folder.iterdir())
    volumes.join(names, out)
    whole = out.read_bytes()
    archive.open_bytes(whole)
    known = {p[25 : layout.HEADER_SIZE]: p for p in (*PACKAGES, *LAYERED)}.get(whole[25 : layout.HEADER_SIZE])
    if known is not None and whole != known:
        raise Wrong("another package under the digest of a known one")
    return "a package"


def read_arrivals(data: bytes) -> str:
    """The folder of a pull that goes on: what lacks is fed to it, and the package must come out."""
    for stale in ("out", "out2"):
        shutil.rmtree(ROOM / stale, ignore_errors=True)
    folder = laid_out(data)
    package = (*PACKAGES, *LAYERED)[len(data) % (len(PACKAGES) + len(LAYERED))]
    front = parse(package)
    with Arrivals(folder, front, list(range(len(front.parts)))) as arrivals:
        for _ in range(2):  # a part begun wrong is taken away, and comes again
            if missing := arrivals.missing():
                Intake(arrivals, missing, lambda count: None).feed(front.offsets[0], package[front.offsets[0] :])
                for number in arrivals.missing():
                    at = front.offsets[number] + arrivals.begun(front.parts[number])
                    Intake(arrivals, [number], lambda count: None).feed(at, package[at:])
        if arrivals.missing():
            return "part of a package"
        arrivals.finish(ROOM / "arrived", "file")
    if (ROOM / "arrived").read_bytes() != package:
        raise Wrong("another package than the one pulled")
    return "the package"
