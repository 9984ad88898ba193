from __future__ import annotations

import torch
from torch import nn

from penjing.analysis.lane import Lane
from penjing.network import Network, capture


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
