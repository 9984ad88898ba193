"""Pruning single weights by what the layers' outputs lose, on a running network and without training.

In the order of the graph every layer first gets the dense weights that carry *its inputs in the pruned network* to *its
outputs in the original one* (`penjing.analysis.reconstruct`), then gives up weights about that optimum. How many each
layer gives up is decided before, on the original network, by error curves weighed with the outputs' sensitivity
(`penjing.analysis.sparse_allocation`). "chita" decides on all weights of the network together, from the loss's
gradients; the layers are then refitted on the weights that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penjing.analysis.reconstruct import Layer, find_layers, reconstruct
from penjing.analysis.sparse_allocation import allocate
from penjing.errors import RecipeError
from penjing.network import MaskWeights, Network, SetWeights
from penjing.progress import SILENT, Progress
from penjing.registry import did_you_mean
from penjing.tensors.chita import prune_by_fisher
from penjing.tensors.least_squares import Moments, constant_of, optimum
from penjing.tensors.sparse_reconstruction import Neighbours, eliminate_weights, on_support, sweep
from penjing.tensors.sparsity import Pattern

#: The criteria that rebuild what stays.
RECONSTRUCTING = ("obc", "sparsegpt", "chita")
#: Multiply-accumulates that go into the moments of a layer, and those that eliminating one weight at a time may take.
_WORK, _ELIMINATION = 1.6e10, 4e12
_DAMPING = 1e-3
#: Steps from dense to sparse, gradients being looked at anew before each, and bytes of gradients held at once.
_STAGES, _GRADIENT_BYTES = 4, 1 << 30

Gradients = Callable[[Network], Iterable[Mapping[str, Tensor]]]
#: Scores by parameter, and the share of all that shall be zero → masks in the parameters' shapes.
Drawing = Callable[[Mapping[str, Tensor], float], dict[str, Tensor]]


@dataclass(frozen=True)
class Result:
    """What to do to the network: `masks` (True where a weight stays) for the parameters that could be judged, and
    `tensors`, new values of weights, biases and norm statistics. `errors` are relative output errors of the layers
    after, in the pruned network; `notes` say what could not be done as asked."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def prune_layers(
    network: Network,
    criterion: str,
    *,
    sparsity: float,
    names: Sequence[str],
    batches: list[dict[str, Tensor]],
    keep: Mapping[str, float] | None = None,
    pattern: Pattern | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Masks and new values that take the share `sparsity` out of the weights `names` together, by "obc" or "sparsegpt".

    To be applied as `MaskWeights` for every one of `masks`, then `SetWeights` for every one of `tensors`. Weights of
    layers that cannot be refitted are in neither.

    `batches` are bound inputs without labels (1000 to 2000 samples). `keep` gives the share that stays of each
    parameter (None: found here, so that the outputs suffer least). A `pattern` of n in m neighbours overrides both.
    Weights masked before stay masked and count.
    """
    _require(criterion, ("obc", "sparsegpt"), batches)
    layers = {layer.weight: layer for layer in find_layers(network) if layer.weight in set(names)}
    tensors, result = network.tensors(), Result()
    sizes = {name: tensors[name].numel() for name in layers}
    gone = {name: 0 for name in layers}
    if pattern is None and keep is not None:
        gone = {name: round((1 - keep[name]) * size) for name, size in sizes.items()}
    elif pattern is None:
        gone = allocate(network, list(layers.values()), batches, round(sparsity * sum(sizes.values())), progress)

    def solve(layer: Layer, moments: Moments, start: Tensor, constant: bool) -> tuple[Tensor, Tensor | None]:
        hessian, dense = optimum(moments, start, bias=constant, damping=_DAMPING)
        alive = torch.ones_like(start, dtype=torch.bool)
        if layer.weight in network.masks:
            alive = network.masks[layer.weight].view_as(start)
            dense = on_support(hessian, dense, alive)
        one_by_one = criterion == "obc"
        if one_by_one and start[..., 0].numel() * start.shape[2] ** 3 > _ELIMINATION:
            one_by_one = False
            result.notes.append(f"{layer.weight} is too wide for 'obc': judged as 'sparsegpt' does")
        taps = int(tensors[layer.weight].shape[2:].numel())
        mask = _mask(hessian, dense, alive, gone[layer.weight], pattern, taps, one_by_one)
        result.masks[layer.weight] = mask.reshape(tensors[layer.weight].shape)
        fitted = on_support(hessian, dense, mask)
        return fitted, constant_of(moments, fitted) if constant else None

    refit = reconstruct(network, network, {}, batches, only=layers, solve=solve, work=_WORK, progress=progress)
    result.tensors.update(refit.tensors)
    result.errors.update({name: after for name, (_, after) in refit.errors.items()})
    return result


def _mask(
    hessian: Tensor, dense: Tensor, alive: Tensor, gone: int, pattern: Pattern | None, taps: int, one_by_one: bool
) -> Tensor:
    columns = dense.shape[2]
    if pattern is None:
        if one_by_one:
            return eliminate_weights(hessian, dense, alive=alive).mask(gone, columns) & alive
        return sweep(hessian, dense, gone / dense.numel(), alive=alive)[1] & alive
    side = Neighbours.of(columns // taps, taps, pattern.group)
    hessian, dense, living = side.hessian(hessian), side.columns(dense), side.columns(alive)
    if one_by_one:
        families = torch.arange(dense.shape[2]) // pattern.group
        traces = eliminate_weights(
            hessian, dense, alive=living, families=families, per_family=pattern.group - pattern.keep
        )
        mask = traces.mask(traces.order.numel(), dense.shape[2])
    else:
        mask = sweep(hessian, dense, 0.0, alive=living, pattern=(pattern.keep, pattern.group))[1]
    return side.back(mask, columns) & alive


@torch.no_grad()
def prune_together(
    network: Network,
    *,
    sparsity: float,
    names: Sequence[str],
    batches: list[dict[str, Tensor]],
    gradients: Gradients,
    draw: Drawing,
    progress: Progress = SILENT,
) -> Result:
    """Masks and new values by "chita": all weights `names` of the network are decided on together, in some stages.

    `gradients`, called with a network, gives the gradients of the loss by parameter for a few hundred small batches;
    `draw` says which weights may stay. Afterwards the layers that can be are refitted on `batches`, as in
    `prune_layers`.
    """
    _require("chita", ("chita",), batches)
    tensors = network.tensors()
    sizes = [tensors[name].numel() for name in names]
    shapes = {name: tensors[name].shape for name in names}
    held = sum(int((~network.masks[name]).sum()) for name in names if name in network.masks) / max(sum(sizes), 1)
    current, masks = network, dict[str, Tensor]()

    def split(flat: Tensor) -> dict[str, Tensor]:
        return {n: t.view(shapes[n]) for n, t in zip(names, torch.split(flat, sizes), strict=True)}

    with progress.task("deciding on all weights together", _STAGES) as advance:
        for stage in range(1, _STAGES + 1):
            share = 1 - (1 - held) * ((1 - sparsity) / (1 - held)) ** (stage / _STAGES)
            rows = _rows(gradients(current), names, max(16, _GRADIENT_BYTES // (4 * max(sum(sizes), 1))))
            weight = torch.cat([current.tensors()[name].detach().float().flatten() for name in names])

            def project(values: Tensor, share: float = share) -> Tensor:
                drawn = draw({name: part.abs() for name, part in split(values).items()}, max(share, held))
                return torch.cat([drawn[name].flatten() for name in names])

            found, mask = prune_by_fisher(rows, weight, project)
            masks = {name: part.clone() for name, part in split(mask).items()}
            current = network.apply(
                [*(MaskWeights(parameter=n, mask=m) for n, m in masks.items()),
                 *(SetWeights(parameter=n, value=v.to(tensors[n].dtype)) for n, v in split(found).items())]
            )  # fmt: skip
            advance(1)

    def solve(layer: Layer, moments: Moments, start: Tensor, constant: bool) -> tuple[Tensor, Tensor | None]:
        hessian, dense = optimum(moments, start, bias=constant, damping=_DAMPING)
        fitted = on_support(hessian, dense, masks[layer.weight].view_as(start))
        return fitted, constant_of(moments, fitted) if constant else None

    refit = reconstruct(network, current, {}, batches, only=names, solve=solve, work=_WORK, progress=progress)
    values = {name: current.tensors()[name].detach() for name in names}
    return Result(masks, {**values, **refit.tensors}, {name: after for name, (_, after) in refit.errors.items()})


@torch.enable_grad()
def _rows(found: Iterable[Mapping[str, Tensor]], names: Sequence[str], most: int) -> Tensor:
    """Gradients as rows (batches, weights), at most `most`."""
    rows = []
    for gradient in found:
        rows.append(torch.cat([gradient[name].detach().float().flatten() for name in names]))
        if len(rows) == most:
            break
    return torch.stack(rows)


def _require(criterion: str, known: Sequence[str], batches: Sequence[object]) -> None:
    if criterion not in known:
        raise RecipeError(
            f"'{criterion}' is no criterion that rebuilds what stays; there are {', '.join(RECONSTRUCTING)}",
            hint=did_you_mean(criterion, RECONSTRUCTING),
        )
    if not batches:
        raise RecipeError(f"criterion '{criterion}' needs samples", hint="give data, or use 'magnitude'")
