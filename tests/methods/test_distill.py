from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.features import feature_pairs
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.methods.distill import Distill
from penjing.network import MaskWeights, Network, SetWeights, capture
from penjing.recipe import Context, Recipe
from penjing.recipe.distilling import Distilling
from penjing.recipe.judging import scores_of
from penjing.task import get_task

X = torch.randn(192, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(192) % 3
X[torch.arange(192), Y] += 0.7  # one colour is brighter: that is the class


def wide(seed: int = 0, width: int = 12, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


class Small(nn.Module):
    """Another architecture of the same task, with other names."""

    def __init__(self, seed: int = 5, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 2, stride=2)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.stem(x).relu()).relu().mean((2, 3)))


def network(module: nn.Module, name: str) -> Network:
    return capture(module, inputs=(torch.rand(2, 3, 8, 8),), name=name)


@pytest.fixture(scope="module")
def teacher() -> Network:
    start = network(wide(), "teacher")
    recipe = Recipe(pj.Finetune(epochs=15, lr=0.1, batch_size=32))
    return pj.compress(start, recipe, data=(X, Y), task="classification").network


def distilled(student: Network, teacher: Network, *, labels: bool = False, seed: int = 0, **fields: Any) -> Network:
    settings = {"epochs": 4, "lr": 0.05, "batch_size": 32, "teacher": "big", **fields}
    data = (X, Y) if labels else X
    return pj.compress(
        student, Recipe(Distill(**settings)), data=data, task="classification", seed=seed, teachers={"big": teacher}
    ).network


def distance(a: Network, b: Network) -> float:
    return float((a.run((X,))[0].softmax(1) - b.run((X,))[0].softmax(1)).square().mean())


def agreement(a: Network, b: Network) -> float:
    return float((a.run((X,))[0].argmax(1) == b.run((X,))[0].argmax(1)).float().mean())


@pytest.mark.parametrize("logits", ["soft-labels", "standardized", "dkd", "multi-level", "matching"])
def test_another_architecture_learns_without_labels(teacher: Network, logits: str) -> None:
    student = network(Small(), "student")
    made = distilled(
        student, teacher, logits=logits, temperature=2.0, epochs=30, lr=0.02, optimizer="adamw", other_weight=1.0
    )
    assert agreement(student, teacher) < 0.5 and agreement(made, teacher) > 0.9


@pytest.mark.parametrize("loss", ["fitnet", "attention", "similarity", "contrast"])
def test_inner_values_come_closer_and_adapters_are_thrown_away(teacher: Network, loss: str) -> None:
    student = network(Small(), "student")
    context = Context(original=student, data=Data(X), task=get_task("classification"), teachers={"big": (teacher,)})
    step = Distill(epochs=4, lr=0.05, batch_size=32, teacher="big", features="auto", feature_loss=loss)
    plan = step.plan(student, context)
    assert {e.parameter for e in plan.edits if isinstance(e, SetWeights)} <= set(student.tensors())
    assert any("compared with" in note for note in plan.notes)
    plain = distilled(student, teacher)
    assert not torch.equal(student.apply(plan.edits).tensors()["stem.weight"], plain.tensors()["stem.weight"])
    assert distance(student.apply(plan.edits), teacher) < 0.7 * distance(student, teacher)


def test_pairs_are_found_or_named(teacher: Network) -> None:
    student = network(Small(), "student")

    def pairs(features: Any, loss: str = "fitnet") -> list[tuple[str, str, int, int]]:
        found = feature_pairs(student, teacher, (X[:2],), features, loss, field="Distill.features")
        return [(a.name, b.name, a.width, b.width) for a, b in found]

    assert pairs("auto") == [("relu", "relu", 5, 12), ("relu_1", "relu_1", 5, 12)]
    assert pairs({"stem": "0", "relu_1": "3"}) == [("conv2d", "conv2d", 5, 12), ("relu_1", "conv2d_1", 5, 12)]
    assert [p[:2] for p in pairs({"relu*": "relu*"})] == [("relu", "relu"), ("relu_1", "relu_1")]
    with pytest.raises(RecipeError, match="no value called 'rleu'") as caught:
        pairs({"rleu": "relu"})
    assert "did you mean 'relu'" in (caught.value.hint or "")
    with pytest.raises(RecipeError, match="selects 1 values and 'relu\\*' 2"):
        pairs({"relu": "relu*"})
    with pytest.raises(RecipeError, match="one position only"):
        pairs({"head": "7"}, "attention")


def test_an_adapter_recovers_a_turned_feature() -> None:
    """FitNet's loss goes to zero where the student's values are the teacher's in another basis."""
    from penjing.analysis.features import Comparison, Value

    generator = torch.Generator().manual_seed(0)
    told = torch.randn(256, 6, 4, 4, generator=generator)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    seen = torch.einsum("nchw,cd->ndhw", told, turn)
    pair = Value("a", tuple(seen.shape), 1), Value("b", tuple(told.shape), 1)
    comparison = Comparison([pair], "fitnet")
    optimizer = torch.optim.Adam(comparison.parameters(), lr=0.05)
    first = None
    for _ in range(300):
        loss = comparison.loss(comparison({"a": seen}, {"b": told}))
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first is not None and first > 0.5 and float(loss) < 1e-3


def test_several_teachers_and_their_weights(teacher: Network) -> None:
    student, other = network(Small(), "student"), network(wide(seed=3), "other")

    def run(names: Any, weights: list[float]) -> Network:
        step = Distill(epochs=2, lr=0.05, batch_size=32, teacher=names, teacher_weights=weights)
        teachers = {"a": teacher, "b": other, "both": [teacher, other]}
        return pj.compress(student, Recipe(step), data=X, task="classification", teachers=teachers).network

    same = [run(["a", "b"], []), run("both", []), run(["a", "b"], [2, 2])]
    assert all(torch.equal(n.tensors()["head.weight"], same[0].tensors()["head.weight"]) for n in same)
    mostly = run(["a", "b"], [100, 1])
    assert distance(mostly, run("a", [])) < distance(mostly, run("b", []))


def test_mutual_learning_helps_all_that_take_part() -> None:
    task = get_task("classification")
    assert task is not None
    networks = [network(Small(seed), f"n{seed}") for seed in (1, 2, 3)]
    step = Distill(epochs=8, lr=0.1, batch_size=32, teacher=None, mutual=["b", "c"], temperature=1.0, alpha=0.5)
    context = Context(
        original=networks[0], data=Data((X, Y)), task=task, teachers={"b": (networks[1],), "c": (networks[2],)}
    )
    plan = step.plan(networks[0], context)
    told = {r.layer: r.score for r in plan.reasons if r.layer.startswith("peer")}
    assert set(told) == {"peer b", "peer c"}
    before = [float(scores_of(n, Data((X, Y)), task).mean()) for n in networks]
    after = float(scores_of(networks[0].apply(plan.edits), Data((X, Y)), task).mean())
    assert after > before[0] + 0.1
    assert all(now is not None and now > was + 0.1 for now, was in zip(told.values(), before[1:], strict=True))
    # They do not only learn from labels: a peer that is taught otherwise changes the student.
    alone = pj.Finetune(epochs=8, lr=0.1, batch_size=32).plan(networks[0], context)
    assert not torch.equal(
        networks[0].apply(plan.edits).tensors()["head.weight"], networks[0].apply(alone.edits).tensors()["head.weight"]
    )


def test_peers_without_labels_need_a_teacher(teacher: Network) -> None:
    student = network(Small(), "student")
    context = Context(
        original=student, data=Data(X), task=get_task("classification"), teachers={"big": (teacher,), "b": (student,)}
    )
    with pytest.raises(RecipeError, match="nothing to learn the truth from"):
        Distill(teacher=None, mutual=["b"]).plan(student, context)
    plan = Distill(teacher="big", mutual=["b"], epochs=8, lr=0.1, batch_size=32).plan(student, context)
    assert agreement(student.apply(plan.edits), teacher) > 0.9


def test_the_mean_teacher_is_the_average_of_the_student() -> None:
    student = network(wide(width=6), "student")
    task = get_task("classification")
    context = Context(original=student, data=Data((X, Y)), task=task)
    step = Distill(teacher="self", epochs=1, lr=0.05, batch_size=32, alpha=0.5, self_average=0.5, augment="flip-crop")
    lesson = Distilling(step, student, context)
    seen = [{n: t.clone() for n, t in lesson.learner.student.state_dict().items()}]
    follow = lesson._after_step

    def spy(module: nn.Module, done: float, rate: float) -> None:
        seen.append({n: t.clone() for n, t in lesson.learner.student.state_dict().items()})
        follow(module, done, rate)

    lesson._after_step = spy  # type: ignore[method-assign]
    lesson.plan()
    mean = seen[0]
    for number, now in enumerate(seen[1:]):
        keep = min(0.5, (1 + number) / (10 + number))
        mean = {n: keep * mean[n] + (1 - keep) * now[n] if t.is_floating_point() else now[n] for n, t in mean.items()}
    held = lesson.learner.shadow
    assert held is not None and len(seen) == 7
    for name, value in held.state_dict().items():
        assert torch.allclose(value, mean[name], atol=1e-6), name
    with pytest.raises(RecipeError, match="nothing to learn the truth from"):
        step.plan(student, Context(original=student, data=Data(X), task=task))


def test_kept_answers_change_nothing(teacher: Network, tmp_path: Path) -> None:
    student = network(Small(), "student")
    plain = distilled(student, teacher)
    for _ in range(2):  # made, then read
        kept = distilled(student, teacher, cache=str(tmp_path))
        assert all(torch.equal(t, plain.tensors()[n]) for n, t in kept.tensors().items())
    (file,) = tmp_path.glob("answers-*.npy")
    answers = np.load(file)
    assert np.allclose(answers, teacher.run((X,))[0].numpy(), atol=1e-5)
    # What is read is what stands there; what is not whole is made anew; other samples and teachers have other files.
    np.save(file, -answers)
    file.with_suffix(".sha256").write_text(hashlib.sha256(file.read_bytes()).hexdigest())
    turned = distilled(student, teacher, cache=str(tmp_path))
    assert not torch.equal(turned.tensors()["head.weight"], plain.tensors()["head.weight"])
    file.write_bytes(file.read_bytes()[:500])
    again = distilled(student, teacher, cache=str(tmp_path))
    assert torch.equal(again.tensors()["head.weight"], plain.tensors()["head.weight"])
    distilled(student, network(wide(seed=9), "other"), cache=str(tmp_path))
    assert len(list(tmp_path.glob("answers-*.npy"))) == 2
    assert "cache" not in Distill(cache="x").done()


def test_samples_too_many_for_memory_are_kept_beside(
    teacher: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = network(Small(), "student")
    plain = distilled(student, teacher, labels=True)
    monkeypatch.setattr("penjing.recipe.lessons._MEMORY", 1)
    kept = distilled(student, teacher, labels=True, cache=str(tmp_path))
    assert len(list(tmp_path.glob("samples-*.npy"))) == 2
    assert all(torch.equal(t, plain.tensors()[n]) for n, t in kept.tensors().items())


def test_answers_asked_live_are_those_kept(teacher: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    student = network(Small(), "student")
    kept = distilled(student, teacher)
    monkeypatch.setattr("penjing.recipe.distilling.keepable", lambda data, seed: False)
    live = distilled(student, teacher)
    for name, value in live.tensors().items():
        assert torch.allclose(value, kept.tensors()[name], atol=1e-5), name


@pytest.mark.parametrize("labels", [True, False])
def test_what_measured_best_on_held_out_samples_is_kept(teacher: Network, labels: bool) -> None:
    """A rate that is far too high later on: the weights of an early epoch are the result."""
    settings = {"lr": 3.0, "schedule": "constant", "epochs": 12, "held_out": 0.25, "patience": 3, "batch_size": 32}
    peer = network(Small(9), "peer")
    step = Distill(teacher="big", mutual=["peer"], features="auto", **settings)  # type: ignore[arg-type]
    data = (X, Y) if labels else X
    result = pj.compress(
        network(Small(), "small"),
        Recipe(step),
        data=data,
        task="classification",
        teachers={"big": teacher, "peer": peer},
    )
    said = next(n for n in result.plans[0].notes if "held-out" in n)
    told = [float(v) for v in said.partition("epochs: ")[2].partition(";")[0].split(", ")]
    best = (max if labels else min)(told)
    assert len(told) == 12 or len(told) - 1 - told.index(best) == 3
    assert f"epoch {told.index(best) + 1} are kept" in said
    if labels:
        ((_, held),) = Data((X, Y)).split([0.25], seed=0)
        scores = scores_of(result.network, held, get_task("classification"))
        assert float(scores.double().mean()) == pytest.approx(best, abs=1e-3)


class Varied(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images with noise of their own each time."""

    reads = 0

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        return X[index] + 0.1 * torch.randn(3, 8, 8), int(Y[index])


@pytest.mark.parametrize("size", [8, 48, 192])
@pytest.mark.parametrize("step", [Distill, pj.Finetune])
def test_a_pass_is_a_pass_whatever_batches_the_samples_come_in(size: int, step: Any, teacher: Network) -> None:
    """Answers that are kept are cut as a DataLoader cuts its samples."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), size, shuffle=True)
    settings = {"teacher": "original", "epochs": 3, "lr": 0.01}
    result = pj.compress(teacher, Recipe(step(**settings)), data=loader, task="classification")
    assert result.plans[0].notes[0].startswith(f"{3 * 192 // size} steps;")


@pytest.mark.parametrize("step", [Distill, pj.Finetune])
def test_samples_that_vary_are_read_anew_in_every_pass(step: Any, teacher: Network, tmp_path: Path) -> None:
    varied, settings = Varied(), {"teacher": "original", "epochs": 3, "lr": 0.01}
    pj.compress(teacher, Recipe(step(**settings)), data=varied, task="classification")
    assert varied.reads >= 3 * 192
    with pytest.raises(RecipeError, match="samples are others each time"):
        pj.compress(teacher, Recipe(Distill(**settings, cache=str(tmp_path))), data=varied, task="classification")


class Stream(torch.utils.data.IterableDataset[tuple[torch.Tensor, int]]):
    """Samples one after the other, and nobody knows how many."""

    def __iter__(self) -> Any:
        return iter([(x, int(y)) for x, y in zip(X, Y, strict=True)])


def test_samples_of_a_stream_are_held_out_one_by_one(teacher: Network) -> None:
    step = Distill(teacher="original", epochs=2, lr=0.01, held_out=0.25, batch_size=16)
    notes = pj.compress(teacher, Recipe(step), data=Stream(), task="classification").plans[0].notes
    assert notes[0].startswith("18 steps;")
    assert notes[1].partition("epochs: ")[2].count(",") == 1


def test_states_that_begin_with_zeros_are_not_compared() -> None:
    class Recurrent(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            torch.manual_seed(width)
            self.inner, self.last = nn.GRU(4, width, batch_first=True), nn.Linear(width, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.inner(x)[0].mean(1))

    x = torch.randn(64, 12, 4, generator=torch.Generator().manual_seed(2))
    small, big = (capture(Recurrent(w), inputs=(x[:2],), name=f"gru{w}") for w in (8, 12))
    pairs = feature_pairs(small, big, x[:16], "auto", "fitnet", field="features")
    assert pairs and not any(value.constant for pair in pairs for value in pair)
    losses = _losses(
        pj.compress(
            small,
            Recipe(Distill(teacher="big", epochs=2, features="auto")),
            data=x,
            task="classification",
            teachers={"big": big},
        )
    )
    assert max(losses) < 100
    with pytest.raises(RecipeError, match="zeros is the same everywhere"):
        feature_pairs(small, big, x[:16], {"zeros*": "zeros*"}, "fitnet", field="features")


def _losses(result: pj.Result) -> list[float]:
    return [float(v) for v in result.plans[0].notes[0].rpartition(": ")[2].split(", ")]


@pytest.mark.parametrize("step", [Distill, pj.Finetune])
def test_values_are_matched_by_one_measure_however_small_the_batch(step: Any) -> None:
    """The variance of a single answer says nothing."""
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    start = capture(nn.Linear(5, 1), inputs=(x[:2],))
    halved = start.apply([SetWeights(parameter="weight", value=0.5 * start.tensors()["weight"].detach())])
    recipe = Recipe(step(teacher="original", epochs=3, batch_size=1, lr=0.01))
    context = Context(original=start, data=Data(x))
    plan = recipe.steps[0].plan(halved, context)
    assert max(float(v) for v in plan.notes[0].rpartition(": ")[2].split(", ")) < 10


@pytest.mark.parametrize("damage", ["zeroed", "other dtype", "no sum", "cut"])
def test_damaged_answers_are_asked_for_again(damage: str, teacher: Network, tmp_path: Path) -> None:
    student = network(Small(), "small")
    settings = {"data": X, "teachers": {"big": teacher}, "task": "classification"}
    recipe = Recipe(Distill(teacher="big", epochs=2, cache=str(tmp_path)))
    expected = pj.compress(student, recipe, **settings).network  # type: ignore[arg-type]
    (file,) = tmp_path.glob("*.npy")
    whole = file.read_bytes()
    answers = np.load(file)
    if damage == "cut":
        file.write_bytes(whole[:-100])
    elif damage == "no sum":
        file.with_suffix(".sha256").unlink()
    else:
        np.save(file, np.zeros_like(answers) if damage == "zeroed" else answers.astype(np.float64))
    found = pj.compress(student, recipe, **settings).network  # type: ignore[arg-type]
    assert all(torch.equal(t, expected.tensors()[n]) for n, t in found.tensors().items())
    assert file.read_bytes() == whole


def test_alpha_one_never_looks_at_labels(teacher: Network) -> None:
    student = network(Small(), "student")
    made = []
    for labels in (Y, 2 - Y):
        step = Distill(teacher="big", epochs=1, alpha=1.0, logits="dkd")
        made.append(
            pj.compress(
                student, Recipe(step), data=(X, labels), task="classification", teachers={"big": teacher}
            ).network.tensors()["head.weight"]
        )
    assert torch.equal(*made)


def test_masks_where_and_seed_hold(teacher: Network) -> None:
    student = network(Small(), "student")
    mask = torch.rand(5, 3, 3, 3) > 0.5
    masked = student.apply([MaskWeights(parameter="stem.weight", mask=mask)])
    weight = distilled(masked, teacher).tensors()["stem.weight"]
    assert (weight[~mask] == 0).all() and not torch.equal(weight, masked.tensors()["stem.weight"])
    head = distilled(student, teacher, where="head")
    assert [n for n, t in head.tensors().items() if not torch.equal(t, student.tensors()[n])] == [
        "head.weight", "head.bias"
    ]  # fmt: skip
    one, same, other = (
        distilled(student, teacher, features="auto", feature_loss="contrast", seed=s).tensors()["stem.weight"]
        for s in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_what_does_not_fit_is_said(teacher: Network) -> None:
    student = network(Small(), "student")
    with pytest.raises(RecipeError, match="no network called 'bigg'") as caught:
        pj.compress(student, Recipe(Distill(teacher="bigg")), data=X, teachers={"big": teacher})
    assert "did you mean 'big'" in (caught.value.hint or "")
    with pytest.raises(RecipeError, match="no network called 'big'") as caught:
        pj.compress(student, Recipe(Distill(teacher="big")), data=X)
    assert "teachers={'big': network}" in (caught.value.hint or "")
    with pytest.raises(RecipeError, match="main output of more is N×4 and that of student N×3"):
        distilled(student, network(wide(classes=4), "more"))
    with pytest.raises(DataError, match="needs samples"):
        pj.compress(student, Recipe(Distill()))
    larger = capture(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 100, 3)), inputs=(torch.rand(2, 3, 10, 10),), name="larger"
    )
    with pytest.raises(RecipeError, match="larger does not take the samples of student"):
        distilled(student, larger)
    with pytest.raises(RecipeError, match="alpha is 0"):
        distilled(student, teacher, alpha=0)
    with pytest.raises(RecipeError, match="scores one class only"):
        pj.compress(network(wide(classes=1), "one"), Recipe(Distill()), data=X, task="classification")
    with pytest.raises(RecipeError, match="numbers of classes"):
        one_hot = nn.functional.one_hot(Y, 3).float()
        pj.compress(student, Recipe(Distill(logits="dkd")), data=(X, one_hot), task="classification")
    some = [(X[:96], Y[:96]), (X[96:], None)]
    with pytest.raises(DataError, match="1 of 2 batches have no labels"):
        pj.compress(student, Recipe(Distill()), data=some, task="classification")
    with pytest.raises(RecipeError, match="is quantized and cannot learn"):
        small = pj.compress(student, Recipe(pj.Quantize()), data=X).network
        pj.compress(student, Recipe(Distill(mutual=["q"])), data=X, teachers={"q": small})
    with pytest.raises(RecipeError, match="2 numbers for 1 teachers"):
        distilled(student, teacher, teacher_weights=[1, 2])
    with pytest.raises(RecipeError, match="no language modelling"):
        distilled(student, teacher, sequence=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logits": "soft"}, "Distill.logits must be one of"),
        ({"feature_loss": "hint"}, "Distill.feature_loss must be one of"),
        ({"teacher": None}, "learns from nobody"),
        ({"teacher_weights": [0]}, "must be numbers above 0"),
        ({"teacher_weights": [True]}, "must be numbers above 0"),
        ({"teacher_weights": [float("nan")]}, "must be numbers above 0"),
        ({"teacher_weights": [float("inf")]}, "must be numbers above 0"),
        ({"features": "all"}, "must be 'auto' or a mapping"),
        ({"features": {"relu": 3}}, "must be 'auto' or a mapping"),
        ({"cache": ""}, "cache must be a folder"),
        ({"cache": 3}, "cache must be a folder"),
        ({"features": "auto", "teacher": None, "mutual": ["a"]}, "needs a teacher"),
        ({"cache": "x", "augment": "flip-crop"}, "answers that do not change"),
        ({"self_average": 1.0}, "must be below 1"),
        ({"student_temperature": 0}, "Distill.student_temperature must be above 0"),
        ({"sequence": 1.5}, "Distill.sequence must be a whole number"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Distill(**fields)


def test_it_reads_and_writes_itself(tmp_path: Path) -> None:
    recipe = Recipe(
        Distill(
            teacher=["a", "self"], features={"relu*": "relu*"}, feature_loss="attention", logits="dkd", mutual=["b"]
        )
    )
    recipe.dump(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_training_on_grids_may_distill(teacher: Network) -> None:
    step = pj.TrainQuantized(weights="int4", finetune=Distill(epochs=1, teacher="big", batch_size=32))
    small = pj.compress(teacher, Recipe(step), data=X, task="classification", teachers={"big": teacher}).network
    assert small.has_integer_grids


class Tokens(nn.Module):
    """A causal model: a running mean of embeddings, and the last token's own."""

    def __init__(self, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix, self.head = nn.Embedding(11, width), nn.Linear(width, width), nn.Linear(width, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return self.head(torch.tanh(self.mix(past) + x))


@pytest.mark.parametrize("sampling", [0.0, 1.0])
def test_sequences_are_the_teachers_own(sampling: float) -> None:
    from penjing.recipe.continuation import continued

    class Quiet:
        def task(self, description: str, total: int | None) -> Any:
            from penjing.progress import SILENT

            return SILENT.task(description, total)

    ids = torch.randint(0, 11, (24, 10), generator=torch.Generator().manual_seed(0))
    big = capture(Tokens(), inputs=(ids[:2],))
    made = continued(
        Data(ids),
        lambda x: big.run((x,))[0],
        prompt=3,
        tokens=5,
        temperature=sampling,
        seed=0,
        progress=Quiet(),  # type: ignore[arg-type]
    )
    inputs, labels = next(made.batches(24))
    assert torch.equal(inputs[:, :3], ids[:, :3]) and torch.equal(inputs[:, 8:], ids[:, 8:])
    assert torch.equal(labels[:, 2:7], inputs[:, 3:8])
    assert (labels[:, :2] == -100).all() and (labels[:, 7:] == -100).all()
    likeliest = big.run((inputs,))[0].argmax(-1)[:, 2:7]
    assert torch.equal(likeliest, labels[:, 2:7]) == (sampling == 0)
    with pytest.raises(DataError, match="fewer than a prompt of 3 and 8 more"):
        continued(Data(ids), lambda x: big.run((x,))[0], prompt=3, tokens=8, temperature=0, seed=0, progress=Quiet())  # type: ignore[arg-type]


def test_a_student_learns_to_write_as_its_teacher() -> None:
    ids = torch.randint(0, 11, (96, 12), generator=torch.Generator().manual_seed(0))
    big, small = capture(Tokens(), inputs=(ids[:2],)), capture(Tokens(3, 8), inputs=(ids[:2],))
    step = Distill(teacher="big", sequence=8, prompt=2, alpha=0.0, epochs=20, lr=0.3, batch_size=32)
    made = pj.compress(small, Recipe(step), data=ids, task="language-modelling", teachers={"big": big}).network

    def agrees(student: Network) -> float:
        return float((student.run((ids,))[0].argmax(-1) == big.run((ids,))[0].argmax(-1)).float().mean())

    assert agrees(made) > agrees(small) + 0.2
