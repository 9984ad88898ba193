"""Stored weights in an ONNX model: groups as blocks, narrow codes as 4 bits, and what runtimes multiply with them.

Grids of groups come out of the exporter as DequantizeLinear of reshaped codes; they become its blocked form where a
product reads them. Codes that fit in 4 bits are stored so, in one of these forms, each the same numbers:

- DequantizeLinear of int4, for what is computed in float (ONNX Runtime widens it once at loading, OpenVINO multiplies
  it as it is in fully connected layers);
- Cast to int8 before DequantizeLinear, for integer kernels, which know no 4 bits: the codes are widened at loading;
- Cast and multiplication by the scales (ONNX Runtime, beside integer layers, codes of any width: it would else
  dequantize in every run, which makes an LSTM 1.6 times slower than in float, or multiply 16 bits and groups in kernels
  that do not know them);
- the same by way of int32 (OpenVINO, beside integer layers: it leaves the zero points of transposed convolutions and
  recurrent layers away, and does not open grouped convolutions with scales for groups of their weights);
- MatMulNBits (ONNX Runtime, large products). Measured on one thread, one row of 2048 × 2048 takes 0.35 ms against 0.57
  in float, but 64 × 172 takes 6 µs against 4: small ones stay float products. It computes in float
  (accuracy_level 1); with 2 or 8 bits it is 20 times slower than a float product, so those are never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from penjing.runtimes.base import Widened
from penjing.runtimes.onnx_nodes import attribute, dequantize, is_output, keep, replace_all, set_axis
from penjing.runtimes.onnx_views import VIEWS, constant

Array = np.ndarray[Any, Any]
Form = Literal["float", "integer", "folded", "whole", "nbits"]

_PRODUCTS = ("MatMul", "Gemm")
_INTEGER = ("Conv", "MatMul", "Gemm")
_SYMMETRIC = ("ConvTranspose", "LSTM", "GRU", "RNN")  # whose zero points OpenVINO leaves away
_NBITS_SIZE = 2**16  # weights from which MatMulNBits is worth it
_BLOCKS = (256, 128, 64, 32, 16)  # what MatMulNBits takes


@dataclass(frozen=True)
class Stored:
    """A weight stored as codes: the tensor's name, its type in words ("int4", "ternary"), its shape, values a group."""

    name: str
    kind: str
    shape: tuple[int, ...]
    group: int = 0


def gather(graph: Any, weights: Mapping[str, Stored]) -> dict[str, Stored]:
    """Gives the codes of every stored weight its name and groups a form that runtimes know.

    `weights`: by the name of the value that dequantizing them gives. Returns them by the name of that value in the
    graph as it is now.
    """
    found: dict[str, Stored] = {}
    for node in list(graph):
        weight = weights.get(node.outputs[0].name) if node.op_type == "DequantizeLinear" else None
        codes = None if weight is None else _evaluated(node.inputs[0])
        if weight is None or codes is None:
            continue
        node.replace_input_with(0, keep(graph, weight.name, codes))
        real = node.outputs[0]
        if weight.group:
            real = _blocked(graph, node, codes, weight) or real
        found[real.name] = weight
    return found


def _evaluated(value: Any) -> Array | None:
    """A constant behind reshapes and zero padding."""
    known = constant(value)
    node = value.producer() if value is not None else None
    if known is not None or node is None or node.op_type not in ("Reshape", "Pad"):
        return known
    inner, amount = _evaluated(node.inputs[0]), constant(node.inputs[1])
    if inner is None or amount is None:
        return None
    if node.op_type == "Reshape":
        return inner.reshape(amount)
    half = len(amount) // 2
    return np.pad(inner, [(int(a), int(b)) for a, b in zip(amount[:half], amount[half:], strict=True)])


def _blocked(graph: Any, node: Any, codes: Array, weight: Stored) -> Any:
    """DequantizeLinear of (rows · groups, group) and its reshape → DequantizeLinear in blocks of the rows, where a
    matrix in even groups is read; None elsewhere."""
    end = node.outputs[0]
    while tuple(end.shape or ()) != weight.shape:
        users = list(end.uses())
        if len(users) != 1 or users[0][0].op_type not in ("Reshape", "Slice"):
            return None
        end = users[0][0].outputs[0]
    if len(weight.shape) != 2 or weight.shape[1] % weight.group or is_output(graph, end):
        return None
    if any(_operator(user) not in (*_PRODUCTS, "Gather") for user, _ in end.uses()):
        return None
    rows, groups = weight.shape[0], weight.shape[1] // weight.group
    inputs = [keep(graph, weight.name, codes.reshape(weight.shape))]
    for value in node.inputs[1:]:
        numbers = constant(value)
        if numbers is None:
            return None
        inputs.append(keep(graph, f"{value.name}.groups", numbers.reshape(rows, groups)))
    made = dequantize(inputs, end.producer())
    set_axis(made, 1, weight.group)
    graph.insert_before(node, made)
    replace_all(end, made.outputs[0])
    return made.outputs[0]


def _operator(user: Any) -> str:
    """What reads a value, seen through a transposition."""
    if user.op_type != "Transpose":
        return str(user.op_type)
    kinds = {str(u.op_type) for u, _ in user.outputs[0].uses()}
    return kinds.pop() if len(kinds) == 1 else ""


# --------------------------------------------------------------------------------------------------------- narrow codes
def narrow(graph: Any, weights: Mapping[str, Stored], *, products_of_bits: bool) -> tuple[Widened, ...]:
    """Stores codes that fit in 4 bits, in the form that what reads them wants; says what had to be widened.

    `products_of_bits`: whether the runtime has MatMulNBits, and dequantizes in every run beside integer layers (ONNX
    Runtime).
    """
    integers = any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in graph)
    stored = {w.name: w for w in weights.values()}
    widened: dict[str, Widened] = {}
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0].const_value is None:
            continue
        weight = _named(node.inputs[0].name, stored)
        codes = constant(node.inputs[0])
        if weight is None or codes is None:
            continue
        fits = codes.dtype == np.int8 and -8 <= int(codes.min(initial=0)) and int(codes.max(initial=0)) <= 7
        users = list(node.outputs[0].uses())
        form = _form(node, codes, integers, products_of_bits, fits, weight)
        if form == "nbits" and _to_bits(graph, node, codes):
            kept = "int4"
        else:
            kept = _rewrite(graph, node, codes, "float" if form == "nbits" else form, fits)
        if form == "whole":
            widened[weight.name] = Widened(weight.name, weight.kind, "float32", "at loading: no integer kernel for it")
        elif weight.kind not in (kept, "int8"):
            widened[weight.name] = Widened(weight.name, weight.kind, kept, f"no {weight.kind} in the file")
        elif form == "integer" and kept == "int4":
            widened[weight.name] = Widened(weight.name, weight.kind, "int8", "at loading: no 4-bit kernel")
        elif form != "integer" and any(_transposed_on_grid(u, i) for u, i in users):
            why = "at loading: no integer kernel for this transposed convolution"
            widened[weight.name] = Widened(weight.name, weight.kind, "float32", why)
    return tuple(widened.values())


def _named(name: str, stored: Mapping[str, Stored]) -> Stored | None:
    """The weight whose codes an initializer of this name holds (transpositions and doubles have endings)."""
    while name not in stored:
        cut = max(name.rfind("."), name.rfind("_"))
        ending = name[cut + 1 :]
        if cut < 1 or not (ending == "T" or ending.isdecimal()):
            return None
        name = name[:cut]
    return stored[name]


def _form(node: Any, codes: Array, integers: bool, products_of_bits: bool, fits: bool, weight: Stored) -> Form:
    users = list(node.outputs[0].uses())
    blocked = bool(attribute(node, "block_size", 0))
    able = _INTEGER if products_of_bits else (*_INTEGER, "ConvTranspose")
    if not products_of_bits and integers and codes.dtype == np.int8 and _misread(node, weight):
        return "whole"
    if codes.dtype != np.int16 and not blocked and users and all(_is_integer(u, index, able) for u, index in users):
        return "integer"
    if not products_of_bits:
        return "float"
    products = all(user.op_type in _PRODUCTS and index == 1 for user, index in users)
    if fits and products and codes.ndim == 2 and codes.size >= _NBITS_SIZE:
        return "nbits"
    # What integer kernels read as well has to stay as it is.
    kept = codes.dtype != np.int16 and not blocked and any(_is_integer(u, index, able) for u, index in users)
    return "folded" if integers and (fits or weight.group or not kept) else "float"


def _transposed_on_grid(user: Any, index: int) -> bool:
    return bool(user.op_type == "ConvTranspose") and index == 1 and reads_grid(user)


def _misread(node: Any, weight: Stored) -> bool:
    """Whether OpenVINO, beside integer layers, would leave away this weight's zero points or fail at its groups."""
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    readers = _readers(node.outputs[0])
    if weight.group and any(user.op_type == "Conv" and attribute(user, "group", 1) > 1 for user in readers):
        return True
    return zero is not None and bool(zero.any()) and any(user.op_type in _SYMMETRIC for user in readers)


def _readers(value: Any) -> list[Any]:
    """The nodes that compute with a value, behind those that only move it."""
    found: list[Any] = []
    for user, _ in value.uses():
        rows = user.op_type == "Gather" and constant(user.inputs[1]) is not None
        moves = rows or user.op_type in VIEWS or user.op_type in ("Concat", "Split")
        found += [n for output in user.outputs for n in _readers(output)] if moves else [user]
    return found


def _is_integer(user: Any, index: int, able: tuple[str, ...]) -> bool:
    """Whether an integer kernel multiplies this operand; none knows groups of transposed convolutions."""
    grouped = user.op_type == "ConvTranspose" and attribute(user, "group", 1) > 1
    return user.op_type in able and index == 1 and not grouped and reads_grid(user)


def reads_grid(user: Any) -> bool:
    """Whether the first factor of a product stands on a grid, behind views or not."""
    other = user.inputs[0].producer()
    while other is not None and other.op_type in VIEWS:
        other = other.inputs[0].producer()
    return other is not None and other.op_type == "DequantizeLinear"


def _rewrite(graph: Any, node: Any, codes: Array, form: Form, fits: bool) -> str:
    """Writes codes in a form; returns the type that the file holds them in."""
    name = node.inputs[0].name
    if form in ("folded", "whole"):
        _multiply(graph, node, codes, fits, whole=form == "whole")
    elif fits and form == "integer":
        node.replace_input_with(0, _cast(graph, node, _four_bits(graph, name, codes), np.dtype(np.int8)))
    elif fits:
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        node.replace_input_with(0, _four_bits(graph, name, codes))
        if zero is not None and zero.any():
            node.replace_input_with(2, _four_bits(graph, node.inputs[2].name, zero))
        else:
            node.resize_inputs(2)
    return "int4" if fits else str(codes.dtype)


def _four_bits(graph: Any, name: str, codes: Array) -> Any:
    """An initializer of type int4."""
    import ml_dtypes

    return keep(graph, f"{name}.int4", codes.astype(ml_dtypes.int4))


def _cast(graph: Any, node: Any, value: Any, dtype: np.dtype[Any]) -> Any:
    import onnx_ir as ir

    wanted = ir.DataType.from_numpy(dtype)
    made = ir.Node("", "Cast", [value], [ir.AttrInt64("to", wanted)], name=f"{node.name}_widened_{value.name}")
    made.outputs[0].name = f"{value.name}_{dtype}_{node.name}"
    made.outputs[0].shape, made.outputs[0].type = value.shape, ir.TensorType(wanted)
    graph.insert_before(node, made)
    return made.outputs[0]


def _multiply(graph: Any, node: Any, codes: Array, fits: bool, *, whole: bool) -> None:
    """DequantizeLinear → (Cast - zero point) · scale, which a runtime folds into one float constant at loading.

    `whole`: the difference is one of int32, so that OpenVINO sees no grid in it.
    """
    import onnx_ir as ir

    scale, real = constant(node.inputs[1]), node.outputs[0]
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if scale is None or is_output(graph, real):
        return
    axis, block = attribute(node, "axis", 1) % max(codes.ndim, 1), attribute(node, "block_size", 0)
    cut = codes.reshape(*codes.shape[:axis], -1, block, *codes.shape[axis + 1 :]) if block else codes
    kept = (_four_bits if fits else keep)(graph, f"{node.inputs[0].name}.cut" if block else node.inputs[0].name, cut)
    current = _cast(graph, node, kept, np.dtype(np.int32 if whole else np.float32))

    def then(kind: str, word: str, numbers: Array) -> None:
        nonlocal current
        made = ir.Node("", kind, [current, keep(graph, f"{node.name}_{word}", numbers)], name=f"{node.name}_{kind}")
        made.outputs[0].name, made.outputs[0].type = f"{real.name}_{word}", current.type
        graph.insert_before(node, made)
        current = made.outputs[0]

    def broad(numbers: Array) -> Array:
        return np.expand_dims(numbers, axis + 1) if block else _spread(numbers, node, codes.shape)

    if zero is not None and zero.any():
        then("Sub", "zeros", broad(zero.astype(np.int32 if whole else np.float32)))
    if whole:
        current = _cast(graph, node, current, np.dtype(np.float32))
    then("Mul", "scales", broad(scale))
    if block:
        then("Reshape", "shape", np.array(codes.shape, dtype=np.int64))
    current.shape = real.shape
    replace_all(real, current)


def _spread(numbers: Array, node: Any, shape: tuple[int, ...]) -> Array:
    """Scales or zero points of a DequantizeLinear in a form that broadcasts against its codes."""
    if numbers.ndim == 0:
        return numbers
    axis, block = attribute(node, "axis", 1) % len(shape), attribute(node, "block_size", 0)
    if block:
        return np.repeat(numbers, block, axis)[tuple(slice(0, d) for d in shape)]
    return numbers.reshape([-1 if d == axis else 1 for d in range(len(shape))])


# ------------------------------------------------------------------------------------------------------- MatMulNBits
def _to_bits(graph: Any, node: Any, codes: Array) -> bool:
    """Products with a dequantized matrix → MatMulNBits; false where its blocks cannot say this grid."""
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    users = [user for user, _ in node.outputs[0].uses()]
    plain = all(u.op_type == "MatMul" or _is_plain_gemm(u) for u in users)
    turned = {u.op_type == "Gemm" and bool(attribute(u, "transB", 0)) for u in users}
    if scale is None or not plain or len(turned) != 1:
        return False
    outputs_first = turned.pop()
    spread = [
        np.broadcast_to(_spread(n, node, codes.shape), codes.shape)
        for n in (scale, np.zeros((), np.int8) if zero is None else zero)
    ]
    matrix, scales, zeros = (a if outputs_first else a.T for a in (codes, *spread))
    block = _block_size(node, matrix.shape[1])
    if block is None:
        return False
    inputs = [
        keep(graph, f"{node.inputs[0].name}.packed", _packed(matrix, block)),
        keep(graph, f"{node.inputs[0].name}.scales", np.ascontiguousarray(scales[:, ::block])),
    ]
    if zero is not None and zero.any():
        inputs.append(keep(graph, f"{node.inputs[0].name}.zeros", _nibbles(zeros[:, ::block] + 8).reshape(-1)))
    for user in users:
        _put_product(graph, user, inputs, matrix.shape, block)
    return True


def _is_plain_gemm(user: Any) -> bool:
    numbers = [attribute(user, "alpha", 1.0), attribute(user, "beta", 1.0), attribute(user, "transA", 0)]
    return bool(user.op_type == "Gemm" and numbers == [1.0, 1.0, 0])


def _block_size(node: Any, inner: int) -> int | None:
    """Weights of one scale in MatMulNBits: what divides the grid's own blocks, or the least padding."""
    own = attribute(node, "block_size", 0)
    if own:
        return next((b for b in _BLOCKS if own % b == 0), None)
    return min(_BLOCKS, key=lambda b: (-inner % b, -b))


def _packed(matrix: Array, block: int) -> Array:
    """(rows, blocks, block / 2) bytes of codes -8 … 7 with 8 added, the first of two in the low half."""
    rows, inner = matrix.shape
    filled = np.pad(matrix.astype(np.int16) + 8, ((0, 0), (0, -inner % block)), constant_values=8)
    return _nibbles(filled).reshape(rows, -1, block // 2)


def _nibbles(values: Array) -> Array:
    even = np.pad(values.astype(np.uint8), ((0, 0), (0, values.shape[1] % 2)))
    return np.asarray(even[:, ::2] | (even[:, 1::2] << 4), dtype=np.uint8)


def _put_product(graph: Any, user: Any, inputs: list[Any], shape: tuple[int, ...], block: int) -> None:
    import onnx_ir as ir

    old = user.outputs[0]
    sizes = {"N": shape[0], "K": shape[1], "bits": 4, "block_size": block, "accuracy_level": 1}
    made = ir.Node(
        "com.microsoft",
        "MatMulNBits",
        [user.inputs[0], *inputs],
        [ir.AttrInt64(name, value) for name, value in sizes.items()],
        name=f"{user.name}_bits",
    )
    new = [made]
    bias = user.inputs[2] if user.op_type == "Gemm" and len(user.inputs) > 2 else None
    if bias is not None:
        made.outputs[0].name = f"{old.name}_product"
        new.append(ir.Node("", "Add", [made.outputs[0], bias], name=f"{user.name}_bias"))
    for fresh in new:
        fresh.outputs[0].shape, fresh.outputs[0].type = old.shape, old.type
    graph.opset_imports.setdefault("com.microsoft", 1)
    ir.convenience.replace_nodes_and_values(graph, user, [user], new, [old], [new[-1].outputs[0]])
