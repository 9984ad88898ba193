"""Recipes and Plans as files; Steps that refuse what makes no sense."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import InputError, PenjingError, RecipeError
from penjing.network import MaskWeights, QuantizeTensor, RemoveChannels, SetWeights
from penjing.recipe import Plan, Reason, Recipe, matches
from penjing.recipe.steps import STEPS, step_from


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    recipe = pj.Recipe(
        pj.PruneChannels(keep_macs=0.5, where=["*", "!head"]), pj.Finetune(epochs=1, teacher="original"), pj.Quantize()
    )
    assert pj.Recipe.load(recipe.dump(tmp_path / f"recipe{suffix}")) == recipe


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("steps: [{PruneChannels: {ratio: 1.5}}]", "step 1: PruneChannels.ratio must be between 0 and 1, got 1.5", ""),
        ("steps: [{PruneChannels: {ratio: 50}}]", "PruneChannels.ratio must be between 0 and 1, got 50", "0.5"),
        ("steps: [Quantize, {PruneChannels: {ration: 0.5}}]", "step 2: PruneChannels has no field 'ration'", "'ratio'"),
        ("steps: [{PruneChanels: {}}]", "no Step called 'PruneChanels'", "'PruneChannels'"),
        ("steps: [{PruneChannels: {ratio: half}}]", "PruneChannels.ratio must be", ""),
        ("steps: [{Finetune: {epochs: true}}]", "Finetune.epochs must be", ""),
        ("steps: [3]", "a step is one name with its fields", ""),
        ("steps: {PruneChannels: {}}", "one entry 'steps'", ""),
        ("stages: []", "one entry 'steps'", ""),
        ("steps: [", "not valid YAML", ""),
        ("steps: [{PruneWeights: {sparsity: 0.5, sparsity: 0.9}}]", "'sparsity' stands twice", ""),
        ("steps: [{PruneChannels: {ratio: yes}}]", "PruneChannels.ratio must be a number or nothing, got True", ""),
        ("steps: [{Gradually: {step: [3]}}]", "Gradually.step must be a Step, got [3]", ""),
    ],
)
def test_bad_recipes_are_one_sentence(tmp_path: Path, text: str, words: str, hint: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        pj.Recipe.load(file)
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


def test_numbers_that_yaml_makes_of_words(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: [{PruneWeights: {pattern: 2:4}}]")
    with pytest.raises(RecipeError, match="got 124") as caught:
        Recipe.load(file)
    assert "quotes" in str(caught.value.hint)


def test_whole_numbers_and_empty_lists() -> None:
    with pytest.raises(RecipeError, match=r"PruneChannels.samples must be a whole number, got 1.5"):
        pj.PruneChannels(samples=1.5)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="where is an empty list"):
        matches([], "a.weight")


def test_a_missing_recipe() -> None:
    with pytest.raises(InputError, match="there is no recipe"):
        pj.Recipe.load("nowhere.yaml")


def test_where_selects_paths() -> None:
    assert matches("*", "a.b.weight")
    assert matches("a.b", "a.b.weight")
    assert matches("a.*", "a.b.weight")
    assert matches(["x", "*.weight"], "a.b.weight")
    assert not matches("b", "a.b.weight")
    assert not matches(["*", "!a.b"], "a.b.weight")
    assert matches("!a.c", "a.b.weight")
    assert not matches("a.b.w", "a.b.weight")


def test_a_plan_is_replayed_from_its_file(tmp_path: Path) -> None:
    network = pj.capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.rand(2, 4),))
    scale = network.tensors()["2.weight"].detach().abs().amax(1)[:, None].mean(1) / 127
    plan = Plan(
        step=pj.PruneChannels(ratio=0.5),
        edits=(
            RemoveChannels(parameter="0.weight", dim=0, indices=(1, 4)),
            SetWeights(parameter="2.bias", value=torch.ones(2)),
            MaskWeights(parameter="0.weight", mask=torch.rand(4, 4) > 0.5),
            QuantizeTensor(tensor="2.weight", scale=scale, zero_point=torch.zeros(2, dtype=torch.int64), axis=0),
        ),
        reasons=(Reason(layer="0", choice="4 of 6", score=0.25, why="smallest norms"),),
        notes=("by hand",),
    )
    again = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    assert str(again) == str(plan) and "4 of 6" in str(plan) and "smallest norms" in str(plan)
    x = torch.rand(5, 4)
    assert torch.equal(network.apply(again.edits).run(x)[0], network.apply(plan.edits).run(x)[0])


def test_steps_are_values() -> None:
    step = pj.PruneChannels(ratio=0.3)
    assert step == pj.PruneChannels(ratio=0.3) and hash(step) == hash(pj.PruneChannels(ratio=0.3))
    with pytest.raises(AttributeError):
        step.ratio = 0.4
    with pytest.raises(PenjingError, match="made of Steps"):
        Recipe("PruneChannels")


_INNER = {
    "Gradually": {"step": pj.PruneChannels(ratio=0.5)},
    "SearchAmount": {"step": pj.PruneChannels(ratio=0.5), "floor": "accuracy>=-1%"},
    "MixPrecision": {"quantize": pj.Quantize(), "keep_bits": 4.0},
    "Regularize": {"step": pj.PruneChannels(ratio=0.5), "train": pj.Finetune()},
    "TrainLowEntropy": {"finetune": pj.Finetune()},
    "TrainQuantized": {"finetune": pj.Finetune()},
}


@pytest.mark.parametrize("name", [n for n in STEPS.names() if STEPS.get(n).__module__.startswith("penjing.")])
def test_every_refused_field_says_what_to_do(name: str) -> None:
    """Whatever field is given whatever makes no sense: from Python and from plain data, the error has a hint."""
    kind, refused = STEPS.get(name), 0
    for field in dataclasses.fields(kind):
        for value in (-1, 0, 1.5, 1e9, "nonsense", [], ["nonsense"], {"*": "x"}, True, None):
            try:
                kind(**{**_INNER.get(name, {}), field.name: value})
            except PenjingError as error:
                assert error.hint, error.message
                refused += 1
            try:
                step_from({name: {field.name: value}}, "step 1")
            except PenjingError as error:
                assert error.hint, error.message
    assert refused


@pytest.mark.parametrize("name", [n for n in STEPS.names() if STEPS.get(n).__module__.startswith("penjing.")])
def test_numbers_are_finite(name: str) -> None:
    kind = STEPS.get(name)
    for field, wanted in typing.get_type_hints(kind).items():
        if not {int, float} & {wanted, *typing.get_args(wanted)} or typing.get_origin(wanted) in (list, ClassVar):
            continue
        large = [10**400] if float in (wanted, *typing.get_args(wanted)) else []  # more than a float can be
        for value in (math.inf, math.nan, True, *large):
            with pytest.raises(RecipeError, match=f"{name}.{field} must be "):
                kind(**{**_INNER.get(name, {}), field: value})


def test_hints_give_numbers_that_work() -> None:
    for step, hint in (
        (lambda: pj.PruneChannels(keep_macs=-0.5), "for example keep_macs=0.5; it may be left away"),
        (lambda: pj.Finetune(lr=-1), "left away it is 0.01"),
        (lambda: pj.PruneChannels(ratio=50), "write 0.5 for 50 %"),
    ):
        with pytest.raises(RecipeError) as caught:
            step()
        assert caught.value.hint == hint
