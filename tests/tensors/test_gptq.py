"""GPTQ against exhaustive search over all roundings, and against what must hold whatever the inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from penjing.errors import DataError
from penjing.tensors.gptq import ORDERS, GridRule, Order, gptq, gram_error
from penjing.tensors.grids import Grid, fake_quantize, limits

RULES = [
    GridRule(-2, 1),
    GridRule(-1, 1, ranges="mse"),
    GridRule(0, 3, symmetric=False),
    GridRule(-3, 3, axis=None),
    GridRule(-3, 3, axis=None, ranges="mse"),
    GridRule(-7, 7, group=2),
    GridRule(0, 3, group=2, symmetric=False, ranges="mse"),
]


def problem(groups: int = 2, outputs: int = 3, columns: int = 4, rows: int = 50) -> tuple[Tensor, Tensor]:
    """A Gram matrix of correlated inputs (G, D, D), and weights (G, O, D)."""
    x = torch.randn(groups, rows, columns) @ torch.randn(groups, columns, columns)
    return (x.mT @ x).double(), torch.randn(groups, outputs, columns)


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    return fake_quantize(weight.flatten(0, 1), grid).view(weight.shape)


def best(hessian: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """The least error by row over every rounding there is (one scale a row, or one for all)."""
    groups, outputs, columns = weight.shape
    codes = torch.tensor(list(itertools.product(range(grid.quant_min, grid.quant_max + 1), repeat=columns)))
    scale = grid.scale.expand(groups * outputs).view(groups, outputs, 1, 1)
    zero = grid.zero_point.expand(groups * outputs).view(groups, outputs, 1, 1)
    off = ((codes - zero) * scale - weight[:, :, None]).double()
    return torch.einsum("gocd,gde,goce->goc", off, hessian, off).amin(-1)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.quant_min}..{r.quant_max}, {r.axis}, {r.group}, {r.ranges}")
@pytest.mark.parametrize("order", ORDERS)
def test_between_the_best_rounding_and_the_nearest(rule: GridRule, order: Order) -> None:
    found, least, plain = 0.0, 0.0, 0.0
    for _ in range(10):
        hessian, weight = problem()
        rounded, grid = gptq(hessian, weight, rule, order=order)
        # The values are points of the grid, bit for bit as the runtimes' operators make them.
        assert torch.equal(nearest(rounded.float(), grid).double(), rounded)
        error, other = gram_error(hessian, weight, rounded), gram_error(hessian, weight, nearest(weight, grid))
        assert bool((error <= other * (1 + 1e-9)).all())
        found, plain = found + float(error.sum()), plain + float(other.sum())
        if not rule.group:
            exact = best(hessian, weight, grid)
            assert bool((error >= exact * (1 - 1e-6)).all())
            least += float(exact.sum())
    assert found < 0.85 * plain
    if not rule.group:
        assert found < 1.35 * least


def test_without_correlations_it_is_nearest() -> None:
    weight = torch.randn(1, 6, 40)
    for order in ORDERS:
        rounded, grid = gptq(torch.diag(torch.rand(40) + 0.1)[None], weight, GridRule(-7, 7), order=order)
        assert torch.equal(rounded.float(), nearest(weight, grid))


@pytest.mark.parametrize("group", [0, 48])
@pytest.mark.parametrize("order", ORDERS)
def test_many_columns_in_blocks(group: int, order: Order) -> None:
    # More columns than a block, and groups that do not divide them.
    x = torch.randn(1, 600, 300) @ (torch.eye(300) + 0.2 * torch.randn(300, 300))
    hessian, weight = (x.mT @ x).double(), torch.randn(1, 8, 300)
    rounded, grid = gptq(hessian, weight, GridRule(*limits("int3", narrow=True), group=group), order=order)
    assert grid.scale.shape == ((8, 7) if group else (8,))
    assert torch.equal(nearest(rounded.float(), grid).double(), rounded)
    error = gram_error(hessian, weight, rounded).sum()
    assert error < 0.6 * gram_error(hessian, weight, nearest(weight, grid)).sum()
    once, same = gptq(hessian, weight, GridRule(*limits("int3", narrow=True), group=group), order=order, sweeps=0)
    assert torch.equal(same.scale, grid.scale)
    assert error < gram_error(hessian, weight, once).sum()


def test_ranges_by_error_are_chosen_by_the_outputs() -> None:
    hessian, weight = problem(1, 16, 32, 200)
    weight[0, :, 0] *= 20  # an outlier on an input that hardly speaks
    quiet = torch.ones(32, dtype=torch.float64)
    quiet[0] = 1e-3
    hessian = hessian * quiet[:, None] * quiet
    whole, _ = gptq(hessian, weight, GridRule(-7, 7))
    cut, grid = gptq(hessian, weight, GridRule(-7, 7, ranges="mse"))
    assert gram_error(hessian, weight, cut).sum() < 0.5 * gram_error(hessian, weight, whole).sum()
    assert bool((grid.scale * 7 < weight[0].abs().amax(1)).all())


@pytest.mark.parametrize(
    "rule",
    [GridRule(-7, 7), GridRule(0, 15, symmetric=False, group=8, ranges="mse")],
    ids=lambda r: f"{r.quant_min}..{r.quant_max}, {r.axis}, {r.group}, {r.ranges}",
)
@pytest.mark.parametrize("order", ORDERS)
def test_masked_weights_stay_zero(rule: GridRule, order: Order) -> None:
    hessian, weight = problem(1, 6, 20, 100)
    alive = torch.rand(1, 6, 20) > 0.5
    rounded, grid = gptq(hessian, weight * alive, rule, alive=alive, order=order)
    assert not bool(rounded[~alive].any()) and bool(rounded[alive].any())
    held = nearest(weight * alive, grid)
    assert bool((gram_error(hessian, weight * alive, rounded) <= gram_error(hessian, weight * alive, held)).all())


def test_a_rounding_of_ones_own() -> None:
    def powers(x: Tensor, grid: Grid) -> Tensor:
        return x.sign() * 2.0 ** x.abs().clamp_min(1e-3).log2().round()

    hessian, weight = problem(1, 4, 12, 100)
    rounded, _ = gptq(hessian, weight, GridRule(-7, 7, nearest=powers))
    exponents = rounded.abs().log2()
    assert torch.equal(exponents, exponents.round())
    plain = powers(weight, GridRule(-7, 7).grid(weight[0]))
    assert gram_error(hessian, weight, rounded).sum() < gram_error(hessian, weight, plain).sum()


def test_dead_inputs_and_bad_ones() -> None:
    hessian, weight = problem(1, 4, 10, 100)
    hessian[:, 3] = 0
    hessian[:, :, 3] = 0
    rounded, _ = gptq(hessian, weight, GridRule(-7, 7))
    assert bool(torch.isfinite(rounded).all())
    with pytest.raises(ValueError, match="NaN"):
        gptq(hessian, weight * float("nan"), GridRule(-7, 7))
    with pytest.raises(DataError, match="not finite"):
        gptq(hessian * float("nan"), weight, GridRule(-7, 7))
