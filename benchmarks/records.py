"""The smallest packages of two classic networks for MNIST, trained from nothing: TrainLowEntropy.

    python benchmarks/records.py [lenet-300-100 lenet-5-caffe] --data DIR [--seeds 3] [--json FILE]

DIR holds hub.py with the digits. For each network and seed a dense one is trained, and from it one for each rate, with
its answers as the only labels. Rates and epochs were chosen on 10 000 training images held out (--held-out 10000: the
error is then theirs). A row tells `weight_bytes` (the packed file without its topology: weights, grids, tables
and index), `file_bytes` (all of it), `error` in percent on the 10 000 test images of the network that was unpacked, and
`cpu_minutes` (the dense network's training counted in). Rows are printed and kept as soon as they are there.
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
from torch import nn
from torch.utils.data import TensorDataset

import penjing as pj
from penjing import package

LENET_300_100 = (
    nn.Flatten, lambda: nn.Linear(784, 300), nn.ReLU, lambda: nn.Linear(300, 100), nn.ReLU, lambda: nn.Linear(100, 10)
)  # fmt: skip
LENET_5_CAFFE = (
    lambda: nn.Conv2d(1, 20, 5), lambda: nn.MaxPool2d(2), lambda: nn.Conv2d(20, 50, 5), lambda: nn.MaxPool2d(2),
    nn.Flatten, lambda: nn.Linear(800, 500), nn.ReLU, lambda: nn.Linear(500, 10),
)  # fmt: skip
#: Layers, epochs of the dense network, epochs for few bytes, rates (loss a kilobyte).
NETWORKS: dict[str, tuple[Any, float, float, tuple[float, ...]]] = {
    "lenet-300-100": (LENET_300_100, 30, 20, (0.003,)),
    "lenet-5-caffe": (LENET_5_CAFFE, 8, 20, (0.08, 0.005)),
}
ADAM: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "batch_size": 128, "augment": "affine",
                        "precision": "bf16"}  # fmt: skip


def minutes() -> float:
    return time.process_time() / 60


def error(network: pj.Network, samples: Any) -> float:
    module = network.module().eval()
    with torch.no_grad():
        right = [module(x).argmax(1) == y for x, y in zip(*(t.split(1000) for t in samples.tensors), strict=True)]
    return round(100 - 100 * float(torch.cat(right).double().mean()), 2)


def rows(name: str, seed: int, epochs: float | None, rates: list[float] | None, held_out: int) -> Any:
    import hub

    layers, dense_epochs, coded_epochs, own_rates = NETWORKS[name]
    samples, tests = hub.mnist_train(), hub.mnist_test()
    if held_out:
        tests = TensorDataset(*(t[-held_out:] for t in samples.tensors))
        samples = TensorDataset(*(t[:-held_out] for t in samples.tensors))
    began = minutes()
    torch.manual_seed(seed)
    start = pj.capture(
        nn.Sequential(*(layer() for layer in layers)).eval(), inputs=samples[0][0][None].repeat(2, 1, 1, 1)
    )
    finetune = pj.Finetune(epochs=dense_epochs, **ADAM)
    dense = pj.compress(start, pj.Recipe(finetune), data=samples, task="classification", seed=seed).network
    spent, dense_error = minutes() - began, error(dense, tests)
    print(f"{name} dense: {dense_error} % after {spent:.1f} minutes", file=sys.stderr, flush=True)
    taught = pj.Finetune(epochs=epochs or coded_epochs, teacher="original", alpha=1.0, temperature=2.0, **ADAM)
    for rate in rates or own_rates:
        began = minutes()
        recipe = pj.Recipe(pj.TrainLowEntropy(finetune=taught, rate=rate))
        result = pj.compress(dense, recipe, data=samples, task="classification", seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.penjing"
            size = pj.pack(result.network, path)
            found, unpacked = package.inspect(path), pj.unpack(path)
        print(found, *result.plans[-1].notes, sep="\n", file=sys.stderr, flush=True)
        yield {
            "network": name,
            "weight_bytes": size - found.topology_coded_bytes,
            "file_bytes": size,
            "error": error(unpacked, tests),
            "seed": seed,
            "held_out": held_out,
            "rate": rate,
            "parameters": sum(t.numel() for n, t in unpacked.tensors().items()),
            "dense_error": dense_error,
            "cpu_minutes": round(spent + minutes() - began, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=" ".join(NETWORKS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="number of the first seed")
    parser.add_argument("--epochs", type=float, help="epochs for few bytes, instead of each network's own")
    parser.add_argument("--rates", type=float, nargs="*", help="rates, instead of each network's own")
    parser.add_argument("--held-out", type=int, default=0, help="training images to take the error of, and not to see")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := [n for n in args.networks if n not in NETWORKS]:
        parser.error(f"unknown network {unknown[0]}: choose from {', '.join(NETWORKS)}")
    sys.path.insert(0, str(args.data))
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for seed in range(args.first, args.first + args.seeds):
        for name in args.networks or NETWORKS:
            for row in rows(name, seed, args.epochs, args.rates, args.held_out):
                found.append(row)
                print(json.dumps(row), flush=True)
                if args.json:
                    args.json.write_text(json.dumps({"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
