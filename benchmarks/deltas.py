"""What an update of a network costs beside the whole package: fine-tunes of ResNet-20 put on the parent's grids.

    python benchmarks/deltas.py --data DIR [--images 2000] [--json FILE]

DIR holds hub.py with network and images. The network's batch norms are folded, it is packed as int8 a channel (Quantize
without activations) and as CodeWeights; that is the parent. It is then trained further in float, on images of its kind
or on dark ones (a quarter of the light), and put on the parent's grids (penjing.analysis.regrid). A row tells
`delta_bytes`, `package_bytes` of the new version, the share of codes that changed, and the accuracy on the test images
(plain and dark) of the parent, of the new float network, of the new version on the parent's grids, and of one with
grids of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sections import accuracy, first
from torch.utils.data import TensorDataset

import penjing as pj
from penjing import package
from penjing.analysis.passes import fold_batch_norms, simplified
from penjing.analysis.regrid import onto_grids
from penjing.package import delta

#: Name, images, learning rate, steps of 64, slack, what is trained.
TUNES: tuple[tuple[str, str, float, int, float, str | list[str]], ...] = (
    ("light", "plain", 1e-4, 100, 0.0, "*"),
    ("dark, small rate", "dark", 1e-4, 100, 0.0, "*"),
    ("dark, small rate, slack", "dark", 1e-4, 100, 0.25, "*"),
    ("dark, first and last layers", "dark", 1e-3, 100, 0.0, ["net.conv1*", "net.linear*"]),
    ("dark, heavy", "dark", 1e-2, 300, 0.0, "*"),
)


def dark(samples: TensorDataset) -> TensorDataset:
    x, y = samples.tensors
    return TensorDataset(x / 4, y)


def packed(network: pj.Network) -> tuple[Any, Any, dict[str, Any]]:
    return (*network.state(), {"name": network.name})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--only", nargs="*", help="names of fine-tunes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(args.data))
    import hub

    torch.set_num_threads(1)
    train, test = hub.cifar10_train(), first(hub.cifar10_test(), args.images)
    looks = {"plain": (train, test), "dark": (dark(train), dark(test))}
    original = pj.capture(hub.resnet20(), inputs=train[0][0][None].repeat(2, 1, 1, 1), name="resnet20")
    folded, _ = simplified(original, fold_batch_norms)
    steps = {"int8": pj.Quantize(activations=None), "CodeWeights(0.02)": pj.CodeWeights(rate=0.02)}
    some = first(train, 1000)
    parents = {name: pj.compress(folded, pj.Recipe(s), data=some, seed=0).network for name, s in steps.items()}
    before = {name: {k: accuracy(n, t) for k, (_, t) in looks.items()} for name, n in parents.items()}
    rows: list[dict[str, Any]] = []
    for name, look, rate, count, slack, where in TUNES:
        if args.only and name not in args.only:
            continue
        began = time.process_time()
        tune = pj.Finetune(epochs=64 * count / len(train), lr=rate, batch_size=64, where=where, weight_decay=0.0)
        tuned = pj.compress(folded, pj.Recipe(tune), data=looks[look][0], task="classification", seed=0).network
        seconds = time.process_time() - began
        for kind, parent in parents.items():
            new, moved = onto_grids(tuned, parent, slack=slack)
            own = pj.compress(tuned, pj.Recipe(steps[kind]), data=first(looks[look][0], 1000), seed=0).network
            coded = delta.encode(packed(parent), packed(new))
            whole = package.encode(*packed(new)[:2], metadata={"name": new.name})
            back = delta.decode(coded, packed(parent))
            assert package.encode(*back[:2], metadata=back[2]) == whole
            rows.append(
                {
                    "fine-tune": name, "images": look, "rate": rate, "steps": count, "trained": where, "slack": slack,
                    "parent": kind, "delta_bytes": len(coded), "package_bytes": len(whole),
                    "share": round(len(coded) / len(whole), 4), "codes_changed": round(moved.changed / moved.codes, 4),
                    "clipped": moved.clipped, "sqnr_db": round(moved.sqnr, 1), "test_images": args.images,
                    "accuracy": {
                        k: {"parent": before[kind][k], "float": accuracy(tuned, t), "on its grids": accuracy(new, t),
                            "on grids of its own": accuracy(own, t)}
                        for k, (_, t) in looks.items()
                    },
                    "train_seconds": round(seconds, 1),
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"benchmark": "deltas", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
