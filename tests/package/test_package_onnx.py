"""Packages that hold an ONNX graph: a client makes the file of a runtime without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import penjing as pj
from penjing import package
from penjing.errors import PackageError, TargetError
from penjing.network import Network
from penjing.package import onnx_model
from penjing.runtimes import RUNTIMES
from penjing.runtimes.onnx_skeleton import skeleton


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 24)
        self.lstm = nn.LSTM(24, 32, batch_first=True)
        self.out = nn.Linear(32, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.table(x))[0])


def images() -> Network:
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 5))
    return captured(nn.Sequential(*layers), torch.randn(2, 3, 8, 8))


def wide() -> Network:
    return captured(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)), torch.randn(2, 256))


def words() -> Network:
    return captured(Recurrent(), torch.randint(0, 20, (2, 7)))


def captured(module: nn.Module, inputs: torch.Tensor) -> Network:
    torch.manual_seed(0)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):  # as after a training: merging it changes the weights
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 2)
    return pj.capture(module.eval(), inputs=(inputs,), name="net")


STEPS: dict[str, tuple[Callable[[], Network], Any]] = {
    "float, norms": (images, None),
    "int8": (images, pj.Quantize(weights="int8", activations="int8")),
    "int4 weights": (images, pj.Quantize(weights="int4", activations="int8")),
    "codes": (images, pj.CodeWeights(rate=0.05)),
    "float products": (wide, None),
    "4-bit products": (wide, pj.Quantize(weights="int4", activations=None, granularity="group:64")),
    "tables": (wide, pj.ShareWeights(codes=16)),
    "float LSTM": (words, None),
    "integer LSTM": (words, pj.Quantize(activations="dynamic")),
}


def network(name: str) -> Network:
    build, step = STEPS[name]
    net = build()
    return net if step is None else pj.compress(net, pj.Recipe(step), data=[net.example(8)], task=None).network


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", STEPS)
def test_a_client_runs_the_network_and_the_package_hardly_grows(name: str, runtime: str, tmp_path: Path) -> None:
    net = network(name)
    plain = pj.pack(net, tmp_path / "plain.penjing")
    size = pj.pack(net, tmp_path / "net.penjing", target=runtime)
    (tmp_path / "net.onnx").write_bytes(onnx_model.load(tmp_path / "net.penjing"))
    session = RUNTIMES.get(runtime).load(tmp_path / "net.onnx", f"{runtime}:precision=f32")
    inputs = {name: t.numpy() for name, t in net.bind(net.example(4)).items()}
    for found, expected in zip(session.run(inputs), net.run(net.example(4)), strict=True):
        error = np.linalg.norm(found - expected.detach().numpy()) / np.linalg.norm(expected.detach().numpy())
        assert error < 0.02
    arrays = package.read(tmp_path / "net.penjing")[1]
    held = sum(a.nbytes for n, a in arrays.items() if n.startswith(onnx_model.HELD))
    assert held < 0.1 * sum(a.nbytes for a in arrays.values())  # no weight is there twice
    assert size - plain < 2000
    again = pj.unpack(tmp_path / "net.penjing")
    assert again.state()[0] == net.state()[0]
    assert all(torch.equal(again.tensors()[n], t) for n, t in net.tensors().items())


def test_nothing_but_three_packages_is_needed(tmp_path: Path) -> None:
    pj.pack(network("int8"), tmp_path / "net", target="onnxruntime", layout="directory")
    blocked = f"""
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {{*sys.stdlib_module_names, "penjing", "numpy", "constriction", "zstandard"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Only())
sys.argv = ["penjing.package", *sys.argv[1:]]
sys.path.insert(0, {str(Path(pj.__file__).parents[1])!r})
import runpy
runpy.run_module("penjing.package", run_name="__main__")
"""
    command = [sys.executable, "-I", "-c", blocked, str(tmp_path / "net"), str(tmp_path / "net.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "net.onnx").read_bytes() == onnx_model.load(tmp_path / "net")
    command[-1] = str(tmp_path / "net.txt")
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "net.txt must end in .onnx" in done.stderr and not Path(command[-1]).exists()
    command[-2:] = [str(tmp_path / "nothing"), str(tmp_path / "net.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_it_runs_from_the_first_layer_on_and_the_rest_is_exact(tmp_path: Path) -> None:
    net = network("float, norms")
    pj.pack(net, tmp_path / "net.penjing", target="onnxruntime", layers=2)
    pj.pack(net, tmp_path / "whole.penjing", target="onnxruntime")
    coarse, exact = (onnx_model.load(tmp_path / "net.penjing", layers=n) for n in (1, 2))
    assert coarse != exact == onnx_model.load(tmp_path / "whole.penjing")
    (tmp_path / "coarse.onnx").write_bytes(coarse)
    session = RUNTIMES.get("onnxruntime").load(tmp_path / "coarse.onnx")
    found = session.run({session.ports[0].name: net.example(4)[0].numpy()})[0]
    expected = net.run(net.example(4))[0].detach().numpy()
    assert 0 < np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def everything() -> onnx.ModelProto:
    """A model with attributes of all kinds, a branch that reads values from outside, free dimensions."""
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["x", "w"], [f"{kind}_out"])],
            kind,
            [],
            [helper.make_tensor_value_info(f"{kind}_out", TensorProto.FLOAT, ["batch", 3])],
        )
        for kind in ("Add", "Mul")
    ]
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Constant", [], ["zero"], value=helper.make_tensor("", TensorProto.FLOAT, [], [-1.5])),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["chosen"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("LeakyRelu", ["chosen"], ["bent"], alpha=0.1),
        helper.make_node("Clip", ["bent", "", "high"], ["clipped"]),
        helper.make_node("Transpose", ["clipped"], ["turned"], perm=[1, 0]),
        helper.make_node("Constant", [], ["factors"], value_floats=[0.5, float("inf"), -1e-30]),
        helper.make_node("Constant", [], ["first"], value_ints=[-(2**63), 2**63 - 1, 0]),
        helper.make_node("Constant", [], ["said"], value_strings=["a", "盆景"]),
        helper.make_node("Gelu", ["turned"], ["y"], approximate="tanh"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, None]),
            helper.make_tensor_value_info("factors", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("first", TensorProto.INT64, [3]),
            helper.make_tensor_value_info("said", TensorProto.STRING, [2]),
        ],
        [
            helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, -2.0, 3.0]),
            helper.make_tensor("high", TensorProto.FLOAT, [], [4.0]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_every_kind_of_attribute_survives() -> None:
    import onnxruntime

    model = everything()
    described, held = skeleton(ir.from_proto(model), {}, onnx_model.HELD)
    made = onnx.load_from_string(onnx_model.assemble(json.dumps({"onnx": json.loads(json.dumps(described))}), held))
    onnx.checker.check_model(made, full_check=True)
    for x in (np.ones((2, 3), np.float32), -np.ones((4, 3), np.float32)):
        ran = [onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": x}) for m in (model, made)]
        for found, expected in zip(*ran, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_weights_otherwise_laid_out_are_found() -> None:
    rng = np.random.default_rng(0)
    codes, table = rng.integers(-8, 8, (12, 20)).astype(np.int8), rng.integers(0, 16, (9, 11)).astype(np.uint8)
    scales, gates = rng.normal(size=(10, 8)).astype(np.float32), rng.integers(-128, 128, (32, 5)).astype(np.int8)
    import ml_dtypes

    wanted = {
        "shifted": (codes.astype(np.int16) + 128).astype(np.uint8),
        "turned": codes.T.copy(),
        "narrow": codes.astype(ml_dtypes.int4),
        "pairs": ((codes.reshape(-1)[::2] + 8) | (codes.reshape(-1)[1::2] + 8) << 4).astype(np.uint8),
        "indices": np.append(table.reshape(-1)[::2], 0)[:50].astype(np.uint8)
        | np.append(table.reshape(-1)[1::2], 0).astype(np.uint8) << 4,
        "groups": scales.reshape(5, 16).T.copy(),
        "gates": gates.reshape(4, 8, 5)[[0, 3, 1, 2]].reshape(32, 5).T[None].copy(),
    }
    initializers = [ir.tensor(a, name=n) for n, a in wanted.items()]
    values = [ir.Value(name=t.name, shape=t.shape, type=ir.TensorType(t.dtype), const_value=t) for t in initializers]
    graph = ir.Graph([], values[:1], nodes=[], initializers=values, opset_imports={"": 21})
    arrays = {"codes": codes, "table": table, "scales": scales, "gates": gates}
    described, held = skeleton(ir.Model(graph, ir_version=10), arrays, onnx_model.HELD)
    assert not held
    made = onnx.load_from_string(onnx_model.assemble(json.dumps({"onnx": described}), arrays))
    for found, (name, expected) in zip(made.graph.initializer, wanted.items(), strict=True):
        array = onnx.numpy_helper.to_array(found)
        assert array.shape == expected.shape and array.tobytes() == expected.tobytes(), name


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no graph": lambda d: d.pop("nodes"),
    "a node that is none": lambda d: d.update(nodes=[3]),
    "an unknown array": lambda d: d["tensors"].append(["t", 1, [2], "nothing"]),
    "another shape": lambda d: d["tensors"].append(["t", 1, [3], "a"]),
    "an absurd shape": lambda d: d["tensors"].append(["t", 1, [2**62, 2**62], "a"]),
    "an unknown type": lambda d: d["tensors"].append(["t", 99, [2], "a"]),
    "an unknown coding": lambda d: d["tensors"].append(["t", 1, [2], "a", "zip"]),
    "axes that are not there": lambda d: d["tensors"].append(["t", 1, [2], "a", [3, 1]]),
    "blocks that are not there": lambda d: d["tensors"].append(["t", 1, [2], "a", {"blocks": [7, 7]}]),
    "no base64": lambda d: d["tensors"].append(["t", 1, [2], None, "§"]),
    "an attribute of no kind": lambda d: d["nodes"].append(["Relu", ["x"], ["y"], {"a": {"b": 1}}]),
    "a number for a text": lambda d: d["nodes"].append([1, ["x"], ["y"]]),
    "lists without end": lambda d: d.update(inputs=[[[[]]]] * 3),
    "a bomb": lambda d: d["tensors"].extend([["t", 1, [2], "big"]] * 10),
    "no description": lambda d: None,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_hostile_graphs_are_refused(kind: str) -> None:
    described: dict[str, Any] = {
        "ir": 10,
        "opsets": [["", 21]],
        "inputs": [],
        "outputs": [],
        "tensors": [],
        "nodes": [],
    }
    DAMAGE[kind](described)
    arrays = {"a": np.zeros(2, np.float32), "big": np.zeros(2**20, np.float32)}
    with pytest.raises(PackageError, match="ONNX graph"):
        onnx_model.assemble(json.dumps({"onnx": 7 if kind == "no description" else described}), arrays)


def test_words_for_what_cannot_be(tmp_path: Path) -> None:
    net = images()
    with pytest.raises(TargetError, match="no graph for the runtime 'torch'"):
        pj.pack(net, tmp_path / "net.penjing", target="torch")
    assert not list(tmp_path.iterdir())
    pj.pack(net, tmp_path / "net.penjing")
    with pytest.raises(PackageError, match="holds no ONNX graph"):
        onnx_model.load(tmp_path / "net.penjing")
