"""Which products meet in 16 bits, asked of the real runtimes: everything that tensors/saturation.py lets through."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from penjing.runtimes.base import Target
from penjing.runtimes.ort import OrtSession
from penjing.runtimes.ov import OpenVino
from penjing.tensors.grids import quantize, tensor_grid
from penjing.tensors.saturation import may_saturate, without_saturation

# operator, outputs, inputs, kernel, groups, stride
CASES = [
    ("Conv", 16, 3, 3, 1, 2),
    ("Conv", 32, 32, 3, 1, 1),
    ("Conv", 20, 13, 3, 1, 2),
    ("Conv", 33, 17, 1, 1, 1),
    ("Conv", 6, 1, 5, 1, 1),
    ("Conv", 64, 64, 3, 8, 1),
    ("Conv", 30, 15, 3, 3, 2),
    ("Conv", 24, 8, 3, 8, 1),
    ("Conv", 66, 66, 3, 2, 1),
    ("ConvTranspose", 8, 15, 3, 1, 2),
    ("ConvTranspose", 8, 16, 2, 1, 2),
    ("Gemm", 10, 84, 1, 1, 1),
    ("Gemm", 24, 401, 1, 1, 1),
    ("Gemm", 24, 510, 1, 1, 1),
    ("Gemm", 24, 1001, 1, 1, 1),
    ("MatMul", 48, 51, 1, 1, 1),
    ("MatMul", 16, 513, 1, 1, 1),
]


def exact(kind: str, x: torch.Tensor, codes: torch.Tensor, groups: int, stride: int) -> torch.Tensor:
    x, codes = x.double(), codes.double()
    if kind == "Conv":
        return F.conv2d(x, codes, stride=stride, groups=groups)
    if kind == "ConvTranspose":
        return F.conv_transpose2d(x, codes, stride=stride)
    return x @ (codes.T if kind == "Gemm" else codes)


def model(kind: str, codes: torch.Tensor, axis: int, shape: list[int], step: float, attributes: dict[str, Any]) -> Any:
    """Quantizers with steps of 1 around one operator; the output on `step`, so that nothing is left to float."""
    numbers = {
        "x_step": np.float32(1), "x_zero": np.uint8(0), "y_step": np.float32(step), "y_zero": np.uint8(128),
        "w": codes.numpy(), "w_step": np.ones(codes.shape[axis], np.float32),
        "w_zero": np.zeros(codes.shape[axis], np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_step", "x_zero"], ["x_codes"]),
        helper.make_node("DequantizeLinear", ["x_codes", "x_step", "x_zero"], ["x_real"]),
        helper.make_node("DequantizeLinear", ["w", "w_step", "w_zero"], ["w_real"], axis=axis),
        helper.make_node(kind, ["x_real", "w_real"], ["y_real"], **attributes),
        helper.make_node("QuantizeLinear", ["y_real", "y_step", "y_zero"], ["y_codes"]),
        helper.make_node("DequantizeLinear", ["y_codes", "y_step", "y_zero"], ["y"]),
    ]
    ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None)))
    held = [numpy_helper.from_array(np.asarray(v), k) for k, v in numbers.items()]
    graph = helper.make_graph(nodes, "g", [next(ends)], [next(ends)], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_separated_weights_give_exact_sums(
    case: tuple[str, int, int, int, int, int], runtime: str, tmp_path: Any
) -> None:
    kind, outputs, inputs, kernel, groups, stride = case
    torch.manual_seed(0)
    axis = 1 if kind in ("ConvTranspose", "MatMul") else 0
    shape = (inputs // groups, outputs) if axis else (outputs, inputs // groups)
    shape += (kernel, kernel) if kind.startswith("Conv") else ()
    signs = torch.rand(outputs).sub(0.5).sign().view([-1 if d == axis else 1 for d in range(len(shape))])
    grid_of = torch.randn(shape) * 0.02 + 1.0  # nearly all pairs are too large
    grid_of = torch.where(torch.rand(shape) < 0.5, grid_of, torch.randn(shape)) * signs
    grid, values = without_saturation(grid_of, tensor_grid(grid_of, -127, 127, axis=axis), axis)
    codes = quantize(values, grid)
    assert not may_saturate(codes, axis) and int(codes.abs().max()) > 90
    attributes: dict[str, Any] = {"transB": 1} if kind == "Gemm" else {}
    x = torch.randint(0, 2, (3, inputs)) * 255.0
    if kind.startswith("Conv"):
        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "group": groups}
        x = torch.randint(0, 2, (2, inputs, 9, 9)) * 255.0
    x[0] = 255.0  # all activations at their largest
    want = exact(kind, x, codes, groups, stride)
    step = float(want.abs().max()) / 127
    path = tmp_path / "model.onnx"
    onnx.save(model(kind, codes, axis, list(x.shape), step, attributes), path)
    target = Target(runtime=runtime, threads=1)
    session = OrtSession(path, target) if runtime == "onnxruntime" else OpenVino().load(path, target)
    (got,) = session.run({"x": x.numpy()})
    assert np.abs(got / step - want.numpy() / step).max() < 0.6
