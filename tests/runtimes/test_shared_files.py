"""Weights that share levels on the real runtimes: short codes in the file, the same numbers out of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.data import Data
from penjing.network import Network, QuantizeTensor, capture
from penjing.recipe import Context
from penjing.runtimes import get_runtime
from penjing.tensors.codebooks import additive_powers_of_two, scaled

X = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
UINT4, UINT8 = onnx.TensorProto.UINT4, onnx.TensorProto.UINT8
RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def network() -> Network:
    """Small weights and a batch norm, which torch's exporter folds; grouped and transposed ones; products."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 32, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(32, 6, 2), nn.Flatten(),
        nn.Linear(150, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip
    norm = model[1]
    for tensor, low, high in ((norm.weight, -1, 2), (norm.running_mean, -1, 1), (norm.running_var, 0.1, 3)):
        nn.init.uniform_(tensor, low, high)  # type: ignore[arg-type]
    return capture(model.eval(), (X[:2],))


def shared(network: Network, **fields: object) -> Network:
    context = Context(original=network, data=Data(X))
    return network.apply(pj.ShareWeights(**fields).plan(network, context).edits)  # type: ignore[arg-type]


def codes_in(path: Path) -> dict[str, onnx.TensorProto]:
    return {i.name: i for i in onnx.load(path).graph.initializer if i.data_type in (UINT4, UINT8)}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("codes", "granularity", "kind"), [(16, "tensor", UINT4), (5, "channel", UINT4), (40, "tensor", UINT8)]
)
def test_files_hold_codes_and_compute_the_same(
    network: Network, tmp_path: Path, runtime: str, codes: int, granularity: str, kind: int
) -> None:
    net = shared(network, codes=codes, granularity=granularity)
    made = get_runtime(runtime).export(net, tmp_path / "net.onnx", samples=X)
    assert made.parity.max_rel < 1e-5
    held = codes_in(made.path)
    assert set(held) == set(net.code_bits())
    assert {i.data_type for i in held.values()} == {kind}
    floats = [i for i in onnx.load(made.path).graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    large = max(int(np.prod(i.dims)) for i in floats if "levels" not in i.name)
    assert large <= 40  # biases and scales only
    kinds = {w.kind for w in made.widened}
    assert kinds == (set() if codes == 16 else {f"{codes} levels"})


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_runtimes_look_levels_up_once_at_loading(
    network: Network, tmp_path: Path, runtime: str, granularity: str
) -> None:
    engine, ran = get_runtime(runtime), []
    for name, net in (("float", network), ("shared", shared(network, codes=16, granularity=granularity))):
        made = engine.export(net, tmp_path / f"{name}.onnx", samples=X)
        ran.append(Counter(e.op for e in engine.load(made.path).executed()))
    assert ran[0] == ran[1]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_activations_on_grids_go_with_shared_weights(network: Network, tmp_path: Path, runtime: str) -> None:
    """What shares levels is computed in float, what does not in integers."""
    net = shared(network, codes=16, where="3")
    quantized = net.apply(pj.Quantize(where="!3").plan(net, Context(original=net, data=Data(X))).edits)
    assert set(net.code_bits()) < set(quantized.code_bits())
    made = get_runtime(runtime).export(quantized, tmp_path / "net.onnx", samples=X)
    assert codes_in(made.path)["3.weight"].data_type == UINT4


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_fixed_levels_with_scales_are_exported(network: Network, tmp_path: Path, runtime: str) -> None:
    edits = []
    for name, axis in (("0.weight", 0), ("5.weight", 1), ("7.weight", 0)):
        rows = network.tensors()[name].detach().movedim(axis, 0).flatten(1)
        levels = additive_powers_of_two(4)
        edits.append(QuantizeTensor(tensor=name, scale=scaled(rows, levels), zero_point=0, axis=axis, levels=levels))
    made = get_runtime(runtime).export(network.apply(edits), tmp_path / "net.onnx", samples=X)
    assert made.parity.max_rel < 1e-5
    assert set(codes_in(made.path)) == {"0.weight", "5.weight", "7.weight"}


def test_a_pt2_says_that_it_holds_bytes(network: Network, tmp_path: Path) -> None:
    net = shared(network, codes=16)
    made = get_runtime("torch").export(net, tmp_path / "net.pt2", samples=X)
    assert {(w.kind, w.stored) for w in made.widened} == {("16 levels", "uint8")}
    assert {w.tensor for w in made.widened} == set(net.code_bits())


def test_a_tied_table_is_looked_up_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 32)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.table(tokens)) @ self.table.weight.t()

    torch.manual_seed(0)
    tokens = torch.randint(0, 40, (4, 7))
    network = capture(Tied().eval(), (tokens,))
    net = network.apply(pj.ShareWeights().plan(network, Context(original=network)).edits)
    for runtime in RUNTIMES:
        made = get_runtime(runtime).export(net, tmp_path / f"{runtime}.onnx", samples=tokens)
        assert made.parity.max_rel < 1e-5
        assert set(codes_in(made.path)) == {"table.weight"}
