"""Non-uniform grids: tables of levels that codes point into.

`kmeans` finds the levels in the values themselves (Han, Mao & Dally 2016, "Deep compression", §3: weight sharing);
`powers_of_two` and `additive_powers_of_two` are fixed tables, to be scaled, whose products are shifts and additions.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_ROUNDS = 100


def kmeans(x: Tensor, codes: int, *, importance: Tensor | None = None, zero: bool = False) -> Tensor:
    """Levels (rows, codes), ascending, with the least squared error for each row of `x` (rows, values).

    `importance` (like `x`, at least 0) weighs the errors. With `zero` one level is exactly zero. Lloyd's iterations in
    one dimension, on sorted values, from three starts (evenly spaced, quantiles, and quantiles of the density's cube
    root, the optimum for many levels: Panter & Dite 1951); each row keeps the best. Rows with fewer different values
    than codes repeat levels.

    Raises ValueError for no codes, no values, or values that are not finite.
    """
    if codes < 1 or x.ndim != 2 or not x.numel():
        raise ValueError("k-means wants rows of values and at least one code")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the tensor holds NaN or infinite values")
    values, order = x.detach().double().sort(1)
    weight = torch.ones_like(values) if importance is None else importance.detach().double().gather(1, order)
    nothing = values.new_zeros(len(values), 1)
    # Sums up to each place: those of any cell are differences of two.
    count, first, second = (
        torch.cat([nothing, (weight * values**power).cumsum(1)], 1) for power in (0, 1, 2)
    )  # fmt: skip
    best, found = torch.full((len(values),), torch.inf, dtype=torch.float64), values.new_zeros(len(values), codes)
    for start in _starts(values, count, codes):
        levels = _lloyd(values, count, first, _with_zero(start) if zero else start, zero)
        error = _error(values, count, first, second, levels)
        found = torch.where((error < best)[:, None], levels, found)
        best = torch.minimum(best, error)
    return found.to(x.dtype)


def powers_of_two(bits: int) -> Tensor:
    """Levels 0 and ±2^-i, i = 0 … 2^(bits-1) - 2, ascending: one bit is the sign, so that zero stands twice but is
    listed once (Miyashita et al. 2016, "Logarithmic data representation"). Raises ValueError below 2 bits."""
    return _signed([[0.0, *(2.0**-i for i in range(2 ** (_magnitude(bits)) - 1))]])


def additive_powers_of_two(bits: int) -> Tensor:
    """Levels that are sums of powers of two, ascending, the largest 1: finer near zero than a uniform grid, and not
    as coarse far from it as powers of two alone (Li, Dong & Wang 2020, "Additive powers-of-two quantization").

    Every two bits (beside the sign) choose one of {0, 2^-i, 2^-(i+n), 2^-(i+2n)} for the i-th of n terms; an odd bit
    chooses {0, 2^-i}. Raises ValueError below 2 bits.
    """
    magnitude = _magnitude(bits)
    pairs, odd = divmod(magnitude, 2)
    terms = pairs + odd
    choices = [[0.0, *(2.0 ** -(i + k * terms) for k in range(3))] for i in range(pairs)]
    choices += [[0.0, 2.0**-pairs]] * odd
    return _signed(choices)


def encode(x: Tensor, levels: Tensor) -> Tensor:
    """The index (int64, like `x`) of the level nearest to each value; `levels` ascend: (codes,), or (rows, codes) for
    `x` (rows, values)."""
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    if levels.ndim == 1:
        return torch.bucketize(x.detach().contiguous(), middles.to(x.dtype))
    return torch.searchsorted(middles.to(x.dtype).contiguous(), x.detach().contiguous())


def decode(codes: Tensor, levels: Tensor) -> Tensor:
    """The levels that codes of `encode` point at."""
    return levels[codes] if levels.ndim == 1 else levels.gather(1, codes)


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """`x` on the ascending `levels`, shapes as for `encode`."""
    return decode(encode(x, levels), levels)


def scaled(x: Tensor, levels: Tensor) -> Tensor:
    """For each row of `x` (rows, values) the scale (rows,) with which fixed `levels` (codes,) stand for it with the
    least squared error (a search over 60 fractions of the largest magnitude); 1 for rows of zeros."""
    x, levels = x.detach().double(), levels.double()
    largest = x.abs().amax(1)
    scale = torch.where(largest > 0, largest / levels.abs().amax(), torch.ones_like(largest))
    best, found = torch.full_like(scale, torch.inf), scale
    for step in range(60):
        tried = scale * (1.2 - 0.018 * step)
        near = x / tried[:, None]
        error = ((nearest(near, levels) - near) * tried[:, None]).square().sum(1)
        found = torch.where(error < best, tried, found)
        best = torch.minimum(best, error)
    return found.float()


def _magnitude(bits: int) -> int:
    if bits < 2:
        raise ValueError(f"levels with a sign want at least 2 bits, got {bits}")
    return bits - 1


def _signed(choices: list[list[float]]) -> Tensor:
    positive = sorted({sum(chosen) for chosen in itertools.product(*choices)})
    table = torch.tensor([*(-v for v in positive[:0:-1]), *positive], dtype=torch.float32)
    return table / table.amax()


def _starts(values: Tensor, count: Tensor, codes: int) -> list[Tensor]:
    share = (torch.arange(codes, dtype=torch.float64) + 0.5) / codes
    evenly = values[:, :1] + (values[:, -1:] - values[:, :1]) * share
    # The cube root of the (weighted) density, between places a five-hundredth of the values apart.
    places = torch.linspace(0, values.shape[1] - 1, min(values.shape[1], 512)).long()
    gaps, heaped = values[:, places].diff(dim=1).clamp(min=0), count[:, places].diff(dim=1)
    root = torch.cat([values.new_zeros(len(values), 1), (gaps**2 * heaped).pow(1 / 3).cumsum(1)], 1)
    return [
        evenly,
        values.gather(1, _quantile(count[:, 1:], share)),
        values[:, places].gather(1, _quantile(root, share)),
    ]


def _quantile(mass: Tensor, share: Tensor) -> Tensor:
    """Where each row of running sums reaches these shares of its last one."""
    wanted = (mass[:, -1:] * share).contiguous()
    return torch.searchsorted(mass.contiguous(), wanted).clamp(max=mass.shape[1] - 1)


def _with_zero(levels: Tensor) -> Tensor:
    nearest = levels.abs().argmin(1, keepdim=True)
    return levels.scatter(1, nearest, 0.0).sort(1).values


def _cells(values: Tensor, levels: Tensor) -> Tensor:
    """Where the cells of ascending levels begin and end among sorted values: (rows, codes + 1)."""
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    inner = torch.searchsorted(values, middles)
    edge = inner.new_zeros(len(values), 1)
    return torch.cat([edge, inner, edge + values.shape[1]], 1)


def _lloyd(values: Tensor, count: Tensor, first: Tensor, levels: Tensor, zero: bool) -> Tensor:
    for _ in range(_ROUNDS):
        cells = _cells(values, levels)
        mass, total = count.gather(1, cells).diff(dim=1), first.gather(1, cells).diff(dim=1)
        moved = torch.where(mass > 0, total / mass.clamp(min=1e-300), levels).sort(1).values
        if zero:
            moved = _with_zero(moved)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def _error(values: Tensor, count: Tensor, first: Tensor, second: Tensor, levels: Tensor) -> Tensor:
    cells = _cells(values, levels)
    mass, total, square = (s.gather(1, cells).diff(dim=1) for s in (count, first, second))
    return (square - 2 * levels * total + levels.square() * mass).sum(1)
