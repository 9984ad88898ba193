from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.expose import exposing, shared_sums
from penjing.data import Data
from penjing.errors import DataError, PenjingError, RecipeError
from penjing.methods.finetune import Finetune
from penjing.network import MaskWeights, Network, QuantizeTensor, SetWeights, capture
from penjing.recipe import Context, Recipe
from penjing.task import get_task
from penjing.tensors.distillation import matching, soft_labels

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(128, 3, 8, 8, generator=GENERATOR)
Y = (X.mean((1, 2, 3)) > 0).long()


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


@pytest.fixture()
def network() -> Network:
    return capture(tiny(), inputs=(torch.rand(2, 3, 8, 8),))


def context(network: Network, *, labels: bool = True, task: str | None = "classification", seed: int = 0) -> Context:
    data = Data((X, Y)) if labels else Data(X)
    return Context(original=network, data=data, task=get_task(task), seed=seed)


def spoiled(network: Network) -> Network:
    weight = network.tensors()["5.weight"]
    return network.apply([SetWeights(parameter="5.weight", value=weight + 0.5 * torch.randn_like(weight))])


def distance(a: Network, b: Network) -> float:
    return float((a.run((X,))[0] - b.run((X,))[0]).square().mean())


def test_soft_labels_are_the_divergence_and_keep_the_gradients_size() -> None:
    student, teacher = torch.randn(8, 5), torch.randn(8, 5)
    p, q = torch.softmax(teacher / 3, 1), torch.softmax(student / 3, 1)
    assert torch.allclose(soft_labels(student, teacher, 3.0), 9 * (p * (p / q).log()).sum(1).mean(), atol=1e-5)
    assert float(soft_labels(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    flipped = soft_labels(student.T, teacher.T, 3.0, dim=0)
    assert torch.allclose(flipped, soft_labels(student, teacher, 3.0), atol=1e-5)
    # At high temperatures the squared temperature leaves a constant times the squared difference of the logits.
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    hot = soft_labels(student.double(), teacher.double(), 1e3)
    assert float(hot) == pytest.approx(float(centred.square().mean() / 2), rel=1e-2)
    assert float(matching(10 * student, 10 * teacher)) == pytest.approx(float(matching(student, teacher)), rel=1e-4)


def test_labels_are_learned_and_the_network_given_stays(network: Network) -> None:
    task = get_task("classification")
    assert task is not None
    before = {n: t.clone() for n, t in network.tensors().items()}
    plan = Finetune(epochs=6, lr=0.1, batch_size=16).plan(network, context(network))
    tuned = network.apply(plan.edits)
    assert all(torch.equal(t, before[n]) for n, t in network.tensors().items())
    assert float(task.loss(tuned.run((X,))[0], Y)) < 0.8 * float(task.loss(network.run((X,))[0], Y))
    changed = {e.parameter for e in plan.edits if isinstance(e, SetWeights)}
    assert {"0.weight", "1.running_mean", "1.running_var", "5.bias"} <= changed
    assert len(plan.reasons) == len(plan.edits)


@pytest.mark.parametrize("task", ["classification", None])
@pytest.mark.parametrize("augment", [None, "flip-crop"])
def test_a_teacher_needs_no_labels(network: Network, task: str | None, augment: str | None) -> None:
    student = spoiled(network)
    step = Finetune(epochs=4, lr=0.1, batch_size=16, teacher="original", augment=augment)
    plan = step.plan(student, context(network, labels=False, task=task))
    assert distance(student.apply(plan.edits), network) < 0.5 * distance(student, network)


def test_alpha_one_never_looks_at_labels(network: Network) -> None:
    student = spoiled(network)
    plans = []
    for labels in (Y, 1 - Y):
        here = Context(original=network, data=Data((X, labels)), task=get_task("classification"))
        plans.append(Finetune(epochs=1, teacher="original", alpha=1.0).plan(student, here))
    for a, b in zip(plans[0].edits, plans[1].edits, strict=True):
        assert isinstance(a, SetWeights) and isinstance(b, SetWeights) and torch.equal(a.value, b.value)


def test_the_same_seed_gives_the_same_plan_and_another_seed_another(network: Network) -> None:
    def weights(seed: int) -> torch.Tensor:
        plan = Finetune(epochs=0.5, augment="flip-crop").plan(network, context(network, seed=seed))
        return network.apply(plan.edits).tensors()["0.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_masked_weights_stay_zero(network: Network) -> None:
    mask = torch.rand(6, 3, 3, 3) > 0.5
    masked = network.apply([MaskWeights(parameter="0.weight", mask=mask)])
    tuned = masked.apply(Finetune(epochs=1, lr=0.1).plan(masked, context(network)).edits)
    weight = tuned.tensors()["0.weight"]
    assert (weight[~mask] == 0).all() and not torch.equal(weight, masked.tensors()["0.weight"])


def test_where_limits_what_changes(network: Network) -> None:
    plan = Finetune(epochs=1, where="5").plan(network, context(network))
    assert {e.parameter for e in plan.edits if isinstance(e, SetWeights)} == {"5.weight", "5.bias"}
    with pytest.raises(RecipeError, match="selects no parameter"):
        Finetune(where="nothing").plan(network, context(network))


def test_what_was_frozen_to_run_is_trained() -> None:
    """A file would not tell; `where` holds still."""
    frozen = capture(tiny().requires_grad_(False), inputs=(torch.rand(2, 3, 8, 8),))
    plan = Finetune(epochs=1, where=["*", "!0"]).plan(frozen, context(frozen))
    changed = {e.parameter for e in plan.edits if isinstance(e, SetWeights)}
    assert "5.weight" in changed and "0.weight" not in changed


def test_what_it_lacks_is_said(network: Network) -> None:
    with pytest.raises(RecipeError, match="needs a task"):
        Finetune().plan(network, context(network, task=None))
    with pytest.raises(DataError, match="needs labels"):
        Finetune().plan(network, context(network, labels=False))
    with pytest.raises(DataError, match="needs samples"):
        Finetune().plan(network, Context(original=network, task=get_task("classification")))
    edit = QuantizeTensor(tensor="0.weight", scale=torch.full((6,), 0.01), zero_point=torch.zeros(6), axis=0)
    quantized = network.apply([edit])
    with pytest.raises(RecipeError, match="already quantized") as caught:
        Finetune().plan(quantized, context(network))
    assert "before Quantize" in (caught.value.hint or "")


def test_a_rate_that_is_too_high_ends_in_a_sentence(network: Network) -> None:
    with pytest.raises(PenjingError):
        Finetune(epochs=30, lr=1e9, optimizer="adamw").plan(network, context(network))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "Finetune.epochs must be above 0, got 0"),
        ({"lr": -1}, "Finetune.lr must be above 0, got -1"),
        ({"teacher": "orignal"}, "Finetune.teacher must be one of"),
        ({"alpha": 90}, "Finetune.alpha must be between 0 and 1, got 90"),
        ({"temperature": 0}, "Finetune.temperature"),
        ({"batch_size": 0}, "Finetune.batch_size"),
        ({"optimizer": "sdg"}, "Finetune.optimizer"),
        ({"augment": "mixup"}, "Finetune.augment"),
        ({"average": 1.0}, "Finetune.average must be below 1, got 1.0"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Finetune(**fields)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_it_reads_and_writes_itself(tmp_path: object) -> None:
    recipe = Recipe(Finetune(epochs=0.5, teacher="original", augment="flip-crop"))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_network_of_one_batch_size_says_which() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.reshape(8, 4))

    fixed = capture(Fixed(), inputs=(torch.rand(8, 4),))
    data = Data((torch.rand(20, 4), torch.arange(20) % 2))
    here = Context(original=fixed, data=data, task=get_task("classification"))
    with pytest.raises(RecipeError, match="batch_size must be 8, got 64"):
        Finetune().plan(fixed, here)
    assert Finetune(batch_size=8, epochs=1, lr=0.1).plan(fixed, here).edits


@pytest.mark.parametrize(
    ("most", "kept"), [(9, range(9)), (5, (0, 2, 4, 6, 8)), (4, (2, 5, 8)), (3, (2, 5, 8)), (2, (3, 8)), (1, (8,))]
)
def test_sums_are_evenly_spread_with_the_last(most: int, kept: Iterable[int]) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.relu()
            for layer in self.layers:
                x = x + layer(x)
            return x

    x = torch.rand(4, 2)
    network = pj.capture(Deep(), (x,))
    assert list(shared_sums(network, network, (x,), most=most)) == [f"add_{i}" if i else "add" for i in kept]


def test_hints_at_residual_sums() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (
                nn.Conv2d(1, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, padding=1),
            )
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            return self.head((x + self.b(self.a(x).relu())).relu().mean((2, 3)))

    torch.manual_seed(0)
    x = torch.rand(64, 1, 6, 6)
    network = pj.capture(Residual(), (x[:2],))
    recipe = pj.Recipe(
        pj.PruneChannels(ratio=0.5, where="a", reconstruct=False), pj.Finetune(teacher="original", hints=1.0, epochs=30)
    )
    pruned, tuned = (pj.compress(network, pj.Recipe(*recipe.steps[:n]), data=[x]).network for n in (1, 2))
    assert shared_sums(pruned, network, (x,), most=8) == {"add": None}

    def far(other: pj.Network) -> float:
        sums = [exposing(n, ["add"]).run(x)[-1] for n in (network, other)]
        return float((sums[0] - sums[1]).square().mean())

    assert far(tuned) < 0.5 * far(pruned)
    with pytest.raises(RecipeError, match="hints needs a teacher"):
        pj.Finetune(hints=1.0)
    # Of a narrower sum the channels are found again.
    kept = (0, 2, 3, 6, 7)
    gone = tuple(set(range(8)) - set(kept))
    narrow = network.apply([pj.network.RemoveChannels(parameter="stem.weight", dim=0, indices=gone)])
    found = shared_sums(narrow, network, (x,), most=8)["add"]
    assert found is not None and (found[0], tuple(found[1].tolist())) == (1, kept)
    plan = pj.Finetune(teacher="original", hints=1.0).plan(narrow, Context(original=network, data=Data([x])))
    assert plan.edits
    plain = pj.capture(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), (x[:2],))
    with pytest.raises(RecipeError, match="finds no residual sum"):
        pj.Finetune(teacher="original", hints=1.0).plan(plain, Context(original=network, data=Data([x])))
