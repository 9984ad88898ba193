"""1×1 convolutions with zeros in LiteRT (XNNPACK); run by sparsity.py with an interpreter that has ai-edge-litert.

    python sparsity_litert.py THREADS

The network is what XNNPACK's sparse kernels ask for: a 3×3 convolution with stride 2 on three channels, 1×1
convolutions, a mean. Weights are stored dense, or by their positions with a DENSIFY operator, which is how LiteRT tells
XNNPACK that zeros are meant. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

CHANNELS, SIZE, DEPTH, ROUNDS = 256, 32, 6, 40
ACTIVATION, KIND = schema.ActivationFunctionType, schema.TensorType
OPERATOR, OPTIONS = schema.BuiltinOperator, schema.BuiltinOptions


class Model:
    """A LiteRT model in the making."""

    def __init__(self) -> None:
        self.model, self.graph = schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.buffers, self.model.operatorCodes = 3, [schema.BufferT()], []
        self.graph.tensors, self.graph.operators = [], []
        self.codes: dict[int, int] = {}

    def tensor(self, shape: Any, data: Any = None, sparse: Any = None, kind: int = KIND.FLOAT32) -> int:
        made = schema.TensorT()
        made.shape, made.type, made.sparsity, made.hasRank, made.buffer = list(shape), kind, sparse, True, 0
        made.name = f"tensor{len(self.graph.tensors)}"
        if data is not None:
            held = schema.BufferT()
            held.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            self.model.buffers.append(held)
            made.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def call(self, kind: int, inputs: list[int], output: int, options: Any, union: int) -> int:
        if kind not in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode, code.version = kind, min(kind, 127), 1
            self.codes[kind] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(code)
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = self.codes[kind], inputs, [output]
        made.builtinOptions, made.builtinOptionsType = options, union
        self.graph.operators.append(made)
        return output

    def convolution(self, x: int, weight: Any, stride: int, sparse: bool) -> int:
        if sparse:
            held = self.tensor(weight.shape, weight[weight != 0], positions(weight))
            options = schema.DensifyOptionsT()
            filters = self.call(OPERATOR.DENSIFY, [held], self.tensor(weight.shape), options, OPTIONS.DensifyOptions)
        else:
            filters = self.tensor(weight.shape, weight)
        bias = self.tensor([len(weight)], np.full(len(weight), 0.1, np.float32))
        options = schema.Conv2DOptionsT()
        options.padding, options.strideH, options.strideW = schema.Padding.VALID, stride, stride
        options.dilationHFactor = options.dilationWFactor = 1
        options.fusedActivationFunction = ACTIVATION.RELU
        output = self.tensor([1, SIZE, SIZE, len(weight)])
        return self.call(OPERATOR.CONV_2D, [x, filters, bias], output, options, OPTIONS.Conv2DOptions)

    def finish(self, x: int, y: int) -> bytes:
        self.graph.inputs, self.graph.outputs, self.model.subgraphs = [x], [y], [self.graph]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def positions(weight: Any) -> Any:
    """Compressed sparse rows along the input channels."""
    rows = weight.reshape(len(weight), -1) != 0
    made = schema.SparsityParametersT()
    made.traversalOrder, made.dimMetadata = [0, 1, 2, 3], []
    for size in weight.shape[:3]:
        dense = schema.DimensionMetadataT()
        dense.format, dense.denseSize = schema.DimensionType.DENSE, size
        made.dimMetadata.append(dense)
    last = schema.DimensionMetadataT()
    last.format, last.arraySegments, last.arrayIndices = (
        schema.DimensionType.SPARSE_CSR, schema.Int32VectorT(), schema.Int32VectorT(),
    )  # fmt: skip
    last.arraySegmentsType = last.arrayIndicesType = schema.SparseIndexVector.Int32Vector
    last.arraySegments.values = np.r_[0, rows.sum(1).cumsum()].tolist()
    last.arrayIndices.values = np.nonzero(rows)[1].tolist()
    made.dimMetadata.append(last)
    return made


def network(sparsity: float, stored_sparse: bool) -> bytes:
    rng = np.random.default_rng(0)

    def drawn(kernel: int, inputs: int, zeros: float) -> Any:
        weight = (
            rng.standard_normal((CHANNELS, kernel, kernel, inputs)) * (2 / (kernel**2 * inputs * (1 - zeros))) ** 0.5
        )
        return np.where(rng.random(weight.shape) < zeros, 0, weight).astype(np.float32)

    model = Model()
    given = model.tensor([1, 2 * SIZE, 2 * SIZE, 3])
    edges = model.tensor([4, 2], np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32), kind=KIND.INT32)
    padded = model.tensor([1, 2 * SIZE + 2, 2 * SIZE + 2, 3])
    x = model.call(OPERATOR.PAD, [given, edges], padded, schema.PadOptionsT(), OPTIONS.PadOptions)
    x = model.convolution(x, drawn(3, 3, 0), 2, False)
    for _ in range(DEPTH):
        x = model.convolution(x, drawn(1, CHANNELS, sparsity), 1, stored_sparse)
    options = schema.ReducerOptionsT()
    options.keepDims = True
    axes = model.tensor([2], np.array([1, 2], np.int32), kind=KIND.INT32)
    y = model.call(OPERATOR.MEAN, [x, axes], model.tensor([1, 1, 1, CHANNELS]), options, OPTIONS.ReducerOptions)
    return model.finish(given, y)


def main() -> None:
    x = np.random.default_rng(1).standard_normal((1, 2 * SIZE, 2 * SIZE, 3)).astype(np.float32)
    cases = [(0.0, "dense"), *((s, stored) for s in (0.7, 0.8, 0.9) for stored in ("dense", "sparse"))]
    opened, outputs = [], []
    for sparsity, stored in cases:
        made = Interpreter(model_content=network(sparsity, stored == "sparse"), num_threads=int(sys.argv[1]))
        made.allocate_tensors()
        made.set_tensor(made.get_input_details()[0]["index"], x)
        made.invoke()
        outputs.append(made.get_tensor(made.get_output_details()[0]["index"]).copy())
        opened.append(made)
    times = np.zeros((ROUNDS, len(cases)))
    rng = np.random.default_rng(2)
    for turn in times:
        for case in rng.permutation(len(cases)):
            opened[case].invoke()
            start = time.perf_counter()
            opened[case].invoke()
            turn[case] = time.perf_counter() - start
    rows = [
        {"sparsity": s, "stored": stored, "ms": float(np.median(times[:, i])) * 1e3,
         "speedup": float(np.median(times[:, 0] / times[:, i]))}
        for i, (s, stored) in enumerate(cases)
    ]  # fmt: skip
    # The other kernels would sum in another order.
    same = all(np.array_equal(outputs[i], outputs[i + 1]) for i in range(1, len(cases), 2))
    print(json.dumps({"litert": version("ai-edge-litert"), "cores": os.cpu_count(), "same_bits": same, "rows": rows}))


if __name__ == "__main__":
    main()
