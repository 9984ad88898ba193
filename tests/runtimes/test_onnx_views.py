"""The grid of an operator that only moves values: put behind it, or left where it would not be the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.parser import parse_model

from penjing.runtimes.onnx_views import carry_grids

MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[2, 4] a, float[2, 4] b) => (float[R, C] y)
<float s = {0.1}, uint8 z = {7}, float s2 = {SCALE}, float fill = {FILL},
 int64[2] to = {4, 2}, int64[4] pads = {0, 1, 0, 1}>
{
  qa = QuantizeLinear (a, s, z)  da = DequantizeLinear (qa, s, z)
  qb = QuantizeLinear (b, s2, z)  db = DequantizeLinear (qb, s2, z)
  moved = BODY
  y = Relu (moved)
}
"""


def _model(body: str, scale: float, fill: float) -> onnx.ModelProto:
    return parse_model(MODEL.replace("BODY", body).replace("SCALE", str(scale)).replace("FILL", str(fill)))


@pytest.mark.parametrize(
    ("body", "scale", "fill", "carried"),
    [
        ("Reshape (da, to)", 0.1, 0.0, True),
        ("Concat <axis = 0> (da, db)", 0.1, 0.0, True),
        ("Concat <axis = 0> (da, db)", 0.2, 0.0, False),  # two grids
        ("Pad (da, pads, fill)", 0.1, 0.0, True),
        ("Pad (da, pads, fill)", 0.1, 0.33, False),  # not a point of the grid
        ("Sigmoid (da)", 0.1, 0.0, False),
    ],
)
def test_a_grid_is_carried_where_nothing_changes(body: str, scale: float, fill: float, carried: bool) -> None:
    before = _model(body, scale, fill)
    model = ir.from_proto(before)
    carry_grids(model.graph)
    after = ir.to_proto(model)
    onnx.checker.check_model(after)
    kinds = Counter(n.op_type for n in after.graph.node)
    assert kinds["QuantizeLinear"] == kinds["DequantizeLinear"] == (3 if carried else 2)
    rng = np.random.default_rng(0)
    feed = {name: rng.uniform(-2, 20, (2, 4)).astype(np.float32) for name in "ab"}
    results = [
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for m in (before, after)
    ]
    np.testing.assert_array_equal(*results)
