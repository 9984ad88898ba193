"""Quantize: what it decides, what it refuses, and that real architectures keep their function through it."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penjing.data import Data
from penjing.errors import DataError, InputError, PenjingError, RecipeError
from penjing.methods.quantize import Quantize
from penjing.network import MaskWeights, Network, capture
from penjing.recipe import Context, Plan, Recipe
from penjing.runtimes import get_runtime
from penjing.tensors import grids
from penjing.tensors.saturation import may_saturate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.point(F.relu6(self.depth(x))))
        return self.head(x.mean((2, 3)))


@functools.cache
def block() -> Network:
    torch.manual_seed(0)
    module = Block()
    module(torch.randn(64, 3, 8, 8))  # gives the batch norm something to remember
    return capture(module.eval(), inputs=(torch.rand(2, 3, 8, 8),))


def images(n: int = 64, *shape: int) -> Data:
    return Data(torch.rand(n, *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(1)))


def planned(network: Network, data: Data | None, **fields: Any) -> tuple[Plan, Network]:
    plan = Quantize(**fields).plan(network, Context(original=network, data=data))
    return plan, network.apply(plan.edits)


def calls(network: Network, name: str) -> int:
    return sum(str(n.target).startswith(f"quantized_decomposed.{name}") for n in network.graph_module.graph.nodes)


def decibels(network: Network, quantized: Network, inputs: Any) -> float:
    pairs = [(a, b) for a, b in zip(network.run(inputs), quantized.run(inputs), strict=True) if a.is_floating_point()]
    return min(grids.sqnr(a, b) for a, b in pairs)


# --------------------------------------------------------------------------------------------------- what is decided
def test_the_plan_quantizes_every_layer_and_says_why() -> None:
    network, data = block(), images()
    plan, quantized = planned(network, data)
    held = quantized.tensors()
    for name in ("stem.weight", "depth.weight", "point.weight", "head.weight"):
        assert held[name].dtype == torch.int8
        assert held[f"{name}_scale"].shape == (held[name].shape[0],)
    assert calls(quantized, "quantize_per_tensor") == 6  # input, stem, depth, point, sum, mean
    assert {r.layer for r in plan.reasons} == {"stem", "depth", "point", "head"}
    assert all(r.score is not None and r.score > 20 and "dB" in r.why for r in plan.reasons)
    assert decibels(network, quantized, (torch.rand(16, 3, 8, 8),)) > 25
    assert "batch norms folded" in str(plan)
    assert all(t.dtype == torch.float32 for t in network.tensors().values())  # the network given is as it was


def test_a_saved_plan_does_the_same(tmp_path: Any) -> None:
    network = block()
    plan, quantized = planned(network, images())
    again = network.apply(Plan.load(plan.save(tmp_path / "plan.safetensors")).edits)
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(again.run((x,))[0], quantized.run((x,))[0])


def test_grids_equal_those_of_torchs_observers() -> None:
    network, data = block(), images()
    _, quantized = planned(network, data, correct_bias=False)
    x = torch.cat([b for b, _ in data.batches(64)])
    first = next(n for n in quantized.graph_module.graph.nodes if "quantize_per_tensor" in str(n.target))
    observer = torch.ao.quantization.MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_affine)
    observer(x)
    scale, zero = observer.calculate_qparams()
    assert first.args[1] == pytest.approx(float(scale), rel=1e-5) and first.args[2] == int(zero)


def test_weights_only_needs_no_data_and_keeps_the_whole_range() -> None:
    network = block()
    plan, quantized = planned(network, None, activations=None)
    assert calls(quantized, "quantize_per_tensor") == 0
    codes = quantized.tensors()["point.weight"].flatten(1)
    assert (codes.abs().amax(1) == 127).all()
    assert decibels(network, quantized, (torch.rand(4, 3, 8, 8),)) > 35
    assert all(r.choice == "int8 weights per channel" for r in plan.reasons)


def test_no_pair_of_products_saturates_sixteen_bits() -> None:
    _, quantized = planned(block(), images())
    for name in ("stem.weight", "point.weight", "head.weight"):
        assert not may_saturate(quantized.tensors()[name], 0)
    assert int(quantized.tensors()["depth.weight"].abs().max()) == 127  # one input channel: nothing to add
    _, full = planned(block(), images(), headroom=False)
    assert (full.tensors()["point.weight"].flatten(1).abs().amax(1) == 127).all()


def test_one_input_channel_is_not_depthwise() -> None:
    """Kernels that add neighbouring products meet them in these layers too: several filters read each channel."""
    layers = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6))
    network = capture(layers.eval(), inputs=(torch.rand(2, 1, 12, 12),))
    _, quantized = planned(network, images(32, 1, 12, 12))
    for name in ("0.weight", "2.weight"):
        assert not may_saturate(quantized.tensors()[name], 0)


@pytest.mark.parametrize("ranges", grids.RANGES)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_setting_works(ranges: str, granularity: str, symmetric: bool) -> None:
    network = block()
    _, quantized = planned(network, images(), ranges=ranges, granularity=granularity, symmetric=symmetric)
    assert decibels(network, quantized, (torch.rand(8, 3, 8, 8),)) > 18
    scale = quantized.tensors().get("stem.weight_scale")  # one for the tensor may be a number in the graph
    assert (scale is not None and scale.ndim == 1) == (granularity == "channel")


def test_pruned_weights_stay_exactly_zero() -> None:
    network = block()
    mask = torch.rand(8, 8, 1, 1) > 0.6
    pruned = network.apply([MaskWeights(parameter="point.weight", mask=mask)])
    for fields in ({}, {"ranges": "mse"}, {"symmetric": False}):
        _, quantized = planned(pruned, images(), **fields)
        held = quantized.tensors()
        real = (held["point.weight"].int() - held["point.weight_zero_point"].view(-1, 1, 1, 1)) != 0
        assert not (real & ~mask).any()
        assert real.sum() > 0.8 * mask.sum()


def test_bias_correction_matches_the_mean_output() -> None:
    network, data = block(), images()
    x = torch.cat([b for b, _ in data.batches(64)])
    expected = network.run((x,))[0].mean(0)
    shifts = {}
    for correct in (True, False):
        _, quantized = planned(network, data, correct_bias=correct)
        shifts[correct] = float((quantized.run((x,))[0].mean(0) - expected).abs().max())
    assert shifts[True] < 1e-3 and shifts[True] < 0.5 * shifts[False]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.gelu(self.mid(self.emb(ids))))


def test_a_shared_weight_is_quantized_once() -> None:
    ids = torch.randint(0, 20, (8, 6))
    network = capture(Tied().eval(), inputs=(ids,))
    plan, quantized = planned(network, Data(ids))
    integers = [n for n, t in quantized.tensors().items() if t.dtype == torch.int8]
    assert len(integers) == 2 and calls(quantized, "dequantize_per_channel") == 2
    assert decibels(network, quantized, (ids,)) > 25


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.a.weight.sum()


def test_a_weight_with_another_use_stays_float() -> None:
    network = capture(Reused().eval(), inputs=(torch.randn(2, 6),))
    plan, quantized = planned(network, Data(torch.randn(32, 6)))
    assert quantized.tensors()["a.weight"].dtype == torch.float32
    assert any(r.choice == "float32" and "also used" in r.why for r in plan.reasons)


def test_where_leaves_layers_alone_and_says_so() -> None:
    network = block()
    plan, quantized = planned(network, images(), where=["*", "!depth"])
    assert quantized.tensors()["depth.weight"].dtype == torch.float32
    assert quantized.tensors()["stem.weight"].dtype == torch.int8
    assert any(r.choice == "float32" and "excluded" in r.why for r in plan.reasons)


def test_the_rest_can_be_quantized_later() -> None:
    network = block()
    _, half = planned(network, images(), where="head")
    _, whole = planned(half, images())
    assert all(whole.tensors()[f"{n}.weight"].dtype == torch.int8 for n in ("stem", "depth", "point", "head"))
    assert decibels(network, whole, (torch.rand(4, 3, 8, 8),)) > 20


def test_a_fixed_batch_size() -> None:
    network = block()
    fixed = network.replace(inputs=tuple(dataclasses.replace(i, dynamic={}) for i in network.inputs))
    _, quantized = planned(fixed, images(7), samples=4)
    assert decibels(fixed, quantized, (torch.rand(2, 3, 8, 8),)) > 25


def test_order_of_the_samples_does_not_change_the_grids() -> None:
    x = torch.rand(64, 3, 8, 8)
    a = Quantize(correct_bias=False).plan(block(), Context(original=block(), data=Data(x)))
    b = Quantize(correct_bias=False).plan(block(), Context(original=block(), data=Data(x.flip(0))))
    scales = [[float(torch.as_tensor(e.scale).sum()) for e in p.edits if hasattr(e, "scale")] for p in (a, b)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    "fields",
    [
        {"weights": "int5"},
        {"activations": "int6"},
        {"granularity": "group:0"},
        {"granularity": "rows"},
        {"granularity": 128},
        {"rounding": "upwards"},
        {"scales": "integer"},
        {"ranges": "minimax"},
        {"samples": 0},
        {"samples": True},
    ],
)
def test_unknown_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        Quantize(**fields)
    assert f"Quantize.{next(iter(fields))}" in caught.value.message


def test_ternary_and_binary_weights_have_no_zero_point() -> None:
    with pytest.raises(RecipeError, match="binary weights are symmetric"):
        Quantize(weights="binary", symmetric=False)


def test_missing_data() -> None:
    with pytest.raises(DataError) as caught:
        planned(block(), None)
    assert caught.value.hint is not None and "activations=None" in caught.value.hint


def test_samples_with_nan() -> None:
    bad = torch.rand(8, 3, 8, 8)
    bad[3, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        planned(block(), Data(bad))


def test_samples_of_another_shape() -> None:
    with pytest.raises(PenjingError):
        planned(block(), images(8, 1, 8, 8))


def test_weights_with_nan() -> None:
    network = capture(nn.Sequential(nn.Linear(4, 4)).eval(), inputs=(torch.rand(2, 4),))
    network.tensors()["0.weight"].data[0, 0] = math.inf
    with pytest.raises(InputError, match=r"0\.weight cannot be quantized"):
        planned(network, None, activations=None)


def test_nothing_to_quantize() -> None:
    network = capture(nn.Sequential(nn.ReLU()), inputs=(torch.rand(2, 4),))
    with pytest.raises(RecipeError, match="nothing to quantize"):
        planned(network, None, activations=None)
    _, quantized = planned(block(), None, activations=None)
    with pytest.raises(RecipeError, match="nothing to quantize"):
        planned(quantized, None, activations=None)


def test_constant_and_dead_layers() -> None:
    module = Block()
    with torch.no_grad():
        module.point.weight.zero_()
        module.point.bias.zero_()
        module.depth.weight.fill_(0.25)
    network = capture(module.eval(), inputs=(torch.rand(2, 3, 8, 8),))
    _, quantized = planned(network, images())
    assert decibels(network, quantized, (torch.rand(4, 3, 8, 8),)) > 25
    assert not quantized.tensors()["point.weight"].any()


def test_a_bias_behind_what_is_always_zero_survives_the_runtime(tmp_path: Path) -> None:
    """Runtimes hold biases in steps of the input's scale times the weight's."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].bias.fill_(-1.0)
        module[2].bias.mul_(0.05)
    network = capture(module, inputs=(torch.rand(2, 8),))
    _, quantized = planned(network, Data(torch.rand(64, 8)))
    runtime = get_runtime("onnxruntime")
    runtime.export(quantized, tmp_path / "dead.onnx")
    x = torch.rand(5, 8)
    found = torch.as_tensor(runtime.load(tmp_path / "dead.onnx").run({network.inputs[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, network.run(x)[0], rtol=1e-3, atol=1e-5)


def test_weights_that_nothing_can_read_as_integers_are_named() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.pair, self.norm = nn.GRUCell(8, 8), nn.Bilinear(8, 8, 8), nn.LayerNorm((1, 8))
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.pair(self.cell(x), x)[:, None])
            return self.last(y[:, 0])

    plan, _ = planned(capture(Cell().eval(), inputs=(torch.rand(2, 8),)), Data(torch.rand(64, 8)))
    floats = {r.layer for r in plan.reasons if r.choice == "float32"}
    assert {"cell.weight_ih", "cell.weight_hh", "pair.weight"} <= floats
    assert not {n for n in floats if n.startswith(("norm", "last"))}


def test_recipes_read_it() -> None:
    assert Recipe.from_dict({"steps": [{"Quantize": {"ranges": "mse", "samples": 10}}]}).steps == (
        Quantize(ranges="mse", samples=10),
    )
    assert Recipe.from_dict({"steps": [{"Quantize": {"activations": None}}]}).steps[0] == Quantize(activations=None)


def test_patterns_that_match_nothing_are_told() -> None:
    plan, _ = planned(block(), images(), weights={"*": "int8", "haed": "int4"})
    assert "no weight matches 'haed'" in plan.notes
    for none, kind in (({}, None), ({"haed": "int4"}, "int8")):
        with pytest.raises(RecipeError, match="finds nothing to quantize"):
            planned(block(), images(), weights=none, activations=kind)


def test_a_second_time_says_that_all_is_done() -> None:
    _, whole = planned(block(), images())
    with pytest.raises(RecipeError) as caught:
        planned(whole, images())
    assert "already" in (caught.value.hint or "")
