"""Which single weights of a linear map can go, and what the others must become so that its outputs change least.

Everything here is about one quadratic a row: ½ (v − w)ᵀ H (v − w), where w is the best dense row and H the (damped)
Gram matrix of the map's inputs, the same for all rows of a group. Shapes: weights (G, O, D), Hessians (G, D, D), masks
like weights, True where a weight stays. G is 1 except for grouped convolutions.

- `eliminate_weights`: exact greedy Optimal Brain Surgeon, one weight at a time (Frantar & Alistarh 2022, "Optimal Brain
  Compression", algorithm 1).
- `sweep`: one pass over the columns, errors pushed to the columns that are still to come (Frantar & Alistarh 2023,
  "SparseGPT", algorithm 1).
- `on_support`: the best weights for a mask, in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from penjing.tensors.least_squares import cholesky

#: Removals after which the inverse Hessians are brought up to date: products of matrices are faster than of vectors.
_LAZY = 32
#: Bytes of inverse Hessians that are held at once, one a row.
_BYTES = 1 << 28


@dataclass(frozen=True)
class Traces:
    """The order in which each row gives up its weights: `order` (G, O, S) columns, cheapest first, and `losses`
    (G, O, S), by how much the quadratic rises with each. Fewer than D columns where a pattern allows no more."""

    order: Tensor
    losses: Tensor

    def mask(self, gone: int, columns: int, importance: Tensor | None = None) -> Tensor:
        """The mask without the `gone` weights that cost least over all rows; `importance` (G, O) weighs the rows."""
        worth = self.losses if importance is None else self.losses * importance[..., None].to(self.losses)
        # A row gives its weights up in order only: a cheap one behind a dear one costs as much as that.
        rank = worth.cummax(-1).values.flatten().argsort(stable=True)
        out = torch.zeros(worth.numel(), dtype=torch.bool)
        out[rank[:gone]] = True
        mask = torch.ones(*self.order.shape[:2], columns, dtype=torch.bool)
        return mask.scatter(-1, self.order, ~out.view_as(self.order))


@torch.no_grad()
def eliminate_weights(
    hessian: Tensor,
    weight: Tensor,
    *,
    alive: Tensor | None = None,
    families: Tensor | None = None,
    per_family: int = 0,
    most: int | None = None,
    rows: Tensor | None = None,
) -> Traces:
    """Every row loses the weight whose loss the rest of the row can best make up for, again and again.

    Taking column p out of row w costs ½ w_p² / [H⁻¹]_pp, after which w and H⁻¹ are updated in closed form. Weights that
    are not `alive` go first and cost nothing. With `families` (D,), the number of the family each column belongs to,
    a family stops losing columns once `per_family` have gone. At most `most` columns go. With `rows` (indices into the
    O rows of each group) only these are worked out. Rows share nothing but where they start, so many go at once; costs
    about D³ a row in float32 (float64 for D ≤ 128).
    """
    groups, _, columns = weight.shape
    chosen = weight if rows is None else weight[:, rows]
    living = torch.ones_like(chosen, dtype=torch.bool) if alive is None else alive if rows is None else alive[:, rows]
    kind = torch.float64 if columns <= 128 else torch.float32
    inverse = torch.cholesky_inverse(cholesky(hessian.double())).to(kind)
    last = columns if most is None else min(most, columns)
    if families is not None:
        counts = torch.bincount(families)
        last = min(last, int(counts.clamp(max=per_family).sum()))
    at_once = max(1, _BYTES // (columns**2 * inverse.element_size()))
    order = torch.zeros(groups, chosen.shape[1], last, dtype=torch.int64)
    losses = torch.zeros(groups, chosen.shape[1], last, dtype=torch.float64)
    for group in range(groups):
        for start in range(0, chosen.shape[1], at_once):
            part = slice(start, start + at_once)
            order[group, part], losses[group, part] = _trace(
                inverse[group], chosen[group, part].to(kind), living[group, part], families, per_family, last
            )
    return Traces(order, losses)


def _trace(
    inverse: Tensor, weight: Tensor, alive: Tensor, families: Tensor | None, per_family: int, last: int
) -> tuple[Tensor, Tensor]:
    """Order and losses (R, last) of rows (R, D) that start from one inverse Hessian (D, D)."""
    rows, columns = weight.shape
    every = torch.arange(rows)
    inverses = inverse.expand(rows, columns, columns).clone()
    diagonal = inverses.diagonal(dim1=1, dim2=2).clone()
    floor = 1e-6 * diagonal
    weight, alive = weight.clone(), alive.clone()
    here = torch.ones(rows, columns, dtype=torch.bool)  # not taken out yet
    names = torch.arange(columns).expand(rows, columns).clone()
    family = None if families is None else families.expand(rows, columns).clone()
    count = torch.zeros(rows, 0 if families is None else int(families.max()) + 1, dtype=torch.int64)
    order = torch.zeros(rows, last, dtype=torch.int64)
    losses = torch.zeros(rows, last, dtype=torch.float64)
    done = 0
    while done < last:
        steps = min(_LAZY, last - done)
        taken = inverses.new_zeros(steps, rows, inverses.shape[2])
        for step in range(steps):
            cost = weight.square() / diagonal
            cost = torch.where(alive, cost, -1.0).masked_fill_(~here, float("inf"))
            if family is not None:
                cost.masked_fill_(count.gather(1, family) >= per_family, float("inf"))
            at = cost.argmin(1)
            column = inverses[every, :, at]
            if step:
                column = column - (taken[:step] * taken[:step, every, at, None]).sum(0)
            pivot = torch.maximum(column[every, at], floor[every, at])
            scaled = column * here / pivot.sqrt()[:, None]
            held = weight[every, at]
            losses[:, done] = held.double().square() / pivot.double() / 2
            order[:, done] = names[every, at]
            weight -= scaled * (held / pivot.sqrt())[:, None]
            diagonal = torch.maximum(diagonal - scaled.square(), floor)
            weight[every, at] = 0
            here[every, at] = False
            taken[step] = scaled
            if family is not None:
                count[every, family[every, at]] += 1
            done += 1
        if done == last:
            break
        by_row = taken.permute(1, 2, 0)
        inverses.baddbmm_(by_row, by_row.mT, alpha=-1)
        if 4 * (columns - done) <= 3 * inverses.shape[2]:  # what is left is packed together
            left = here.nonzero()[:, 1].view(rows, columns - done)
            inverses = inverses.gather(1, left[:, :, None].expand(-1, -1, inverses.shape[2]))
            inverses = inverses.gather(2, left[:, None, :].expand(-1, left.shape[1], -1))
            weight, diagonal, floor, names, alive, here = (
                t.gather(1, left) for t in (weight, diagonal, floor, names, alive, here)
            )
            family = None if family is None else family.gather(1, left)
    return order, losses


@dataclass(frozen=True)
class Neighbours:
    """Columns put side by side so that every `m` of them share a pattern: of a convolution the input channels at one
    tap, then those at the next. Empty columns follow where they do not divide: `order` (D',) holds the columns'
    numbers, -1 for those."""

    order: Tensor
    m: int

    @classmethod
    def of(cls, channels: int, taps: int, m: int) -> Neighbours:
        """For columns numbered channel × taps + tap."""
        columns = torch.arange(channels * taps).view(channels, taps).T.flatten()
        return cls(functional.pad(columns, (0, -len(columns) % m), value=-1), m)

    def hessian(self, given: Tensor) -> Tensor:
        """(G, D, D) → (G, D', D'); empty columns touch no others."""
        real = self.order >= 0
        at = self.order.clamp_min(0)
        wide = given[:, at][:, :, at] * (real[:, None] & real[None, :])
        return wide + torch.diag((~real).to(given.dtype))

    def columns(self, given: Tensor) -> Tensor:
        """(G, O, D) → (G, O, D'), zero (False) in empty columns."""
        return given[:, :, self.order.clamp_min(0)] * (self.order >= 0)

    def back(self, given: Tensor, columns: int) -> Tensor:
        """(G, O, D') → (G, O, D)."""
        real = self.order >= 0
        out = given.new_zeros(*given.shape[:2], columns)
        out[:, :, self.order[real]] = given[:, :, real]
        return out


@torch.no_grad()
def on_support(hessian: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The weights that are zero outside `mask` and make the quadratic about `weight` least: on the support S,
    w_S + H_SS⁻¹ H_SR w_R, where R is the rest."""
    weight, hessian = weight.double(), hessian.double()
    groups, outputs, columns = weight.shape
    result = torch.zeros_like(weight)
    pull = (weight * ~mask) @ hessian  # H is symmetric: row o of this is H (w outside the mask)
    for group in range(groups):
        stays = mask[group].sum(1)
        at_once = max(1, _BYTES // (8 * max(int(stays.max()), 1) ** 2))
        for rows in torch.split(stays.argsort(), at_once):  # rows that keep about as many, together
            result[group, rows] = _solve_rows(hessian[group], weight[group, rows], mask[group, rows], pull[group, rows])
    return result


def _solve_rows(hessian: Tensor, weight: Tensor, mask: Tensor, pull: Tensor) -> Tensor:
    widest = int(mask.sum(1).max())
    if widest == 0:
        return torch.zeros_like(weight)
    # Rows that keep fewer are filled up with columns that are decoupled from the rest and solved to zero.
    columns = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :widest]
    real = mask.gather(1, columns)
    parts = hessian[columns[:, :, None], columns[:, None, :]]
    parts = parts * (real[:, :, None] & real[:, None, :]) + torch.diag_embed((~real).double())
    solved = torch.cholesky_solve((pull.gather(1, columns) * real)[..., None], cholesky(parts))[..., 0]
    return torch.zeros_like(weight).scatter(1, columns, (weight.gather(1, columns) + solved) * real)


@torch.no_grad()
def sweep(
    hessian: Tensor,
    weight: Tensor,
    share: float,
    *,
    alive: Tensor | None = None,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Weights and mask after one pass over the columns, from the first to the last.

    Each block of `block` columns loses the `share` of its weights, over all rows, with the least w² / [H⁻¹]²_cc; with a
    `pattern` (n, m), every m neighbouring columns of each row keep n. What a column loses is made good by the columns
    behind it: row c of the Cholesky factor of H⁻¹ says how. Weights not `alive` go first. Raises nothing: the caller
    sees to it that m divides D.
    """
    weight, mask = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    living = torch.ones_like(mask) if alive is None else alive
    columns = weight.shape[2]
    factor = cholesky(torch.cholesky_inverse(cholesky(hessian.double())), upper=True)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    wanted = 0.0
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(weight[:, :, start:end])
        if pattern is None:
            score = (weight[:, :, start:end] / diagonal[:, None, start:end]).square()
            score = torch.where(living[:, :, start:end], score, -1.0)
            wanted += share * score[0].numel()
            going = round(wanted)
            wanted -= going  # what rounding leaves over is taken from the next block
            out = torch.zeros_like(score, dtype=torch.bool).flatten(1)
            out.scatter_(1, score.flatten(1).argsort(dim=1, stable=True)[:, :going], True)
            mask[:, :, start:end] = ~out.view_as(score)
        for c in range(start, end):
            if pattern is not None and c % pattern[1] == 0:
                several = slice(c, c + pattern[1])
                score = (weight[:, :, several] / diagonal[:, None, several]).square()
                score = torch.where(living[:, :, several], score, -1.0)
                out = score.argsort(dim=2, stable=True)[:, :, : pattern[1] - pattern[0]]
                mask[:, :, several] = torch.ones_like(score, dtype=torch.bool).scatter(2, out, False)
            error = weight[:, :, c] * ~mask[:, :, c] / diagonal[:, None, c]
            weight[:, :, c:end] -= error[..., None] * factor[:, None, c, c:end]
            errors[:, :, c - start] = error
        weight[:, :, end:] -= errors @ factor[:, start:end, end:]
    return weight * mask, mask
