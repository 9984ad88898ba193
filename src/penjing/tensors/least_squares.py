"""Least squares from accumulated moments: fits, and the order in which inputs can be given up.

Rows are samples (for a convolution: output positions), columns are inputs (channel × kernel position). Products are
taken in float32 batch by batch and summed in float64, so a million rows of activations lose nothing that matters.
The elimination is the group form of Optimal Brain Surgeon (Hassibi & Stork 1993; Frantar & Alistarh 2022,
"Optimal Brain Compression").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.errors import DataError


class Moments:
    """First and second moments of inputs x (G, rows, D) and targets t (G, rows, O), accumulated over batches.

    G is the number of independent problems (the groups of a grouped convolution; 1 otherwise).
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        self.rows = 0
        self.sum_x = torch.zeros(groups, inputs, dtype=torch.float64)
        self.sum_t = torch.zeros(groups, outputs, dtype=torch.float64)
        self.xx = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
        self.xt = torch.zeros(groups, inputs, outputs, dtype=torch.float64)
        self.tt = torch.zeros(groups, outputs, dtype=torch.float64)

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add a batch: x (G, rows, D) and t (G, rows, O)."""
        x, t = x.float(), t.float()
        ones = torch.ones(1, x.shape[1])
        self.rows += x.shape[1]
        self.sum_x += (ones @ x)[:, 0].double()
        self.sum_t += (ones @ t)[:, 0].double()
        self.xx += (x.mT @ x).double()
        self.xt += (x.mT @ t).double()
        self.tt += (ones @ t.square())[:, 0].double()

    def centred(self) -> tuple[Tensor, Tensor]:
        """Covariance sums (G, D, D) and (G, D, O) about the means."""
        mean = self.sum_x / max(self.rows, 1)
        return (
            self.xx - mean[:, :, None] * self.sum_x[:, None, :],
            self.xt - mean[:, :, None] * self.sum_t[:, None, :],
        )


def damped(gram: Tensor, relative: float = 1e-3, absolute: float = 1e-6) -> Tensor:
    """`gram` (…, D, D) with a share of its mean diagonal, and an absolute floor, added to the diagonal.

    The floor matters: a dead channel makes the matrix singular whatever the share.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    extra = relative * diagonal.mean(-1, keepdim=True) + absolute
    return gram + torch.diag_embed(extra.expand_as(diagonal))


def refit(moments: Moments, weight: Tensor, *, bias: bool, damping: float = 1e-3) -> tuple[Tensor, Tensor | None]:
    """Weights (G, O, D) nearest to `weight` that carry x to t in the least-squares sense, and the constant (G, O).

    Minimizes ‖x·Wᵀ + b − t‖² + λ‖W − weight‖²: the damping pulls towards the weights given, not towards zero, so that
    directions never seen in the samples keep what training put there. Without `bias` the constant is None.
    """
    _, solved = optimum(moments, weight, bias=bias, damping=damping)
    return solved, constant_of(moments, solved) if bias else None


def optimum(moments: Moments, weight: Tensor, *, bias: bool, damping: float = 1e-3) -> tuple[Tensor, Tensor]:
    """The damped Hessian (G, D, D) of the problem in `refit`, and its solution (G, O, D).

    Other weights V cost (V - solution) H (V - solution)ᵀ more, which is what all rounding and pruning of them is about.
    """
    weight = weight.double()
    gram, cross = moments.centred() if bias else (moments.xx, moments.xt)
    hessian = damped_hessian(gram, moments.rows, damping)
    return hessian, weight + torch.cholesky_solve(cross - gram @ weight.mT, cholesky(hessian)).mT


def constant_of(moments: Moments, weight: Tensor) -> Tensor:
    """The constant (G, O) with which the mean output of `weight` (G, O, D) is that of the targets."""
    mean_x, mean_t = moments.sum_x / moments.rows, moments.sum_t / moments.rows
    return mean_t - (weight @ mean_x[..., None])[..., 0]


def damped_hessian(gram: Tensor, rows: int, damping: float) -> Tensor:
    """`gram` (G, D, D), a sum over `rows` samples, with what `refit` adds to its diagonal."""
    return damped(gram.double(), damping, 1e-8 * max(rows, 1))


@dataclass(frozen=True)
class Consumer:
    """One linear map that reads a family of inputs: `gram` (D, D) of its inputs, `weight` (O, D), and for every unit
    of the family the columns (units, k) it occupies; `importance` scales this map's error against the others'."""

    gram: Tensor
    weight: Tensor
    columns: Tensor
    importance: float = 1.0


@dataclass(frozen=True)
class Elimination:
    """`order`: units in the order they go, cheapest first (those that stay last). `errors[i]`: summed squared output
    error after i units have gone. `weights`: for every asked count, each consumer's weight (O, D) with the columns of
    those units zero and the others adjusted."""

    order: list[int]
    errors: list[float]
    weights: dict[int, list[Tensor]]


def eliminate(
    consumers: list[Consumer],
    *,
    order: Sequence[int] | None = None,
    keep: int = 1,
    snapshots: tuple[int, ...] = (),
    damping: float = 1e-2,
) -> Elimination:
    """Greedy group Optimal Brain Surgeon: remove the unit whose loss the remaining columns can best make up for.

    Removing the columns S of weight W costs tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ), after which W and H⁻¹ are updated in closed
    form. All `consumers` give up the same unit together. At least `keep` units stay. With `order` (cheapest first) the
    units go in that order, and only the errors and the adjusted weights are worked out.
    """
    units = consumers[0].columns.shape[0]
    inverses = [torch.linalg.inv(damped(c.gram.double(), damping, 1e-8)) for c in consumers]
    weights = [c.weight.double().clone() for c in consumers]
    left = list(range(units))
    went: list[int] = []
    errors: list[float] = [0.0]
    kept_weights: dict[int, list[Tensor]] = {}
    if 0 in snapshots:
        kept_weights[0] = [w.clone() for w in weights]
    # Very wide families lose several units per look at the costs; the order inside a handful hardly matters.
    stride = max(1, units // 256)
    while len(left) > keep:
        if order is None:
            cost = _costs(consumers, inverses, weights, left)
            going = [left[i] for i in torch.argsort(cost)[: min(stride, len(left) - keep)].tolist()]
        else:
            going = [order[len(went)]]
        for unit in going:
            lost = 0.0
            for consumer, inverse, weight in zip(consumers, inverses, weights, strict=True):
                lost += consumer.importance * _remove(inverse, weight, consumer.columns[unit])
            errors.append(errors[-1] + lost)
            went.append(unit)
            left.remove(unit)
            if len(went) in snapshots:
                kept_weights[len(went)] = [w.clone() for w in weights]
    return Elimination(went + left, errors, kept_weights)


def _costs(consumers: list[Consumer], inverses: list[Tensor], weights: list[Tensor], left: list[int]) -> Tensor:
    """What each unit that is left would cost to remove next."""
    cost = torch.zeros(len(left), dtype=torch.float64)
    for consumer, inverse, weight in zip(consumers, inverses, weights, strict=True):
        columns = consumer.columns[left]
        blocks = inverse[columns[:, :, None], columns[:, None, :]]
        slices = weight[:, columns].permute(1, 2, 0)
        cost += consumer.importance * (slices * torch.linalg.solve(blocks, slices)).sum((1, 2))
    return cost


def _remove(inverse: Tensor, weight: Tensor, columns: Tensor) -> float:
    """Take `columns` out of (weight, inverse) in place; returns the squared error it costs."""
    block = inverse[columns[:, None], columns[None, :]]
    rows = torch.linalg.solve(block, inverse[columns, :])
    lost = weight[:, columns].clone()
    cost = float((lost * torch.linalg.solve(block, lost.T).T).sum())
    weight -= lost @ rows
    weight[:, columns] = 0
    inverse -= inverse[:, columns] @ rows
    inverse[:, columns] = 0
    inverse[columns, :] = 0
    # A removed column must stay solvable for whoever looks at its block by mistake, and must never interact again.
    inverse[columns, columns] = 1.0
    return max(cost, 0.0)


def cholesky(matrix: Tensor, *, upper: bool = False) -> Tensor:
    """The Cholesky factor of symmetric matrices (…, D, D); the diagonal of those that rounding left short of positive
    definite grows, tenfold at a time from 1e-12 of its mean, until it is enough."""
    symmetric = (matrix + matrix.mT) / 2
    scale = symmetric.diagonal(dim1=-2, dim2=-1).abs().mean(-1).clamp_min(1e-30)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, bad = torch.linalg.cholesky_ex(symmetric, upper=upper)
    weak, damping = bad > 0, 1e-12
    while bad.any():
        if damping > 1e3:
            raise DataError("a layer's inputs are not finite numbers", hint="look at the weights and the samples")
        extra = damping * scale * weak  # also of those that a smaller one was enough for: they must stay definite
        factor, bad = torch.linalg.cholesky_ex(symmetric + extra[..., None, None] * eye, upper=upper)
        weak, damping = weak | (bad > 0), damping * 10
    found: Tensor = factor
    return found
