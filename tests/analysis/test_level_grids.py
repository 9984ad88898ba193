"""Weights on powers of two and sums of them: least error, zeros, and through Quantize to the real runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.level_grids import LEVEL_TYPES, level_grid
from penjing.data import Data
from penjing.errors import RecipeError
from penjing.network import capture
from penjing.recipe import Context
from penjing.runtimes import get_runtime
from penjing.tensors import grids

W = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
X = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SPACINGS = ("power-of-two", "additive-powers-of-two")


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", LEVEL_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_values_are_the_nearest_multiples_of_the_levels(spacing: str, dtype: str, axis: int | None) -> None:
    pruned = W * (W.abs() > 0.4)
    grid, values, levels = level_grid(pruned, spacing, dtype, axis=axis)
    spread = grid.scale if axis is None else grid.scale.reshape([-1 if d == axis else 1 for d in range(2)])
    assert len(levels) <= 2 ** int(dtype[3:])
    nearest = (pruned[..., None] - spread[..., None] * levels).abs().amin(-1)
    torch.testing.assert_close((values - pruned).abs(), nearest, atol=1e-6, rtol=1e-5)
    assert bool((values[pruned == 0] == 0).all())


def test_sums_of_powers_of_two_suit_bells_and_powers_do_not() -> None:
    """The claim of Li, Dong & Wang 2020: at 4 bits better than even levels of all the range, and than powers alone."""
    wide = torch.randn(6, 1000, generator=torch.Generator().manual_seed(3))
    found = {s: grids.sqnr(wide, level_grid(wide, s, "int4", axis=0)[1]) for s in SPACINGS}
    even = grids.sqnr(wide, grids.fake_quantize(wide, grids.tensor_grid(wide, -7, 7, axis=0)))
    assert found["additive-powers-of-two"] > even + 1
    assert found["additive-powers-of-two"] > found["power-of-two"] + 1


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_quantize_puts_weights_on_them(spacing: str, activations: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 6, 2), nn.Flatten(), nn.Linear(294, 5))
    network = capture(model.eval(), inputs=(X[:2],))
    step = pj.Quantize(weights="int4", levels=spacing, activations=activations)
    plan = step.plan(network, Context(original=network, data=Data(X)))
    after = network.apply(plan.edits)
    assert set(after.code_bits().values()) == {4}
    assert all(f"{spacing} levels: computed in float" in r.why for r in plan.reasons)
    _, values, levels = level_grid(network.tensors()["2.weight"].detach(), spacing, "int4", axis=1)
    held = after.tensors()
    got = held["2.weight_levels"][0][held["2.weight"].long()] * held["2.weight_scale"].detach()
    torch.testing.assert_close(got, values)
    assert set(held["2.weight_levels"].flatten().tolist()) == set(levels.tolist())
    for runtime in ("onnxruntime", "openvino"):
        made = get_runtime(runtime).export(after, tmp_path / f"{runtime}.onnx", samples=X)
        assert made.parity.agreement == 1.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"levels": "log"}, "must be one of"),
        ({"weights": "int16"}, "2 to 8 bits"),
        ({"weights": "ternary"}, "2 to 8 bits"),
        ({"granularity": "group:8"}, "a scale for each channel or tensor"),
        ({"scales": "power-of-two"}, "no other grid"),
        ({"symmetric": False}, "no other grid"),
    ],
)
def test_other_grids_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        pj.Quantize(**({"weights": "int4", "levels": "power-of-two"} | fields))


@pytest.mark.parametrize(
    ("weight", "dtype", "words"),
    [(W, "int16", "no levels"), (W[:0], "int4", "empty"), (W * float("nan"), "int4", "NaN")],
)
def test_what_has_no_levels_is_refused(weight: torch.Tensor, dtype: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        level_grid(weight, SPACINGS[0], dtype)
