"""The latency table and what PruneChannels makes of it; no time is asserted, only what does not depend on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import RecipeError, TargetError
from penjing.methods import prune_channels
from penjing.network import Network
from penjing.recipe import Context
from penjing.runtimes import layer_latency
from penjing.runtimes.timing import Timings


class Mixed(nn.Module):
    """A plain, a depthwise and a grouped convolution, a convolution like the first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.c, self.d = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 8, 1)
        self.e, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.e(self.d(self.c(self.b(self.a(x).relu())).relu()).relu())
        return self.head(x.relu().mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return pj.capture(Mixed(), inputs=(torch.rand(2, 8, 6, 6),))


def test_layers_alone_are_the_layers_of_the_network(network: Network) -> None:
    layers = {layer.weight: layer for layer in layer_latency._layers(network)}
    assert set(layers) == {"a.weight", "b.weight", "d.weight", "e.weight", "head.weight"}  # the grouped one is constant
    assert layers["a.weight"].kind == layers["e.weight"].kind != layers["d.weight"].kind
    for layer, shape in (("a.weight", (4, 2, 3, 3)), ("b.weight", (4, 1, 3, 3)), ("head.weight", (4, 2))):
        alone = layers[layer].at(*shape[:2])
        assert tuple(alone.tensors()["weight"].shape) == shape
        assert alone(alone.example(3)[0]).shape[1] == 4


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_the_model_starts_at_what_was_measured(network: Network, runtime: str) -> None:
    groups = [g for g in network.groups() if g.size > 1]
    cost = layer_latency.latency_cost(network, groups, pj.Target(runtime=runtime, threads=1), 0.5)
    assert cost.timed and cost.limit == pytest.approx(cost.whole / 2)
    assert cost.model.total({}) == pytest.approx(cost.whole)
    assert cost.model.total({g.name: g.size // 2 for g in groups}) <= cost.whole
    assert cost.measure(network) > 0


def test_the_measured_whole_is_held_to_the_limit(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts parameters, the budget is one of parameters, whatever the table says."""

    def opened(bench: object, network: Network) -> Network:
        return network

    def interleave(runs: dict[str, Network], **settings: object) -> dict[str, Timings]:
        counts = {name: torch.tensor([float(n.parameter_count())]).double().numpy() for name, n in runs.items()}
        return {name: Timings(count, count) for name, count in counts.items()}

    monkeypatch.setattr(layer_latency._Bench, "opened", opened)
    monkeypatch.setattr(layer_latency, "interleave", interleave)
    step = pj.PruneChannels(keep_latency=0.5, target="torch")
    plan = step.plan(network, Context(original=network))
    left = network.apply(plan.edits).parameter_count() / network.parameter_count()
    assert 0.3 < left <= 0.5
    assert any("measured" in note and "at most 50.0% was asked for" in note for note in plan.notes)


def test_latency_needs_a_target_that_exists() -> None:
    with pytest.raises(RecipeError, match="needs a target"):
        pj.PruneChannels(keep_latency=0.5)
    with pytest.raises(TargetError):
        pj.PruneChannels(keep_latency=0.5, target="opanvino")
    with pytest.raises(RecipeError, match="round_to"):
        pj.PruneChannels(ratio=0.5, round_to="audo")


def test_counts_are_rounded_to_registers(network: Network) -> None:
    groups = [g for g in network.groups() if g.size > 1]
    multiples = prune_channels.vector_multiples(groups)
    assert all(m in (1, 2, 4, 8, 16) for m in multiples.values())
    plan = pj.PruneChannels(ratio=0.3, round_to="auto").plan(network, Context(original=network))
    kept = {r.layer: int(r.choice.split("/")[0]) for r in plan.reasons if "/" in r.choice}
    assert all(kept[g] % m == 0 for g, m in multiples.items())
