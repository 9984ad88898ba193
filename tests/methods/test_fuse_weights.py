from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analysis.fusing import fit, restated
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.methods.fuse_weights import FuseWeights
from penjing.network import MaskWeights, Network, RemoveChannels, SetWeights, capture
from penjing.recipe import Context, Plan, Recipe
from penjing.recipe.judging import scores_of
from penjing.task import get_task

X = torch.randn(240, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(240) % 3
X[torch.arange(240), Y] += 0.7
TASK = get_task("classification")
assert TASK is not None


class Blocks(nn.Module):
    """A residual network of any width and depth: blocks of one name are the same layers."""

    def __init__(self, width: int, depth: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
                          nn.Conv2d(2 * width, width, 1))
            for _ in range(depth)
        )  # fmt: skip
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def network(width: int, depth: int, seed: int = 0, name: str = "net") -> Network:
    return capture(Blocks(width, depth, seed), inputs=(X[:2],), name=name)


def context(original: Network, *, labels: bool = True, data: bool = True, **teachers: Network) -> Context:
    samples = Data((X, Y)) if labels else Data(X)
    held = {name: (n,) for name, n in teachers.items()}
    return Context(original=original, data=samples if data else None, task=TASK if labels else None, teachers=held)


def accuracy(n: Network) -> float:
    return float(scores_of(n, Data((X, Y)), TASK).mean())  # type: ignore[arg-type]


def trained(start: Network, seed: int = 0, epochs: float = 6, lr: float = 0.1) -> Network:
    step = pj.Finetune(epochs=epochs, lr=lr, batch_size=32)
    return pj.compress(start, Recipe(step), data=(X, Y), task="classification", seed=seed).network


@pytest.fixture(scope="module")
def teacher() -> Network:
    return trained(network(8, 3, name="teacher"))


def test_layers_of_one_name_and_shape_are_taken_over(teacher: Network) -> None:
    student = network(8, 2, seed=9)
    plan = FuseWeights(source="big").plan(student, context(student, data=False, big=teacher))
    made = student.apply(plan.edits)
    assert all(torch.equal(t, teacher.tensors()[n]) for n, t in made.tensors().items())
    assert plan.notes == (f"{len(made.tensors())} of {len(made.tensors())} tensors start from the source",)
    only = student.apply(FuseWeights(source="big", where="stem").plan(student, context(student, big=teacher)).edits)
    changed = {n for n, t in only.tensors().items() if not torch.equal(t, student.tensors()[n])}
    assert changed == {"stem.weight", "stem.bias"}


def test_a_wider_teacher_is_cut_as_pruning_would(teacher: Network) -> None:
    """The slices are those of the teacher without its smallest channels, everywhere the same ones."""
    student = network(5, 3, seed=9)
    plan = FuseWeights(source="big").plan(student, context(student, data=False, big=teacher))
    assert {r.choice for r in plan.reasons} == {"5/8 channels", "10/16 channels"}
    mine, whole = student.apply(plan.edits).tensors(), teacher.tensors()

    def kept(name: str) -> list[int]:
        """The teacher's channels that stay, by their biases, which are all different."""
        return [whole[name].tolist().index(value) for value in mine[name].tolist()]

    stream = kept("stem.bias")
    assert len(stream) == 5 and stream == sorted(stream) == kept("blocks.1.3.bias")
    assert torch.equal(mine["stem.weight"], whole["stem.weight"][stream])
    assert torch.equal(mine["head.weight"], whole["head.weight"][:, stream])
    for block in range(3):
        inner = kept(f"blocks.{block}.0.bias")
        assert torch.equal(mine[f"blocks.{block}.0.weight"], whole[f"blocks.{block}.0.weight"][inner][:, stream])
        assert torch.equal(mine[f"blocks.{block}.1.running_var"], whole[f"blocks.{block}.1.running_var"][inner])
        assert torch.equal(mine[f"blocks.{block}.3.weight"], whole[f"blocks.{block}.3.weight"][stream][:, inner])


def test_matched_channels_are_those_it_was_made_of(teacher: Network) -> None:
    """Pruned and trained on, a network finds its own channels again, whatever their norms."""
    gone = (0, 3, 7)
    pruned = teacher.apply([RemoveChannels(parameter="stem.weight", dim=0, indices=gone)])
    student = trained(pruned, epochs=1, lr=0.02)
    found = fit(student, teacher, X[:64])
    assert not found.left and all(how == "the most alike" for _, _, how in found.kept.values())
    for name, value in found.tensors.items():
        assert torch.equal(value, pruned.tensors()[name]), name


def test_interpolation_is_never_worse_on_what_it_was_chosen_on(teacher: Network) -> None:
    noise = torch.Generator().manual_seed(0)
    off = {n: t.detach() + 0.3 * torch.randn(t.shape, generator=noise) for n, t in teacher.tensors().items()}
    student = teacher.apply(SetWeights(parameter=n, value=off[n]) for n in teacher.parameter_names)
    plan = FuseWeights(how="interpolate").plan(student, context(teacher))
    scores = {r.layer: r.score for r in plan.reasons}
    best = next(r for r in plan.reasons if r.choice == "best")
    assert len(scores) == 11 and best.score == max(s for s in scores.values() if s is not None)
    assert accuracy(student.apply(plan.edits)) >= accuracy(student)
    # Without labels it goes by outputs: the original's own weights are nearest to its outputs.
    unlabelled = FuseWeights(how="interpolate").plan(student, context(teacher, labels=False))
    assert next(r.layer for r in unlabelled.reasons if r.choice == "best") == "100% of the source"
    half = FuseWeights(how="interpolate", weight=0.5).plan(student, context(teacher, data=False))
    made = student.apply(half.edits)
    for name in teacher.parameter_names:
        wanted = (teacher.tensors()[name] + student.tensors()[name]) / 2
        assert torch.allclose(made.tensors()[name], wanted, atol=1e-6)


def test_what_is_not_mixed_is_not_touched(teacher: Network) -> None:
    """With few samples statistics taken anew are worse: the network as it came, and a whole source, keep theirs."""
    few = Context(original=teacher, data=Data((X[:30], Y[:30])), task=TASK, teachers={"same": (teacher,)})
    for how in ("interpolate", "greedy"):
        assert FuseWeights(source="same", how=how).plan(teacher, few).edits == ()
    assert FuseWeights(how="interpolate", weight=0.0).plan(network(8, 3, seed=5), few).edits == ()
    bad = teacher.apply(SetWeights(parameter=n, value=-teacher.tensors()[n].detach()) for n in teacher.parameter_names)
    for plan in (
        FuseWeights(how="interpolate", weight=1.0).plan(bad, few),
        FuseWeights(how="greedy").plan(bad, few),
    ):
        made = bad.apply(plan.edits).tensors()
        assert all(torch.equal(t, made[n]) for n, t in teacher.tensors().items())


def test_soups(teacher: Network) -> None:
    others = {f"run{seed}": trained(teacher, seed=seed, epochs=1) for seed in (1, 2)}
    bad = teacher.apply(SetWeights(parameter=n, value=-teacher.tensors()[n].detach()) for n in teacher.parameter_names)
    here = context(teacher, bad=bad, **others)
    uniform = FuseWeights(how="soup", source=["run1", "run2"]).plan(teacher, here)
    made = teacher.apply(uniform.edits)
    every = [teacher, *others.values()]
    for name in teacher.parameter_names:
        wanted = torch.stack([n.tensors()[name].detach() for n in every]).mean(0)
        assert torch.allclose(made.tensors()[name], wanted, atol=1e-6)
    plan = FuseWeights(how="greedy", source=["bad", "run1", "run2"]).plan(bad, here)
    choices = {r.layer: r.choice for r in plan.reasons}
    assert choices["this network"] == choices["source 1"] == "left out"
    assert accuracy(bad.apply(plan.edits)) >= min(accuracy(n) for n in others.values()) - 0.02 > accuracy(bad)


def test_statistics_are_those_of_the_samples() -> None:
    net = network(4, 1)
    moved = net.apply([SetWeights(parameter="stem.weight", value=3 * net.tensors()["stem.weight"].detach())])
    edits = {e.parameter: e.value for e in restated(moved, [X[:60], X[60:120]], moved.tensors())}
    inner = nn.functional.conv2d(
        nn.functional.conv2d(X[:120], moved.tensors()["stem.weight"], moved.tensors()["stem.bias"], padding=1).relu(),
        moved.tensors()["blocks.0.0.weight"], moved.tensors()["blocks.0.0.bias"], padding=1,
    )  # fmt: skip
    assert torch.allclose(edits["blocks.0.1.running_mean"], inner.mean((0, 2, 3)), atol=1e-4)
    parts = torch.stack([inner[:60].var((0, 2, 3)), inner[60:].var((0, 2, 3))]).mean(0)
    assert torch.allclose(edits["blocks.0.1.running_var"], parts, rtol=1e-3)


def test_masks_hold(teacher: Network) -> None:
    student = network(8, 3, seed=4)
    mask = torch.rand(8, 3, 3, 3) > 0.5
    masked = student.apply([MaskWeights(parameter="stem.weight", mask=mask)])
    made = masked.apply(FuseWeights(source="big").plan(masked, context(masked, data=False, big=teacher)).edits)
    assert torch.equal(made.tensors()["stem.weight"], teacher.tensors()["stem.weight"] * mask)


def test_a_shallower_network_takes_statistics_of_its_own(teacher: Network) -> None:
    student = network(8, 2, seed=9)
    made = student.apply(FuseWeights(source="big").plan(student, context(student, big=teacher)).edits).tensors()
    whole = teacher.tensors()
    assert torch.equal(made["blocks.1.0.weight"], whole["blocks.1.0.weight"])
    assert torch.equal(made["head.weight"], whole["head.weight"])
    # Statistics are its own where samples tell: the first block sees what the teacher's saw, at the end of training.
    assert not torch.equal(made["blocks.1.1.running_mean"], whole["blocks.1.1.running_mean"])
    assert torch.allclose(made["blocks.0.1.running_mean"], whole["blocks.0.1.running_mean"], atol=0.3)


def test_a_fused_start_is_ahead(teacher: Network) -> None:
    student = network(6, 2, seed=9)
    fused = student.apply(FuseWeights(source="big").plan(student, context(student, big=teacher)).edits)
    short = {"epochs": 0.5, "lr": 0.02}
    assert accuracy(trained(fused, **short)) > accuracy(trained(student, **short))  # type: ignore[arg-type]


def test_names_may_begin_otherwise(teacher: Network) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Blocks(8, 3, seed=7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x - 0.5)

    student = capture(Wrapped(), inputs=(X[:2],))
    made = student.apply(FuseWeights(source="big").plan(student, context(student, data=False, big=teacher)).edits)
    assert torch.equal(made.tensors()["net.head.weight"], teacher.tensors()["head.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"how": "mean"}, "FuseWeights.how must be one of"),
        ({"channels": "l2"}, "FuseWeights.channels must be one of"),
        ({"weight": 2, "how": "interpolate"}, "FuseWeights.weight must be between 0 and 1"),
        ({"weight": 0.5}, "belongs to how='interpolate'"),
        ({"source": []}, "source is empty"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        FuseWeights(**fields)


def test_what_does_not_fit_is_said(teacher: Network) -> None:
    def plan(net: Network, here: Context, **fields: Any) -> Plan:
        return FuseWeights(**fields).plan(net, here)

    student = network(5, 3, seed=9)
    with pytest.raises(RecipeError, match="no network called 'big'"):
        plan(student, context(student), source="big")
    with pytest.raises(RecipeError, match="takes one source, got 2"):
        plan(teacher, context(teacher, a=teacher, b=teacher), source=["a", "b"], how="interpolate")
    with pytest.raises(DataError, match="no data was given"):
        plan(teacher, context(teacher, data=False), how="greedy")
    with pytest.raises(RecipeError, match="cannot tell which channels"):
        plan(student, context(teacher, data=False), how="interpolate", weight=0.5)
    plain = capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), inputs=(X[:2],), name="plain")
    with pytest.raises(RecipeError, match="have no layer in common"):
        plan(student, context(student, plain=plain), source="plain")
    small = pj.compress(teacher, Recipe(pj.Quantize()), data=X).network
    with pytest.raises(RecipeError, match="a network is quantized"):
        plan(small, context(teacher))


def test_it_reads_and_writes_itself() -> None:
    recipe = Recipe(FuseWeights(source=["a", "b"], how="greedy", held_out=0.1))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
