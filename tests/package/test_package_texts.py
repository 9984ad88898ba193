"""Topologies with digests and scales: kept as bits, and back to the last character."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from torch import nn

import penjing as pj
from penjing.errors import PackageError
from penjing.package import codecs, contents, decode, encode, inspect, texts, zstd

FILE = Path(__file__).parent / "golden" / "numbers.penjing"
ZSTD = (1, 5, 7)  # the release whose frames are in the file
DIGEST = hashlib.sha256(b"a network").hexdigest()
SCALE = repr(float(np.float32(0.0123)))


def returned(text):
    data = texts.encode(text)
    return None if data is None else texts.decode(memoryview(data), len(text))


@pytest.mark.parametrize(
    "text",
    [
        f'"{DIGEST}"',
        f"{DIGEST},{SCALE},{DIGEST},-{SCALE},[{SCALE}]",
        f"{SCALE}e5, 1{SCALE}, {SCALE}.5, 123456.12345678, 0.1234567890123456, 1e-7 {SCALE}",
        f"{DIGEST}0 0{DIGEST} {DIGEST.upper()} {'0' * 64} {'1' * 64}",
        "9" * 400 + ".12345678 " + SCALE,
        f"盆景 {DIGEST} \x7f",
    ],
)
def test_texts_come_back(text):
    assert returned(text.encode()) == text.encode()


@pytest.mark.parametrize("seed", range(5))
def test_texts_of_all_kinds_of_numbers_come_back(seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, 300, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = [float(v) for v in bits if np.isfinite(v)] + rng.normal(size=100).astype(np.float32).tolist()
    values += rng.normal(size=100).tolist() + [hashlib.sha256(bytes([i])).hexdigest() for i in range(30)]
    text = json.dumps([values[i] for i in rng.permutation(len(values))]).encode()
    assert returned(text) == text


def test_numbers_take_their_bits():
    scales = np.random.default_rng(0).random(200).astype(np.float32)
    text = json.dumps([[float(s), hashlib.sha256(s.tobytes()).hexdigest()] for s in scales]).encode()
    assert len(texts.encode(text)) < 200 * 36 + 150
    assert codecs.NAMES[codecs.encode_text(text)[0]] == "numbers"


def test_other_texts_are_left_to_others():
    assert texts.encode(b'{"graph": [1, 0.5]}') is None
    assert texts.encode(f"\1{DIGEST}".encode()) is None
    assert texts.encode(f"\2{SCALE}".encode()) is None
    for text in ("\1" + DIGEST, "\2", DIGEST):
        assert decode(encode(text, {}))[0] == text


def test_what_no_writer_makes_is_refused():
    text = f"{DIGEST} {SCALE} {SCALE}".encode()
    good = texts.encode(text)
    assert good[:2] == b"\1\2"
    lies = {
        "a size too small": (good, len(text) - 1),
        "a size too large": (good, len(text) + 1),
        "nothing": (b"", 5),
        "no end of a number": (b"\xff" * 6, 5),
        "more numbers than bytes": (b"\xff\xff\xff\xff\x0f\1" + good[2:], len(text)),
        "a digest too few": (b"\0\2" + good[34:], len(text)),
        "a float too many": (b"\1\3" + good[2:34] + b"\0\0\0\0" + good[34:], len(text)),
        "no frame": (good[:42], len(text)),
        "a frame cut off": (good[:-3], len(text)),
        "a tail": (good + b"\1\0\0", len(text)),
        "a bomb": (b"\0\0" + zstd.compress(bytes(50 << 20))[4:], 1000),
    }
    for lie, (data, size) in lies.items():
        with pytest.raises(PackageError) as raised:
            pytest.fail(f"{lie}: {texts.decode(memoryview(data), size)!r}")
        assert raised.value.hint, lie


def test_tensors_cannot_be_texts(forge):
    package = forge.of(encode("", {"w": np.arange(300, dtype=np.int8)}))
    package.front["parts"][0][0] = codecs.NUMBERS
    with pytest.raises(PackageError, match="numbers where it cannot be"):
        decode(package.build())


def test_the_golden_package_is_read():
    topology, arrays, _ = decode(FILE.read_bytes())
    assert topology == golden() and not arrays
    assert FILE.read_bytes()[57:]  # more than a header


@pytest.mark.skipif(zstandard.ZSTD_VERSION != ZSTD, reason="frames of another zstd release")
def test_the_golden_package_is_written():
    assert encode(golden(), {}) == FILE.read_bytes()


def golden():
    return json.dumps({"history": [{"event": "step", "before": DIGEST}], "graph": [float(np.float32(0.0123)), 0.5]})


# ------------------------------------------------------------------------------------------------------- overhead
LEAST = 400  # bytes that a small network may take besides its topology and the tensors' own


@pytest.fixture(scope="module")
def tiny():
    """A network with 8 parameters, as small ones come."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return pj.capture(model, inputs=torch.rand(2, 1, 8, 8))


def test_eight_small_tensors_take_little_besides_themselves(tiny, tmp_path):
    size = pj.pack(tiny, tmp_path / "net.penjing")
    inside = inspect(tmp_path / "net.penjing")
    assert len(inside.tensors) == 8 and {row.dtype for row in inside.tensors} == {"float32"}
    own = sum(row.coded_bytes for row in inside.tensors)
    assert own <= inside.raw_bytes == 4 * tiny.parameter_count()
    # Index, header, digests, models: against what the tensors are coded in, which is less than they hold.
    assert size - inside.topology_coded_bytes - own < LEAST
    assert inside.topology_coded_bytes < LEAST


def test_values_without_a_pattern_take_little_besides_themselves(tiny):
    arrays = {name: np.frombuffer(np.random.default_rng(i).bytes(a.nbytes), dtype=a.dtype).reshape(a.shape)
              for i, (name, a) in enumerate(tiny.state()[1].items())}  # fmt: skip
    assert len(encode("", arrays)) - sum(a.nbytes for a in arrays.values()) < LEAST


def test_a_history_takes_little_more_than_its_digests(tiny):
    samples = torch.rand(16, 1, 8, 8)
    steps = pj.PruneWeights(sparsity=0.5), pj.Quantize(activations=None)
    topology, _ = pj.compress(tiny, pj.Recipe(*steps), data=samples).network.state()
    events = json.loads(topology)
    digests = [event.pop("before") for event in events["history"] if "before" in event]
    assert len(digests) == 2
    bare = json.dumps(events, separators=(",", ":"), ensure_ascii=False)
    coded = contents.describe(encode(topology, {})).topology_coded_bytes
    without = contents.describe(encode(bare, {})).topology_coded_bytes
    assert coded - without < 32 * len(digests) + 8
