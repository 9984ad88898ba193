"""The readers of foreign bytes that fuzz.py feeds: for each some sound inputs, how to change them, and what must hold.

An input is one run of bytes; where a reader takes several files, it has them all. `read` gives a word for what was
accepted; it raises a PenjingError where the input is refused, and Wrong where something was accepted that should not
have been.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
from fuzz_folders import (
    FOLDER,
    ROOM,
    Files,
    as_directory,
    change_files,
    change_volumes,
    files_of,
    in_volumes,
    laid_out,
    read_arrivals,
    read_directory,
    read_volumes,
    sealed_up,
)
from fuzz_packages import (
    DELTAS,
    LAYERED,
    PACKAGES,
    SEALED,
    TOPOLOGY,
    Wrong,
    change_sealed,
    read_delta,
    read_layered,
    read_package,
    read_sealed,
)

from penjing.errors import PenjingError
from penjing.package import keys, onnx_model, provenance, signatures
from penjing.package.sources import Answer, Gone, Passing, open_source
from penjing.testing.forging import Mutator, forged, lie

REFUSALS = (PenjingError, Gone, Passing)


@dataclass(frozen=True)
class Reader:
    """seeds: sound inputs; change: one of them altered; read: what is tested; weight: its share of all inputs."""

    seeds: list[bytes]
    change: Callable[[bytes, random.Random, Mutator], bytes]
    read: Callable[[bytes], str]
    weight: int


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
    if hashlib.sha256(PACKAGES[1]).hexdigest() not in signed.files.values():
        raise Wrong("a signature of something else")
    json.dumps(signed.predicate)
    return "a signature"


def read_bundle(data: bytes) -> str:
    """A bundle's files, held against its signature."""
    folder = laid_out(data)
    signatures.verify(folder, [ROOM / "key.pub"], signature=signatures.beside(ROOM / "bundle"))
    if {name: held for name, held in files_of(data).items() if held != FOLDER} != BUNDLE:  # an empty folder is nothing
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


GRAPH = {
    "ir": 8, "opsets": [["", 17]], "inputs": [["x", 1, ["N", 3]]], "outputs": [["y", 1, [None, 4]]],
    "nodes": [["Gemm", ["x", "w"], ["y"], {
        "a": {"float": 1.5}, "b": 1, "c": [1, 2], "d": "e", "f": {"floats": [1.0]}, "g": {"strings": ["h"]},
        "t": {"tensor": [1, [1], "AAAAAA=="]},
    }]],
    "tensors": [["w", 3, [4, 3], "w", {"blocks": [1, 0]}, {"shape": [4, 3]}], ["s", 1, [4], "s"]],
}  # fmt: skip
GRAPH_ARRAYS = {"w": np.ones((4, 3), np.int8), "s": np.ones(4, np.float32)}


def change_graph(data: bytes, rng: random.Random, mutate: Mutator) -> bytes:
    """One or two lies; some of them numbers that no float32 holds."""
    changed = change_json(data, rng, mutate)
    if rng.random() < 0.1:
        return changed.replace(b"1.5", b"1e300")
    return change_json(changed, rng, mutate) if rng.random() < 0.5 else changed


def read_graph(data: bytes) -> str:
    """The ONNX graph in a topology."""
    model = onnx_model.assemble(data.decode("utf8", "surrogateescape"), GRAPH_ARRAYS)
    if len(model) > 4 * len(data) + (2 << 20):
        raise Wrong("a model far larger than what it is made of")
    return "a model"


SIGNATURE, BUNDLE = made()
SIGNER = keys.signing_key(ROOM / "key")
FOLDERS = [sealed_up(as_directory(p)) for p in (*PACKAGES, *LAYERED)]
KEYS = key_files()

READERS = {
    "packages": Reader(PACKAGES, forged, read_package, 44),
    "layered": Reader([*LAYERED], forged, read_layered, 18),
    "deltas": Reader(DELTAS, forged, read_delta, 36),
    "manifests": Reader([p + b"\3" for p in (*PACKAGES, *LAYERED)], change_served, read_served, 24),
    "answers": Reader(ANSWERS, change_plain, read_answer, 50),
    "directories": Reader(FOLDERS, change_files, read_directory, 3),
    "volumes": Reader([in_volumes(p) for p in (*PACKAGES, *LAYERED)], change_volumes, read_volumes, 3),
    "arrivals": Reader(FOLDERS, change_files, read_arrivals, 1),
    "sealed": Reader([SEALED], change_sealed, read_sealed, 3),
    "signatures": Reader([SIGNATURE], change_signature, read_signature, 3),
    "bundles": Reader([sealed_up(BUNDLE)], change_files, read_bundle, 1),
    "keys": Reader(KEYS, lambda d, r, m: m(d, r), read_keys, 6),
    "graphs": Reader([json.dumps({"onnx": GRAPH}).encode()], change_graph, read_graph, 4),
    "histories": Reader([TOPOLOGY.encode()], change_json, read_history, 8),
}
