"""ResNet-56 with 0.476 of its multiply-accumulates by Torch-Pruning; called by pruning.py, prints JSON lines.
Run with torch_pruning and the folder of hub.py on the path.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from typing import Any

import hub
import torch
import torch_pruning as tp
from torch import nn

KEEP = 0.476
SAMPLES = 2000
EXAMPLE = torch.zeros(1, 3, 32, 32)


def main() -> None:
    looked, tested = hub.cifar10_train().tensors[0], hub.cifar10_test().tensors
    looked = looked[torch.randperm(len(looked), generator=torch.Generator().manual_seed(0))[:SAMPLES]]
    criteria = {
        "L1": tp.importance.GroupMagnitudeImportance(p=1),
        "L2": tp.importance.GroupMagnitudeImportance(p=2),
        "batch norm scale": tp.importance.BNScaleImportance(),
        "FPGM": tp.importance.FPGMImportance(),
        "random": tp.importance.RandomImportance(),
    }
    ways = [(False, False), (True, False), (True, True)]
    for (name, importance), (spread, inside) in itertools.product(criteria.items(), ways):
        start = time.perf_counter()
        module, times = pruned(importance, spread, inside)
        row: dict[str, Any] = {
            "what": f"Torch-Pruning, {name}, {'all layers together' if spread else 'every layer alike'}"
            + ", inside of blocks" * inside,
            "network": "resnet56",
            "times fewer macs": times,
            "accuracy": accuracy(module, *tested),
        }
        statistics(module, looked)
        row |= {"accuracy, statistics taken again": accuracy(module, *tested)}
        row |= {"seconds": round(time.perf_counter() - start, 1)}
        print(json.dumps(row), flush=True)


def pruned(importance: Any, spread: bool, inside: bool) -> tuple[nn.Module, float]:
    """The network at the least ratio, in hundredths, that leaves few enough multiply-accumulates."""
    original = hub.resnet56().eval()
    before, _ = tp.utils.count_ops_and_params(original, EXAMPLE)
    low, high, found = 0, 90, None
    while high - low > 1:
        ratio = (low + high) // 2
        module = copy.deepcopy(original)
        pruner = tp.pruner.BasePruner(
            module,
            EXAMPLE,
            importance=importance,
            global_pruning=spread,
            pruning_ratio=ratio / 100,
            max_pruning_ratio=0.9,
            ignored_layers=[m for name, m in module.named_modules() if stays(name, m, inside)],
        )
        pruner.step()
        after, _ = tp.utils.count_ops_and_params(module, EXAMPLE)
        if after <= KEEP * before:
            high, found = ratio, (module.eval(), round(before / after, 3))
        else:
            low = ratio
    if found is None:
        raise SystemExit("no ratio was large enough")
    return found


def stays(name: str, layer: nn.Module, inside: bool) -> bool:
    """The classifier, and with `inside` all that makes the channels of the residual stream."""
    inner = "layer" in name and name.endswith("conv1")
    return isinstance(layer, nn.Linear) or (inside and isinstance(layer, nn.Conv2d) and not inner)


@torch.no_grad()
def statistics(module: nn.Module, images: torch.Tensor) -> None:
    """Means and variances of all batch norms, from `images`."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in images.split(100):
        module(batch)
    module.eval()


@torch.no_grad()
def accuracy(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    right = [(module(x).argmax(1) == y).float() for x, y in zip(images.split(100), labels.split(100), strict=True)]
    return round(100 * torch.cat(right).mean().item(), 2)


if __name__ == "__main__":
    main()
