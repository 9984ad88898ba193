"""Where zeros among the weights pay, and where they do not: kernels of three runtimes, and bytes on the wire.

    python benchmarks/sparsity.py [--data DIR] [--litert PYTHON] [--only PART …] [--threads 1] [--json FILE]

Parts: `linear` (PyTorch's CSR and BSR products), `two_four` (2:4 on a GPU, where there is one), `runtimes` (ONNX
Runtime and OpenVINO, with its sparse decompression of int8 weights), `litert` (1×1 convolutions in XNNPACK; PYTHON is
the interpreter of an environment with ai-edge-litert), `wire` (packages of pretrained networks in DIR). All that is
compared runs in turns in one process; a ratio is the median of the ratios within rounds. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import penjing as pj
from penjing.data import Data
from penjing.runtimes import get_runtime
from penjing.runtimes.timing import LatencySettings, Timings, interleave

ROOT = Path(__file__).resolve().parents[1]
SIZES, BATCHES = (256, 1024, 4096), (1, 32)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
#: Edge of the blocks of zeros of each format; 1 is CSR, single weights.
FORMATS = {"CSR": 1, "BSR 4×4": 4, "BSR 16×16": 16}
WIRE = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------ PyTorch, linear
def linear(chosen: argparse.Namespace) -> dict[str, Any]:
    """One linear layer without bias: dense weights against sparse ones, in the faster of two ways to write it."""
    rows = []
    for size in SIZES:
        weight = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
        for batch in BATCHES:
            x = torch.randn(batch, size, generator=torch.Generator().manual_seed(1))
            runs: dict[str, Callable[[], object]] = {"dense": lambda w=weight, x=x: functional.linear(x, w)}
            for name, block in FORMATS.items():
                for sparsity in SPARSITIES:
                    runs |= written(f"{name} {sparsity:g}", compressed(weight, block, sparsity), x)
            times = interleave(runs, settings=LatencySettings(seconds=chosen.seconds, most_rounds=30))
            for name in FORMATS:
                ratios = [faster(times, f"{name} {s:g}") for s in SPARSITIES]
                rows.append(
                    {"size": size, "batch": batch, "format": name, "dense_ms": times["dense"].p50, "speedup": ratios,
                     "break_even": break_even(SPARSITIES, ratios)}
                )  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    return {"sparsities": SPARSITIES, "rows": rows}


def compressed(weight: Tensor, block: int, sparsity: float) -> Tensor:
    """Random blocks at zero, exactly that share; indices of 32 bits, which the kernels take without converting."""
    side = weight.shape[0] // block
    order = torch.randperm(side * side, generator=torch.Generator().manual_seed(2))
    kept = (order >= round(sparsity * side * side)).view(side, side)
    kept = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    masked = torch.where(kept, weight, torch.zeros(()))
    if block == 1:
        made = masked.to_sparse_csr()
        return torch.sparse_csr_tensor(made.crow_indices().int(), made.col_indices().int(), made.values(), made.shape)
    made = masked.to_sparse_bsr((block, block))
    return torch.sparse_bsr_tensor(made.crow_indices().int(), made.col_indices().int(), made.values(), made.shape)


def written(name: str, weight: Tensor, x: Tensor) -> dict[str, Callable[[], object]]:
    ways: dict[str, Callable[[], object]] = {
        f"{name} as linear": lambda: functional.linear(x, weight),
        f"{name} as product": lambda: (weight @ x.t()).t(),
    }
    want = functional.linear(x, weight.to_dense())
    for way in ways.values():
        assert torch.allclose(way(), want, atol=1e-3 * float(want.abs().max()))
    return ways


def faster(times: Mapping[str, Timings], name: str, against: str = "dense") -> float:
    """How many times as fast as `against` the faster of the ways to write `name` is."""
    ways = [t.rounds for key, t in times.items() if key.startswith(f"{name} as ") or key == name]
    return round(max(float(np.median(times[against].rounds / w)) for w in ways), 3)


def break_even(sparsities: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The sparsity from which on all that were tried are faster; between two, the logarithm is taken as linear."""
    slower = [i for i, r in enumerate(ratios) if r < 1]
    if not slower:
        return sparsities[0]
    last = slower[-1]
    if last + 1 == len(ratios):
        return None
    low, high = np.log(ratios[last]), np.log(ratios[last + 1])
    return round(float(sparsities[last] + (sparsities[last + 1] - sparsities[last]) * -low / (high - low)), 2)


# ------------------------------------------------------------------------------------------------------------------ 2:4
def two_four(chosen: argparse.Namespace) -> dict[str, Any]:
    """PyTorch's own semi-structured tensors, tried on the CPU, and timed on a GPU if there is one."""
    found: dict[str, Any] = {"cpu": None, "gpu": None}
    half = torch.randn(1024, 1024).half()
    half[:, 2::4] = half[:, 3::4] = 0
    try:
        made = torch.sparse.to_sparse_semi_structured(half)
        functional.linear(torch.randn(32, 1024).half(), made)
    except Exception as error:  # what is not there says so in many ways
        found["cpu"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if not torch.cuda.is_available():
        return found
    found["gpu"], rows = torch.cuda.get_device_name(), []
    for size in SIZES:
        for batch in (32, 1024):
            weight, x = (torch.randn(n, size, device="cuda").half() for n in (size, batch))
            weight[:, 2::4] = weight[:, 3::4] = 0
            small = torch.sparse.to_sparse_semi_structured(weight)

            def timed(w: Tensor, x: Tensor) -> Callable[[], None]:
                def once() -> None:
                    functional.linear(x, w)
                    torch.cuda.synchronize()

                return once

            times = interleave({"dense": timed(weight, x), "2:4": timed(small, x)})
            rows.append({"size": size, "batch": batch, "speedup": faster(times, "2:4")})
    return found | {"rows": rows}


# ------------------------------------------------------------------------------------------- ONNX Runtime and OpenVINO
class Perceptron(nn.Sequential):
    """Five layers of 1024 units: nothing but products with weights."""

    def __init__(self) -> None:
        layers = [m for _ in range(5) for m in (nn.Linear(1024, 1024), nn.ReLU())]
        super().__init__(*layers[:-1])


class Convolutions(nn.Sequential):
    """Six 1×1 and two 3×3 convolutions of 128 channels."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 128, 3, 2, 1), nn.ReLU())
        for kernel in (1, 1, 3, 1, 1, 3, 1, 1):
            self.extend([nn.Conv2d(128, 128, kernel, padding=kernel // 2), nn.ReLU()])


def runtimes(chosen: argparse.Namespace) -> dict[str, Any]:
    """Networks with 90 % of their weights at zero against the same networks dense: time for one sample."""
    rows = []
    samples = {"perceptron": torch.randn(64, 1024), "convolutions": torch.randn(64, 3, 64, 64)}
    for name, x in samples.items():
        torch.manual_seed(0)
        dense = pj.capture(Perceptron() if name == "perceptron" else Convolutions(), inputs=(x[:2],), name=name)
        zeros = pj.PruneWeights(sparsity=0.9, allocation="uniform")
        for precision, steps in {"float32": (), "int8": (pj.Quantize(samples=64),)}.items():
            pair = {"dense": steps, "sparse": (zeros, *steps)}
            made = {k: pj.compress(dense, pj.Recipe(*s), data=Data(x)).network if s else dense for k, s in pair.items()}
            runs = sessions(made, x[:1].numpy(), precision, chosen)
            times = interleave(runs, settings=LatencySettings(seconds=chosen.seconds))
            for key in runs:
                if not key.endswith("dense"):
                    base = f"{key.split(':')[0]}: dense"
                    rows.append(
                        {"network": name, "precision": precision, "what": key, "dense_ms": times[base].p50,
                         "speedup": faster(times, key, base)}
                    )  # fmt: skip
                    print(rows[-1], file=sys.stderr, flush=True)
    return {"sparsity": 0.9, "rows": rows}


def sessions(
    made: Mapping[str, Any], x: np.ndarray, precision: str, chosen: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    runs: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, network in made.items():
            path = Path(folder) / f"{key}.onnx"
            get_runtime("onnxruntime").export(network, path)
            session = get_runtime("onnxruntime").load(path, f"onnxruntime:threads={chosen.threads}")
            given = {session.input_names[0]: x}
            runs[f"ONNX Runtime: {key}"] = lambda s=session, g=given: s.run(g)
            get_runtime("openvino").export(network, path)
            runs[f"OpenVINO: {key}"] = openvino(path, x, chosen.threads)
            if key == "sparse" and precision == "int8":
                runs["OpenVINO: sparse, decompressed in the kernel"] = openvino(path, x, chosen.threads, 0.5)
    return runs


def openvino(path: Path, x: np.ndarray, threads: int, rate: float = 1.0) -> Callable[[], object]:
    """A run of a file; weights with at least the share `rate` of zeros stay packed until the kernel needs them."""
    core = get_runtime("openvino").need().Core()
    model = core.read_model(path)
    model.reshape(list(x.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": rate,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer([x], share_inputs=True)


# --------------------------------------------------------------------------------------------------------------- LiteRT
def litert(chosen: argparse.Namespace) -> dict[str, Any]:
    if chosen.litert is None:
        return {"skipped": "no --litert PYTHON was given"}
    script = str(ROOT / "benchmarks" / "sparsity_litert.py")
    done = subprocess.run([str(chosen.litert), script, str(chosen.threads)], capture_output=True, text=True)
    if done.returncode:
        return {"skipped": done.stderr.strip().splitlines()[-1]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


# --------------------------------------------------------------------------------------------------- bytes on the wire
def wire(chosen: argparse.Namespace) -> dict[str, Any]:
    """Packages of pretrained ResNets, their smallest weights masked, without any training after."""
    if not (chosen.data / "hub.py").exists():
        return {"skipped": f"there is no hub.py in --data {chosen.data.name}"}
    sys.path.insert(0, str(chosen.data))
    import hub

    x, y = (t[: chosen.images] for t in hub.cifar10_test().tensors)
    rows = []
    for name in ("resnet20", "resnet56"):
        original = pj.capture(getattr(hub, name)(), inputs=(x[:2],), name=name)
        for sparsity in WIRE:
            zeros = [pj.PruneWeights(sparsity=sparsity)] if sparsity else []
            row: Row = {"network": name, "sparsity": sparsity}
            for precision, steps in {"float32": zeros, "int8": [*zeros, pj.Quantize(activations=None)]}.items():
                network = pj.compress(original, pj.Recipe(*steps)).network if steps else original
                row[precision] = bytes_of(network)
                row[f"{precision} without masks"] = bytes_of(network.replace(masks={}))
            right = sum(int((network(x[i : i + 100]).argmax(1) == y[i : i + 100]).sum()) for i in range(0, len(x), 100))
            rows.append(row | {"accuracy": right / len(x)})
            print(rows[-1], file=sys.stderr, flush=True)
    return {"images": len(x), "rows": rows}


def bytes_of(network: pj.Network) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return pj.pack(network, Path(folder) / "network.penjing")


# --------------------------------------------------------------------------------------------------------------- tables
def tables(result: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []

    def table(*head: str) -> None:
        lines.extend(["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)])

    def add(*cells: object) -> None:
        lines.append("| " + " | ".join(map(str, cells)) + " |")

    if "linear" in result:
        part = result["linear"]
        table("layer", "batch", "zeros as", "dense, ms", *(f"{s:g}" for s in part["sparsities"]), "break-even")
        for r in part["rows"]:
            even = "none" if r["break_even"] is None else f"{r['break_even']:g}"
            even = f"≤ {even}" if r["break_even"] == part["sparsities"][0] else even
            dense = f"{r['dense_ms']:.3g}"
            add(f"{r['size']}×{r['size']}", r["batch"], r["format"], dense, *(f"{s:.2f}" for s in r["speedup"]), even)
    for row in result.get("two_four", {}).get("rows", ()):
        lines.append(f"2:4, {row['size']}, batch {row['batch']}: {row['speedup']:.2f}")
    if "two_four" in result:
        lines += ["", f"2:4 on the CPU: {result['two_four']['cpu'] or 'runs'}"]
    if "runtimes" in result:
        table("network", "precision", "runtime", "dense, ms", "90 % zeros against dense")
        for r in result["runtimes"]["rows"]:
            add(r["network"], r["precision"], r["what"], f"{r['dense_ms']:.3g}", f"{r['speedup']:.2f}")
    if "rows" in result.get("litert", {}):
        table("zeros", "stored", "ms", "against dense")
        for r in result["litert"]["rows"]:
            add(f"{r['sparsity']:.0%}", r["stored"], f"{r['ms']:.3g}", f"{r['speedup']:.2f}")
    elif "litert" in result:
        lines += ["", f"LiteRT: not measured: {result['litert']['skipped']}"]
    if "rows" in result.get("wire", {}):
        table("network", "zeros", "float32, bytes", "of dense", "int8, bytes", "of dense", "masks", "accuracy, int8")
        for r in result["wire"]["rows"]:
            first = next(s for s in result["wire"]["rows"] if s["network"] == r["network"])
            cells = [c for p in ("float32", "int8") for c in (f"{r[p]:,}", f"{r[p] / first[p]:.1%}")]
            masks = f"{r['int8'] - r['int8 without masks']:,}"
            add(r["network"], f"{r['sparsity']:.0%}", *cells, masks, f"{r['accuracy']:.1%}")
    elif "wire" in result:
        lines += ["", f"wire: not measured: {result['wire']['skipped']}"]
    return lines


def machine(threads: int) -> Row:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    words = set(next((v for v in info.splitlines() if v.startswith("flags")), "").split())
    known = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "amx_tile"}
    packages = ("penjing", "torch", "onnxruntime", "openvino")
    return {"instructions": sorted(words & known), "threads": threads, **{p: version(p) for p in packages}}


PARTS = {"linear": linear, "two_four": two_four, "runtimes": runtimes, "litert": litert, "wire": wire}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--litert", type=Path, help="python of an environment with ai-edge-litert")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="timing of each")
    parser.add_argument("--images", type=int, default=1000, help="test images for the accuracy of what is packed")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")  # sparse tensors say at every turn that they are in beta
    torch.set_num_threads(chosen.threads)
    result: dict[str, Any] = {"machine": machine(chosen.threads)}
    for part in chosen.only:
        result[part] = PARTS[part](chosen)
        if chosen.json:
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            aside = chosen.json.with_suffix(".part")
            aside.write_text(json.dumps(result, indent=1) + "\n")
            aside.replace(chosen.json)
    print(json.dumps(result["machine"]), *tables(result), sep="\n")


if __name__ == "__main__":
    main()
