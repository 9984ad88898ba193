"""Floats whose planes have several models: tensors of different scale in one part."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from penjing.errors import PackageError
from penjing.package import archive, codecs, contents, decode, encode, grids, leb128, planes
from penjing.package.models import Model, pack_models
from penjing.package.pieces import Spec

FILE = Path(__file__).parent / "golden" / "clusters.penjing"
ZSTD = (1, 5, 7)  # the release whose frames are in the file


def scales(seed=0):
    """Rows of different scale, as layers have."""
    rng = np.random.default_rng(seed)
    return {
        str(i): (rng.normal(size=(40, 512)) * 2.0 ** -rng.integers(0, 12, (40, 1))).astype(np.float32) for i in range(4)
    }


def codec_of(data):
    return {row.codec for row in contents.describe(data).tensors}


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_they_come_back_and_gain(dtype, equal, monkeypatch):
    arrays = scales()
    if dtype == np.uint16:  # bfloat16
        arrays = {k: (a.view(np.uint32) >> 16).astype(np.uint16) for k, a in arrays.items()}
    arrays = {k: a.astype(dtype) for k, a in arrays.items()}
    data = encode("", arrays)
    assert equal(decode(data)[1], arrays) and codec_of(data) == {"clusters"}
    coded = sum(row.coded_bytes for row in contents.describe(data).tensors)
    assert coded == sum(part.stored for part in archive.open_bytes(data)[1].parts)
    monkeypatch.setattr(planes, "_FLAT", 0.0)
    plain = encode("", arrays)
    assert codec_of(plain) == {"planes"}
    elements = sum(a.size for a in arrays.values())
    assert 8 * (len(plain) - len(data)) > elements // 3  # a third of a bit a value, of 11 or 27


def test_one_scale_needs_no_new_codec():
    rng = np.random.default_rng(0)
    assert codec_of(encode("", {"w": rng.normal(size=(40, 300)).astype(np.float32)})) == {"planes"}
    assert codec_of(encode("", {"w": rng.normal(size=7).astype(np.float32)})) <= {"planes", "stored", "zstd"}


def part(unit, models, values):
    """A part of bytes, by hand."""
    units = [grids.Grid(values=values, unit=unit)]
    assigned = [grids.Assignment(models=np.zeros(-(-len(values) // unit), dtype=np.uint8), single=True)]
    table, stream = pack_models(models), grids.encode(units, assigned, models)
    return b"".join(
        [b"\0\4", *(leb128.encode(unit) + leb128.encode(len(table)) + table, leb128.encode(len(stream)) + stream)]
    )


def test_what_no_writer_makes_is_refused():
    values = np.arange(200, dtype=np.uint8) % 4
    model = Model(low_bits=0, start=0, precision=0, codes=(1, 1, 1, 1))
    specs = [Spec(code="?", size=200, unit=200, row=200, taps=1)]
    good = part(64, [model], values)
    assert planes.decode(memoryview(good), specs, clustered=True)[0].tobytes() == values.tobytes()
    for bad in (
        lambda: planes.decode(memoryview(good), specs),  # codec 3 has no such form
        lambda: planes.decode(memoryview(part(63, [model], values)), specs, clustered=True),
        lambda: planes.decode(memoryview(b"\0\4\x40\0" + good[-40:]), specs, clustered=True),  # no models
        lambda: planes.decode(memoryview(good[:-1]), specs, clustered=True),
        lambda: planes.decode(memoryview(good + b"\0"), specs, clustered=True),
        lambda: planes.decode(memoryview(b"\0\5" + good[2:]), specs, clustered=True),
        lambda: codecs.decode(codecs.PLANES, memoryview(good), specs, ()),
    ):
        with pytest.raises(PackageError, match="decoded"):
            bad()
    huge = b"\0\4" + leb128.encode(1 << 34) + good[3:]
    with pytest.raises(PackageError):
        planes.decode(memoryview(huge), [Spec(code="?", size=10, unit=10, row=10, taps=1)], clustered=True)


def golden():
    """Arrays made by arithmetic alone."""
    noise = np.frombuffer(hashlib.shake_256(b"clusters").digest(24_000), dtype=np.uint8).astype(np.float64)
    bell = noise.reshape(4, 6000).sum(axis=0) - 509.5
    return '{"graph": []}', {"w": (bell.reshape(20, 300) * 2.0 ** -(np.arange(20)[:, None] % 7)).astype(np.float32)}


def test_the_golden_package_is_read(equal):
    topology, arrays, _ = decode(FILE.read_bytes())
    assert topology == golden()[0] and equal(arrays, golden()[1])
    assert codec_of(FILE.read_bytes()) == {"clusters"}


@pytest.mark.skipif(zstandard.ZSTD_VERSION != ZSTD, reason="frames of another zstd release")
def test_the_golden_package_is_written():
    assert encode(*golden()) == FILE.read_bytes()
