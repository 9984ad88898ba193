from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.network import MaskWeights, Network, capture
from penjing.recipe import Context, Recipe
from penjing.task import get_task
from penjing.tensors.saliency import WEIGHT_CRITERIA
from penjing.testing.networks import randomise

CRITERIA = ["magnitude", "gradient", "taylor", "movement", "random", "wanda", "obc", "sparsegpt", "chita"]
X = torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Ordinary, grouped and depthwise convolutions, a transposed one that nothing can rebuild, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 12, 2, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.na(self.a(x)).relu()
        x = (self.b(x).relu() + x) + self.c(x)
        return self.head(self.up(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    model = Net()
    randomise(model)
    return capture(model, inputs=(X[:2],))


def context(network: Network, labels: bool = True, seed: int = 0) -> Context:
    y = network.run((X,))[0].argmax(1) if labels else None
    data = Data((X, y) if labels else [(X, None)])
    return Context(original=network, data=data, task=get_task("classification") if labels else None, seed=seed)


def zeros(network: Network) -> float:
    masks = network.masks.values()
    return sum(int((~m).sum()) for m in masks) / sum(m.numel() for m in masks)


def planned(network: Network, seed: int = 0, **settings: Any) -> Network:
    settings = {"samples": 128, "movement_steps": 4, **settings}
    plan = pj.PruneWeights(**settings).plan(network, context(network, seed=seed))
    return network.apply(plan.edits)


def apart(a: Network, b: Network) -> float:
    return float((a.run((X,))[0] - b.run((X,))[0]).square().mean())


def test_all_criteria_are_here() -> None:
    assert sorted(WEIGHT_CRITERIA.names()) == sorted(CRITERIA)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_as_much_goes_as_is_asked(network: Network, criterion: str) -> None:
    pruned = planned(network, sparsity=0.6, criterion=criterion)
    assert zeros(pruned) == pytest.approx(0.6, abs=0.005)
    assert set(pruned.masks) == {"a.weight", "b.weight", "c.weight", "up.weight", "head.weight"}
    for name, mask in pruned.masks.items():
        assert not pruned.tensors()[name][~mask].any()
    assert torch.isfinite(pruned.run((X,))[0]).all()
    assert planned(network, sparsity=0.6, criterion=criterion).tensors().keys() == pruned.tensors().keys()


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obc", "sparsegpt", "chita"])
def test_criteria_beat_a_draw_and_rebuilding_beats_magnitude(network: Network, criterion: str) -> None:
    lost = apart(planned(network, sparsity=0.5, criterion=criterion), network)
    assert lost < min(apart(planned(network, sparsity=0.5, criterion="random", seed=s), network) for s in range(3))
    if criterion in ("obc", "sparsegpt"):
        settings = {"sparsity": 0.5, "where": "!up"}
        rebuilt, cut = (apart(planned(network, criterion=c, **settings), network) for c in (criterion, "magnitude"))
        assert rebuilt < 0.5 * cut


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_patterns_hold_along_input_channels(network: Network, criterion: str, pattern: str) -> None:
    keep = int(pattern[0])
    pruned = planned(network, criterion=criterion, pattern=pattern)
    for name in ("b.weight", "head.weight"):
        mask = pruned.masks[name]
        assert (mask.unflatten(1, (-1, 4)).sum(2) == keep).all(), name
    rows = pruned.masks["a.weight"].permute(0, 2, 3, 1).flatten(1)  # 27 weights: as if a zero followed
    assert (torch.nn.functional.pad(rows, (0, 1)).unflatten(1, (-1, 4)).sum(2) == keep).all()


def test_blocks_go_whole(network: Network) -> None:
    mask = planned(network, sparsity=0.5, pattern="block:4x1").masks["a.weight"]
    blocks = mask.unflatten(0, (4, 4)).float().mean(1)
    assert set(blocks.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("criterion", ["magnitude", "obc", "sparsegpt", "chita"])
def test_earlier_masks_stay_and_count(network: Network, criterion: str) -> None:
    first = planned(network, sparsity=0.4, criterion="random")
    second = planned(first, sparsity=0.6, criterion=criterion)
    assert zeros(second) == pytest.approx(0.6, abs=0.005)
    assert all(not (second.masks[n] & ~m).any() for n, m in first.masks.items())


def test_where_threshold_and_reasons(network: Network) -> None:
    plan = pj.PruneWeights(threshold=0.05, where=["a", "head"]).plan(network, Context(original=network))
    masks = {e.parameter: e.mask for e in plan.edits if isinstance(e, MaskWeights)}
    assert set(masks) == {"a.weight", "head.weight"}
    assert torch.equal(masks["a.weight"], network.tensors()["a.weight"].abs() >= 0.05)
    assert {r.layer: r.why for r in plan.reasons}["b.weight"] == "not selected by where"


def test_masks_survive_training_quantization_and_packing(network: Network, tmp_path: Path) -> None:
    recipe = Recipe(
        pj.PruneWeights(sparsity=0.5), pj.Finetune(epochs=1, batch_size=32, lr=0.01), pj.Quantize(samples=32)
    )
    y = network.run((X,))[0].argmax(1)
    small = pj.compress(network, recipe, data=(X, y), task="classification").network
    pj.pack(small, tmp_path / "net.penjing")
    again = pj.unpack(tmp_path / "net.penjing")
    assert zeros(again) == pytest.approx(0.5, abs=0.005)
    assert again.is_quantized
    for name, mask in again.masks.items():
        assert not again.tensors()[name][~mask].any(), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 1.5}, "PruneWeights.sparsity must be"),
        ({"criterion": "magnitud"}, "must be one of"),
        ({"pattern": "4:2"}, "must be like '2:4'"),
        ({"pattern": "2:4", "sparsity": 0.7}, "contradicts"),
        ({"threshold": 0.1, "sparsity": 0.7}, "got both"),
        ({"pattern": "block:4x1", "criterion": "obc"}, "takes single weights"),
        ({"where": "nothing"}, "there is no weight"),
    ],
)
def test_nonsense_is_refused(network: Network, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        planned(network, **settings)


@pytest.mark.parametrize("criterion", ["obc", "sparsegpt", "chita"])
def test_rebuilding_survives_what_says_nothing(network: Network, criterion: str) -> None:
    """Layers behind hardly anything, and samples that are all alike, leave Hessians that are not quite definite."""
    for samples, sparsity in ((X, 0.99), (torch.zeros_like(X), 0.7), (X[:1], 0.7)):
        data = Data((samples, torch.zeros(len(samples), dtype=torch.long)))
        step = pj.PruneWeights(sparsity=sparsity, criterion=criterion, samples=64)
        rest = Context(original=network, data=data, task=get_task("classification"))
        sparse = network.apply(step.plan(network, rest).edits)
        assert all(torch.isfinite(sparse.tensors()[name]).all() for name in sparse.masks)


def test_what_criteria_need(network: Network) -> None:
    for criterion in ("wanda", "obc"):
        with pytest.raises(DataError, match="needs samples"):
            pj.PruneWeights(criterion=criterion).plan(network, Context(original=network))
    for criterion in ("taylor", "chita"):
        with pytest.raises(RecipeError, match="labels and a task"):
            pj.PruneWeights(criterion=criterion).plan(network, context(network, labels=False))
    pj.PruneWeights(criterion="obc", samples=64).plan(network, context(network, labels=False))


@pytest.mark.slow
def test_resnet20_without_seventy_per_cent(hub: Any) -> None:
    network = capture(hub.resnet20(), inputs=(torch.rand(2, 3, 32, 32),))
    x, y = (t[:1000] for t in hub.cifar10_test().tensors)
    images = next(Data((x, y)).batches(1000))[0]
    right = {}
    for criterion in ("magnitude", "sparsegpt"):
        recipe = Recipe(pj.PruneWeights(sparsity=0.7, criterion=criterion, samples=500))
        pruned = pj.compress(network, recipe, data=hub.cifar10_train(), task="classification").network
        right[criterion] = float((pruned(images).argmax(1) == y).float().mean())
    assert right["sparsegpt"] >= 0.89 > right["magnitude"] + 0.05
