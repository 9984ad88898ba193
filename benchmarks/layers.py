"""Quality layers: what they cost beside one layer, and how good the network is after each.

    python benchmarks/layers.py --data DIR [--images 2000] [--layers 2] [--json FILE]

DIR holds hub.py with networks and images. Each network is quantized to int8 a channel (Quantize without activations),
after four of five weights were pruned too, and by CodeWeights at several rates, with 1000 training images; packed at
once and in layers, without samples and with 500 training images that say where errors do least. A row tells
`single_bytes`, `layered_bytes`, their ratio, and of each layer its bytes, their share, and the accuracy on the test
images of the network unpacked from so many layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sections import accuracy, first
from torch.utils.data import TensorDataset

import penjing as pj
from penjing import package

STEPS = {
    "int8": [pj.Quantize(activations=None)],
    "int8, 80 % zeros": [pj.PruneWeights(sparsity=0.8, criterion="obc", samples=200), pj.Quantize(activations=None)],
    "CodeWeights(0.001)": [pj.CodeWeights(rate=0.001)],
    "CodeWeights(0.002)": [pj.CodeWeights(rate=0.002)],
    "CodeWeights(0.02)": [pj.CodeWeights(rate=0.02)],
}


def row(network: pj.Network, layers: int, data: Any, test: TensorDataset, folder: Path) -> dict[str, Any]:
    single = pj.pack(network, folder / "single.penjing")
    began = time.process_time()
    size = pj.pack(network, folder / "net.penjing", layers=layers, data=data)
    seconds = time.process_time() - began
    contents = package.inspect(folder / "net.penjing")
    ladder = [
        {
            "layer": rung.layer,
            "bytes": rung.bytes,
            "share": round(rung.share, 4),
            "accuracy": accuracy(pj.unpack(folder / "net.penjing", layers=rung.layer), test),
        }
        for rung in contents.ladder
    ]
    return {
        "single_bytes": single,
        "layered_bytes": size,
        "ratio": round(size / single, 5),
        "parts": contents.parts,
        "pack_seconds": round(seconds, 2),
        "ladder": ladder,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="*", default=["resnet20", "resnet56"])
    parser.add_argument("--steps", nargs="*", default=list(STEPS), help=", ".join(STEPS))
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(args.data))
    import hub

    torch.set_num_threads(1)
    train, test = hub.cifar10_train(), first(hub.cifar10_test(), args.images)
    rows: list[dict[str, Any]] = []
    for name in args.networks:
        network = pj.capture(getattr(hub, name)(), inputs=train[0][0][None].repeat(2, 1, 1, 1), name=name)
        for kind in args.steps:
            done = pj.compress(network, pj.Recipe(*STEPS[kind]), data=first(train, 1000), seed=0).network
            for samples in (0, 500):
                data = first(train, samples) if samples else None
                with tempfile.TemporaryDirectory() as folder:
                    found = row(done, args.layers, data, test, Path(folder))
                rows.append({"network": name, "kind": kind, "samples": samples, "test_images": args.images, **found})
                print(json.dumps(rows[-1]), flush=True)
                if args.json:
                    args.json.write_text(json.dumps({"benchmark": "layers", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
