"""Tasks: scores against plain definitions; wrong labels get a sentence."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from penjing.errors import DataError, PenjingError
from penjing.task import get_task, primary


def test_classification() -> None:
    task = get_task("classification")
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1])
    assert task.scores(logits, labels).tolist() == [1, 1, 0]
    torch.testing.assert_close(task.loss({"logits": logits}, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 5]), torch.tensor([0.0, 1.0]), torch.tensor([0, 1, 1]), torch.tensor([-1, 0])]
)
def test_wrong_labels(labels: torch.Tensor) -> None:
    with pytest.raises(DataError):
        get_task("classification").scores(torch.rand(2, 3), labels)


def test_language_modelling_ignores_padding() -> None:
    logits = torch.zeros(2, 3, 8)
    labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
    torch.testing.assert_close(get_task("language-modelling").scores(logits, labels), torch.full((2,), math.log(8)))


def test_regression_and_reconstruction() -> None:
    assert get_task("regression").scores(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0])).tolist() == [0, 4]
    psnr = get_task("reconstruction").scores(torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2))
    torch.testing.assert_close(psnr, torch.tensor([20.0]))


def test_segmentation() -> None:
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, 0, :2] = 1  # predicts 1 1 0 0
    labels = torch.tensor([[[1, 0, 0, -100]]])
    # class 0: intersection 1 of union 2; class 1: 1 of 2
    torch.testing.assert_close(get_task("segmentation").scores(logits, labels), torch.tensor([0.5]))


def test_names() -> None:
    with pytest.raises(PenjingError, match="no task called 'clasification'") as caught:
        get_task("clasification")
    assert "classification" in (caught.value.hint or "")
    assert get_task(None) is None
    assert primary((torch.ones(1), torch.zeros(1))).item() == 1
