"""Quantize with roundings that look at outputs, and with a type for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from residual_network import LAYERS, X, network, off, planned

from penjing.errors import DataError, RecipeError
from penjing.methods.quantize import Quantize
from penjing.network import MaskWeights, QuantizeTensor
from penjing.recipe import Context, Plan, Recipe
from penjing.runtimes import get_runtime
from penjing.tensors.saturation import may_saturate


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


@pytest.mark.parametrize("rounding", ["gptq", "adaround", "brecq"])
def test_grids_found_in_every_run_come_to_weights_rounded_with_float_inputs(rounding: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"weights": "int4", "rounding": rounding, "steps": 20}
    nearest, _ = planned(Quantize(weights="int4", activations="dynamic"))
    plan, quantized = planned(Quantize(**fields, activations="dynamic"))
    alone = planned(Quantize(**fields, activations=None))[1]
    for name in LAYERS:
        assert torch.equal(quantized.tensors()[f"{name}.weight"], alone.tensors()[f"{name}.weight"])
    found = [[e.users for e in p.edits if isinstance(e, QuantizeTensor) and e.dynamic] for p in (plan, nearest)]
    assert found[0] == found[1] == [("linear",)]
    assert [r.choice for r in plan.reasons if r.layer == "head"] == ["int4 weights per channel, dynamic inputs"]
    made = get_runtime("onnxruntime").export(quantized, tmp_path / "net.onnx", samples=X)
    assert made.parity.agreement == 1.0


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
