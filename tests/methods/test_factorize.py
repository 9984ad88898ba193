"""Factorize and MergeFactors: what is low-rank stays exact, budgets and energies hold, chains work everywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import penjing as pj
from penjing.analysis.factorization import decompose, find_factorable, replacement
from penjing.analysis.footprint import footprint
from penjing.analysis.passes import numbered_paddings, outputs_first
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.recipe import Context
from penjing.runtimes import get_runtime
from penjing.testing.oracles import captured, distance, inputs_of

FORMS = ("tucker2", "svd", "spatial", "cp", "auto")


def low_rank(layer: nn.Module, rank: int) -> nn.Module:
    """The layer with a weight of that rank, outputs against all else."""
    weight = layer.weight.detach()  # type: ignore[union-attr]
    flat = weight.flatten(1)
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    with torch.no_grad():
        layer.weight.copy_(((left * values)[:, :rank] @ right[:rank]).view_as(weight))  # type: ignore[union-attr, operator]
    return layer


class Images(nn.Module):
    """Convolutions of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.dilated = nn.Conv2d(24, 24, 3, padding=2, dilation=2)
        self.point = nn.Conv2d(24, 32, 1, stride=2)
        self.up = nn.ConvTranspose2d(32, 20, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.norm(self.stem(x)).relu()).relu()
        x = self.point(self.dilated(self.deep(x)).relu()).relu()
        y: Tensor = self.head(self.up(x).relu().mean((2, 3)))
        return y


@pytest.fixture(scope="module")
def images() -> Tensor:
    mixed = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool2d(mixed, 3, 1, 1) * 3


@pytest.fixture(scope="module")
def network(images: Tensor) -> pj.Network:
    torch.manual_seed(0)
    return pj.capture(Images().eval(), inputs=(images[:2],), name="images")


def plan(network: pj.Network, data: Tensor | None = None, **fields: Any) -> pj.Plan:
    held = None if data is None else Data(data)
    return pj.Factorize(**fields).plan(network, Context(original=network, data=held))


def outputs(network: pj.Network, x: Tensor) -> Tensor:
    return network.run({network.inputs[0].name: x})[0]


def off(network: pj.Network, other: pj.Network, x: Tensor) -> float:
    want = outputs(network, x)
    return float((outputs(other, x) - want).square().sum() / (want - want.mean(0)).square().sum())


@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_low_rank_stays_exact(images: Tensor, weighted: bool) -> None:
    torch.manual_seed(1)
    model = Images().eval()
    for layer in (model.wide, model.dilated, model.point, model.head):
        low_rank(layer, 4)
    network = pj.capture(model, inputs=(images[:2],))
    found = plan(network, images if weighted else None, energy=1 - 1e-6, convolutions="svd", where="!stem*")
    small = network.apply(found.edits)
    chosen = {r.layer: r.choice for r in found.reasons if r.choice != "stays"}
    assert chosen == dict.fromkeys(["wide.weight", "dilated.weight", "point.weight", "head.weight"], "svd, rank 4")
    assert small.parameter_count() < 0.7 * network.parameter_count()
    assert off(network, small, images) < 1e-4


@pytest.mark.parametrize("convolutions", FORMS)
@pytest.mark.parametrize("data", [True, False])
def test_the_budget_is_met(network: pj.Network, images: Tensor, convolutions: str, data: bool) -> None:
    found = plan(network, images if data else None, ratio=0.4, convolutions=convolutions)
    small = network.apply(found.edits)
    could = sum(network.tensors()[r.layer].numel() for r in found.reasons if "grouped" not in r.why)
    gone = network.parameter_count() - small.parameter_count()
    assert 0.4 * could - 1 <= gone <= 0.55 * could
    assert footprint(small).macs < footprint(network).macs
    deep = next(r for r in found.reasons if r.layer == "deep.weight")
    assert deep.choice == "stays" and "grouped" in deep.why
    assert all(r.score is not None and "parameters" in r.why for r in found.reasons if r.choice != "stays")
    assert outputs(small, images[:3]).shape == (3, 10)


def test_energy_is_met_with_the_fewest_weights(network: pj.Network, images: Tensor) -> None:
    counts = []
    for energy in (0.7, 0.9, 0.99):
        found = plan(network, images, energy=energy)
        scores = [r.score for r in found.reasons if r.score is not None]
        assert max(scores) <= 1 - energy + 1e-6
        counts.append(network.apply(found.edits).parameter_count())
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_looking_at_activations_beats_the_weights_alone(network: pj.Network, images: Tensor) -> None:
    fields = {"ratio": 0.5, "allocation": "error", "where": "head*"}
    torch.manual_seed(2)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 40)).eval()
    dense = pj.capture(wide, inputs=(images[:2],))
    fields["where"] = "*"
    ways = [{"criterion": "weights", "reconstruct": False}, {"reconstruct": False}, {}]
    errors = [off(dense, dense.apply(plan(dense, images, **fields, **way).edits), images) for way in ways]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] <= errors[1]


def test_transposed_and_three_dimensional_convolutions_keep_their_mean() -> None:
    torch.manual_seed(0)
    for layer, x in (
        (nn.ConvTranspose1d(32, 24, 4, stride=2, padding=1), torch.rand(32, 32, 19)),
        (nn.Conv3d(32, 24, 3, padding=1), torch.rand(8, 32, 7, 7, 7)),
    ):
        network = pj.capture(nn.Sequential(layer).eval(), inputs=(x[:2],))
        alone, seen = (network.apply(plan(network, data).edits) for data in (None, x))
        assert off(network, seen, x) < 0.7 * off(network, alone, x)


def test_layers_that_matter_more_keep_more(network: pj.Network, images: Tensor) -> None:
    by = {a: network.apply(plan(network, images, ratio=0.3, allocation=a).edits) for a in ("error", "sensitivity")}
    assert off(network, by["sensitivity"], images) < off(network, by["error"], images)


def test_chains_merge_back(network: pj.Network, images: Tensor) -> None:
    for form in FORMS:
        small = network.apply(plan(network, ratio=0.4, convolutions=form).edits)
        found = pj.MergeFactors(always=True).plan(small, Context(original=small))
        again = small.apply(found.edits)
        assert again.parameter_count() == network.parameter_count(), form
        assert set(again.parameter_names) == set(network.parameter_names)
        assert distance([outputs(small, images)], [outputs(again, images)]) < 1e-4
        left = pj.MergeFactors().plan(small, Context(original=small))
        # Depthwise and pointwise layers are a chain of their own kind: as one they would have more weights.
        assert not left.edits and all(r.choice == "stays a chain" for r in left.reasons)


def test_chains_that_were_made_as_such_merge(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 3, stride=2), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(196, 400),
        nn.Linear(400, 10),
    )  # fmt: skip
    network = pj.capture(model.eval(), inputs=(images[:2],))
    merged = network.apply(pj.MergeFactors().plan(network, Context(original=network)).edits)
    assert sorted(tuple(t.shape) for n, t in merged.tensors().items() if n.endswith("weight")) == [
        (4, 3, 3, 3),
        (10, 196),
    ]
    assert distance([outputs(network, images)], [outputs(merged, images)]) < 1e-5
    padded = pj.capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)), inputs=(images[:2],))
    assert not pj.MergeFactors(always=True).plan(padded, Context(original=padded)).edits  # the bias ends at the border


def test_it_says_what_is_slower_on_the_target(network: pj.Network, images: Tensor, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}

    def taken(network: Any, ways: Any, alone: Any, target: Any, progress: Any) -> Any:
        seen.update(ways)
        return {name: (1.0, 2.0 if name == "wide.weight" else 0.5) for name in ways}

    monkeypatch.setattr("penjing.methods.factorize.latency_of_each", taken)
    found = plan(network, images, target="openvino", energy=0.8)
    reasons = {r.layer: r for r in found.reasons}
    assert reasons["wide.weight"].choice == "stays" and "not faster on openvino" in reasons["wide.weight"].why
    assert reasons["dilated.weight"].choice != "stays"
    assert "wide.weight" in seen


def test_layers_are_timed_on_the_target(network: pj.Network, images: Tensor) -> None:
    pytest.importorskip("openvino")
    found = plan(network, energy=0.6, target="openvino:threads=1", where=["wide", "head"])
    assert {r.layer for r in found.reasons if r.choice != "stays" or "not faster" in r.why} >= {"wide.weight"}
    small = network.apply(plan(network, energy=0.6, where="wide").edits)
    merge = pj.MergeFactors(target="openvino:threads=1").plan(small, Context(original=small))
    assert "ms on openvino" in merge.reasons[0].why


ZOO = ("bert", "gpt2", "vit", "tied_embedding", "t5", "conv1d_3d", "diffusion_unet", "unet", "lstm")


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("forms", [("tucker2",), ("svd",), ("spatial",)])
def test_at_full_rank_every_layer_of_the_zoo_stays_exact(name: str, forms: tuple[str, ...]) -> None:
    network = captured(name)
    network = network.apply(outputs_first(network))
    example = inputs_of(network)
    layers, _ = find_factorable(network)
    edits, tensors = [], network.tensors()
    weighted = [example] if forms == ("svd",) else []
    for layer in layers:
        (ways,) = decompose(network, [layer], weighted, forms)[layer.weight].decompositions
        full = max(ways.options, key=lambda o: o.ranks)
        factors = ways.factors(full)
        if len(factors) > 1 and full.error < 1e-6:
            edits += replacement(layer, full, factors, tensors)[0]
    chained = network.apply(edits)
    assert edits and len(chained.parameter_names) > len(network.parameter_names)
    assert distance(list(network.run(example)), list(chained.run(example))) < 2e-3


def test_factors_are_not_factorized_again(network: pj.Network) -> None:
    once = network.apply(plan(network, ratio=0.3).edits)
    found = plan(once, ratio=0.3)
    reasons = {r.layer: r for r in found.reasons}
    factors = set(once.parameter_names) - set(network.parameter_names)
    assert factors and all(reasons[f].why == "a factor already" for f in factors)
    assert once.apply(found.edits).parameter_count() < once.parameter_count()


@pytest.mark.parametrize("name", ["gpt2", "tied_embedding", "conv1d_3d"])
def test_networks_of_the_zoo_get_smaller(name: str) -> None:
    network = captured(name)
    small = network.apply(plan(network, ratio=0.3).edits)
    example = inputs_of(network)
    assert small.parameter_count() < network.parameter_count()
    assert [t.shape for t in small.run(example)] == [t.shape for t in network.run(example)]


def test_it_survives_files_and_runtimes(network: pj.Network, images: Tensor, tmp_path: Path) -> None:
    found = plan(network, images, ratio=0.4, convolutions="auto")
    again = pj.Plan.load(found.save(tmp_path / "plan.safetensors"))
    small = network.apply(again.edits)
    pj.pack(small, tmp_path / "net.penjing")
    opened = pj.unpack(tmp_path / "net.penjing")
    assert torch.equal(outputs(opened, images), outputs(small, images))
    runtime = get_runtime("onnxruntime")
    session = runtime.load(runtime.export(opened, tmp_path / "net.onnx").path, pj.Target.parse("onnxruntime"))
    got = torch.from_numpy(session.run({session.input_names[0]: images[:2].numpy()})[0])
    assert distance([got], [outputs(small, images[:2])]) < 1e-4


def test_it_composes(network: pj.Network, images: Tensor, tmp_path: Path) -> None:
    labels = outputs(network, images).argmax(1)
    recipe = pj.Recipe(
        pj.Factorize(ratio=0.3),
        pj.Finetune(epochs=1, lr=1e-3, teacher="original"),
        pj.PruneChannels(ratio=0.25),
        pj.Quantize(),
    )
    again = pj.Recipe.load(recipe.dump(tmp_path / "recipe.yaml"))
    result = pj.compress(network, again, data=TensorDataset(images, labels), task="classification")
    factored = network.apply(result.plans[0].edits).tensors()
    factors = [n for n in factored if n not in network.tensors()]
    assert len(factors) >= 2
    held = result.network.tensors()
    assert all(held[n].dtype == torch.int8 for n in factors if n in held)
    assert outputs(result.network, images[:2]).shape == (2, 10)


def test_factors_train(network: pj.Network, images: Tensor) -> None:
    small = network.apply(plan(network, images, ratio=0.5).edits)
    labels = outputs(network, images).argmax(1)
    before = off(network, small, images)
    trained = pj.Finetune(epochs=3, lr=3e-3)
    result = pj.compress(small, pj.Recipe(trained), data=TensorDataset(images, labels), task="classification")
    held = result.network.tensors()
    assert all(not torch.equal(held[n], small.tensors()[n]) for n in small.parameter_names if n.endswith("weight"))
    assert off(network, result.network, images) != before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 0.5, "energy": 0.9}, "either ratio or energy"),
        ({"ratio": 1.0}, "ratio must be"),
        ({"energy": 0}, "energy must be"),
        ({"convolutions": "tucker"}, "convolutions must be one of"),
        ({"criterion": "l2"}, "criterion must be one of"),
        ({"allocation": "uniform"}, "allocation must be one of"),
        ({"round_to": 0}, "round_to must be"),
        ({"target": "nothing"}, "nothing"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(pj.PenjingError, match=message):
        pj.Factorize(**fields)


def test_what_cannot_be_done_is_said(network: pj.Network, images: Tensor) -> None:
    with pytest.raises(RecipeError, match="can write as a product"):
        plan(network, where="nothing")
    with pytest.raises(DataError, match="NaN"):
        plan(network, torch.full_like(images, float("nan")))
    masked = network.apply(pj.PruneWeights(sparsity=0.5).plan(network, Context(original=network)).edits)
    with pytest.raises(RecipeError) as caught:
        plan(masked)
    assert "pinned to zero" in str(caught.value.hint)
    quantized = network.apply(
        pj.Quantize(activations=None).plan(network, Context(original=network, data=Data(images))).edits
    )
    for each in (pj.Factorize(), pj.MergeFactors()):
        with pytest.raises(RecipeError, match="already quantized"):
            each.plan(quantized, Context(original=quantized))


@pytest.mark.parametrize("inner", [pj.Factorize(ratio=0.8), pj.CodeWeights(rate=0.5)])
def test_what_takes_once_is_refused_in_rounds(inner: pj.Step) -> None:
    for schedule in ("cubic", "linear", "geometric"):
        with pytest.raises(RecipeError, match=f"{inner.name} cannot take away in rounds") as caught:
            pj.Gradually(step=inner, rounds=2, schedule=schedule)
        assert "schedule='one-shot'" in (caught.value.hint or "")
    with pytest.raises(RecipeError, match="cannot take away in rounds"):
        pj.Gradually(step=pj.Gradually(step=inner, rounds=1), rounds=3)
    model = pj.capture(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), inputs=(torch.randn(2, 16),))
    alone = pj.compress(model, pj.Recipe(inner)).network.tensors()
    for settings in (pj.Gradually(step=inner, rounds=1), pj.Gradually(step=inner, rounds=3, schedule="one-shot")):
        made = pj.compress(model, pj.Recipe(settings)).network.tensors()
        assert all(torch.equal(tensor, made[name]) for name, tensor in alone.items())


@pytest.mark.parametrize(
    ("kernel", "more"), [(3, {}), (4, {}), ((4, 3), {"dilation": (1, 2)}), (2, {"bias": False}), (5, {"stride": 2})]
)
def test_paddings_by_name_are_numbers(kernel: Any, more: dict[str, Any], images: Tensor) -> None:
    torch.manual_seed(0)
    named = "valid" if "stride" in more else "same"
    wide, last = nn.Conv2d(3, 24, kernel, padding=named, **more), nn.Conv2d(24, 24, 3, padding="valid")
    layers = low_rank(wide, 2), nn.ReLU(), low_rank(last, 5)
    model = pj.capture(nn.Sequential(*layers), inputs=(images[:2],))
    turned = model.apply(numbered_paddings(model))
    assert torch.equal(outputs(turned, images), outputs(model, images))
    assert not any("padding" in str(n.target) for n in turned.graph_module.graph.nodes)
    found = plan(model, images, energy=0.999999, convolutions="svd")
    assert [r.choice for r in found.reasons] == ["svd, rank 2", "svd, rank 5"]
    assert off(model, model.apply(found.edits), images) < 1e-5
    apart = plan(model, images, energy=0.999, convolutions="svd", where="2")
    untouched = [n for n in model.apply(apart.edits).graph_module.graph.nodes if "padding" in str(n.target)]
    assert len(untouched) == 1


@pytest.mark.parametrize("convolutions", FORMS)
@pytest.mark.parametrize("ratio", [0.01, 0.5])
def test_products_do_not_rise(images: Tensor, convolutions: str, ratio: float) -> None:
    """A 1×1 at the inputs' resolution is more work than it saves: only where the form was named, with a warning."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(48, 16, 3, 2),
    )
    network = pj.capture(nn.Sequential(*layers), inputs=(images[:2],))
    found = plan(network, images, ratio=ratio, convolutions=convolutions, allocation="error")
    small = network.apply(found.edits)
    before, after = footprint(network), footprint(small)
    factored = {r.layer.removesuffix(".weight") for r in found.reasons if r.choice != "stays"}
    rose = {n for n in factored if _work_of(after, n) > _work_of(before, n)}
    told = [n for n in found.notes if n.startswith("warning: more multiply-accumulates")]
    assert bool(told) == bool(rose) and all(f"{n}.weight" in told[0] for n in rose)
    for name in rose:
        assert f"{name}.weight {_work_of(before, name):,} → {_work_of(after, name):,}" in told[0]
    if convolutions == "cp" and ratio == 0.01:
        assert rose
    if convolutions in ("tucker2", "auto"):
        assert not rose and after.macs <= before.macs


def _work_of(size: Any, layer: str) -> int:
    return sum(macs for name, (_, macs) in size.by_layer.items() if name == layer or name.startswith(f"{layer}."))
