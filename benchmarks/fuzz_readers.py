"""The readers of foreign bytes that fuzz.py feeds: for each some sound inputs, how to change them, and what must hold.

An input is one run of bytes; where a reader takes several files, `sealed_up` puts them into one and `files_of` takes
them out again. `read` gives a word for what was accepted; it raises a PenjingError where the input is refused, and
Wrong where something was accepted that should not have been.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from penjing.digests import digest
from penjing.errors import PenjingError
from penjing.package import archive, contents, delta, directory, keys, layout, provenance, sealing, signatures, volumes
from penjing.package.arrivals import Arrivals, Intake
from penjing.package.layered import Layered
from penjing.package.manifest import parse
from penjing.package.pieces import CODES
from penjing.package.refining import Refining
from penjing.package.sources import Answer, Gone, Passing, open_source
from penjing.testing.forging import Forge, Mutator, forged, lie, mutated

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "package" / "golden"
REFUSALS = (PenjingError, Gone, Passing)

Files = dict[str, bytes]


class Wrong(Exception):
    """Something was accepted that should not have been."""


@dataclass(frozen=True)
class Reader:
    """seeds: sound inputs; change: one of them altered; read: what is tested; weight: its share of all inputs."""

    seeds: list[bytes]
    change: Callable[[bytes, random.Random, Mutator], bytes]
    read: Callable[[bytes], str]
    weight: int


# --------------------------------------------------------------------------------------------------- sound packages
TOPOLOGY = json.dumps({"name": "net", "history": [{"event": "step", "name": "Quantize", "settings": {"bits": 8}}]})


def networks() -> list[dict[str, np.ndarray[Any, Any]]]:
    """Small tensors for every codec: dense and sparse grids, floats, integers, odd shapes."""
    rng = np.random.default_rng(0)
    dense = np.clip(np.rint(rng.normal(0, 20, (6, 4, 3, 3))), -127, 127).astype(np.int8)
    empty = np.where(rng.random((12, 24)) < 0.85, 0, rng.integers(-127, 128, (12, 24))).astype(np.int8)
    return [
        {"w": dense, "s": rng.random(6).astype(np.float32), "u": rng.integers(0, 9, (5, 7)).astype(np.uint8)},
        {"w": empty, "z": np.zeros(6, dtype=np.int64)},
        {"f": rng.normal(size=(8, 9)).astype(np.float32), "m": rng.random((4, 9)) < 0.5, "e": np.zeros((0, 4)),
         "h": rng.normal(size=7).astype(np.float16), "n": np.array(3, dtype=np.int64)},
    ]  # fmt: skip


NETWORKS = networks()
PACKAGES = [archive.encode(TOPOLOGY, arrays, metadata={"name": "net"}) for arrays in NETWORKS]
KNOWN = {p[25 : layout.HEADER_SIZE]: n for p, n in zip(PACKAGES, NETWORKS, strict=True)}


def check_arrays(data: bytes, arrays: Mapping[str, Any], known: Mapping[bytes, Any]) -> str:
    """Raises Wrong unless the tensors are the declared ones, and of a package that is known the very ones."""
    sound = known.get(data[25 : layout.HEADER_SIZE])
    if sound is not None:
        same = list(sound) == list(arrays) and all(
            a.dtype == arrays[k].dtype and a.shape == arrays[k].shape and a.tobytes() == arrays[k].tobytes()
            for k, a in sound.items()
        )
        if not same:
            raise Wrong("another network under the digest of a known one")
        return "the original"
    front = Forge.of(data).front
    told = [(n, np.dtype(c), tuple(s)) for n, c, s in zip(front["names"], front["types"], front["shapes"], strict=True)]
    if told != [(n, a.dtype, a.shape) for n, a in arrays.items()] or set(front["types"]) - set(CODES):
        raise Wrong("tensors that are not the declared ones")
    return "a network as declared"


def read_package(data: bytes) -> str:
    """One file: its inventory, shown and as JSON, and its tensors."""
    try:
        inside = contents.describe(data)
    except PenjingError:
        pass
    else:
        if not str(inside) or not json.dumps(inside.to_dict(), allow_nan=False).encode():
            raise Wrong("an inventory of nothing")
    topology, arrays, _ = archive.decode(data)
    topology.encode()
    return check_arrays(data, arrays, KNOWN)


def layered() -> dict[bytes, dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(1)
    found = {}
    for layers, arrays in (
        (2, {"w": NETWORKS[0]["w"], "s": NETWORKS[0]["s"]}),
        (3, {"w": NETWORKS[1]["w"], "u": NETWORKS[0]["u"], "f": rng.normal(size=(6, 8)).astype(np.float32)}),
    ):
        harms = {name: 1.0 for name, array in arrays.items() if array.ndim > 1}
        found[Layered(TOPOLOGY, arrays, layers=layers, harms=harms).encode()] = arrays
    return found


LAYERED = layered()
KNOWN_LAYERED = {p[25 : layout.HEADER_SIZE]: n for p, n in LAYERED.items()}


def read_layered(data: bytes) -> str:
    """A package in layers: the first of them, then all."""
    check_arrays(data, archive.decode(data, layers=1)[1], {})
    return check_arrays(data, archive.decode(data)[1], KNOWN_LAYERED | KNOWN)


def after(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The next version of a network: a few codes and floats are others, a tensor is new."""
    new = {name: array.copy() for name, array in arrays.items()}
    first = next(iter(new.values())).reshape(-1)
    first[::7] = first[1]
    return new | {"new": np.arange(5, dtype=np.float32)}


PARENTS = [(TOPOLOGY, arrays, {}) for arrays in (NETWORKS[0], NETWORKS[2])]
CHILDREN = [(TOPOLOGY + " ", after(p[1]), {"name": "child"}) for p in PARENTS]
DELTAS = [delta.encode(p, c) for p, c in zip(PARENTS, CHILDREN, strict=True)]
KNOWN_DELTAS = {d[25 : layout.HEADER_SIZE]: c[1] for d, c in zip(DELTAS, CHILDREN, strict=True)}


def read_delta(data: bytes) -> str:
    """A delta, applied to the parent that it names or to another."""
    parent = PARENTS[1] if b"\x01" in data[-1:] or digest(*PARENTS[1][:2]).encode() in told_by(data) else PARENTS[0]
    topology, arrays, _ = delta.decode(data, parent)
    sound = KNOWN_DELTAS.get(data[25 : layout.HEADER_SIZE])
    if digest(topology, arrays) != Forge.of(data).front["delta"]["child"]:
        raise Wrong("another network than the delta names")
    if sound is not None and digest(topology, arrays) not in {digest(c[0], c[1]) for c in CHILDREN}:
        raise Wrong("another network than the child")
    return "the child" if sound is not None else "a child as declared"


def told_by(data: bytes) -> bytes:
    try:
        return json.dumps(Forge.of(data).front.get("delta")).encode()
    except Exception:
        return b""


# ------------------------------------------------------------------------------------------------------------ sealed
SEALED = (GOLDEN / "sealed.penjing").read_bytes()
IDENTITIES = keys.identities(GOLDEN / "sealed.key")
INSIDE = sealing.unseal(SEALED, IDENTITIES)
RECIPIENT = [str(i.to_public()) for i in IDENTITIES]


def change_sealed(data: bytes, rng: random.Random, mutate: Mutator) -> bytes:
    """The outside changed, an envelope or the front, or a package that lies sealed anew."""
    if rng.random() < 0.5:
        return forged(data, rng, mutate)
    inside = forged(rng.choice(PACKAGES), rng, mutate)
    try:
        return sealing.seal(inside, RECIPIENT)
    except PenjingError:  # refused before it could be sealed: seal its front alone
        pass
    package = Forge.of(sealing.seal(rng.choice(PACKAGES), RECIPIENT))
    envelopes, _ = sealing._frames(package.payloads[0])
    identity = sealing._identity(envelopes[0], IDENTITIES)
    front = sealing._encrypt(inside[: rng.choice((200, 400, len(inside)))], [identity.to_public()])
    frames = b"".join(struct.pack("<I", len(e)) + e for e in envelopes)
    package.payloads[0] = struct.pack("<I", len(envelopes)) + frames + front
    package.front["topology"] = [0, len(package.payloads[0]), len(package.payloads[0])]
    return package.build()


def read_sealed(data: bytes) -> str:
    """A sealed package, opened."""
    inside = sealing.unseal(data, IDENTITIES)
    archive.open_bytes(inside)  # every digest again
    if data[25 : layout.HEADER_SIZE] == SEALED[25 : layout.HEADER_SIZE] and inside != INSIDE:
        raise Wrong("another package than the one that was sealed")
    return "a package"


# ------------------------------------------------------------------------------------------------------- many files
ROOM = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
_NAMED = set("0123456789abcdefghijklmnopqrstuvwxyz.-_")
_PIPE, _LINK, _FOLDER = b"\0pipe", b"\0link", b"\0folder"


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
        files[name] = rng.choice((_PIPE, _LINK, _FOLDER, b""))
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
        if held == _PIPE:
            os.mkfifo(place)
        elif held == _LINK:
            place.symlink_to("/dev/zero")
        elif held == _FOLDER:
            place.mkdir()
        else:
            place.write_bytes(held)
    return folder


def as_directory(package: bytes) -> Files:
    front = parse(package)
    parts = {directory.file_of(p): package[at : at + p.stored] for p, at in zip(front.parts, front.offsets, strict=False)}
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
            changed = forged(front + b"".join(b"" for _ in ()), rng, mutated)
            head = head[:-4] + struct.pack("<I", len(changed))
            files[name] = head + changed + rest[len(front) :]
        except PenjingError:
            files[name] = mutated(files[name], rng)
    rng.random()
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


# -------------------------------------------------------------------------------------------------------- servers
class Served:
    """A server that gives these bytes, in pieces, with ranges and lengths as the last byte says."""

    def __init__(self, data: bytes) -> None:
        self.data, how = data[:-1], data[-1] if data else 0
        self.ranged = bool(how & 1)
        self.total = None if how & 2 else len(self.data) + (how >> 4 if how & 4 else 0)
        self.at = 0

    @asynccontextmanager
    async def get(self, url: Any, *, start: int = 0, stop: int | None = None) -> AsyncIterator[Served]:
        self.at = start if self.ranged else 0
        yield self

    async def body(self) -> AsyncIterator[bytes]:
        for at in range(self.at, len(self.data), 300):
            yield self.data[at : at + 300]


def change_served(data: bytes, rng: random.Random, mutate: Mutator) -> bytes:
    if rng.random() < 0.1:
        return mutate(data, rng)
    return forged(data[:-1], rng, mutate) + bytes([rng.randrange(256)])


def read_served(data: bytes) -> str:
    """What `pull` makes of a server's first answers."""
    opened = open_source(Served(data), httpx2.URL("https://example.org/net"), {})  # type: ignore[arg-type]
    try:
        opened.send(None)
    except StopIteration as done:
        source, front = done.value
    else:
        raise Wrong("a wait for nothing")
    if front.data not in data or not 0 <= source.parts.start <= source.parts.stop <= len(front.parts):
        raise Wrong("a manifest that was not served")
    return "a directory" if source.is_directory else "a file"


ANSWERS = [
    b"206\nContent-Range: bytes 0-99/100\nContent-Length: 100",
    b"200\nContent-Length: 1000\nContent-Encoding: gzip",
]


def change_plain(data: bytes, rng: random.Random, mutate: Mutator) -> bytes:
    if rng.random() < 0.2:
        digits = bytes(rng.choice(b"0123456789") for _ in range(rng.choice((18, 19, 20, 400, 5000))))
        at = rng.randrange(len(data) + 1)
        return data[:at] + digits + data[at:]
    return mutate(data, rng)


def read_answer(data: bytes) -> str:
    """Status and headers of an answer."""
    status, *lines = data.split(b"\n")
    number = int(status[:3]) if status[:3].isdigit() else 200
    headers = [tuple(part.strip() for part in line.split(b":", 1)) for line in lines if b":" in line]
    Answer(httpx2.Response(number, headers=headers), 0, 20.0)  # type: ignore[arg-type]
    return "an answer"


# ----------------------------------------------------------------------------------------------- keys, signatures
def made() -> tuple[bytes, Files]:
    """The signature of a package, and that of a bundle with its files; the key is in ROOM."""
    keys.keygen(ROOM / "key")
    bundle = ROOM / "bundle"
    bundle.mkdir()
    (bundle / "network.penjing").write_bytes(PACKAGES[1])
    (bundle / "notes.txt").write_text("notes")
    (ROOM / "signed.penjing").write_bytes(PACKAGES[1])
    files = {p.name: p.read_bytes() for p in bundle.iterdir()}
    signatures.sign(bundle, ROOM / "key", release=3)
    return signatures.sign(ROOM / "signed.penjing", ROOM / "key", release=3).read_bytes(), files


def change_signature(data: bytes, rng: random.Random, mutate: Mutator) -> bytes:
    """The envelope changed as text or as JSON, or its payload, signed anew."""
    kind = rng.random()
    try:
        held = json.loads(data)
        payload = signatures.Envelope.from_dict(json.loads(data)).payload
    except Exception:
        return mutate(data, rng)
    if kind < 0.3:
        return mutate(data, rng)
    if kind < 0.6:
        lie(held, rng)
        return json.dumps(held).encode()
    try:
        statement = json.loads(payload)
        lie(statement, rng)
        text = json.dumps(statement).encode() if rng.random() < 0.8 else mutate(payload, rng)
        envelope = signatures.Envelope(text, signatures.PAYLOAD_TYPE, {})
        envelope.sign(SIGNER)
    except Exception:
        return mutate(data, rng)
    return json.dumps(envelope.to_dict()).encode()


def read_signature(data: bytes) -> str:
    """The signature of a package."""
    (ROOM / "given.json").write_bytes(data)
    signed = signatures.verify(ROOM / "signed.penjing", [ROOM / "key.pub"], signature=ROOM / "given.json")
    if signatures._files(ROOM / "signed.penjing")["signed.penjing"] not in signed.files.values():
        raise Wrong("a signature of something else")
    json.dumps(signed.predicate)
    return "a signature"


def read_bundle(data: bytes) -> str:
    """A bundle's files, held against its signature."""
    folder = laid_out(data)
    signatures.verify(folder, [ROOM / "key.pub"], signature=signatures.beside(ROOM / "bundle"))
    if files_of(data) != BUNDLE:
        raise Wrong("a bundle that was changed")
    return "the bundle"


def read_keys(data: bytes) -> str:
    """A file as each kind of key. Passphrases are left out: a slow one is meant to be slow."""
    place = ROOM / "given.key"
    place.write_bytes(data)
    found = []
    for kind in (keys.public_key, keys.signing_key, keys.identities, lambda p: keys.recipients([str(p)])):
        try:
            kind(place)
            found.append(kind.__name__)
        except PenjingError as error:
            last = error
    if not found:
        raise last
    return " and ".join(found)


def key_files() -> list[bytes]:
    keys.keygen(ROOM / "other", kind="p256")
    keys.keygen(ROOM / "reader", kind="age")
    ssh = b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsKLqeplhpW+uObz5dvMgjz1OxfM/XXUB+VHtZ6isGN a"
    return [*((ROOM / n).read_bytes() for n in ("key", "key.pub", "other", "other.pub", "reader", "reader.pub")), ssh]


def change_json(data: bytes, rng: random.Random, mutate: Mutator) -> bytes:
    try:
        held = json.loads(data)
        lie(held, rng)
        return json.dumps(held).encode() if rng.random() < 0.7 else mutate(data, rng)
    except Exception:
        return mutate(data, rng)


def read_history(data: bytes) -> str:
    """The history in a topology."""
    chain = provenance.trace(data.decode("utf8", "surrogateescape"), "0" * 64)
    text = str(chain)
    if not text.encode() or not text.replace("\n", "").isprintable() or not json.dumps(chain.to_dict()):
        raise Wrong("a history that a terminal should not see")
    return "a history"


SIGNATURE, BUNDLE = made()
SIGNER = keys.signing_key(ROOM / "key")
FOLDERS = [sealed_up(as_directory(p)) for p in (*PACKAGES, *LAYERED)]
KEYS = key_files()

READERS = {
    "packages": Reader(PACKAGES, forged, read_package, 44),
    "layered": Reader([*LAYERED], forged, read_layered, 16),
    "deltas": Reader(DELTAS, forged, read_delta, 10),
    "manifests": Reader([p + b"\3" for p in (*PACKAGES, *LAYERED)], change_served, read_served, 10),
    "answers": Reader(ANSWERS, change_plain, read_answer, 2),
    "directories": Reader(FOLDERS, change_files, read_directory, 4),
    "volumes": Reader([in_volumes(p) for p in (*PACKAGES, *LAYERED)], change_volumes, read_volumes, 3),
    "arrivals": Reader(FOLDERS, change_files, read_arrivals, 1),
    "sealed": Reader([SEALED], change_sealed, read_sealed, 3),
    "signatures": Reader([SIGNATURE], change_signature, read_signature, 3),
    "bundles": Reader([sealed_up(BUNDLE)], change_files, read_bundle, 1),
    "keys": Reader(KEYS, lambda d, r, m: m(d, r), read_keys, 2),
    "histories": Reader([TOPOLOGY.encode()], change_json, read_history, 1),
}
