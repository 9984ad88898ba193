"""Narrow grids on the real runtimes: 4 bits in the file, the same numbers out of it, and what the runtime executes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.data import Data
from penjing.evaluation import LatencySettings, words
from penjing.network import Network
from penjing.recipe import Context
from penjing.report import render_html, render_markdown
from penjing.runtimes import get_runtime

INT4 = onnx.TensorProto.INT4
TOKENS = torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(0))
X = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
QUICK = LatencySettings(warm_up=1, seconds=0.01, least_rounds=3, most_rounds=3)
RUNTIMES = ("onnxruntime", "openvino")


class Words(nn.Module):
    """An embedding that the output layer reads as well, two linear layers and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.lstm(x)[0] @ self.table.weight.t()


class Pixels(nn.Module):
    """Ordinary, depthwise and transposed convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8 * 256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.first(x).relu()).relu()
        return self.head(self.up(x).relu().flatten(1))


def captured(kind: type[nn.Module]) -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    inputs = X if kind is Pixels else TOKENS
    return pj.capture(kind().eval(), (inputs[:2],)), inputs


def quantized(kind: type[nn.Module], **fields: object) -> Network:
    network, inputs = captured(kind)
    plan = pj.Quantize(**fields).plan(network, Context(original=network, data=Data(inputs)))  # type: ignore[arg-type]
    return network.apply(plan.edits)


def held(path: Path) -> Counter[int]:
    """How many numbers of matrices the file holds in each type."""
    found: Counter[int] = Counter()
    for each in onnx.load(path).graph.initializer:
        if len(each.dims) > 1:
            found[each.data_type] += torch.Size(each.dims).numel()
    return found


@pytest.mark.parametrize("granularity", ["channel", "group:16", "group:20"])
@pytest.mark.parametrize("kind", [Words, Pixels])
def test_four_bits_in_the_file(tmp_path: Path, kind: type[nn.Module], granularity: str) -> None:
    network = quantized(kind, weights="int4", activations=None, granularity=granularity)
    for runtime in RUNTIMES:
        artifact = get_runtime(runtime).export(network, tmp_path / "net.onnx")
        assert artifact.parity.measure == "max_rel" and artifact.widened == ()
        types = held(artifact.path)
        assert types[INT4] >= network.parameter_count() - 352, "all but biases"
        assert types[onnx.TensorProto.INT8] == 0


class Tied(nn.Module):
    """A table that is looked up and multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(60, 64), nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.middle(self.table(tokens)).relu() @ self.table.weight.t()


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize(
    ("weights", "granularity"), [("int8", "channel"), ("int4", "channel"), ("int4", "group:16"), ("int8", "tensor")]
)
def test_tied_weights_are_stored_once(tmp_path: Path, weights: str, granularity: str, activations: str | None) -> None:
    network = quantized(Tied, weights=weights, granularity=granularity, activations=activations)
    for runtime in RUNTIMES:
        engine = get_runtime(runtime)
        artifact = engine.export(network, tmp_path / f"{runtime}.onnx", samples=TOKENS)
        counts = held(artifact.path)
        unlike = ("int4", "channel", "openvino"), ("int4", "group:16", "onnxruntime")  # beside integer layers
        twice = activations is not None and (weights, granularity, runtime) in unlike
        stored = sum(counts[t] for t in (INT4, onnx.TensorProto.INT8, onnx.TensorProto.UINT8))
        assert stored == (1 + twice) * 60 * 64 + 64 * 64
        if activations and granularity != "group:16":
            ran = [e for e in engine.load(artifact.path).executed() if e.precision == "int8"]
            assert sum("MatMul" in e.op or "Gemm" in e.op or "Connected" in e.op for e in ran) == 2


@pytest.mark.parametrize(
    ("weights", "granularity", "wanted"),
    [
        ("int16", "group:20", None),
        ("int8", "group:16", None),
        ("int6", "channel", "int8"),
        ("int3", "group:16", "int4"),
        ("ternary", "tensor", "int4"),
        ("binary", "channel", "int4"),
    ],
)
def test_other_widths_are_widened_and_say_so(
    tmp_path: Path, weights: str, granularity: str, wanted: str | None
) -> None:
    network = quantized(Words, weights=weights, activations=None, granularity=granularity)
    for runtime in RUNTIMES:
        artifact = get_runtime(runtime).export(network, tmp_path / "net.onnx")
        assert {(w.kind, w.stored) for w in artifact.widened} == ({(weights, wanted)} if wanted else set())
        assert {w.tensor for w in artifact.widened} == (set(network.code_kinds()) if wanted else set())
        assert artifact.row()["widened"] == [vars(w) for w in artifact.widened]


@pytest.mark.parametrize(
    ("weights", "granularity", "activations"),
    [
        ("int4", "channel", "int8"),
        ("int8", "group:16", "int8"),
        ("int4", "group:16", "int4"),
        ("ternary", "channel", "int4"),
    ],
)
def test_integer_kernels_run_narrow_weights(tmp_path: Path, weights: str, granularity: str, activations: str) -> None:
    network = quantized(Pixels, weights=weights, activations=activations, granularity=granularity, ranges="mse")
    for runtime in RUNTIMES:
        engine = get_runtime(runtime)
        artifact = engine.export(network, tmp_path / "net.onnx", samples=X)
        session = engine.load(artifact.path)
        integer = [e for e in session.executed() if "Conv" in e.op and e.precision == "int8"]
        assert len(integer) >= (2 if granularity == "channel" else 1), [e.op for e in session.executed()]
        if weights != "int8":
            assert held(artifact.path)[INT4] >= 8 * 256 * 10
            assert ("depthwise.weight", "int8") in {(w.tensor, w.stored) for w in artifact.widened} or weights != "int4"


@pytest.mark.parametrize(
    ("granularity", "symmetric", "gemm"),
    [("tensor", True, True), ("channel", False, False), ("group:128", True, False), ("group:96", False, True)],
)
def test_large_products_become_products_of_bits(tmp_path: Path, granularity: str, symmetric: bool, gemm: bool) -> None:
    torch.manual_seed(0)
    inputs = torch.rand(3, 384) if gemm else torch.rand(3, 2, 384)
    model = nn.Sequential(nn.Linear(384, 200), nn.GELU(), nn.Linear(200, 3))
    network = pj.capture(model.eval(), (inputs,))
    step = pj.Quantize(weights="int4", activations=None, granularity=granularity, symmetric=symmetric)
    network = network.apply(step.plan(network, Context(original=network)).edits)
    engine = get_runtime("onnxruntime")
    artifact = engine.export(network, tmp_path / "net.onnx")
    executed = Counter(e.op for e in engine.load(artifact.path).executed())
    assert executed["MatMulNBits"] == 1 and artifact.parity.max_rel < 1e-5
    assert artifact.bytes < 384 * 200 // 2 * 1.35 + 4000


def test_sixteen_bit_activations_are_computed_in_float_within_their_range(tmp_path: Path) -> None:
    network = quantized(Pixels, activations="int16")
    for runtime in RUNTIMES:
        artifact = get_runtime(runtime).export(network, tmp_path / "net.onnx", samples=3 * X)
        assert artifact.parity.max_rel < 1e-3, "values beyond the range are clipped there as well"
        assert {(w.kind, w.stored) for w in artifact.widened} == {("int16", "float32")}


def test_files_of_torch_hold_bytes_and_say_so(tmp_path: Path) -> None:
    artifact = get_runtime("torch").export(quantized(Words, weights="int4", activations=None), tmp_path / "net.pt2")
    assert {(w.kind, w.stored) for w in artifact.widened} == {("int4", "int8")}


def test_reports_and_deploy_say_what_was_widened(tmp_path: Path) -> None:
    network = quantized(Pixels, weights="int6", activations=None)
    bundle = pj.deploy(network, target="onnxruntime", out=tmp_path / "bundle")
    (row,) = bundle.artifacts
    said = "wider than in the network: 4 tensors of int6 as int8 (no int6 in the file): "
    assert words.widened(row["widened"]) == said + ", ".join(w["tensor"] for w in row["widened"])
    many = [{**w, "tensor": f"{w['tensor']}{i}"} for w in row["widened"] for i in range(2)]
    assert words.widened(many).endswith(" and 3 more")
    report = pj.evaluate(network, Data(X), target="onnxruntime", latency=QUICK, memory=False).to_dict()
    for text in (render_markdown(report), render_html(report)):
        assert "4 tensors of int6 as int8" in text


class Spelled(nn.Module):
    """Embedding, LSTM and a linear layer: one of them in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(20, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(tokens))[0])


def test_what_stays_float_beside_integer_layers_is_widened_once(tmp_path: Path) -> None:
    tokens = torch.randint(0, 20, (32, 5), generator=torch.Generator().manual_seed(0))
    network = pj.capture(Spelled().eval(), (tokens[:2],))
    plan = pj.Quantize().plan(network, Context(original=network, data=Data(tokens)))
    engine = get_runtime("onnxruntime")
    artifact = engine.export(network.apply(plan.edits), tmp_path / "net.onnx", samples=(tokens,))
    executed = Counter(e.op for e in engine.load(artifact.path).executed())
    assert executed["LSTM"] == executed["MatMulIntegerToFloat"] == 1
    assert not executed["DequantizeLinear"], "nothing is dequantized in every run"
    assert held(artifact.path)[onnx.TensorProto.INT8] >= 4
    told = {r.layer: r.why for r in plan.reasons}
    assert "lstm: stored as integers, computed in float" in told["lstm.weight_hh_l0"]
    assert "embedding: stored as integers, computed in float" in told["table"]


@pytest.mark.parametrize(("groups", "openvino"), [(1, 0), (2, 1)])
def test_transposed_convolutions_without_a_kernel_are_told(groups: int, openvino: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 4, 2, groups=groups), nn.Conv2d(4, 2, 1)
    )
    images = torch.rand(32, 3, 8, 8)
    network = pj.capture(model.eval(), (images[:2],))
    quantized = network.apply(pj.Quantize().plan(network, Context(original=network, data=Data(images))).edits)
    for runtime, count in (("onnxruntime", 1), ("openvino", openvino)):
        engine = get_runtime(runtime)
        artifact = engine.export(quantized, tmp_path / f"{runtime}.onnx", samples=(images,))
        assert [(w.tensor, w.stored) for w in artifact.widened] == [("2.weight", "float32")] * count
        ran = [e.precision for e in engine.load(artifact.path).executed() if e.op in ("ConvTranspose", "Deconvolution")]
        assert ran and (ran == ["int8"]) == (count == 0), "what is told is what runs"
