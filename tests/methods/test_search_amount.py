from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import penjing as pj
from penjing.data import Data, digits
from penjing.errors import DataError, PenjingError, RecipeError
from penjing.methods.gradually import Gradually
from penjing.methods.search_amount import SearchAmount
from penjing.network import Network, SetWeights, capture
from penjing.recipe import Context, Plan, Reason, Recipe, Step, step
from penjing.task import Task, get_task

TRAIN, TEST = digits("train"), digits("test")
NUMBERS = torch.arange(60)


@step
@dataclass(frozen=True, kw_only=True)
class Worsen(Step):
    """Takes `amount` away, which costs the metric its `power`; notes which samples it was given."""

    seen: ClassVar[list[tuple[float, set[int]]]] = []
    amounts: ClassVar[Mapping[str, str]] = {"amount": "goes"}

    amount: float | None = None
    power: float = 1.0
    reach: float = 1.0

    def plan(self, network: Network, context: Context) -> Plan:
        assert self.amount is not None and context.data is not None
        samples = {int(n) for x, _ in context.data.batches(7) for n in x[:, 0]}
        self.seen.append((self.amount, samples))
        if self.amount > self.reach:
            raise RecipeError(f"Worsen cannot take {self.amount:g}")
        value = torch.tensor([1 - self.amount**self.power])
        reasons = (Reason(layer="bias", choice="lower"),)
        return Plan(step=self, edits=(SetWeights(parameter="bias", value=value),), reasons=reasons)


@step
@dataclass(frozen=True, kw_only=True)
class Mend(Step):
    """Gives a tenth back."""

    def plan(self, network: Network, context: Context) -> Plan:
        return Plan(step=self, edits=(SetWeights(parameter="bias", value=network.tensors()["bias"].detach() + 0.1),))


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Worsen.seen.clear()
    yield
    Worsen.seen.clear()


class Flat(nn.Module):
    """Answers its bias, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 + self.bias


@pytest.fixture(scope="module")
def flat() -> Network:
    return capture(Flat(), inputs=(torch.rand(2, 1),), name="flat")


def as_answered(outputs: Any, labels: Any) -> Tensor:
    judged.append(set(labels.tolist()))
    return outputs[:, 0]


judged: list[set[int]] = []
TASK = Task(name="own", loss=lambda o, y: o.mean(), scores=as_answered, metric="answer", unit="%")


def context(network: Network, *, samples: int = 60, task: Task | None = TASK, seed: int = 0) -> Context:
    numbers = NUMBERS[:samples]
    return Context(original=network, data=Data((numbers[:, None].float(), numbers)), task=task, seed=seed)


def amount_of(plan: Plan) -> float:
    """What the Plan takes from the network that answers 1."""
    (edit,) = plan.edits
    assert isinstance(edit, SetWeights)
    return 1 - float(edit.value)


# ------------------------------------------------------------------------------------------------------------- search
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_bisection_finds_what_a_fine_grid_finds(flat: Network, power: float) -> None:
    edge = 0.311 ** (1 / power)
    inner = Worsen(amount=0.9, power=power)
    fine = SearchAmount(step=inner, floor="answer>=-31.1%", method="grid", trials=150)
    found = amount_of(fine.plan(flat, context(flat))) ** (1 / power)
    assert edge - 0.9 / 150 < found <= edge + 1e-6
    Worsen.seen.clear()
    halved = SearchAmount(step=inner, floor="answer>=-31.1%", trials=10).plan(flat, context(flat))
    assert len(Worsen.seen) == 10
    amount = amount_of(halved) ** (1 / power)
    assert edge - 0.9 / 2**9 <= amount <= edge + 1e-6
    assert abs(amount - found) <= 0.9 / 150
    assert amount == pytest.approx(max(r.score or 0 for r in halved.reasons if r.choice == "holds"))


def test_bisection_on_real_weights() -> None:
    """The largest amount that holds, by hand on the same held-out samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    network = capture(model, inputs=(torch.rand(2, 1, 8, 8),))
    network = pj.compress(network, Recipe(pj.Finetune(epochs=8, lr=0.1)), data=TRAIN, task="classification").network
    inner = pj.PruneWeights(sparsity=0.96)
    at = Context(original=network, data=Data(TEST), task=get_task("classification"))
    ((_, held),) = Data(TEST).split([0.5], seed=0)
    ((x, y),) = held.batches(1000)

    def accuracy(net: Network) -> float:
        return float((net(x).argmax(1) == y).float().mean())

    settings = SearchAmount(step=inner, floor="accuracy>=-4.9%", held_out=0.5, trials=8)
    plan = settings.plan(network, at)
    found = network.apply(plan.edits)
    assert accuracy(found) >= accuracy(network) - 0.049
    grid = [0.96 * i / 128 for i in range(1, 129)]  # what eight halvings can reach
    hold = [accuracy(network.apply(inner.taking(a).plan(network, at).edits)) >= accuracy(network) - 0.049 for a in grid]
    amount = max(r.score or 0 for r in plan.reasons if r.choice == "holds")
    place = grid.index(pytest.approx(amount))
    assert hold[place] and not hold[place + 1]
    zero = sum(int((~m).sum()) for m in found.masks.values()) / sum(m.numel() for m in found.masks.values())
    assert zero == pytest.approx(amount, abs=1e-3)


def test_all_of_it_if_all_of_it_holds(flat: Network) -> None:
    plan = SearchAmount(step=Worsen(amount=0.2), floor="answer>=-31.1%").plan(flat, context(flat))
    assert amount_of(plan) == pytest.approx(0.2)
    assert len(Worsen.seen) == 1
    assert "0.2 of at most 0.2 holds answer>=-31.1%: Worsen(amount=0.2)" in plan.notes


def test_resolution_ends_it(flat: Network) -> None:
    settings = SearchAmount(step=Worsen(amount=0.8), floor="answer>=-31.1%", trials=50, resolution=0.1)
    settings.plan(flat, context(flat))
    assert [a for a, _ in Worsen.seen] == pytest.approx([0.8, 0.4, 0.2, 0.3])
    settings = SearchAmount(step=Worsen(amount=0.8), floor="answer>=-31.1%", trials=1000)
    Worsen.seen.clear()
    settings.plan(flat, context(flat))
    assert len(Worsen.seen) == 11  # 0.8 halved ten times is less than a thousandth of it


def test_a_grid_goes_down_until_one_holds(flat: Network) -> None:
    settings = SearchAmount(step=Worsen(amount=0.8), floor="answer>=-31.1%", method="grid", trials=8)
    plan = settings.plan(flat, context(flat))
    assert [a for a, _ in Worsen.seen] == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert [r.choice for r in plan.reasons] == ["does not hold"] * 5 + ["holds", "lower"]
    assert plan.reasons[0].why == "answer 100.00% → 20.00%"


@pytest.mark.parametrize("method", ["bisection", "grid"])
def test_if_none_holds_nothing_changes_and_the_plan_says_so(flat: Network, method: str) -> None:
    settings = SearchAmount(step=Worsen(amount=0.8), floor="answer>=99.9%", method=method, trials=4)
    plan = settings.plan(flat, context(flat))
    assert plan.edits == ()
    least = {"bisection": "0.1", "grid": "0.2"}[method]
    assert plan.notes == (f"no amount from {least} to 0.8 holds answer>=99.9%: nothing changes",)
    assert [r.choice for r in plan.reasons] == ["does not hold"] * 4


def test_what_comes_after_is_judged_with_it_and_part_of_the_plan(flat: Network) -> None:
    settings = SearchAmount(step=Worsen(amount=0.8), floor="answer>=-31.1%", after=Mend(), method="grid", trials=8)
    plan = settings.plan(flat, context(flat))
    assert Worsen.seen[-1][0] == pytest.approx(0.4)
    assert float(flat.apply(plan.edits)(torch.ones(1, 1))) == pytest.approx(0.7)


def test_what_cannot_be_reached_does_not_hold(flat: Network) -> None:
    settings = SearchAmount(step=Worsen(amount=0.8, reach=0.25), floor="answer>=-31.1%", trials=6)
    plan = settings.plan(flat, context(flat))
    assert 0.2 < amount_of(plan) <= 0.25
    assert plan.reasons[0].why == "Worsen cannot take 0.8"
    with pytest.raises(RecipeError, match="^Worsen cannot take 0.025"):
        replace(settings, step=Worsen(amount=0.8, reach=0.0)).plan(flat, context(flat))


@pytest.mark.parametrize("folds", [1, 2])
def test_it_searches_for_what_rounds_reach(flat: Network, tmp_path: Path, folds: int) -> None:
    """How much can go gradually: a Gradually's amount is its step's; a folder to resume belongs to one run."""
    inner = Gradually(step=Worsen(amount=0.8), rounds=2, schedule="one-shot", resume=str(tmp_path / "run"))
    settings = SearchAmount(step=inner, floor="answer>=-31.1%", method="grid", trials=8, folds=folds)
    plan = settings.plan(flat, context(flat))
    assert amount_of(plan) == pytest.approx(0.3)
    assert plan.reasons[0].why.startswith("answer 100.00% → 20.00%")
    whole = replace(inner, step=Worsen(amount=0.2), resume=str(tmp_path / "whole"))
    assert amount_of(replace(settings, step=whole).plan(flat, context(flat))) == pytest.approx(0.2)


# ----------------------------------------------------------------------------------------------------- held-out samples
def test_held_out_samples_never_reach_the_step(flat: Network) -> None:
    judged.clear()
    SearchAmount(step=Worsen(amount=0.8), floor="answer>=-31.1%", held_out=0.25, trials=3).plan(flat, context(flat))
    held = set.union(*judged)
    assert len(held) == 15
    for _, seen in Worsen.seen:
        assert seen == set(range(60)) - held


@pytest.mark.parametrize("seed", [0, 1])
def test_folds_never_leak(flat: Network, seed: int) -> None:
    settings = SearchAmount(step=Worsen(amount=0.2), floor="answer>=-31.1%", folds=4, trials=1)
    judged.clear()
    settings.plan(flat, context(flat, seed=seed))
    before, after = judged[:4], judged[4:]  # the network as it came, and what the trial made, fold after fold
    assert before == after
    assert sorted(n for fold in after for n in fold) == list(range(60))
    trial, (last,) = Worsen.seen[:4], Worsen.seen[4:]
    for (_, seen), held in zip(trial, after, strict=True):
        assert len(held) == 15 and not seen & held and seen | held == set(range(60))
    assert last == (0.2, set(range(60)))  # then with all


def test_the_mean_over_folds_counts_and_its_error_is_noted(flat: Network) -> None:
    """Folds of which some fall below the floor: the mean is above, just so."""
    numbers = torch.arange(60)
    task = replace(TASK, scores=lambda o, y: o[:, 0] - 0.1 * (y < 15).float())
    data = Data((numbers[:, None].float(), numbers))
    at = Context(original=flat, data=data, task=task)
    folds = [h for _, h in data.split([0.25] * 4, seed=0)]
    scores = [0.8 - 0.1 * statistics.fmean(float(n < 15) for x, _ in h.batches(60) for n in x[:, 0]) for h in folds]
    assert min(scores) < 0.775 - 1e-3
    settings = SearchAmount(step=Worsen(amount=0.2), floor="answer>=77.49%", folds=4, trials=1)
    plan = settings.plan(flat, at)
    assert plan.edits
    error = statistics.stdev(scores) / 2
    assert plan.reasons[0].why == f"answer 97.50% → 77.50% ± {error:.2%} (standard error of 4 folds)"
    assert not replace(settings, floor="answer>=77.51%").plan(flat, at).edits


def test_the_same_seed_gives_the_same_and_the_callers_draws_stay(flat: Network) -> None:
    settings = SearchAmount(step=Worsen(amount=0.8), floor="answer>=-31.1%", folds=3)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = settings.plan(flat, context(flat))
    assert torch.equal(torch.rand(1), expected)
    assert str(first) == str(settings.plan(flat, context(flat)))


def test_a_network_of_a_fixed_batch_is_judged_on_every_sample(flat: Network) -> None:
    fixed = capture(Flat(), inputs=(torch.rand(8, 1),), dynamic_batch=False)
    judged.clear()
    SearchAmount(step=Worsen(amount=0.2), floor="answer>=-31.1%", held_out=0.5).plan(fixed, context(fixed))
    assert len(set.union(*judged)) == 30  # three whole batches and six


# -------------------------------------------------------------------------------------------------- recipes and errors
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_recipes_read_and_write_it(tmp_path: Path, suffix: str) -> None:
    recipe = Recipe(
        SearchAmount(
            step=pj.PruneChannels(keep_macs=0.3),
            floor="accuracy>=-1%",
            after=pj.Finetune(epochs=1),
            folds=5,
            resolution=0.02,
        ),
        SearchAmount(step=Gradually(step=pj.PruneWeights(sparsity=0.9)), floor="accuracy>=91%", method="grid"),
    )
    assert Recipe.load(recipe.dump(tmp_path / f"recipe{suffix}")) == recipe


def test_compress_runs_it(flat: Network, tmp_path: Path) -> None:
    numbers = (NUMBERS[:, None].float(), NUMBERS)
    settings = SearchAmount(step=Worsen(amount=0.8), floor="answer>=-31.1%", method="grid", trials=8)
    result = pj.compress(flat, Recipe(settings), data=numbers, test=numbers, task=TASK)
    assert result.steps[0]["after"]["metric"]["value"] == pytest.approx(0.7)
    again = Plan.load(result.plans[0].save(tmp_path / "plan.safetensors"))
    assert str(again) == str(result.plans[0])
    with pytest.raises(RecipeError, match=r"^step 1 \(SearchAmount\): SearchAmount.floor: .* speaks of 'accuracy'"):
        pj.compress(flat, Recipe(replace(settings, floor="accuracy>=-1%")), data=numbers, task=TASK)


@pytest.mark.parametrize("floor", ["accuracy>=-1", "accuracy>=-200%", "accuracy>=2"])
def test_floors_out_of_reach_are_refused(floor: str) -> None:
    network = pj.capture(torch.nn.Linear(4, 3), inputs=(torch.rand(2, 4),))
    data = pj.data.Data((torch.rand(8, 4), torch.zeros(8, dtype=torch.long)))
    step = SearchAmount(step=pj.PruneWeights(sparsity=0.5), floor=floor)
    with pytest.raises(RecipeError, match="floor is out of reach"):
        step.check(Context(original=network, data=data, task=get_task("classification")))


@pytest.mark.parametrize(
    ("fields", "words", "hint"),
    [
        ({"folds": 1.5}, "SearchAmount.folds must be a whole number of at least 1, got 1.5", ""),
        ({"folds": 0}, "SearchAmount.folds must be a whole number of at least 1, got 0", ""),
        ({"trials": 0}, "SearchAmount.trials must be a whole number of at least 1, got 0", ""),
        ({"folds": 3, "held_out": 0.2}, "SearchAmount takes either folds or held_out, got both", "1/k"),
        ({"method": "bisect"}, "SearchAmount.method must be one of", "bisection"),
        ({"method": "grid", "resolution": 0.1}, "SearchAmount.resolution ends a bisection", ""),
        ({"resolution": 0}, "SearchAmount.resolution must be between 0 and 1, got 0", ""),
        ({"step": pj.PruneWeights()}, "SearchAmount.step must say what share PruneWeights takes away", "sparsity"),
        ({"step": pj.Quantize()}, "SearchAmount.step must be a Step that takes something away", "PruneChannels"),
        ({"after": 3}, "SearchAmount.after must be a Step or nothing, got 3", ""),
        ({"where": "x"}, "SearchAmount.where selects nothing", "step"),
        ({"floor": None}, "SearchAmount.floor must be a constraint, got None", "accuracy>=-1%"),
        ({"floor": "size<=2MB"}, "SearchAmount.floor must be about the task's metric", ""),
        ({"floor": "acuracy>=-1%"}, "did you mean 'accuracy'", ""),
    ],
)
def test_fields_are_checked(fields: dict[str, object], words: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        SearchAmount(**{"step": pj.PruneWeights(sparsity=0.5), "floor": "accuracy>=-1%", **fields})  # type: ignore[arg-type]
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_recipe_without_a_floor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("steps: [{SearchAmount: {step: {PruneWeights: {sparsity: 0.9}}}}]")
    with pytest.raises(RecipeError, match="SearchAmount needs the field 'floor'"):
        Recipe.load(tmp_path / "r.yaml")


def test_what_is_missing_is_said_before_any_work(flat: Network) -> None:
    settings = SearchAmount(step=Worsen(amount=0.5), floor="answer>=-1%")
    at = context(flat)
    unlabelled = Data((torch.rand(8, 1),))
    cases: list[tuple[SearchAmount, Context, type[PenjingError], str]] = [
        (settings, replace(at, data=None), DataError, "SearchAmount.floor needs samples to judge by"),
        (settings, replace(at, task=None), RecipeError, "SearchAmount.floor needs a task"),
        (settings, replace(at, data=unlabelled), DataError, "SearchAmount.floor needs labels"),
        (replace(settings, floor="answer<=1%"), at, RecipeError, "SearchAmount.floor must hold answer with >="),
        (replace(settings, folds=9), context(flat, samples=5), DataError, "too few"),
    ]
    for asked, given, error, words in cases:
        with pytest.raises(error, match=re.escape(words)):
            asked.plan(flat, given)
    assert not Worsen.seen
