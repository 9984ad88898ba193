"""Observers: order does not matter, memory does not grow, ranges agree with those of the whole tensor."""

import math

import pytest
import torch

from penjing.tensors.grids import RANGES, Ranges, affine_grid, fake_quantize, sqnr
from penjing.tensors.observers import BINS, Observer


def watch(*parts: torch.Tensor, histogram: bool = True) -> Observer:
    observer = Observer(histogram=histogram)
    for part in parts:
        observer.update(part)
    return observer


@pytest.mark.parametrize("ranges", RANGES)
def test_order_and_batch_size_do_not_matter(ranges: Ranges) -> None:
    x = torch.distributions.StudentT(2.0).sample((5000,)) * 0.01
    whole = watch(x).range(ranges)
    assert watch(*x.sort().values.split(7)).range(ranges) == whole
    assert watch(*x.sort(descending=True).values.split(500)).range(ranges) == whole


@pytest.mark.parametrize("ranges", RANGES)
def test_merging_equals_watching_both(ranges: Ranges) -> None:
    small, large = torch.rand(1000) * 1e-3, torch.randn(1000) * 70
    for first, second in ((small, large), (large, small)):
        merged = watch(first)
        other = watch(second)
        merged.merge(other)
        assert merged.range(ranges) == watch(first, second).range(ranges)
        assert merged.count == 2000 and other.count == 1000


def test_minimum_and_maximum_are_exact() -> None:
    x = torch.randn(3, 1000) + 5
    assert watch(x, histogram=False).range("minmax") == (float(x.min()), float(x.max()))


def test_the_histogram_has_a_fixed_size() -> None:
    observer = watch(*(torch.randn(100) * 10.0**i for i in range(-9, 9)))
    assert observer._counts is not None and observer._counts.numel() == 2 * BINS
    assert int(observer._counts.sum()) == observer.count == 1800


def test_percentile_agrees_with_the_quantiles() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    low, high = watch(*x.split(999)).range("percentile")
    expected = torch.quantile(x[:, None], torch.tensor([0.5e-4, 1 - 0.5e-4]), dim=0).flatten()
    assert low == pytest.approx(float(expected[0]), abs=0.02) and high == pytest.approx(float(expected[1]), abs=0.02)


def test_mse_is_near_the_best_range() -> None:
    x = torch.distributions.Exponential(1.0).sample((100_000,))
    low, high = watch(x).range("mse", levels=16)

    def error(end: float) -> float:
        grid = affine_grid(torch.tensor(0.0), torch.tensor(end), 0, 15)
        return float((fake_quantize(x, grid) - x).square().mean())

    best = min(error(float(x.max()) * f / 200) for f in range(10, 201))
    assert low == pytest.approx(0.0, abs=1e-3)
    assert error(high) <= best * 1.05 < error(float(x.max()))


@pytest.mark.parametrize("ranges", ["percentile", "entropy"])
def test_outliers_are_cut(ranges: Ranges) -> None:
    x = torch.cat([torch.randn(100_000).abs(), torch.tensor([50.0])])
    low, high = watch(x).range(ranges)
    assert low >= 0.0 and 2.0 < high < 12.0


def test_broken_values_are_counted_and_left_out() -> None:
    observer = watch(torch.tensor([1.0, math.nan, -2.0, math.inf]))
    assert observer.broken == 2 and observer.range("minmax") == (-2.0, 1.0)


def test_nothing_seen() -> None:
    with pytest.raises(ValueError):
        Observer().range("minmax")


def test_constant_values() -> None:
    for value in (0.0, 3.0, -1e-20):
        for ranges in RANGES:
            assert watch(torch.full((10,), value)).range(ranges) == (pytest.approx(value), pytest.approx(value))


@pytest.mark.parametrize("ranges", RANGES)
def test_a_peak_at_zero_does_not_ruin_the_range(ranges: Ranges) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(5)).relu()  # half of it exactly zero
    low, high = watch(x).range(ranges)
    grid = affine_grid(torch.tensor(low), torch.tensor(high), -128, 127)
    assert sqnr(x, fake_quantize(x, grid)) > 30.0
