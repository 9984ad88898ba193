"""Samples that are all held at once: how many fit into memory, and bound to a network's inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from penjing.analysis.footprint import Footprint
from penjing.network.network import Network

#: Most entries of one value that are kept for all samples together while layers are refitted (float32: 1 GiB).
_ENTRIES = 1 << 28
#: Most entries of one value in a batch.
_BATCH_ENTRIES = 1 << 24


def room_for(network: Network, size: Footprint, samples: int, most: int = 100) -> tuple[int, int]:
    """How many of `samples` can be held, and in batches of what size (at most `most`, if the network leaves a choice);
    `size` is the network's footprint."""
    count = max(2, min(samples, _ENTRIES // max(size.largest, 1)))
    batch = max(1, min(most, _BATCH_ENTRIES // max(size.largest, 1)))
    return count, batch if network.batch_is_dynamic else network.inputs[0].shape[0]


def bind_all(network: Network, batches: Iterable[tuple[Any, Any]]) -> list[dict[str, Tensor]]:
    """The inputs of batches of (inputs, labels), bound; what does not fill a fixed batch is left out."""
    bound = (network.bind(inputs) for inputs, _ in batches)
    first = network.inputs[0]
    return [b for b in bound if network.batch_is_dynamic or b[first.name].shape[0] == first.shape[0]]
