from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.footprint import footprint
from penjing.analysis.residuals import find_residuals
from penjing.data import Data, digits
from penjing.errors import DataError, PenjingError, RecipeError
from penjing.methods.gradually import Gradually, scheduled
from penjing.network import Network, SetWeights, capture
from penjing.recipe import Context, Plan, Recipe, Step, step
from penjing.task import get_task

TRAIN, TEST = digits("train"), digits("test")
X, Y = TRAIN.tensors[0][:400], TRAIN.tensors[1][:400]
TUNE = pj.Finetune(epochs=0.5, lr=0.02)


@step
@dataclass(frozen=True, kw_only=True)
class LookOn(Step):
    """Changes nothing, and keeps what it sees."""

    seen: ClassVar[list[tuple[Network, Context]]] = []

    def plan(self, network: Network, context: Context) -> Plan:
        self.seen.append((network, context))
        return Plan(step=self)


@step
@dataclass(frozen=True, kw_only=True)
class Spoil(Step):
    """Makes the network answer the same always, the `at`-th time it is asked."""

    count: ClassVar[list[int]] = [0]

    at: int = 1

    def plan(self, network: Network, context: Context) -> Plan:
        self.count[0] += 1
        if self.count[0] < self.at:
            return Plan(step=self)
        name = network.parameter_names[-2]
        return Plan(step=self, edits=(SetWeights(parameter=name, value=torch.zeros_like(network.tensors()[name])),))


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    LookOn.seen.clear()
    Spoil.count[0] = 0
    yield
    LookOn.seen.clear()


class Small(nn.Module):
    """Convolutions with norms, of which one is a residual block: channels, single weights and a block can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.norm(self.stem(x)).relu(), 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.flatten(1))


class Attentive(nn.Module):
    """One encoder layer with eight heads."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 8, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.start, self.head = nn.Linear(8, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.start(x.squeeze(1))).mean(1))


def make_network(model: nn.Module | None = None) -> Network:
    torch.manual_seed(0)
    return capture(Small() if model is None else model, inputs=(X[:2],), name="small")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """From a file: training leaves other orders of memory, in which the last bits are others."""
    recipe = Recipe(pj.Finetune(epochs=2, lr=0.05))
    trained = pj.compress(make_network(), recipe, data=TRAIN, task="classification").network
    return Network.load(trained.save(tmp_path_factory.mktemp("trained") / "network.safetensors"))


def context(network: Network, *, seed: int = 0) -> Context:
    return Context(original=network, data=Data((X, Y)), task=get_task("classification"), seed=seed)


def assert_same(one: Network, other: Network) -> None:
    """Bit for bit, by name, masks with it; outputs but for the order of sums."""
    a, b = one.tensors(), other.tensors()
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert set(one.masks) == set(other.masks)
    assert all(torch.equal(one.masks[n], other.masks[n]) for n in one.masks)
    torch.testing.assert_close(one(X[:8]), other(X[:8]))


def zeros(network: Network) -> float:
    """The share of masked tensors that is zero."""
    return sum(int((~m).sum()) for m in network.masks.values()) / sum(m.numel() for m in network.masks.values())


# ---------------------------------------------------------------------------------------------------------- schedules
def test_cubic_is_what_was_published() -> None:
    """Zhu and Gupta 2017, equation 1: s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³, here from s_i = 0."""
    final, n, dt, begin = 0.9, 5, 100, 200
    published = [
        final + (0 - final) * (1 - (t - begin) / (n * dt)) ** 3 for t in range(begin + dt, begin + n * dt + 1, dt)
    ]
    assert scheduled("cubic", final, n) == pytest.approx(published)
    assert scheduled("cubic", final, n) == pytest.approx([0.4392, 0.7056, 0.8424, 0.8928, 0.9])


def test_other_schedules() -> None:
    assert scheduled("linear", 0.8, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert scheduled("one-shot", 0.8, 3) == [0.8, 0.8, 0.8]
    left = [1 - s for s in scheduled("geometric", 0.9, 6)]
    assert [b / a for a, b in zip([1.0, *left], left, strict=False)] == pytest.approx([0.1 ** (1 / 6)] * 6)


@pytest.mark.parametrize("schedule", ["cubic", "linear", "geometric", "one-shot"])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_every_schedule_rises_and_ends_at_the_whole(schedule: str, rounds: int) -> None:
    shares = scheduled(schedule, 0.37, rounds)
    assert shares[-1] == 0.37 and len(shares) == rounds
    assert shares == sorted(shares) and shares[0] > 0


# ------------------------------------------------------------------------------------------------------------- rounds
def test_weights_go_as_scheduled_and_earlier_masks_stay(network: Network) -> None:
    settings = Gradually(step=pj.PruneWeights(sparsity=0.9), between=LookOn(), rounds=4)
    plan = settings.plan(network, context(network))
    reached = [n for n, _ in LookOn.seen]
    assert [zeros(n) for n in reached] == pytest.approx(settings.shares, abs=1e-3)
    for before, after in zip(reached, reached[1:], strict=False):
        assert all((after.masks[n] <= before.masks[n]).all() for n in before.masks)
    assert_same(network.apply(plan.edits), reached[-1])


@pytest.mark.parametrize(
    "inner",
    [
        pj.PruneChannels(ratio=0.5),
        pj.PruneChannels(keep_macs=0.4),
        pj.PruneWeights(sparsity=0.8, criterion="obc", samples=32, where=["blocks.0", "blocks.1"]),
        pj.PruneHeads(ratio=0.5),
        pj.PruneLayers(ratio=0.5),
    ],
    ids=lambda s: f"{s.name}-{'-'.join(s.settings())}",
)
@pytest.mark.parametrize("between", [None, TUNE], ids=["alone", "tuned"])
def test_one_set_of_edits_gives_what_round_after_round_gives(
    network: Network, inner: Step, between: Step | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle: the very plans that were made, each applied to what the one before gave."""
    start = make_network(Attentive()) if inner.name == "PruneHeads" else network
    plans = recorded(monkeypatch, type(inner), *([type(between)] if between else []))
    plan = Gradually(step=inner, between=between, rounds=3, schedule="linear").plan(start, context(start))
    assert len(plans) == (6 if between else 3)
    now = start
    for made in plans:
        now = now.apply(made.edits)
    assert_same(start.apply(plan.edits), now)
    # Each tensor is set once, however many rounds trained it, and what can go at once does.
    names = [(type(e), e.parameter) for e in plan.edits if not hasattr(e, "node")]
    assert len(names) == len(set(names))


def recorded(monkeypatch: pytest.MonkeyPatch, *kinds: type[Step]) -> list[Plan]:
    """All plans that Steps of these kinds make from now on."""
    plans: list[Plan] = []

    def wrap(kind: type[Step]) -> None:
        original = kind.plan

        def plan(self: Step, network: Network, context: Context) -> Plan:
            plans.append(original(self, network, context))
            return plans[-1]

        monkeypatch.setattr(kind, "plan", plan)

    for kind in kinds:
        wrap(kind)
    return plans


@pytest.mark.parametrize("schedule", ["cubic", "geometric"])
def test_rounding_does_not_add_up(network: Network, schedule: str) -> None:
    """Half of 16 channels, of 8 heads, of 4 blocks is 8, 4 and 2, in however many rounds."""

    def end(start: Network, inner: Step) -> Network:
        rounds = Gradually(step=inner, rounds=5, schedule=schedule)
        return start.apply(rounds.plan(start, context(start)).edits)

    fewer = end(network, pj.PruneChannels(ratio=0.5, reconstruct=False))
    assert fewer.tensors()["stem.weight"].shape[0] == 8
    text = make_network(Attentive())
    heads = [g.size for g in end(text, pj.PruneHeads(ratio=0.5, reconstruct=False)).groups() if g.heads]
    assert heads == [4]
    assert len(find_residuals(end(network, pj.PruneLayers(ratio=0.5)))) == 2


def test_a_budget_is_held_in_every_round(network: Network) -> None:
    settings = Gradually(step=pj.PruneChannels(keep_macs=0.4), between=LookOn(), rounds=3)
    settings.plan(network, context(network))
    left = [footprint(n).macs / footprint(network).macs for n, _ in LookOn.seen]
    for share, got in zip(settings.shares, left, strict=True):
        assert 1 - share - 0.12 < got <= 1 - share


def test_one_round_is_the_step_itself(network: Network) -> None:
    inner = pj.PruneChannels(ratio=0.4)
    plan = Gradually(step=inner, rounds=1).plan(network, context(network))
    torch.manual_seed(0)
    assert_same(network.apply(plan.edits), network.apply(inner.plan(network, context(network)).edits))


def test_one_shot_takes_once_and_recovers_every_round(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = recorded(monkeypatch, pj.PruneWeights)
    settings = Gradually(step=pj.PruneWeights(sparsity=0.7), between=LookOn(), rounds=3, schedule="one-shot")
    settings.plan(network, context(network))
    assert len(plans) == 1
    assert [zeros(n) for n, _ in LookOn.seen] == pytest.approx([0.7] * 3, abs=1e-3)


def test_rounds_draw_their_own_samples_and_nothing_of_the_callers(network: Network) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    Gradually(step=pj.PruneWeights(sparsity=0.5), between=LookOn(), rounds=3).plan(network, context(network, seed=4))
    assert torch.equal(torch.rand(1), expected)
    assert [c.seed for _, c in LookOn.seen] == [4, 5, 6]


def test_masks_of_earlier_steps_survive(network: Network) -> None:
    mask = torch.ones(16, 16, 3, 3, dtype=torch.bool)
    mask[:, :4] = False
    sparse = network.apply([pj.network.MaskWeights(parameter="blocks.0.0.weight", mask=mask)])
    plan = Gradually(step=pj.PruneWeights(sparsity=0.8), between=TUNE, rounds=2).plan(sparse, context(sparse))
    end = sparse.apply(plan.edits)
    assert not end.tensors()["blocks.0.0.weight"][:, :4].any()
    assert (end.masks["blocks.0.0.weight"] <= mask).all()


# -------------------------------------------------------------------------------------------------------------- floor
def test_below_the_floor_the_last_good_round_remains(network: Network) -> None:
    settings = Gradually(
        step=pj.PruneWeights(sparsity=0.9), between=Spoil(at=3), rounds=5, floor="accuracy>=50%", schedule="linear"
    )
    plan = settings.plan(network, context(network))
    assert zeros(network.apply(plan.edits)) == pytest.approx(settings.shares[1], abs=1e-3)
    assert [r.choice for r in plan.reasons[:3]] == ["kept", "kept", "undone"]
    assert Spoil.count == [3]
    assert any("round 3 fell below accuracy>=50%: what round 2 left is the result" in n for n in plan.notes)
    two = replace(settings, between=LookOn(), rounds=2, step=pj.PruneWeights(sparsity=settings.shares[1]))
    assert_same(network.apply(plan.edits), network.apply(two.plan(network, context(network)).edits))


def test_if_the_first_round_fails_nothing_changes(network: Network) -> None:
    settings = Gradually(step=pj.PruneWeights(sparsity=0.9), between=Spoil(), floor="accuracy>=-1%")
    plan = settings.plan(network, context(network))
    assert plan.edits == ()
    assert plan.reasons[0].choice == "undone"
    assert "round 1 fell below accuracy>=-1%: nothing changes" in plan.notes


def test_samples_to_judge_by_are_seen_by_no_step(network: Network) -> None:
    marked = torch.arange(len(Y)).float()  # every sample carries its number
    numbered = X.clone()
    numbered[:, 0, 0, 0] = marked
    judged: list[float] = []

    def scores(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        judged.extend(labels.tolist())
        return torch.ones(len(labels))

    task = replace(get_task("classification"), scores=scores)
    at = Context(original=network, data=Data((numbered, marked.long())), task=task, seed=3)
    Gradually(
        step=pj.PruneWeights(sparsity=0.5), between=LookOn(), rounds=2, floor="accuracy>=-1%", held_out=0.25
    ).plan(network, at)
    assert len(LookOn.seen) == 2
    for _, inner in LookOn.seen:
        assert inner.data is not None
        seen = {int(n) for x, _ in inner.data.batches(64) for n in x[:, 0, 0, 0]}
        assert len(seen) == 300 and not seen & set(judged)
    assert len(set(judged)) == 100


# -------------------------------------------------------------------------------------------- recipes, plans, errors
RECIPE = """
steps:
- Gradually: {step: {PruneWeights: {sparsity: 0.9}}, between: {Finetune: {epochs: 1}}, rounds: 5}
"""


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_recipes_read_and_write_it(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "given.yaml").write_text(RECIPE)
    recipe = Recipe.load(tmp_path / "given.yaml")
    assert recipe == Recipe(Gradually(step=pj.PruneWeights(sparsity=0.9), between=pj.Finetune(epochs=1)))
    assert Recipe.load(recipe.dump(tmp_path / f"again{suffix}")) == recipe
    kept = Gradually(step=pj.PruneChannels(ratio=0.6), floor="accuracy>=1%", held_out=0.3, resume=str(tmp_path))
    full = Recipe(replace(kept, schedule="linear"), pj.Quantize())
    assert Recipe.load(full.dump(tmp_path / f"full{suffix}")) == full


def test_compress_runs_it_and_the_plan_can_be_kept(network: Network, tmp_path: Path) -> None:
    settings = Gradually(step=pj.PruneChannels(ratio=0.5), between=TUNE, rounds=2, floor="accuracy>=-90%")
    result = pj.compress(network, Recipe(settings), data=(X, Y), test=TEST, task="classification")
    (plan,), (row,) = result.plans, result.steps
    assert_same(network.apply(plan.edits), result.network)
    assert_same(network.apply(Plan.load(plan.save(tmp_path / "plan.safetensors")).edits), result.network)
    assert row["after"]["parameters"] < row["before"]["parameters"]
    assert "round 2 of 2" in str(plan)
    assert "8×1×3×3" in next(r.choice for r in plan.reasons if r.layer == "stem.weight")


@pytest.mark.parametrize(
    ("fields", "words", "hint"),
    [
        ({"rounds": 0}, "Gradually.rounds must be a whole number of at least 1, got 0", ""),
        ({"rounds": 2.5}, "Gradually.rounds must be a whole number of at least 1, got 2.5", ""),
        ({"step": pj.PruneChannels()}, "Gradually.step must say what share PruneChannels takes away", "ratio"),
        (
            {"step": pj.Finetune()},
            "Gradually.step must be a Step that takes something away, got Finetune",
            "PruneWeights",
        ),
        ({"step": pj.PruneWeights(pattern="2:4", sparsity=0.5)}, "which sparsity=0.244 contradicts", ""),
        ({"schedule": "cubical"}, "Gradually.schedule must be one of", "cubic"),
        ({"between": "Finetune"}, "Gradually.between must be a Step or nothing, got 'Finetune'", "Finetune"),
        ({"where": "stem"}, "Gradually.where selects nothing", "step"),
        ({"floor": "accuracy"}, "Gradually.floor: cannot read the constraint", "accuracy>=-1%"),
        ({"floor": 0.9}, "Gradually.floor must be a constraint, got 0.9", "accuracy>=91%"),
        ({"floor": "latency<=5ms"}, "Gradually.floor must be about the task's metric", ""),
        ({"floor": "accuracy>=-1%, loss<=1"}, "Gradually.floor is one constraint, got 2", ""),
        ({"floor": "accuracy>=-1%", "held_out": 1.0}, "Gradually.held_out must be below 1", ""),
        ({"held_out": 0.1}, "Gradually.held_out is for a floor", ""),
        ({"resume": Path("here")}, "Gradually.resume must be the path of a folder, as text", ""),
    ],
)
def test_fields_are_checked(fields: dict[str, object], words: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Gradually(**{"step": pj.PruneWeights(sparsity=0.5), **fields})
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


def test_what_is_missing_is_said_before_any_work(network: Network) -> None:
    settings = Gradually(step=pj.PruneWeights(sparsity=0.5), floor="accuracy>=-1%")
    at = context(network)
    cases: list[tuple[Gradually, Context, type[PenjingError], str]] = [
        (settings, replace(at, data=None), DataError, "Gradually.floor needs samples"),
        (settings, replace(at, task=None), RecipeError, "Gradually.floor needs a task"),
        (settings, replace(at, data=Data((X,))), DataError, "Gradually.floor needs labels"),
        (replace(settings, floor="f1>=-1%"), at, RecipeError, "speaks of 'f1', but the metric here is 'accuracy'"),
        (replace(settings, floor="accuracy<=1%"), at, RecipeError, "Gradually.floor must hold accuracy with >="),
        (replace(settings, between=TUNE), replace(at, data=None), DataError, "Finetune needs samples"),
        (settings, replace(at, data=Data((X[:1], Y[:1]))), DataError, "too few"),
    ]
    for asked, given, error, words in cases:
        with pytest.raises(error, match=re.escape(words)):
            asked.plan(network, given)
    with pytest.raises(RecipeError, match="^round 1 of 5: there is no weight"):
        Gradually(step=pj.PruneWeights(sparsity=0.5, where="nothing")).plan(network, at)
    with pytest.raises(RecipeError, match=r"^step 1 \(Gradually\): Gradually\.floor needs a task"):
        pj.compress(network, Recipe(settings), data=(X, Y))


def test_a_metric_that_falls_when_it_gets_better(network: Network) -> None:
    labels = network(X)
    at = Context(original=network, data=Data((X, labels)), task=get_task("regression"))
    plan = Gradually(step=pj.PruneWeights(sparsity=0.9), rounds=5, floor="mse<=0.5").plan(network, at)
    kept = [r.choice for r in plan.reasons if r.layer.startswith("round")]
    assert "undone" in kept and kept[0] == "kept"
