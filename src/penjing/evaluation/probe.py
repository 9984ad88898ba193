"""Run as a script in a fresh process: open one artefact, run it, print the process's peak resident memory as JSON.

It is started by path (not by ``-m``) on purpose: importing the package would load PyTorch, which no device that
serves an
``.onnx`` file has. So this file imports numpy and the runtime and nothing of penjing; runtimes it does not know by
itself are opened through penjing, and then ``counted`` says so.

Standard input: ``{"path", "runtime", "threads", "precision", "inputs": path of an .npz, "runs", "package": path}``.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_OWN = "Python, numpy, the runtime's library, the artefact, and its activations"
_PENJING = "Python, penjing and PyTorch, the runtime's library, the artefact, and its activations"


def peak_bytes() -> int:
    """Peak resident set size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own = peak if sys.platform == "darwin" else peak * 1024
    try:
        # ru_maxrss survives exec: it may still hold the size of the (large) process that spawned this one.
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return own


def _onnxruntime(order: dict[str, Any]) -> Callable[[], Callable[[dict[str, Any]], object]]:
    onnxruntime: Any = importlib.import_module("onnxruntime")

    def open_artefact() -> Callable[[dict[str, Any]], object]:
        options = onnxruntime.SessionOptions()
        if order["threads"]:
            options.intra_op_num_threads = order["threads"]
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(order["path"], options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)

    return open_artefact


def _openvino(order: dict[str, Any]) -> Callable[[], Callable[[dict[str, Any]], object]]:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would send usage statistics
    openvino: Any = importlib.import_module("openvino")

    def open_artefact() -> Callable[[dict[str, Any]], object]:
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if order["threads"]:
            config["INFERENCE_NUM_THREADS"] = order["threads"]
        if order["precision"]:
            config["INFERENCE_PRECISION_HINT"] = order["precision"]
        compiled = openvino.Core().compile_model(order["path"], "CPU", config)
        return lambda inputs: compiled(inputs)

    return open_artefact


def _through_penjing(order: dict[str, Any]) -> Callable[[], Callable[[dict[str, Any]], object]]:
    sys.path.insert(0, order["package"])
    runtimes: Any = importlib.import_module("penjing.runtimes")

    def open_artefact() -> Callable[[dict[str, Any]], object]:
        target = runtimes.Target(runtime=order["runtime"], threads=order["threads"], precision=order["precision"])
        session = runtimes.RUNTIMES.get(order["runtime"]).load(order["path"], target)
        return lambda inputs: session.run(inputs)

    return open_artefact


_OPENERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def main() -> None:
    """Do what standard input orders, answer on standard output."""
    order = json.load(sys.stdin)
    direct = _OPENERS.get(order["runtime"])
    open_artefact = (direct or _through_penjing)(order)
    with np.load(order["inputs"], allow_pickle=False) as archive:
        inputs = {name: archive[name] for name in archive.files}
    idle = peak_bytes()
    run = open_artefact()
    opened = peak_bytes()
    for _ in range(order["runs"]):
        run(inputs)
    print(
        json.dumps(
            {
                "peak_bytes": peak_bytes(),
                "before_opening_bytes": idle,
                "opening_bytes": opened - idle,
                "counted": _OWN if direct else _PENJING,
            }
        )
    )


if __name__ == "__main__":
    main()
