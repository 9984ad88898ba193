"""The coders against what theory allows: empirical entropy, with the tables counted in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.errors import PackageError
from penjing.package import archive, clusters, decode, encode, models, pieces


def entropy(values):
    counts = np.unique(values, return_counts=True)[1]
    return float((counts * (np.log2(counts.sum()) - np.log2(counts))).sum())


@pytest.mark.parametrize("spread", [0.4, 2.0, 9.0, 30.0])
@pytest.mark.parametrize("size", [200_000, 1_500_000])
def test_one_histogram_reaches_its_entropy(spread, size):
    rng = np.random.default_rng(3)
    grid = np.clip(np.rint(rng.laplace(0, spread, size)), -127, 127).astype(np.int8).reshape(-1, 400)
    assert 8 * len(encode("", {"w": grid})) <= 1.01 * entropy(grid) + 8 * 300


def test_rows_of_different_kinds_get_their_own_histograms():
    rng = np.random.default_rng(4)
    kinds = [np.clip(np.rint(rng.normal(0, s, (300, 500))), -127, 127).astype(np.int8) for s in (1, 6, 40)]
    grid = rng.permutation(np.concatenate(kinds))
    coded = 8 * len(encode("", {"w": grid}))
    assert coded <= 1.01 * sum(entropy(k) for k in kinds) + 8 * 300
    assert coded < 0.93 * entropy(grid)


def test_sparse_rows_are_told_from_dense_ones():
    rng = np.random.default_rng(5)
    dense = rng.integers(-127, 128, (100, 512)).astype(np.int8)
    sparse = np.where(rng.random((400, 512)) < 0.9, 0, rng.integers(-20, 21, (400, 512))).astype(np.int8)
    coded = 8 * len(encode("", {"a": dense, "b": sparse}))
    assert coded <= 1.01 * (entropy(dense) + entropy(sparse)) + 8 * 300


def test_repetition_is_left_to_zstd(tmp_path):
    block = np.random.default_rng(6).integers(-127, 128, (64, 512)).astype(np.int8)
    grid = np.tile(block, (8, 1))
    data = encode("", {"w": grid})
    assert len(data) < 1.1 * block.nbytes
    assert np.array_equal(decode(data)[1]["w"], grid)


def test_floats_are_smaller_than_raw_and_than_zstd():
    import zstandard

    values = np.random.default_rng(7).normal(0, 0.02, 400_000).astype(np.float32)
    coded = len(encode("", {"w": values}))
    assert coded < 0.86 * values.nbytes
    assert coded < 0.95 * len(zstandard.ZstdCompressor(level=19).compress(values.tobytes()))
    brain = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert len(encode("", {"w": brain})) < 0.70 * brain.nbytes


def test_models_are_few_and_shared():
    rng = np.random.default_rng(8)
    arrays = {f"{i}": np.clip(np.rint(rng.normal(0, 25, (32, 288))), -127, 127).astype(np.int8) for i in range(20)}
    _, index, _ = archive.open_bytes(encode("", arrays))
    assert len(index.models) <= 3  # they are all alike


histogram = st.lists(st.integers(0, 5000), min_size=256, max_size=256).filter(any).map(np.array)


@settings(max_examples=60, deadline=None)
@given(st.lists(histogram | st.integers(0, 255).map(lambda v: np.eye(256, dtype=np.int64)[v] * 7), max_size=4))
def test_models_travel_unchanged(histograms):
    made = [models.best_model(h, slack=0.003) for h in histograms]
    assert list(models.unpack_models(models.pack_models(made))) == made
    for model, counts in zip(made, histograms, strict=True):
        weights = model.weights
        present = np.flatnonzero(counts) >> model.low_bits
        assert present.min() >= model.start and present.max() < model.start + len(weights)
        assert (weights[present - model.start] > 0).all()  # nothing that occurs is taken for impossible


@given(st.integers(0, 3))
def test_small_floats_grow_with_their_codes(precision):
    values = models.small_floats(np.arange(24 << precision), precision)
    assert values[0] == 0 and (np.diff(values) > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=99), st.integers(0, 7))
def test_low_bits_pack_and_unpack(data, width):
    values = np.frombuffer(data, dtype=np.uint8) & ((1 << width) - 1)
    packed = models.pack_low(np.frombuffer(data, dtype=np.uint8), width)
    assert len(packed) == models.low_size(len(values), width)
    assert np.array_equal(models.unpack_low(packed, len(values), width), values)


def test_what_the_coding_library_throws_is_translated():
    class PanicException(BaseException):
        pass

    def panics():
        raise PanicException("index out of bounds")

    with pytest.raises(PackageError, match="stream cannot be decoded"):
        models.guarded(panics, "a stream")
    with pytest.raises(KeyboardInterrupt):
        models.guarded(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "a stream")


def test_clusters_find_the_kinds_of_rows():
    rng = np.random.default_rng(9)
    kinds = rng.dirichlet(np.ones(256), 3)
    rows = np.concatenate([rng.multinomial(500, kind, size=40) for kind in kinds]).astype(np.float64)
    chosen, single = clusters.fit(rows, share=1.0).assign(rows)
    assert not single
    assert [len(set(chosen[i : i + 40])) for i in (0, 40, 80)] == [1, 1, 1] and len(set(chosen)) == 3


def test_pieces_cover_each_tensor_once():
    tensors = [
        pieces.Tensor(name=str(i), code=code, shape=shape)
        for i, (code, shape) in enumerate(
            [("b", (3000, 3000)), ("f", (5, 5)), ("b", (0, 3)), ("f", (1, 7_000_001)), ("B", (9,)), ("d", ())]
        )
    ]
    seen = {i: 0 for i in range(len(tensors))}
    for part in pieces.divide(tensors):
        raw = 0
        for piece in part:
            assert piece.start == seen[piece.tensor]
            seen[piece.tensor] = piece.stop
            raw += (piece.stop - piece.start) * tensors[piece.tensor].dtype.itemsize
        assert raw <= pieces.MAX_PART
    assert seen == {i: t.size for i, t in enumerate(tensors)}
