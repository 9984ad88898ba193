"""What it costs a network's outputs to have one weight rounded, for every weight and every way of rounding it.

Harm is the mean squared change of the outputs (all floating ones), one weight rounded alone, relative to the outputs'
own mean square. Harms of several weights add up as far as their errors are small and independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from penjing.analysis.tail import Tails
from penjing.network.network import Network
from penjing.progress import SILENT, Progress

Rounded = Mapping[str, Sequence[Tensor]]  #: weight → its values, rounded in each way
Batches = Sequence[Mapping[str, Tensor]]  #: bound inputs


@torch.no_grad()
def measured_harms(
    network: Network, rounded: Rounded, batches: Batches, progress: Progress = SILENT
) -> dict[str, list[float]]:
    """Harms as they are, from one run of what lies behind a weight for each weight and way."""
    tails = Tails(network, batches)
    found: dict[str, list[float]] = {}
    with progress.task("rounding layer after layer", len(rounded)) as advance:
        for name in sorted(rounded, key=lambda n: tails.position([n])):
            tail = tails.behind([name])
            plain = [_floating(tail.run(i, {})) for i in range(len(batches))]
            size = sum(_square(p) for p in plain)
            found[name] = []
            for value in rounded[name]:
                changed = (_floating(tail.run(i, {name: value})) for i in range(len(batches)))
                harm = sum(
                    _square([a - b for a, b in zip(p, c, strict=True)]) for p, c in zip(plain, changed, strict=True)
                )
                found[name].append(harm / max(size, 1e-300))
            advance(1)
    return found


def expected_harms(
    network: Network,
    rounded: Rounded,
    batches: Batches,
    *,
    probes: int = 64,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, list[float]]:
    """Harms to first order in the rounding, from `probes` backward passes for all weights and ways together.

    For a change d of a weight the mean square of J d, J the Jacobian of all outputs, is that of (Jᵀ r)·d over random
    signs r (Hutchinson's estimator of dᵀ JᵀJ d, JᵀJ being the Gauss-Newton matrix of the outputs' squared error: what
    HAWQ-V2, Dong et al. 2020, takes the trace of, here with the rounding's own direction). The standard error is about
    √(2 / probes) of a harm; relations between ways of rounding one weight are far more exact.
    """
    tensors = network.tensors()
    leaves = {name: tensors[name].detach().requires_grad_() for name in rounded}
    moved = {name: [(value - tensors[name]).detach() for value in ways] for name, ways in rounded.items()}
    found = {name: [0.0] * len(ways) for name, ways in rounded.items()}
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-probes // len(batches))
    size = 0.0
    with progress.task("probing the outputs", rounds * len(batches)) as advance:
        for batch in batches:
            for _ in range(rounds):
                outputs = _floating(functional_call(network.graph_module, leaves, tuple(batch.values())))
                size += _square(outputs)
                signs = [torch.randint(0, 2, o.shape, generator=generator).to(o.dtype) * 2 - 1 for o in outputs]
                total = torch.stack([(o * s).sum() for o, s in zip(outputs, signs, strict=True)]).sum()
                gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                for name, gradient in zip(rounded, gradients, strict=True):
                    if gradient is not None:
                        for way, d in enumerate(moved[name]):
                            found[name][way] += float((gradient * d).sum(dtype=torch.float64)) ** 2
                advance(1)
    return {name: [h / max(size, 1e-300) for h in ways] for name, ways in found.items()}


def _floating(values: Sequence[Tensor]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _square(values: Sequence[Tensor]) -> float:
    return sum(float(v.detach().double().square().sum()) for v in values)
