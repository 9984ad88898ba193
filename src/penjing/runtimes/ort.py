"""ONNX Runtime on the CPU.

Dialect: uint8 activations; int8 weights where two products cannot overflow 16 bits (see `tensors.saturation`),
else uint8 with zero point 128. Measured on a CPU with AVX2 and no VNNI: int8 weights of full range give results that
are off by tens of steps; uint8 ones are exact and about 35 % slower; int8 ones of safe range are exact and fast.
Depthwise convolutions have a kernel of their own that does not overflow.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from penjing.runtimes import onnx_graph, onnx_skeleton
from penjing.runtimes.base import Array, Executed, Port, Runtime, Session, Skeleton, Target, Widened, register
from penjing.runtimes.onnx_passes import Dialect
from penjing.runtimes.onnx_products import in_float
from penjing.tensors.saturation import may_saturate

if TYPE_CHECKING:
    from penjing.network import Network

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_INTEGER_PRODUCTS = frozenset(
    "QLinearConv QLinearMatMul QGemm ConvInteger ConvIntegerToFloat MatMulInteger MatMulIntegerToFloat "
    "DynamicQuantizeMatMul DynamicQuantizeLSTM QAttention".split()
)
_FLOAT_OUTPUTS = frozenset(
    "ConvIntegerToFloat MatMulIntegerToFloat DynamicQuantizeMatMul DynamicQuantizeLSTM MatMulNBits".split()
)
_MOVES = frozenset(
    "Clip MaxPool NhwcMaxPool Reshape Transpose Concat Gather Squeeze Unsqueeze Flatten Slice Pad Identity Resize "
    "Split".split()
)


def _unsigned(codes: Array, depthwise: bool) -> bool:
    return not depthwise and may_saturate(torch.from_numpy(np.array(codes)), 0)


DIALECT = Dialect(
    unsigned_activations=True,
    unsigned_weights=_unsigned,
    integer_bias=True,
    carried_grids=True,
    products_of_bits=True,
    clipped_codes=True,
    dynamic_products=True,
)


class OrtSession(Session):
    """A model in ONNX Runtime."""

    def __init__(self, source: Path | bytes, target: Target) -> None:
        self._source = source
        self._session = _session(source, target.thread_count)
        self._options = _silent()
        ports = [
            Port(i.name, _shape(i.shape), np.dtype(_TYPES.get(i.type, np.float32))) for i in self._session.get_inputs()
        ]
        super().__init__(target, ports, [o.name for o in self._session.get_outputs()])
        self._executed: list[Executed] | None = None

    def _run(self, inputs: Mapping[str, Array]) -> list[Array]:
        result: list[Array] = self._session.run(None, dict(inputs), self._options)
        return result

    @property
    def precision(self) -> str:  # type: ignore[override]
        """ "int8" if any product runs in integers, else "f32"."""
        return "int8" if any(e.op in _INTEGER_PRODUCTS for e in self.executed()) else "f32"

    def executed(self) -> list[Executed]:
        """The nodes of the graph that ONNX Runtime optimized for itself."""
        if self._executed is None:
            with tempfile.TemporaryDirectory() as folder:
                kept = Path(folder) / "optimized.onnx"
                _session(self._source, self.threads, optimized=kept)
                self._executed = _describe(onnx_graph.read(kept))
        return list(self._executed)


def _describe(model: Any) -> list[Executed]:
    codes = {i.name for i in model.graph.initializer if i.data_type in (2, 3)}
    rows = []
    for node in model.graph.node:
        kind = node.op_type
        integer = kind in _INTEGER_PRODUCTS or kind.startswith("QLinear")
        moved = kind in _MOVES and bool(node.input) and node.input[0] in codes
        if kind in ("QuantizeLinear", "DynamicQuantizeLinear") or moved or (integer and kind not in _FLOAT_OUTPUTS):
            codes.update(node.output[:1])
        rows.append(Executed(op=kind, name=node.name, precision="int8" if integer or moved else "f32"))
    return rows


def _session(source: Path | bytes, threads: int, optimized: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not _has_grids(source):
        # No activation is on a grid: widen the integer weights once at loading, not in every run.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    given = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def _silent() -> Any:
    """Options of a run that leave what fails to the exception, and off the user's screen."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


_QUANTIZE = b"\x0eQuantizeLinear"  # with its length: not the end of DynamicQuantizeLinear


def _has_grids(source: Path | bytes) -> bool:
    """Whether a model quantizes activations. The word is looked for in the bytes: parsing would double the memory."""
    if isinstance(source, bytes):
        return _QUANTIZE in source
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view.find(_QUANTIZE) >= 0


def _shape(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(d if isinstance(d, int) else None for d in shape)


@register
class OnnxRuntime(Runtime):
    """`.onnx` files in ONNX Runtime."""

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    requires: ClassVar[str | None] = "onnxruntime"
    extra: ClassVar[str | None] = "onnxruntime"

    def _write(self, network: Network, path: Path) -> tuple[Widened, ...]:
        return onnx_graph.write(network, path, DIALECT)

    def skeleton(self, network: Network, arrays: Mapping[str, Array], held: str) -> Skeleton:
        return onnx_skeleton.skeleton(onnx_graph.with_own_tensors(network, DIALECT), arrays, held)

    def _open(self, path: Path, target: Target) -> Session:
        try:
            return OrtSession(path, target)
        except Exception as error:  # onnxruntime's own exceptions share no base but Exception
            raise self._damaged(path, error) from error

    def in_float(self, network: Network, path: Path, session: Session) -> dict[str, str]:
        return in_float(path, session, network.code_kinds())

    def trace(self, network: Network) -> torch.export.ExportedProgram:
        return onnx_graph.decomposed(network)

    def intermediates(self, path: Path, names: Sequence[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        model, found = onnx_graph.with_inner_outputs(path, names)
        session = OrtSession(model, Target(runtime=self.name))
        return {n: v for n, v in zip(session.output_names, session.run(inputs), strict=True) if n in found}
