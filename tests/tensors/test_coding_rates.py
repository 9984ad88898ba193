"""The rate term: its gradient is its slope, leads to zero, and follows what the coder will charge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penjing.tensors.coding_rates import rate
from penjing.tensors.sparse_coding import coded_bits


def gradient(place: torch.Tensor, most: int = 127) -> torch.Tensor:
    held = place.clone().requires_grad_()
    rate(held, most).backward()
    assert held.grad is not None
    return held.grad


def some(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = torch.rand(40, 1, generator=generator) * torch.rand(60, generator=generator) * 2
    return torch.randn(40, 60, generator=generator) * width


def test_the_gradient_is_the_slope() -> None:
    place = some().double().float()
    found = gradient(place)
    for row, column in [(0, 0), (3, 7), (12, 50), *torch.nonzero(place.abs() > 1.3).tolist()[:5]]:
        size = float(place[row, column].abs())
        # No rounded value changes by so little, and no chance with it.
        if min(abs(size % 1 - 0.5), size % 1, 1 - size % 1) < 0.01:
            continue
        step = torch.zeros_like(place)
        step[row, column] = 4e-3
        difference = float(rate(place + step, 127).double() - rate(place - step, 127).double()) / 8e-3
        assert difference == pytest.approx(float(found[row, column]), rel=0.08, abs=0.08)


def test_it_pulls_towards_zero_and_harder_where_little_is_left() -> None:
    place = some()
    assert bool((gradient(place) * place >= 0).all())
    sparse = torch.zeros(50, 50)
    sparse[:25, :25] = (torch.rand(25, 25, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    probe = sparse + 0.1 * (sparse == 0)
    found = gradient(probe)
    alive, edge, dead = found[:25, :25][sparse[:25, :25] == 0], found[:25, 25:], found[25:, 25:]
    assert float(alive.mean()) + 3 < float(edge.mean()) < float(dead.mean()) - 3


def test_networks_that_are_cheaper_by_it_are_cheaper_in_packages() -> None:
    rates, sizes = [], []
    for width in (0.1, 0.3, 0.5, 1.0, 2.0):
        place = some() * width
        rates.append(float(rate(place.round(), 127)))
        sizes.append(coded_bits(place.round().int().numpy().reshape(-1), 60))
    assert np.all(np.diff(rates) > 0) and np.all(np.diff(sizes) > 0)


def test_edges() -> None:
    assert float(rate(torch.zeros(3, 4), 127)) == 0
    assert not gradient(torch.zeros(3, 4)).any()
    far = torch.tensor([[300.0, -0.2, 0.0]])
    assert torch.isfinite(rate(far, 127)) and torch.isfinite(gradient(far)).all()
    assert rate(torch.randn(7), 127).ndim == 0 and rate(torch.randn(2, 3, 4, 5), 127).ndim == 0
