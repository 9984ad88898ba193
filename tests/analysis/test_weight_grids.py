"""Grids of weights by the name of their type: ranges, least squares, powers of two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penjing.analysis.weight_grids import granularity, limits, on_grid, power_of_two, shifts, weight_grid
from penjing.tensors import grids
from penjing.tensors.grids import fake_quantize

W = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))


def error(values: Tensor) -> float:
    return float((values - W).square().sum())


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_no_other_scale_has_less_error(kind: str, axis: int | None) -> None:
    grid = weight_grid(W, kind, axis=axis)
    values = on_grid(W, grid, kind)
    least = error(values)
    codes = (values / grids.dequantize(torch.ones_like(W, dtype=torch.int8), grid)).round()
    assert set(codes.unique().tolist()) == ({-1.0, 1.0} if kind == "binary" else {-1.0, 0.0, 1.0})
    for factor in torch.linspace(0.5, 2.0, 61).tolist():
        other = grids.Grid(grid.scale * factor, grid.zero_point, -1, 1, axis)
        tried = fake_quantize(W, other) if kind == "ternary" else grids.dequantize(W.sign().to(torch.int8), other)
        assert error(tried) >= least - 1e-5


def test_ternary_is_the_best_of_all_thresholds() -> None:
    row = W[:1]
    best = min(
        float((row - s * (row.sign() * (row.abs() >= t))).square().sum())
        for t in row.abs().flatten().tolist()
        for s in [float(row.abs()[row.abs() >= t].mean())]
    )
    found = on_grid(row, weight_grid(row, "ternary", axis=0), "ternary")
    assert float((row - found).square().sum()) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "ternary", "binary"])
@pytest.mark.parametrize("group", [0, 4])
def test_zeros_stay_zero(kind: str, group: int) -> None:
    pruned = W * (W.abs() > 0.6)
    pruned[2] = 0.0
    values = on_grid(pruned, weight_grid(pruned, kind, axis=0, group=group), kind)
    assert bool((values[pruned == 0.0] == 0.0).all())
    assert bool(torch.isfinite(values).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "int2"])
def test_minmax_covers_everything(kind: str, symmetric: bool) -> None:
    grid = weight_grid(W, kind, axis=0, symmetric=symmetric)
    assert bool(((on_grid(W, grid, kind) - W).abs() <= grid.scale[:, None] * 0.5001 + 1e-6).all()) or not symmetric
    assert (grid.quant_min, grid.quant_max) == limits(kind, symmetric)
    assert not symmetric or not bool(grid.zero_point.any())


def test_a_group_as_long_as_a_row_is_a_scale_a_row() -> None:
    whole, rows = weight_grid(W, "int4", axis=1, group=10), weight_grid(W, "int4", axis=0)
    assert (whole.axis, whole.group) == (0, 0) and torch.equal(whole.scale, rows.scale)
    assert weight_grid(W, "int4", axis=0, group=4).scale.shape == (6, 3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_powers_of_two_are_rounded_up_and_cover_the_range(symmetric: bool) -> None:
    float_grid = weight_grid(W + 0.4, "int6", axis=0, symmetric=symmetric)
    grid = power_of_two(float_grid)
    assert bool((torch.log2(grid.scale) == torch.log2(grid.scale).round()).all())
    assert bool((grid.scale >= float_grid.scale).all()) and bool((grid.scale < 2 * float_grid.scale).all())
    for end in (float_grid.quant_min, float_grid.quant_max):
        reached = (end - float_grid.zero_point) * float_grid.scale
        nearest = fake_quantize(reached[:, None].expand(6, 10).contiguous(), grid)[:, 0]
        assert bool(((nearest - reached).abs() <= grid.scale * 1.0001).all())
    exact = grids.Grid(torch.tensor([0.25, 2.0**-9]), torch.zeros(2, dtype=torch.int64), -8, 7, 0)
    assert torch.equal(power_of_two(exact).scale, exact.scale)
    assert shifts(exact) == "shifts 2 to 9"


def test_granularity_as_text() -> None:
    assert granularity("channel") == (True, 0) and granularity("tensor") == (False, 0)
    assert granularity("group:64") == (True, 64)
    assert granularity("group:0") is None and granularity("groups") is None
