"""MixPrecision: types of layers under budgets, against one type for all and against what the budgets count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from residual_network import LAYERS, Residual, X, network, off, planned
from torch import nn

import penjing as pj
from penjing.data import Data
from penjing.errors import DataError, RecipeError, TargetError
from penjing.methods import mix_precision
from penjing.methods.mix_precision import MixPrecision
from penjing.methods.quantize import Quantize
from penjing.network import Network, QuantizeTensor
from penjing.recipe import Context, Plan, Recipe
from penjing.runtimes import layer_latency
from penjing.runtimes.timing import Timings


def types(plan: Plan) -> dict[str, tuple[int, int]]:
    found = {e.tensor: e for e in plan.edits if isinstance(e, QuantizeTensor) and e.tensor.endswith("weight")}
    return {n.removesuffix(".weight"): (e.quant_min, e.quant_max) for n, e in found.items()}


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


# --------------------------------------------------------------------------------------------------- as good as uniform
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("activations", ["int8", None])
@pytest.mark.parametrize("criterion", ["expected", "measured"])
def test_mixed_is_never_worse_than_uniform(rounding: str, activations: str | None, criterion: str) -> None:
    fields: dict[str, Any] = {"rounding": rounding, "activations": activations, "granularity": "tensor"}
    kinds = ["int8", "int6", "int4", "int3", "int2"]
    plan, found = planned(mixed(quantize=Quantize(**fields), weights=kinds, keep_bits=4.0, criterion=criterion))
    assert off(found) <= off(planned(Quantize(weights="int4", **fields))[1])
    assert found.stored_bytes()["a.weight"] > 0


def test_what_is_worse_than_uniform_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With harms turned upside down the programme chooses the worst there is: one type for all is taken instead."""

    def upside_down(*_: object, **__: object) -> dict[str, list[float]]:
        return {f"{n}.weight": [2.0, 1.0, 0.0] for n in LAYERS}

    monkeypatch.setattr(mix_precision, "expected_harms", upside_down)
    plan, found = planned(mixed(keep_bits=4.0))
    assert set(types(plan).values()) == {(-8, 7)}
    told = next(note for note in plan.notes if note.startswith("harm to the outputs"))
    assert told.index("int4 everywhere") < told.index("mixed")
    uniform = planned(Quantize(weights="int4", activations=None, granularity="tensor"))[1]
    assert off(found) == off(uniform)


# ---------------------------------------------------------------------------------------------------- what stays float
def test_layers_may_stay_float() -> None:
    sizes = {n: t.numel() for n, t in network().tensors().items() if n.endswith("weight") and t.ndim > 1}
    whole = sum(sizes.values())
    keep = (32 * sizes["stem.weight"] + 4 * (whole - sizes["stem.weight"])) / whole
    harms = {n: [0.0, 1e-3, 1.0] for n in sizes} | {"stem.weight": [0.0, 50.0, 100.0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix_precision, "expected_harms", lambda *_, **__: harms)
        step = mixed(quantize=Quantize(), weights=["float", "int4", "int2"], keep_bits=keep)
        plan, _ = planned(step)
    assert types(plan) == dict.fromkeys(("a", "b", "head"), (-8, 7))
    assert plan.notes[0].startswith("1 float, 3 int4: ")
    # The float layer's input is no grid's: what it gives is exactly that of the float network.
    quantized = {e.tensor for e in plan.edits if isinstance(e, QuantizeTensor)}
    assert "x" not in quantized and "stem.weight" not in quantized


def test_a_budget_that_asks_for_nothing_changes_nothing() -> None:
    plan, found = planned(mixed(weights=["float", "int8"], keep_bits=32.0))
    assert plan.edits == () and plan.notes[0] == "4 float: 32 bits a weight"
    assert torch.equal(found(X), network()(X))


def test_layers_with_a_type_of_their_own_keep_it() -> None:
    quantize = Quantize(edges="int8", activations=None)
    plan, _ = planned(mixed(quantize=quantize, weights=["float", "int4", "int2"], keep_bits=6.0))
    found = types(plan)
    assert found["stem"] == found["head"] == (-127, 127)
    assert set(found) - {"stem", "head"} <= {"a", "b"}


# ------------------------------------------------------------------------------------------------------------- latency
@pytest.fixture()
def bytes_as_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts the bytes that a network stores: a budget of latency is then one of bytes."""

    def interleave(runs: dict[str, Network], **_: object) -> dict[str, Timings]:
        counts = {name: np.array([float(sum(n.stored_bytes().values()))]) for name, n in runs.items()}
        return {name: Timings(count, count) for name, count in counts.items()}

    monkeypatch.setattr(layer_latency._Bench, "opened", lambda bench, network: network)
    monkeypatch.setattr(layer_latency, "interleave", interleave)


def size(found: Network) -> float:
    return sum(found.stored_bytes().values()) / sum(network().stored_bytes().values())


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_the_measured_whole_is_held_to_the_limit(bytes_as_time: None, keep: float) -> None:
    step = mixed(weights=["float", "int8"], keep_latency=keep, target="torch")
    plan, found = planned(step)
    assert size(found) <= keep
    assert any("measured" in note and f"at most {keep:.1%} was asked for" in note for note in plan.notes)
    uniform = planned(Quantize(weights="int8", activations=None, granularity="tensor"))[1]
    assert off(found) <= off(uniform)
    if keep == 0.8:  # there is room for floats
        assert 0 < len(types(plan)) < 4 and size(found) > 0.5


def test_more_time_does_less_harm(bytes_as_time: None) -> None:
    harms = [
        off(planned(mixed(weights=["float", "int8", "int4"], keep_latency=keep, target="torch"))[1])
        for keep in (0.2, 0.4, 0.9, 1.0)
    ]
    assert harms == sorted(harms, reverse=True) and harms[-1] == 0


def test_budgets_of_latency_and_bytes_hold_together(bytes_as_time: None) -> None:
    step = mixed(weights=["float", "int8", "int4"], keep_latency=0.9, keep_bytes=0.2, target="torch")
    _, found = planned(step)
    assert size(found) < 0.3


def test_latency_out_of_reach(bytes_as_time: None) -> None:
    with pytest.raises(RecipeError, match="keep_latency=0.05 cannot be met by float, int8") as caught:
        planned(mixed(weights=["float", "int8"], keep_latency=0.05, target="torch"))
    least = size(planned(Quantize(weights="int8", activations=None, granularity="tensor"))[1])
    assert f"the least that can be reached is {least:.4g}" in (caught.value.hint or "")
    with pytest.raises(RecipeError, match="keep_latency needs a target"):
        mixed(keep_latency=0.5)
    with pytest.raises(TargetError):
        mixed(keep_latency=0.5, target="opanvino")


def alone(layer: Network) -> Network:
    plan = Quantize().plan(layer, Context(original=layer, data=Data([(layer.example(8), None)])))
    return layer.apply(plan.edits)


def test_measured_on_a_runtime() -> None:
    """On a real one; no time is asserted, only that the table ends at what whole networks took."""
    start = network()
    ways = [start, planned(Quantize())[1]]
    names = [f"{n}.weight" for n in LAYERS]

    found = layer_latency.latency_by_way(
        start, start, names, ways, [lambda layer: layer, alone], pj.Target(runtime="torch", threads=1)
    )
    assert set(found.layers) == set(names) and len(found.wholes) == 2
    for i, whole in enumerate(found.wholes):
        total = found.constant + sum(row[i] for row in found.layers.values())
        assert total == pytest.approx(max(whole, found.constant))
    assert found.measure(ways[1]) > 0
