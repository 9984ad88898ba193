from __future__ import annotations

import pytest
import torch

from penjing.errors import RecipeError
from penjing.tensors.criteria import CRITERIA, Slices

INDEX = torch.arange(4)[:, None]


def scores(name: str, *slices: Slices) -> torch.Tensor:
    return CRITERIA.get(name)(slices, torch.Generator().manual_seed(0))


def test_norms_follow_all_coupled_tensors() -> None:
    rows = torch.ones(4, 3) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    columns = torch.ones(5, 4) * torch.tensor([4.0, 1.0, 1.0, 1.0])
    both = scores("l2", Slices("a", rows, 0, INDEX), Slices("b", columns, 1, INDEX))
    assert both.argsort().tolist() == [1, 2, 3, 0]  # 0.8+0.57, 1.2+0.57, 1.6+0.57, 0.4+2.29: neither alone
    assert scores("l1", Slices("a", rows, 0, INDEX)).argsort().tolist() == [0, 1, 2, 3]


def test_a_unit_may_own_several_positions() -> None:
    weight = torch.tensor([[1.0], [9.0], [2.0], [2.0]])
    index = torch.tensor([[0, 1], [2, 3]])
    got = scores("l2", Slices("w", weight, 0, index))
    assert got[0] / got[1] == pytest.approx((82**0.5) / (8**0.5))


def test_gains_of_norms() -> None:
    weight, gain = torch.rand(4, 3), torch.tensor([0.3, -2.0, 0.1, 1.0])
    got = scores("bn_scale", Slices("w", weight, 0, INDEX), Slices("g", gain, 0, INDEX, gain=True))
    assert got.argsort().tolist() == [2, 0, 3, 1]
    alone = Slices("w", weight, 0, INDEX)
    assert torch.equal(scores("bn_scale", alone), scores("l2", alone))


def test_taylor_is_the_squared_change_of_the_loss() -> None:
    weight, gradients = torch.randn(4, 3), (torch.randn(4, 3), torch.randn(4, 3))
    got = scores("taylor", Slices("w", weight, 0, INDEX, gradients=gradients))
    wanted = sum((g * weight).sum(1).square() for g in gradients) / 2
    assert torch.allclose(got.float(), wanted)
    with pytest.raises(RecipeError, match="taylor"):
        scores("taylor", Slices("w", weight, 0, INDEX))


def test_an_unknown_criterion_is_named() -> None:
    with pytest.raises(RecipeError, match="no criterion called 'l3'"):
        CRITERIA.get("l3")
