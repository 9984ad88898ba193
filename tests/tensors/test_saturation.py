"""Weights that fit into 16-bit sums, against the instruction itself computed here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from penjing.tensors.grids import fake_quantize, quantize, sqnr, tensor_grid
from penjing.tensors.saturation import LIMIT, may_saturate, without_saturation

# (shape, axis of the output channels): convolutions, transposed ones, products; odd and even numbers of channels
SHAPES = [
    ((16, 8, 3, 3), 0),
    ((16, 7, 3, 3), 0),
    ((6, 1, 5, 5), 0),
    ((9, 3, 7), 0),
    ((5, 12, 3, 3), 1),
    ((5, 12, 2, 2), 1),
    ((10, 64), 0),
    ((33, 20), 1),
    ((12, 257), 0),
    ((12, 402), 0),
    ((12, 403), 0),
    ((8, 33, 3, 3), 0),
    ((4, 1), 0),
]


def vpmaddubsw(a: int, b: int) -> int:
    """Two products of the largest activation with signed weights, added in 16 bits with saturation."""
    return max(-32768, min(32767, 255 * a + 255 * b))


def orders(inner: int, taps: int) -> list[list[tuple[int, int]]]:
    """What kernels walk through, as (input channel, tap), cut where they start a new pair: one list for each kernel."""
    blocks = [[(c, t) for c in range(inner + inner % 2)] for t in range(taps)]
    blocked = [position for block in blocks for position in block]
    along = [(c, t) for t in range(taps) for c in range(inner)]
    count, half = len(along), math.ceil(len(along) / 2)
    found = [blocked, along]
    if 256 < count < 512:
        end = [(inner, 0)] * (half % 2)  # padding in front of the second half
        found.append(along[:half] + end + along[half:])
    return found


def saturates(codes: Tensor, axis: int) -> bool:
    """Whether any kernel's sum of two products differs from the exact one."""
    for channel in codes.movedim(axis, 0):
        rows = channel.reshape(channel.shape[0], -1).tolist()
        inner, taps = len(rows), len(rows[0])
        for order in orders(inner, taps):
            row = [rows[c][t] if c < inner else 0 for c, t in order] + [0]
            for a, b in zip(row[::2], row[1::2], strict=False):
                if vpmaddubsw(a, b) != 255 * (a + b):
                    return True
    return False


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("spread", ["gauss", "equal"])
@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_sums_are_exact_afterwards(shape: tuple[int, ...], axis: int, spread: str, scales: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape) if spread == "gauss" else torch.randn(shape).sign() * torch.rand(shape).mul(0.1).add(1)
    w[w.abs() < 0.05] = 0.0
    grid = tensor_grid(w, -127, 127, axis=axis if scales == "channel" else None)
    found, values = without_saturation(w, grid, axis)
    codes = quantize(values, found)
    assert not saturates(codes, axis) and not may_saturate(codes, axis)
    assert torch.equal(fake_quantize(values, found), values)
    assert torch.equal(values == 0.0, fake_quantize(w, found) == 0.0)  # zeros stay, and nothing else becomes zero
    assert (values * w >= 0.0).all()
    assert found.scale.shape == grid.scale.shape and (found.scale >= grid.scale).all()


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_what_may_saturate_is_what_does(shape: tuple[int, ...], axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for top in (60, 65, 70, 80, 127):
        for _ in range(6):
            codes = torch.randint(-top, top + 1, shape, generator=generator, dtype=torch.int8)
            codes[torch.rand(shape, generator=generator) < 0.97] //= 2
            assert may_saturate(codes, axis) == saturates(codes, axis)
            seen.add(saturates(codes, axis))
    assert seen == {True, False} or math.prod(shape) < 10


def test_the_bound_is_exact() -> None:
    for a, b in ((64, 64), (127, 1), (-127, -1), (127, -127), (-64, -64)):
        assert not may_saturate(torch.tensor([[a, b]], dtype=torch.int8), 0)
    for a, b in ((64, 65), (127, 2), (-64, -65), (127, 127)):
        assert may_saturate(torch.tensor([[a, b]], dtype=torch.int8), 0)
        assert not may_saturate(torch.tensor([[a, 0, b, 0]], dtype=torch.int8), 0)  # apart, they never meet


def test_pairs_move_to_the_nearest_that_fits() -> None:
    """Against a search of all pairs of integers, at a scale that nothing else changes."""
    generator, seen = torch.Generator().manual_seed(0), 0
    for _ in range(50):
        pair = 40 + 45 * torch.rand(2, generator=generator)
        row = torch.cat([pair[None], torch.tensor([[127.0, 0.0, 1.0, 2.0]]).repeat(1, 8000)], 1)  # fits at 1 alone
        found, values = without_saturation(row, tensor_grid(row, -127, 127, axis=0), 0)
        if float(found.scale) > 1.0:
            continue  # another scale was better
        seen += 1
        a, b = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
        errors = ((a - pair[0]) ** 2 + (b - pair[1]) ** 2).masked_fill(a + b > LIMIT, torch.inf)
        got = float((values[0, :2] - pair).square().sum())
        assert got <= float(errors.min()) + 0.51  # halves are rounded for one of the two
    assert seen > 15


def test_no_worse_than_a_scale_that_every_pair_fits() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 48, 3, 3)
    grid = tensor_grid(w, -127, 127, axis=0)
    _, values = without_saturation(w, grid, 0)
    narrow = fake_quantize(w, tensor_grid(w, -64, 64, axis=0))
    full = fake_quantize(w, grid)
    assert sqnr(w, narrow) + 3.5 < sqnr(w, values) < sqnr(w, full)


def test_what_fits_stays_as_it_is() -> None:
    w = torch.full((2, 50), 0.001)
    w[0, 7] = 1.0
    w[1] = 0.0
    grid = tensor_grid(w, -127, 127, axis=0)
    found, values = without_saturation(w, grid, 0)
    assert torch.equal(found.scale, grid.scale) and torch.equal(values, fake_quantize(w, grid))
