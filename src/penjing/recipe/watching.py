"""What a training watches on samples that it does not see, to keep its best weights and to end in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penjing.data import Data
from penjing.errors import DataError
from penjing.task import Task
from penjing.training import Batch, Monitor

#: The metric where there is no task or no label.
LOSS = "held-out loss"


def watching(
    held: Data,
    task: Task | None,
    loss: Callable[[nn.Module, Batch], Tensor],
    outputs: Callable[[nn.Module, Any], Any],
    *,
    batch_size: int,
    fixed: bool,
    patience: int | None,
) -> Monitor:
    """A Monitor of the task's metric on the samples `held`, or of the mean `loss` where there is no task or no label.

    `outputs(module, inputs)` gives what the task reads; `loss` takes batches (inputs, labels, None). A network that
    takes batches of `fixed` size is measured on whole ones; DataError if there is none.
    """
    first, labels = next(held.batches(batch_size))
    if fixed and _size(first) != batch_size:
        raise DataError(
            f"{_size(first)} samples are held out, too few for a batch of {batch_size}",
            hint="hold more out, or capture the network with a batch size that may change",
        )
    judged = task if labels is not None else None

    def measure(module: nn.Module) -> float:
        device = next(iter(module.state_dict().values())).device
        total, count = 0.0, 0
        for batch in held.batches(batch_size):
            size = _size(batch[0])
            if fixed and size != batch_size:
                continue
            inputs, wanted = pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)
            if judged is not None:
                scores = torch.as_tensor(judged.scores(outputs(module, inputs), wanted))
                total += float(scores.double().sum())
                count += scores.numel()
            else:
                total += float(loss(module, (inputs, wanted, None))) * size
                count += size
        return total / count

    if judged is None:
        return Monitor(metric=LOSS, measure=measure, higher_is_better=False, patience=patience)
    return Monitor(metric=judged.metric, measure=measure, higher_is_better=judged.higher_is_better, patience=patience)


def _size(inputs: Any) -> int:
    return len(next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)))
