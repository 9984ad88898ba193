"""Trainings that are cut off anywhere, go on, and end as if nothing had happened."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import RecipeError
from penjing.network import Network
from penjing.training import Batch, Checkpoint, Monitor, Trained, Training, call, checkpoint, train

X = torch.randn(90, 6, generator=torch.Generator().manual_seed(3))
Y = X @ torch.randn(6, 2, generator=torch.Generator().manual_seed(4))


Result = tuple[Trained, dict[str, torch.Tensor]]


class Cut(Exception):
    """Stands for a kill."""


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


def batches(epoch: int) -> Iterator[Batch]:
    """Six batches, which also draw from all generators that a data set may use."""
    order = torch.randperm(90)
    for chosen in order.split(15):
        yield X[chosen] + 0.1 * torch.randn(15, 6) + 0.1 * np.random.randn(), Y[chosen]


class Loss:
    """The squared error, of which the call number `at` ends everything."""

    def __init__(self, at: float = math.inf, end: type[Exception] | int = Cut) -> None:
        self.left, self.end = at, end

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        self.left -= 1
        if self.left == 0 and isinstance(self.end, int):
            os.kill(os.getpid(), self.end)
        elif self.left == 0:
            raise self.end
        return (call(module, batch[0]) - batch[1]).square().mean()


def held_out(module: nn.Module) -> float:
    assert not module.training
    return float((module(X) - Y).square().mean())


def after_step(module: nn.Module, share: float, rate: float) -> None:
    with torch.no_grad():
        module.get_parameter("0.weight").mul_(1 - 0.01 * share)


WAYS = {
    "sgd": {},
    "adamw": {"training": Training(epochs=4, lr=0.02, optimizer="adamw", average=0.8)},
    "accumulated": {"training": Training(epochs=4, lr=0.02, accumulate=4)},
    "monitored": {
        "training": Training(epochs=4, lr=0.3, average=0.5),
        "monitor": Monitor(metric="error", measure=held_out, higher_is_better=False, patience=2),
    },
}


def trained(loss: Loss, file: Path | None, **more: object) -> Result:
    module, settings = model(), {"training": Training(epochs=4, lr=0.02), **more}
    done = train(
        module,
        batches,
        loss,
        **settings,  # type: ignore[arg-type]
        steps_per_epoch=6,
        after_step=after_step,
        checkpoint=Checkpoint(file) if file else None,
    )
    return done, module.state_dict()


def assert_same(found: Result, expected: Result) -> None:
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][n], expected[1][n]) for n in expected[1])


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "_MOST", 0)


@pytest.mark.parametrize("way", WAYS)
def test_a_training_that_was_cut_off_ends_as_one_that_was_not(way: str, tmp_path: Path, every_step: None) -> None:
    expected = trained(Loss(), None, **WAYS[way])
    for number, stops in enumerate([(1,), (2, 3, 1), (7,), (8, 12), (24,)]):
        file = tmp_path / f"{number}.safetensors"
        for stop in stops:
            with pytest.raises(Cut):
                trained(Loss(stop), file, **WAYS[way])
        assert_same(trained(Loss(), file, **WAYS[way]), expected)
        assert_same(trained(Loss(at=1), file, **WAYS[way]), expected)  # it has ended: nothing is asked for again


@pytest.mark.parametrize("at", [1, 2, 4])
def test_cut_off_while_the_metric_is_measured(at: int, tmp_path: Path, every_step: None) -> None:
    calls = [0]

    def measure(module: nn.Module) -> float:
        calls[0] += 1
        if calls[0] == at:
            raise Cut
        return held_out(module)

    monitor = Monitor(metric="error", measure=held_out, higher_is_better=False)
    expected = trained(Loss(), None, monitor=monitor)
    with pytest.raises(Cut):
        trained(Loss(), tmp_path / "some.safetensors", monitor=replace(monitor, measure=measure))
    assert_same(trained(Loss(), tmp_path / "some.safetensors", monitor=monitor), expected)


def test_a_checkpoint_changes_nothing_and_is_not_written_all_the_time(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    with pytest.raises(Cut):
        trained(Loss(20), file)
    assert not file.exists()  # half a minute has not passed
    assert_same(trained(Loss(), file), trained(Loss(), None))
    assert file.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint(number: int, tmp_path: Path) -> None:
    """In a process of its own: a signal that is not caught ends it."""
    call = f"test_checkpoint.interrupted({int(number)}, pathlib.Path({str(tmp_path)!r}))"
    script = f"import pathlib, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_checkpoint; {call}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def interrupted(number: int, folder: Path) -> None:
    class Terminated(BaseException):
        pass

    def terminated(number: int, frame: object) -> None:
        raise Terminated

    # A suite started in the background hands down an ignored SIGINT, which Python then leaves ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminated)
    file = folder / "some.safetensors"
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
        trained(Loss(11, number), file)
    assert signal.getsignal(signal.SIGTERM) is terminated
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    counting = Loss()
    counting.left = 0
    assert_same(trained(counting, file), trained(Loss(), None))
    assert counting.left == -13  # 24 steps, of which 11 were done


def test_a_damaged_checkpoint_is_said(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(RecipeError, match=r"checkpoint .*some\.safetensors cannot be read") as caught:
        trained(Loss(), file)
    assert caught.value.hint == "delete it to train anew"


# --------------------------------------------------------------------------------------------------- whole recipes
class Varied(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images that are others whenever they are looked at, by the generators of torch and numpy."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(index))
        return image + 0.1 * torch.randn(1, 6, 6) + float(np.random.rand()), int(image.mean() > 0)


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 2))
    return pj.capture(nn.Sequential(*layers), inputs=(torch.randn(2, 1, 6, 6),))


TUNE = pj.Finetune(epochs=5, batch_size=8, accumulate=2, average=0.9, held_out=0.2, augment="flip-crop")
RECIPE = pj.Recipe(
    pj.PruneWeights(sparsity=0.5),
    TUNE,
    pj.Regularize(step=pj.PruneChannels(ratio=0.5), train=replace(TUNE, epochs=2, teacher="original")),
)


def compressed(start: Network, folder: Path | None) -> Network:
    return pj.compress(start, RECIPE, data=Varied(), task="classification", seed=3, resume=folder).network


class Cutting:
    """Progress that ends everything at the `at`-th step of training."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.steps, self.notes = at, 0, list[str]()

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield self.advance if description.startswith(("fine-tuning", "distilling")) else lambda n: None

    def advance(self, n: int) -> None:
        self.steps += 1
        if self.steps == self.at:
            raise Cut

    def note(self, text: str) -> None:
        self.notes.append(text)


QUANTIZED = pj.TrainQuantized(weights="int4", lower=["int8"], finetune=replace(TUNE, average=0.0, epochs=3))
ROUNDS = pj.Gradually(step=pj.PruneChannels(ratio=0.5), between=replace(TUNE, epochs=1), rounds=3)
PEER = pj.Distill(epochs=3, batch_size=8, teacher=["original", "self"], mutual=["peer"], features="auto", held_out=0.3)
KEPT = pj.Distill(epochs=3, batch_size=8, alpha=0.5, average=0.9, patience=2)
NESTED = {
    "among others": pj.Recipe(pj.PruneChannels(ratio=0.5), PEER),
    "by answers that are kept": pj.Recipe(pj.PruneWeights(sparsity=0.5), KEPT),
    "for few bytes, by answers": pj.Recipe(pj.TrainLowEntropy(finetune=replace(PEER, held_out=None))),
    "one after another": RECIPE,
    "some channels pay": pj.Recipe(replace(RECIPE.steps[2], train=pj.Finetune(epochs=1, batch_size=10, lr=0.1))),
    "all channels pay": pj.Recipe(replace(RECIPE.steps[2], penalty="group-lasso", strength=0.1)),
    "on grids": pj.Recipe(QUANTIZED),
    "in rounds": pj.Recipe(ROUNDS),
}


@pytest.mark.parametrize("name", NESTED)
def test_trainings_inside_other_steps_go_on(name: str, tmp_path: Path, every_step: None) -> None:
    start, recipe = network(), NESTED[name]

    def run(folder: Path | None, cutting: Cutting) -> Network:
        settings = {"data": Varied(), "task": "classification", "seed": 3, "teachers": {"peer": network(seed=1)}}
        return pj.compress(start, recipe, **settings, resume=folder, progress=cutting).network  # type: ignore[arg-type]

    counting = Cutting()
    expected, steps = run(None, counting), counting.steps
    cuts = [Cutting(steps // 2 + 1), Cutting(steps // 4)]
    for cutting in cuts:
        with pytest.raises(Cut):
            run(tmp_path, cutting)
    last = Cutting()
    found = run(tmp_path, last)
    assert any("going on after step" in note for cutting in (*cuts, last) for note in cutting.notes)
    # A cut loses the step that it cut, and going on is told at once.
    assert sum(cutting.steps for cutting in (*cuts, last)) <= steps + 4
    assert found.state()[0] == expected.state()[0]
    assert all(torch.equal(t, expected.tensors()[n]) for n, t in found.tensors().items())
    assert not list(tmp_path.glob("**/training-*"))


def test_a_teachers_answers_are_asked_for_again(tmp_path: Path, every_step: None) -> None:
    """Of samples that come in another order each time, and are others each time."""
    start, tune = network(), pj.Finetune(epochs=3, batch_size=8, teacher="original", alpha=0.5)
    recipe = pj.Recipe(pj.PruneWeights(sparsity=0.5), tune)

    def run(folder: Path | None, cutting: Cutting) -> pj.Result:
        loader = torch.utils.data.DataLoader(Varied(), batch_size=8, shuffle=True)
        settings = {"data": loader, "task": "classification", "resume": folder, "progress": cutting}
        return pj.compress(start, recipe, **settings)  # type: ignore[arg-type]

    expected = run(None, Cutting())
    for at in (17, 9):
        with pytest.raises(Cut):
            run(tmp_path, Cutting(at))
    found = run(tmp_path, Cutting())
    assert found.plans[1].notes == expected.plans[1].notes
    assert all(torch.equal(t, expected.network.tensors()[n]) for n, t in found.network.tensors().items())


def die_again_and_again(start: Network, folder: Path, kills: int) -> None:
    """In children of this process, which has not trained: the same run, killed `kills` times at random moments; what
    it ends with beside what it gives if it is left alone."""
    import random
    import shutil
    import threading
    import time

    def child(run: Path | None, file: Path, seconds: float | None) -> int:
        if (number := os.fork()) == 0:
            if seconds is not None:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            compressed(start, run).save(file)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

    checkpoint.SECONDS, checkpoint._MOST = 0.02, 0
    began = time.monotonic()
    assert child(None, folder / "whole.safetensors", None) == 0
    whole, left = time.monotonic() - began, kills
    expected = (folder / "whole.safetensors").read_bytes()
    while True:
        code = child(folder / "run", folder / "found.safetensors", random.uniform(0, 0.7 * whole) if left else None)
        if code == 0:
            assert (folder / "found.safetensors").read_bytes() == expected
            shutil.rmtree(folder / "run")
            if not left:
                return
        else:
            assert code == -signal.SIGKILL, code
            left -= 1


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    network().save(tmp_path / "start.safetensors")
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import Network, Path, die_again_and_again
torch.set_num_threads(1)
die_again_and_again(Network.load({str(tmp_path / "start.safetensors")!r}), Path({str(tmp_path)!r}), 10)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_steps_that_are_done_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, folder = network(), tmp_path / "run"
    data = (X[:, :, None, None].expand(90, 6, 6, 6)[:, :1], (Y[:, 0] > 0).long())

    def run(recipe: pj.Recipe, **more: object) -> pj.Result:
        settings = {"data": data, "task": "classification", "resume": folder, **more}
        return pj.compress(start, recipe, **settings)  # type: ignore[arg-type]

    recipe = pj.Recipe(pj.PruneWeights(sparsity=0.5), pj.Finetune(epochs=1))
    first = run(recipe)
    assert sorted(f.name for f in folder.iterdir()) == [
        "run.json", "step-01.json", "step-01.safetensors", "step-02.json", "step-02.safetensors",
    ]  # fmt: skip
    monkeypatch.setattr(pj.PruneWeights, "plan", None)
    monkeypatch.setattr(pj.Finetune, "plan", None)
    again = run(recipe)
    assert [row["seconds"] for row in again.steps] == [row["seconds"] for row in first.steps]
    assert [str(p) for p in again.plans] == [str(p) for p in first.plans]
    assert again.network.state()[0] == first.network.state()[0]
    for name, tensor in first.network.tensors().items():
        assert torch.equal(again.network.tensors()[name], tensor)
    for other, words in (
        ({"seed": 1}, "seed"),
        ({"data": (data[0] + 1, data[1])}, "samples"),
        ({"task": None}, "task"),
        ({"recipe": pj.Recipe(pj.PruneWeights(sparsity=0.6))}, "settings"),
    ):
        changed = {"recipe": recipe, **other}
        if "task" in other:
            changed["recipe"] = pj.Recipe(pj.PruneWeights(sparsity=0.5), pj.Finetune(epochs=1, teacher="original"))
            words = "settings and task"
        with pytest.raises(RecipeError, match=f"resume: .*run holds another run, with other {words}"):
            run(**changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["run.json", "step-01.json", "step-01.safetensors"])
@pytest.mark.parametrize("harm", ["empty", "half", "gone"])
def test_a_folder_that_was_damaged_is_said(name: str, harm: str, tmp_path: Path) -> None:
    if harm == "gone" and name != "step-01.json":  # a folder that was never begun, a Step that was never done
        return
    start, recipe, run = network(), pj.Recipe(pj.PruneWeights(sparsity=0.5)), tmp_path / "run"
    pj.compress(start, recipe, resume=run)
    file = run / name
    held = file.read_bytes()
    file.write_bytes(b"" if harm == "empty" else held[: len(held) // 2])
    if name == "step-01.json" and harm == "half":
        file.write_text("[1")
    if harm == "gone":
        file.unlink()
    with pytest.raises(RecipeError, match=name) as caught:
        pj.compress(start, recipe, resume=run)
    assert caught.value.hint == f"delete the folder {run} to begin anew"


def test_what_is_no_folder_and_no_teacher() -> None:
    start, recipe = network(), pj.Recipe(pj.PruneWeights(sparsity=0.5))
    with pytest.raises(pj.PenjingError, match="resume must name a folder"):
        pj.compress(start, recipe, resume="")
    with pytest.raises(pj.PenjingError, match="teachers must be networks by their names, got list"):
        pj.compress(start, recipe, teachers=[start])  # type: ignore[arg-type]
