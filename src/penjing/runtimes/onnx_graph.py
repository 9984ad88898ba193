"""Network → ONNX model (onnx_ir), common to every runtime that reads ONNX; and looking into ONNX files.

The exporter of torch does the translation. The passes of `onnx_passes` then bring it into the form that runtimes fuse;
what differs between runtimes (types of grids) is chosen by a Dialect.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from penjing.errors import ExportError, InputError
from penjing.network import integers
from penjing.runtimes import onnx_codebooks, onnx_passes
from penjing.runtimes.base import Widened
from penjing.runtimes.onnx_activations import translations
from penjing.runtimes.onnx_passes import Dialect
from penjing.runtimes.onnx_recurrent import marked
from penjing.runtimes.onnx_weights import Stored
from penjing.runtimes.trace import program, quiet, refuse_other_precisions, tensor_names

if TYPE_CHECKING:
    from penjing.network import Network

#: 21 is the first with 4-bit types and blocked DequantizeLinear; both runtimes read it.
OPSET = 21
_MERGED = ("aten.batch_norm", "aten._native_batch_norm", "aten.lstm", "aten.gru", "aten.rnn")  # with their weights
_LIMIT = 2**31 - 2**20  # bytes of one protobuf message


def write(network: Network, path: Path, dialect: Dialect) -> tuple[Widened, ...]:
    """Writes the network as one .onnx file in a runtime's dialect; returns what had to be widened."""
    import onnx_ir as ir

    model, widened = _in_dialect(network, dialect, _translated(network))
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return widened


def with_own_tensors(network: Network, dialect: Dialect) -> Any:
    """The model that `write` writes, but with the network's own tensors in it as far as can be."""
    refuse_other_precisions(network)
    return _in_dialect(network, dialect, _translated(network, own_tensors=True))[0]


def _in_dialect(network: Network, dialect: Dialect, translation: _Translation) -> tuple[Any, tuple[Widened, ...]]:
    import onnx
    import onnx_ir as ir

    plain, traced = translation
    model = ir.from_proto(onnx.load_model_from_string(plain))
    looked_up = onnx_codebooks.look_up(model.graph, onnx_codebooks.shared(network, traced))
    widened = (*looked_up, *onnx_passes.run(model, dialect, _stored(network, traced), marked(traced)))
    _name_dimensions(model, network)
    return model, widened


def _stored(network: Network, traced: torch.export.ExportedProgram) -> dict[str, Stored]:
    """The network's stored weights by the name of the value that dequantizing them gives in the file."""
    tensors, kinds, names = network.tensors(), network.code_kinds(), tensor_names(traced)
    found = {}
    for node in traced.graph.nodes:
        source = integers.codes_read(node, ("placeholder",)) if node.op == "call_function" else None
        name = None if source is None else names.get(str(source.target))
        if name is None or name not in kinds:
            continue
        group = int(node.meta["val"].shape[-1]) if node.args[0] is not source else 0
        found[node.name] = Stored(name, kinds[name], tuple(tensors[name].shape), group)
    return found


def decomposed(network: Network) -> torch.export.ExportedProgram:
    """The program as the exporter translates it; its node names are the names of the file's values."""
    return _translated(network)[1]


_Translation = tuple[bytes, torch.export.ExportedProgram]
#: The network translated last: exporting it for a second runtime need not wait again.
_LAST: weakref.WeakKeyDictionary[Network, _Translation] = weakref.WeakKeyDictionary()
_REMEMBERED = 2**28  # bytes; larger ones are translated again


def _translated(network: Network, *, own_tensors: bool = False) -> _Translation:
    """The network as torch's exporter writes it: an ONNX model before any dialect, and the program it was made of.

    own_tensors: without computing others from them, as of a batch norm's and a product's.
    Raises ExportError naming what has no translation, or for a network too large for one file.
    """
    traced = program(network)
    own_tensors = own_tensors and any(str(n.target).startswith(_MERGED) for n in traced.graph.nodes)
    held = None if own_tensors else _LAST.get(network)
    if held is not None:
        return held
    try:
        with quiet():
            made = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                optimize=not own_tensors,
                custom_translation_table=translations(),
                opset_version=OPSET,
                input_names=[i.name for i in network.inputs],
                output_names=list(network.output_names),
            )
            if own_tensors and made is not None:
                _optimize_around_weights(made)
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(
            f"{network.name} cannot be written as ONNX: {_reason(error)}",
            hint="the runtime 'torch' runs every captured network",
        ) from error
    if made is None or made.exported_program is None:
        raise ExportError(f"{network.name} cannot be written as ONNX: torch's exporter gave nothing back")
    size = sum(v.const_value.nbytes for v in made.model.graph.initializers.values() if v.const_value is not None)
    if size > _LIMIT:
        raise ExportError(
            f"{network.name} is larger than the 2 GB that one .onnx file can hold",
            hint="quantize its weights first, or export it for the runtime 'torch'",
        )
    result = made.model_proto.SerializeToString(), made.exported_program
    if own_tensors:
        return result
    _LAST.clear()
    if size < _REMEMBERED:
        _LAST[network] = result
    return result


def _optimize_around_weights(made: Any) -> None:
    # onnxscript merges a norm, or puts an LSTM's gates in order, only where no input of the model could change them.
    graph = made.model.graph
    places = {"BatchNormalization": 1, "Slice": 0}
    read = [n.inputs[places[n.op_type]] for n in graph if n.op_type in places]
    given = list(dict.fromkeys(v for v in read if v.is_initializer()))
    graph.inputs.extend(given)
    made.optimize()
    graph = made.model.graph
    for value in given:
        graph.inputs.remove(value)


def read(path: Path) -> Any:
    """An onnx.ModelProto; raises InputError for a file that is not one."""
    import onnx

    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, without importing protobuf for it
        raise InputError(
            f"{path.name!r} is not an ONNX file", hint="the file is damaged or not one of its kind"
        ) from error
    if not model.graph.node and not model.graph.output:
        raise InputError(f"{path.name!r} is not an ONNX file: it holds no graph", hint="the file is damaged")
    return model


def with_inner_outputs(path: Path, names: Iterable[str]) -> tuple[bytes, list[str]]:
    """The model with those of the named values that it has as further outputs, and their names.

    Between integer layers only what leaves a grid (DequantizeLinear) is taken: looking at what lies inside a fused
    layer would keep the runtime from fusing it, and the fault would not show.
    """
    import onnx

    model = read(path)
    graph = model.graph
    makers = {o: node for node in graph.node for o in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    there = {o.name for o in graph.output}
    found = []
    for name in names:
        maker = makers.get(name)
        if maker is None or name in there:
            continue
        rounded = any(u.op_type == "QuantizeLinear" for u in users.get(name, []))
        eaten = maker.op_type not in ("DequantizeLinear", "QuantizeLinear") and rounded
        inside = any(u.op_type in ("Relu", "Clip", "Add") for u in users.get(name, [])) and any(
            (m := makers.get(i)) is not None and m.op_type == "DequantizeLinear" for i in maker.input
        )
        if eaten or inside or maker.op_type == "QuantizeLinear":
            continue
        graph.output.append(onnx.ValueInfoProto(name=name))
        found.append(name)
    return model.SerializeToString(), found


def _name_dimensions(model: Any, network: Network) -> None:
    """Gives free dimensions the network's names for them, in inputs and outputs alike."""
    import onnx_ir as ir

    named: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, network.inputs, strict=True):
        for dimension, name in spec.dynamic.items():
            now = value.shape[dimension]
            if isinstance(now, ir.SymbolicDim) and now.value is not None:
                named.setdefault(now.value, name)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        sizes = [
            ir.SymbolicDim(named.get(d.value) if d.value else None) if isinstance(d, ir.SymbolicDim) else d
            for d in value.shape
        ]
        value.shape = ir.Shape(sizes)  # a new one: the shape that the exporter left may be frozen


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    for line in str(cause).splitlines():
        if line.strip():
            return line.strip().removesuffix(" See the stack trace for more information.")[:300]
    return type(cause).__name__
