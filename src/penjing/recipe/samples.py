"""What Steps draw from a Context: bound inputs that are all held at once, and gradients of the task's loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from penjing.analysis.footprint import Footprint
from penjing.analysis.gradients import gradients
from penjing.analysis.ranking import Ranked, rank
from penjing.errors import DataError
from penjing.network import Network
from penjing.network.channels.groups import Group
from penjing.recipe.context import Context
from penjing.tensors.criteria import CRITERIA

#: Most entries of one value that are kept for all samples together (float32: 1 GiB).
_ENTRIES = 1 << 28
#: Most entries of one value in a batch.
_BATCH_ENTRIES = 1 << 24
#: Most entries of the inputs of a batch that is only looked at.
_CACHED = 2**19
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
    return [network.bind(inputs) for inputs, _ in drawn if free or _count(inputs) == batch]


def unlabelled(network: Network, context: Context, limit: int) -> Iterator[Any]:
    """Inputs of the first `limit` samples, in batches small enough for a processor's caches; what does not fill a fixed
    batch is left out. Raises DataError without data."""
    if context.data is None:
        raise DataError("samples are needed and no data was given", hint="a hundred without labels are enough")
    fixed = network.inputs[0].shape[0]
    values = sum(math.prod(i.shape[1:]) for i in network.inputs)
    size = min(limit, max(4, min(32, _CACHED // max(1, values)))) if network.batch_is_dynamic else fixed
    for inputs, _ in context.data.batches(size, limit=max(limit, size)):
        if network.batch_is_dynamic or _count(inputs) == fixed:
            yield inputs


def _count(inputs: Any) -> int:
    return len(next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)))


def loss_gradients(network: Network, context: Context) -> list[dict[str, Tensor]]:
    """Gradients of the task's loss by parameter, one dictionary a batch; none without data or task."""
    if context.data is None or context.task is None:
        return []
    free, fixed = network.batch_is_dynamic, network.inputs[0].shape[0]
    batch = _GRADIENT_BATCH if free else fixed
    limit = max(_GRADIENT_BATCH * _GRADIENT_BATCHES, batch)
    drawn = context.data.batches(batch, shuffle=True, seed=context.seed, limit=limit)
    return gradients(network, ((x, y) for x, y in drawn if free or _count(x) == fixed), context.task.loss)


def ranked(
    network: Network,
    context: Context,
    groups: Sequence[Group],
    criterion: str,
    batches: list[dict[str, Tensor]],
    size: Footprint,
    *,
    by_cost: bool,
    refitted: bool,
) -> Sequence[Ranked]:
    """`penjing.analysis.ranking.rank` with the gradients, seed and progress of `context`."""
    needs = CRITERIA.get(criterion).needs
    return rank(
        network, groups, criterion, batches, size, by_cost=by_cost, refitted=refitted,
        gradients=loss_gradients(network, context) if "gradients" in needs else (),
        seed=context.seed, progress=context.progress,
    )  # fmt: skip


def require_labels(name: str, context: Context) -> None:
    """Raises DataError if the criterion `name` goes by labels and the samples have none."""
    if "gradients" not in CRITERIA.get(name).needs or context.data is None:
        return
    if next(context.data.batches(1, limit=1))[1] is None:
        raise DataError(
            f"criterion '{name}' needs labels and the data has none",
            hint="give labelled samples, or use 'l2', which needs none",
        )
