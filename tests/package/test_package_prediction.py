"""Kernels predicted from their earlier taps: exact, smaller, and near in every layer."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from penjing.errors import PackageError
from penjing.package import archive, decode, encode, layout, prediction
from penjing.package.layered import Layered

FILE = Path(__file__).parent / "golden" / "predicted.penjing"
ZSTD = (1, 5, 7)  # the release whose frames are in the file


def smooth(shape, seed=0, scale=22.0):
    """Kernels whose taps agree with those on the left and above, rows to the end of the range."""
    found = np.random.default_rng(seed).laplace(size=shape)
    for row in range(shape[-2]):
        for column in range(shape[-1]):
            up, left = found[..., max(row - 1, 0), column], found[..., row, max(column - 1, 0)]
            found[..., row, column] += 0.6 * up * (row > 0) + 0.6 * left * (column > 0)
            if row and column:
                found[..., row, column] -= 0.36 * found[..., row - 1, column - 1]
    return np.clip(np.rint(found * scale / found.std()), -127, 127).astype(np.int8)


def required(data):
    return layout.parse_header(data).required


def index_of(data):
    return archive.open_bytes(data)[1]


@pytest.fixture(scope="module")
def arrays():
    wide = smooth((40, 30, 3, 3), 4)
    wide[3, 4] = [[-128, 127, -128], [127, -128, 127], [-128, 127, -128]]
    rng = np.random.default_rng(9)
    return {
        "0.weight": smooth((40, 20, 3, 3), 1),
        "1.weight": smooth((20, 40, 3, 3), 2),
        "wide": wide,
        "large": smooth((30, 40, 5, 5), 3),
        "line": smooth((60, 50, 1, 7), 5),
        "unsigned": smooth((20, 30, 4, 4), 6).view(np.uint8) ^ np.uint8(0x80),
        "matrix": rng.integers(-127, 128, (50, 40)).astype(np.int8),
        "noise": rng.integers(-127, 128, (50, 40, 3, 3)).astype(np.int8),
        "empty": np.zeros((0, 4, 3, 3), dtype=np.int8),
        "scale": rng.random((10, 2, 3, 3)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def good(arrays):
    return encode("a topology", arrays)


def test_values_come_back_bit_for_bit(good, arrays, equal):
    assert equal(decode(good)[1], arrays)
    assert required(good) == layout.PREDICTED


def test_it_is_worth_its_while(arrays, monkeypatch):
    chosen = {name: arrays[name] for name in ("0.weight", "1.weight")}
    monkeypatch.setattr(archive, "_WORTH", 0.0)  # not by the slower codec
    size = len(encode("", chosen))
    monkeypatch.setattr(prediction, "choose", lambda tensors, values: ((), list(values.values())))
    assert size < 0.95 * len(encode("", chosen))


def test_only_what_gains_is_predicted(good, arrays):
    predictors = dict(zip(arrays, index_of(good).predictors, strict=True))
    assert {name for name, p in predictors.items() if p is None} == {"matrix", "noise", "empty", "scale"}
    # A kernel that swings through the whole range cannot be predicted within a byte.
    assert 3 * 30 + 4 in predictors["wide"].plain
    weights = predictors["large"].weights
    assert [len(w) for w in weights] == [min(tap, 8) for tap in range(1, 25)]


def test_weights_are_shared_unless_their_own_pay():
    alike = {str(i): smooth((12, 20, 3, 3), i) for i in range(4)}
    other = {"other": smooth((40, 40, 3, 3), 9)[..., ::-1, ::-1].swapaxes(0, 1) // 2 * np.int8([1, -1, 1])}
    predictors = index_of(encode("", alike | other)).predictors
    assert len({p.weights for p in predictors[:4]}) == 1 and len({p.weights for p in predictors}) == 2


@pytest.mark.parametrize(
    "array",
    [
        np.random.default_rng(0).integers(-127, 128, (30, 20, 3, 3)).astype(np.int8),
        np.where(np.random.default_rng(1).random((30, 20, 3, 3)) < 0.8, 0, smooth((30, 20, 3, 3))).astype(np.int8),
        smooth((30, 20, 9, 9)),
        smooth((2, 2, 3, 3)),
        np.zeros((30, 20, 3, 3), dtype=np.int8),
    ],
    ids=["noise", "sparse", "too many taps", "tiny", "constant"],
)
def test_others_need_no_feature(array):
    data = encode("", {"w": array})
    assert required(data) == 0 and not index_of(data).predictors
    assert decode(data)[1]["w"].tobytes() == array.tobytes()


@pytest.mark.parametrize("seed", range(12))
def test_any_weights_restore_any_values(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, prediction.MAX_TAPS + 1))
    weights = tuple(tuple(rng.integers(-127, 128, min(tap, 8)).tolist()) for tap in range(1, size))
    values = [rng.integers(0, 256, size * int(n)).astype(np.uint8) for n in rng.integers(1, 3000, 3)]
    made = prediction.apart(values, weights)
    restored = prediction.restore([coded for _, coded in made], [predictor for predictor, _ in made])
    assert [r.tobytes() for r in restored] == [v.tobytes() for v in values]


def test_large_tensors_are_predicted_across_their_parts(equal):
    arrays = {"w": smooth((520, 512, 3, 3), 7)}
    data = encode("", arrays)
    assert len(index_of(data).parts) > 1 and required(data) == layout.PREDICTED
    assert equal(decode(data)[1], arrays)


def test_layers_are_near_and_exact(arrays, equal):
    made = Layered("", arrays, layers=2)
    data = made.encode()
    assert required(data) == layout.PREDICTED | layout.LAYERED
    assert len(data) < 1.01 * len(encode("", arrays))
    assert equal(decode(data)[1], arrays)
    coarse = decode(data, layers=1)[1]
    assert equal(coarse, made.arrays(1))
    for name in ("0.weight", "1.weight", "wide", "large", "line"):
        exact = arrays[name].astype(np.float64)
        error = coarse[name] - exact
        assert (exact**2).sum() > 20 * (error**2).sum(), name
        assert np.abs(error).max() < 100, name  # nothing has turned its sign
    assert made.sqnr(1) > 13


def lied(**changes):
    def change(package):
        for key, value in changes.items():
            package.front[key] = value(package.front[key]) if callable(value) else value

    return change


LIES = {
    "no predictors": (lied(predictors=None), "'predictors' is missing"),
    "no plain kernels": (lied(plain=None), "'plain' is missing"),
    "too few numbers": (lied(predictor=lambda p: p[1:]), "one predictor for each tensor"),
    "no such predictor": (lied(predictor=lambda p: [99, *p[1:]]), "one predictor for each tensor"),
    "a negative number": (lied(predictor=lambda p: [-1, *p[1:]]), "'predictor' is no list of numbers"),
    "a weight too large": (lied(predictors=lambda p: [[128, *p[0][1:]], *p[1:]]), "not understood"),
    "a weight that is none": (lied(predictors=lambda p: [["1", *p[0][1:]], *p[1:]]), "not understood"),
    "a truth value": (lied(predictors=lambda p: [[True, *p[0][1:]], *p[1:]]), "not understood"),
    "a predictor that is none": (lied(predictors=lambda p: [7, *p[1:]]), "not understood"),
    "a weight too few": (lied(predictors=lambda p: [p[0][1:], *p[1:]]), "fits no kernel"),
    "no weights": (lied(predictors=lambda p: [[], *p[1:]]), "fits no kernel"),
    "of other kernels": (lied(predictors=lambda p: [[1], *p[1:]]), "for other kernels"),
    "of a matrix": (lied(predictor=lambda p: [1] * len(p), plain=lambda p: [[]] * 10), "for other kernels"),
    "one list too few": (lied(plain=lambda p: p[1:]), "which kernels of each tensor are plain"),
    "a kernel beyond": (lied(plain=lambda p: [[10**9], *p[1:]]), "no such kernels"),
    "a kernel far beyond": (lied(plain=lambda p: [[1, 10**9], *p[1:]]), "no such kernels"),
    "a number without end": (lied(plain=lambda p: [[1, 10**40], *p[1:]]), "an absurd number"),
    "a kernel twice": (lied(plain=lambda p: [[1, 0], *p[1:]]), "no such kernels"),
    "kernels that are none": (lied(plain=lambda p: [5, *p[1:]]), "'plain' is no list"),
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.replace(" ", "-"))
def test_each_lie_has_its_sentence(lie, good, forge):
    change, words = LIES[lie]
    package = forge.of(good)
    change(package)
    with pytest.raises(PackageError, match=words) as raised:
        decode(package.build())
    assert raised.value.hint and len(raised.value.message) < 200


def test_predictors_without_the_feature_are_ignored_and_old_readers_refuse(good, arrays, forge, monkeypatch):
    package = forge.of(good)
    package.required = 0
    got = decode(package.build())[1]
    assert got["0.weight"].tobytes() != arrays["0.weight"].tobytes()
    assert got["matrix"].tobytes() == arrays["matrix"].tobytes()
    monkeypatch.setattr("penjing.package.layout.KNOWN_REQUIRED", 0b111)
    with pytest.raises(PackageError, match="needs feature 3 that this penjing does not have"):
        decode(good)


def golden():
    """Arrays made by arithmetic alone."""
    noise = np.frombuffer(hashlib.shake_256(b"kernels").digest(40_000), dtype=np.uint8).astype(np.int64)
    bell = (noise.reshape(4, 10_000).sum(axis=0) - 510)[:9600].reshape(24, 25, 4, 4)
    kernels = (3 * bell[..., 1:, 1:] + 2 * (bell[..., :-1, 1:] + bell[..., 1:, :-1])) // 25
    kernels[3, 5] = 127 * (1 - 2 * (np.arange(9) % 3 % 2)).reshape(3, 3)
    return '{"graph": []}', {
        "w": kernels.clip(-127, 127).astype(np.int8),
        "u": ((kernels // 2)[:, :, :, :2] + 128).clip(0, 255).astype(np.uint8),
        "b": noise[:24].astype(np.int16),
    }


def test_the_golden_predicted_package_is_read(equal):
    data = FILE.read_bytes()
    topology, arrays, _ = decode(data)
    assert topology == golden()[0] and equal(arrays, golden()[1])
    chosen = index_of(data).predictors
    assert chosen[0] is not None and chosen[0].plain and chosen[1] is not None and chosen[2] is None


@pytest.mark.skipif(zstandard.ZSTD_VERSION != ZSTD, reason="frames of another zstd release")
def test_the_golden_predicted_package_is_written():
    assert encode(*golden()) == FILE.read_bytes()
