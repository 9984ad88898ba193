"""Some thousand mutated packages: a PackageError or exactly the network, and nothing else, quickly."""

import time

import numpy as np
import pytest

from penjing.errors import PackageError
from penjing.package import contents, decode, encode

SECONDS = 5  # no single input may take longer


def mutated(data, rng):
    out = bytearray(data)
    kind = rng.integers(6)
    at = int(rng.integers(len(out) + 1))
    length = int(rng.integers(1, 40))
    if kind == 0:
        for i in rng.integers(0, len(out), rng.integers(1, 4)):
            out[i] ^= 1 << rng.integers(8)
    elif kind == 1:
        del out[at : at + length]
    elif kind == 2:
        out[at:at] = rng.bytes(length)
    elif kind == 3:
        out[at : at + length] = rng.choice([b"\0", b"\xff", b"\x80"]) * length
    elif kind == 4:
        other = int(rng.integers(len(out)))
        out[at : at + length] = out[other : other + length]
    else:
        del out[at:]
    return bytes(out)


def outcome(data):
    began = time.monotonic()
    try:
        contents.describe(data)
    except PackageError:
        pass
    try:
        return decode(data)
    except PackageError as error:
        assert error.message
        return None
    finally:
        assert time.monotonic() - began < SECONDS


@pytest.fixture(scope="module")
def packages(small):
    rng = np.random.default_rng(0)
    large = {"w": np.clip(np.rint(rng.laplace(0, 9, (60, 300))), -127, 127).astype(np.int8)}
    large["f"] = rng.normal(size=3000).astype(np.float32)
    # And what newer packages have: kernels that are predicted, planes with several models, numbers beside the topology.
    kernels = np.cumsum(rng.laplace(0, 9, (20, 30, 3, 3)), axis=-1)
    scales = 2.0 ** -np.arange(12).repeat(256)
    new = {"k": np.clip(np.rint(kernels), -127, 127).astype(np.int8), "g": rng.normal(size=3072).astype(np.float32)}
    new["g"] = (new["g"] * scales).astype(np.float32)
    text = f'{{"before":"{"0123456789abcdef" * 4}","scale":{float(np.float32(0.0123))}}}'
    made = encode(text, new)
    assert {row.codec for row in contents.describe(made).tensors} == {"grids", "clusters"}
    assert contents.describe(made).required_flags == 8
    return [(encode(*small, metadata={"a": 1}), small[1]), (encode("{}", large), large), (made, new)]


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_always_seen(packages, equal, seed):
    rng = np.random.default_rng(seed)
    for _ in range(750):
        data, arrays = packages[rng.integers(len(packages))]
        bad = mutated(data, rng)
        got = outcome(bad)
        assert got is None if bad != data else equal(got[1], arrays)


@pytest.mark.parametrize("seed", range(6))
def test_hostile_content_with_right_digests_is_survived(packages, forge, seed):
    """Behind correct digests a writer may say anything: it is refused in words, or it is some well-formed network."""
    rng = np.random.default_rng(100 + seed)
    for _ in range(400):
        package = forge.of(packages[rng.integers(len(packages))][0])
        where = rng.integers(3)
        if where == 0:
            i = int(rng.integers(len(package.payloads)))
            package.payloads[i] = mutated(package.payloads[i] or b"x", rng)
            package.resize()
        elif where == 1:
            package.models = mutated(package.models or b"\1", rng)
        else:
            lie(package.front, rng)
        got = outcome(package.build())
        if got is not None:
            shapes = package.front["shapes"]
            assert [list(a.shape) for a in got[1].values()] == shapes


def lie(front, rng):
    """One number or word of the index becomes another."""
    absurd = [-1, 0, 1, 2, 3, 7, 255, 2**31, 2**63, 10**30, 1.5, True, None, "x", [], {}, [[]]]
    key = str(rng.choice(list(front)))
    target = front[key]
    while isinstance(target, list) and target and isinstance(target[0], list) and rng.random() < 0.9:
        target = target[int(rng.integers(len(target)))]
    value = absurd[int(rng.integers(len(absurd)))]
    if isinstance(target, list) and target and rng.random() < 0.9:
        target[int(rng.integers(len(target)))] = value
    else:
        front[key] = value
