"""What was kept of each group is what the compressed network really has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import InputError
from penjing.evaluation import LatencySettings, Sensitivity
from penjing.evaluation.kept import kept_of

QUICK = LatencySettings(warm_up=1, seconds=0.01, least_rounds=3, most_rounds=3)


class Branches(nn.Module):
    """Two convolutions whose channels lie side by side in one weight behind them, and flattened channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.norm, self.mix = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.head(self.mix(y).relu().flatten(1))


@pytest.fixture(scope="module")
def network() -> pj.Network:
    torch.manual_seed(0)
    return pj.capture(Branches().eval(), inputs=(torch.rand(2, 1, 4, 4),), name="net")


@pytest.fixture(scope="module")
def samples(network: pj.Network) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, network(x).argmax(1)


@pytest.fixture(scope="module")
def curves(network: pj.Network, samples: tuple[torch.Tensor, torch.Tensor]) -> Sensitivity:
    return pj.sensitivity(network, samples, task="classification", ratios=(0.5,), samples=32)


def test_channels_are_counted_through_every_later_step(
    network: pj.Network, samples: object, curves: Sensitivity
) -> None:
    steps = (pj.PruneChannels(ratio=0.5, where="left"), pj.PruneChannels(ratio=0.34, where="mix"))
    later = (pj.PruneWeights(sparsity=0.5), pj.Quantize(weights="int8", activations="int8", samples=32))
    for recipe in (pj.Recipe(*steps), pj.Recipe(*steps, *later)):
        small = pj.compress(network, recipe, data=samples).network
        assert kept_of(curves, small, network) == {"left": 4, "right": 4, "mix": 4}
    assert kept_of(curves, network, network) == {"left": 8, "right": 4, "mix": 6}
    assert kept_of(curves, network, None) == {}


def test_weights_are_counted_by_their_masks(network: pj.Network, samples: object) -> None:
    found = pj.sensitivity(network, samples, kind="weights", ratios=(0.5,), samples=32)
    masked = pj.compress(network, pj.Recipe(pj.PruneWeights(sparsity=0.75, where="head"))).network
    kept = kept_of(found, masked, network)
    assert kept["head.weight"] == round(0.25 * 4 * 96) and kept["left.weight"] == 8 * 9
    assert set(kept) == set(found.groups)


def test_channels_that_join_others_are_told_apart(samples: tuple[torch.Tensor, torch.Tensor]) -> None:
    class Padded(nn.Module):
        """As in residual networks for CIFAR: the shortcut is filled up with zeros where a stage gets wider."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide, self.head = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 10, 3, padding=1), nn.Linear(10, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            x = self.wide(x) + nn.functional.pad(x, (0, 0, 0, 0, 0, 4))
            return self.head(x.relu().mean((2, 3)))

    torch.manual_seed(0)
    network = pj.capture(Padded().eval(), inputs=(samples[0][:2],), name="padded")
    found = pj.sensitivity(network, samples, ratios=(0.5,), samples=32)
    small = pj.compress(network, pj.Recipe(pj.PruneChannels(ratio=0.5, where=["stem", "wide"]))).network
    assert kept_of(found, small, network) == {g.name: g.size for g in small.groups()}
    assert list(kept_of(found, small, network).values()) == [3, 2]


def test_groups_made_by_one_layer_are_told_apart(samples: tuple[torch.Tensor, torch.Tensor]) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.a, self.b = nn.Linear(16, 20), nn.Linear(8, 4), nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.both(x.flatten(1)).relu().split((8, 12), 1)
            return self.a(a) + self.b(b)

    torch.manual_seed(0)
    network = pj.capture(Fused().eval(), inputs=(samples[0][:2],), name="fused")
    found = pj.sensitivity(network, samples, ratios=(0.5,), samples=32)
    assert [found.curve(g)[0].size for g in found.groups] == [8, 12]
    gone = pj.network.RemoveChannels(parameter="both.weight", dim=0, indices=(1, 2, 3, 9))
    assert list(kept_of(found, network.apply([gone]), network).values()) == [5, 11]


def test_layers_that_are_gone_kept_nothing(curves: Sensitivity, network: pj.Network) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1))

    other = pj.capture(Flat().eval(), inputs=(torch.rand(2, 1, 4, 4),))
    kept = kept_of(curves, other, network)
    assert kept["left"] == kept["right"] == 0 and "mix" not in kept, "the layer behind mix is there, but another"


def test_curves_of_another_network_are_refused(network: pj.Network, samples: object, curves: Sensitivity) -> None:
    torch.manual_seed(1)
    other = pj.capture(Branches().eval(), inputs=(torch.rand(2, 1, 4, 4),), name="other")
    with pytest.raises(InputError, match=r"curves are of another network \(net\) than the baseline"):
        pj.evaluate(network, samples, baseline=other, sensitivity=curves, target="torch")
    with pytest.raises(InputError, match="than the one evaluated"):
        pj.evaluate(other, samples, sensitivity=curves, target="torch")


def test_the_report_carries_them(network: pj.Network, samples: object, curves: Sensitivity, tmp_path: Path) -> None:
    pj.pack(network, tmp_path / "net.penjing")
    small = pj.compress(network, pj.Recipe(pj.PruneChannels(ratio=0.5)), data=samples).network
    report = pj.evaluate(
        small, samples, baseline=tmp_path / "net.penjing", sensitivity=curves, target="torch", task="classification",
        memory=False, latency=QUICK,
    )  # fmt: skip
    values = json.loads(report.to_json())["sensitivity"]
    assert Sensitivity.from_dict(values["curves"]) == curves
    assert values["kept"] == report.kept == {g.name: g.size for g in small.groups()}
    assert dataclasses.replace(report, sensitivity=None).to_dict()["sensitivity"] is None
