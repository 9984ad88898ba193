"""Fake-quantized networks: the same numbers as the quantized network that is read back from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from penjing.analysis.activation_grids import activation_grids, activation_types
from penjing.analysis.fake_quantize import quantizable, simulate, simulated_value, weight_grid
from penjing.analysis.placement import Placement, place
from penjing.analysis.weight_grids import limits
from penjing.network import Network, QuantizeTensor, SetWeights, capture
from penjing.tensors import grids
from penjing.tensors.grids import Grid

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Signed(nn.Module):
    """Activations of one sign and of two, a sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.c, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(self.c(x + self.b(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return capture(Signed().eval(), inputs=(X[:2],))


def placed(network: Network) -> Placement:
    floating = [i.name for i in network.inputs]
    return place(network.graph_module, floating=floating, parameters=network.parameter_names)


def activations(network: Network, placement: Placement, dtype: str) -> dict[int, Grid]:
    ends = {placement.layers[0].node, placement.layers[-1].node}
    types = activation_types(placement, dtype, edges="int8", ends=ends)
    return activation_grids(network, placement, types, [(X,)])


@pytest.mark.parametrize("dtype", ["int8", "int4", "int3", "int2", "ternary", "binary"])
def test_what_is_read_back_and_quantized_gives_the_simulated_outputs(network: Network, dtype: str) -> None:
    placement, tensors = placed(network), network.tensors()
    weights = {
        n: weight_grid(tensors[n].detach(), dtype, axis=axis) for n, axis in quantizable(network, placement).items()
    }
    made = simulate(network, weights, placement.quantizers, activations(network, placement, "int4"))
    held = made.network.tensors()
    edits: list[SetWeights | QuantizeTensor] = []
    for name, (value, weight) in made.weights(held).items():
        low, high = limits(dtype, True)
        q = grids.quantize(value, weight.grid, torch.int8)
        assert set(q.unique().tolist()) <= set(range(low, high + 1)) - ({0} if dtype == "binary" else set())
        grid = weight.grid
        edits.append(SetWeights(parameter=name, value=value))
        edits.append(
            QuantizeTensor(
                tensor=name, scale=grid.scale, zero_point=grid.zero_point, axis=0, quant_min=low, quant_max=high
            )
        )
    found = made.activations(held)
    for q in placement.quantizers:
        grid = found[q.grid]
        edits.append(
            QuantizeTensor(
                tensor=q.value,
                scale=float(grid.scale),
                zero_point=int(grid.zero_point),
                quant_min=grid.quant_min,
                quant_max=grid.quant_max,
                users=q.users,
            )
        )
    real = network.apply(edits)
    # Sums in another order may move single values over the middle between two points.
    assert grids.sqnr(real.run((X,))[0], made.network.run((X,))[0]) > 45


def test_a_simulated_network_trains_saves_and_loads(network: Network) -> None:
    placement, tensors = placed(network), network.tensors()
    weights = {n: weight_grid(tensors[n].detach(), "int4", axis=0) for n in quantizable(network, placement)}
    made = simulate(network, weights, placement.quantizers, activations(network, placement, "int4")).network
    topology, arrays = made.state()
    again = Network.from_state(topology, arrays)
    assert torch.equal(again.run((X,))[0], made.run((X,))[0])
    module = again.module()
    module(X).square().sum().backward()
    steps = {n: p for n, p in module.named_parameters() if n.endswith(("_step", "_offset"))}
    assert all(p.ndim <= 1 for p in steps.values())  # so that none of them decays
    assert {n for n in steps if n.endswith("_offset")}, "activations of two signs learn their lower end"
    assert all(p.grad is not None for p in steps.values())
    assert all(bool(p.grad.abs().sum() > 0) for n, p in steps.items() if n.endswith("_step"))  # type: ignore[union-attr]


def test_what_only_sums_read_stays_at_eight_bits(network: Network) -> None:
    placement = placed(network)
    ends = {placement.layers[0].node, placement.layers[-1].node}
    types = activation_types(placement, "int4", edges="int8", ends=ends)
    named = {q.value: types[q.grid] for q in placement.quantizers}
    layers = {layer.node: layer for layer in placement.layers}
    for node in layers:
        for source in placement.sources[node]:
            assert named[source] == ("int8" if node in ends else "int4")
    assert "int4" in named.values()


def test_a_start_of_least_error_is_no_worse_than_any_other_scale() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for dtype in ("int2", "ternary", "int4", "binary"):
        found = weight_grid(x, dtype, axis=0)
        error = (found.rounded(x) - x).square().sum(1)
        for factor in (0.8, 0.9, 0.97, 1.03, 1.1, 1.25):
            other = type(found)(
                Grid(found.grid.scale * factor, found.grid.zero_point, *limits(dtype, True), axis=0), found.binary
            )
            assert bool(((other.rounded(x) - x).square().sum(1) >= error * 0.97).all())


def test_only_activations_stand_for_another_value(network: Network) -> None:
    placement, tensors = placed(network), network.tensors()
    weights = {n: weight_grid(tensors[n].detach(), "int4", axis=0) for n in quantizable(network, placement)}
    made = simulate(network, weights, placement.quantizers, activations(network, placement, "int8")).network
    stands = {n.name: simulated_value(n).name for n in made.graph_module.graph.nodes}
    moved = {v for n, v in stands.items() if n != v}
    assert moved == {q.value for q in placement.quantizers}
