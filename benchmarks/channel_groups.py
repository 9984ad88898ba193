"""How long the channel groups of ResNet-50 at 224 pixels take: analysis, solving and shrinking, after capture. Prints
JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
import time

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import penjing as pj
from penjing.network.channels.groups import Groups
from penjing.network.channels.remove import remove
from penjing.network.channels.rules import trace
from penjing.network.channels.solve import solve


def main() -> None:
    """Best of three runs, seconds of each part."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = pj.capture(ResNetForImageClassification(ResNetConfig()).eval(), inputs=(torch.randn(2, 3, 224, 224),))
    example = network.bind(network.example(1))
    start = time.perf_counter()
    network.run(network.example(1))
    forward = time.perf_counter() - start
    runs = []
    for _ in range(3):
        times = [time.perf_counter()]
        tape = trace(network.graph_module, example)
        times.append(time.perf_counter())
        groups = Groups(tape, solve(tape), example)
        times.append(time.perf_counter())
        removals = [
            (g.members[0].parameter, g.members[0].dim, g.members[0].indices[::2, 0].tolist())
            for g in groups
            if g.size > 1
        ]
        removed = remove(network.graph_module, groups, removals)
        times.append(time.perf_counter())
        runs.append([b - a for a, b in zip(times[:-1], times[1:], strict=True)])
    best = min(runs, key=sum)
    result = {
        "network": "ResNet-50, 224 px, batch 1",
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 1, "cores": os.cpu_count()},
        "torch": torch.__version__,
        "seconds": {
            "forward": forward,
            "analysis": best[0],
            "solving": best[1],
            "shrinking": best[2],
            "sum": sum(best),
        },
        "groups": len(groups),
        "parameters": {
            "before": sum(p.numel() for p in network.graph_module.parameters()),
            "after": sum(p.numel() for p in removed.graph_module.parameters()),
        },
    }
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
