"""Rounding the weights of a linear map so that its outputs change least.

As in `tensors.sparse_reconstruction`, everything is about one quadratic a row, (v - w)ᵀ H (v - w), where w is the best
dense row and H the (damped) Gram matrix of the map's inputs; here v must lie on a grid. Shapes: weights (G, O, D),
Hessians (G, D, D); G is 1 except for grouped convolutions.

`gptq` rounds the columns one after the other and lets the columns that are still to come make up for what each one lost
(Frantar et al. 2023, "GPTQ", algorithm 1; the same quadratic as Optimal Brain Quantization in Frantar & Alistarh 2022).
Then single weights move again as long as that lowers the quadratic (cyclic coordinate descent as in Behdin et al. 2023,
"QuantEase").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from penjing.tensors.grids import Grid, Ranges, fake_quantize, tensor_grid
from penjing.tensors.least_squares import cholesky

Order = Literal["ascending", "activation"]
ORDERS: tuple[Order, ...] = ("ascending", "activation")
#: Puts values (R, n) on a grid with one scale a row.
Nearest = Callable[[Tensor, Grid], Tensor]

#: Shares of the whole range that are tried when ranges go by the squared error.
_SHARES = tuple(1.0 - 0.05 * step for step in range(18))
#: How often scales and integers are found anew in turn.
_TURNS = 4
#: Columns that are rounded before the others hear of it: products of matrices are faster than of vectors.
_BLOCK = 128
#: Bytes of rows that are rounded at once while ranges are searched.
_BYTES = 1 << 27


@dataclass(frozen=True)
class GridRule:
    """How the grid of a weight is chosen: integers `quant_min..quant_max`, one scale a row (`axis` 0), one for all
    (None), or one for every `group` columns of each row.

    `ranges` as in `grids.tensor_grid`; "mse" means the squared error of the *outputs* here: all shares of the range are
    rounded, and each row takes its best. `nearest` puts values (R, n) on a grid with one scale a row; grids that are
    not uniform bring their own.
    """

    quant_min: int
    quant_max: int
    axis: Literal[0] | None = 0
    group: int = 0
    symmetric: bool = True
    ranges: Ranges = "minmax"
    nearest: Nearest = fake_quantize

    def grid(self, rows: Tensor) -> Grid:
        """The grid for weights (R, n) by themselves. Raises ValueError where they are empty or not finite."""
        return tensor_grid(
            rows,
            self.quant_min,
            self.quant_max,
            axis=None if self.group else self.axis,
            group=self.group,
            symmetric=self.symmetric,
            ranges=self.ranges,
        )

    def on_inputs(self, hessian: Tensor) -> GridRule:
        """This rule for a layer whose inputs have the (damped) Gram matrices `hessian` (G, D, D)."""
        return self


@dataclass(frozen=True, kw_only=True)
class StepRule(GridRule):
    """One scale for the whole weight, `step`: of layers whose inputs are known, as much more as what "gptq" makes up
    for allows, so that their outputs err as those of others do that are rounded to nearest at `step`."""

    step: float

    def grid(self, rows: Tensor) -> Grid:
        """The grid of that step, whatever the weights."""
        scale = torch.tensor(self.step, dtype=torch.float32)
        return Grid(
            scale=scale, zero_point=torch.tensor(0), quant_min=self.quant_min, quant_max=self.quant_max, axis=None
        )

    def on_inputs(self, hessian: Tensor) -> GridRule:
        """The step divided by the root of `feedback_gain`."""
        return replace(self, step=self.step * float(feedback_gain(hessian)) ** -0.5)


def feedback_gain(hessian: Tensor) -> Tensor:
    """The share of rounding's squared error that is left when later columns make up for earlier ones: that of GPTQ on
    a fine grid, the mean of 1 / U_cc² (U the upper Cholesky factor of the inverse) over the mean of H_cc."""
    hessian = hessian.double()
    factor = cholesky(torch.cholesky_inverse(cholesky(hessian)), upper=True)
    return factor.diagonal(dim1=1, dim2=2).pow(-2).mean() / hessian.diagonal(dim1=1, dim2=2).mean()


@torch.no_grad()
def gptq(
    hessian: Tensor,
    weight: Tensor,
    rule: GridRule,
    *,
    alive: Tensor | None = None,
    order: Order = "ascending",
    sweeps: int = 4,
) -> tuple[Tensor, Grid]:
    """Values on a grid (G, O, D; float64) near `weight` in the metric of `hessian`, and the grid, for weights (G·O, D).

    In "activation" order the columns with the largest diagonal of `hessian` come first. With groups, each group's grid
    is chosen when its first column is reached, from what the weights are by then; in "activation" order before anything
    moves. `sweeps` times every weight may move again. Weights that are not `alive` (bool, G, O, D) stay exactly zero.
    No row comes out worse than when it is rounded to nearest on the grid returned. Raises ValueError for weights that
    are empty or not finite, DataError for a Hessian that is not finite.
    """
    weight = weight.double()
    living = torch.ones_like(weight, dtype=torch.bool) if alive is None else alive
    weight, rule = weight * living, rule.on_inputs(hessian)
    if rule.group >= weight.shape[2]:  # a group is the whole row
        plain = replace(rule, group=0, axis=0)
        rounded, grid = gptq(hessian, weight, plain, alive=alive, order=order, sweeps=sweeps)
        scale, zero = grid.scale[:, None], grid.zero_point[:, None]
        return rounded, replace(grid, scale=scale, zero_point=zero, group=rule.group)
    task = _Task(hessian.double(), weight, living, order, sweeps, rule.nearest)
    if rule.group and order == "ascending":
        return task.by_groups(rule)
    by_error = rule.ranges == "mse" and not rule.group
    grid = replace(rule, ranges="minmax" if by_error else rule.ranges).grid(weight.flatten(0, 1))
    return task.best_share(grid) if by_error else (task.on(grid), grid)


def gram_error(hessian: Tensor, weight: Tensor, rounded: Tensor) -> Tensor:
    """The quadratic by row (G, O): what `rounded` instead of `weight` (G, O, D) costs under `hessian` (G, D, D)."""
    off = rounded.double() - weight.double()
    return ((off @ hessian.double()) * off).sum(-1)


class _Task:
    """One layer: its quadratic, and the Cholesky factor that tells what a column's loss means to the later ones."""

    def __init__(
        self, hessian: Tensor, weight: Tensor, alive: Tensor, order: Order, sweeps: int, nearest: Nearest
    ) -> None:
        self.hessian, self.weight, self.alive, self.sweeps, self.nearest = hessian, weight, alive, sweeps, nearest
        self.back: Tensor | None = None
        if order == "activation":
            there = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
            self.back = there.argsort(1)
            self.hessian = _columns(_columns(hessian, there).mT, there)
            self.weight, self.alive, self.there = _columns(weight, there), _columns(alive, there), there
        self.factor = cholesky(torch.cholesky_inverse(cholesky(self.hessian)), upper=True)

    def on(self, grid: Grid) -> Tensor:
        """The weights (G, O, D) on `grid`."""
        scale, zero = self._spread(grid)
        rounded = self._round(self.weight, self.alive, grid, scale, zero)
        return rounded if self.back is None else _columns(rounded, self.back)

    def best_share(self, grid: Grid) -> tuple[Tensor, Grid]:
        """The weights on the best of the grids that cover a share of the range each, by row (for one scale: of all)."""
        groups, rows, columns = self.weight.shape
        at_once = max(1, _BYTES // (8 * self.weight.numel()))
        scale, zero = self._spread(grid)
        least = torch.full((groups, rows), torch.inf, dtype=torch.float64)
        best, share = torch.zeros_like(self.weight), torch.ones(groups, rows)
        for start in range(0, len(_SHARES), at_once):
            shares = torch.tensor(_SHARES[start : start + at_once])
            several = (1, len(shares), 1)  # every share is one more set of rows
            wider = scale.repeat(several) * shares.repeat_interleave(rows)[:, None]
            weight, alive = self.weight.repeat(several), self.alive.repeat(several)
            rounded = self._round(weight, alive, grid, wider, zero.repeat(several))
            error = gram_error(self.hessian, weight, rounded).view(groups, -1, rows)
            if grid.axis is None:
                error = error.sum((0, 2), keepdim=True).expand_as(error)
            lowest, at = error.min(1)
            better = lowest < least
            least = torch.where(better, lowest, least)
            share = torch.where(better, shares[at], share)
            rounded = rounded.view(groups, -1, rows, columns)
            found = rounded.gather(1, at[:, None, :, None].expand(-1, -1, -1, columns))[:, 0]
            best = torch.where(better[..., None], found, best)
        factor = share.flatten()[0] if grid.axis is None else share.flatten()
        grid = replace(grid, scale=grid.scale * factor)
        if grid.axis is not None and self.nearest is fake_quantize:
            best, grid = self._rescaled(best, grid)
        return best if self.back is None else _columns(best, self.back), grid

    def _rescaled(self, rounded: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """By turns the best scale of each row for its integers, in closed form, and the best integers for the scale."""
        for _ in range(_TURNS):
            integers = (rounded / self._spread(grid)[0]).round()
            pull = integers @ self.hessian
            best = ((pull * self.weight).sum(-1) / (pull * integers).sum(-1).clamp_min(1e-30)).flatten().float()
            grid = replace(grid, scale=torch.where(best > 0, best, grid.scale))
            wide, zero = self._spread(grid)
            same = (integers.float() * wide).double()
            rounded = self._settle(self.weight, self.alive, same.clone(), grid, wide, zero)
            if torch.equal(rounded, same):
                break
        return rounded, grid

    def by_groups(self, rule: GridRule) -> tuple[Tensor, Grid]:
        """The weights on grids of their own for every group of columns, chosen as the pass comes to them."""
        scales, zeros, size = [], [], rule.group
        weight, columns = self.weight.clone(), self.weight.shape[2]
        rounded = torch.zeros_like(weight)
        for start in range(0, columns, size):
            part = slice(start, min(start + size, columns))
            grid = self._group_grid(rule, weight[:, :, part], self.alive[:, :, part], part)
            scales.append(grid.scale)
            zeros.append(grid.zero_point)
            scale, zero = (t.view(*weight.shape[:2], 1).expand_as(weight) for t in (grid.scale, grid.zero_point))
            self._pass(weight, rounded, self.alive, grid, scale, zero, part)
        grid = replace(grid, scale=torch.stack(scales, 1), zero_point=torch.stack(zeros, 1), axis=0, group=size)
        scale, zero = self._spread(grid)
        return self._settle(self.weight, self.alive, rounded, grid, scale, zero), grid

    def _group_grid(self, rule: GridRule, weight: Tensor, alive: Tensor, part: slice) -> Grid:
        """A scale a row for the columns `part`; by the squared error each column counts as the outputs feel it."""
        rows = (weight * alive).flatten(0, 1)
        plain = replace(rule, group=0, axis=0, ranges="minmax" if rule.ranges == "mse" else rule.ranges)
        grid = plain.grid(rows)
        if rule.ranges != "mse":
            return grid
        diagonal = self.factor.diagonal(dim1=1, dim2=2)[:, None, part].expand_as(weight).flatten(0, 1)
        least, scale = torch.full(grid.scale.shape, torch.inf, dtype=torch.float64), grid.scale
        for share in _SHARES:
            tried = replace(grid, scale=grid.scale * share)
            error = ((self.nearest(rows, tried) - rows) / diagonal).square().sum(1)
            scale = torch.where(error < least, tried.scale, scale)
            least = torch.minimum(error, least)
        return replace(grid, scale=scale)

    def _spread(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every weight (G, O, D), in the order of the pass."""
        groups, rows, columns = self.weight.shape

        def wide(values: Tensor) -> Tensor:
            if grid.group:
                values = values.repeat_interleave(grid.group, 1)[:, :columns].view(groups, rows, columns)
                return values if self.back is None else _columns(values, self.there)
            return values.expand(groups * rows).view(groups, rows, 1).expand(groups, rows, columns)

        return wide(grid.scale), wide(grid.zero_point)

    def _round(self, weight: Tensor, alive: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Tensor:
        rounded, moving = torch.zeros_like(weight), weight.clone()
        for start in range(0, weight.shape[2], _BLOCK):
            part = slice(start, min(start + _BLOCK, weight.shape[2]))
            self._pass(moving, rounded, alive, grid, scale, zero, part)
        return self._settle(weight, alive, rounded, grid, scale, zero)

    def _pass(
        self, weight: Tensor, rounded: Tensor, alive: Tensor, grid: Grid, scale: Tensor, zero: Tensor, part: slice
    ) -> None:
        """Rounds the columns `part` and moves all later columns of `weight`, in place."""
        factor, end = self.factor, part.stop
        errors = torch.zeros_like(weight[:, :, part])
        for c in range(part.start, end):
            value = self._column(weight[:, :, c], alive[:, :, c], grid, scale[:, :, c], zero[:, :, c])
            error = (weight[:, :, c] - value) / factor[:, None, c, c]
            weight[:, :, c:end] -= error[..., None] * factor[:, None, c, c:end]
            rounded[:, :, c] = value
            errors[:, :, c - part.start] = error
        weight[:, :, end:] -= errors @ factor[:, part, end:]

    def _column(self, values: Tensor, alive: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Tensor:
        by_row = replace(grid, scale=scale.flatten(), zero_point=zero.flatten(), axis=0, group=0)
        return self.nearest(values.reshape(-1, 1), by_row).view(values.shape).double() * alive

    def _settle(
        self, weight: Tensor, alive: Tensor, rounded: Tensor, grid: Grid, scale: Tensor, zero: Tensor
    ) -> Tensor:
        """Starts from `rounded`, or by row from the nearest where that is better, and moves single weights on."""
        plain = torch.stack(
            [
                self._column(weight[:, :, c], alive[:, :, c], grid, scale[:, :, c], zero[:, :, c])
                for c in range(weight.shape[2])
            ],
            2,
        )
        worse = gram_error(self.hessian, weight, rounded) > gram_error(self.hessian, weight, plain)
        rounded = torch.where(worse[..., None], plain, rounded)
        for _ in range(self.sweeps):
            if not self._sweep(weight, alive, rounded, grid, scale, zero):
                break
        return rounded

    def _sweep(self, weight: Tensor, alive: Tensor, rounded: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> bool:
        """Moves every weight to its best place, the others as they are; in place. Tells whether any has moved."""
        diagonal = self.hessian.diagonal(dim1=1, dim2=2)
        pull = (rounded - weight) @ self.hessian  # half the gradient
        any_moved = False
        for start in range(0, weight.shape[2], _BLOCK):
            part = slice(start, min(start + _BLOCK, weight.shape[2]))
            moves = torch.zeros_like(weight[:, :, part])
            for c in range(part.start, part.stop):
                best = rounded[:, :, c] - pull[:, :, c] / diagonal[:, None, c]
                value = self._column(best, alive[:, :, c], grid, scale[:, :, c], zero[:, :, c])
                # On the grid's own points nothing may move for the sake of the last digit.
                gains = (value - best).abs() < (rounded[:, :, c] - best).abs() * (1 - 1e-9)
                move = torch.where(gains, value - rounded[:, :, c], 0.0)
                pull[:, :, c : part.stop] += move[..., None] * self.hessian[:, None, c, c : part.stop]
                rounded[:, :, c] += move
                rounded[:, :, c] = torch.where(gains, value, rounded[:, :, c])
                moves[:, :, c - part.start] = move
            pull[:, :, part.stop :] += moves @ self.hessian[:, part, part.stop :]
            any_moved = any_moved or bool(moves.any())
        return any_moved


def _columns(values: Tensor, order: Tensor) -> Tensor:
    """(G, O, D) with the columns of each group in `order` (G, D)."""
    return values.gather(2, order[:, None, :].expand_as(values))
