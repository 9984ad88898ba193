"""Which weights stay: how a tensor is read as a matrix, patterns in it, and how a sparsity is spread over tensors.

Scores are as large as a weight matters; the lowest go. Everything here gives boolean masks, True where a weight stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penjing.errors import RecipeError
from penjing.registry import Registry


@dataclass(frozen=True)
class Layout:
    """A weight as a matrix, rows = outputs, columns = what is summed: reshape to `view`, permute to `order`, and cut
    after the first `rows` dimensions."""

    view: tuple[int, ...]
    order: tuple[int, ...]
    rows: int = 1

    def matrix(self, tensor: Tensor) -> Tensor:
        """(outputs, inputs); a view where strides allow it."""
        seen = tensor.reshape(self.view).permute(self.order)
        return seen.reshape(math.prod(seen.shape[: self.rows]), math.prod(seen.shape[self.rows :]))

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`."""
        seen = matrix.reshape([self.view[d] for d in self.order])
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return seen.permute(back).reshape(shape)


def plain(shape: torch.Size) -> Layout:
    """The first dimension are the outputs: linear and recurrent layers, embeddings."""
    return Layout(tuple(shape), tuple(range(len(shape))))


def product(shape: torch.Size) -> Layout:
    """The last dimension are the outputs, the one before is summed: the second factor of a product."""
    last = len(shape) - 1
    return Layout(tuple(shape), (*range(last - 1), last, last - 1), rows=last)


def convolution(shape: torch.Size) -> Layout:
    """(out, in, *kernel) as out × (taps, in), input channels fastest.

    This is the order in which channels-last kernels (implicit matrix products on tensor cores, XNNPACK) sum, so that
    neighbours are input channels at one tap, as TensorRT's 2:4 wants them.
    """
    return Layout(tuple(shape), (0, *range(2, len(shape)), 1))


def transposed_convolution(shape: torch.Size, groups: int) -> Layout:
    """(in, out / groups, *kernel) as out × (taps, in / groups)."""
    view = (groups, shape[0] // groups, *shape[1:])
    return Layout(view, (0, 2, *range(3, len(view)), 1), rows=2)


# --------------------------------------------------------------------------------------------------------- patterns
@dataclass(frozen=True)
class Pattern:
    """What weights go together. With `group`, `keep` of every `group` neighbours in a row stay; otherwise blocks of
    `rows` × `columns` go or stay as one (1 × 1: single weights)."""

    rows: int = 1
    columns: int = 1
    keep: int = 0
    group: int = 0

    @property
    def blocks(self) -> bool:
        """Whether more than one weight goes at once."""
        return self.rows * self.columns > 1


def parse_pattern(text: str | None) -> Pattern:
    """What `2:4` (two of four neighbours stay) or `block:4x1` (4 outputs × 1 input) says; else raises ValueError."""
    if text is None:
        return Pattern()
    if (found := re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)) and 0 < int(found[1]) < int(found[2]):
        return Pattern(keep=int(found[1]), group=int(found[2]))
    if (found := re.fullmatch(r"block:([0-9]{1,4})x([0-9]{1,4})", text)) and int(found[1]) * int(found[2]) > 1:
        return Pattern(rows=int(found[1]), columns=int(found[2]))
    raise ValueError(f"{text!r} is no pattern")


def n_of_m(scores: Tensor, keep: int, group: int) -> Tensor:
    """The mask of the `keep` best of every `group` neighbours in each row of a matrix; of equals the first stay.

    A row that does not divide is taken as if zeros followed: of its last r weights min(r, `keep`) stay, so that the row
    padded with zeros has the pattern throughout.
    """
    rows, columns = scores.shape
    padded = F.pad(scores, (0, -columns % group), value=-math.inf).view(-1, group)
    first = padded.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    mask = torch.zeros(padded.shape, dtype=torch.bool).scatter_(1, first, True)
    return mask.view(rows, -1)[:, :columns]


def block_scores(scores: Tensor, pattern: Pattern, norm: str) -> Tensor:
    """What each block of a matrix is worth a weight: the mean of the scores ("l1") or the root of their mean square
    ("l2"). Blocks at the edges may be smaller."""
    values = scores.double()
    values = values if norm == "l1" else values * values.abs()
    mean = _pool(values, pattern) / _pool(torch.ones_like(values), pattern)
    return mean if norm == "l1" else mean.sign() * mean.abs().sqrt()


def block_sizes(kept: Tensor, pattern: Pattern) -> Tensor:
    """How many weights of a mask lie in each block."""
    return _pool(kept.double(), pattern).round().long()


def spread_blocks(blocks: Tensor, pattern: Pattern, shape: torch.Size) -> Tensor:
    """A mask of blocks as a mask of weights."""
    wide = blocks.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)
    return wide[: shape[0], : shape[1]]


def _pool(values: Tensor, pattern: Pattern) -> Tensor:
    """Sums over blocks."""
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % pattern.columns, 0, -rows % pattern.rows))
    down, across = padded.shape[0] // pattern.rows, padded.shape[1] // pattern.columns
    return padded.view(down, pattern.rows, across, pattern.columns).sum((1, 3))


# -------------------------------------------------------------------------------------------------------- thresholds
def best(scores: Tensor, count: int, sizes: Tensor | None = None) -> Tensor:
    """The mask of the `count` largest scores; of equals the first stay. With `sizes`, how much each one counts, as many
    as fit."""
    flat = scores.flatten()
    if sizes is not None:
        order = flat.sort(descending=True, stable=True).indices
        fits = sizes.flatten()[order].cumsum(0) <= count
        return torch.zeros(flat.shape, dtype=torch.bool).scatter_(0, order, fits).view_as(scores)
    if count <= 0 or count >= flat.numel():
        return torch.full(scores.shape, count > 0, dtype=torch.bool)
    edge = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > edge
    equal = (flat == edge).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def best_by_row(scores: Tensor, count: int) -> Tensor:
    """The mask of the `count` best of a matrix, every row keeping the same number, or one more where that is left over.

    Entries of -inf are never kept: what a row cannot keep, others do.
    """
    free = scores > -math.inf
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order))
    level = count // max(len(scores), 1)
    mask = (rank < level) & free
    while (left := count - int(mask.sum())) > 0 and level < scores.shape[1]:
        open_ = (rank == level) & free
        mask |= best(torch.where(open_, scores, -math.inf), min(left, int(open_.sum()))) & open_
        level += 1
    return mask


# -------------------------------------------------------------------------------------------------------- allocation
@dataclass(frozen=True)
class Units:
    """What of one tensor may go: the `scores` of its weights or blocks, how many weights each holds that can still be
    kept (`sizes`; None: one each, less those of score -inf), and the tensor's `shape`."""

    scores: Tensor
    shape: torch.Size
    sizes: Tensor | None = None

    @property
    def free(self) -> int:
        """Weights that can be kept."""
        return int((self.scores > -math.inf).sum() if self.sizes is None else self.sizes.sum())


#: Units by tensor and the number of weights that all together may keep → the number that each keeps.
Allocation = Callable[[Mapping[str, Units], int], dict[str, int]]
ALLOCATIONS: Registry[Allocation] = Registry("allocation", error=RecipeError)


@ALLOCATIONS.register("global")
def by_threshold(units: Mapping[str, Units], keep: int) -> dict[str, int]:
    """One threshold for the scores of all tensors."""
    return _compare({name: u.scores for name, u in units.items()}, units, keep)


@ALLOCATIONS.register("lamp")
def lamp(units: Mapping[str, Units], keep: int) -> dict[str, int]:
    """One threshold for layer-adaptive scores: the square of each over the sum of the squares that are no smaller in
    its tensor (Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning"). No tensor is emptied."""
    adapted = {}
    for name, u in units.items():
        squares = u.scores.flatten().double().clamp_min(0).square()
        ordered, order = squares.sort(stable=True)
        survivors = ordered.flip(0).cumsum(0).flip(0)
        shares = torch.empty_like(ordered).scatter_(0, order, ordered / survivors.clamp_min(1e-300))
        adapted[name] = shares.masked_fill(u.scores.flatten() == -math.inf, -math.inf)
    return _compare(adapted, units, keep)


@ALLOCATIONS.register("uniform")
def uniform(units: Mapping[str, Units], keep: int) -> dict[str, int]:
    """The same share of every tensor."""
    return _fill({name: 1.0 for name in units}, units, keep)


@ALLOCATIONS.register("erk")
def erk(units: Mapping[str, Units], keep: int) -> dict[str, int]:
    """Erdős–Rényi kernels: the share that stays is proportional to the sum of a tensor's dimensions over their product
    (Evci et al. 2020, "Rigging the lottery"), so that small tensors stay denser."""
    return _fill({name: sum(u.shape) / math.prod(u.shape) for name, u in units.items()}, units, keep)


def _compare(scores: Mapping[str, Tensor], units: Mapping[str, Units], keep: int) -> dict[str, int]:
    flat = torch.cat([scores[name].flatten() for name in units])
    if all(u.sizes is None for u in units.values()):
        mask = best(flat, min(keep, sum(u.free for u in units.values())))
        counted = mask.long()
    else:
        sizes = torch.cat([(u.scores > -math.inf).long().flatten() if u.sizes is None else u.sizes.flatten()
                           for u in units.values()])  # fmt: skip
        counted = best(flat, keep, sizes) * sizes
    parts = torch.split(counted, [u.scores.numel() for u in units.values()])
    return {name: int(part.sum()) for name, part in zip(units, parts, strict=True)}


def _fill(density: Mapping[str, float], units: Mapping[str, Units], keep: int) -> dict[str, int]:
    """Counts proportional to density × size, none above what a tensor can keep, adding up to `keep`."""
    free = {name: u.free for name, u in units.items()}
    share = {name: density[name] * math.prod(u.shape) for name, u in units.items()}
    exact: dict[str, float] = {}
    left, open_ = float(min(keep, sum(free.values()))), set(units)
    while open_:
        scale = left / sum(share[n] for n in open_)
        full = {n for n in open_ if scale * share[n] >= free[n]}
        settled = full or open_
        for n in settled:
            exact[n] = free[n] if n in full else scale * share[n]
        left -= sum(exact[n] for n in settled)
        open_ -= settled
    counts = {n: int(exact[n] + 1e-9) for n in units}
    rest = min(keep, sum(free.values())) - sum(counts.values())
    for n in sorted(units, key=lambda n: counts[n] - exact[n])[: max(rest, 0)]:
        counts[n] += 1
    return counts
