from __future__ import annotations

from functools import partial

import torch
from torch import nn

from penjing.analysis.lane import Lane, View
from penjing.network import Network, QuantizeTensor, capture
from penjing.tensors.grids import Grid, affine_grid, fake_quantize


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.a(x)
        second = torch.relu_(first + 1)
        return self.c(self.b(second) + second + first)


def batches(network: Network) -> list[dict[str, torch.Tensor]]:
    return [network.bind(network.example(batch=3, seed=s)) for s in range(2)]


def linear_nodes(network: Network) -> list[str]:
    return [n.name for n in network.graph_module.graph.nodes if "linear" in str(n.target)]


def test_values_are_those_of_a_run() -> None:
    network = capture(Branches(), inputs=(torch.rand(2, 6),))
    last = next(n.name for n in network.graph_module.graph.nodes if n.op == "output")
    given = batches(network)
    got = Lane(network, given).value(last)
    for outputs, batch in zip(got, given, strict=True):
        assert torch.equal(outputs[0], network.run(batch)[0])


def test_a_changed_tensor_counts_from_then_on() -> None:
    network = capture(Branches(), inputs=(torch.rand(2, 6),))
    first, _, last = linear_nodes(network)
    lane = Lane(network, batches(network), hold=[first])
    before = [v.clone() for v in lane.value(first)]
    lane.tensors["a.weight"] = torch.zeros(8, 6)  # too late: computed already
    lane.tensors["c.weight"] = torch.zeros(4, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, lane.value(first), strict=True))
    bias = network.tensors()["c.bias"]
    assert all(torch.allclose(v, bias.expand_as(v)) for v in lane.value(last))


def test_only_what_is_needed_is_computed() -> None:
    network = capture(Branches(), inputs=(torch.rand(2, 6),))
    first, second, _ = linear_nodes(network)
    lane = Lane(network, batches(network))
    lane.value(first)
    lane.tensors["b.weight"] = torch.zeros(8, 8)
    bias = network.tensors()["b.bias"]
    assert all(torch.allclose(v, bias.expand_as(v)) for v in lane.value(second))


def test_views_stand_where_quantizers_would() -> None:
    # As in the graph with real quantizers: behind a value for all that read it, or for one reader only.
    network = capture(Branches(), inputs=(torch.rand(2, 6),))
    given = batches(network)
    first, second, _ = linear_nodes(network)
    relu = next(n.name for n in network.graph_module.graph.nodes if "relu" in str(n.target))
    wide = affine_grid(torch.tensor(-1.0), torch.tensor(1.0), -8, 7)
    fine = Grid(torch.tensor(0.25), torch.tensor(0), 0, 7)
    placed: list[tuple[str, tuple[str, ...] | None, Grid]] = [("x", None, wide), (relu, (second,), fine)]
    quantized = network.apply(
        [
            QuantizeTensor(
                tensor=value, scale=float(grid.scale), zero_point=int(grid.zero_point), users=users,
                quant_min=grid.quant_min, quant_max=grid.quant_max,
            )
            for value, users, grid in placed
        ]
    )  # fmt: skip
    views: dict[str, list[View]] = {v: [(users, partial(fake_quantize, grid=grid))] for v, users, grid in placed}
    last = next(n.name for n in network.graph_module.graph.nodes if n.op == "output")
    lane = Lane(network, given, hold=[relu], views=views)
    for outputs, batch in zip(lane.value(last), given, strict=True):
        assert torch.allclose(outputs[0], quantized.run(batch)[0], atol=1e-6)
    plain, other = lane.value(relu)[0], lane.seen(relu, second)[0]
    assert torch.equal(other, fake_quantize(plain, fine)) and not torch.equal(other, plain)
    assert torch.equal(lane.seen(relu, first)[0], plain)
