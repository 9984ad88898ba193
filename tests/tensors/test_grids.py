"""Grids against PyTorch's own quantization operators and against brute force."""

import math

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from penjing.tensors import grids
from penjing.tensors.grids import Grid, affine_grid, dequantize, fake_quantize, quantize, tensor_grid

decomposed = torch.ops.quantized_decomposed


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_integers_equal_those_of_torch(symmetric: bool, axis: int) -> None:
    x = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.3
    grid = tensor_grid(x, -128, 127, axis=axis, symmetric=symmetric)
    scale, zero = grid.scale, grid.zero_point
    theirs = decomposed.quantize_per_channel.default(x, scale, zero, axis, -128, 127, torch.int8)
    assert torch.equal(quantize(x, grid), theirs)
    back = decomposed.dequantize_per_channel.default(theirs, scale, zero, axis, -128, 127, torch.int8)
    assert torch.equal(dequantize(theirs, grid), back)
    fake = torch.fake_quantize_per_channel_affine(x, scale, zero.to(torch.int32), axis, -128, 127)
    assert torch.equal(fake_quantize(x, grid), fake)


def test_per_tensor_equals_torch() -> None:
    x = torch.rand(1000) * 5 - 1
    grid = tensor_grid(x, -128, 127, symmetric=False)
    arguments = (float(grid.scale), int(grid.zero_point), -128, 127, torch.int8)
    assert torch.equal(quantize(x, grid), decomposed.quantize_per_tensor.default(x, *arguments))
    fake = torch.fake_quantize_per_tensor_affine(x, *arguments[:-1])
    torch.testing.assert_close(fake_quantize(x, grid), fake, rtol=0, atol=1e-6)


def test_ranges_equal_those_of_torchs_observer() -> None:
    x = torch.randn(8, 20)
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_affine)
    observer(x)
    scale, zero = observer.calculate_qparams()
    grid = tensor_grid(x, -128, 127, axis=0, symmetric=False)
    torch.testing.assert_close(grid.scale, scale)
    assert torch.equal(grid.zero_point, zero.long())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ranges", grids.RANGES)
@pytest.mark.parametrize("axis", [None, 0])
def test_zero_stays_zero(symmetric: bool, ranges: grids.Ranges, axis: int | None) -> None:
    x = torch.randn(4, 300).abs() + 1
    x[torch.rand_like(x) < 0.5] = 0.0
    y = fake_quantize(x, tensor_grid(x, -127, 127, axis=axis, symmetric=symmetric, ranges=ranges))
    assert torch.equal(y == 0, x == 0)


def test_rounding_error_is_at_most_half_a_step() -> None:
    x = torch.randn(16, 64)
    grid = tensor_grid(x, -127, 127, axis=0)
    assert ((fake_quantize(x, grid) - x).abs() <= grid.scale[:, None] * 0.5001).all()


def test_mse_equals_a_brute_force_search() -> None:
    x = torch.distributions.StudentT(3.0).sample((1, 5000))
    found = fake_quantize(x, tensor_grid(x, -7, 7, axis=0, ranges="mse"))
    edge = x.abs().max()

    def error(y: torch.Tensor) -> float:
        return float((y - x).square().mean())

    brute = min(
        error(fake_quantize(x, affine_grid(-edge * f / 500, edge * f / 500, -7, 7, symmetric=True)))
        for f in range(20, 501)
    )
    assert error(found) <= brute * 1.05
    assert error(found) < 0.7 * error(fake_quantize(x, tensor_grid(x, -7, 7)))


@pytest.mark.parametrize("ranges", ["percentile", "entropy", "mse"])
def test_an_outlier_is_clipped(ranges: grids.Ranges) -> None:
    x = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(1)), torch.tensor([1000.0])])
    grid = tensor_grid(x, -7, 7, ranges=ranges)
    # A squared error of 1000² outweighs much: only the search by error keeps a wide range here.
    assert float(grid.scale) * 7 < (1000 if ranges == "mse" else 100) * 1.001
    assert float(grid.scale) * 7 > 1.0


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-30, 1e-42])
def test_constant_tensors(value: float) -> None:
    x = torch.full((3, 4), value)
    for symmetric in (True, False):
        grid = tensor_grid(x, -128, 127, axis=0, symmetric=symmetric)
        assert torch.isfinite(grid.scale).all() and (grid.scale > 0).all()
        torch.testing.assert_close(fake_quantize(x, grid), x, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("x", [torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.zeros(0)])
def test_values_that_have_no_grid(x: torch.Tensor) -> None:
    with pytest.raises(ValueError):
        tensor_grid(x, -128, 127)


def test_groups_are_quantized_alone() -> None:
    x = torch.randn(3, 10) * torch.logspace(-3, 3, 10)
    grid = tensor_grid(x, -127, 127, group=4)
    assert grid.scale.shape == (3, 3)
    y = fake_quantize(x, grid)
    for start in (0, 4, 8):
        part = x[:, start : start + 4]
        torch.testing.assert_close(y[:, start : start + 4], fake_quantize(part, tensor_grid(part, -127, 127, axis=0)))


def test_limits() -> None:
    assert grids.limits("int8") == (-128, 127)
    assert grids.limits("int8", narrow=True) == (-127, 127)
    assert grids.limits("uint4") == (0, 15)
    with pytest.raises(ValueError):
        grids.limits("float8")


def test_sqnr() -> None:
    x = torch.randn(10_000)
    assert grids.sqnr(x, x) == math.inf
    assert grids.sqnr(x, x * 1.1) == pytest.approx(20.0, abs=0.01)
    uniform = torch.rand(100_000) * 2 - 1
    grid: Grid = tensor_grid(uniform, -127, 127)
    assert grids.sqnr(uniform, fake_quantize(uniform, grid)) == pytest.approx(20 * math.log10(254), abs=0.2)
