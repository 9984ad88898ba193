"""Passes over an exported ONNX model (onnx_ir): nothing here changes what is computed, only how it is written.

A Dialect says which integer types a runtime wants its grids in. Moving a grid from int8 to uint8 adds 128 to its codes
and to its zero point: the numbers that the codes stand for stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from penjing.runtimes.base import Widened
from penjing.runtimes.onnx_activations import clip_codes, dynamic_grids, dynamic_products, wide_to_float
from penjing.runtimes.onnx_attention import plain_transpositions
from penjing.runtimes.onnx_biases import bias_to_integers, fit_biases, keep_float
from penjing.runtimes.onnx_nodes import attribute, dequantize, is_output, keep, replace_all, set_axis
from penjing.runtimes.onnx_recurrent import integer_lstms
from penjing.runtimes.onnx_views import carry_grids, constant
from penjing.runtimes.onnx_weights import Stored, gather, narrow

Array = np.ndarray[Any, Any]

_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_WORTH = 1024  # bytes from which a matrix is not stored a second time, transposed


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The types that a runtime computes fastest in and that are right on every CPU.

    `unsigned_activations`: int8 grids of activations become uint8.
    `unsigned_weights(codes, depthwise) -> bool`: whether these int8 weights (outputs, inputs, taps …) become uint8
    (zero point 128).
    `integer_bias`: biases fit into int32 on the grid of their products, and that of an integer Gemm is written so; what
    stays float is kept from being rounded at loading (ONNX Runtime needs all that).
    `carried_grids`: what only moves values gets its inputs' grid behind it as well (ONNX Runtime needs that).
    `products_of_bits`: large products with 4-bit weights become MatMulNBits (ONNX Runtime has it).
    `clipped_codes`: activations on fewer than 8 bits are clipped as integers, not before they are rounded (ONNX Runtime
    fuses a layer with the rounding right behind it).
    `dynamic_products`: there are kernels for products with grids that are found in every run (ONNX Runtime).
    """

    unsigned_activations: bool
    unsigned_weights: Callable[[Array, bool], bool]
    integer_bias: bool
    carried_grids: bool
    products_of_bits: bool
    clipped_codes: bool
    dynamic_products: bool


def run(
    model: Any, dialect: Dialect, weights: Mapping[str, Stored], lstms: Collection[str] = ()
) -> tuple[Widened, ...]:
    """All passes, in place; returns what had to be widened. `weights`: see `onnx_weights.gather`; `lstms`: see
    `onnx_recurrent.marked`."""
    from onnx_ir.passes.common import NameFixPass

    graph = model.graph
    _forget_origins(model)
    stored = gather(graph, weights)
    plain_transpositions(graph)
    _fold_rows(graph)
    _fold_rounded(graph)
    _transpose_integers(graph)
    _fold_pads(graph)
    wide = (*wide_to_float(graph), *dynamic_grids(graph, kernels=dialect.dynamic_products))
    if dialect.dynamic_products:
        wide = (*wide, *integer_lstms(graph, lstms, stored, dialect.unsigned_weights))
    if dialect.clipped_codes:
        clip_codes(graph)
    if dialect.unsigned_activations:
        _activations_to_unsigned(graph)
    if dialect.carried_grids:
        carry_grids(graph)  # before what follows, which looks for products that read a grid, views or not
    _weights(graph, dialect)
    if dialect.integer_bias:
        fit_biases(graph)
        bias_to_integers(graph)
    _sweep(model)
    widened = narrow(graph, stored, products_of_bits=dialect.products_of_bits)
    if dialect.dynamic_products:
        dynamic_products(graph)
    if dialect.integer_bias:
        keep_float(graph)
    _share_transposed(graph, codes=dialect.products_of_bits)
    _sweep(model)
    NameFixPass()(model)  # of a layer that is used twice all that was made has the same names twice
    return (*wide, *widened)


# --------------------------------------------------------------------------------------------------------------- passes
def _forget_origins(model: Any) -> None:
    """Drops stack traces and module scopes: they cost bytes and tell paths of the machine that exported."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.producer_name, model.producer_version = "penjing", None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.initializers.values(), *model.graph.inputs):
        value.metadata_props.clear()


def _fold_rows(graph: Any) -> None:
    """Gather(constant, constant rows) → those rows (position embeddings); torch's folding stops at large tables."""
    for node in list(graph):
        if node.op_type != "Gather":
            continue
        table, rows = constant(node.inputs[0]), constant(node.inputs[1])
        if table is None or rows is None or node.inputs[0].is_graph_input():
            continue
        taken = np.take(table, rows, axis=int(attribute(node, "axis", 0)))
        if taken.size <= table.size and not is_output(graph, node.outputs[0]):
            replace_all(node.outputs[0], keep(graph, f"{node.inputs[0].name}.rows", taken))
            graph.remove(node, safe=True)


def _fold_rounded(graph: Any) -> None:
    """DequantizeLinear(QuantizeLinear(constant)) → the rounded constant. OpenVINO fails on sums with such a branch."""
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
            continue
        number, scale, zero = (constant(v) for v in node.inputs[:3])
        readers = [user for user, _ in node.outputs[0].uses()]
        if number is None or scale is None or zero is None or scale.ndim or zero.ndim or number.dtype != np.float32:
            continue
        if is_output(graph, node.outputs[0]) or any(r.op_type != "DequantizeLinear" for r in readers):
            continue
        limits = np.iinfo(zero.dtype)
        codes = np.clip(np.rint(number / scale) + int(zero), limits.min, limits.max)
        rounded = keep(graph, f"{node.inputs[0].name}.rounded", ((codes - int(zero)) * scale).astype(np.float32))
        for reader in readers:
            if not is_output(graph, reader.outputs[0]):
                replace_all(reader.outputs[0], rounded)


def _transpose_integers(graph: Any) -> None:
    """Transpose(DequantizeLinear(integers)) → DequantizeLinear(transposed integers): runtimes fuse only the latter."""
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        source = node.inputs[0].producer()
        if source is None or source.op_type != "DequantizeLinear":
            continue
        codes = constant(source.inputs[0])
        if codes is None:
            continue
        order = list(attribute(node, "perm", tuple(reversed(range(codes.ndim)))))
        moved = keep(graph, f"{source.inputs[0].name}.T", codes.transpose(order))
        block, inputs = attribute(source, "block_size", 0), [moved, *source.inputs[1:]]
        if block:
            grids = [(v.name, constant(v)) for v in source.inputs[1:]]
            inputs[1:] = [keep(graph, f"{n}.T", c.transpose(order)) for n, c in grids if c is not None]
        made = dequantize(inputs, node)
        scale = constant(source.inputs[1])
        if scale is not None and scale.ndim:
            set_axis(made, order.index(attribute(source, "axis", 1) % codes.ndim), block)
        graph.insert_before(node, made)
        replace_all(node.outputs[0], made.outputs[0])
        if is_output(graph, node.outputs[0]):
            continue
        graph.remove(node, safe=True)


def _share_transposed(graph: Any, *, codes: bool) -> None:
    """Stores a matrix once that an embedding reads as it is and a product transposed (tied weights).

    `codes`: the transposition stands in front of DequantizeLinear, as ONNX Runtime's integer products want it (it folds
    it at loading). OpenVINO would multiply in float then: it wants it behind, where both read one DequantizeLinear.
    Codes stay twice where the two read them differently: packed (MatMulNBits), cut into groups (ONNX Runtime, beside
    integer layers), or widened from 4 bits for an integer kernel (OpenVINO).
    """
    import onnx_ir as ir

    for name, turned in list(graph.initializers.items()):
        plain = graph.initializers.get(name.replace(".T", "", 1)) if ".T" in name else None
        numbers = None if plain is None else constant(plain)
        if plain is None or numbers is None or numbers.ndim != 2 or plain.dtype != turned.dtype:
            continue
        if numbers.nbytes < _WORTH or not np.array_equal(numbers.T, turned.const_value.numpy()):
            continue
        source, end = (plain, turned) if codes else (_dequantized(plain), _dequantized(turned))
        if source is None or end is None or not (codes or _same_grid(source.producer(), end.producer())):
            continue
        made = ir.Node("", "Transpose", [source], [ir.AttrInt64s("perm", [1, 0])], name=f"{name}_transposed")
        made.outputs[0].name, made.outputs[0].shape, made.outputs[0].type = f"{name}_shared", end.shape, end.type
        graph.append(made)
        replace_all(end, made.outputs[0])
        graph.sort()


def _dequantized(codes: Any) -> Any:
    """What the one DequantizeLinear behind codes gives; None if others read them."""
    users = [user for user, _ in codes.uses()]
    return users[0].outputs[0] if [user.op_type for user in users] == ["DequantizeLinear"] else None


def _same_grid(node: Any, turned: Any) -> bool:
    """Whether a DequantizeLinear of a matrix and one of the transposed matrix mean the same grid."""
    scales = [constant(each.inputs[1]) for each in (node, turned)]
    zeros = [constant(each.inputs[2]) if len(each.inputs) > 2 else np.zeros(()) for each in (node, turned)]
    blocks = [attribute(each, "block_size", 0) for each in (node, turned)]
    known = [(s, z) for s, z in zip(scales, zeros, strict=True) if s is not None and z is not None]
    if len(known) < 2 or blocks[0] != blocks[1]:
        return False
    plain, moved = (np.broadcast_arrays(*pair) for pair in known)
    if not all(np.array_equal(a.T, b) for a, b in zip(plain, moved, strict=True)):
        return False
    return plain[0].ndim == 0 or attribute(node, "axis", 1) % 2 != attribute(turned, "axis", 1) % 2


def _fold_pads(graph: Any) -> None:
    """Moves constant zero padding into the convolution behind it, through the grid between them if there is one.

    Zero is a point of every grid that holds it, so the convolution's own padding (the zero point) means the same.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Pad" or not node.inputs:
            continue
        pads = _spatial_pads(node)
        if pads is None:
            continue
        convolutions = _convolutions_behind(graph, node.outputs[0])
        if not convolutions:
            continue
        for convolution in convolutions:
            rank = len(pads) // 2
            own = list(attribute(convolution, "pads", (0,) * (2 * rank)))
            total = [int(a + b) for a, b in zip(own, pads, strict=True)]
            convolution.attributes["pads"] = ir.AttrInt64s("pads", total)
        replace_all(node.outputs[0], node.inputs[0])
        graph.remove(node, safe=True)


def _spatial_pads(node: Any) -> list[int] | None:
    """[begin…, end…] over the spatial axes, or None if this padding cannot go into a convolution."""
    mode = attribute(node, "mode", "constant")
    amounts = constant(node.inputs[1])
    fill = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(())
    shape = node.inputs[0].shape
    if (
        mode != "constant"
        or amounts is None
        or fill is None
        or np.any(fill != 0)
        or shape is None
        or (amounts < 0).any()
    ):
        return None
    rank = len(shape)
    axes = range(rank)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = constant(node.inputs[3])
        if given is None:
            return None
        axes = [int(a) % rank for a in given.ravel()]  # type: ignore[assignment]
    count = len(axes)
    if rank < 3 or amounts.size != 2 * count:
        return None
    begin, end = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        begin[axis], end[axis] = int(amounts[place]), int(amounts[count + place])
    if any(begin[:2]) or any(end[:2]):
        return None
    return begin[2:] + end[2:]


def _convolutions_behind(graph: Any, value: Any) -> list[Any]:
    """The convolutions that read `value`, directly or from a grid that holds zero; [] if anything else reads it."""
    if is_output(graph, value):
        return []
    found = []
    for user, index in value.uses():
        if user.op_type == "Conv" and index == 0 and attribute(user, "auto_pad", "NOTSET") == "NOTSET":
            found.append(user)
        elif user.op_type in ("QuantizeLinear", "DequantizeLinear") and index == 0:
            zero = constant(user.inputs[2]) if len(user.inputs) > 2 else np.zeros(())
            behind = _convolutions_behind(graph, user.outputs[0]) if zero is not None and not zero.ndim else []
            if not behind:
                return []
            found += behind
        else:
            return []
    return found


def _activations_to_unsigned(graph: Any) -> None:
    """int8 grids of activations → uint8, codes and zero point + 128. Grids whose codes something else reads stay."""
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
            continue
        zero = constant(node.inputs[2])
        if zero is None or zero.dtype != np.int8 or is_output(graph, node.outputs[0]):
            continue
        readers = [user for user, _ in node.outputs[0].uses()]
        if any(r.op_type != "DequantizeLinear" for r in readers):
            continue
        moved = keep(
            graph, f"zero_{int(zero.flat[0]) + 128}" if zero.ndim == 0 else f"{node.inputs[2].name}_u8", _shift(zero)
        )
        node.replace_input_with(2, moved)
        if "output_dtype" in node.attributes:
            node.attributes.pop("output_dtype")
        node.outputs[0].type = moved.type
        for reader in readers:
            reader.replace_input_with(2, moved)


def _shift(codes: Array) -> Array:
    return (codes.astype(np.int16) + 128).astype(np.uint8)


def _weights(graph: Any, dialect: Dialect) -> None:
    """int8 weights of products with integer activations → uint8 where the dialect wants them so."""
    for node in list(graph):
        if node.op_type not in _PRODUCTS or len(node.inputs) < 2:
            continue
        source = node.inputs[1].producer()
        activation = node.inputs[0].producer()
        if source is None or source.op_type != "DequantizeLinear" or attribute(source, "block_size", 0):
            continue
        if activation is None or activation.op_type != "DequantizeLinear":
            continue
        codes, scale = constant(source.inputs[0]), constant(source.inputs[1])
        if codes is None or scale is None or codes.dtype != np.int8:
            continue
        zero = constant(source.inputs[2]) if len(source.inputs) > 2 else np.zeros(scale.shape, np.int8)
        if zero is None:
            continue
        axis = attribute(source, "axis", 1) % codes.ndim if scale.ndim else None
        groups = attribute(node, "group", 1)
        depthwise = node.op_type == "Conv" and 1 < groups == codes.shape[0] and codes.shape[1] == 1
        if not dialect.unsigned_weights(_outputs_first(node, codes), depthwise):
            continue
        made = dequantize(
            [
                keep(graph, source.inputs[0].name, _shift(codes)),
                source.inputs[1],
                keep(graph, f"{source.inputs[0].name}_zero_point", _shift(zero)),
            ],
            source,
        )
        if axis is not None:
            set_axis(made, axis)
        graph.insert_before(source, made)
        node.replace_input_with(1, made.outputs[0])


def _outputs_first(node: Any, codes: Array) -> Array:
    """A product's weight with its axes as (outputs, inputs, taps …)."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return codes
    if node.op_type == "ConvTranspose":
        return codes.swapaxes(0, 1)
    return codes[None] if codes.ndim < 2 else codes.swapaxes(-1, -2).reshape(-1, codes.shape[-2])


def _sweep(model: Any) -> None:
    """Removes nodes and initializers that nothing reads any more."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
