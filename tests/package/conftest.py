"""Packages taken apart and put together again, so that tests can lie in one place and be right in all others."""

import hashlib
import json
import struct
from dataclasses import dataclass, field

import numpy as np
import pytest
import zstandard

from penjing.package import layout

HEAD = struct.Struct("<8sBHHIII")


def sha(data):
    return hashlib.sha256(data).digest()


@dataclass
class Forge:
    """The fields of a package; `build` makes every digest and length right again."""

    front: dict
    models: bytes
    payloads: list
    version: int = 1
    required: int = 0
    optional: int = 0
    text: bytes | None = None
    raw: int | None = None
    digests: list = field(default_factory=list)

    @classmethod
    def of(cls, data):
        _, version, required, optional, size, stored, raw = HEAD.unpack_from(data)
        body = data[layout.HEADER_SIZE : layout.HEADER_SIZE + size]
        front = json.loads(zstandard.ZstdDecompressor().decompress(body[:stored], max_output_size=raw))
        lengths = [front["topology"][1]] + [p[1] for p in front["parts"]]
        rest, payloads = data[layout.HEADER_SIZE + size :], []
        for length in lengths:
            payloads.append(rest[:length])
            rest = rest[length:]
        return cls(front, body[stored + 32 * len(lengths) :], payloads, version, required, optional)

    def resize(self):
        """Makes the declared lengths of the parts those of the payloads."""
        self.front["topology"][1] = len(self.payloads[0])
        for row, payload in zip(self.front["parts"], self.payloads[1:], strict=True):
            row[1] = len(payload)
        return self

    def build(self):
        text = self.text if self.text is not None else json.dumps(self.front, separators=(",", ":")).encode()
        coded = zstandard.ZstdCompressor(level=19, write_content_size=False).compress(text)
        digests = self.digests or [sha(p) for p in self.payloads]
        body = coded + b"".join(digests) + self.models
        raw = len(text) if self.raw is None else self.raw
        head = HEAD.pack(layout.MAGIC, self.version, self.required, self.optional, len(body), len(coded), raw)
        return head + sha(head + body) + body + b"".join(self.payloads)


@pytest.fixture(scope="session")
def forge():
    return Forge


def network(seed=0, rows=24):
    """Topology and arrays of a small quantized network with every kind of tensor."""
    rng = np.random.default_rng(seed)
    grid = np.clip(np.rint(rng.normal(0, 20, (rows, 16, 3, 3))), -127, 127).astype(np.int8)
    sparse = np.where(rng.random((rows, 96)) < 0.8, 0, rng.integers(-127, 128, (rows, 96))).astype(np.int8)
    arrays = {
        "conv.weight": grid,
        "conv.weight_scale": rng.random(rows).astype(np.float32),
        "conv.weight_zero_point": np.zeros(rows, dtype=np.int64),
        "fc.weight": sparse,
        "fc.bias": rng.normal(size=rows).astype(np.float32),
        "table": rng.integers(0, 256, (5, 7)).astype(np.uint8),
        "mask": rng.random((4, 9)) < 0.5,
        "half": rng.normal(size=(6, 3)).astype(np.float16),
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "norm.weight": rng.normal(size=(10, 100)).astype(np.float32),
    }
    return '{"nodes": ["conv", "fc"]}', arrays


def same(left, right):
    """Equal to the last bit: names in order, element types, shapes, bytes."""
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape and left[k].tobytes() == right[k].tobytes()
        for k in left
    )


@pytest.fixture(scope="session")
def small():
    return network()


@pytest.fixture(scope="session")
def equal():
    return same
