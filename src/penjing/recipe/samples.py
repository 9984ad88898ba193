"""What Steps draw from a Context: bound inputs that are all held at once, and gradients of the task's loss."""

from __future__ import annotations

from torch import Tensor

from penjing.analysis.footprint import Footprint
from penjing.analysis.gradients import gradients
from penjing.network import Network
from penjing.recipe.context import Context

#: Most entries of one value that are kept for all samples together (float32: 1 GiB).
_ENTRIES = 1 << 28
#: Most entries of one value in a batch.
_BATCH_ENTRIES = 1 << 24
_GRADIENT_BATCH = 64
_GRADIENT_BATCHES = 6


def bound_samples(
    network: Network, context: Context, size: Footprint, samples: int, notes: list[str], most: int = 100
) -> list[dict[str, Tensor]]:
    """`samples` bound inputs in batches of at most `most`, as far as they fit in memory (else `notes` get a line); none
    without data. `size` is the network's footprint. What does not fill a fixed batch is left out."""
    if context.data is None:
        return []
    count = max(2, min(samples, _ENTRIES // max(size.largest, 1)))
    if count < samples:
        notes.append(f"{count} samples instead of {samples}, to fit in memory")
    first, free = network.inputs[0], network.batch_is_dynamic
    batch = max(1, min(most, _BATCH_ENTRIES // max(size.largest, 1))) if free else first.shape[0]
    drawn = context.data.batches(batch, shuffle=True, seed=context.seed, limit=count)
    bound = (network.bind(inputs) for inputs, _ in drawn)
    return [b for b in bound if free or b[first.name].shape[0] == first.shape[0]]


def loss_gradients(network: Network, context: Context) -> list[dict[str, Tensor]]:
    """Gradients of the task's loss by parameter, one dictionary a batch; none without data or task."""
    if context.data is None or context.task is None:
        return []
    limit = _GRADIENT_BATCH * _GRADIENT_BATCHES
    drawn = context.data.batches(_GRADIENT_BATCH, shuffle=True, seed=context.seed, limit=limit)
    return gradients(network, drawn, context.task.loss)
