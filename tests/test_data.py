"""Data: every kind of source gives the same batches, and every wrong one a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from penjing.data import Data, load_data
from penjing.errors import DataError, InputError, PenjingError

X, Y = torch.rand(10, 3), torch.arange(10)


class Samples(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return X[index], int(Y[index])


SOURCES = {
    "tensors": lambda: TensorDataset(X, Y),
    "dataset": Samples,
    "loader": lambda: DataLoader(Samples(), batch_size=4),
    "batches": lambda: [(X[i : i + 4].numpy(), Y[i : i + 4].numpy()) for i in range(0, 10, 4)],
    "generator": lambda: ((X[i : i + 4], Y[i : i + 4]) for i in range(0, 10, 4)),
    "arrays": lambda: (X.numpy(), Y.numpy()),
}


@pytest.mark.parametrize("kind", sorted(SOURCES))
@pytest.mark.parametrize("limit", [None, 7])
def test_all_kinds_give_the_same_samples(kind: str, limit: int | None) -> None:
    batches = list(Data(SOURCES[kind]()).batches(4, limit=limit))
    count = limit or 10
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), X[:count])
    assert torch.equal(torch.cat([y for _, y in batches]), Y[:count])
    assert [len(y) for _, y in batches] == ([4, 4, 2] if limit is None else [4, 3])


@pytest.mark.parametrize("kind", sorted(set(SOURCES) - {"generator"}))
def test_length(kind: str) -> None:
    assert len(Data(SOURCES[kind]())) == 10


@pytest.mark.parametrize("kind", ["tensors", "dataset"])
def test_shuffling_is_by_seed(kind: str) -> None:
    def order(seed: int) -> list[int]:
        return torch.cat([y for _, y in Data(SOURCES[kind]()).batches(4, shuffle=True, seed=seed)]).tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(10))


def test_dictionaries_tuples_and_bytes() -> None:
    pixels = torch.full((2, 1), 255, dtype=torch.uint8)
    inputs, labels = next(Data([({"a": pixels, "b": X[:2]}, Y[:2])]).batches(2))
    assert set(inputs) == {"a", "b"} and inputs["a"].dtype == torch.float32 and inputs["a"].max() == 1
    inputs, labels = next(Data([((X[:2], X[:2]), Y[:2])]).batches(2))
    assert isinstance(inputs, tuple) and len(inputs) == 2
    inputs, labels = next(Data([X[:2]]).batches(2))
    assert labels is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Data(3), "must be a Dataset"),
        (lambda: Data([]), "empty"),
        (lambda: Data((X, Y[:-1])), "arrays of 10 and 9 samples do not go together"),
        (lambda: Data(TensorDataset(X[:0])), "empty"),
        (lambda: next(Data(iter([])).batches(2)), "empty"),
        (lambda: next(Data([(X, Y, Y)]).batches(2)), r"must be \(inputs, labels\)"),
        (lambda: next(Data([("text", Y)]).batches(2)), "tensors or arrays"),
        (lambda: next(Data([(X * torch.nan, Y)]).batches(2)), "NaN"),
    ],
)
def test_wrong_sources(make: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        make()


def test_too_few_to_hold_out() -> None:
    with pytest.raises(DataError, match=r"10 samples are too few to hold 0\.01% of them out"):
        list(Data((X, Y)).split([1e-4]))


def test_a_generator_can_be_walked_again() -> None:
    data = Data(SOURCES["generator"]())
    data.first()
    assert [len(y) for _, y in data.batches(4)] == [len(y) for _, y in data.batches(4)] == [4, 4, 2]

    def endless() -> object:
        while True:
            yield X[:4], Y[:4]

    assert sum(len(y) for _, y in Data(endless()).batches(4, limit=10)) == 10


def test_from_a_command_line(tmp_path: Path) -> None:
    assert len(load_data("digits")) == 1797
    assert len(load_data("digits:train")) + len(load_data("digits:test")) == 1797
    np.savez(tmp_path / "some.npz", x=np.zeros((4, 2), np.uint8), y=np.arange(4))
    assert len(load_data(str(tmp_path / "some.npz"))) == 4
    image = pytest.importorskip("PIL.Image")
    for name, value in (("cat", 0), ("dog", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / "images" / name / "1.png")
    inputs, labels = next(load_data(str(tmp_path / "images")).batches(2))
    assert inputs.shape == (2, 3, 4, 4) and labels.tolist() == [0, 1] and inputs[1].min() == 1


def test_wrong_places(tmp_path: Path) -> None:
    np.savez(tmp_path / "z.npz", z=np.zeros(3))
    np.savez(tmp_path / "short.npz", x=np.zeros((3, 2)), y=np.zeros(2))
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 2)))
    (tmp_path / "bad.npz").write_bytes(b"no")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("x")
    for name, words in [
        ("z.npz", "no array 'x'"),
        ("short.npz", "3 samples"),
        ("empty.npz", "no samples"),
        ("bad.npz", "not a readable .npz"),
        ("none.npz", "no file"),
        ("folder", "no class folders"),
        ("text.txt", "not data"),
        ("nothing", "no data at"),
        ("x.py:f", "no file"),
    ]:
        with pytest.raises(PenjingError, match=words):
            load_data(str(tmp_path / name))
    assert issubclass(DataError, PenjingError) and issubclass(InputError, PenjingError)
