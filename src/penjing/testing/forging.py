"""Packages that lie: taken apart, changed, and put together again with every digest and length right.

Whoever makes a package computes its digests too, so a digest proves nothing about what is behind it. A bit flipped
anywhere tests SHA-256; the readers behind it are tested by what `forged` makes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zstandard

from penjing.package.layout import HEADER_SIZE, MAGIC

HEAD = struct.Struct("<8sBHHIII")
ABSURD: list[Any] = [
    0,
    1,
    -1,
    2,
    7,
    255,
    256,
    1.5,
    2**31,
    2**32,
    2**48,
    2**63,
    10**30,
    "",
    "w",
    None,
    True,
    [],
    {},
    [[]],
]

Mutator = Callable[[bytes, random.Random], bytes]


def _sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass
class Forge:
    """The fields of a package; `build` makes every digest and length right again."""

    front: dict[str, Any]
    models: bytes
    payloads: list[bytes]
    version: int = 1
    required: int = 0
    optional: int = 0
    text: bytes | None = None
    raw: int | None = None
    digests: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, data: bytes) -> Forge:
        """The fields of a package. Raises whatever it likes for what is none."""
        _, version, required, optional, size, stored, raw = HEAD.unpack_from(data)
        body = data[HEADER_SIZE : HEADER_SIZE + size]
        front = json.loads(zstandard.ZstdDecompressor().decompress(body[:stored], max_output_size=raw))
        lengths = [front["topology"][1]] + [p[1] for p in front["parts"]]
        rest, payloads = data[HEADER_SIZE + size :], []
        for length in lengths:
            payloads.append(rest[:length])
            rest = rest[length:]
        return cls(front, body[stored + 32 * len(lengths) :], payloads, version, required, optional)

    def resize(self) -> Forge:
        """Makes the declared lengths of the parts those of the payloads."""
        self.front["topology"][1] = len(self.payloads[0])
        for row, payload in zip(self.front["parts"], self.payloads[1:], strict=True):
            row[1] = len(payload)
        return self

    def build(self) -> bytes:
        """The bytes of the package."""
        return self.manifest() + b"".join(self.payloads[1:])

    def manifest(self) -> bytes:
        """The bytes up to the first part."""
        text = self.text if self.text is not None else json.dumps(self.front, separators=(",", ":")).encode()
        coded = zstandard.ZstdCompressor(level=3, write_content_size=False).compress(text)
        digests = self.digests or [_sha(p) for p in self.payloads]
        body = coded + b"".join(digests) + self.models
        raw = len(text) if self.raw is None else self.raw
        head = HEAD.pack(MAGIC, self.version, self.required, self.optional, len(body), len(coded), raw)
        return head + _sha(head + body) + body + self.payloads[0]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed in one place, knowing nothing of them."""
    out = bytearray(data or b"\0")
    kind, at, length = rng.randrange(8), rng.randrange(len(out)), rng.randrange(1, 40)
    if kind < 2:
        for _ in range(rng.randrange(1, 4)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del out[at : at + length]
    elif kind == 3:
        out[at:at] = rng.randbytes(length)
    elif kind == 4:
        out[at : at + length] = rng.choice((b"\0", b"\xff", b"\x80")) * length
    elif kind == 5:
        other = rng.randrange(len(out))
        out[at : at + length] = out[other : other + length]
    elif kind == 6:
        out[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2, 255, 65535, 2**31, 2**32 - 1)))
    else:
        del out[at:]
    return bytes(out)


def lie(front: Any, rng: random.Random) -> None:
    """One value somewhere in a JSON object or list becomes another, comes twice, goes, or changes place."""
    here = front
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = here[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.1:
            break
        here = inner
    kind = rng.randrange(8)
    if kind == 0:
        del here[key]
    elif kind == 1 and isinstance(here, list):
        here.insert(key, copy.deepcopy(inner))
    elif kind == 2 and isinstance(here, list):
        here[key], here[-1] = here[-1], here[key]
    elif kind < 5 and type(inner) is int:
        here[key] = inner + rng.choice((-2, -1, 1, 2, 64, -inner, inner))
    elif kind < 6 and isinstance(inner, str) and inner:
        at = rng.randrange(len(inner))
        here[key] = inner[:at] + rng.choice(("", *"?bBhHiIqQefdwd'\\\n\x1b\ud800")) + inner[at + 1 :]
    else:
        here[key] = copy.deepcopy(rng.choice(ABSURD))


def forged(data: bytes, rng: random.Random, mutate: Mutator = mutated) -> bytes:
    """A package changed in one or two places, mostly behind right digests; what is none is changed by `mutate`."""
    if rng.random() < 0.05:
        return mutate(data, rng)
    try:
        package = Forge.of(data)
    except Exception:  # whatever: an earlier mutation took it beyond repair
        return mutate(data, rng)
    for _ in range(1 if rng.random() < 0.8 else 2):
        _change(package, rng, mutate)
    return package.build()


def _change(package: Forge, rng: random.Random, mutate: Mutator) -> None:
    kind = rng.randrange(16)
    payloads, rows = package.payloads, package.front.get("parts")
    if kind < 6:
        number = rng.randrange(len(payloads))
        payloads[number] = mutate(payloads[number], rng)
    elif kind < 8:
        package.models = mutate(package.models, rng)
    elif kind == 8:
        for name, bits in (("required", 5), ("optional", 16), ("version", 2)):
            setattr(package, name, getattr(package, name) ^ (1 << rng.randrange(bits) if rng.random() < 0.5 else 0))
    elif kind == 9 and isinstance(rows, list) and len(payloads) > 1:
        number = rng.randrange(1, len(payloads))
        if rng.random() < 0.5:
            payloads.insert(number, payloads[number])
            rows.insert(number - 1, copy.deepcopy(rows[min(number, len(rows)) - 1]) if rows else [])
        else:
            del payloads[number], rows[number - 1 : number]
    elif kind == 10 and isinstance(rows, list) and rows:
        row = rows[rng.randrange(len(rows))]
        if isinstance(row, list) and row:
            row[0] = rng.randrange(9)
    elif kind == 11:
        text = json.dumps(package.front, separators=(",", ":")).encode()
        package.text = mutate(text, rng)
    elif kind == 12:
        package.raw = rng.choice((0, 1, 100, 1 << 20, 1 << 28, (1 << 32) - 1))
    else:
        lie(package.front, rng)
        return  # lengths too may be lies
    try:
        package.resize()
    except (TypeError, KeyError, ValueError, IndexError):
        return  # an earlier lie was about the parts themselves
