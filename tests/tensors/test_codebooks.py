"""Levels found and fixed: against exhaustive search, published tables and uniform grids."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from penjing.tensors.codebooks import additive_powers_of_two, decode, encode, kmeans, powers_of_two, scaled
from penjing.tensors.grids import fake_quantize, limits, tensor_grid


def best_error(row: Tensor, codes: int) -> float:
    """The least squared error of any partition of the sorted row into `codes` neighbouring cells."""
    values = row.double().sort().values
    found = torch.inf
    for cuts in itertools.combinations(range(1, len(values)), codes - 1):
        edges = (0, *cuts, len(values))
        cells = (values[a:b] for a, b in itertools.pairwise(edges))
        found = min(found, float(sum((c - c.mean()).square().sum() for c in cells)))
    return found


@pytest.mark.parametrize("codes", [2, 3, 4])
def test_kmeans_comes_near_the_best_partition(codes: int) -> None:
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    levels = kmeans(x, codes)
    error = (decode(encode(x, levels), levels) - x).square().sum(1)
    best = torch.tensor([best_error(row, codes) for row in x])
    assert (error >= best - 1e-5).all()
    assert (error <= best * 1.001 + 1e-6).float().mean() > 0.6  # Lloyd's iterations end in local minima
    assert error.sum() < 1.15 * best.sum()


def test_kmeans_beats_a_uniform_grid() -> None:
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(1))
    levels = kmeans(x, 16)
    uniform = fake_quantize(x, tensor_grid(x, *limits("int4"), axis=0, symmetric=False, ranges="mse"))
    error = (decode(encode(x, levels), levels) - x).square().mean()
    assert error < 0.9 * (uniform - x).square().mean()
    assert error == pytest.approx(0.00955, rel=0.05)  # Lloyd–Max for a normal density, 16 levels (Max 1960)


def test_importance_weighs_errors() -> None:
    x = torch.linspace(0, 1, 1000)[None]
    weight = torch.where(x > 0.5, 100.0, 1.0)

    def error(levels: Tensor) -> float:
        return float((weight * (decode(encode(x, levels), levels) - x).square()).sum())

    assert error(kmeans(x, 8, importance=weight)) < 0.6 * error(kmeans(x, 8))


def test_zero_is_a_level() -> None:
    x = torch.randn(8, 200, generator=torch.Generator().manual_seed(2)) + 0.3
    x[:, ::3] = 0.0
    levels = kmeans(x, 5, zero=True)
    assert ((levels == 0).sum(1) == 1).all()
    assert (decode(encode(x, levels), levels)[:, ::3] == 0).all()


def test_rows_with_fewer_values_than_codes_are_exact() -> None:
    x = torch.tensor([[1.0, -2.0, 1.0, 5.0], [3.0, 3.0, 3.0, 3.0]])
    levels = kmeans(x, 8)
    assert torch.equal(decode(encode(x, levels), levels), x)


@pytest.mark.parametrize("x", [torch.tensor([[1.0, float("nan")]]), torch.zeros(2, 0), torch.zeros(3)])
def test_bad_values_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"finite|k-means wants"):
        kmeans(x, 4)


def test_powers_of_two() -> None:
    assert powers_of_two(2).tolist() == [-1, 0, 1]
    assert powers_of_two(4).tolist() == [-1, -0.5, -0.25, -0.125, -0.0625, -0.03125, -0.015625, 0] + [
        2.0**-i for i in range(6, -1, -1)
    ]
    with pytest.raises(ValueError, match="at least 2 bits"):
        powers_of_two(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_additive_powers_of_two(bits: int) -> None:
    levels = additive_powers_of_two(bits)
    assert len(levels) == 2**bits - 1  # zero has both signs
    assert torch.equal(levels, -levels.flip(0))
    assert levels.amax() == 1
    assert (levels.diff() > 0).all()


def test_additive_powers_of_two_of_five_bits_are_those_published() -> None:
    """Li et al. 2020, §2.2: k = 2, n = 2: {0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}, scaled to end at 1."""
    table = sorted({a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32)})
    positive = additive_powers_of_two(5)[15:]
    assert positive.tolist() == pytest.approx([v / 1.5 for v in table])


@pytest.mark.parametrize("levels", [powers_of_two(4), additive_powers_of_two(4)])
def test_scales_are_better_than_the_largest_magnitude(levels: Tensor) -> None:
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(3))
    x[0] = 0.0

    def error(scale: Tensor) -> Tensor:
        near = x / scale[:, None]
        return ((decode(encode(near, levels), levels) - near) * scale[:, None]).square().sum(1)

    scale = scaled(x, levels)
    assert (error(scale) <= error(x.abs().amax(1).clamp(min=1e-9)) + 1e-6).all()
    assert scale[0] > 0
    nearby = torch.stack([error(scale * f) for f in (0.9, 0.97, 1.03, 1.1)]).amin(0)
    assert (error(scale) <= nearby * 1.02 + 1e-6).all()
