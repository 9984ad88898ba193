"""Learned rounding: nearer to the float network than nearest rounding, on the grid, without labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penjing.analysis.activation_grids import activation_grids, activation_types
from penjing.analysis.fake_quantize import WeightGrid, quantizable, simulate, weight_grid
from penjing.analysis.learned_rounding import Rounding, learn_rounding
from penjing.analysis.placement import Placement, place
from penjing.network import MaskWeights, Network, SetWeights, capture
from penjing.tensors import grids
from penjing.tensors.grids import Grid

# Neighbouring pixels are alike: on white noise nearest rounding would be the best there is.
X = nn.functional.avg_pool2d(torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0)), 5, 1) * 5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.b(self.a(x).relu()) + x).relu()
        x = (self.d(self.c(x).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


Parts = tuple[Network, dict[str, WeightGrid], Placement, dict[int, Grid]]


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.manual_seed(0)
    network = capture(Residual().eval(), inputs=(X[:2],))
    return prepared(network, "int3")


def prepared(network: Network, dtype: str, activations: str = "int8") -> Parts:
    floating = [i.name for i in network.inputs]
    placement = place(network.graph_module, floating=floating, parameters=network.parameter_names)
    tensors = network.tensors()
    weights = {n: weight_grid(tensors[n].detach(), dtype, axis=a) for n, a in quantizable(network, placement).items()}
    types = activation_types(placement, activations, edges="int8", ends=())
    return network, weights, placement, activation_grids(network, placement, types, [(X,)])


def learned(parts: Parts, **fields: Any) -> Rounding:
    batches = [parts[0].bind((X[i : i + 16],)) for i in range(0, 64, 16)]
    return learn_rounding(*parts, batches, **{"steps": 60, **fields})


def distance(parts: Parts, rounding: Rounding | None) -> float:
    """Relative squared error of the logits, with nearest rounding or with what was learned."""
    network, weights, placement, activations = parts
    if rounding is not None:
        weights = {n: g for n, (_, g) in rounding.weights.items()}
        activations = rounding.activations
    made = simulate(network, weights, placement.quantizers, activations).network
    if rounding is not None:
        values = {**{n: v for n, (v, _) in rounding.weights.items()}, **rounding.biases}
        made = made.apply([SetWeights(parameter=n, value=v) for n, v in values.items()])
    target = network.run((X,))[0]
    return float((made.run((X,))[0] - target).square().mean() / target.var())


@pytest.mark.parametrize("how", ["adaround", "brecq"])
def test_the_outputs_come_nearer(parts: Parts, how: str) -> None:
    rounding = learned(parts, how=how)
    assert all(after <= before for before, after in rounding.errors.values())
    assert distance(parts, rounding) < 0.6 * distance(parts, None)


def test_layers_or_blocks_are_learned(parts: Parts) -> None:
    layers, blocks = (learned(parts, how=how, steps=2) for how in ("adaround", "brecq"))
    assert len(layers.errors) == 6
    assert len(blocks.errors) < 6


@pytest.mark.parametrize("how", ["adaround", "brecq"])
def test_every_weight_is_at_one_of_its_two_neighbours(parts: Parts, how: str) -> None:
    network, weights, _, _ = parts
    moved = 0
    for name, (value, weight) in learned(parts, how=how).weights.items():
        before, step = network.tensors()[name].detach(), weights[name].grid.scale
        assert torch.equal(weight.grid.scale, step)
        assert torch.equal(grids.fake_quantize(value, weight.grid), value)
        inside = before.abs() < 3 * step.view(-1, *[1] * (before.ndim - 1))
        assert bool(((value - before).abs() / step.view(-1, *[1] * (before.ndim - 1)))[inside].le(1 + 1e-4).all())
        moved += int((value != grids.fake_quantize(before, weight.grid)).sum())
    assert moved > 20, "rounding that is always the nearest was not learned"


def test_masked_weights_stay_zero() -> None:
    torch.manual_seed(1)
    network = capture(Residual().eval(), inputs=(X[:2],))
    mask = torch.rand(12, 8, 3, 3) > 0.6
    network = network.apply([MaskWeights(parameter="a.weight", mask=mask)])
    value, _ = learned(prepared(network, "int4"), how="brecq", steps=30).weights["a.weight"]
    assert not value[~mask].any() and value[mask].any()


def test_narrow_activations_learn_their_steps() -> None:
    torch.manual_seed(2)
    parts = prepared(capture(Residual().eval(), inputs=(X[:2],)), "int4", "int4")
    rounding = learned(parts, how="brecq")
    narrow = [n for n, g in parts[3].items() if g.quant_max == 7]
    assert narrow and any(not torch.equal(rounding.activations[n].scale, parts[3][n].scale) for n in narrow)
    assert distance(parts, rounding) < 0.8 * distance(parts, None)


def test_the_same_seed_gives_the_same(parts: Parts) -> None:
    one, two = (learned(parts, how="brecq", steps=10, seed=3) for _ in range(2))
    assert all(torch.equal(one.weights[n][0], two.weights[n][0]) for n in one.weights)


def test_without_activation_grids_only_weights_are_rounded(parts: Parts) -> None:
    network, weights, placement, _ = parts
    rounding = learned((network, weights, placement, {}), how="brecq", steps=20)
    assert not rounding.activations and len(rounding.weights) == 6


class Shared(nn.Module):
    """One layer in two places, far apart, and a view that needs sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.between = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(self.embed(tokens)).relu()
        for layer in self.between:
            x = layer(x).relu()
        batch, length, _ = x.shape
        return self.twice(x.view(batch, length, 4, 4).flatten(2))


@pytest.mark.parametrize("how", ["adaround", "brecq"])
def test_layers_that_share_a_weight_share_its_rounding(how: str) -> None:
    torch.manual_seed(3)
    tokens = torch.randint(0, 20, (32, 6))
    network = capture(Shared().eval(), inputs=(tokens[:2],))
    placement = place(network.graph_module, floating=[], parameters=network.parameter_names)
    tensors = network.tensors()
    weights = {n: weight_grid(tensors[n].detach(), "int3", axis=a) for n, a in quantizable(network, placement).items()}
    types = activation_types(placement, "int8", edges="int8", ends=())
    activations = activation_grids(network, placement, types, [(tokens,)])
    batches = [network.bind((tokens[i : i + 8],)) for i in range(0, 32, 8)]
    rounding = learn_rounding(network, weights, placement, activations, batches, how=how, steps=30)
    assert set(rounding.weights) == set(weights)
    assert {"embed.weight", "twice.weight"} <= set(weights)
    assert any(after < before for before, after in rounding.errors.values())
