"""The inventory adds up and says what each tensor costs."""

import json

import numpy as np

from penjing.package import archive, contents, inspect, write
from penjing.package.layered import Layered


def made(tmp_path, arrays, **metadata):
    path = tmp_path / "net.penjing"
    write(path, '{"graph": []}' * 40, arrays, metadata=metadata)
    return inspect(path), path


def test_everything_adds_up(tmp_path, small):
    inside, path = made(tmp_path, small[1], name="tiny")
    assert inside.file_bytes == path.stat().st_size
    assert inside.index_bytes + inside.topology_coded_bytes + inside.coded_bytes == inside.file_bytes
    assert inside.raw_bytes == sum(a.nbytes for a in small[1].values())
    assert [(r.name, r.shape, r.raw_bytes) for r in inside.tensors] == [
        (k, a.shape, a.nbytes) for k, a in small[1].items()
    ]
    assert [r.dtype for r in inside.tensors] == [a.dtype.name for a in small[1].values()]
    assert inside.format_version == 1 and inside.required_flags == 0 and inside.metadata == {"name": "tiny"}


def test_shared_parts_are_divided_by_what_tensors_cost(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "dense": rng.integers(-127, 128, (100, 500)).astype(np.int8),
        "sparse": np.where(rng.random((100, 500)) < 0.95, 0, 3).astype(np.int8),
        "scale": rng.random(1000).astype(np.float32),
        "zeros": np.zeros(1000, dtype=np.int64),
    }
    inside, _ = made(tmp_path, arrays)
    bits = {row.name: row.bits_per_element for row in inside.tensors}
    assert 7.8 < bits["dense"] < 8.1 and 0.2 < bits["sparse"] < 0.4  # H(0.05) = 0.29 bits
    assert bits["scale"] > 20 and bits["zeros"] < 0.2
    layered = contents.describe(Layered("", arrays, layers=2).encode())
    bits = {row.name: row.bits_per_element for row in layered.tensors}
    assert bits["scale"] > 20 and bits["zeros"] < 0.2  # no layer cuts these


def test_no_tensor_is_decoded(tmp_path, small, monkeypatch):
    path = tmp_path / "net.penjing"
    write(path, *small)
    monkeypatch.setattr(archive.codecs, "decode", None)
    assert len(inspect(path).tensors) == len(small[1])


def test_table_and_dictionary(tmp_path, small):
    inside, _ = made(tmp_path, small[1], name="tiny", accuracy=0.93)
    lines = str(inside).splitlines()
    assert "format 1" in lines[0] and "accuracy: 0.93" in lines
    row = next(line for line in lines if line.startswith("conv.weight "))
    assert row.split()[1:3] == ["int8", "24×16×3×3"] and "3,456" in row
    assert lines[-1].startswith("total") and f"{inside.file_bytes:,}" in lines[-1]
    plain = json.loads(json.dumps(inside.to_dict()))
    assert plain["file_bytes"] == inside.file_bytes and plain["tensors"][0]["shape"] == [24, 16, 3, 3]
    assert plain["tensors"][0]["bits_per_element"] == round(inside.tensors[0].bits_per_element, 4)


def test_division_loses_nothing():
    for total, weights in [(10, [1.0, 1.0, 1.0]), (0, [0.0, 5.0]), (7, [0.0, 0.0]), (1, [3.0] * 9)]:
        shares = contents._divided(total, weights)
        assert sum(shares) == total and min(shares) >= 0
