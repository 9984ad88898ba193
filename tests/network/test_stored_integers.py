"""Narrow grids in the graph: codes against torch's own fake quantization, groups, and what else reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tied_network import TOKENS, Tied
from torch import nn

import penjing as pj
from penjing.analysis.footprint import footprint
from penjing.errors import EditError
from penjing.network import Network, QuantizeTensor, RemoveChannels, SetWeights, capture
from penjing.tensors import grids

WIDTHS = {"int16": (-32767, 32767), "int8": (-127, 127), "int6": (-31, 31), "int4": (-7, 7), "int3": (-3, 3)}
WIDTHS |= {"int2": (-2, 1), "ternary": (-1, 1)}


NAMES = ("table.weight", "depthwise.weight", "up.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0")


@pytest.fixture(scope="module")
def tied() -> Network:
    return capture(Tied().eval(), (TOKENS,))


def put(network: Network, names: tuple[str, ...], width: str, *, axis: int | None, group: int = 0) -> Network:
    """Those weights on grids of that width, and next to it the same values in float."""
    edits = []
    for name in names:
        weight = network.tensors()[name].detach()
        grid = grids.tensor_grid(weight, *WIDTHS[width], axis=axis, group=group)
        edits.append(_edit(name, grid, "int16" if width == "int16" else "int8"))
    return network.apply(edits)


def _edit(name: str, grid: grids.Grid, dtype: str = "int8") -> QuantizeTensor:
    return QuantizeTensor(
        tensor=name,
        scale=grid.scale,
        zero_point=grid.zero_point,
        dtype=dtype,
        axis=grid.axis,
        group=grid.group,
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("axis", "group"), [(None, 0), (0, 0), (0, 4), (0, 5)])
def test_every_width_computes_with_the_rounded_weights(tied: Network, width: str, axis: int | None, group: int) -> None:
    quantized = put(tied, NAMES, width, axis=axis, group=group)
    held, values = quantized.tensors(), []
    for name in NAMES:
        weight = tied.tensors()[name].detach()
        grid = grids.tensor_grid(weight, *WIDTHS[width], axis=axis, group=group)
        values.append(SetWeights(parameter=name, value=grids.fake_quantize(weight, grid)))
        assert held[name].dtype == (torch.int16 if width == "int16" else torch.int8)
        assert held[name].shape == weight.shape
        assert grid.quant_min <= int(held[name].min()) and int(held[name].max()) <= grid.quant_max
    torch.testing.assert_close(quantized.run(TOKENS), tied.apply(values).run(TOKENS))
    assert quantized.parameter_count() == tied.parameter_count()
    assert footprint(quantized).macs == footprint(tied).macs
    assert footprint(quantized).by_weight == footprint(tied).by_weight


@pytest.mark.parametrize("group", [0, 4])
def test_kept_packed_and_trained_further(tied: Network, group: int, tmp_path: Path) -> None:
    quantized = put(tied, NAMES, "int4", axis=0, group=group)
    want = quantized.run(TOKENS)
    again = Network.load(quantized.save(tmp_path / "net.safetensors"))
    torch.testing.assert_close(again.run(TOKENS), want, rtol=0, atol=0)
    pj.pack(quantized, tmp_path / "net.penjing")
    unpacked = pj.unpack(tmp_path / "net.penjing")
    torch.testing.assert_close(unpacked.run(TOKENS), want, rtol=0, atol=0)
    assert unpacked.stored_bytes() == quantized.stored_bytes()
    module = quantized.module()
    module.train()
    module(TOKENS).sum().backward()
    assert module.get_parameter("depthwise.bias").grad is not None
    torch.testing.assert_close(module.eval()(TOKENS), want[0])


def test_bytes_are_those_of_packed_codes(tied: Network) -> None:
    plain, weight = tied.stored_bytes(), tied.tensors()["table.weight"]
    assert plain["table.weight"] == 4 * weight.numel()
    expected = {"int16": 16, "int8": 8, "int6": 6, "int4": 4, "int3": 3, "int2": 2, "ternary": 2}
    for width, bits in expected.items():
        sizes = put(tied, ("table.weight",), width, axis=0).stored_bytes()
        assert sizes["table.weight"] == -(-weight.numel() * bits // 8)
        assert sizes["table.weight_scale"] == 4 * len(weight)
        assert sizes["table.weight_zero_point"] == 0


def test_binary_codes_take_one_bit_and_are_exact(tied: Network) -> None:
    weight = tied.tensors()["table.weight"].detach()
    scale = weight.abs().mean(1)
    binary = torch.where(weight < 0, -1.0, 1.0) * scale[:, None]
    grid = grids.Grid(scale, torch.zeros(len(scale), dtype=torch.int64), -1, 1, 0)
    network = tied.apply([SetWeights(parameter="table.weight", value=binary), _edit("table.weight", grid)])
    assert set(network.tensors()["table.weight"].unique().tolist()) == {-1, 1}
    assert network.code_bits() == {"table.weight": 1}
    reference = tied.apply([SetWeights(parameter="table.weight", value=binary)])
    torch.testing.assert_close(network.run(TOKENS), reference.run(TOKENS))


def test_packed_narrow_grids_are_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = capture(nn.Sequential(nn.Linear(256, 256)), (torch.rand(2, 256),))
    sizes = {}
    for width in ("int8", "int4", "int2"):
        file = tmp_path / f"{width}.penjing"
        pj.pack(put(network, ("0.weight",), width, axis=0, group=64), file)
        sizes[width] = file.stat().st_size
    scales = 4 * 256 * 4
    assert sizes["int4"] < 256 * 256 / 2 + scales + 4000
    assert sizes["int2"] < 256 * 256 / 4 + scales + 4000 < sizes["int4"] < sizes["int8"]


def test_channels_beside_groups_are_refused_and_others_go() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())]
    network = put(capture(nn.Sequential(*layers), (torch.rand(4, 8),)), ("4.weight",), "int4", axis=0, group=4)
    with pytest.raises(EditError, match="must stay"):
        network.apply([RemoveChannels(parameter="2.weight", dim=0, indices=(1, 3))])
    smaller = network.apply([RemoveChannels(parameter="0.weight", dim=0, indices=(1, 3))])
    assert smaller.tensors()["2.weight"].shape == (8, 6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": torch.ones(3)}, "its grid wants"),
        ({"axis": 1, "group": 4}, "not from axis 1"),
        ({"quant_min": 3, "quant_max": 3}, "no steps"),
        ({"zero_point": torch.zeros(2)}, "another shape than its scales"),
    ],
)
def test_what_does_not_fit_is_refused(tied: Network, change: dict[str, object], words: str) -> None:
    fitting = {"tensor": "table.weight", "scale": torch.ones(11), "zero_point": 0, "axis": 0}
    with pytest.raises(EditError, match=words):
        tied.apply([QuantizeTensor(**(fitting | change))])  # type: ignore[arg-type]


class Named(nn.Module):
    """A weight, and a buffer of the module's own with a name that codes of the weight would want."""

    def __init__(self, buffer: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.register_buffer(buffer, torch.full((4,), 3.0))
        self.buffer = buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight) * getattr(self, self.buffer)


@pytest.mark.parametrize("ending", ["_scale", "_zero_point", "_levels"])
def test_no_tensor_of_the_network_is_overwritten(ending: str) -> None:
    network = capture(Named(f"weight{ending}").eval(), (torch.randn(3, 8),))
    weight, want = network.tensors()["weight"].detach(), network.run(torch.ones(2, 8))[0]
    edits = {e: _edit("weight", grids.tensor_grid(weight, -127, 127, axis=0)) for e in ("_scale", "_zero_point")}
    edits["_levels"] = QuantizeTensor(tensor="weight", scale=1.0, zero_point=0, levels=torch.arange(-2.0, 3.0))
    with pytest.raises(EditError, match=f"a tensor of its own called 'weight{ending}'") as caught:
        network.apply([edits[ending]])
    assert "another name" in str(caught.value)
    torch.testing.assert_close(network.run(torch.ones(2, 8))[0], want, rtol=0, atol=0)
    # The names that this kind of codes does not take are free.
    per_tensor = network.apply([_edit("weight", grids.tensor_grid(weight, -127, 127))])
    assert torch.equal(per_tensor.tensors()[f"weight{ending}"], torch.full((4,), 3.0))
    if ending == "_scale":
        with pytest.raises(EditError, match="'weight_scale'"):
            pj.compress(network, pj.Recipe(pj.Quantize(activations=None)), data=torch.randn(8, 8))
