"""A point of a curve is what really editing the network and running all of it gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penjing.analysis.footprint import footprint
from penjing.analysis.ranking import rank
from penjing.analysis.sensitivity import channel_parts, prunable_weights, selected_groups, silence, weight_parts
from penjing.analysis.tail import Tails
from penjing.network import MaskWeights, Network, RemoveChannels, capture

RATIOS = (0.0, 0.25, 0.5, 1.0)


class Residual(nn.Module):
    """A branch, a residual sum, a weight read twice, and an output that no group behind the sum touches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.stem(x)).relu_()
        y = x + self.outer(self.inner(x).relu())
        z = self.twice(self.twice(y.mean((2, 3))).relu())
        return self.head(z), x.mean()


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    model = Residual()
    for _ in range(3):
        model(torch.randn(16, 2, 5, 5))
    return capture(model.eval(), inputs=(torch.rand(2, 2, 5, 5),))


@pytest.fixture(scope="module")
def batches(network: Network) -> list[dict[str, torch.Tensor]]:
    return [network.bind((torch.randn(n, 2, 5, 5, generator=torch.Generator().manual_seed(n)),)) for n in (8, 5)]


def ranked(network: Network, criterion: str = "l2"):
    groups = selected_groups(network, lambda name: True)
    return rank(network, groups, criterion, [], footprint(network), by_cost=False, refitted=False)


def close(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def test_silenced_channels_are_removed_channels(network: Network, batches: list[dict[str, torch.Tensor]]) -> None:
    order = {r.group.name: r for r in ranked(network)}
    parts = channel_parts(network, list(order.values()), RATIOS)
    assert [p.name for p in parts] == ["stem", "inner"]
    met = set()
    for part, count, batch, outputs in silence(network, parts, batches):
        r = order[parts[part].name]
        m = r.group.members[0]
        gone = tuple(m.indices[r.order[:count]].flatten().tolist())
        removed = network.apply([RemoveChannels(parameter=m.parameter, dim=m.dim, indices=gone)])
        wanted = removed.run(batches[batch])
        if r.group.name != "stem":  # whose mean over channels is one of the outputs
            assert close(outputs, wanted)
        assert close(outputs[:1], wanted[:1])
        met.add((part, count, batch))
    steps = [(i, c, b) for i, p in enumerate(parts) for c in set(p.counts) - {0} for b in (0, 1)]
    assert sorted(met) == sorted(steps)
    assert all(max(p.counts) == p.size - 1 for p in parts), "one unit stays"


def test_reconstructed_points_are_their_edits(network: Network, batches: list[dict[str, torch.Tensor]]) -> None:
    plain = channel_parts(network, ranked(network), RATIOS)
    parts = channel_parts(network, ranked(network), RATIOS, batches)
    errors: dict[bool, float] = {}
    for fitted, several in ((False, plain), (True, parts)):
        for part, count, batch, outputs in silence(network, several, batches):
            if several[part].name == "inner" and count == 3:
                (edits,) = several[part].edits([count])
                assert close(outputs, network.apply(edits).run(batches[batch]))
                error = (outputs[0] - network.run(batches[batch])[0]).square().sum()
                errors[fitted] = errors.get(fitted, 0.0) + float(error)
    assert errors[True] < 0.7 * errors[False]


def test_silenced_weights_are_masked_weights(network: Network, batches: list[dict[str, torch.Tensor]]) -> None:
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    sparse = network.apply([MaskWeights(parameter="twice.weight", mask=mask)])
    names = prunable_weights(sparse)
    assert names == ["stem.weight", "inner.weight", "outer.weight", "twice.weight", "head.weight"]
    parts = weight_parts(sparse, names, "magnitude", RATIOS)
    for part, count, batch, outputs in silence(sparse, parts, batches):
        name = names[part]
        weight = sparse.tensors()[name].detach()
        keep = torch.ones(weight.numel(), dtype=torch.bool)
        keep[weight.abs().flatten().argsort(stable=True)[:count]] = False
        masked = sparse.apply([MaskWeights(parameter=name, mask=keep.view_as(weight))])
        assert close(outputs, masked.run(batches[batch]))
    assert parts[0].counts == (0, 36, 72, 144)


def test_only_what_lies_behind_is_run_again(network: Network, batches: list[dict[str, torch.Tensor]]) -> None:
    tails = Tails(network, batches)
    names = [str(n.target) for n in network.graph_module.graph.nodes]
    early, late = tails.position(["inner.weight"]), tails.position(["head.weight"])
    assert 0 < early < late < len(names)
    tail = tails.behind(["head.weight"])
    assert len(tail._nodes) == 2  # the linear layer and the output
    assert close(tail.run(1, {}), network.run(batches[1]))
    with pytest.raises(ValueError, match="order of the graph"):
        tails.behind(["inner.weight"])


def test_nothing_of_the_network_changes(network: Network, batches: list[dict[str, torch.Tensor]]) -> None:
    before = {name: t.clone() for name, t in network.tensors().items()}
    for parts in (
        channel_parts(network, ranked(network), (0.5,)),
        weight_parts(network, ["head.weight"], "random", (0.5,)),
    ):
        assert sum(1 for _ in silence(network, parts, batches)) > 0
    assert all(torch.equal(before[name], t) for name, t in network.tensors().items())
