"""LSTMs on grids found in every run: the kernel that runs, its arithmetic, and what stays float and says so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import penjing as pj
from penjing.network import Network, RemoveChannels
from penjing.recipe import Context, Plan
from penjing.runtimes import get_runtime
from penjing.tensors.recurrence import lstm_by_steps

X = torch.randn(6, 9, 10, generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    """An LSTM that starts from states it is given, if any, and gives all it has."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10, 16, **more)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.lstm(x, state or None)
        return y, h, c


class Titles(nn.Module):
    """Two LSTMs, a convolution before and a GRU behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(10, 10, 3, padding=1)
        self.one, self.two = nn.LSTM(10, 16, batch_first=True), nn.LSTM(16, 8, batch_first=True)
        self.gru, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.gru(self.two(self.one(x)[0])[0])[0][:, -1])


def captured(model: nn.Module, *inputs: Tensor) -> Network:
    return pj.capture(model.eval(), inputs or (X[:2],))


def planned(network: Network, **fields: Any) -> tuple[Plan, Network]:
    plan = pj.Quantize(activations="dynamic", **fields).plan(network, Context(original=network))
    return plan, network.apply(plan.edits)


def on_grid(x: Tensor) -> Tensor:
    """The uint8 grid of all values and zero."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (np.float32(high - low) / np.float32(255)) or np.float32(1)
    return torch.fake_quantize_per_tensor_affine(x, float(scale), int(np.rint(-low / scale)), 0, 255)


class Kernel(fx.Interpreter):
    """The graph with what the kernel does inside: hidden states and inner inputs on grids of their own."""

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not torch.ops.aten.lstm.input:
            return super().run_node(n)
        x, state, weights, biases, layers, _, _, both, first = self.fetch_args_kwargs_from_env(n)[0]
        settings = {"biases": biases, "layers": layers, "bidirectional": both, "batch_first": first}
        return lstm_by_steps(x, state, weights, **settings, read=on_grid)


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ({}, {}),
        ({"num_layers": 3, "bias": False}, {}),
        ({"batch_first": True, "num_layers": 2, "bidirectional": True}, {}),
        ({"batch_first": True, "bidirectional": True}, {"granularity": "tensor", "symmetric": False}),
        ({"batch_first": True}, {"weights": "int4"}),
    ],
)
def test_the_kernel_computes_what_is_said_of_it(more: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = captured(Recurrent(**more), X)
    quantized = planned(network, **fields)[1]
    engine = get_runtime("onnxruntime")
    artifact = engine.export(quantized, tmp_path / "net.onnx", samples=(X,))
    # With more threads each has a part of the samples, and that part has a grid of its own.
    session = engine.load(artifact.path, pj.Target(runtime="onnxruntime", threads=1))
    ran = Counter(e.op for e in session.executed())
    assert ran["DynamicQuantizeLSTM"] == more.get("num_layers", 1) and not ran["LSTM"], ran
    assert not ran["DequantizeLinear"] and not ran["DynamicQuantizeLinear"], ran
    assert session.precision == "int8"
    with torch.no_grad():
        wanted, plain = Kernel(quantized.graph_module).run(X), quantized.run(X)
    for got, want, own in zip(session.run({"x": X.numpy()}), wanted, plain, strict=True):
        given = torch.from_numpy(got)
        assert distance(given, want) < 1e-5 * float(want.std())
        assert distance(given, own) > 1e-4 * float(want.std()), "the hidden states are rounded"


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def test_given_states_start_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    network = pj.capture(Recurrent().eval(), (X[:, :2], *states))
    engine = get_runtime("onnxruntime")
    artifact = engine.export(planned(network)[1], tmp_path / "net.onnx")
    assert any(e.op == "DynamicQuantizeLSTM" for e in engine.load(artifact.path).executed())
    assert artifact.parity.rms_rel < 0.01


def test_full_range_weights_are_written_for_kernels_that_saturate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = captured(Recurrent())
    kinds = {}
    for headroom in (True, False):
        path = tmp_path / f"{headroom}.onnx"
        get_runtime("onnxruntime").export(planned(network, headroom=headroom)[1], path)
        held = {i.name: i for i in onnx.load(path).graph.initializer}
        weights = [i for name, i in held.items() if name.endswith(("weight_input", "weight_hidden"))]
        kinds[headroom] = {i.data_type for i in weights}
        assert [tuple(i.dims) for i in weights] == [(1, 10, 64), (1, 16, 64)]
    assert kinds == {True: {onnx.TensorProto.INT8}, False: {onnx.TensorProto.UINT8}}


def test_reasons_say_what_stays_float() -> None:
    network = captured(Titles())
    plan, quantized = planned(network)
    told = {r.layer: (r.choice, r.why) for r in plan.reasons}
    for name in ("one.weight_ih_l0", "one.weight_hh_l0", "two.weight_ih_l0", "two.weight_hh_l0", "head"):
        assert told[name][0] == "int8 weights per channel, dynamic inputs"
    for name in ("conv", "gru.weight_ih_l0"):
        assert told[name][0] == "int8 weights per channel"
        assert "inputs stay float, computed in float" in told[name][1]
    assert len(grids_found(quantized)) == 3


def grids_found(network: Network) -> list[fx.Node]:
    return [n for n in network.graph_module.graph.nodes if "choose_qparams" in str(n.target)]


@pytest.mark.parametrize(
    "fields",
    [
        {"symmetric": False},
        {"weights": "int16"},
        {"granularity": "group:4"},
        {"levels": "power-of-two", "weights": "int4"},
        {"weights": {"*weight_hh*": "int8"}},
        {"where": "*weight_ih*"},
    ],
)
def test_what_the_kernel_cannot_multiply_keeps_float_inputs(fields: dict[str, Any], tmp_path: Path) -> None:
    network = captured(Recurrent())
    plan, quantized = planned(network, **fields)
    assert not grids_found(quantized)
    assert all("dynamic" not in r.choice for r in plan.reasons) and len(plan.reasons) == 2
    assert any("computed in float" in r.why for r in plan.reasons)
    artifact = get_runtime("onnxruntime").export(quantized, tmp_path / "net.onnx")
    assert artifact.parity.max_rel < 1e-5


def test_one_of_two(tmp_path: Path) -> None:
    network = captured(Titles())
    quantized = planned(network, where="one.*")[1]
    quantized = quantized.apply(pj.Quantize(activations=None).plan(quantized, Context(original=network)).edits)
    engine = get_runtime("onnxruntime")
    ran = Counter(e.op for e in engine.load(engine.export(quantized, tmp_path / "net.onnx").path).executed())
    assert ran["DynamicQuantizeLSTM"] == ran["LSTM"] == ran["GRU"] == 1


def test_other_runtimes_widen_and_say_so(tmp_path: Path) -> None:
    quantized = planned(captured(Titles()))[1]
    artifact = get_runtime("openvino").export(quantized, tmp_path / "net.onnx", samples=(X,))
    assert [w.kind for w in artifact.widened] == ["dynamic"] * 3
    assert not any(n.domain == "com.microsoft" for n in onnx.load(artifact.path).graph.node)
    assert get_runtime("torch").export(quantized, tmp_path / "net.pt2").parity.max_abs < 1e-6


def test_kept_packed_and_pruned_further(tmp_path: Path) -> None:
    network = captured(Titles())
    quantized = planned(network)[1]
    pj.pack(quantized, tmp_path / "net.penjing")
    for again in (Network.load(quantized.save(tmp_path / "net.safetensors")), pj.unpack(tmp_path / "net.penjing")):
        torch.testing.assert_close(again.run(X), quantized.run(X), rtol=0, atol=0)
    smaller = quantized.apply([RemoveChannels(parameter="one.weight_hh_l0", dim=1, indices=(1, 5))])
    assert smaller.tensors()["one.weight_hh_l0"].shape == (56, 14)
    artifact = get_runtime("onnxruntime").export(smaller, tmp_path / "net.onnx", samples=(X,))
    assert sum(e.op == "DynamicQuantizeLSTM" for e in get_runtime("onnxruntime").load(artifact.path).executed()) == 2


def test_the_gate_knows_what_rounded_hidden_states_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Recurrent(num_layers=2, batch_first=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(8 if "weight_hh" in name else 1)  # what is rounded in a step comes back in all that follow
    quantized = planned(captured(model))[1]
    artifact = get_runtime("onnxruntime").export(quantized, tmp_path / "net.onnx", samples=(X,))
    assert 0.01 < artifact.parity.rms_rel < artifact.parity.tolerance < 0.1
