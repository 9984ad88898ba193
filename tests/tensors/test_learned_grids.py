"""Operators of learned grids against torch's own, against finite differences and against plain grids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from penjing.tensors import codebooks, grids
from penjing.tensors import learned_grids as learned

GENERATOR = torch.Generator().manual_seed(0)


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("limits", [(-2, 1), (-8, 7), (-1, 1)])
def test_a_learned_step_is_that_of_torch(axis: int, limits: tuple[int, int]) -> None:
    low, high = limits
    x, g = values(6, 5, 3, 3), values(6, 5, 3, 3)
    step = torch.rand(x.shape[axis], generator=GENERATOR) * 0.3 + 0.2
    place = x / learned.spread(step, x, axis, 0)
    # Just behind the last point torch still lets gradients through and the paper does not.
    x = torch.where((place > high) | (place < low), x * 3, x)
    ours, theirs = [(x.clone().requires_grad_(), step.clone().requires_grad_()) for _ in range(2)]
    a = learned.learned_step(*ours, None, axis, 0, low, high, False)
    factor = learned.gradient_scale(x, step, high, False)
    zero = torch.zeros_like(step)
    b = torch._fake_quantize_learnable_per_channel_affine(*theirs, zero, axis, low, high, factor)
    a.backward(g)
    b.backward(g)
    assert torch.equal(a, b)
    assert torch.equal(ours[0].grad, theirs[0].grad)  # type: ignore[arg-type]
    assert torch.allclose(ours[1].grad, theirs[1].grad, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


def test_a_zero_point_shifts_the_codes() -> None:
    x = values(4, 30) + 1
    grid = grids.tensor_grid(x, -8, 7, axis=0, symmetric=False)
    assert bool(grid.zero_point.any())
    ends = [((q - grid.zero_point) * grid.scale).view(-1, 1) for q in (-8, 7)]
    x = torch.minimum(torch.maximum(x, ends[0]), ends[1])
    step = grid.scale.clone().requires_grad_()
    got = learned.learned_step(x, step, grid.zero_point.float(), 0, 0, -8, 7, False)
    assert torch.equal(got, grids.fake_quantize(x, grid))
    got.sum().backward()
    # Straight through, a value inside gives its rounding error, in steps.
    error = ((got.detach() - x) / grid.scale.view(-1, 1)).sum(1) * learned.gradient_scale(x, step, 7, False)
    assert torch.allclose(step.grad, error, atol=1e-5)  # type: ignore[arg-type]


def test_groups_share_a_step() -> None:
    x = values(3, 10)
    grid = grids.tensor_grid(x, -8, 7, group=4)
    got = learned.learned_step(x, grid.scale.flatten(), None, None, 4, -8, 7, False)
    assert torch.equal(got, grids.fake_quantize(x, grid))
    sums = learned.gather(x, grid.scale.flatten(), None, 4).view(3, 3)
    assert torch.allclose(sums[:, 0], x[:, :4].sum(1)) and torch.allclose(sums[:, 2], x[:, 8:].sum(1))


def test_values_beyond_the_range_move_its_ends() -> None:
    """By finite differences: a clipped value is `offset` or `offset + (levels - 1) · step`, without any rounding."""
    x, g = torch.tensor([[-9.0, 9.0, 11.0]]), torch.tensor([[2.0, 3.0, -1.0]])
    step, offset = torch.tensor(0.25, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    learned.learned_range(x, step, offset, 16).backward(g)
    factor = learned.gradient_scale(x, step, 15, True)

    def total(step: float, offset: float) -> float:
        return float((learned.learned_range(x, torch.tensor(step), torch.tensor(offset), 16) * g).sum())

    by_step = (total(0.251, -1.004) - total(0.249, -0.996)) / 0.002  # both ends of a grid that holds -4 steps
    by_offset = (total(0.25, -0.75) - total(0.25, -1.25)) / 0.5
    assert float(offset.grad) == pytest.approx(by_offset * factor, rel=1e-3)  # type: ignore[arg-type]
    moved = -4 * float(offset.grad) + float(step.grad)  # type: ignore[arg-type]
    assert moved == pytest.approx(by_step * factor, rel=1e-3)


@pytest.mark.parametrize("low", [-1.3, 0.4, -9.0])
def test_zero_is_on_every_learned_range(low: float) -> None:
    x = torch.cat([torch.zeros(1, 1), values(1, 50)], 1)
    got = learned.learned_range(x, torch.tensor(0.21), torch.tensor(low), 16)
    assert float(got[0, 0]) == 0.0
    assert len(got.unique()) <= 16


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_even_levels_are_a_learned_step(axis: int | None) -> None:
    """The same values, the same gradients for weights, and updates as large relative to the scale."""
    x, g = values(6, 5) * 2, values(6, 5)
    step = torch.rand(1 if axis is None else x.shape[axis], generator=GENERATOR) * 0.1 + 0.2
    ours, theirs = [(x.clone().requires_grad_(), s.clone().requires_grad_()) for s in (step * 7, step)]
    a = learned.learned_levels(*ours, torch.linspace(-1, 1, 15), axis)
    b = learned.learned_step(*theirs, None, axis, 0, -7, 7, False)
    assert torch.allclose(a, b, atol=1e-5)
    (a * g).sum().backward()
    (b * g).sum().backward()
    assert torch.equal(ours[0].grad, theirs[0].grad)  # type: ignore[arg-type]
    assert torch.allclose(ours[1].grad / ours[1], theirs[1].grad / theirs[1], rtol=1e-4, atol=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize("table", [codebooks.powers_of_two, codebooks.additive_powers_of_two])
def test_the_scale_of_levels_has_the_gradient_of_finite_differences(table: Callable[[int], Tensor]) -> None:
    """Of what is clipped; and of the error of what is not, as straight-through has it: level minus place."""
    x, levels = torch.tensor([[-9.0, 9.0, 11.0, 0.0, 0.26]]), table(4)
    scale = torch.tensor([1.0], requires_grad=True)
    got = learned.learned_levels(x, scale, levels, None)
    assert got[0, :4].tolist() == [-1.0, 1.0, 1.0, 0.0]
    got.backward(torch.tensor([[2.0, 3.0, -1.0, 5.0, 10.0]]))
    wanted = -2.0 + 3.0 - 1.0 + 10.0 * (got[0, 4].item() - 0.26)
    high = len(levels) // 2
    assert float(scale.grad) == pytest.approx(wanted * learned.gradient_scale(x, scale, high, False) * high**2)  # type: ignore[arg-type]


def test_signs_have_a_learned_scale_and_zeros_stay() -> None:
    x = torch.tensor([[0.5, -0.1, 0.0, 9.0], [1.0, 1.0, -1.0, 0.2]], requires_grad=True)
    step = torch.tensor([0.5, 2.0], requires_grad=True)
    got = learned.learned_sign(x, step, 0, 0)
    assert got.tolist() == [[0.5, -0.5, 0.0, 0.5], [2.0, 2.0, -2.0, 2.0]]
    got.backward(torch.ones_like(got))
    factor = learned.gradient_scale(x, step, 1, False)
    assert torch.allclose(step.grad, torch.tensor([1.0, 2.0]) * factor)  # type: ignore[arg-type]
    assert x.grad[0].tolist() == [1, 1, 1, 0]  # type: ignore[index]  far away nothing pulls any more


def test_masked_weights_stay_zero_on_every_grid() -> None:
    x = values(4, 8)
    x[:, ::2] = 0
    step = torch.full((4,), 0.3)
    for got in (
        learned.learned_step(x, step, None, 0, 0, -2, 1, False),
        learned.learned_sign(x, step, 0, 0),
        learned.learned_levels(x, step, codebooks.powers_of_two(3), 0),
        learned.learned_range(x, torch.tensor(0.3), torch.tensor(-0.7), 16),
    ):
        assert not got[:, ::2].any()


def test_soft_rounding_starts_at_the_weights_and_ends_on_the_grid() -> None:
    x, step = values(5, 7), torch.full((5,), 0.4)
    choice = learned.choice_for(x, step, 0, 0)
    limits = (0, 0, -127, 127)
    assert torch.allclose(learned.soft_round(x, choice, step, None, *limits), x, atol=1e-3)
    assert float(learned.undecided(choice, 2.0)) > 0
    decided = torch.where(learned.rectified(choice) >= 0.5, 10.0, -10.0)
    assert float(learned.undecided(decided, 2.0)) == 0
    nearest = learned.soft_round(x, decided, step, None, *limits)
    assert torch.allclose(nearest, torch.fake_quantize_per_tensor_affine(x, 0.4, 0, -127, 127))


def test_soft_rounding_has_the_gradient_of_finite_differences() -> None:
    x, step = values(3, 4).double(), torch.full((3,), 0.4, dtype=torch.float64)
    choice = learned.choice_for(x, step, 0, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: learned.soft_round(x, c, step, None, 0, 0, -100, 100), (choice,))


def test_the_regularizer_waits_and_then_sharpens() -> None:
    betas = [learned.annealed(d / 10) for d in range(11)]
    assert betas[:2] == [None, None]
    rest = [b for b in betas if b is not None]
    assert rest[0] == 20.0 and rest[-1] == 2.0 and rest == sorted(rest, reverse=True)


def test_half_of_the_elements_keep_their_value() -> None:
    plain, rounded = torch.zeros(100, 100), torch.ones(100, 100)
    assert float(learned.drop_rounding(plain, rounded, 0.5).mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(learned.drop_rounding(plain, rounded, 0.0), rounded)


def test_the_type_of_autocast_passes_through() -> None:
    x = values(2, 8).to(torch.bfloat16).requires_grad_()
    step = torch.tensor(0.3, requires_grad=True)
    got = learned.learned_step(x, step, None, None, 0, 0, 15, True)
    got.sum().backward()
    assert got.dtype == x.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert step.grad.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize(("axis", "group"), [(None, 0), (0, 0), (1, 0), (None, 4)])
def test_the_widest_step_covers_every_value(axis: int | None, group: int) -> None:
    x = values(3, 10).requires_grad_()
    step = learned.widest_step(x, axis, group, 127)
    grid = grids.tensor_grid(x, -127, 127, axis=axis, group=group)
    assert torch.allclose(step, grid.scale.flatten()) and not step.requires_grad
    got = learned.learned_step(x, step, None, axis, group, -127, 127, False)
    assert torch.allclose(got, grids.fake_quantize(x.detach(), grid), atol=1e-6)
