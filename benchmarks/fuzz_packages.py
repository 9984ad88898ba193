"""Single files for fuzz.py: packages, in layers, deltas, sealed; what is sound, and what must hold of the accepted."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from penjing.digests import digest
from penjing.errors import PenjingError
from penjing.package import archive, contents, delta, keys, layout, sealing
from penjing.package.layered import Layered
from penjing.package.pieces import CODES
from penjing.testing.forging import Forge, Mutator, forged

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "package" / "golden"


class Wrong(Exception):
    """Something was accepted that should not have been."""


# --------------------------------------------------------------------------------------------------- sound packages
STEP = {"event": "step", "name": "Quantize", "settings": {"bits": 8}, "before": "0123456789abcdef" * 4}
TOPOLOGY = json.dumps({"name": "net", "scale": 0.012299999594688416, "history": [STEP]})


def networks() -> list[dict[str, np.ndarray[Any, Any]]]:
    """Small tensors for every codec: dense and sparse grids, floats, integers, odd shapes."""
    rng = np.random.default_rng(0)
    dense = np.clip(np.rint(rng.normal(0, 20, (6, 4, 3, 3))), -127, 127).astype(np.int8)
    empty = np.where(rng.random((12, 24)) < 0.85, 0, rng.integers(-127, 128, (12, 24))).astype(np.int8)
    kernels = np.clip(np.rint(np.cumsum(rng.laplace(0, 9, (12, 16, 3, 3)), axis=-1)), -127, 127).astype(np.int8)
    scaled = (rng.normal(size=576) * 2.0 ** -np.arange(6).repeat(96)).astype(np.float32)
    return [
        {"w": dense, "s": rng.random(6).astype(np.float32), "u": rng.integers(0, 9, (5, 7)).astype(np.uint8)},
        {"w": empty, "z": np.zeros(6, dtype=np.int64)},
        {"f": rng.normal(size=(8, 9)).astype(np.float32), "m": rng.random((4, 9)) < 0.5, "e": np.zeros((0, 4)),
         "h": rng.normal(size=7).astype(np.float16), "n": np.array(3, dtype=np.int64)},
        {"k": kernels},  # predicted
        {"g": scaled},  # by clusters
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
