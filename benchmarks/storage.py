"""Bytes of packages at a small loss of accuracy, after training, without labels or gradients of a loss.

    python benchmarks/storage.py --data DIR [--only resnet20 resnet56 keywords] [--threads 1] [--out FILE.json]

DIR holds hub.py with the pretrained networks and their data. For each network `pack(max_drop=)` looks for the fewest
bytes that keep the accuracy on training images (half of them fit the grids, the other half judge); keywords have no
others than their 1000 test clips, of which every second one takes that part. A row tells the bytes of the whole file
and the accuracy of what is unpacked, on the whole test set (the other clips).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sections import accuracy, run
from torch.utils.data import TensorDataset

import penjing as pj

DROPS = (0.25, 0.5, 1.0)


def packed(
    name: str, load: Callable[[Any], tuple[Any, Any]], data: Path, drops: tuple[float, ...] = DROPS
) -> Iterator[dict[str, Any]]:
    import hub

    looked, tested = load(hub)
    network = pj.capture(getattr(hub, name)(), inputs=(looked.tensors[0][:2],), name=name)
    yield {"network": name, "float accuracy": accuracy(network, tested), "float bytes": 4 * network.parameter_count()}
    for drop in drops:
        with tempfile.TemporaryDirectory() as folder:
            path, began = Path(folder) / "net.penjing", time.process_time()
            size = pj.pack(network, path, max_drop=drop, data=looked, task="classification")
            spent = time.process_time() - began
            found = accuracy(pj.unpack(path), tested)
        yield {"network": name, "max_drop": drop, "bytes": size, "accuracy": found, "processor seconds": round(spent)}


def cifar(hub: Any) -> tuple[Any, Any]:
    return hub.cifar10_train(), hub.cifar10_test()


def clips(hub: Any) -> tuple[Any, Any]:
    every = hub.keywords().tensors
    return tuple(TensorDataset(*(t[start::2] for t in every)) for start in (0, 1))  # type: ignore[return-value]


SECTIONS = {
    "resnet20": partial(packed, "resnet20", cifar),
    "resnet56": partial(packed, "resnet56", cifar, drops=(0.5,)),
    "keywords": partial(packed, "dscnn", clips),
}

if __name__ == "__main__":
    run(__doc__, SECTIONS, "storage")
