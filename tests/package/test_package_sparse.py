"""The codec of sparse integer grids."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.errors import PackageError
from penjing.package import codecs, decode, encode, inspect, sparse, write
from penjing.tensors import sparse_coding

ALWAYS = 1 << 30


def sheet(matrix):
    return sparse.Sheet(values=matrix.astype(np.int8).view(np.uint8).reshape(-1) ^ np.uint8(0x80), row=matrix.shape[1])


def shapes(sheets):
    return [(len(s.values), s.row) for s in sheets]


def network(seed=0, rows=300, columns=784):
    """Ternary weights, most of them zero; columns and rows differ in how many they have, and some have none."""
    rng = np.random.default_rng(seed)
    chance = 0.04 * rng.gamma(0.5, 2, columns) * rng.gamma(1, 1, (rows, 1)) * (rng.random((rows, 1)) < 0.6)
    where = rng.random((rows, columns)) < chance
    return np.where(where, rng.choice([-2, -1, 1, 1], (rows, columns)), 0), chance


@settings(max_examples=150)
@given(st.data())
def test_any_pieces_come_back(data):
    sheets = []
    for _ in range(data.draw(st.integers(1, 3))):
        rows, columns = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 12))
        values = data.draw(st.lists(st.sampled_from([0, 0, 0, 0, 1, -1, 5, 127, -128]), min_size=rows * columns,
                                    max_size=rows * columns))  # fmt: skip
        sheets.append(sheet(np.array(values, dtype=np.int64).reshape(rows, columns)))
    coded = sparse.encode(sheets, worth=ALWAYS)
    found = sparse.decode(memoryview(coded), shapes(sheets))
    assert all(np.array_equal(a, s.values) for a, s in zip(found, sheets, strict=True))
    assert sum(sparse.shares(memoryview(coded), shapes(sheets))) == pytest.approx(len(coded), abs=9)


def test_a_piece_of_broken_rows_and_other_usual_values():
    values = np.full(1000, 77, dtype=np.uint8)
    values[::31] = 3
    sheets = [sparse.Sheet(values=values, row=64)]
    coded = sparse.encode(sheets, worth=ALWAYS)
    assert np.array_equal(sparse.decode(memoryview(coded), shapes(sheets))[0], values)


def test_bits_are_near_those_of_the_true_chances():
    matrix, chance = network()
    p = np.clip(chance, 0, 1)
    where = matrix != 0
    bits = -np.log2(np.where(where, p, 1 - p), where=(p > 0) | where, out=np.zeros_like(p)).sum() + 1.5 * where.sum()
    coded = len(sparse.encode([sheet(matrix)], worth=ALWAYS))
    # Rows' and columns' own densities are not known beforehand; all the same at most a seventh is lost.
    assert bits / 8 < coded < 1.15 * bits / 8


def test_packages_choose_it_where_it_wins(tmp_path):
    matrix, _ = network()
    arrays = {"a": matrix.astype(np.int8), "b": np.random.default_rng(1).integers(-9, 9, (40, 70)).astype(np.int8)}
    data = encode("", {"a": arrays["a"]})
    got = decode(data)[1]
    assert np.array_equal(got["a"], arrays["a"])
    write(tmp_path / "n.penjing", "", arrays)
    rows = inspect(tmp_path / "n.penjing").tensors
    assert rows[0].codec == "sparse" and inspect(tmp_path / "n.penjing").models == 0
    before = sparse.worthwhile
    try:
        sparse.worthwhile = lambda sheets: False
        assert len(data) < 0.95 * len(encode("", {"a": arrays["a"]}))
    finally:
        sparse.worthwhile = before
    dense = {"b": arrays["b"]}
    write(tmp_path / "d.penjing", "", dense)
    assert inspect(tmp_path / "d.penjing").tensors[0].codec == codecs.NAMES[codecs.GRID]


def test_levels_are_the_nearest_powers_of_root_two():
    counts = np.arange(1, 5000)
    levels = [sparse_coding.level_of(int(c)) for c in counts]
    assert np.array_equal(levels, np.floor(2 * np.log2(counts) + 0.5).astype(int) + 1)
    steps = sparse_coding.densities(5000)
    ratio = counts / (5000 * steps[levels])
    assert ratio.max() < 2**0.2501 and ratio.min() > 2**-0.2501


def test_wrong_bytes_are_refused():
    matrix, _ = network(rows=20, columns=50)
    coded = sparse.encode([sheet(matrix)], worth=ALWAYS)
    size = [(1000, 50)]
    for wrong in (b"", coded[:2], coded[:-1], bytes([9]) + coded[1:], coded[:2] + b"\xff" + coded[3:], coded + b"abcd"):
        with pytest.raises(PackageError, match="decoded"):
            sparse.decode(memoryview(wrong), size)
    rng = np.random.default_rng(0)
    for _ in range(300):  # whatever the words say: values or a PackageError
        try:
            sparse.decode(memoryview(coded[:3] + rng.bytes(4 * int(rng.integers(0, 9)))), size)
        except PackageError:
            pass


def test_its_bytes_are_pinned():
    """Chances must not depend on the machine or on the library's release."""
    matrix, _ = network(rows=30, columns=40)
    coded = sparse.encode([sheet(matrix)], worth=ALWAYS)
    assert hashlib.sha256(coded).hexdigest().startswith("52ef015c81bebed6")
