"""Weights that share levels in the graph: against torch's own lookup, by gradients, and what else reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tied_network import TOKENS, Tied
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import penjing as pj
from penjing.analysis.footprint import footprint
from penjing.errors import EditError, RecipeError
from penjing.network import MaskWeights, Network, QuantizeTensor, RemoveChannels, SetWeights, capture
from penjing.recipe import Context, Plan
from penjing.tensors.codebooks import additive_powers_of_two, kmeans, scaled

NAMES = ("table.weight", "depthwise.weight", "up.weight", "lstm.weight_ih_l0")


@pytest.fixture(scope="module")
def tied() -> Network:
    return capture(Tied().eval(), (TOKENS,))


def share(network: Network, codes: int, by_row: bool, zero: bool = False) -> Network:
    edits = []
    for name in NAMES:
        weight = network.tensors()[name].detach()
        levels = kmeans(weight.reshape(len(weight) if by_row else 1, -1), codes, zero=zero)
        edits.append(QuantizeTensor(tensor=name, scale=1.0, zero_point=0, levels=levels if by_row else levels[0]))
    return network.apply(edits)


def values(network: Network, name: str) -> Tensor:
    """What torch's own embedding looks up."""
    codes, levels = network.tensors()[name].long(), network.tensors()[f"{name}_levels"].detach()
    rows = codes.reshape(len(levels), -1)
    found = [functional.embedding(c, table[:, None])[:, 0] for c, table in zip(rows, levels, strict=True)]
    return torch.stack(found).reshape(codes.shape)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("codes", "zero"), [(2, False), (5, True), (16, False), (256, False)])
def test_it_computes_with_the_nearest_levels(tied: Network, codes: int, zero: bool, by_row: bool) -> None:
    shared = share(tied, codes, by_row, zero)
    for name in NAMES:
        weight, levels = tied.tensors()[name].detach(), shared.tensors()[f"{name}_levels"].detach()
        assert shared.tensors()[name].dtype == torch.uint8
        assert shared.tensors()[name].shape == weight.shape
        rows = weight.reshape(len(levels), -1)
        nearest = (rows[:, :, None] - levels[:, None]).abs().amin(2)
        torch.testing.assert_close((values(shared, name).reshape(rows.shape) - rows).abs(), nearest)
    plain = tied.apply([SetWeights(parameter=n, value=values(shared, n)) for n in NAMES])
    torch.testing.assert_close(shared.run((TOKENS,))[0], plain.run((TOKENS,))[0], rtol=1e-5, atol=1e-6)


def test_fixed_levels_have_a_scale_for_each_index_of_an_axis() -> None:
    network = capture(nn.Sequential(nn.ConvTranspose2d(3, 4, 3)).eval(), (torch.rand(2, 3, 5, 5),))
    weight, levels = network.tensors()["0.weight"].detach(), additive_powers_of_two(4)
    scale = scaled(weight.transpose(0, 1).flatten(1), levels)
    edit = QuantizeTensor(tensor="0.weight", scale=scale, zero_point=0, axis=1, levels=levels)
    shared = network.apply([edit])
    assert set(shared.parameter_names) == {"0.weight_scale", "0.bias"}
    reals = shared.tensors()["0.weight_levels"][0][shared.tensors()["0.weight"].long()] * scale[None, :, None, None]
    assert float((reals - weight).abs().max()) < float(weight.abs().max()) / 4
    plain = network.apply([SetWeights(parameter="0.weight", value=reals)])
    x = torch.rand(2, 3, 5, 5)
    assert torch.equal(shared.run((x,))[0], plain.run((x,))[0])
    assert shared.parameter_count() == network.parameter_count()


def test_gradients_of_levels_are_sums_over_their_weights(tied: Network) -> None:
    shared = share(tied, 4, by_row=False)
    module = shared.module()
    module(TOKENS).square().sum().backward()
    dense = {n: values(shared, n).requires_grad_() for n in NAMES}
    functional_call(tied.module(), dense, (TOKENS,)).square().sum().backward()
    for name in NAMES:
        wanted = torch.zeros(4).index_add_(0, shared.tensors()[name].long().flatten(), dense[name].grad.flatten())
        got = dict(module.named_parameters())[f"{name}_levels"].grad
        torch.testing.assert_close(got[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_row", [False, True])
def test_zeros_have_code_zero_and_stay(tied: Network, by_row: bool) -> None:
    weight = tied.tensors()["table.weight"].detach()
    mask = weight.abs() > 0.8
    shared = share(tied.apply([MaskWeights(parameter="table.weight", mask=mask)]), 5, by_row, zero=True)
    assert bool((values(shared, "table.weight")[~mask] == 0.0).all())
    assert bool((shared.tensors()["table.weight"][~mask] == 0).all())
    assert "table.weight" not in shared.masks, "its codes say it, and a mask would cost a bit a weight"
    moved = shared.apply([SetWeights(parameter="table.weight_levels", value=torch.ones(11 if by_row else 1, 5))])
    assert bool((values(moved, "table.weight")[~mask] == 0.0).all())
    assert bool((values(moved, "table.weight") == 1.0).any())


def test_counts_and_bytes_are_those_of_packed_codes(tied: Network) -> None:
    shared = share(tied, 5, by_row=False)
    assert shared.is_quantized
    assert not shared.has_integer_grids
    assert shared.parameter_count() == tied.parameter_count()
    assert footprint(shared).macs == footprint(tied).macs
    assert footprint(shared).by_weight == footprint(tied).by_weight
    assert shared.code_bits() == dict.fromkeys(NAMES, 3)
    assert shared.code_kinds() == dict.fromkeys(NAMES, "5 levels")
    sizes = shared.stored_bytes()
    assert sizes["table.weight"] == -(-110 * 3 // 8)
    assert sizes["table.weight_levels"] == 20


def test_files_and_plans_give_it_back(tied: Network, tmp_path: Path) -> None:
    edits = [QuantizeTensor(tensor="table.weight", scale=1.0, zero_point=0, levels=torch.tensor([-1.0, 0.0, 1.0]))]
    plan = Plan(step=pj.ShareWeights(codes=3), edits=tuple(edits), reasons=())
    shared = tied.apply(edits)
    pj.pack(shared, tmp_path / "net.penjing")
    plan.save(tmp_path / "plan.safetensors")
    for again in (
        pj.unpack(tmp_path / "net.penjing"),
        Network.load(shared.save(tmp_path / "net.safetensors")),
        tied.apply(Plan.load(tmp_path / "plan.safetensors").edits),
    ):
        assert again.parameter_names == shared.parameter_names
        assert torch.equal(again.masks["table.weight_levels"], torch.tensor([[False, True, True]]))
        assert torch.equal(again.run((TOKENS,))[0], shared.run((TOKENS,))[0])


def test_the_package_holds_codes_at_their_entropy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = capture(nn.Sequential(nn.Linear(256, 256, bias=False)).eval(), (torch.rand(2, 256),))
    levels = torch.linspace(-0.05, 0.05, 4)
    shared = network.apply([QuantizeTensor(tensor="0.weight", scale=1.0, zero_point=0, levels=levels)])
    counts = torch.bincount(shared.tensors()["0.weight"].flatten().long()).double()
    entropy = float(-(counts / counts.sum() * (counts / counts.sum()).log2()).sum()) * 256 * 256 / 8
    assert pj.pack(shared, tmp_path / "net.penjing") < entropy * 1.01 + 1500


def test_channels_that_share_levels_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.rand(2, 3, 8, 8)
    network = capture(model, (x,))
    for by_row in (False, True):
        weight = network.tensors()["0.weight"].detach()
        levels = kmeans(weight.reshape(8 if by_row else 1, -1), 4)
        edit = QuantizeTensor(tensor="0.weight", scale=1.0, zero_point=0, levels=levels if by_row else levels[0])
        shared = network.apply([edit])
        with pytest.raises(EditError):
            shared.apply([RemoveChannels(parameter="2.weight", dim=1, indices=(0,))])
        with pytest.raises(RecipeError, match="already quantized"):
            pj.PruneChannels(ratio=0.5).plan(shared, Context(original=network))


LEVELS = torch.tensor([-1.0, 1.0])


def test_masked_weights_need_a_level_of_zero(tied: Network) -> None:
    edit = QuantizeTensor(tensor="up.weight", scale=1.0, zero_point=0, levels=LEVELS)
    mask = torch.ones(10, 6, 2, dtype=torch.bool)
    assert tied.apply([MaskWeights(parameter="up.weight", mask=mask), edit]).code_bits() == {"up.weight": 1}
    mask[0] = False
    with pytest.raises(EditError, match="hold no zero"):
        tied.apply([MaskWeights(parameter="up.weight", mask=mask), edit])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"levels": torch.zeros(257)}, "at most 256"),
        ({"levels": torch.zeros(0)}, "at most 256"),
        ({"levels": torch.zeros(3, 2)}, "levels for 3 rows"),
        ({"levels": torch.tensor([0.0, float("nan")])}, "NaN"),
        ({"levels": LEVELS, "scale": torch.ones(4), "axis": 0}, "scales of up.weight have the shape"),
        ({"levels": LEVELS, "scale": -1.0}, "not all positive"),
        ({"levels": LEVELS, "axis": 5, "scale": torch.ones(1)}, "none that is called 5"),
        ({"levels": LEVELS, "tensor": "relu"}, "no parameter called 'relu'"),
    ],
)
def test_what_does_not_fit_is_refused(tied: Network, fields: dict[str, object], words: str) -> None:
    edit = QuantizeTensor(**({"tensor": "up.weight", "scale": 1.0, "zero_point": 0} | fields))  # type: ignore[arg-type]
    with pytest.raises(EditError, match=words):
        tied.apply([edit])
    shared = tied.apply([QuantizeTensor(tensor="up.weight", scale=1.0, zero_point=0, levels=LEVELS)])
    with pytest.raises(EditError, match="stored as integers already"):
        shared.apply([QuantizeTensor(tensor="up.weight", scale=1.0, zero_point=0, levels=LEVELS)])
