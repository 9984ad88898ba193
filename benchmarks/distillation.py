"""Distillation beside plain training of the same cost in processor time.

    python benchmarks/distillation.py --data DIR [--only cifar fashion] [--threads 2] [--out FILE.json]

DIR holds hub.py with the pretrained networks and their data. Sections:

cifar      ResNet-20 with random weights, taught by ResNet-56 (93.39 %) on the training images that there are: plain
           training, soft labels, and both from a start that is fused with the teacher; each in about three minutes of
           processor time, teacher's answers included; three seeds, means with 95 % intervals of Student's t
fashion    Fashion-MNIST: a student of another architecture with an eighteenth of its teacher's parameters, with and
           without its teacher; three seeds

Accuracies are of whole test sets. Every row is printed and kept as soon as it is there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sections import accuracy, run
from torch import nn

import penjing as pj

SEEDS = (0, 1, 2)
PLAIN: dict[str, Any] = {"lr": 0.1, "batch_size": 128, "precision": "bf16", "average": 0.99}
TAUGHT: dict[str, Any] = {**PLAIN, "teacher": "big", "alpha": 0.9}
#: Epochs that take about three processor minutes: a taught one costs as much as a plain one, the answers once as much.
WAYS: dict[str, tuple[pj.Step, ...]] = {
    "plain": (pj.Finetune(epochs=7, **PLAIN),),
    "soft labels": (pj.Distill(epochs=6, **TAUGHT),),
    "fused, plain": (pj.FuseWeights(source="big"), pj.Finetune(epochs=7, **PLAIN)),
    "fused, soft labels": (pj.FuseWeights(source="big"), pj.Distill(epochs=6, **TAUGHT)),
}
#: 97.5 % quantile of Student's t with two degrees of freedom.
T2 = 4.303


def trained(
    start: pj.Network, steps: Sequence[pj.Step], seed: int, data: Any, **teachers: pj.Network
) -> tuple[pj.Network, float]:
    """The network after `steps`, and processor minutes."""
    used = time.process_time()
    made = pj.compress(start, pj.Recipe(*steps), data=data, task="classification", seed=seed, teachers=teachers).network
    return made, (time.process_time() - used) / 60


def interval(values: list[float]) -> dict[str, Any]:
    mean = statistics.fmean(values)
    half = T2 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) == 3 else None
    return {"mean": round(mean, 2), "half width": None if half is None else round(half, 2), "runs": values}


def cifar(data: Path) -> Iterator[dict[str, Any]]:
    import hub

    looked, tested = hub.cifar10_train(), hub.cifar10_test()
    example = (looked.tensors[0][:2],)
    big = pj.capture(hub.resnet56(), inputs=example, name="resnet56")
    told = accuracy(big, tested)
    yield {"what": "teacher", "accuracy": told}
    reached: dict[str, list[float]] = {}
    for seed in SEEDS:
        for what, steps in WAYS.items():
            start = pj.capture(reset(hub.resnet20(), seed), inputs=example, name="resnet20")
            made, minutes = trained(start, steps, seed, looked, big=big)
            reached.setdefault(what, []).append(accuracy(made, tested))
            yield {"what": what, "seed": seed, "accuracy": reached[what][-1], "processor minutes": round(minutes, 2)}
    plain = statistics.fmean(reached["plain"])
    for what, values in reached.items():
        gains = [a - b for a, b in zip(values, reached["plain"], strict=True)]
        closed = (statistics.fmean(values) - plain) / (told - plain)
        yield {"what": what, **interval(values), "over plain": interval(gains), "of the gap closed": round(closed, 3)}


def reset(module: nn.Module, seed: int) -> nn.Module:
    """The same architecture with random weights: convolutions and linear layers as He et al. 2015 begin."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    return module


def fashion(data: Path) -> Iterator[dict[str, Any]]:
    import hub

    looked, tested = hub.fashion_train(), hub.fashion_test()
    example = (looked.tensors[0][:2],)
    own: dict[str, Any] = {**PLAIN, "augment": "flip-crop", "epochs": 6}
    torch.manual_seed(0)
    start = pj.capture(wide(), inputs=example, name="teacher")
    big, minutes = trained(start, [pj.Finetune(**own)], 0, looked)
    told = accuracy(big, tested)
    row = {"parameters": big.parameter_count(), "processor minutes": round(minutes, 2)}
    yield {"what": "teacher", "accuracy": told, **row}
    own["epochs"] = 10
    ways: dict[str, pj.Step] = {"soft labels": pj.Distill(**own, teacher="big"), "plain": pj.Finetune(**own)}
    reached: dict[str, list[float]] = {}
    for seed in SEEDS:
        for what, step in ways.items():
            torch.manual_seed(seed)
            small = pj.capture(slim(), inputs=example, name="student")
            made, minutes = trained(small, [step], seed, looked, big=big)
            reached.setdefault(what, []).append(got := accuracy(made, tested))
            share = round(big.parameter_count() / made.parameter_count(), 1)
            row = {"times fewer parameters": share, "processor minutes": round(minutes, 2)}
            yield {"what": what, "seed": seed, "accuracy": got, "below the teacher": round(told - got, 2), **row}
    for what, values in reached.items():
        yield {"what": what, **interval(values), "below the teacher": interval([told - v for v in values])}


def wide() -> nn.Module:
    """Three convolutions and two large linear layers: 656 thousand parameters."""
    layers: list[nn.Module] = []
    for number, (one, other) in enumerate([(1, 24), (24, 48), (48, 96)]):
        layers += [nn.Conv2d(one, other, 3, padding=1, bias=False), nn.BatchNorm2d(other), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number < 2 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 49, 128), nn.ReLU(), nn.Linear(128, 10))


def slim() -> nn.Module:
    """Deeper, without large layers: 36 thousand parameters."""
    layers: list[nn.Module] = []
    for one, other in [(1, 16), (16, 16), (0, 0), (16, 32), (32, 32), (0, 0), (32, 64)]:
        if other:
            layers += [nn.Conv2d(one, other, 3, padding=1, bias=False), nn.BatchNorm2d(other), nn.ReLU()]
        else:
            layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


if __name__ == "__main__":
    run(__doc__, {"cifar": cifar, "fashion": fashion}, "distillation")
