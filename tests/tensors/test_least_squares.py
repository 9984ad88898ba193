"""Refitting against numpy's lstsq; elimination against solving every candidate from scratch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penjing.errors import DataError
from penjing.tensors.least_squares import Consumer, Moments, cholesky, damped, eliminate, optimum, refit


def moments_of(x: torch.Tensor, t: torch.Tensor, parts: int = 3) -> Moments:
    moments = Moments(1, x.shape[1], t.shape[1])
    for a, b in zip(x.chunk(parts), t.chunk(parts), strict=True):
        moments.add(a[None], b[None])
    return moments


@pytest.mark.parametrize("bias", [True, False])
def test_refit_is_least_squares(bias: bool) -> None:
    x, t = torch.randn(400, 12) + 2, torch.randn(400, 5) - 1
    got, constant = refit(moments_of(x, t), torch.zeros(1, 5, 12), bias=bias, damping=0.0)
    design = np.concatenate([x.numpy(), np.ones((400, 1))], 1) if bias else x.numpy()
    wanted = np.linalg.lstsq(design.astype(np.float64), t.numpy().astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(got[0].numpy(), wanted[:12].T, atol=2e-4)
    if bias:
        assert constant is not None
        np.testing.assert_allclose(constant[0].numpy(), wanted[12], atol=2e-4)
    else:
        assert constant is None


def test_refit_keeps_what_the_samples_do_not_show() -> None:
    x = torch.randn(300, 6)
    x[:, 2] = 0  # a dead input
    start = torch.randn(1, 4, 6)
    got, _ = refit(moments_of(x, x @ torch.randn(6, 4)), start, bias=True)
    assert torch.allclose(got[0, :, 2], start[0, :, 2].double())
    assert not torch.allclose(got[0, :, 1], start[0, :, 1].double(), atol=1e-2)


def test_groups_are_independent_problems() -> None:
    x, t = torch.randn(2, 200, 5), torch.randn(2, 200, 3)
    both = Moments(2, 5, 3)
    both.add(x, t)
    got, _ = refit(both, torch.zeros(2, 3, 5), bias=True)
    alone, _ = refit(moments_of(x[1], t[1], 1), torch.zeros(1, 3, 5), bias=True)
    assert torch.allclose(got[1], alone[0], atol=1e-5)


def loss_without(gram: torch.Tensor, weight: torch.Tensor, gone: list[int]) -> float:
    """The least possible tr((W - V) H (W - V)ᵀ) over V with the columns `gone` zero, from scratch."""
    left = [i for i in range(len(gram)) if i not in gone]
    fitted = torch.linalg.solve(gram[left][:, left], gram[left] @ weight.T).T
    delta = weight.clone()
    delta[:, left] -= fitted
    return float(((delta @ gram) * delta).sum())


def test_elimination_reports_the_true_error_and_the_best_weights() -> None:
    units, k = 6, 2
    x = torch.randn(500, units * k, dtype=torch.float64) @ torch.randn(units * k, units * k, dtype=torch.float64)
    gram, weight = damped(x.T @ x / 500, 1e-2, 1e-8), torch.randn(4, units * k, dtype=torch.float64)
    columns = torch.randperm(units * k).view(units, k)
    got = eliminate([Consumer(gram, weight, columns)], damping=0.0, snapshots=(3,))
    gone: list[int] = []
    for count, unit in enumerate(got.order[:-1], 1):
        best = min(
            loss_without(gram, weight, gone + columns[u].tolist())
            for u in range(units)
            if u not in got.order[: count - 1]
        )
        gone += columns[unit].tolist()
        assert got.errors[count] == pytest.approx(loss_without(gram, weight, gone), rel=1e-4)
        assert got.errors[count] == pytest.approx(best, rel=1e-4)  # greedy: no other unit would have been cheaper
    removed = columns[got.order[:3]].flatten()
    assert (got.weights[3][0][:, removed] == 0).all()
    delta = weight - got.weights[3][0]
    assert float(((delta @ gram) * delta).sum()) == pytest.approx(got.errors[3], rel=1e-4)


def test_a_given_order_is_followed() -> None:
    gram, weight = torch.eye(5, dtype=torch.float64), torch.arange(1.0, 6.0).view(1, 5).double()
    got = eliminate([Consumer(gram, weight, torch.arange(5)[:, None])], order=[4, 0, 2, 1, 3], damping=0.0)
    assert got.order == [4, 0, 2, 1, 3]
    assert got.errors == pytest.approx([0, 25, 26, 35, 39], rel=1e-6)


def test_a_unit_that_another_repeats_costs_nothing() -> None:
    x = torch.randn(300, 4)
    x[:, 3] = x[:, 1]
    gram, weight = (x.T @ x / 300).double(), torch.randn(3, 4, dtype=torch.float64) + 3
    got = eliminate([Consumer(gram, weight, torch.arange(4)[:, None])], damping=1e-6)
    assert got.order[0] in (1, 3) and got.errors[1] < 1e-3 * got.errors[2]


def test_cholesky_of_what_is_not_quite_definite() -> None:
    """Each of several matrices gets what it needs, and those that are definite are left alone."""
    definite = torch.eye(3, dtype=torch.float64) * 2
    little = torch.diag(torch.tensor([1.0, 1.0, -1e-9], dtype=torch.float64))
    much = torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64))
    batch = torch.stack([definite, little, much])
    for upper in (False, True):
        factor = cholesky(batch, upper=upper)
        back = factor.mT @ factor if upper else factor @ factor.mT
        assert torch.allclose(back[0], definite, atol=1e-15)
        assert torch.allclose(back, batch, atol=2e-2) and torch.isfinite(factor).all()
    with pytest.raises(DataError, match="not finite"):
        cholesky(torch.full((2, 2), float("nan")))


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_inputs_that_hardly_vary_leave_the_weights_in_peace(spread: float) -> None:
    """What is left when a large mean is subtracted in single precision must not be taken for information."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 3, 40, generator=generator)
    moments = Moments(1, 40, 3)
    for _ in range(4):
        x = 5 + spread * torch.randn(1, 64, 40, generator=generator)
        moments.add(x, x @ weight.mT)
    hessian, solved = optimum(moments, weight, bias=True)
    assert torch.linalg.eigvalsh(hessian).min() > 0
    assert (solved - weight).abs().max() < 0.01


def test_moments_are_those_of_all_batches_together() -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = 3 + torch.randn(2, 90, 5, generator=generator), torch.randn(2, 90, 3, generator=generator) - 7
    moments = Moments(2, 5, 3)
    for part in (slice(0, 40), slice(40, 90)):
        moments.add(x[:, part], t[:, part])
    x, t = x.double(), t.double()
    torch.testing.assert_close(moments.xx, x.mT @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.xt, x.mT @ t, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.sum_t, t.sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.energy, t.var(1, correction=0) * 90, rtol=1e-5, atol=1e-4)
    off = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(moments.centred()[0], off.mT @ off, rtol=1e-4, atol=1e-4)
