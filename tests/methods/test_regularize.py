"""Regularize: penalties on whole channels, and the cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.penalties import group_lasso, growing
from penjing.data import Data
from penjing.errors import RecipeError
from penjing.network import Network, RemoveChannels, capture
from penjing.recipe import Context, Recipe
from penjing.task import get_task

X = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()
TRAIN = pj.Finetune(epochs=6, lr=0.05, batch_size=32, weight_decay=0)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    return capture(model.eval(), inputs=(X[:2],), name="small")


def context(network: Network) -> Context:
    return Context(original=network, data=Data((X, Y)), task=get_task("classification"))


def test_growing_decay_takes_what_goes_and_nothing_else(network: Network) -> None:
    module = network.module()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    shrink = growing(network, [RemoveChannels(parameter="0.weight", dim=0, indices=(1, 5))], 2.0)
    for done in (0.25, 0.5, 1.0):
        shrink(module, done, 0.1)
    for name, now in module.named_parameters():
        factor = torch.ones_like(now)
        if name in ("0.weight", "0.bias", "1.weight", "1.bias"):
            factor[[1, 5]] = math.exp(-2)
        elif name == "3.weight":
            factor[:, [1, 5]] = math.exp(-2)
        torch.testing.assert_close(now.detach(), before[name] * factor)


def test_group_lasso_is_the_proximal_step(network: Network) -> None:
    """It minimises ½‖x - v‖² + rate · strength · √n ‖x‖: a little to any side is worse."""
    group = next(g for g in network.groups() if "3.weight" in {m.parameter for m in g.producers})
    module = network.module()

    def unit(of: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        parts = [of[m.parameter].detach().movedim(m.dim, 0)[m.indices[number]].flatten() for m in group.members]
        return torch.cat(parts).double()

    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    rate, strength = 0.1, 0.5
    group_lasso([group], strength)(module, 1.0, rate)
    now = dict(module.named_parameters())
    for number in range(group.size):
        v, x = unit(before, number), unit(now, number)

        def cost(z: torch.Tensor, v: torch.Tensor = v) -> float:
            return float((z - v).square().sum() / 2 + rate * strength * len(z) ** 0.5 * z.norm())

        assert all(cost(x) <= cost(x + 1e-3 * d) + 1e-9 for d in (v / v.norm(), -v / v.norm(), torch.ones_like(v)))


def test_a_strong_group_lasso_takes_all(network: Network) -> None:
    module = network.module()
    group_lasso(network.groups(), 1e6)(module, 1.0, 1.0)
    group = next(iter(network.groups()))
    assert all(not dict(module.named_parameters())[m.parameter].any() for m in group.members if m.role == "producer")


@pytest.mark.parametrize("penalty", ["greg", "group-lasso"])
def test_what_is_cut_was_almost_nothing(network: Network, penalty: str) -> None:
    """With enough of either penalty the cut itself changes the outputs far less than without it."""
    inner = pj.PruneChannels(ratio=0.5, reconstruct=False)
    step = pj.Regularize(step=inner, train=TRAIN, penalty=penalty, strength=12 if penalty == "greg" else 0.3)
    plan = step.plan(network, context(network))
    small = network.apply(plan.edits)
    assert all(g.size == b.size // 2 for g, b in zip(small.groups(), network.groups(), strict=True))
    after_step = (
        growing(network, [e for e in plan.edits if isinstance(e, RemoveChannels)], 12)
        if penalty == "greg"
        else group_lasso(network.groups(), 0.3)
    )
    trained = network.apply(
        TRAIN.plan(
            network,
            Context(original=network, data=Data((X, Y)), task=get_task("classification"), after_step=after_step),
        ).edits
    )
    if penalty == "greg":
        torch.testing.assert_close(small.run((X,))[0], trained.run((X,))[0], atol=1e-3, rtol=1e-3)
    else:
        whole, cut = trained.run((X,))[0], small.run((X,))[0]
        plain = TRAIN.plan(network, context(network))
        free = network.apply(plain.edits)
        broken = free.apply(inner.plan(free, context(network)).edits)
        error = float((whole - cut).square().mean() / whole.var())
        assert error < 0.5 * float((free.run((X,))[0] - broken.run((X,))[0]).square().mean() / free.run((X,))[0].var())
    again = step.plan(network, context(network))
    assert torch.equal(network.apply(again.edits).run((X,))[0], small.run((X,))[0])


def test_recipes_hold_it(tmp_path: Path) -> None:
    recipe = Recipe(pj.Regularize(step=pj.PruneChannels(keep_macs=0.5), train=TRAIN, penalty="group-lasso"))
    assert Recipe.load(recipe.dump(tmp_path / "r.yaml")) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": pj.PruneChannels()}, "Regularize.step must say what share PruneChannels takes away"),
        ({"train": pj.Quantize()}, "Regularize.train must be a Step that trains, got Quantize"),
        ({"penalty": "lasso"}, "Regularize.penalty must be one of greg, group-lasso"),
        ({"strength": 0}, "Regularize.strength must be above 0"),
        ({"where": "0.*"}, "Regularize.where selects nothing"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pj.Regularize(**{"step": pj.PruneChannels(ratio=0.5), "train": TRAIN, **fields})  # type: ignore[arg-type]


def test_a_step_that_removes_nothing_is_refused(network: Network) -> None:
    step = pj.Regularize(step=pj.PruneWeights(sparsity=0.5), train=TRAIN)
    with pytest.raises(RecipeError, match="finds nothing that PruneWeights would remove of small"):
        step.plan(network, context(network))
