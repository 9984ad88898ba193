"""Pruning, one-shot and fine-tuned, beside Torch-Pruning; its speed on OpenVINO; its own time and memory.

    python benchmarks/pruning.py --data DIR [--only channels weights …] [--threads 2] [--out FILE.json]

DIR holds hub.py with the pretrained networks and their data. Sections:

channels   ResNet-56 on CIFAR-10 with 2.1 times fewer multiply-accumulates, nothing trained with labels; and the same
           by Torch-Pruning, as it comes and with batch norm statistics taken again from the same images
finetuned  the same and 2.57 times fewer, then distilled fine-tuning; processor minutes of the latter
others     SqueezeNet, ResNet-20 and DS-CNN, 2.1 times fewer
weights    ResNet-56, single weights, nothing trained
speed      half of the channels of MobileNetV2 and ViT (random weights), in turns with the original on OpenVINO
rebuild    ResNet-50 at 224 pixels: seconds and extra memory of choosing and removing half of the channels

Accuracies are of whole test sets. Every row is printed and kept as soon as it is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sections import ROOT, run

import penjing as pj
from penjing.analysis.footprint import footprint
from penjing.data import Data
from penjing.recipe import Context
from penjing.task import get_task

INNER = "net.layer*.conv1"  # channels inside of ResNet blocks; the others are those of the residual stream
OBS = {"criterion": "obs", "reconstruct": "blockwise"}
CHANNELS: dict[str, dict[str, Any]] = {
    "l2, least squares (the default)": {},
    "l2, nothing rebuilt": {"reconstruct": False},
    "obs, least squares": {"criterion": "obs"},
    "obs, block-wise, inside of blocks": {**OBS, "where": INNER},
    "obs, block-wise": OBS,
}
FINETUNE: dict[str, Any] = {
    "teacher": "original", "alpha": 1.0, "hints": 150, "augment": "flip-crop", "precision": "bf16", "lr": 0.1,
    "weight_decay": 5e-4, "epochs": 6, "average": 0.998,
}  # fmt: skip
WEIGHTS: list[dict[str, Any]] = [
    {"sparsity": s, "criterion": c} for s in (0.7, 0.9) for c in ("magnitude", "sparsegpt", "obc")
]
SETS = {"squeezenet": ("imagenet_sample",) * 2, "dscnn": ("keywords",) * 2}


def sets_of(name: str) -> tuple[Any, Any]:
    """Samples to look at and test samples; one and the same for networks that have one set only."""
    import hub

    looked, tested = SETS.get(name, ("cifar10_train", "cifar10_test"))
    return getattr(hub, looked)(), getattr(hub, tested)()


def captured(name: str) -> pj.Network:
    import hub

    return pj.capture(getattr(hub, name)(), inputs=next(iter(Data(sets_of(name)[1]).batches(2)))[0], name=name)


def row_of(name: str, network: pj.Network, step: pj.Step) -> tuple[dict[str, Any], pj.Network]:
    """What one Step makes of a network: seconds, processor minutes, shares of the footprint, accuracy."""
    looked, tested = sets_of(name)
    start, used = time.perf_counter(), time.process_time()
    small = pj.compress(network, pj.Recipe(step), data=looked).network
    seconds, minutes = time.perf_counter() - start, (time.process_time() - used) / 60
    before, after = footprint(network), footprint(small)
    row = {
        "network": name,
        "settings": step.settings(),
        "accuracy": accuracy(small.module(), tested),
        "times fewer macs": round(before.macs / after.macs, 3),
        "parameters": round(after.parameters / before.parameters, 4),
        "seconds": round(seconds, 1),
        "processor minutes": round(minutes, 2),
    }
    return row, small


@torch.no_grad()
def accuracy(module: Callable[..., torch.Tensor], tested: Any) -> float:
    right = [(module(x).argmax(1) == y).float() for x, y in Data(tested).batches(100)]
    return round(100 * torch.cat(right).mean().item(), 2)


def channels(data: Path) -> Iterator[dict[str, Any]]:
    network = captured("resnet56")
    for what, fields in CHANNELS.items():
        yield {"what": what, **row_of("resnet56", network, pj.PruneChannels(keep_macs=0.476, **fields))[0]}
    yield from torch_pruning(data)


def torch_pruning(data: Path) -> Iterator[dict[str, Any]]:
    """Torch-Pruning in a folder of its own, so that no environment is changed."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, "torch-pruning"]
        subprocess.run(install, check=True)
        script = str(ROOT / "benchmarks" / "pruning_peers.py")
        known = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(data)])}
        done = subprocess.run([sys.executable, script], env=known, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"Torch-Pruning failed:\n{done.stderr[-3000:]}")
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                yield json.loads(line)


def finetuned(data: Path) -> Iterator[dict[str, Any]]:
    network = captured("resnet56")
    looked, tested = sets_of("resnet56")
    for keep_macs in (0.476, 0.389):
        row, small = row_of("resnet56", network, pj.PruneChannels(keep_macs=keep_macs, block_steps=600, **OBS))
        yield {"what": "pruned", **row}
        finetune = pj.Finetune(**FINETUNE)
        start, used = time.perf_counter(), time.process_time()
        plan = finetune.plan(small, Context(original=network, data=Data(looked), task=get_task("classification")))
        yield {
            "what": "fine-tuned",
            "settings": finetune.settings(),
            "accuracy": accuracy(small.apply(plan.edits).module(), tested),
            "seconds": round(time.perf_counter() - start, 1),
            "processor minutes": round((time.process_time() - used) / 60, 2),
        }


def others(data: Path) -> Iterator[dict[str, Any]]:
    for name in ("resnet20", "dscnn", "squeezenet"):
        network = captured(name)
        yield {"what": "original", "network": name, "accuracy": accuracy(network.module(), sets_of(name)[1])}
        for what, fields in {"the default": {}, "obs, block-wise": OBS}.items():
            yield {"what": what, **row_of(name, network, pj.PruneChannels(keep_macs=0.476, **fields))[0]}


def weights(data: Path) -> Iterator[dict[str, Any]]:
    network = captured("resnet56")
    for fields in WEIGHTS:
        yield {"what": fields["criterion"], **row_of("resnet56", network, pj.PruneWeights(**fields))[0]}


def speed(data: Path) -> Iterator[dict[str, Any]]:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, ViTConfig, ViTForImageClassification

    from penjing.runtimes import Target, get_runtime
    from penjing.runtimes.timing import LatencySettings, interleave

    torch.manual_seed(0)
    models = {
        "MobileNetV2": MobileNetV2ForImageClassification(MobileNetV2Config()),
        "ViT (small, 12 layers of 384)": ViTForImageClassification(
            ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        ),
    }
    target = Target.parse(f"openvino:threads={torch.get_num_threads()}")
    runtime = get_runtime(target)
    for name, model in models.items():
        network = pj.capture(model.eval(), inputs=(torch.randn(2, 3, 224, 224),), name=name)
        small = pj.compress(network, pj.Recipe(pj.PruneChannels(ratio=0.5, round_to="auto"))).network
        sessions = {}
        with tempfile.TemporaryDirectory() as folder:
            for key, held in (("original", network), ("half", small)):
                session = runtime.load(runtime.export(held, Path(folder) / f"{key}{runtime.suffix}").path, target)
                bound = held.bind(held.example(1))
                arrays = {n: bound[n].numpy() for n in session.input_names}
                sessions[key] = lambda s=session, a=arrays: s.run(a)
            taken = interleave(sessions, settings=LatencySettings(seconds=30, most_rounds=400))
        before, after = footprint(network), footprint(small)
        pairs = taken["original"].rounds / taken["half"].rounds
        yield {
            "network": name,
            "times fewer macs": round(before.macs / after.macs, 2),
            "parameters": round(after.parameters / before.parameters, 3),
            "p50_ms": {key: round(t.p50, 2) for key, t in taken.items()},
            "times faster": round(float(np.median(pairs)), 2),
            "quartiles": [round(float(q), 2) for q in np.quantile(pairs, (0.25, 0.75))],
            "rounds": len(pairs),
        }


def rebuild(data: Path) -> Iterator[dict[str, Any]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    network = pj.capture(ResNetForImageClassification(ResNetConfig()).eval(), inputs=(torch.randn(2, 3, 224, 224),))
    size = footprint(network).parameters * 4
    recipe, compress = pj.Recipe(pj.PruneChannels(ratio=0.5)), pj.compress  # imports what they need
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is forgotten
    before = resident()
    start, used = time.perf_counter(), time.process_time()
    small = compress(network, recipe).network
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    yield {
        "network": "ResNet-50, 224 px",
        "seconds": round(seconds, 2),
        "processor seconds": round(processor, 2),
        "extra memory in copies of the parameters": round((resident("VmHWM") - before) / size, 2),
        "parameters": round(footprint(small).parameters / footprint(network).parameters, 3),
    }


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process in memory, now or (VmHWM) at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


SECTIONS = {
    "channels": channels,
    "finetuned": finetuned,
    "others": others,
    "weights": weights,
    "speed": speed,
    "rebuild": rebuild,
}

if __name__ == "__main__":
    run(__doc__, SECTIONS, "pruning")
