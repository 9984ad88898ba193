"""Biases of products whose activations stand on a grid, for ONNX Runtime, which puts them on grids by itself.

Where a stored bias meets such a product it takes int32 codes in steps of (activation step · weight step), whether they
fit or not, and a float weight beside it becomes int8 with one scale, without a word (its WeightBiasQuantization). What
is written here leaves it nothing to choose: codes that fit, and for what stays float a bias that is not a constant to
it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penjing.runtimes.onnx_nodes import attribute, dequantize, keep, set_axis
from penjing.runtimes.onnx_views import constant
from penjing.runtimes.onnx_weights import reads_grid

Array = np.ndarray[Any, Any]

_KINDS = ("Conv", "ConvTranspose", "Gemm")
_ROOM = 2.0**30  # of int32: products are summed on top of the bias
_LEAST_STEP = 2.0**-100  # products of floats below are no numbers any more


def fit_biases(graph: Any) -> None:
    """Changes the scales of those outputs of integer products whose bias has no good code in int32.

    A bias may be 2^30 steps of its products or more. With that step raised to 2^-30 of the bias, a product of K values
    moves by at most K · 2^-23 of the bias: what float arithmetic loses as well. Where all weights are zero any scale
    says so: that step is taken as well, since the bias would be rounded to whatever stands there.
    """
    for node in list(graph):
        factors = _integer_factors(node)
        if factors is None:
            continue
        x, w = factors
        step, codes, scale = constant(x.inputs[1]), constant(w.inputs[0]), constant(w.inputs[1])
        axis = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
        if step is None or step.ndim or codes is None or scale is None or codes.dtype not in (np.int8, np.uint8):
            continue
        if scale.ndim and attribute(w, "axis", 1) % codes.ndim != axis:
            continue
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.float32)
        if bias is None or bias.dtype != np.float32 or bias.ndim != 1:
            continue
        least = np.maximum(np.abs(bias.astype(np.float64)) / _ROOM, _LEAST_STEP) / float(step)
        zero = constant(w.inputs[2]) if len(w.inputs) > 2 else np.zeros((), codes.dtype)
        if zero is None:
            continue
        shape = [-1 if d == axis else 1 for d in range(codes.ndim)]
        steps = codes.astype(np.int64) - zero.astype(np.int64).reshape(shape if zero.ndim else [])
        empty = ~steps.any(tuple(d for d in range(codes.ndim) if d != axis))
        wanted = np.where(empty, least, np.maximum(scale, least)).astype(np.float32)
        if (wanted != scale).any():
            moved = np.rint(steps * (scale / wanted.astype(np.float64)).reshape(shape)) * ~empty.reshape(shape)
            _put_weight(graph, node, w, moved, wanted, np.broadcast_to(zero, wanted.shape), axis)


def _put_weight(graph: Any, node: Any, w: Any, steps: Array, scale: Array, zero: Array, axis: int) -> None:
    """Lets a product read its weight on another grid than the DequantizeLinear `w` has, one scale an output."""
    name, shape = w.inputs[0].name, [-1 if d == axis else 1 for d in range(steps.ndim)]
    codes = (steps + zero.reshape(shape)).astype(zero.dtype)
    inputs = [keep(graph, name, codes), keep(graph, f"{name}_scales", scale), keep(graph, f"{name}_zeros", zero)]
    made = dequantize(inputs, w)
    set_axis(made, axis)
    graph.insert_before(node, made)
    node.replace_input_with(1, made.outputs[0])


def bias_to_integers(graph: Any) -> None:
    """float bias of a Gemm with integer factors → int32 in steps of (activation step · weight step), if it fits.

    The rounding is at most half of the smallest change that any product can make.
    """
    for node in list(graph):
        factors = _integer_factors(node) if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        bias = None if factors is None else constant(node.inputs[2])
        if factors is None or bias is None or bias.dtype != np.float32 or bias.ndim != 1:
            continue
        steps = [constant(f.inputs[1]) for f in factors]
        if steps[0] is None or steps[1] is None or steps[0].ndim:
            continue
        step = (steps[0].astype(np.float64) * steps[1].astype(np.float64)).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.rint(bias.astype(np.float64) / step)
        if not np.isfinite(codes).all() or np.abs(codes).max(initial=0) >= 2**31 - 1:
            continue
        _put_bias(graph, node, codes.astype(np.int32), step)


def _integer_factors(node: Any) -> tuple[Any, Any] | None:
    """The DequantizeLinear nodes of both factors of a Conv or a plain Gemm."""
    if node.op_type not in ("Conv", "Gemm"):
        return None
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return None
    x, w = (None if v is None else v.producer() for v in node.inputs[:2])
    if any(f is None or f.op_type != "DequantizeLinear" or attribute(f, "block_size", 0) for f in (x, w)):
        return None
    return x, w


def keep_float(graph: Any) -> None:
    """Lets products of a grid and a float weight, and transposed convolutions, stay float products.

    Their bias becomes a DequantizeLinear of -1, 0 and 1 with its magnitudes as scales, which ONNX Runtime computes in
    every run, and leaves the weight alone. It has no integer kernel for ConvTranspose and would only round its bias.
    """
    for node in list(graph):
        if node.op_type not in _KINDS or not reads_grid(node):
            continue
        weight = node.inputs[1].producer()
        integer = weight is not None and weight.op_type == "DequantizeLinear"
        if not _is_stored(node.inputs[1]) or (integer and node.op_type != "ConvTranspose"):
            continue
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        if bias is None and (integer or len(node.inputs) > 2):
            continue
        if bias is None:
            bias = np.zeros(_outputs(node), np.float32)
            node.resize_inputs(3)
        if bias.dtype == np.float32 and bias.ndim == 1:
            _put_bias(graph, node, np.sign(bias).astype(np.int32), np.where(bias == 0, np.float32(1), np.abs(bias)))


def _is_stored(value: Any) -> bool:
    """Whether a value is made of constants alone."""
    if value is None or constant(value) is not None:
        return True
    source = value.producer()
    return source is not None and all(_is_stored(v) for v in source.inputs)


def _outputs(node: Any) -> int:
    shape = node.inputs[1].shape
    if node.op_type == "ConvTranspose":
        return int(shape[1]) * int(attribute(node, "group", 1))
    return int(shape[0] if node.op_type == "Conv" or attribute(node, "transB", 0) else shape[1])


def _put_bias(graph: Any, node: Any, codes: Array, scale: Array) -> None:
    """The bias of a product as DequantizeLinear of int32 codes."""
    import onnx_ir as ir

    name = f"{node.outputs[0].name}_bias"  # a bias shared by layers has other steps in each
    inputs = [keep(graph, f"{name}_codes", codes), keep(graph, f"{name}_scale", scale)]
    made = dequantize(inputs, node)
    made.outputs[0].name, made.outputs[0].shape = f"{name}_float", ir.Shape(codes.shape)
    set_axis(made, 0)
    graph.insert_before(node, made)
    node.replace_input_with(2, made.outputs[0])


__all__ = ["bias_to_integers", "fit_biases", "keep_float"]
