"""ShareWeights: tables of least error, zeros that stay zero, and shared values that train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import penjing as pj
from penjing.data import Data
from penjing.errors import DataError, InputError, RecipeError
from penjing.methods.share_weights import _probe
from penjing.network import Network, SetWeights, capture
from penjing.recipe import Context, Recipe
from penjing.task import get_task
from penjing.tensors import grids

X = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
WEIGHTS = ("0.weight", "3.weight", "7.weight")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    with torch.no_grad():  # outputs that matter very differently
        model[1].weight.copy_(torch.logspace(-2, 0.5, 16))  # type: ignore[operator]
    return model.eval()


@pytest.fixture(scope="module")
def network() -> Network:
    return capture(tiny(), inputs=(X[:2],))


def context(network: Network, data: Tensor | None = X) -> Context:
    return Context(original=network, data=None if data is None else Data(data), task=None)


def shared(network: Network, data: Tensor | None = X, **fields: Any) -> Network:
    return network.apply(pj.ShareWeights(**fields).plan(network, context(network, data)).edits)


def reals(network: Network, name: str) -> Tensor:
    levels, codes = network.tensors()[f"{name}_levels"].detach(), network.tensors()[name].long()
    return levels.gather(1, codes.reshape(len(levels), -1)).reshape(codes.shape)


def distance(a: Network, b: Network) -> float:
    return float((a.run((X,))[0] - b.run((X,))[0]).square().mean())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_tables_beat_even_grids_and_keep_their_promise(network: Network, granularity: str) -> None:
    plan = pj.ShareWeights(codes=8, granularity=granularity).plan(network, context(network, None))
    after = network.apply(plan.edits)
    assert set(after.code_bits()) == set(WEIGHTS)
    scores = {r.layer: r.score for r in plan.reasons}
    for name in WEIGHTS:
        weight, axis = network.tensors()[name].detach(), 0 if granularity == "channel" else None
        even = grids.tensor_grid(weight, -4, 3, axis=axis, ranges="mse")
        found = grids.sqnr(weight, reals(after, name))
        assert found > grids.sqnr(weight, grids.fake_quantize(weight, even)) + 0.5
        assert found == pytest.approx(scores[name.removesuffix(".weight")], abs=1e-3)
        for row in reals(after, name) if granularity == "channel" else [reals(after, name)]:
            assert len(row.unique()) <= 8


def test_errors_go_where_they_do_not_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():  # large weights for what is small, and for hidden units that hardly matter
        model[0].weight *= torch.logspace(0.5, -0.5, 64)
        model[0].weight[::2] *= 4
        model[2].weight[:, ::2] *= 0.001
    x = torch.randn(128, 64) * torch.logspace(-2, 0, 64)
    network, errors = capture(model.eval(), inputs=(x[:2],)), {}
    ways: dict[str, dict[str, Any]] = {c: {"criterion": c} for c in ("weights", "activation", "outputs")}
    for way, fields in (ways | {"with samples": {}, "without": {}}).items():
        seen = None if way == "without" else Data(x)
        step = pj.ShareWeights(codes=4, where="0", **fields)
        after = network.apply(step.plan(network, Context(original=network, data=seen)).edits)
        errors[way] = float((after.run((x,))[0] - network.run((x,))[0]).square().mean())
    assert errors["outputs"] < 0.9 * errors["activation"] < 0.8 * errors["weights"]
    assert errors["with samples"] == errors["outputs"]
    assert errors["without"] == errors["weights"]


def test_probes_see_the_sum_of_squared_jacobians(network: Network) -> None:
    module, x = network.module(), X[:2]
    weight = network.tensors()["7.weight"].detach()
    jacobian = torch.func.jacrev(lambda w: functional_call(module, {"7.weight": w}, (x,)))(weight)
    wanted = jacobian.square().sum((0, 1))
    found = torch.zeros_like(weight)
    loss = _probe(0)
    for _ in range(400):
        module.zero_grad()
        loss(module, x, None).backward()
        found += module.get_parameter("7.weight").grad.square() / 400
    assert float((found.detach() / wanted.detach().clamp_min(1e-12)).mean()) == pytest.approx(1.0, abs=0.05)
    assert float(torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1]) > 0.95


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_pruned_weights_stay_zero_also_when_the_others_train(network: Network, granularity: str) -> None:
    pruned = network.apply(pj.PruneWeights(sparsity=0.7).plan(network, context(network)).edits)
    after = shared(pruned, codes=4, granularity=granularity)
    tuned = after.apply(pj.Finetune(epochs=2, lr=0.01, teacher="original").plan(after, context(network)).edits)
    assert distance(tuned, network) < distance(after, network)
    for name in after.code_bits():
        assert torch.equal(tuned.tensors()[name], after.tensors()[name])
        assert not torch.equal(reals(tuned, name), reals(after, name))
        for net in (after, tuned):
            assert bool((reals(net, name)[~pruned.masks[name]] == 0).all())
        # Zeros do not draw the levels to them: there are still three others.
        assert len(reals(after, name).flatten().unique()) >= 4


def test_keep_zeros_can_be_left_to_masks(network: Network) -> None:
    weight = network.tensors()["7.weight"].detach() + 1.0
    weight[:5] += 2.0
    weight[0, 0] = 0.0
    odd = network.apply([SetWeights(parameter="7.weight", value=weight)])
    kept = reals(shared(odd, None, codes=2, where="7"), "7.weight")
    assert float(kept[0, 0]) == 0.0
    free = reals(shared(odd, None, codes=2, where="7", keep_zeros=False), "7.weight")
    assert float((free - weight).square().mean()) < float((kept - weight).square().mean())


def test_a_recipe_with_labels_trains_the_shared_values(network: Network) -> None:
    recipe = Recipe.from_dict({"steps": [{"ShareWeights": {"codes": 4}}, {"Finetune": {"epochs": 1, "lr": 0.01}}]})
    assert isinstance(recipe.steps[0], pj.ShareWeights)
    labels = network.run((X,))[0].argmax(1)
    result = pj.compress(network, recipe, data=(X, labels), task="classification").network
    assert [e.get("name") for e in result.history if "name" in e][-2:] == ["ShareWeights", "Finetune"]
    plain = shared(network, codes=4)
    loss = get_task("classification").loss  # type: ignore[union-attr]
    assert float(loss(result.run((X,))[0], labels)) < float(loss(plain.run((X,))[0], labels))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_shared_weights_are_quantized(network: Network, granularity: str) -> None:
    """Zeros stay zero; what shares values goes on to do so where a tensor has one scale."""
    pruned = pj.compress(network, Recipe(pj.PruneWeights(sparsity=0.5))).network
    small = shared(pruned, codes=8)
    recipe = Recipe(pj.Quantize(granularity=granularity, correct_scale=False, headroom=False))
    result = pj.compress(small, recipe, data=X)
    assert not result.network.shared_levels()
    assert set(result.network.code_kinds().values()) == {"int8"}
    assert any("share no values any more" in note for note in result.plans[-1].notes)
    assert distance(result.network, small) < 0.03
    for name in small.shared_levels():
        before, codes = reals(small, name), result.network.tensors()[name]
        assert not codes[before == 0].any()
        if granularity == "tensor" and name != "0.weight":  # into which a batch norm was folded
            assert len(codes.unique()) <= len(before.unique())


def test_integer_grids_are_still_not_trained(network: Network) -> None:
    mixed = network.apply(pj.Quantize(activations=None, where="7").plan(network, context(network)).edits)
    with pytest.raises(RecipeError, match="already quantized"):
        pj.Finetune(teacher="original").plan(mixed, context(network))
    with pytest.raises(RecipeError, match="already quantized"):
        pj.ShareWeights().plan(mixed, context(network))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"codes": 1}, "at least 2"),
        ({"codes": 257}, "between 2 and 256"),
        ({"codes": 2.5}, "whole number"),
        ({"granularity": "group:4"}, "must be one of tensor, channel"),
        ({"criterion": "output"}, "must be one of"),
        ({"samples": 0}, "at least 1"),
        ({"keep_zeros": "no"}, "must be one of"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        pj.ShareWeights(**fields)


def test_what_cannot_be_shared_is_refused(network: Network) -> None:
    with pytest.raises(DataError, match="needs samples"):
        pj.ShareWeights(criterion="outputs").plan(network, context(network, None))
    with pytest.raises(RecipeError, match="there is no weight"):
        pj.ShareWeights(where="nothing").plan(network, context(network))
    with pytest.raises(RecipeError, match="there is no weight") as refused:
        pj.ShareWeights(codes=256, granularity="channel").plan(network, context(network))
    assert "too few" in str(refused.value.hint)
    broken = network.replace(graph_module=network.apply([]).graph_module)
    broken.graph_module.get_parameter("7.weight").data = torch.full((10, 48), float("nan"))
    with pytest.raises(InputError, match=r"7.weight cannot be shared"):
        pj.ShareWeights(where="7").plan(broken, context(network, None))
