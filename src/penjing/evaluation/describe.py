"""What a network is, without running it on a target: its look, its digest, its bytes on the wire."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from penjing import package
from penjing.network import Network


def describe(network: Network) -> dict[str, Any]:
    """The ``network`` entry of report.json."""
    return {
        "name": network.name,
        "task": network.task,
        "inputs": [
            {
                "name": spec.name,
                "shape": ["N" if d in spec.dynamic else s for d, s in enumerate(spec.shape)],
                "dtype": str(spec.dtype).removeprefix("torch."),
            }
            for spec in network.inputs
        ],
        "outputs": list(network.output_names),
        "digest": digest(network),
    }


def digest(network: Network) -> str:
    """SHA-256 of the graph and every tensor: two networks with the same digest compute the same."""
    topology, arrays = network.state()
    found = hashlib.sha256(topology.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def wire_bytes(network: Network) -> int:
    """The size of the packed network."""
    topology, arrays = network.state()
    return len(package.encode(topology, arrays, metadata={"name": network.name}))
