"""Networks go to every runtime and compute there what they compute here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import ExportError
from penjing.network.network import Network
from penjing.runtimes import RUNTIMES
from penjing.testing.oracles import captured


class Sequence(nn.Module):
    """Embedding, LSTM, bidirectional GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.gru = nn.GRU(24, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 7)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        y, (hidden, _) = self.lstm(self.embed(tokens))
        y, _ = self.gru(y)
        return {"logits": self.head(y[:, -1]), "state": hidden.transpose(0, 1)}


class Mobile(nn.Module):
    """Depthwise-separable convolutions with TensorFlow's padding: on one side only where the stride is 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pad = nn.functional.pad
        x = self.norm(self.stem(pad(x, (0, 1, 0, 1)))).clamp(0, 6)
        x = self.pointwise(self.depthwise(pad(x, (0, 1, 0, 1)))).clamp(0, 6)
        return self.head(x.mean((2, 3)))


def _mobilenet() -> Network:
    return pj.capture(Mobile(), (torch.rand(2, 3, 32, 32),))


def _vit() -> Network:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=5,
        initializer_range=0.2,
    )
    return pj.capture(transformers.ViTForImageClassification(config), (torch.rand(2, 3, 32, 32),))


def _bert() -> Network:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=99,
        num_labels=3,
        initializer_range=0.2,
    )
    ids = torch.randint(0, 99, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    return pj.capture(transformers.BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": mask})


MAKERS: dict[str, Callable[[], Network]] = {
    "sequence": lambda: pj.capture(Sequence(), (torch.randint(0, 20, (2, 9)),)),
    "mobilenet": _mobilenet,
    "vit": _vit,
    "bert": _bert,
}


@pytest.fixture(scope="module", params=["pictures", *MAKERS])
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    return request.getfixturevalue("pictures") if request.param == "pictures" else MAKERS[request.param]()


@pytest.mark.parametrize("runtime", RUNTIMES.names())
def test_file_computes_what_the_network_computes(network: Network, runtime: str, tmp_path: Path) -> None:
    engine = RUNTIMES.get(runtime)
    artifact = engine.export(network, tmp_path / f"net{engine.suffix}")
    assert artifact.sha256 == hashlib.sha256(artifact.path.read_bytes()).hexdigest()
    assert artifact.bytes == artifact.path.stat().st_size
    assert artifact.parity.max_rel <= artifact.parity.tolerance
    assert artifact.parity.n == 5  # two batches of different size
    session = engine.load(artifact.path, f"{runtime}:threads=1,precision=f32")
    assert session.input_names == tuple(i.name for i in network.inputs)
    assert session.output_names == network.output_names
    assert session.precision == "f32"
    assert session.threads == 1
    assert session.executed()
    for batch in (1, 7, 1, 1, 1, 7):  # repeated shapes take another way in OpenVINO
        flat = network.bind(network.example(batch, seed=batch))
        found = session.run({k: v.numpy() for k, v in flat.items()})
        for want, got in zip(network.run(flat), found, strict=True):
            assert got.dtype == want.numpy().dtype
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-6)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_layouts_that_the_trace_takes_for_granted(runtime: str, tmp_path: Path) -> None:
    """T5 makes its attention's output contiguous; the trace sees no need, the exporter's decomposition does."""
    engine = RUNTIMES.get(runtime)
    assert engine.export(captured("t5_encoder"), tmp_path / f"net{engine.suffix}").parity.max_rel < 1e-4


def test_what_openvino_cannot_translate_is_named(tmp_path: Path) -> None:
    """A pool wider than its picture, as EfficientNets of transformers have it on small pictures."""
    pool = pj.capture(nn.AvgPool2d(16, ceil_mode=True), inputs=(torch.rand(2, 3, 4, 4),), name="pool")
    with pytest.raises(pj.PenjingError, match="openvino has no translation for these operators .* AveragePool"):
        RUNTIMES.get("openvino").export(pool, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_padding_goes_into_the_convolution(tmp_path: Path) -> None:
    """Padding on one side, as transformers' MobileNets have it, is ONNX Conv's own padding."""
    path = tmp_path / "net.onnx"
    RUNTIMES.get("onnxruntime").export(_mobilenet(), path)
    model = onnx.load(path)
    assert "Pad" not in {n.op_type for n in model.graph.node}
    pads = {tuple(a.ints) for n in model.graph.node for a in n.attribute if a.name == "pads"}
    assert (0, 0, 1, 1) in pads


def test_file_tells_nothing_of_the_machine(pictures: Network, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    RUNTIMES.get("onnxruntime").export(pictures, path)
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert b"forward" not in content
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 16, 16]
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {n.op_type for n in model.graph.node} <= {"Conv", "Relu", "Add", "MaxPool", "ReduceMean", "Gemm"}


def test_same_network_gives_the_same_bytes(pictures: Network, tmp_path: Path) -> None:
    engine = RUNTIMES.get("openvino")
    first, second = (engine.export(pictures, tmp_path / f"{n}.onnx").sha256 for n in "ab")
    assert first == second


def test_export_says_nothing(pictures: Network, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in RUNTIMES.names():
        engine = RUNTIMES.get(name)
        engine.export(pictures, tmp_path / f"net{engine.suffix}")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_progress_is_told(pictures: Network, tmp_path: Path) -> None:
    told: list[Any] = []

    class Log:
        def task(self, description: str, total: int | None = None) -> Any:
            import contextlib

            told.append(description)
            return contextlib.nullcontext(told.append)

        def note(self, text: str) -> None: ...

    RUNTIMES.get("torch").export(pictures, tmp_path / "net.pt2", progress=Log())
    assert told == ["exporting for torch", 1, 1]


def test_attention_takes_no_sizes_at_run_time(tmp_path: Path) -> None:
    """Keys are swapped by a plain Transpose; the exporter's own form asks for shapes in every layer."""
    path = tmp_path / "net.onnx"
    RUNTIMES.get("onnxruntime").export(_vit(), path)
    kinds = [n.op_type for n in onnx.load(path).graph.node]
    assert kinds.count("Shape") <= 1  # one for the class token, whatever the number of layers
    assert "Slice" not in kinds


def test_what_onnx_has_no_operator_for_is_named(tmp_path: Path) -> None:
    class Solved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.solve(self.layer.weight, x.T).T

    with pytest.raises(ExportError, match="cannot be written as ONNX: .*linalg_solve") as caught:
        RUNTIMES.get("onnxruntime").export(pj.capture(Solved().eval(), (torch.rand(2, 4),)), tmp_path / "net.onnx")
    assert "stack trace" not in caught.value.message
