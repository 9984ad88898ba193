"""The format is pinned: these bytes, written by version 1, must be read for ever."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from penjing.package import archive, codecs, decode, encode, inspect, keys, sealing

FILE = Path(__file__).parent / "golden" / "tiny.penjing"
ZSTD = (1, 5, 7)  # the release whose frames are in the file


def contents():
    """Arrays made by arithmetic alone, so that no random generator can change them."""
    noise = np.frombuffer(hashlib.shake_256(b"penjing").digest(60_000), dtype=np.uint8).astype(np.int64)
    bell = noise[:40_000].reshape(4, 10_000).sum(axis=0) - 510
    wide, narrow = (bell[:5184] // 5).clip(-127, 127), bell[:5184] // 100
    rows = np.concatenate([wide.reshape(192, 27), narrow.reshape(192, 27)])
    arrays = {
        "conv.weight": rows.reshape(384, 3, 3, 3).astype(np.int8),
        "conv.weight_scale": ((noise[40_000:40_768] * 256 + noise[41_000:41_768] + 999) / 2**22).astype(np.float32),
        "conv.weight_zero_point": np.zeros(192, dtype=np.int64),
        "fc.weight": np.where(noise[:20_000] < 220, 0, bell.repeat(2) // 8)
        .reshape(40, 500)
        .clip(-127, 127)
        .astype(np.int8),
        "wide": (bell // 3).clip(-128, 127).reshape(10, 1000).astype(np.int8),
        "table": (np.arange(700) ** 2 % 251 % 19).astype(np.uint8).reshape(7, 100),
        "half": (np.arange(60, dtype=np.float32) / 8).astype(np.float16),
        "mask": np.arange(20) % 3 == 0,
        "steps": np.array(12345678901, dtype=np.int64),
        "none": np.zeros((2, 0), dtype=np.float64),
    }
    return '{"graph": ["conv", "relu"]}', arrays, {"name": "golden", "accuracy": 0.5}


def test_the_golden_package_is_read(equal):
    topology, arrays, metadata = contents()
    got = decode(FILE.read_bytes())
    assert got[0] == topology and equal(got[1], arrays) and got[2] == metadata


def test_the_golden_package_uses_every_codec_of_note():
    inside = inspect(FILE)
    assert {row.codec for row in inside.tensors} >= {"grids", "planes"}
    _, index, _ = archive.open_bytes(FILE.read_bytes())
    assert {model.apart for model in index.models} == {True, False}
    assert len({model.low_bits for model in index.models}) > 1 and len({m.precision for m in index.models}) > 1
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert digest == (FILE.parent / "tiny.sha256").read_text().strip()


def sparse_contents():
    """The same and ternary weights, most of them zero, in a part of their own kind; a topology of known phrases."""
    bits = np.frombuffer(hashlib.shake_256(b"sparse").digest(40_000), dtype=np.uint8).reshape(200, 200).astype(np.int64)
    columns = bits[0] // 8
    ternary = np.where(bits < columns, 1 - 2 * (bits % 2), 0).astype(np.int8)
    return '{"graph":[["get_attr","_1_weight","1.weight"]]}', {"1.weight": ternary}, {}


def expected_contents():
    """Kernels whose neighbouring taps go together, columns of different spread: in a part of their own kind."""
    noise = np.frombuffer(hashlib.shake_256(b"expected").digest(2 * 24 * 16 * 9), dtype=np.uint8).astype(np.int64)
    noise = noise.reshape(2, 24, 16, 9).sum(axis=0) - 255
    values = (noise + np.roll(noise, 1, axis=2)) * (1 + np.arange(16)[:, None] % 5) // 600
    dense = values[0, :, :6].reshape(8, 12) // 2
    return "{}", {"conv": values.reshape(24, 16, 3, 3).astype(np.int8), "fc": dense.astype(np.int8)}, {}


@pytest.mark.skipif(zstandard.ZSTD_VERSION != ZSTD, reason="frames of another zstd release")
@pytest.mark.parametrize(
    ("file", "contents"), [("tiny", contents), ("sparse", sparse_contents), ("expected", expected_contents)]
)
def test_golden_packages_are_written(file, contents):
    topology, arrays, metadata = contents()
    assert encode(topology, arrays, metadata=metadata) == (FILE.parent / f"{file}.penjing").read_bytes()


def test_the_golden_sparse_package_is_read(equal):
    topology, arrays, _ = sparse_contents()
    file = FILE.parent / "sparse.penjing"
    got = decode(file.read_bytes())
    assert got[0] == topology and equal(got[1], arrays)
    assert inspect(file).tensors[0].codec == "sparse"
    _, index, _ = archive.open_bytes(file.read_bytes())
    assert codecs.NAMES[index.topology.codec] == "phrases"


def test_the_golden_expected_package_is_read(equal):
    topology, arrays, _ = expected_contents()
    file = FILE.parent / "expected.penjing"
    got = decode(file.read_bytes())
    assert got[0] == topology and equal(got[1], arrays)
    assert {row.codec for row in inspect(file).tensors} == {"expected"}


def test_the_golden_sealed_package_is_opened():
    folder = FILE.parent
    sealed = (folder / "sealed.penjing").read_bytes()
    opened = sealing.unseal(sealed, keys.identities(folder / "sealed.key"))
    assert opened == (folder / "sparse.penjing").read_bytes()
