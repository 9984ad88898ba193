"""What writing layers as products costs and brings.

    python benchmarks/factorize.py --data DIR [--only vit …] [--threads N] [--out FILE.json]

DIR holds hub.py with the pretrained networks and their data. Nothing trains and no labels are looked at.

vit      ViTs of 12 layers of 384 and of 768 (random weights), half of the weights of their linear layers gone:
         milliseconds of one image on OpenVINO, in turns with the original; of the small one the outputs' error on
         images it has not seen: by SVD of the weights, weighted by activations, and refitted
resnet   ResNet-20 and ResNet-56, convolutions at several ratios: accuracy on all 10 000 test images
language stories260k, a small Llama, at several ratios: nats a token on texts it has not seen
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sections import run
from torch import Tensor
from torch.utils.data import TensorDataset

import penjing as pj
from penjing.analysis.footprint import footprint
from penjing.analysis.rounding_harm import output_harm
from penjing.runtimes import Target, get_runtime
from penjing.runtimes.timing import LatencySettings, interleave

#: Fields of Factorize by what they are called in the tables.
WAYS: dict[str, dict[str, Any]] = {
    "SVD of the weights": {"criterion": "weights", "reconstruct": False},
    "weighted": {"reconstruct": False},
    "weighted, refitted": {},
}


def vit(data: Path) -> Iterator[dict[str, Any]]:
    import hub
    from transformers import ViTConfig, ViTForImageClassification

    images = torch.nn.functional.interpolate(hub.imagenet_sample().tensors[0][::10], 224) * 2 - 1
    seen, unseen = TensorDataset(images[:64]), images[64:96]
    for width, ways in ((384, WAYS), (768, {"SVD of the weights": WAYS["SVD of the weights"]})):
        torch.manual_seed(0)
        sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
        model = ViTForImageClassification(ViTConfig(num_labels=1000, **sizes)).eval()
        network = pj.capture(model, inputs=(images[:2],), name="ViT")
        held = {"original": network}
        for way, fields in ways.items():
            start = time.perf_counter()
            step = pj.Factorize(ratio=0.5, where="*.layer*", round_to=16, samples=64, **fields)
            shown = seen if len(ways) > 1 else None
            held[way] = pj.compress(network, pj.Recipe(step), data=shown).network
            seconds = time.perf_counter() - start
            parameters, macs = kept(network, held[way])
            row = {"ViT": width, "way": way, "parameters": parameters, "macs": macs, "seconds": round(seconds, 1)}
            yield {**row, "outputs' relative squared error": float(f"{error(network, held[way], unseen):.3g}")}
        for precision in ("f32", "default"):
            yield {"ViT": width, "OpenVINO": precision, **timed(held, precision)}


def error(network: pj.Network, other: pj.Network, images: Tensor) -> float:
    batches = [{network.inputs[0].name: x} for x in images.split(8)]
    with torch.no_grad():
        return output_harm(network, other, batches)


def kept(network: pj.Network, other: pj.Network) -> tuple[float, float]:
    """Shares of the parameters and of the multiply-accumulates."""
    before, after = footprint(network), footprint(other)
    return round(after.parameters / before.parameters, 3), round(after.macs / before.macs, 3)


def timed(held: dict[str, pj.Network], precision: str) -> dict[str, Any]:
    options = "" if precision == "default" else f",precision={precision}"
    target = Target.parse(f"openvino:threads={torch.get_num_threads()}{options}")
    runtime = get_runtime(target)
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, network in held.items():
            session = runtime.load(runtime.export(network, Path(folder) / f"{key}{runtime.suffix}").path, target)
            bound = network.bind(network.example(1))
            arrays = {n: bound[n].numpy() for n in session.input_names}
            sessions[key] = lambda s=session, a=arrays: s.run(a)
        taken = interleave(sessions, settings=LatencySettings(seconds=30, most_rounds=200))
    pairs = {key: taken["original"].rounds / t.rounds for key, t in taken.items() if key != "original"}
    return {
        "p50_ms": {key: round(t.p50, 2) for key, t in taken.items()},
        "times faster": {key: round(float(np.median(p)), 2) for key, p in pairs.items()},
        "quartiles": {key: [round(float(q), 2) for q in np.quantile(p, (0.25, 0.75))] for key, p in pairs.items()},
        "rounds": len(taken["original"].rounds),
    }


def resnet(data: Path) -> Iterator[dict[str, Any]]:
    import hub

    samples = hub.cifar10_train10k().tensors[0]
    seen = TensorDataset(samples[:: len(samples) // 512][:512].contiguous())
    test = hub.cifar10_test()
    plain, best = "SVD of the weights", "weighted, refitted"
    forms = [("tucker2", plain), ("tucker2", best), ("svd", plain), ("svd", best)]
    more = [("tucker2", "weighted"), ("spatial", best), ("auto", best), ("cp", best)]
    for name, ratios in (("resnet20", (0.2, 0.4)), ("resnet56", (0.2, 0.4))):
        network = pj.capture(getattr(hub, name)(), inputs=(samples[:2],), name=name)
        for ratio in ratios:
            for form, way in forms + (more if name == "resnet20" and ratio == 0.2 else []):
                fields = WAYS[way]
                start = time.perf_counter()
                step = pj.Factorize(ratio=ratio, convolutions=form, **fields)
                small = pj.compress(network, pj.Recipe(step), data=seen).network
                seconds = time.perf_counter() - start
                yield {
                    "network": name,
                    "ratio": ratio,
                    "convolutions": form,
                    "way": "nearest to the weights" if way == plain else way,
                    "accuracy": round(100 * hub.accuracy(small.module(), test), 2),
                    "parameters": kept(network, small)[0],
                    "macs": kept(network, small)[1],
                    "seconds": round(seconds, 1),
                }


def language(data: Path) -> Iterator[dict[str, Any]]:
    import hub

    texts = hub.stories()
    tokens = texts.tensors[0]
    seen, test = TensorDataset(tokens[:64]), TensorDataset(*(t[64:192] for t in texts.tensors))
    model = hub.stories260k()
    network = pj.capture(model, inputs=(tokens[:2],), name="stories260k")
    yield {"network": "stories260k", "ratio": 0, "nats": round(hub.nats(network.module(), test), 3)}
    for ratio in (0.1, 0.25):
        for way, fields in WAYS.items():
            small = pj.compress(network, pj.Recipe(pj.Factorize(ratio=ratio, **fields)), data=seen).network
            yield {
                "network": "stories260k",
                "ratio": ratio,
                "way": way,
                "nats": round(hub.nats(small.module(), test), 3),
                "parameters": kept(network, small)[0],
            }


SECTIONS = {"vit": vit, "resnet": resnet, "language": language}

if __name__ == "__main__":
    run(__doc__, SECTIONS, "factorize")
