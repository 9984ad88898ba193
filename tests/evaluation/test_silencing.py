"""Curves as a value: the metric really measured, kept in a cache, and honest about what is missing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import DataError, InputError, RecipeError
from penjing.evaluation import Sensitivity, silencing
from penjing.network import Network


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 4),
    )  # fmt: skip
    return pj.capture(model.eval(), inputs=(torch.rand(2, 1, 8, 8),), name="net")


@pytest.fixture(scope="module")
def samples(network: Network) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, network(x).argmax(1)


def accuracy(network: Network, samples: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float((network(samples[0]).argmax(1) == samples[1]).float().mean())


def measure(network: Network, data: Any, **settings: Any) -> Sensitivity:
    return pj.sensitivity(network, data, **{"task": "classification", "samples": 96, **settings})


def test_points_are_the_metric_of_the_pruned_network(network: Network, samples: Any) -> None:
    found = measure(network, samples, ratios=(0, 0.5))
    assert found.metric == {"name": "accuracy", "value": 1.0, "unit": "%", "higher_is_better": True}
    assert found.groups == ("0", "3") and found.ratios == (0.0, 0.5) and found.samples == 96
    for group in found.groups:
        nothing, half = found.curve(group)
        assert (nothing.removed, nothing.metric, nothing.output_error) == (0, 1.0, 0.0)
        step = pj.PruneChannels(ratio=0.5, reconstruct=False, where=group)
        pruned = pj.compress(network, pj.Recipe(step)).network
        assert half.metric == pytest.approx(accuracy(pruned, samples))
        wanted, got = network(samples[0]), pruned(samples[0])
        error = ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).mean()
        assert half.output_error == pytest.approx(float(error), rel=1e-4)


def test_weights_have_curves_too(network: Network, samples: Any) -> None:
    found = measure(network, samples, kind="weights", where="!6", ratios=(0.9, 0.3))
    assert found.groups == ("0.weight", "3.weight") and found.ratios == (0.3, 0.9)
    weight = network.tensors()["3.weight"].detach()
    limit = weight.abs().flatten().kthvalue(found.curve("3.weight")[1].removed).values
    masked = network.apply([pj.network.MaskWeights(parameter="3.weight", mask=weight.abs() > limit)])
    assert found.curve("3.weight")[1].metric == pytest.approx(accuracy(masked, samples))


@pytest.mark.parametrize("missing", ["task", "labels"])
def test_without_labels_there_is_only_the_output_error(network: Network, samples: Any, missing: str) -> None:
    data, task = (samples, None) if missing == "task" else (samples[0], "classification")
    found = measure(network, data, task=task, ratios=(0.5,))
    assert found.metric is None and {row.metric for row in found.rows} == {None}
    labelled = measure(network, samples, ratios=(0.5,))
    assert [r.output_error for r in found.rows] == [r.output_error for r in labelled.rows]
    assert "output error" in str(found)


def test_the_same_seed_draws_the_same(network: Network, samples: Any) -> None:
    settings = {"samples": 40, "criterion": "random", "ratios": (0.5,)}
    assert measure(network, samples, **settings) == measure(network, samples, **settings)
    assert measure(network, samples, **settings) != measure(network, samples, **settings, seed=1)


def test_a_fixed_batch_is_filled_up(samples: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    free = pj.capture(model, inputs=(samples[0][:2],))
    fixed = free.replace(inputs=tuple(dataclasses.replace(i, shape=(7, 1, 8, 8), dynamic={}) for i in free.inputs))
    data = (samples[0][:12], samples[1][:12])
    one, other = (measure(n, data, ratios=(0.5,)) for n in (free, fixed))
    assert other.samples == 12
    assert other.rows[0].metric == pytest.approx(one.rows[0].metric)
    assert other.rows[0].output_error == pytest.approx(one.rows[0].output_error, rel=1e-4)


def test_reconstruction_uses_other_samples_and_loses_less(network: Network, samples: Any) -> None:
    plain = measure(network, samples, samples=48, ratios=(0.5,), task=None)
    fitted = measure(network, samples, samples=48, ratios=(0.5,), task=None, reconstruct=True)
    assert fitted.reconstruct and fitted.samples == 48
    assert sum(r.output_error for r in fitted.rows) < sum(r.output_error for r in plain.rows)


# --------------------------------------------------------------------------------------------------------- the cache
def test_a_hit_runs_nothing(network: Network, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(network, samples, cache=tmp_path, ratios=(0.25, 0.5))
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(silencing, "silence", None)
    monkeypatch.setattr(Network, "run", None)
    assert measure(network, samples, cache=tmp_path, ratios=(0.5, 0.25)) == first


def test_anything_else_is_measured(network: Network, samples: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache": tmp_path, "ratios": (0.5,), "samples": 32}
    measure(network, samples, **settings)
    changed = network.tensors()["0.weight"].detach() * 1.5
    measure(network.apply([pj.network.SetWeights(parameter="0.weight", value=changed)]), samples, **settings)
    measure(network, (samples[0] * 0.5, samples[1]), **settings)
    measure(network, (samples[0], samples[1].flip(0)), **settings)
    measure(network, samples, **settings, where="0")
    task = pj.task.get_task("classification")
    measure(
        network, samples, **settings, task=dataclasses.replace(task, scores=lambda o, y: (o.argmax(1) != y).float())
    )
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "empty"])
def test_a_damaged_cache_is_remade(network: Network, samples: Any, tmp_path: Path, damage: str) -> None:
    first = measure(network, samples, cache=tmp_path, ratios=(0.5,))
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    changed = text.replace('"removed": 4', '"removed": 5', 1)
    broken = {"cut": text[: len(text) // 2], "changed": changed, "foreign": "[1]", "empty": ""}[damage]
    assert broken != text
    file.write_text(broken)
    assert measure(network, samples, cache=tmp_path, ratios=(0.5,)) == first
    assert file.read_text() == text


# ---------------------------------------------------------------------------------------------------------- the value
def test_json_and_back(network: Network, samples: Any, tmp_path: Path) -> None:
    found = measure(network, samples, ratios=(0.25, 0.5))
    file = found.save(tmp_path / "curves.json")
    assert Sensitivity.load(file) == found
    assert set(json.loads(file.read_text())["rows"][0]) == {
        "group", "size", "ratio", "removed", "metric", "output_error",
    }  # fmt: skip
    (tmp_path / "other.json").write_text("{}")
    for path in (tmp_path / "other.json", tmp_path / "none.json"):
        with pytest.raises(InputError):
            Sensitivity.load(path)


def test_the_table_starts_with_the_most_sensitive(network: Network, samples: Any) -> None:
    found = measure(network, samples)
    mean = {g: sum(found.loss(p) for p in found.curve(g)) / 9 for g in found.groups}
    assert found.most_sensitive(1) == (max(mean, key=lambda g: mean[g]),)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(found.most_sensitive())
    assert lines[1].split()[:4] == ["group", "channels", "may", "lose"]
    for group in found.groups:
        spare = found.spare(group)
        assert all(found.loss(p) <= 0.02 + 1e-9 for p in found.curve(group) if p.ratio <= spare)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "layers"}, "kind must be one of channels, weights, got 'layers'"),
        ({"ratios": (0.5, 1.5)}, "ratios must be numbers between 0 and 1"),
        ({"ratios": ()}, "ratios must be numbers between 0 and 1"),
        ({"samples": 0}, "samples must be a whole number above 0"),
        ({"where": "nothing"}, "nothing to silence"),
        ({"kind": "weights", "reconstruct": True}, "reconstruct is for channels"),
    ],
)
def test_settings_that_make_no_sense(network: Network, samples: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(network, samples, **settings)


def test_without_channel_groups_it_says_so(samples: Any) -> None:
    bare = pj.capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval(), inputs=(samples[0][:2],), name="bare")
    with pytest.raises(InputError, match="bare has no channel groups"):
        measure(bare, samples)
    assert measure(bare, samples, kind="weights", ratios=(0.5,)).groups == ("1.weight",)


def test_only_networks_are_measured(samples: Any) -> None:
    with pytest.raises(InputError, match="takes a Network, got Linear"):
        measure(nn.Linear(2, 2), samples)  # type: ignore[arg-type]


def test_a_metric_that_is_no_number_is_the_worst(network: Network, samples: Any) -> None:
    found = measure(network, samples, ratios=(0.5, 0.75))
    calmest = found.most_sensitive()[-1]
    rows = tuple(
        dataclasses.replace(row, metric=None, output_error=0.0) if row.group == calmest and row.ratio == 0.5 else row
        for row in found.rows
    )
    broken = dataclasses.replace(found, rows=rows)
    assert broken.most_sensitive()[0] == calmest and broken.spare(calmest) == 0.0
    assert broken.brief(broken.curve(calmest)[0]) == broken.show(broken.curve(calmest)[0]) == "–"
    assert Sensitivity.from_dict(json.loads(json.dumps(broken.to_dict()))) == broken
    task = dataclasses.replace(pj.task.get_task("classification"), scores=lambda o, y: torch.full((len(y),), torch.nan))
    with pytest.raises(DataError, match="the accuracy of net is not a number"):
        measure(network, samples, task=task, ratios=(0.5,))


def test_numbers_in_brief(network: Network, samples: Any) -> None:
    found = measure(network, samples, ratios=(0.5,))
    point = dataclasses.replace(found.rows[0], metric=0.93391)
    assert (found.brief(point), found.measure) == ("93.4", "accuracy in %")
    decibels = {"name": "PSNR", "value": 30.4, "unit": "dB", "higher_is_better": True}
    other = dataclasses.replace(found, metric=decibels)
    assert (other.brief(dataclasses.replace(point, metric=28.123)), other.measure) == ("28.12", "PSNR in dB")
    plain = dataclasses.replace(found, metric=None)
    assert (plain.brief(dataclasses.replace(point, output_error=0.5)), plain.measure) == ("0.500", "output error")


def test_unknown_criteria_are_told(network: Network, samples: Any) -> None:
    for settings in ({"criterion": "l3"}, {"kind": "weights", "criterion": "magnitud"}):
        with pytest.raises(RecipeError, match="criterion"):
            measure(network, samples, **settings)
    with pytest.raises(RecipeError, match="labels"):
        measure(network, samples, criterion="taylor", task=None)
    assert measure(network, samples, criterion="taylor", ratios=(0.5,)).criterion == "taylor"
