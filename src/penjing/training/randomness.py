"""Random numbers of torch, numpy and Python: seeded together, kept, and put back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def states() -> dict[str, Any]:
    """The state of every generator that a data set or a network may draw from, as plain data for JSON."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    found = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return found


def restore(kept: Mapping[str, Any]) -> None:
    """Puts back what `states` gave."""
    torch.set_rng_state(_tensor(kept["torch"]))
    np.random.set_state(tuple(kept["numpy"]))
    version, keys, gauss = kept["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in kept and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(kept["cuda"]))


def seed(number: int) -> None:
    """Seeds every generator that a data set or a network may draw from."""
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Inside, all is drawn from the seed `number` on; the caller's random numbers go on afterwards as they were."""
    before = states()
    with torch.random.fork_rng():
        seed(number)
        try:
            yield
        finally:
            restore(before)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
