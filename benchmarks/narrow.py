"""Fewer than 8 bits: accuracy after training, in training, mixed; one row a setting, all by the public surface.

    python benchmarks/narrow.py --data DIR [--only weights …] [--threads 2] [--out FILE.json]

DIR holds hub.py with the pretrained networks and their data. Peers run in an environment of their own (`environment` in
quantization.py makes it). Sections:

weights   ResNet-56 (1024 unlabelled training images) and DS-CNN (every other clip; tested on the others) with weights
          of 4 to 2 bits and activations of 8
both      the same with weights and activations of 4 bits
trained   ResNet-56 with weights of 2 bits and ternary, trained on their grids with distillation; processor minutes
levels    ResNet-20 with weights of 4 and 3 bits on even and uneven levels, rounded and trained
mixed     widths by layer beside one width for all at the same bytes: accuracy, and how far outputs are from float's
language  stories260k, weights only, 4 bits in groups of 128 and 64; nats a token over 150 blocks of other texts, of
          the files in ONNX Runtime and OpenVINO too; NNCF's and ONNX Runtime's own quantizers beside

Accuracies are of whole test sets. Every row is printed and kept as soon as it is there.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantization import environment, onnxruntime_session, openvino_session
from sections import ROOT, run
from torch.utils.data import Subset, TensorDataset

import penjing as pj
from penjing.data import Data
from penjing.runtimes import get_runtime
from penjing.task import get_task

EDGES: dict[str, Any] = {"edges": "int8"}
FINETUNE: dict[str, Any] = {
    "teacher": "original", "alpha": 1.0, "hints": 100, "augment": "flip-crop", "precision": "bf16", "lr": 0.05,
}  # fmt: skip


class Case:
    """A network with the samples it is shown and those it is tested on."""

    def __init__(self, name: str, shown: Any, tested: Any, task: str = "classification") -> None:
        import hub

        self.name, self.shown, self.tested, self.task = name, shown, tested, get_task(task)
        inputs = next(iter(Data(tested).batches(2)))[0]
        self.network = pj.capture(getattr(hub, name)(), inputs=inputs, name=name)

    def row(
        self, what: str, *steps: pj.Step, labels: bool = False, off: bool = False, files: Path | None = None
    ) -> dict[str, Any]:
        started, used = time.perf_counter(), time.process_time()
        task = self.task if labels else None
        found = pj.compress(self.network, pj.Recipe(*steps), data=self.shown, task=task)
        row = {"network": self.name, "what": what, "seconds": round(time.perf_counter() - started, 1)}
        row |= {"processor minutes": round((time.process_time() - used) / 60, 2)}
        held = sum(found.network.stored_bytes().values())
        row |= {"metric": self.metric(found.network), "kB": round(held / 1000, 1)}
        if files is not None:
            row |= self.of_files(found.network, files)
        return {**row, **self.off(found.network), "notes": found.plans[-1].notes[:2]} if off else row

    @torch.no_grad()
    def off(self, network: pj.Network) -> dict[str, float]:
        """How far outputs are from the float network's: relative mean square, and the divergence of probabilities."""
        plain, module = self.network.module(), network.module()
        sums = torch.zeros(4, dtype=torch.float64)
        for x, _ in Data(self.tested).batches(200 if self.task.name == "classification" else 10):
            wanted, given = plain(x).flatten(0, -2), module(x).flatten(0, -2)
            p, q = wanted.log_softmax(-1), given.log_softmax(-1)
            divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
            error, size = (given - wanted).square().sum(), wanted.square().sum()
            sums += torch.stack([error, size, divergence, torch.tensor(float(len(wanted)))]).double()
        return {"output error": float(sums[0] / sums[1]), "divergence": float(sums[2] / sums[3])}

    @torch.no_grad()
    def metric(self, network: pj.Network) -> float:
        """Accuracy in %, or nats a token."""
        module = network.module()
        if self.task.name == "classification":
            right = [(module(x).argmax(1) == y).float() for x, y in Data(self.tested).batches(200)]
            return round(100 * torch.cat(right).mean().item(), 2)
        lost = [torch.nn.functional.cross_entropy(module(x).mT, y).item() for x, y in Data(self.tested).batches(10)]
        return round(float(np.mean(lost)), 4)

    def of_files(self, network: pj.Network, folder: Path) -> dict[str, float]:
        """Nats a token of the network's files, by runtime."""
        found = {}
        for runtime in ("onnxruntime", "openvino"):
            get_runtime(runtime).export(network, folder / f"{runtime}.onnx")
            found[runtime] = self.of_file(folder / f"{runtime}.onnx", runtime)
        return found

    def of_file(self, file: Path, runtime: str) -> float:
        session = (onnxruntime_session if runtime == "onnxruntime" else openvino_session)(file, 1)
        lost = [
            torch.nn.functional.cross_entropy(torch.from_numpy(session(x.numpy())).mT, y).item()
            for x, y in Data(self.tested).batches(10)
        ]
        return round(float(np.mean(lost)), 4)


def resnet56() -> Case:
    import hub

    return Case("resnet56", hub.cifar10_train(), hub.cifar10_test())


def resnet20() -> Case:
    import hub

    return Case("resnet20", hub.cifar10_train(), hub.cifar10_test())


def resnet8() -> Case:
    import hub

    return Case("resnet8", hub.cifar10_train(), hub.cifar10_test())


def dscnn() -> Case:
    import hub

    clips = hub.keywords()
    return Case("dscnn", Subset(clips, range(0, len(clips), 2)), Subset(clips, range(1, len(clips), 2)))


def squeezenet() -> Case:
    import hub

    images = hub.imagenet_sample()
    return Case("squeezenet", Subset(images, range(0, len(images), 2)), Subset(images, range(1, len(images), 2)))


def stories() -> Case:
    """Shown are blocks of the texts in front of those of `hub.stories`, which are tested on."""
    import hub

    tokens = hub.Tok512()
    texts = hub.text("tinystories_sample").split("<|endoftext|>")[:600]
    ids = [t for text in texts for t in tokens.encode(text.strip())]
    blocks = torch.tensor(ids[: len(ids) // 513 * 513]).view(-1, 513)[:128]
    shown = TensorDataset(blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous())
    return Case("stories260k", shown, Subset(hub.stories(), range(150)), "language-modelling")


def weights(data: Path) -> Iterator[dict[str, Any]]:
    for case in (resnet56(), dscnn()):
        yield {"network": case.name, "what": "float", "metric": case.metric(case.network)}
        for bits in ("int4", "int3", "int2"):
            for fields in _ways():
                if bits == "int4" or fields.get("granularity") is None:
                    yield case.row(_words(bits, fields), pj.Quantize(weights=bits, **fields))


def _ways() -> Sequence[dict[str, Any]]:
    tensor = {"granularity": "tensor"}
    return (
        tensor, {}, {"ranges": "mse"}, {"rounding": "gptq"}, {**tensor, "rounding": "gptq"}, {"rounding": "brecq"}
    )  # fmt: skip


def both(data: Path) -> Iterator[dict[str, Any]]:
    for case in (resnet56(), dscnn()):
        for how in ("nearest", "gptq", "adaround", "brecq"):
            fields = {**EDGES, "activations": "int4", "rounding": how}
            yield case.row(_words("int4", fields), pj.Quantize(weights="int4", **fields))


def trained(data: Path) -> Iterator[dict[str, Any]]:
    case = resnet56()
    for kind, epochs in (("int2", 4), ("ternary", 2)):
        step = pj.TrainQuantized(weights=kind, finetune=pj.Finetune(epochs=epochs, **FINETUNE))
        yield case.row(f"{kind} trained, {epochs} epochs", step, labels=True)


def levels(data: Path) -> Iterator[dict[str, Any]]:
    case, powers, sums = resnet20(), "power-of-two", "additive-powers-of-two"
    # Of 3 bits, sums have one term: they are the powers themselves.
    for kind, spacings in (("int4", ("uniform", sums, powers)), ("int3", ("uniform", sums))):
        for spacing in spacings:
            fields: dict[str, Any] = {"weights": kind, "levels": spacing, **EDGES}
            yield case.row(f"{kind}, {spacing}, rounded", pj.Quantize(**fields))
            step = pj.TrainQuantized(finetune=pj.Finetune(epochs=2, **FINETUNE), **fields)
            yield case.row(f"{kind}, {spacing}, trained, 2 epochs", step, labels=True)


def mixed(data: Path) -> Iterator[dict[str, Any]]:
    """One width for all and widths by layer, both of 4 bits a weight."""
    plain, tensor, group = {}, {"granularity": "tensor"}, {"granularity": "group:64"}
    only: dict[str, Any] = {"activations": None}
    cases = {
        dscnn: (tensor, {**tensor, "rounding": "gptq"}, plain, {"rounding": "gptq"}),
        resnet8: (only, plain, tensor, {**tensor, "rounding": "gptq"}, {"rounding": "gptq"}),
        resnet20: (only, plain, tensor, {"rounding": "gptq"}),
        stories: (only, {**only, **group}, {**only, **group, "rounding": "gptq"}),
        resnet56: (plain, {"rounding": "gptq"}),
        squeezenet: (only, plain, {"rounding": "gptq"}),
    }
    for make, settings in cases.items():
        case = make()
        for fields in settings:
            uniform = pj.Quantize(weights="int4", **fields)
            one = case.row(_words("4 bits everywhere", fields), uniform, labels=True, off=True)
            count = 16 if case.task.name == "language-modelling" else 128  # of 512 tokens each
            step = pj.MixPrecision(quantize=pj.Quantize(**fields), keep_bits=4.0, criterion="measured", samples=count)
            yield one
            yield case.row(_words("4 bits on average", fields), step, labels=True, off=True)


def language(data: Path) -> Iterator[dict[str, Any]]:
    case = stories()
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        start = {"metric": case.metric(case.network), **case.of_files(case.network, folder)}
        yield {"network": case.name, "what": "float", **start}
        (folder / "openvino.onnx").rename(folder / "float.onnx")
        np.save(folder / "shown.npy", case.shown.tensors[0].numpy())
        for row in _peers(folder):
            file = folder / row.pop("file", "")
            if file.is_file():
                runtime = "openvino" if file.suffix == ".xml" else "onnxruntime"
                row[runtime] = case.of_file(file, runtime)
            yield {"network": case.name, **_more(row, start)}
        for group in (128, 64):
            for symmetric in (True, False):
                fields: dict[str, Any] = {"activations": None, "granularity": f"group:{group}", "symmetric": symmetric}
                awq = pj.Equalize(criterion="awq", granularity=f"group:{group}", symmetric=symmetric, samples=64)
                for before, how in (((), "nearest"), ((), "gptq"), ((awq,), "nearest"), ((awq,), "gptq")):
                    step = pj.Quantize(weights="int4", rounding=how, samples=128, **fields)
                    words = _words("int4" + ", awq" * bool(before), {**fields, "rounding": how})
                    yield _more(case.row(words, *before, step, files=folder), start)


def _peers(folder: Path) -> list[dict[str, Any]]:
    """What narrow_peers.py made of the folder."""
    script = str(ROOT / "benchmarks" / "narrow_peers.py")
    done = subprocess.run([str(environment()), script, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the peers failed:\n{done.stderr[-3000:]}")
    found = json.loads((folder / "peers.json").read_text())
    versions = {"nncf": found["nncf"], "ort": found["onnxruntime"]}
    return [{**row, "version": versions[row["what"].split()[0]]} for row in found["rows"]]


def _more(row: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """A row of nats a token, and how much more perplexity that is."""
    more = {k: round(math.exp(row[k]) - math.exp(start[k]), 3) for k in start if k in row}
    return {**row, "perplexity more": more}


def _words(kind: str, fields: dict[str, Any]) -> str:
    return ", ".join([kind, *(f"{k}={v}" for k, v in fields.items())])


SECTIONS = {
    "weights": weights, "both": both, "trained": trained, "levels": levels, "mixed": mixed, "language": language
}  # fmt: skip


if __name__ == "__main__":
    run(__doc__, SECTIONS, "narrow")
