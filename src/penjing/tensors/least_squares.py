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

#: What may be noise of single precision in inputs, as a share of their mean square.
_CENTRING = 1e-12


class Moments:
    """First and second moments of inputs x (G, rows, D) and targets t (G, rows, O), accumulated over batches.

    G is the number of independent problems (the groups of a grouped convolution; 1 otherwise). Kept about the first
    batch's means, so that of inputs that hardly vary the variance is not what rounding left of two large numbers (Chan,
    Golub & LeVeque 1983, "Algorithms for computing the sample variance").
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        self.rows = 0
        self._about_x, self._about_t = torch.zeros(groups, inputs), torch.zeros(groups, outputs)
        self._x = torch.zeros(groups, inputs, dtype=torch.float64)
        self._t = torch.zeros(groups, outputs, dtype=torch.float64)
        self._xx = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
        self._xt = torch.zeros(groups, inputs, outputs, dtype=torch.float64)
        self._tt = torch.zeros(groups, outputs, dtype=torch.float64)

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add a batch: x (G, rows, D) and t (G, rows, O)."""
        x, t = x.float(), t.float()
        if not self.rows and x.shape[1]:
            self._about_x, self._about_t = x.mean(1), t.mean(1)
        x, t = x - self._about_x[:, None], t - self._about_t[:, None]
        ones = torch.ones(1, x.shape[1])
        self.rows += x.shape[1]
        self._x += (ones @ x)[:, 0].double()
        self._t += (ones @ t)[:, 0].double()
        self._xx += (x.mT @ x).double()
        self._xt += (x.mT @ t).double()
        self._tt += (ones @ t.square())[:, 0].double()

    @property
    def sum_x(self) -> Tensor:
        """(G, D)"""
        return self._x + self.rows * self._about_x.double()

    @property
    def sum_t(self) -> Tensor:
        """(G, O)"""
        return self._t + self.rows * self._about_t.double()

    @property
    def xx(self) -> Tensor:
        """Sums of x xᵀ (G, D, D)."""
        return self._xx + _outer(self._x, self._about_x) + _outer(self._about_x, self.sum_x)

    @property
    def xt(self) -> Tensor:
        """Sums of x tᵀ (G, D, O)."""
        return self._xt + _outer(self._x, self._about_t) + _outer(self._about_x, self.sum_t)

    @property
    def energy(self) -> Tensor:
        """Sums of squares of t about its means (G, O)."""
        return self._tt - self._t.square() / max(self.rows, 1)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Covariance sums (G, D, D) and (G, D, O) about the means."""
        mean = self._x / max(self.rows, 1)
        return self._xx - _outer(mean, self._x), self._xt - _outer(mean, self._t)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.double()[:, :, None] * right.double()[:, None, :]


def damped(gram: Tensor, relative: float = 1e-3, absolute: float | Tensor = 1e-6) -> Tensor:
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
    hessian = damped_hessian(moments, bias, damping)
    return hessian, weight + torch.cholesky_solve(cross - gram @ weight.mT, cholesky(hessian)).mT


def constant_of(moments: Moments, weight: Tensor) -> Tensor:
    """The constant (G, O) with which the mean output of `weight` (G, O, D) is that of the targets."""
    mean_x, mean_t = moments.sum_x / moments.rows, moments.sum_t / moments.rows
    return mean_t - (weight @ mean_x[..., None])[..., 0]


def damped_hessian(moments: Moments, bias: bool, damping: float) -> Tensor:
    """The Gram matrix (G, D, D) of the inputs, about their mean if there is a `bias`, with what `refit` adds to its
    diagonal."""
    gram = moments.centred()[0] if bias else moments.xx
    floor = torch.tensor(1e-8 * max(moments.rows, 1))
    if bias:  # what varies less than numbers of single precision can show is no information
        floor = floor + _CENTRING * moments.xx.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    return damped(gram, damping, floor)


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
