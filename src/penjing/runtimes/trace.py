"""A Network as a fresh `torch.export` program, which is what exporters start from."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from penjing.errors import ExportError

if TYPE_CHECKING:
    from penjing.network import Network

aten = torch.ops.aten
_quantized = torch.ops.quantized_decomposed
_FULL_RANGE = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767), torch.uint16: (0, 65535)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what torch and onnxscript say about their own affairs away from the user's screen."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._dynamo")]
    before = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, before, strict=True):
            log.setLevel(level)


def program(network: Network) -> torch.export.ExportedProgram:
    """The network in eval form as an ExportedProgram with flat inputs and outputs and the network's dynamic dimensions.

    Raises ExportError if torch cannot trace the graph again.
    """
    module = _explicit(network.graph_module)
    example = tuple(network.bind(network.example(2)).values())
    free = tuple({d: torch.export.Dim.AUTO for d in spec.dynamic} for spec in network.inputs)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, example, dynamic_shapes=free)
    except Exception as error:  # torch raises many kinds here
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"{network.name} cannot be traced again for export: {reason[:300]}") from error


def record(traced: torch.export.ExportedProgram, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """Every inner tensor of a program by node name."""
    names = tensor_names(traced)
    held = {**traced.state_dict, **traced.constants}
    given = iter(inputs)
    arguments = [
        held[names[n.name]] if n.name in names else next(given) for n in traced.graph.nodes if n.op == "placeholder"
    ]
    values: dict[str, np.ndarray[Any, Any]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, Tensor) and result.dtype != torch.bfloat16:
                values[n.name] = result.detach().numpy().copy()
            return result

    with torch.no_grad():
        Recorder(traced.graph_module).run(*arguments)
    return values


def tensor_names(traced: torch.export.ExportedProgram) -> dict[str, str]:
    """Placeholder name → the original name of the parameter, buffer or constant it stands for."""
    signature = traced.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def _explicit(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with what exporters would lose written out.

    QuantizeLinear knows only the range of its type: grids that use less get a clamp in front. A `contiguous` that the
    trace sees no need for would go, although the layout that made it needless (attention's own) is not that of what the
    exporter puts there: it becomes a copy.
    """

    def narrow(node: fx.Node) -> bool:
        if node.target is not _quantized.quantize_per_tensor.default:
            return False
        *_, low, high, dtype = node.args
        return (low, high) != _FULL_RANGE.get(dtype, (low, high))  # type: ignore[arg-type]

    if not any(narrow(n) or n.target is aten.contiguous.default for n in module.graph.nodes):
        return module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if narrow(node):
            value, scale, zero, low, high, _ = node.args
            with graph.inserting_before(node):
                limits = ((low - zero) * scale, (high - zero) * scale)
                node.update_arg(0, graph.call_function(aten.clamp.default, (value, *limits)))
        elif node.target is aten.contiguous.default:
            node.target, node.args = aten.clone.default, node.args[:1]
            node.kwargs = {"memory_format": torch.contiguous_format}
    return fx.GraphModule(module, graph)


def refuse_other_precisions(network: Network) -> None:
    """Raises ExportError for floats that are not float32."""
    held = {n: t.dtype for n, t in network.tensors().items() if t.is_floating_point() and t.dtype != torch.float32}
    for name, dtype in held.items():
        raise ExportError(
            f"{network.name} holds {name} in {str(dtype).removeprefix('torch.')}; files are made from float32",
            hint="capture(model.float(), ...); a runtime's own half precision is an option of the target",
        )
