"""The whole path, once for each family: capture → prune → quantize → export → parity → run → pack → unpack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import penjing as pj
from penjing.errors import DataError, InputError
from penjing.runtimes import RUNTIMES

SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_labels=5)


class Lstm(nn.Module):
    """Character classifier: embedding, two LSTMs, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(50, 24), nn.LSTM(24, 32, 2, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0][:, -1])


def mobilenet() -> tuple[nn.Module, Any]:
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=5)
    return transformers.MobileNetV2ForImageClassification(config), (torch.rand(8, 3, 32, 32),)


def vit() -> tuple[nn.Module, Any]:
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config), (torch.rand(8, 3, 32, 32),)


def bert() -> tuple[nn.Module, Any]:
    ids = torch.randint(0, 90, (8, 12))
    config = transformers.BertConfig(**SMALL, vocab_size=90)
    return transformers.BertForSequenceClassification(config), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def lstm() -> tuple[nn.Module, Any]:
    return Lstm(), (torch.randint(0, 50, (8, 12)),)


def lively(model: nn.Module) -> nn.Module:
    """Weights and statistics as if trained: initial ones of transformers give nearly constant outputs."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                nn.init.normal_(value, std=1.2 / value[0].numel() ** 0.5 if "embed" not in name else 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module", params=[mobilenet, vit, bert, lstm], ids=lambda f: f.__name__)
def compressed(request: pytest.FixtureRequest) -> tuple[pj.Network, pj.Result, Any]:
    torch.manual_seed(0)
    model, inputs = request.param()
    network = pj.capture(lively(model), inputs, name=request.param.__name__)
    recipe = pj.Recipe(pj.PruneChannels(ratio=0.25), pj.Quantize(weights="int8", activations="int8"))
    batch = inputs if isinstance(inputs, dict) else inputs[0]
    return network, pj.compress(network, recipe, data=[(batch, torch.zeros(8, dtype=torch.int64))]), inputs


def test_it_is_smaller(compressed: tuple[pj.Network, pj.Result, Any]) -> None:
    network, result, _ = compressed
    assert result.network.parameter_count() < 0.9 * network.parameter_count()
    assert result.steps[-1]["after"]["macs"] < result.steps[0]["before"]["macs"]
    held = result.network.tensors()
    integers = sum(t.numel() for n, t in held.items() if result.network.is_weight(n) and t.dtype == torch.int8)
    assert integers > 0.8 * result.network.parameter_count(), "most weights are stored as integers"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_every_runtime_gives_the_networks_own_outputs(
    compressed: tuple[pj.Network, pj.Result, Any], runtime: str, tmp_path: Path
) -> None:
    _, result, inputs = compressed
    engine = RUNTIMES.get(runtime)
    path = tmp_path / f"net{engine.suffix}"
    artifact = engine.export(result.network, path, samples=inputs)
    assert getattr(artifact.parity, artifact.parity.measure) <= artifact.parity.tolerance < 0.3
    assert path.stat().st_size == artifact.bytes
    session = engine.load(path, pj.Target(runtime=runtime, threads=1))
    bound = {n: t.numpy() for n, t in result.network.bind(inputs).items()}
    count = len(next(iter(bound.values())))
    alone = [session.run({n: t[i : i + 1] for n, t in bound.items()}) for i in range(count)]
    for got, reference in zip(map(np.concatenate, zip(*alone, strict=True)), result.network.run(inputs), strict=True):
        assert got.shape == reference.shape
        assert np.sqrt(np.mean((got - reference.numpy()) ** 2)) < 0.1 * np.std(reference.numpy()) + 1e-3


def test_packed_and_unpacked_bit_for_bit(compressed: tuple[pj.Network, pj.Result, Any], tmp_path: Path) -> None:
    network, result, inputs = compressed
    path = tmp_path / "net.penjing"
    pj.pack(result.network, path)
    again = pj.unpack(path)
    for a, b in zip(again.run(inputs), result.network.run(inputs), strict=True):
        assert torch.equal(a, b)
    assert again.state()[0] == result.network.state()[0]
    float_bytes = sum(t.numel() * t.element_size() for t in network.tensors().values())
    assert path.stat().st_size < 0.4 * float_bytes


def test_data_of_the_wrong_shape_stops_before_any_work() -> None:
    network = pj.capture(nn.Linear(4, 2), (torch.rand(2, 4),))
    with pytest.raises(DataError, match="must have the shape N×4, got"):
        pj.compress(network, pj.Recipe(pj.Quantize()), data=[(torch.rand(2, 5), torch.zeros(2))])
    with pytest.raises(DataError, match=r"Quantize needs samples"):
        pj.compress(network, pj.Recipe(pj.Quantize()))


def test_a_layer_used_twice(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x).relu()).relu())

    x = torch.rand(32, 16)
    network = pj.capture(Twice(), (x[:2],))
    quantized = pj.compress(network, pj.Recipe(pj.Quantize()), data=[x]).network
    artifact = RUNTIMES.get("onnxruntime").export(quantized, tmp_path / "net.onnx", samples=x)
    assert artifact.parity.rms_rel <= artifact.parity.tolerance


def test_other_precisions_are_refused_before_any_work() -> None:
    network = pj.capture(nn.Linear(4, 2).bfloat16(), (torch.rand(2, 4).bfloat16(),))
    with pytest.raises(InputError, match="holds weight in bfloat16; Steps work on float32"):
        pj.compress(network, pj.Recipe(pj.Quantize()), data=[torch.rand(2, 4)])


def test_a_fixed_batch_is_compressed_by_batches_of_its_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).reshape(4, 2, 4).sum(1)

    x = torch.rand(16, 8)
    network = pj.capture(Fixed(), (x[:4],))
    result = pj.compress(network, pj.Recipe(pj.Quantize()), data=[x[i : i + 4] for i in range(0, 16, 4)])
    assert result.network.is_quantized
