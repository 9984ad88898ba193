"""What NNCF and ONNX Runtime's own quantizer make of float .onnx files. Runs in an environment of its own, without
torch.

    python quantization_peers.py FOLDER...      # each holds float.onnx and calibration.npy; --reduce-range for ONNX
    Runtime

Writes nncf.xml (OpenVINO) and ort.onnx (ONNX Runtime) into each folder and prints a JSON object with versions and
seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--reduce-range", action="store_true")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    import nncf
    import onnxruntime

    found: dict[str, object] = {"nncf": nncf.__version__, "onnxruntime": onnxruntime.__version__}
    for folder in chosen.folders:
        samples = np.load(folder / "calibration.npy")
        seconds = {}
        for name, run in (("nncf", with_nncf), ("ort", with_onnxruntime)):
            start = time.perf_counter()
            run(folder, samples, chosen.reduce_range)
            seconds[name] = round(time.perf_counter() - start, 1)
        found[folder.name] = seconds
    print(json.dumps(found), file=sys.__stdout__)


def with_nncf(folder: Path, samples: np.ndarray, reduce_range: bool) -> None:
    """NNCF's post-training quantization of the OpenVINO model, all settings at their defaults."""
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "float.onnx")
    data = nncf.Dataset([s[None] for s in samples])
    quantized = nncf.quantize(model, data, subset_size=len(samples))
    openvino.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)


def with_onnxruntime(folder: Path, samples: np.ndarray, reduce_range: bool) -> None:
    """ONNX Runtime's static quantization: QDQ, uint8 activations, int8 weights by channel, its own pre-processing."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, ready = folder / "float.onnx", folder / "prepared.onnx"
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    name = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows: Iterator[np.ndarray] = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {name: row[None]}

    quantize_static(
        str(ready),
        str(folder / "ort.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
    )


if __name__ == "__main__":
    main()
