"""Quantize below and above 8 bits: every width runs, tells its choice, composes with pruning and packs small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.weight_grids import WEIGHT_TYPES
from penjing.data import Data
from penjing.methods.quantize import Quantize
from penjing.network import Network, QuantizeTensor, capture
from penjing.recipe import Context, Plan, Recipe

X = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def block() -> Network:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)]
    return capture(nn.Sequential(*layers).eval(), (X[:2],))


def planned(network: Network, **fields: object) -> tuple[Plan, Network]:
    plan = Quantize(**fields).plan(network, Context(original=network, data=Data(X)))  # type: ignore[arg-type]
    return plan, network.apply(plan.edits)


def loss(network: Network, other: Network) -> float:
    a, b = network.run(X)[0], other.run(X)[0]
    return float((a - b).norm() / a.norm())


def test_more_bits_are_nearer_to_float() -> None:
    network = block()
    losses = {w: loss(network, planned(network, weights=w, ranges="mse")[1]) for w in WEIGHT_TYPES}
    assert losses["int16"] < 0.02 and losses["int8"] < 0.05
    assert losses["int8"] < losses["int6"] < losses["int4"] < losses["int3"] < losses["int2"]
    fine = loss(network, planned(network, weights="int4", activations=None, granularity="group:16")[1])
    coarse = loss(network, planned(network, weights="int4", activations=None, granularity="tensor")[1])
    assert fine < coarse


@pytest.mark.parametrize("activations", ["int16", "int8", "int4"])
def test_activations_of_every_width(activations: str) -> None:
    network = block()
    plan, quantized = planned(network, weights="int16", activations=activations, ranges="mse")
    levels = {e.quant_max - e.quant_min for e in plan.edits if isinstance(e, QuantizeTensor) and e.users is None}
    assert 2 ** int(activations.removeprefix("int")) - 1 in levels
    assert loss(network, quantized) < {"int16": 1e-3, "int8": 0.03, "int4": 0.5}[activations]


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
@pytest.mark.parametrize("granularity", ["channel", "group:16"])
def test_pruned_weights_stay_zero(weights: str, granularity: str) -> None:
    network = block()
    pruned = pj.PruneWeights(sparsity=0.5).plan(network, Context(original=network))
    network = network.apply(pruned.edits)
    zeros = {n: m == 0 for n, m in network.masks.items()}
    plan, quantized = planned(network, weights=weights, activations=None, granularity=granularity)
    assert zeros and all(bool((quantized.tensors()[n][z] == 0).all()) for n, z in zeros.items())
    assert all(weights in r.choice for r in plan.reasons)
    for reason in plan.reasons:
        count = int(zeros[f"{reason.layer}.weight"].sum())
        said = f"its {count} zeros stay, so that it is stored as ternary (-1, 0, 1)" in reason.why
        assert said == (weights == "binary")
    if weights == "binary":
        assert set(quantized.code_kinds().values()) == {"ternary"}


def test_reasons_name_groups_and_shifts() -> None:
    plan, quantized = planned(block(), weights="int4", granularity="group:16", scales="power-of-two")
    linear = next(r for r in plan.reasons if r.layer == "6")
    assert "int4 weights per group of 16" in linear.choice and "groups: computed in float" in linear.why
    assert "shift" in linear.why
    for edit in plan.edits:
        if isinstance(edit, QuantizeTensor):
            exponent = torch.log2(torch.as_tensor(edit.scale))
            assert bool((exponent == exponent.round()).all())
    depthwise = next(r for r in plan.reasons if r.layer == "3")
    assert "per channel" in depthwise.choice, "a group as long as a row is a channel"


def test_saved_plans_and_recipes_hold_the_new_fields(tmp_path: Path) -> None:
    network = block()
    plan, quantized = planned(network, weights="int4", granularity="group:16", activations=None)
    again = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    torch.testing.assert_close(network.apply(again.edits).run(X), quantized.run(X), rtol=0, atol=0)
    recipe = Recipe(Quantize(weights="ternary", activations="int4", granularity="group:8", scales="power-of-two"))
    assert Recipe.from_dict(recipe.to_dict()).steps == recipe.steps


def test_a_binary_network_takes_a_bit_a_weight() -> None:
    network = block()
    plan, quantized = planned(network, weights="binary", activations=None)
    assert not any("ternary" in r.why for r in plan.reasons)
    assert set(quantized.code_bits().values()) == {1}
    sizes = quantized.stored_bytes()
    assert sizes["6.weight"] == 5 * 288 // 8
