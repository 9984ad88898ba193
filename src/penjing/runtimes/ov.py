"""OpenVINO on the CPU, from .onnx files.

Dialect: uint8 activations (int8 ones with a zero point do not compile), int8 weights (uint8 ones run in float). On CPUs
without VNNI its int8 kernels overflow with weights of full range; no other way of writing the same grid avoids that, so
there the weights must be chosen safely (the Quantize step does) or the parity gate refuses.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from penjing.errors import ExportError
from penjing.runtimes import onnx_graph, onnx_skeleton
from penjing.runtimes.base import Array, Executed, Port, Runtime, Session, Skeleton, Target, Widened, register
from penjing.runtimes.onnx_passes import Dialect
from penjing.runtimes.onnx_products import in_float

if TYPE_CHECKING:
    from penjing.network import Network

_PRODUCTS = frozenset(
    "Convolution GroupConvolution Deconvolution FullyConnected MatMul RNNSeq RNNCell ScaledDotProductAttention".split()
)
_NO_WORK = frozenset("Input Output Const Parameter Result Constant".split())
_OFTEN, _KEPT = 3, 4
_Shapes = tuple[tuple[int, ...], ...]
_CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}


def _never(codes: Array, depthwise: bool) -> bool:
    return False


DIALECT = Dialect(
    unsigned_activations=True,
    unsigned_weights=_never,
    integer_bias=False,
    carried_grids=False,
    products_of_bits=False,
    clipped_codes=False,
    dynamic_products=False,
)


class OpenVinoSession(Session):
    """A model compiled by OpenVINO for latency with one stream.

    A model with free dimensions runs 7 to 25 % slower than the same one compiled for the very shapes it gets. So shapes
    that come back are compiled for: at their third run, for at most four different ones.
    """

    def __init__(self, model: Any, core: Any, target: Target) -> None:
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Pinned threads wait for whoever else runs on their core; sessions side by side all pin to the same ones.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_NUM_THREADS": target.thread_count,
        }
        if target.precision is not None:
            self._settings["INFERENCE_PRECISION_HINT"] = target.precision
        if target.precision == "f32":
            # By itself it puts the inputs of products with stored weights on grids of 8 bits, anew in every run.
            self._settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        self._model, self._core = model, core
        self._compiled = core.compile_model(model, "CPU", self._settings)
        self._request: Any = self._compiled.create_infer_request()
        ports = [Port(_name(i), _shape(i.get_partial_shape()), i.get_element_type().to_dtype()) for i in model.inputs]
        super().__init__(target, ports, [_name(o) for o in model.outputs])
        self._is_free = any(None in p.shape for p in ports)
        self._runs: Counter[_Shapes] = Counter()
        self._fixed: dict[_Shapes, Any] = {}
        self._executed: list[Executed] | None = None

    def _run(self, inputs: Mapping[str, Array]) -> list[Array]:
        request = self._request_for(inputs) if self._is_free else self._request
        results = request.infer({p.name: inputs[p.name] for p in self.ports})
        return [results[i] for i in range(len(self.output_names))]

    def _request_for(self, inputs: Mapping[str, Array]) -> Any:
        shapes = tuple(inputs[p.name].shape for p in self.ports)
        request = self._fixed.get(shapes)
        if request is not None:
            return request
        self._runs[shapes] += 1
        if self._runs[shapes] == _OFTEN and len(self._fixed) < _KEPT:
            self._request = None  # released first: both together would be the peak of memory
            fixed = self._model.clone()
            fixed.reshape({name: list(shape) for name, shape in zip(self.input_names, shapes, strict=True)})
            self._compiled = self._core.compile_model(fixed, "CPU", self._settings)
            self._fixed[shapes] = self._compiled.create_infer_request()
            return self._fixed[shapes]
        if self._request is None:
            self._compiled = self._core.compile_model(self._model, "CPU", self._settings)
            self._request = self._compiled.create_infer_request()
        return self._request

    @property
    def precision(self) -> str:  # type: ignore[override]
        """ "int8" if any product runs in integers, else what most products run in."""
        kinds = [e.precision for e in self.executed() if e.op in _PRODUCTS] or ["f32"]
        return "int8" if "int8" in kinds else max(sorted(set(kinds)), key=kinds.count)

    def executed(self) -> list[Executed]:
        """The nodes of the executed graph with the arithmetic of the primitive that was chosen."""
        if self._executed is None:
            rows = []
            for node in self._compiled.get_runtime_model().get_ops():
                info = {k: str(v.astype(str)) for k, v in node.get_rt_info().items() if k in _WANTED}
                kind = info.get("layerType", node.get_type_name())
                if kind not in _NO_WORK:
                    origins = tuple(info.get("originalLayersNames", "").split(","))
                    name = node.get_friendly_name()
                    rows.append(Executed(op=kind, name=name, precision=_precision(info), origins=origins))
            self._executed = rows
        return list(self._executed)


_WANTED = ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")


def _precision(info: Mapping[str, str]) -> str:
    """The primitive's own suffix tells the arithmetic: a u8 input may still be widened and multiplied in floats."""
    last = info.get("primitiveType", "").rpartition("_")[2].lower()
    if last not in ("i8", "u8", "f32", "bf16", "f16"):
        last = info.get("runtimePrecision", "f32").lower()
    return "int8" if last in ("i8", "u8") else last


def _name(port: Any) -> str:
    names = sorted(port.get_names())
    return names[0] if names else str(port.get_node().get_friendly_name())


def _shape(shape: Any) -> tuple[int | None, ...]:
    return tuple(d.get_length() if d.is_static else None for d in shape)


@register
class OpenVino(Runtime):
    """`.onnx` files in OpenVINO's CPU plugin."""

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".onnx"
    requires: ClassVar[str | None] = "openvino"
    extra: ClassVar[str | None] = "openvino"

    @classmethod
    def need(cls) -> Any:
        """The package, without its telemetry: importing openvino would send usage statistics over the network."""
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        return super().need()

    def _write(self, network: Network, path: Path) -> tuple[Widened, ...]:
        return onnx_graph.write(network, path, DIALECT)

    def skeleton(self, network: Network, arrays: Mapping[str, Array], held: str) -> Skeleton:
        return onnx_skeleton.skeleton(onnx_graph.with_own_tensors(network, DIALECT), arrays, held)

    def _open(self, path: Path, target: Target) -> Session:
        return self._compile(str(path), target, path)

    def _compile(self, source: str | bytes, target: Target, path: Path) -> OpenVinoSession:
        core = self.need().Core()
        try:
            return OpenVinoSession(core.read_model(source), core, target)
        except RuntimeError as error:
            refused = re.search(r"Conversion is failed for: (.+)", str(error))
            if refused:
                raise ExportError(
                    f"openvino has no translation for these operators of the file: {refused[1]}",
                    hint="other runtimes may run this network: onnxruntime, torch",
                ) from error
            raise self._damaged(path, error) from error

    def float_precisions(self) -> tuple[str, ...]:
        able = self.need().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return tuple(p for p, word in _CAPABILITIES.items() if p == "f32" or word in able)

    def in_float(self, network: Network, path: Path, session: Session) -> dict[str, str]:
        return in_float(path, session, network.code_kinds())

    def trace(self, network: Network) -> torch.export.ExportedProgram:
        return onnx_graph.decomposed(network)

    def intermediates(self, path: Path, names: Sequence[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        model, found = onnx_graph.with_inner_outputs(path, names)
        session = self._compile(model, Target(runtime=self.name, precision="f32"), path)
        return {n: v for n, v in zip(session.output_names, session.run(inputs), strict=True) if n in found}
