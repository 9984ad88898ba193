"""Peak memory in a process of its own, on real ONNX files that are made here."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from penjing.errors import TargetError
from penjing.evaluation.memory import peak_memory


def matmul(path: Path, size: int) -> Path:
    weight = helper.make_tensor(
        "w", TensorProto.FLOAT, [size, size], np.zeros(size * size, np.float32).tobytes(), raw=True
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", size])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_heavier_artefact_takes_more(tmp_path: Path, runtime: str) -> None:
    found = {}
    for size in (16, 3000):  # 1 kB and 36 MB of weights
        path = matmul(tmp_path / f"{size}.onnx", size)
        found[size] = peak_memory(path, {"x": np.ones((1, size), np.float32)}, runtime=runtime, threads=1)
    heavy, light = found[3000], found[16]
    assert heavy.peak_bytes - light.peak_bytes > 30e6
    assert heavy.above_idle_bytes - light.above_idle_bytes > 30e6
    assert light.peak_bytes < 250e6, "PyTorch must not be inside"
    assert heavy.batch == 1
    assert "artefact" in heavy.counted


def test_the_size_of_this_process_is_not_counted(tmp_path: Path) -> None:
    path = matmul(tmp_path / "small.onnx", 16)
    ballast = np.ones(60_000_000, dtype=np.float64)  # 480 MB here
    found = peak_memory(path, {"x": np.ones((1, 16), np.float32)}, runtime="onnxruntime", threads=1)
    assert ballast.sum() > 0
    assert found.peak_bytes < 250e6


def test_an_artefact_that_does_not_open_is_an_error_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not an onnx file")
    with pytest.raises(TargetError, match=r"could not run broken\.onnx"):
        peak_memory(path, {"x": np.ones((1, 2), np.float32)}, runtime="onnxruntime")
