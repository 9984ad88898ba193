"""What NNCF and ONNX Runtime's own quantizer make of a float .onnx file of a language model with 4 bits a weight. Runs
in an environment of its own.

    python narrow_peers.py FOLDER      # holds float.onnx and shown.npy, the token ids of blocks (blocks, tokens)

Writes a file a setting into the folder (.xml for OpenVINO, .onnx for ONNX Runtime) and peers.json: versions, and a row
a setting with seconds and how many weights the file holds of each type, or why it failed. Both are told to compress all
layers, embedding and head too.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

LEAST = 1000  #: elements from which a constant counts as a weight


def main() -> None:
    folder = Path(sys.argv[1])
    logging.disable(logging.CRITICAL)
    import nncf
    import onnxruntime
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    shown, rows = np.load(folder / "shown.npy"), []
    for what, name, make in (*with_nncf(folder, shown), *with_onnxruntime(folder, shown)):
        start = time.perf_counter()
        row: dict[str, Any] = {"what": what, "file": name}
        try:
            row["weights"] = make(folder / name)
        except Exception as error:  # a row too: what a peer cannot do on this network
            row = {"what": what, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        rows.append({**row, "seconds": round(time.perf_counter() - start, 1)})
    found = {"nncf": nncf.__version__, "onnxruntime": onnxruntime.__version__, "rows": rows}
    (folder / "peers.json").write_text(json.dumps(found, indent=1) + "\n")


Setting = tuple[str, str, Callable[[Path], dict[str, int]]]  # words, file, what writes it


def with_nncf(folder: Path, shown: np.ndarray) -> Iterator[Setting]:
    """`compress_weights`, alone and with what looks at samples: groups of 64 where rows divide into them (it gives the
    others 8 bits, and at 128 takes 64 where rows are of 64), and a scale a channel (-1)."""
    ways = ((), ("awq",), ("scale_estimation",), ("gptq",), ("awq", "scale_estimation"), ("awq", "gptq"))
    for group in (64, -1):
        for mode in ("int4_sym", "int4_asym"):
            for way in ways:
                words = ", ".join([f"nncf {mode}", "channel" if group < 0 else f"group {group}", *way])
                file = words.replace(", ", "-").replace(" ", "-") + ".xml"
                yield words, file, partial(_nncf, folder, shown, mode, group, way)


def _nncf(folder: Path, shown: np.ndarray, mode: str, group: int, way: tuple[str, ...], out: Path) -> dict[str, int]:
    import nncf
    import openvino

    model = _turned(openvino.Core().read_model(folder / "float.onnx"))
    adjust = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    looks: dict[str, Any] = dict.fromkeys(way, True)
    if way:
        looks |= {"dataset": nncf.Dataset([block[None] for block in shown]), "subset_size": len(shown)}
    kind = nncf.CompressWeightsMode(mode)
    made = nncf.compress_weights(
        model, mode=kind, group_size=group, all_layers=True, advanced_parameters=adjust, **looks
    )
    openvino.save_model(made, out, compress_to_fp16=False)
    held: Counter[str] = Counter()
    for node in made.get_ops():
        if node.get_type_name() == "Constant" and (n := int(np.prod(node.get_output_shape(0)))) >= LEAST:
            held[node.get_output_element_type(0).get_type_name()] += n
    return dict(held)


_ORT = ("rtn sym", "rtn asym", "hqq asym")


def _turned(model: Any) -> Any:
    """Matrices as (outputs, inputs), the only form that NNCF's GPTQ takes; the head then shares the embedding's."""
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and not node.get_attributes()["transpose_b"]:
            matrix = node.input_value(1)
            kind = matrix.get_node().get_type_name()
            if kind == "Constant":
                turned = opset13.constant(np.ascontiguousarray(matrix.get_node().data.T)).output(0)
            elif kind == "Transpose" and matrix.get_node().input_value(0).get_node().get_type_name() == "Constant":
                turned = matrix.get_node().input_value(0)
            else:
                continue
            made = opset13.matmul(node.input_value(0), turned, False, True, name=node.get_friendly_name())
            node.output(0).replace(made.output(0))
    return model


def with_onnxruntime(folder: Path, shown: np.ndarray) -> Iterator[Setting]:
    """`MatMulNBitsQuantizer` after its own pre-processing, which makes a matrix of the head's transposed embedding."""
    # Its GPTQ fails where a row is one group or does not divide into groups: with 64 and 128 everywhere here.
    for group, ways in ((128, _ORT), (64, _ORT), (32, ("gptq asym",))):
        for how in ways:
            words = f"ort {how}, group {group}"
            file = words.replace(", ", "-").replace(" ", "-") + ".onnx"
            yield words, file, partial(_onnxruntime, folder, shown, how, group)


def _onnxruntime(folder: Path, shown: np.ndarray, how: str, group: int, out: Path) -> dict[str, int]:
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    model = onnx.load(folder / "prepared.onnx")
    both: dict[str, Any] = {"op_types_to_quantize": ("MatMul", "Gather"), "quant_axes": (("MatMul", 0), ("Gather", 1))}
    nearest = nbits.DefaultWeightOnlyQuantConfig(group, how.endswith(" sym"), 1, **both)
    if how.startswith("hqq"):  # for products alone: the embedding is rounded to nearest
        config = nbits.HQQWeightOnlyQuantConfig(group, 4, op_types_to_quantize=("MatMul",))
        model = _quantized(model, group, config)
    elif how.startswith("gptq"):  # rows that do not divide into groups, and the embedding, to nearest
        uneven = {t.name for t in model.graph.initializer if t.dims and t.dims[0] % group}
        left = [n.name for n in model.graph.node if n.op_type == "MatMul" and uneven & set(n.input)]
        config = nbits.GPTQWeightOnlyQuantConfig(_reader(model.graph.input[0].name, shown), block_size=group)
        model = _quantized(model, group, config, left)
    model = _quantized(model, group, nearest)
    onnx.save(model, out)
    held: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        if (n := int(np.prod(tensor.dims))) >= LEAST:
            packed = tensor.data_type == onnx.TensorProto.UINT8
            held["u4" if packed else onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += n * (1 + packed)
    return dict(held)


def _quantized(model: Any, group: int, config: Any, left: list[str] | None = None) -> Any:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    made = nbits.MatMulNBitsQuantizer(model, block_size=group, nodes_to_exclude=left, algo_config=config)
    made.process()
    return made.model.model


def _reader(name: str, shown: np.ndarray) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(shown)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {name: row[None]}

    return Reader()


if __name__ == "__main__":
    main()
