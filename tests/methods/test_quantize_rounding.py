"""Quantize with roundings that look at outputs, and with a type for each layer; MixPrecision, which chooses them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.methods.mix_precision import MixPrecision
from penjing.methods.quantize import Quantize
from penjing.network import MaskWeights, Network, QuantizeTensor
from penjing.recipe import Context, Plan, Recipe
from penjing.tensors.saturation import may_saturate

# Neighbouring pixels are alike: on white noise nearest rounding would be the best there is.
X = nn.functional.avg_pool2d(torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0)), 5, 1) * 5
LAYERS = ("stem", "a", "b", "head")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.b(self.a(x).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


@functools.cache
def network() -> Network:
    torch.manual_seed(0)
    module = Residual()
    module(X)  # gives the batch norm something to remember
    return pj.capture(module.eval(), inputs=(X[:2],))


def planned(step: pj.Step, start: Network | None = None) -> tuple[Plan, Network]:
    start = start or network()
    plan = step.plan(start, Context(original=start, data=Data(X)))
    return plan, start.apply(plan.edits)


def off(quantized: Network) -> float:
    """Mean squared difference of the outputs on samples."""
    return float((quantized(X) - network()(X)).square().mean())


def types(plan: Plan) -> dict[str, tuple[int, int]]:
    found = {e.tensor: e for e in plan.edits if isinstance(e, QuantizeTensor) and e.tensor.endswith("weight")}
    return {n.removesuffix(".weight"): (e.quant_min, e.quant_max) for n, e in found.items()}


@pytest.mark.parametrize("activations", ["int8", None])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("rounding", ["gptq", "adaround", "brecq"])
def test_rounding_by_outputs_is_nearer(rounding: str, granularity: str, activations: str | None) -> None:
    fields: dict[str, Any] = {"weights": "int3", "granularity": granularity, "activations": activations}
    nearest = planned(Quantize(**fields, correct_scale=False))[1]
    plan, quantized = planned(Quantize(**fields, rounding=rounding, steps=60))
    assert off(quantized) < 0.7 * off(nearest)
    assert set(types(plan).values()) == {(-4, 3)}
    assert f"4 of 4 weights rounded by {rounding}" in plan.notes
    for name in LAYERS:  # what is stored are integers of three bits
        codes = quantized.tensors()[f"{name}.weight"]
        assert not codes.is_floating_point()
        assert int(codes.min()) >= -4 and int(codes.max()) <= 3


@pytest.mark.parametrize("rounding", ["gptq", "brecq"])
def test_groups_and_asymmetric_weights(rounding: str) -> None:
    fields: dict[str, Any] = {"weights": "int3", "granularity": "group:16", "symmetric": False, "activations": None}
    nearest, learned = (planned(Quantize(**fields, rounding=r, steps=60))[1] for r in ("nearest", rounding))
    assert off(learned) < off(nearest)


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround", "brecq"])
def test_masked_weights_stay_zero(rounding: str) -> None:
    mask = torch.rand(12, 8, 3, 3, generator=torch.Generator().manual_seed(2)) > 0.5
    start = network().apply([MaskWeights(parameter="a.weight", mask=mask)])
    _, quantized = planned(Quantize(weights="int4", rounding=rounding, steps=20), start)
    assert (quantized.tensors()["a.weight"][~mask] == 0).all()
    assert (quantized.tensors()["a.weight"][mask] != 0).float().mean() > 0.5


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "brecq"])
def test_scales_stay_powers_of_two(rounding: str) -> None:
    plan, _ = planned(Quantize(weights="int4", rounding=rounding, scales="power-of-two", steps=10))
    for edit in plan.edits:
        if isinstance(edit, QuantizeTensor) and edit.tensor.endswith("weight"):
            exponent = torch.log2(torch.as_tensor(edit.scale))
            assert torch.equal(exponent, exponent.round())


def test_types_by_pattern() -> None:
    plan, quantized = planned(Quantize(weights={"*": "int4", "head": "int8", "stem.weight": "ternary"}))
    assert types(plan) == {"stem": (-1, 1), "a": (-8, 7), "b": (-8, 7), "head": (-127, 127)}
    assert quantized.run(X)[0].shape == (96, 5)
    plan, quantized = planned(Quantize(weights={"a": "int4"}, activations=None))
    assert types(plan) == {"a": (-8, 7)}
    assert quantized.tensors()["b.weight"].is_floating_point()
    assert any(r.choice == "float32" and "no pattern" in r.why for r in plan.reasons)


def test_patterns_are_read_from_recipes() -> None:
    step = Quantize(weights={"*": "int4", "head": "int8"}, edges="int8")
    assert Recipe.from_dict(Recipe(step).to_dict()).steps == (step,)


@pytest.mark.parametrize("rounding", ["nearest", "brecq"])
def test_first_and_last_layer_have_a_type_of_their_own(rounding: str) -> None:
    fields: dict[str, Any] = {"weights": "int4", "activations": "int4", "edges": "int8", "rounding": rounding}
    plan, quantized = planned(Quantize(**fields, steps=20))
    assert types(plan) == {"stem": (-127, 127), "a": (-8, 7), "b": (-8, 7), "head": (-127, 127)}
    widths = {e.tensor: e.quant_max - e.quant_min for e in plan.edits if isinstance(e, QuantizeTensor)}
    narrow = {name for name, width in widths.items() if width == 15}
    assert "x" not in narrow and len(narrow - {"a.weight", "b.weight"}) >= 2  # what a and b read, not the input
    stem = quantized.tensors()["stem.weight"]
    assert not may_saturate(stem, 0)  # headroom outlives the rounding


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": {"*": "int5"}}, "weights must be one of int16, int8"),
        ({"weights": "int7"}, "weights must be one of int16, int8"),
        ({"rounding": "stochastic"}, "rounding must be one of nearest, gptq, adaround, brecq"),
        ({"edges": "int9"}, "edges must be one of"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"rounding": "gptq", "activations": "dynamic"}, "dynamic ones have none yet"),
        ({"weights": "ternary", "symmetric": False}, "ternary weights are symmetric"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantize(**fields)


def test_rounding_by_outputs_needs_samples() -> None:
    step = Quantize(weights="int4", activations=None, rounding="gptq")
    with pytest.raises(DataError, match="needs samples for rounding='gptq'"):
        step.plan(network(), Context(original=network()))


# ----------------------------------------------------------------------------------------------------- mixed precision
def mixed(**fields: Any) -> MixPrecision:
    quantize = Quantize(activations=None, granularity="tensor")
    return MixPrecision(**{"quantize": quantize, "weights": ["int8", "int4", "int2"], "probes": 200, **fields})


@pytest.mark.parametrize("criterion", ["expected", "measured"])
def test_mixed_is_better_than_uniform_at_the_same_bits(criterion: str) -> None:
    plan, quantized = planned(mixed(keep_bits=4.0, criterion=criterion))
    uniform = planned(Quantize(weights="int4", activations=None, granularity="tensor"))[1]
    held = {n: t.numel() for n, t in network().tensors().items() if n.endswith("weight") and t.ndim > 1}
    bits = sum(quantized.code_bits()[n] * size for n, size in held.items()) / sum(held.values())
    assert bits <= 4.0
    assert off(quantized) < off(uniform)
    assert len(set(types(plan).values())) > 1


@pytest.mark.parametrize("criterion", ["expected", "measured"])
def test_fewer_bits_do_more_harm(criterion: str) -> None:
    """Also where a batch norm scales what is rounded."""
    torch.manual_seed(0)
    module = Residual()
    module(X)
    module.norm.weight.data.copy_(torch.linspace(0.2, 8.0, 8))
    plan, _ = planned(mixed(keep_bits=4.0, criterion=criterion), pj.capture(module.eval(), inputs=(X[:2],)))
    told = [r.why for r in plan.reasons if r.choice == "harm of each type"]
    assert len(told) == len(LAYERS)
    for why in told:
        eight, four, two = (float(part.split()[1]) for part in why.split(", "))
        assert eight < 0.1 * four < 0.1 * two


def test_wider_budgets_do_less_harm() -> None:
    harms = [off(planned(mixed(keep_bits=b))[1]) for b in (2.0, 3.0, 5.0, 8.0)]
    assert harms == sorted(harms, reverse=True)


def test_bytes_and_bit_operations() -> None:
    sizes = [planned(mixed(keep_bytes=share))[1].stored_bytes()["a.weight"] for share in (0.1, 0.2, 0.26)]
    assert sizes == sorted(sizes)
    plan, _ = planned(mixed(keep_bops=0.16))  # weights of 5 bits or fewer against 32, activations of 32
    assert len(set(types(plan).values())) > 1
    with pytest.raises(RecipeError, match="keep_bits=1.5 cannot be met by int8, int4, int2") as caught:
        planned(mixed(keep_bits=1.5))
    assert "the least that can be reached is 2" in (caught.value.hint or "")


def test_the_range_rule() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with torch.no_grad():
        module[2].weight[0, 0] = 100.0
    plain = pj.capture(module, inputs=(torch.rand(2, 16),))
    step = MixPrecision(quantize=Quantize(activations=None), weights=["int8", "int16"], criterion="range")
    plan = step.plan(plain, Context(original=plain))
    assert types(plan) == {"0": (-127, 127), "2": (-32767, 32767)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "MixPrecision needs a budget"),
        ({"keep_bits": 4.0, "criterion": "range"}, "is a rule without one"),
        ({"keep_bits": 4.0, "weights": ["int8"]}, "at least two types"),
        ({"keep_bits": 4.0, "weights": ["int8", "int5"]}, "Quantize.weights must be one of"),
        ({"keep_bits": 4.0, "quantize": pj.PruneWeights(sparsity=0.5)}, "must be a Step that quantizes weights"),
        ({"keep_bops": 1.5}, "keep_bops must be between 0 and 1"),
        ({"keep_bits": 4.0, "where": "a"}, "give it to quantize"),
    ],
)
def test_bad_mixtures(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        mixed(**fields)


def test_mixtures_in_recipes() -> None:
    step = mixed(keep_bits=4.0)
    assert Recipe.from_dict(Recipe(step).to_dict()).steps == (step,)
    with pytest.raises(DataError, match="needs samples to see"):
        step.plan(network(), Context(original=network()))
