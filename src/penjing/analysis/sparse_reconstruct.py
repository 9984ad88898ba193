"""Pruning single weights by what the layers' outputs lose, on a running network and without training.

In the order of the graph every layer first gets the dense weights that carry *its inputs in the pruned network* to *its
outputs in the original one* (`penjing.analysis.reconstruct`), then gives up weights about that optimum. How many each
layer gives up is decided before, on the original network, by error curves weighed with the outputs' sensitivity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penjing.analysis.reconstruct import Layer, find_layers, reconstruct
from penjing.errors import RecipeError
from penjing.network import Network
from penjing.progress import SILENT, Progress
from penjing.registry import did_you_mean
from penjing.tensors.least_squares import Moments
from penjing.tensors.sparse_reconstruction import damped_hessian, eliminate_weights, on_support, sweep

#: The criteria that rebuild what stays.
RECONSTRUCTING = ("obc", "sparsegpt", "chita")
#: Multiply-accumulates that go into the moments of a layer.
_WORK = 1.6e10
_DAMPING = 1e-3

Gradients = Callable[[Network], Iterable[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Result:
    """What to do to the network: `masks` (True where a weight stays) for every parameter asked for, and `tensors`, new
    values of weights, biases and norm statistics. `errors` are relative output errors of the layers after, in the
    pruned network; `notes` say what could not be done as asked."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def prune_with_reconstruction(
    network: Network,
    criterion: str,
    *,
    sparsity: float,
    names: Sequence[str],
    batches: list[dict[str, Tensor]],
    keep: Mapping[str, float] | None = None,
    pattern: str | None = None,
    gradients: Gradients | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Result:
    """Masks and new values that take the share `sparsity` out of the weights `names` together.

    To be applied as `MaskWeights` for every one of `masks`, then `SetWeights` for every one of `tensors`.

    `criterion` is one of `RECONSTRUCTING`; `batches` are bound inputs without labels (1000 to 2000 samples). `keep`
    gives the share that stays of each parameter (None: found here, so that the outputs suffer least). `pattern` "2:4"
    keeps 2 of every 4 neighbours along the inputs (of a convolution: input channels, at each place of the kernel) and
    overrides `sparsity`. "chita" needs `gradients`: called with a network, it gives the gradients of the loss, by
    parameter, for a few hundred small batches. Weights masked before stay masked and count.

    Raises RecipeError for an unknown criterion, for missing samples or gradients.
    """
    if criterion not in RECONSTRUCTING:
        raise RecipeError(
            f"'{criterion}' is no criterion that rebuilds what stays; there are {', '.join(RECONSTRUCTING)}",
            hint=did_you_mean(criterion, RECONSTRUCTING),
        )
    if not batches:
        raise RecipeError(f"criterion '{criterion}' needs samples", hint="give data, or use 'magnitude'")
    layers = {layer.weight: layer for layer in find_layers(network) if layer.weight in set(names)}
    result = Result()
    shares = dict(keep) if keep is not None else dict.fromkeys(names, 1 - sparsity)

    def solve(layer: Layer, moments: Moments, start: Tensor, constant: bool) -> tuple[Tensor, Tensor | None]:
        gram, cross = moments.centred() if constant else (moments.xx, moments.xt)
        hessian = damped_hessian(gram, moments.rows, _DAMPING)
        dense = start + torch.linalg.solve(hessian, cross - gram @ start.mT).mT
        gone = round((1 - shares[layer.weight]) * start.numel())
        if criterion == "obc":
            mask = eliminate_weights(hessian, dense).mask(gone, start.shape[2])
        else:
            _, mask = sweep(hessian, dense, gone / start.numel())
        fitted = on_support(hessian, dense, mask)
        result.masks[layer.weight] = mask.reshape(network.tensors()[layer.weight].shape)
        if not constant:
            return fitted, None
        mean_x, mean_t = moments.sum_x / moments.rows, moments.sum_t / moments.rows
        return fitted, mean_t - (fitted @ mean_x[..., None])[..., 0]

    refit = reconstruct(network, network, {}, batches, only=layers, solve=solve, work=_WORK, progress=progress)
    result.tensors.update(refit.tensors)
    result.errors.update({name: after for name, (_, after) in refit.errors.items()})
    return result
