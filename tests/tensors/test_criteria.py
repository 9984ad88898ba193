from __future__ import annotations

import pytest
import torch

from penjing.errors import RecipeError
from penjing.tensors.criteria import CRITERIA, Activity, Slices, Units, criterion, require_samples

INDEX = torch.arange(4)[:, None]


def scores(name: str, *slices: Slices) -> torch.Tensor:
    return CRITERIA.get(name)(Units(slices), torch.Generator().manual_seed(0))


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


def test_geometric_median_finds_the_unit_that_others_can_say() -> None:
    """The criterion is about distance, not size: the middle one of large units goes before a small one far away."""
    rows = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.2, 5.2], [0.1, -9.0]])
    got = scores("fpgm", Slices("w", rows, 0, INDEX))
    wanted = torch.stack([(rows - r).norm(dim=1).sum() for r in rows])
    assert torch.allclose(got.float() / got.float().mean(), wanted / wanted.mean())
    assert got.argmin() == 2
    far = torch.tensor([[9.0, 9.0], [9.1, 8.9], [8.9, 9.1], [1.0, -1.0]])
    small = Slices("w", far, 0, INDEX)
    assert scores("l2", small).argmin() == 3 and scores("fpgm", small).argmax() == 3


def test_hessian_weighs_every_entry_by_its_own_gradient() -> None:
    weight, gradients = torch.randn(4, 3), (torch.randn(4, 3), torch.randn(4, 3))
    fisher = sum(g.square() for g in gradients) / 2
    got = scores("hessian", Slices("w", weight, 0, INDEX, gradients=gradients))
    assert torch.allclose(got.float(), 0.5 * (fisher * weight.square()).sum(1))


def test_degree_counts_strong_kernels_on_both_sides() -> None:
    kernels = torch.zeros(4, 5, 3, 3)
    kernels[0, :4], kernels[1, :1], kernels[2, :2], kernels[3, 0] = 1, 1, -1, 50
    alone = scores("degree", Slices("w", kernels, 0, INDEX))
    # The mean norm is (4+1+2)·3 + 150 over 20 kernels: only the strong one counts; without it, those of norm 3 do.
    assert alone.argmax() == 3
    kernels[3] = 0
    assert scores("degree", Slices("w", kernels, 0, INDEX)).argsort().tolist() == [3, 1, 2, 0]
    columns = torch.zeros(6, 4)
    columns[:, 3] = 1
    both = scores("degree", Slices("w", kernels, 0, INDEX), Slices("v", columns, 1, INDEX))
    assert both.argmax() == 3


def test_activity_decides_and_has_its_fallbacks() -> None:
    weight = Slices("w", torch.arange(1.0, 13).view(4, 3).flip(0), 0, INDEX)
    mean, zeros = torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([0.1, 0.9, 0.2, 0.5])

    def by(name: str, activity: Activity | None) -> list[int]:
        return CRITERIA.get(name)(Units((weight,), activity), torch.Generator()).argsort().tolist()

    seen = Activity(mean, mean, mean, zeros, torch.tensor([4.0, 1.0, 2.0, 3.0]))
    assert by("apoz", seen) == [1, 3, 2, 0] and by("mean_activation", seen) == [0, 1, 3, 2]
    assert by("feature_rank", seen) == [1, 2, 3, 0]
    never = Activity(mean, mean, mean, torch.zeros(4))
    assert by("apoz", never) == by("mean_activation", never) and by("feature_rank", never) == [3, 2, 1, 0]
    for name in ("apoz", "mean_activation", "feature_rank"):
        with pytest.raises(RecipeError, match=f"'{name}' needs samples"):
            by(name, None)


def test_a_criterion_of_ones_own_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CRITERIA, "_items", dict(CRITERIA._items))

    @criterion("last", needs=["activity"])
    def last(units: Units, generator: torch.Generator) -> torch.Tensor:
        return torch.arange(len(units))

    assert scores("last", Slices("w", torch.rand(4, 3), 0, INDEX)).tolist() == [0, 1, 2, 3]
    with pytest.raises(RecipeError, match="'last' needs samples"):
        require_samples("last", samples=False, labels=True)
    require_samples("last", samples=True, labels=False)
    with pytest.raises(RecipeError, match="'hessian' needs samples with labels"):
        require_samples("hessian", samples=True, labels=False)
    with pytest.raises(RecipeError, match="cannot need 'luck'"):
        criterion("lucky", needs=["luck"])
