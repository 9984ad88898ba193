"""What it costs a network's outputs to have one weight rounded, for every weight and every way of rounding it.

Harm is the mean squared change of the outputs (all floating ones), one weight rounded alone, relative to the outputs'
own mean square. With `classes`, the dimension along which the one output scores classes, it is what is felt of that:
the Kullback-Leibler divergence of the probabilities to second order, in nats. Harms of several weights add up as far
as their errors are small and independent; `together` says how far they are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.func import functional_call

from penjing.analysis.tail import Tails
from penjing.network.network import Network
from penjing.progress import SILENT, Progress

#: Weight → for each way of rounding it, the tensors that then have other values: itself, and perhaps a bias.
Ways = Mapping[str, Sequence[Mapping[str, Tensor]]]
Batches = Sequence[Mapping[str, Tensor]]  #: bound inputs
#: Numbers that are kept of the change of a batch's outputs.
_KEPT = 4096


@torch.no_grad()
def measured_changes(
    network: Network, ways: Ways, batches: Batches, progress: Progress = SILENT, *, classes: int | None = None
) -> dict[str, Tensor]:
    """By weight what each way does to the outputs, (ways, n) in float64, from one run of what lies behind it for each.

    The sum of squares of a row is that way's harm, products of rows say whether two changes go together. Of many
    outputs rows are a sketch (Charikar et al. 2002, "Count sketch": random signs, entries that share a place summed),
    scaled to the true sum of squares.
    """
    tails = Tails(network, batches)
    found: dict[str, Tensor] = {}
    signs: dict[int, Tensor] = {}  # by batch: made once
    with progress.task("rounding layer after layer", len(ways)) as advance:
        for name in sorted(ways, key=lambda n: tails.position([n])):
            tail = tails.behind({name}.union(*ways[name]))
            plain = [_floating(tail.run(i, {})) for i in range(len(batches))]
            size = sum(_size(p, classes) for p in plain)
            rows = []
            for changed in ways[name]:
                off = [_felt(_floating(tail.run(i, changed)), p, classes) for i, p in enumerate(plain)]
                rows.append(torch.cat([_sketch(o, i, signs) for i, o in enumerate(off)]))
            found[name] = torch.stack(rows) / max(size, 1e-300) ** 0.5
            advance(1)
    return found


def harms_of(changes: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The harm of every way, from what `measured_changes` found."""
    return {name: rows.square().sum(1).tolist() for name, rows in changes.items()}


def together(changes: Mapping[str, Tensor], order: Iterable[str]) -> Tensor:
    """(options, options), the options being all ways of the first weight in `order`, then of the second, …: the sum of
    a choice's rows and columns is the harm of all its roundings at once, to first order (Deng et al. 2023, "Mixed-
    precision quantization with cross-layer dependencies")."""
    rows = torch.cat([changes[name] for name in order])
    return rows @ rows.mT


def expected_harms(
    network: Network,
    ways: Ways,
    batches: Batches,
    *,
    probes: int = 64,
    seed: int = 0,
    progress: Progress = SILENT,
    classes: int | None = None,
) -> dict[str, list[float]]:
    """Harms to first order in the rounding, from `probes` backward passes for all weights and ways together.

    For a change d of a weight the mean square of J d, J the Jacobian of all outputs, is that of (Jᵀ r)·d over random
    signs r (Hutchinson's estimator of dᵀ JᵀJ d, JᵀJ being the Gauss-Newton matrix of the outputs' squared error: what
    HAWQ-V2, Dong et al. 2020, takes the trace of, here with the rounding's own direction). The standard error is about
    √(2 / probes) of a harm; relations between ways of rounding one weight are far more exact.
    """
    tensors = network.tensors()
    leaves = {n: tensors[n].detach().requires_grad_() for n in {n for w in ways.values() for c in w for n in c}}
    moved = {
        name: [{n: (value - tensors[n]).detach() for n, value in changed.items()} for changed in several]
        for name, several in ways.items()
    }
    found = {name: [0.0] * len(several) for name, several in ways.items()}
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-probes // len(batches))
    size = 0.0
    with progress.task("probing the outputs", rounds * len(batches)) as advance:
        for batch in batches:
            for _ in range(rounds):
                outputs = _floating(functional_call(network.graph_module, leaves, tuple(batch.values())))
                size += _size(outputs, classes)
                signs = [_signs(o.shape, generator).to(o.dtype) for o in outputs]
                if _scored(outputs, classes):
                    signs = [_unfelt(signs[0], outputs[0].detach(), cast(int, classes))]
                total = torch.stack([(o * s).sum() for o, s in zip(outputs, signs, strict=True)]).sum()
                gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                by_name = {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}
                for name, several in moved.items():
                    for way, d in enumerate(several):
                        along = (float((by_name[n] * v).sum(dtype=torch.float64)) for n, v in d.items() if n in by_name)
                        found[name][way] += sum(along) ** 2
                advance(1)
    return {name: [h / max(size, 1e-300) for h in several] for name, several in found.items()}


def noise_harms(
    network: Network, names: Iterable[str], batches: Batches, *, seed: int = 0, progress: Progress = SILENT
) -> dict[str, float]:
    """By tensor: the harm of independent noise of variance one on all its values, from one backward pass a batch.

    That is the trace of the Gauss-Newton matrix, which for a vector r of random signs is the mean of |Jᵀ r|²
    (Hutchinson's estimator; see `expected_harms`).
    """
    tensors = network.tensors()
    leaves = {n: tensors[n].detach().requires_grad_() for n in names}
    found, size, generator = dict.fromkeys(leaves, 0.0), 0.0, torch.Generator().manual_seed(seed)
    with progress.task("probing the outputs", len(batches)) as advance:
        for batch in batches:
            outputs = _floating(functional_call(network.graph_module, leaves, tuple(batch.values())))
            size += _square(outputs)
            signs = [_signs(o.shape, generator).to(o) for o in outputs]
            total = torch.stack([(o * s).sum() for o, s in zip(outputs, signs, strict=True)]).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                found[name] += 0.0 if gradient is None else _square([gradient])
            advance(1)
    return {name: value / max(size, 1e-300) for name, value in found.items()}


@torch.no_grad()
def output_harm(network: Network, other: Network, batches: Batches, *, classes: int | None = None) -> float:
    """The mean squared difference of the outputs of `other` from those of `network`, relative to these; with `classes`
    the divergence of its probabilities from theirs, in nats."""
    off = size = 0.0
    for batch in batches:
        plain, changed = (_floating(n.graph_module(*batch.values())) for n in (network, other))
        if _scored(plain, classes):
            p, q = (v[0].double().log_softmax(cast(int, classes)) for v in (plain, changed))
            off, size = off + float((p.exp() * (p - q)).sum()), size + _size(plain, classes) / 2
        else:
            off, size = off + _square([_felt(changed, plain, None)]), size + _size(plain, None)
    return off / max(size, 1e-300)


def _scored(outputs: Sequence[Tensor], classes: int | None) -> bool:
    """Whether there is only one output, and it scores classes: of several none may be left out."""
    return classes is not None and len(outputs) == 1


def _size(outputs: Sequence[Tensor], classes: int | None) -> float:
    """What a squared change is divided by: twice the number of choices between classes, else the outputs' square."""
    if _scored(outputs, classes):
        return 2.0 * outputs[0].numel() / outputs[0].shape[cast(int, classes)]
    return _square(outputs)


def _felt(changed: Sequence[Tensor], plain: Sequence[Tensor], classes: int | None) -> Tensor:
    """The change, flat, such that its square is the harm: of class scores d, √p (d - Σ p d) with their probabilities p,
    the square root of Fisher's information (Martens 2020, "New insights and perspectives on the natural gradient
    method", §5)."""
    if not _scored(plain, classes):
        return torch.cat([(c - p).detach().flatten() for c, p in zip(changed, plain, strict=True)])
    dim, off = cast(int, classes), changed[0] - plain[0]
    p = plain[0].softmax(dim)
    return (p.sqrt() * (off - (p * off).sum(dim, keepdim=True))).flatten()


def _unfelt(signs: Tensor, scores: Tensor, dim: int) -> Tensor:
    """What weighs a change as `_felt` weighed by `signs` does: the transposed of that."""
    p = scores.softmax(dim)
    signs = signs * p.sqrt()
    return signs - p * signs.sum(dim, keepdim=True)


def _floating(values: Sequence[Tensor]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _square(values: Sequence[Tensor]) -> float:
    return sum(float(v.detach().double().square().sum()) for v in values)


def _sketch(values: Tensor, batch: int, signs: dict[int, Tensor]) -> Tensor:
    """A vector (n,) in at most `_KEPT` numbers, float64, with the same sum of squares."""
    if len(values) <= _KEPT:
        return values.double()
    if batch not in signs:
        signs[batch] = _signs(values.shape, torch.Generator().manual_seed(batch)).to(torch.int8)
    padded: Tensor = torch.nn.functional.pad(values * signs[batch], (0, -len(values) % _KEPT))
    folded = padded.view(-1, _KEPT).sum(0, dtype=torch.float64)
    scaled: Tensor = folded * (_square([values]) ** 0.5 / folded.norm().clamp(min=1e-300))
    return scaled


def _signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2 - 1
