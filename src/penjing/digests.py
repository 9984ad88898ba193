"""The name of a network: a SHA-256 of its plain values, the same in memory, in a package and in a report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest(topology: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256, in hexadecimal, of the topology and every tensor: two networks with the same digest compute the same.

    The topology holds the history, and that the digest of what each step started from: a digest also stands for
    everything that came before.
    """
    found = hashlib.sha256(topology.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()
