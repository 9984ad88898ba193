"""The codec of small networks' integer grids, under models made of what came before."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.errors import PackageError
from penjing.package import archive, codecs, decode, encode, expectation, expected, inspect, write

ALWAYS = 1 << 30


def sheet(array):
    values = array.astype(np.int8).view(np.uint8).reshape(-1) ^ np.uint8(0x80)
    row = values.size // max(1, len(array))
    return expected.Sheet(values=values, row=row, taps=max(1, int(np.prod(array.shape[2:]))))


def shapes(sheets):
    return [(len(s.values), s.row, s.taps) for s in sheets]


def kernels(rows=64, columns=32, taps=9, kinship=0.7, size=6, seed=0):
    """Kernels whose neighbouring taps go together (autoregressive), rows and columns of different spread; and the bits
    that a coder needs which knows all that."""
    rng = np.random.default_rng(seed)
    spread = size * rng.uniform(0.4, 1.6, (rows, 1)) * rng.uniform(0.4, 1.6, columns)
    noise = rng.normal(size=(rows, columns, taps))
    values, off = np.zeros_like(noise), (1 - kinship**2) ** 0.5
    values[:, :, 0] = noise[:, :, 0]
    for k in range(1, taps):
        values[:, :, k] = kinship * values[:, :, k - 1] + off * noise[:, :, k]
    # A Gaussian of deviation σ in steps of 1 has ½·log₂(2πe σ²) bits, plus a step's noise beside it.
    step = 1 / 12
    first, later = spread**2 + step, spread**2 * off**2 + step * (1 + kinship**2)
    bits = 0.5 * np.log2(2 * np.pi * np.e * np.stack([first] + [later] * (taps - 1)))
    return np.rint(values * spread[:, :, None]).clip(-127, 127).astype(np.int8).reshape(
        rows, columns, 3, -1
    ), bits.sum()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_pieces_come_back(data):
    sheets = []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
        seed, most = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0, 1, 3, 127, 128]))
        rng = np.random.default_rng(seed)
        sheets.append(sheet(rng.integers(-most, most + 1, shape).clip(-128, 127)))
    coded = expected.encode(sheets, ALWAYS)
    found = expected.decode(memoryview(coded), shapes(sheets))
    assert all(np.array_equal(a, s.values) for a, s in zip(found, sheets, strict=True))
    assert sum(expected.shares(memoryview(coded), shapes(sheets))) == pytest.approx(len(coded), abs=9)


def test_pieces_of_broken_rows_and_long_kernels_come_back():
    values = np.random.default_rng(0).integers(0, 30, 3000).astype(np.uint8)
    for row, taps in ((64, 8), (3000, 1000), (300, 100), (3000, 128)):
        sheets = [expected.Sheet(values=values, row=row, taps=taps)]
        coded = expected.encode(sheets, ALWAYS)
        assert np.array_equal(expected.decode(memoryview(coded), shapes(sheets))[0], values)


def test_bits_are_near_those_of_who_knows_the_law():
    array, bits = kernels()
    coded = len(expected.encode([sheet(array)], ALWAYS))
    assert 0.99 * bits / 8 < coded < 1.04 * bits / 8
    assert coded < 0.92 * len(encode("", {"a": array.reshape(64, -1)}))  # as a matrix, without kernels


def test_tables_are_least_squares():
    """The prediction is numpy's own ridge regression on the taps before."""
    array, _ = kernels(taps=12)
    values = array.reshape(64, 32, 12).astype(np.int64)
    products = expectation._Products(12, {})
    products.add(values)
    slopes, flat = products.slopes(), values.reshape(-1, 12)
    ridge = expectation._RIDGE * (flat**2).mean()
    for tap in (1, 5, 11):
        before = flat[:, max(0, tap - 8) : tap][:, ::-1]
        wanted = np.linalg.solve(before.T @ before + ridge * np.eye(before.shape[1]), before.T @ flat[:, tap])
        assert np.allclose(slopes[tap, : len(wanted)], wanted, atol=1e-9) and not slopes[tap, len(wanted) :].any()


def test_packages_of_small_networks_choose_it_and_large_ones_do_not(tmp_path, equal):
    arrays = {"a": kernels(size=1)[0], "b": np.arange(64, dtype=np.int16)}
    write(tmp_path / "n.penjing", "", arrays)
    rows = inspect(tmp_path / "n.penjing")
    assert [r.codec for r in rows.tensors] == ["expected", "planes"] and rows.models == 0
    assert sum(r.coded_bytes for r in rows.tensors) + rows.index_bytes + rows.topology_coded_bytes == rows.file_bytes
    assert equal(decode((tmp_path / "n.penjing").read_bytes())[1], arrays)
    large = {**arrays, "large": np.zeros(expected.MOST, dtype=np.int8)}
    _, index, _ = archive.open_bytes(encode("", large))
    assert codecs.EXPECTED not in {part.codec for part in index.parts}


def test_large_networks_that_use_it_are_refused(monkeypatch):
    data = encode("", {"a": kernels(size=1)[0]})
    monkeypatch.setattr(expected, "MOST", 1000)
    with pytest.raises(PackageError, match="expected, which large networks cannot"):
        decode(data)


def test_wrong_bytes_are_refused():
    array, _ = kernels(rows=8)
    coded = expected.encode([sheet(array)], ALWAYS)
    size = shapes([sheet(array)])
    for wrong in (b"", coded[:2], coded[:-1], coded[:2] + b"\xff" + coded[3:], coded[:-4], coded + b"abcd"):
        with pytest.raises(PackageError, match="decoded"):
            expected.decode(memoryview(wrong), size)
    rng = np.random.default_rng(0)
    for _ in range(100):  # whatever the bytes say: values or a PackageError
        try:
            found = expected.decode(memoryview(rng.bytes(2) + b"\x05" + rng.bytes(4 * int(rng.integers(0, 99)))), size)
        except PackageError:
            continue
        assert len(found[0]) == size[0][0]


def test_memory_does_not_grow_with_what_shapes_say():
    """Chances are held of few values at a time, whatever the rows, columns and taps are."""
    head = bytes([20, 128, 128])
    for size, row, taps in (
        (1 << 16, 1 << 16, 1),
        (1 << 16, 1 << 16, 128),
        (1 << 16, 1 << 16, 1 << 16),
        (1 << 16, 1, 1),
    ):
        tracemalloc.start()
        with pytest.raises(PackageError, match="decoded"):
            expected.decode(memoryview(head + bytes(range(40, 140))), [(size, row, taps)])
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
        tracemalloc.stop()


def test_its_bytes_are_pinned():
    """Chances must not depend on the machine or on the releases of libraries."""
    noise = np.frombuffer(hashlib.shake_256(b"expected").digest(64 * 24 * 9 * 2), dtype=np.uint8).astype(np.int64)
    noise = noise.reshape(2, 64, 24, 9).sum(axis=0) - 255
    array = ((noise + np.roll(noise, 1, axis=2)) * (1 + np.arange(24)[:, None] % 5) // 200).clip(-127, 127)
    coded = expected.encode([sheet(array), sheet(array[:3] % 3)], ALWAYS)
    assert hashlib.sha256(coded).hexdigest().startswith("10aeaff416db0982")
