"""Weights as products of smaller ones: SVD, Tucker-2, spatial separation and CP, plain or weighted by the inputs.

A weight W is (O, I, *kernel), D = I × kernel positions; linear layers have no kernel. With the second moments G (D, D)
of the inputs, errors are those of the outputs: tr((W - Ŵ) G (W - Ŵ)ᵀ) as a share of tr(W G Wᵀ). Without, G is the
identity. Everything is worked out in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tensorly.decomposition import parafac
from torch import Tensor

from penjing.tensors.least_squares import cholesky, damped

#: Ranks that are looked at along each mode of a convolution.
_RANKS, _CP_RANKS = 16, 6
_SWEEPS = 50


@dataclass(frozen=True)
class Option:
    """One way to write a weight as a product: its form, its ranks, the shapes of the factors in the order in which an
    input meets them, the share of the outputs' energy that is lost, and which factor keeps the stride of a convolution.
    """

    form: str
    ranks: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    error: float
    core: int = 0

    @property
    def parameters(self) -> int:
        """Entries of all factors together."""
        return sum(math.prod(shape) for shape in self.shapes)


class Decomposition(Protocol):
    """A weight that can be written as a product in several ways."""

    @property
    def options(self) -> Sequence[Option]: ...

    def factors(self, option: Option) -> tuple[Tensor, ...]:
        """The factors of one of `options`, first the one that the input meets first."""
        ...


def truncated_svd(
    weight: Tensor, gram: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors (O, R) and (R, D) of `weight` (O, D) and the energies (R,) they carry, largest first; R = min(O, D), or D
    with weights of `rows` (O,).

    The first r columns and rows are the matrix of rank r nearest to `weight` under Σ_o rows_o ‖(w - ŵ)_o‖²_G, G being
    `gram`, which must be positive definite (Chen et al. 2021, "DRONE"; Wang et al. 2025, "SVD-LLM"). Both factors share
    the size of each component evenly, which is what training and grids want.
    """
    weight = weight.double()
    if rows is None and weight.shape[0] <= weight.shape[1]:
        # Projecting the outputs on their principal directions: no inverse of G is needed.
        energies, left = torch.linalg.eigh((weight if gram is None else weight @ gram) @ weight.mT)
        right = left.mT @ weight
    else:
        product = weight.mT @ (weight if rows is None else weight * rows.double()[:, None])
        if gram is None:
            energies, vectors = torch.linalg.eigh(product)
            left, right = weight @ vectors, vectors.mT
        else:
            root = cholesky(gram)
            energies, vectors = torch.linalg.eigh(root.mT @ product @ root)
            left = weight @ (root @ vectors)
            right = torch.linalg.solve_triangular(root, vectors.mT, upper=False, left=False)
    left, right = left.flip(1), right.flip(0)
    share = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).clamp(1e-12, 1e12).sqrt()
    return left * share, right / share[:, None], energies.flip(0).clamp_min(0)


class Svd:
    """Two factors: (r, I, *kernel), then (O, r, 1 …), ranks in multiples of `each`."""

    def __init__(
        self, weight: Tensor, gram: Tensor | None = None, rows: Tensor | None = None, *, each: int = 1
    ) -> None:
        self._shape = tuple(weight.shape)
        left, right, energies = truncated_svd(weight.flatten(1), gram, rows)
        self._left, self._right = left.to(weight.dtype), right.to(weight.dtype)
        lost = _lost(energies)
        self.options = [Option("svd", (r,), self._shapes(r), lost[r]) for r in range(each, len(energies) + 1, each)]

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        return (rank, *self._shape[1:]), (self._shape[0], rank, *_ones(self._shape))

    def factors(self, option: Option) -> tuple[Tensor, ...]:
        """First what reads the input."""
        (rank,), (first, last) = option.ranks, option.shapes
        return self._right[:rank].reshape(first).contiguous(), self._left[:, :rank].reshape(last).contiguous()


class Tucker2:
    """Three factors: (r, I, 1 …), the core (s, r, *kernel) and (O, s, 1 …); the first is left away where r = I, the
    last where s = O (Kim et al. 2016, "Compression of deep convolutional neural networks for fast and low power mobile
    applications").

    Truncated mode after mode: the inputs' subspace under their moments by channel, the core refitted to it under all
    moments, then the outputs' subspace. Without moments that is the sequentially truncated higher-order SVD
    (Vannieuwenhoven et al. 2012).
    """

    def __init__(self, weight: Tensor, gram: Tensor | None = None, *, each: int = 1) -> None:
        self._weight, self._gram = weight.double().flatten(2), _moments(weight, gram)
        self._dtype, self._shape = weight.dtype, tuple(weight.shape)
        outputs, inputs, kernel = self._weight.shape
        channels = self._gram.view(inputs, kernel, inputs, kernel).diagonal(dim1=1, dim2=3).sum(-1)
        rows = self._weight.permute(0, 2, 1).reshape(-1, inputs)
        about = None if gram is None else damped(channels, 1e-9, 1e-30)
        self._inputs = truncated_svd(rows, about, torch.ones(len(rows)))[1]
        self._seen = self._weight.flatten(1) @ self._gram
        total = float((self._seen * self._weight.flatten(1)).sum())
        self.options = []
        for r in _candidates(inputs, each):
            core, moments, kept = self._core(r)
            energies = truncated_svd(core, moments)[2]
            lost = _lost(energies, total, total - kept)
            self.options += [
                Option("tucker2", (r, s), self._shapes(r, s), lost[min(s, len(energies))], core=int(r < inputs))
                for s in _candidates(outputs, each)
                if s <= len(energies) or s == outputs  # more directions than the core has are none
            ]

    def _shapes(self, r: int, s: int) -> tuple[tuple[int, ...], ...]:
        outputs, inputs, *kernel = self._shape
        ones = _ones(self._shape)
        first, last = (r, inputs, *ones), (outputs, s, *ones)
        return (*([first] if r < inputs else []), (s, r, *kernel), *([last] if s < outputs else []))

    def _core(self, r: int) -> tuple[Tensor, Tensor, float]:
        """The core (O, r × kernel) nearest behind r inputs, the moments it sees, and the energy that it carries."""
        outputs, inputs, kernel = self._weight.shape
        if r == inputs:
            return self._weight.flatten(1), self._gram, float((self._seen * self._weight.flatten(1)).sum())
        first = self._inputs[:r]
        half = torch.tensordot(first, self._gram.view(inputs, -1), 1).view(r, kernel, inputs, kernel)
        moments = torch.einsum("rkjl,sj->rksl", half, first).reshape(r * kernel, r * kernel)
        cross = torch.einsum("ojl,sj->osl", self._seen.view(outputs, inputs, kernel), first).flatten(1)
        core = torch.cholesky_solve(cross.mT, cholesky(moments)).mT
        return core, moments, float((core * cross).sum())

    def factors(self, option: Option) -> tuple[Tensor, ...]:
        """First what reads the input."""
        r, s = option.ranks
        core, moments, _ = self._core(r)
        parts = [self._inputs[:r]] if r < self._shape[1] else []
        if s < self._shape[0]:
            left, right, _ = truncated_svd(core, moments)
            parts += [right[:s], left[:, :s]]
        else:
            parts.append(core)
        return tuple(p.reshape(s).to(self._dtype).contiguous() for p, s in zip(parts, option.shapes, strict=True))


class Spatial:
    """Two factors of a kernel of two dimensions: (r, I, height, 1), then (O, r, 1, width) (Jaderberg et al. 2014,
    "Speeding up convolutional neural networks with low rank expansions")."""

    def __init__(self, weight: Tensor, gram: Tensor | None = None, *, each: int = 1) -> None:
        self._dtype = weight.dtype
        outputs, inputs, height, width = weight.shape
        moments = _moments(weight, gram)
        rows = None
        if gram is not None:  # what the first factor sees, at all columns of the kernel
            by_column = gram.view(inputs, height, width, inputs, height, width).diagonal(dim1=2, dim2=5).sum(-1)
            rows = damped(by_column.reshape(inputs * height, -1), 1e-9, 1e-30)
        matrix = weight.double().permute(0, 3, 1, 2).reshape(outputs * width, inputs * height)
        self._left, self._right, _ = truncated_svd(matrix, rows)
        most = min(len(self._right), weight.numel() // (outputs * width + inputs * height))
        error = _error(weight, moments)
        self.options = []
        for r in _candidates(most, each):
            shapes = ((r, inputs, height, 1), (outputs, r, 1, width))
            first, last = self._parts(r, shapes)
            self.options.append(Option("spatial", (r,), shapes, error(merged(first, last))))

    def _parts(self, rank: int, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        outputs, _, _, width = shapes[1]
        last = self._left[:, :rank].reshape(outputs, 1, width, rank).permute(0, 3, 1, 2)
        return self._right[:rank].reshape(shapes[0]), last

    def factors(self, option: Option) -> tuple[Tensor, ...]:
        """First what reads the input."""
        return tuple(p.to(self._dtype).contiguous() for p in self._parts(option.ranks[0], option.shapes))


class Cp:
    """Three factors: (r, I, 1 …), one kernel a channel (r, 1, *kernel) and (O, r, 1 …): a sum of r products of an
    output, an input and a kernel (Lebedev et al. 2015, "Speeding-up convolutional neural networks using fine-tuned
    CP-decomposition", with the kernel as one mode). Found by alternating least squares, without the moments, which only
    say how large the error is."""

    def __init__(self, weight: Tensor, gram: Tensor | None = None, *, each: int = 1) -> None:
        outputs, inputs, *kernel = weight.shape
        error = _error(weight, _moments(weight, gram))
        most = weight.numel() // (outputs + inputs + math.prod(kernel))
        self._made: dict[int, tuple[Tensor, ...]] = {}
        self.options = []
        for r in _candidates(most, each, _CP_RANKS):
            shapes = ((r, inputs, *_ones(weight.shape)), (r, 1, *kernel), (outputs, r, *_ones(weight.shape)))
            parts = [p.reshape(s) for p, s in zip(_alternating(weight.double().flatten(2), r), shapes, strict=True)]
            self._made[r] = tuple(p.to(weight.dtype).contiguous() for p in parts)
            self.options.append(Option("cp", (r,), shapes, error(dense(parts)), core=1))

    def factors(self, option: Option) -> tuple[Tensor, ...]:
        """First what reads the input."""
        return self._made[option.ranks[0]]


#: Ways to write the weight of a convolution as a product, by name.
FORMS: dict[str, Callable[..., Decomposition]] = {"tucker2": Tucker2, "svd": Svd, "spatial": Spatial, "cp": Cp}


def merged(first: Tensor, last: Tensor) -> Tensor:
    """The weight (O, I, …) of two layers after one another, (R, I, …) and (O, R, …), of which in every dimension of the
    kernel at most one looks at more than one position. `last` may have a kernel a channel, (R, 1, …)."""
    if last.shape[1] == 1 < first.shape[0]:
        last = torch.diag_embed(last[:, 0].movedim(0, -1)).movedim((-2, -1), (0, 1))
    kernel = [a * b for a, b in zip(first.shape[2:], last.shape[2:], strict=True)]
    size = len(kernel)
    product: Tensor = torch.tensordot(last.movedim(1, -1), first, 1)  # (O, *last, I, *first)
    order = [0, size + 1, *(d for k in range(size) for d in (1 + k, size + 2 + k))]
    return product.permute(order).reshape(last.shape[0], first.shape[1], *kernel)


def dense(factors: Sequence[Tensor]) -> Tensor:
    """The weight that several factors make, the first one being met first."""
    weight = factors[0]
    for factor in factors[1:]:
        weight = merged(weight, factor)
    return weight


def _ones(shape: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (len(shape) - 2)


def _candidates(most: int, each: int, count: int = _RANKS) -> list[int]:
    """About `count` ranks up to `most`, multiples of `each`, and `most` itself."""
    step = max(1, round(most / count / each)) * each
    return sorted({*range(step, most + 1, step), *([most] if most > 0 else [])})


def _lost(energies: Tensor, total: float | None = None, before: float = 0.0) -> list[float]:
    """The share of `total` that is lost at each rank from 0 on, with what was lost `before`."""
    left = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    whole = float(left[0]) if total is None else total
    return ((left + max(before, 0.0)) / max(whole, 1e-300)).tolist()


def _moments(weight: Tensor, gram: Tensor | None) -> Tensor:
    size = weight[0].numel()
    return torch.eye(size, dtype=torch.float64) if gram is None else gram.double()


def _error(weight: Tensor, moments: Tensor) -> Callable[[Tensor], float]:
    flat = weight.double().flatten(1)
    total = float(((flat @ moments) * flat).sum())

    def error(other: Tensor) -> float:
        off = other.double().flatten(1) - flat
        return float(((off @ moments) * off).sum()) / max(total, 1e-300)

    return error


def _alternating(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (r, I), kernels (r, K) and outputs (O, r) of the CP decomposition of (O, I, K), equally large each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more components than a mode has directions start from random ones: as wanted
        _, parts = parafac(weight.numpy(), rank, n_iter_max=_SWEEPS, init="svd", tol=1e-7, random_state=0)
    found = [torch.from_numpy(p) for p in parts]
    sizes = [p.norm(dim=0).clamp_min(1e-30) for p in found]
    even = (sizes[0] * sizes[1] * sizes[2]) ** (1 / 3)
    outputs, inputs, kernels = (p / s * even for p, s in zip(found, sizes, strict=True))
    return inputs.mT, kernels.mT, outputs
