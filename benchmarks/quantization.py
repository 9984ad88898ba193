"""int8 after training: accuracy and latency of penjing beside NNCF and ONNX Runtime's own quantizer, in one run.

    python benchmarks/quantization.py --data DIR [--only resnet20 …] [--peers PYTHON] [--threads 2] [--out FILE.json]

DIR holds hub.py with the pretrained networks and their data. PYTHON is the interpreter of an environment with nncf,
openvino, onnx and onnxruntime (made under .bench-venv when not given). All quantizers see the same 300 samples:
training images where there are any; `dscnn` and `squeezenet` have one set only, so for them calibration samples are
test samples. Latencies (batch 1) of all artefacts of a network are taken in turns in one process; a ratio is
the median of the ratios of neighbouring runs, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SETS = {
    "lenet5": ("mnist_train", "mnist_test"),
    "dscnn": ("keywords", "keywords"),
    "squeezenet": ("imagenet_sample", "imagenet_sample"),
}
NETWORKS = ("resnet20", "resnet32", "resnet56", "resnet8", "resnet20b", "dscnn", "lenet5", "squeezenet")
#: Networks of well-known shapes with random weights: for time only.
SHAPES = ("resnet50", "mobilenet_v2")
SAMPLES = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", nargs="+", default=[*NETWORKS, *SHAPES], choices=[*NETWORKS, *SHAPES])
    parser.add_argument("--peers", type=Path, help="python of an environment with nncf, openvino, onnx, onnxruntime")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="timing of each network")
    parser.add_argument("--limit", type=int, help="test samples (default: all)")
    parser.add_argument("--work", type=Path, help="folder for the artefacts (default: a temporary one)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of Quantize, as JSON"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quantization.json")
    chosen = parser.parse_args()
    fields = {k: json.loads(v) for k, v in (s.split("=", 1) for s in chosen.set)}
    sys.path.insert(0, str(chosen.data))
    peers = chosen.peers or environment()
    work = chosen.work or Path(tempfile.mkdtemp(prefix="quantization-"))
    rows, versions = [], {}
    for name in chosen.only:
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        seconds = make(name, folder, fields)
        versions = made_by_peers(peers, folder)
        seconds |= versions.pop(name)
        row = {"network": name, "seconds": seconds, **measure(name, folder, chosen)}
        rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
    result = {
        "machine": machine(chosen.threads),
        "peers": versions,
        "samples": SAMPLES,
        "settings": fields,
        "rows": rows,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    aside = chosen.out.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(chosen.out)
    print(HEAD, *map(line, rows), sep="\n")


def make(name: str, folder: Path, fields: dict[str, Any]) -> dict[str, float]:
    """float.onnx, calibration.npy and penjing's own .onnx for both runtimes."""
    from penjing.data import Data
    from penjing.methods.quantize import Quantize
    from penjing.network import capture
    from penjing.recipe import Context
    from penjing.runtimes import get_runtime

    model, samples = example_of(name)
    np.save(folder / "calibration.npy", samples.numpy())
    network = capture(model, inputs=(samples[:2],))
    get_runtime("onnxruntime").export(network, folder / "float.onnx")
    start = time.perf_counter()
    data = Data(samples)
    plan = Quantize(samples=SAMPLES, **fields).plan(network, Context(original=network, data=data))
    quantized = network.apply(plan.edits)
    seconds = {"penjing": round(time.perf_counter() - start, 1)}
    (folder / "plan.txt").write_text(str(plan))
    for runtime in ("onnxruntime", "openvino"):
        get_runtime(runtime).export(quantized, folder / f"penjing-{runtime}.onnx")
    return seconds


def example_of(name: str) -> tuple[Any, Any]:
    """A model and samples to calibrate with."""
    import torch
    import transformers

    if name in SHAPES:
        torch.manual_seed(0)
        kind = {"resnet50": "ResNet", "mobilenet_v2": "MobileNetV2"}[name]
        config = getattr(transformers, f"{kind}Config")()
        model = getattr(transformers, f"{kind}ForImageClassification")(config)
        return model.eval(), torch.rand(SAMPLES, 3, 224, 224)
    import hub

    train = getattr(hub, SETS.get(name, ("cifar10_train10k",))[0])()
    # In sets that are ordered by class, a stride looks at all of them.
    order = torch.arange(SAMPLES) * (len(train) // SAMPLES)
    return getattr(hub, name)(), train.tensors[0][order].contiguous()


def made_by_peers(python: Path, folder: Path) -> dict[str, Any]:
    from penjing.runtimes.cpu import integer_products_saturate

    # ONNX Runtime's documentation asks for the reduced range on CPUs whose 16-bit sums saturate.
    extra = ["--reduce-range"] if integer_products_saturate() else []
    script = str(ROOT / "benchmarks" / "quantization_peers.py")
    done = subprocess.run([str(python), script, str(folder), *extra], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the peers failed on {folder.name}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(name: str, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of every artefact on the test set, then interleaved latency at batch 1."""
    if name in SHAPES:
        x, y = np.load(folder / "calibration.npy")[:1], np.zeros(0, dtype=int)
    else:
        import hub

        x, y = (t[: chosen.limit].numpy() for t in getattr(hub, SETS.get(name, ("", "cifar10_test"))[1])().tensors)
    sessions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "ort float": onnxruntime_session(folder / "float.onnx", chosen.threads),
        "ort penjing": onnxruntime_session(folder / "penjing-onnxruntime.onnx", chosen.threads),
        "ort own": onnxruntime_session(folder / "ort.onnx", chosen.threads),
        "ov float": openvino_session(folder / "float.onnx", chosen.threads),
        "ov penjing": openvino_session(folder / "penjing-openvino.onnx", chosen.threads),
        "ov nncf": openvino_session(folder / "nncf.xml", chosen.threads),
    }
    batch = 100 if x[0].size < 10_000 else 20
    accuracy = {}
    for key, run in sessions.items():
        right = sum(int((run(x[i : i + batch]).argmax(1) == y[i : i + batch]).sum()) for i in range(0, len(y), batch))
        accuracy[key] = round(100 * right / len(y), 2) if len(y) else float("nan")
    one = x[:1]
    times: dict[str, list[float]] = {key: [] for key in sessions}
    for _ in range(20):
        for run in sessions.values():
            run(one)
    end, turn = time.perf_counter() + chosen.seconds, 0
    keys, order = list(sessions), np.random.default_rng(0)
    while time.perf_counter() < end:
        turn += 1
        for key in order.permutation(keys):  # who runs next finds the caches as the one before left them
            start = time.perf_counter()
            sessions[key](one)
            times[key].append((time.perf_counter() - start) * 1e3)
    p50 = {key: round(float(np.median(t)), 4) for key, t in times.items()}
    pairs = {"ort": ("ort penjing", "ort own"), "ov": ("ov penjing", "ov nncf")}
    ratio = {k: round(float(np.median(np.divide(times[a], times[b]))), 3) for k, (a, b) in pairs.items()}
    return {"accuracy": accuracy, "p50_ms": p50, "ratio": ratio, "n": len(y), "runs": turn}


def onnxruntime_session(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]  # type: ignore[no-any-return]


def openvino_session(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    core = openvino.Core()
    # Pinned threads wait for whoever else runs on their core.
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    return lambda x: np.array(request.infer([x], share_inputs=True)[0])


def environment() -> Path:
    folder = ROOT / ".bench-venv"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "nncf", "openvino", "onnx", "onnxruntime"], check=True
        )
    return python


def machine(threads: int) -> dict[str, Any]:
    import onnxruntime
    import openvino
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((v.split(":", 1)[1].strip() for v in info.splitlines() if v.startswith("model name")), "")
    words = set(next((v for v in info.splitlines() if v.startswith("flags")), "").split())
    return {
        "cpu": model or platform.processor(),
        "instructions": sorted(words & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16"}),
        "threads": threads,
        "system": platform.platform(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__.split("-")[0],
    }


HEAD = (
    "| network | n | ORT float %, ms | ORT int8 penjing %, ms | ORT own quantizer %, ms | ratio "
    "| OpenVINO float %, ms | OpenVINO int8 penjing %, ms | NNCF %, ms | ratio | seconds penjing / NNCF / ORT |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    def pair(key: str) -> str:
        return f"{row['accuracy'][key]:.2f}, {row['p50_ms'][key]:.3f}"

    ratio, s = row["ratio"], row["seconds"]
    cells = [row["network"], str(row["n"]), pair("ort float"), pair("ort penjing"), pair("ort own")]
    cells += [f"{ratio['ort']:.2f}", pair("ov float"), pair("ov penjing"), pair("ov nncf")]
    cells += [f"{ratio['ov']:.2f}", f"{s['penjing']} / {s['nncf']} / {s['ort']}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
