"""What a network is, without running it on a target: its look, its digest, its bytes on the wire."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from penjing import digests, package
from penjing.data import Data
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
    return digests.digest(*network.state())


class DataDigest:
    """SHA-256 of samples as they stream by; however they are batched, the same samples in the same order give it."""

    def __init__(self) -> None:
        self.samples = 0
        self._parts: dict[str, Any] = {}

    def update(self, inputs: Any, labels: Any, n: int) -> None:
        """Take in a batch of ``n`` samples."""
        self._take("x", inputs)
        self._take("y", labels)
        self.samples += n

    def to_dict(self) -> dict[str, Any]:
        """``{"samples", "sha256"}``."""
        whole = hashlib.sha256()
        for name in sorted(self._parts):
            whole.update(name.encode() + self._parts[name].digest())
        return {"samples": self.samples, "sha256": whole.hexdigest()}

    def _take(self, name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value):
                self._take(f"{name}.{key}", value[key])
        elif isinstance(value, tuple | list):
            for index, inner in enumerate(value):
                self._take(f"{name}.{index}", inner)
        elif isinstance(value, Tensor):
            array = np.ascontiguousarray(value.detach().cpu().numpy())
            key = f"{name} {array.dtype.str} {array.shape[1:]}"
            self._parts.setdefault(key, hashlib.sha256()).update(array.tobytes())


def data_digest(data: Data) -> dict[str, Any]:
    """``{"samples", "sha256"}`` of everything in ``data``."""
    found = DataDigest()
    for inputs, labels in data.batches(256):
        first = (
            inputs
            if isinstance(inputs, Tensor)
            else next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))
        )
        found.update(inputs, labels, len(first))
    return found.to_dict()


def wire_bytes(network: Network) -> int:
    """The size of the packed network."""
    topology, arrays = network.state()
    return len(package.encode(topology, arrays, metadata={"name": network.name}))
