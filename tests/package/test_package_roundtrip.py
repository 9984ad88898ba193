"""What goes in comes out, to the last bit, from bytes that are the same every time."""

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from penjing.errors import InputError, OutputError, PackageError
from penjing.package import archive, codecs, decode, encode, inspect, layout, read, save, verify, write, zstd

TYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (65,), (200, 3), (5, 4, 3, 3), (70, 1000)])
def test_every_type_and_shape(dtype, shape, equal):
    raw = np.random.default_rng(1).integers(0, 256, (*shape, 8), dtype=np.uint8)
    array = raw[..., : np.dtype(dtype).itemsize].copy().view(dtype).reshape(shape) if dtype != "?" else raw[..., 0] > 99
    array = np.asarray(array)
    arrays = {"first": array, "zeros": np.zeros_like(array), "ones": np.ones_like(array)}
    assert equal(decode(encode("{}", arrays, metadata={}))[1], arrays)


values = hnp.arrays(
    dtype=st.sampled_from([np.dtype(t) for t in TYPES]), shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    topology=st.text(),
    arrays=st.dictionaries(st.text(), values, max_size=6),
    metadata=st.dictionaries(st.text(), plain, max_size=3),
)
def test_anything_comes_back(topology, arrays, metadata, equal):
    data = encode(topology, arrays, metadata=metadata)
    again = decode(data)
    assert again[0] == topology and again[2] == metadata and equal(again[1], arrays)
    assert encode(topology, arrays, metadata=metadata) == data


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 80),
    columns=st.integers(1, 300),
    spread=st.sampled_from([0.0, 0.3, 2.0, 40.0]),
    zeros=st.sampled_from([0.0, 0.8, 0.99]),
)
def test_grids_of_many_kinds(seed, rows, columns, spread, zeros, equal):
    rng = np.random.default_rng(seed)
    grid = np.clip(np.rint(rng.laplace(0, spread * (1 + np.arange(rows)[:, None] % 3), (rows, columns))), -128, 127)
    grid[rng.random(grid.shape) < zeros] = 0
    arrays = {
        "w": grid.astype(np.int8),
        "u": (grid + 128).astype(np.uint8),
        "four": np.clip(grid, -8, 7).astype(np.int8),
    }
    assert equal(decode(encode("", arrays))[1], arrays)


def test_large_tensors_are_cut_into_parts(equal, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "big": np.clip(np.rint(rng.laplace(0, 15, (5001, 1003))), -127, 127).astype(np.int8),
        "small": rng.integers(-7, 8, (10, 10)).astype(np.int8),
        "wide": rng.normal(size=(2, 900_000)).astype(np.float32),
        "bf16": (rng.normal(size=(300, 2000)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
    }
    data = encode("{}", arrays)
    assert equal(decode(data)[1], arrays)
    _, index, _ = archive.open_bytes(data)
    sizes = [p.stored for p in index.parts]
    assert max(sizes) <= 4 << 20
    assert sum(size < 64 << 10 for size in sizes) <= 1, sizes
    assert sum(arrays[k].nbytes for k in arrays) > 1.2 * sum(sizes)


def test_arrays_in_unusual_layouts(equal):
    base = np.arange(600, dtype=np.float32).reshape(20, 30)
    arrays = {
        "transposed": base.T,
        "strided": base[::3, 1::2],
        "big-endian": base.astype(">f4"),
        "read-only": np.broadcast_to(np.int8(7), (50, 70)),
        "fortran": np.asfortranarray(np.arange(60, dtype=np.int8).reshape(6, 10)),
    }
    got = decode(encode("{}", arrays))[1]
    for name, array in arrays.items():
        assert np.array_equal(got[name], array) and got[name].dtype == array.dtype.newbyteorder("=")
        got[name][...] = 0  # what comes back can be written to


def test_special_floats_keep_their_bits(equal):
    bits = np.array([0, 1, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x7F800001], dtype=np.uint32)
    arrays = {"f": np.tile(bits, 40).view(np.float32), "h": np.arange(65536, dtype=np.uint16).view(np.float16)}
    assert equal(decode(encode("", arrays))[1], arrays)


def test_order_of_tensors_is_kept():
    arrays = {
        "b": np.ones(2, np.float32),
        "a": np.ones(2, np.int8),
        "c": np.ones(2, np.int64),
        "0": np.ones(2, np.uint8),
    }
    assert list(decode(encode("", arrays))[1]) == ["b", "a", "c", "0"]


def test_small_network_has_little_overhead():
    rng = np.random.default_rng(0)
    arrays = {}
    for layer, shape in {"features.0": (8, 3, 3, 3), "classifier": (10, 64)}.items():
        arrays[f"{layer}.weight"] = rng.integers(-127, 128, shape).astype(np.int8)
        arrays[f"{layer}.weight_scale"] = rng.random(shape[0]).astype(np.float32)
        arrays[f"{layer}.weight_zero_point"] = np.zeros(shape[0], dtype=np.int64)
        arrays[f"{layer}.bias"] = rng.normal(size=shape[0]).astype(np.float32)
    raw = sum(a.nbytes for a in arrays.values())
    topology = "graph " * 50
    whole, bare = len(encode(topology, arrays)), len(encode(topology, {}))
    assert whole - raw < 400 and bare < 250


def test_an_empty_looking_network_is_no_memory_bomb(equal, monkeypatch):
    monkeypatch.setattr(layout, "_FREE", 1 << 20)
    arrays = {"zeros": np.zeros((20, 1 << 20), dtype=np.int8), "more": np.zeros((3, 1 << 18), dtype=np.float32)}
    data = encode("", arrays)
    assert len(data) * 1000 >= sum(a.nbytes for a in arrays.values())
    assert len(data) < 3 << 20
    assert equal(decode(data)[1], arrays)


def test_file(tmp_path, small, equal):
    topology, arrays = small
    path = tmp_path / "net.penjing"
    size = write(path, topology, arrays, metadata={"name": "tiny", "wire": [1, 2.5, None]})
    assert size == path.stat().st_size and list(tmp_path.iterdir()) == [path]
    again = read(path)
    assert again[0] == topology and equal(again[1], arrays) and again[2] == {"name": "tiny", "wire": [1, 2.5, None]}
    verify(path)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_as_readable_as_any_file_that_the_user_makes(tmp_path, small, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "net.penjing", *small)
        save(encode(*small), tmp_path / "net", layout="directory")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "net.penjing").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "net").stat().st_mode) == 0o777 & ~umask


def test_a_failed_write_leaves_the_old_file(tmp_path, small, monkeypatch):
    topology, arrays = small
    path = tmp_path / "net.penjing"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write(path, topology, arrays)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_writing_where_no_file_can_be(tmp_path, small):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("here first")
    for name in ("file/net.penjing", "folder", "", "n" * 300, "nul\0l"):
        with pytest.raises(OutputError, match="cannot write"):
            write(str(tmp_path / name) if name else "", *small)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "here first"


def test_an_interrupted_write_leaves_nothing(tmp_path, small, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(archive.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "net.penjing", *small)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("topology", "arrays", "metadata", "words"),
    [
        ("", {"x": np.zeros(2, np.complex64)}, {}, "complex64"),
        ("", {"x": np.array(["a"])}, {}, "cannot hold"),
        ("", {"x": np.array([None])}, {}, "object"),
        ("", {"x": [1, 2]}, {}, "list"),
        ("", {3: np.zeros(2)}, {}, "name"),
        ("", {"\ud800": np.zeros(2)}, {}, "Unicode"),
        ("\ud800", {}, {}, "Unicode"),
        (b"{}", {}, {}, "must be a text"),
        ("", {}, {"x": float("nan")}, "JSON"),
        ("", {}, {"x": object()}, "JSON"),
        ("", {}, {"x": np.float32(1)}, "JSON"),
    ],
)
def test_what_a_package_cannot_hold(topology, arrays, metadata, words):
    with pytest.raises(InputError, match=words):
        encode(topology, arrays, metadata=metadata)


@pytest.mark.parametrize("function", [read, verify, inspect])
def test_paths_that_are_no_file(tmp_path, function):
    for path in (tmp_path, tmp_path / "none.penjing", "/dev/zero", "nul\0l"):
        with pytest.raises(PackageError, match="no file|ordinary"):
            function(path)


def test_reading_needs_no_torch(tmp_path, small):
    path = tmp_path / "net.penjing"
    write(path, *small)
    program = (
        "import sys\nfrom penjing.package import read, inspect\n"
        f"topology, arrays, _ = read({str(path)!r})\nstr(inspect({str(path)!r}))\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "print(len(arrays), sorted(loaded & {'torch', 'scipy', 'onnx', 'sklearn', 'pandas', 'safetensors'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == f"{len(small[1])} []"


def test_topologies_are_made_of_known_phrases(small):
    """The dictionary is part of the format: another one could not read what was written."""
    known = Path(codecs.__file__).with_name("phrases.txt").read_bytes()
    assert hashlib.sha256(known).hexdigest().startswith("73adc28fa7015ee2")
    text = '{"graph":[["get_attr","_1_weight","1.weight"],["call_function","linear","aten.linear.default",["%x"]]]}' * 3
    codec, data = codecs.encode_text(text.encode())
    assert codecs.NAMES[codec] == "phrases" and len(data) < 0.7 * len(zstd.compress(text.encode()))
    assert decode(encode(text, small[1]))[0] == text


def test_the_codec_table_is_frozen():
    assert codecs.NAMES == (
        "stored",
        "zstd",
        "grids",
        "planes",
        "sparse",
        "phrases",
        "nested",
        "parent",
        "clusters",
        "numbers",
        "expected",
    )
    assert layout.VERSION == 1 and layout.HEADER_SIZE == 57
