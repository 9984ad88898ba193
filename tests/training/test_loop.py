"""Schedules, several batches a step, and a metric that is watched."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_training import X, Y, batches, model, squared
from torch import nn

import penjing as pj
from penjing.data import Data
from penjing.errors import InputError, MissingExtraError, RecipeError
from penjing.network import SetWeights
from penjing.recipe import Context
from penjing.training import TRACKERS, Batch, Monitor, Tracking, Training, require_trackers, train
from penjing.training.schedules import rate


def plain() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def test_schedules_beside_those_of_torch() -> None:
    steps, rise = 40, 4

    def of_torch(make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler, found = make(optimizer), []
        for _ in range(steps - rise):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    fall = steps - rise
    schedules = torch.optim.lr_scheduler
    oracles = {
        "cosine": of_torch(lambda o: schedules.CosineAnnealingLR(o, fall)),
        "linear": of_torch(lambda o: schedules.LinearLR(o, 1.0, 0.0, fall)),
        "constant": [1.0] * fall,
        "step": of_torch(lambda o: schedules.MultiStepLR(o, [fall // 2, fall * 3 // 4])),
    }
    for name, expected in oracles.items():
        found = [rate(name, step, steps, 0.1) for step in range(steps)]
        assert found[:rise] == [0.25, 0.5, 0.75, 1.0]
        assert found[rise:] == pytest.approx(expected, abs=1e-12), name
    with pytest.raises(
        RecipeError, match=r"Finetune\.schedule must be one of constant, cosine, linear, step"
    ) as caught:
        pj.Finetune(schedule="cosin")
    assert caught.value.hint == "did you mean 'cosine'?"


@pytest.mark.parametrize(("count", "size"), [(2, 8), (3, 8), (5, 16)])
def test_several_small_batches_are_one_large_one(count: int, size: int) -> None:
    """Also at the end of a pass, where the last batch is smaller or there are fewer of them."""

    def of(size: int) -> Callable[[int], Iterator[Batch]]:
        def of_epoch(epoch: int) -> Iterator[Batch]:
            order = torch.randperm(90, generator=torch.Generator().manual_seed(epoch))
            yield from ((X[i], Y[i]) for i in order.split(size))

        return of_epoch

    found = {}
    for accumulate, each in ((count, size), (1, size * count)):
        module = plain()
        settings = Training(epochs=3, lr=0.05, accumulate=accumulate)
        done = train(module, of(each), squared, settings, steps_per_epoch=math.ceil(90 / each))
        found[accumulate] = (done, module.state_dict())
    (many, one), (large, other) = found[count], found[1]
    assert many.steps == large.steps == 3 * math.ceil(90 / (size * count))
    assert many.losses == pytest.approx(large.losses, rel=1e-4)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


class Scripted:
    """A metric that goes as it is written, and the weights that it saw."""

    def __init__(self, *values: float) -> None:
        self.values, self.seen = list(values), list[dict[str, torch.Tensor]]()

    def __call__(self, module: nn.Module) -> float:
        assert not module.training and not torch.is_grad_enabled()
        torch.rand(1)  # nothing of the training may depend on what a metric draws
        self.seen.append({n: t.clone() for n, t in module.state_dict().items()})
        return self.values[len(self.seen) - 1]


@pytest.mark.parametrize("average", [0.0, 0.7])
def test_the_best_weights_are_kept_and_training_ends_in_time(average: float) -> None:
    training = Training(epochs=9, lr=0.05, average=average)
    metric, module = Scripted(0.5, 0.8, 0.8, 0.7, 0.9), model()
    done = train(
        module, batches, squared, training, steps_per_epoch=6, monitor=Monitor(metric="m", measure=metric, patience=2)
    )
    assert (done.steps, done.best, done.metrics) == (24, 2, [0.5, 0.8, 0.8, 0.7])
    assert all(torch.equal(t, metric.seen[1][n]) for n, t in module.state_dict().items())

    metric, other = Scripted(*range(9, 0, -1)), model()
    low = Monitor(metric="m", measure=metric, higher_is_better=False, patience=1)
    done = train(other, batches, squared, training, steps_per_epoch=6, monitor=low)
    assert (done.steps, done.best) == (54, 9)
    alone = model()
    train(alone, batches, squared, training, steps_per_epoch=6)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in alone.state_dict().items())


def test_a_metric_that_is_no_number_leaves_the_last_weights() -> None:
    monitor = Monitor(metric="m", measure=lambda module: math.nan, patience=1)
    found, expected = model(), model()
    done = train(found, batches, squared, Training(epochs=2), steps_per_epoch=6, monitor=monitor)
    train(expected, batches, squared, Training(epochs=2), steps_per_epoch=6)
    assert done.best is None and done.steps == 12
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in found.state_dict().items())


def test_progress_shows_loss_and_metric() -> None:
    class Watching:
        def __init__(self) -> None:
            self.told, self.steps = list[str](), 0

        @contextmanager
        def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            yield self.advance

        def advance(self, n: int) -> None:
            self.steps += n

        def note(self, text: str) -> None: ...

        def detail(self, text: str) -> None:
            self.told.append(text)

    watching = Watching()
    monitor = Monitor(metric="accuracy", measure=Scripted(0.25, 0.5))
    train(model(), batches, squared, Training(epochs=2), steps_per_epoch=6, monitor=monitor, progress=watching)
    assert watching.steps == 12 == len(watching.told)
    assert watching.told[0].startswith("loss ") and "accuracy" not in watching.told[5]
    assert watching.told[6].endswith(", accuracy 0.25")


# ------------------------------------------------------------------------------------------------------------- Finetune
IMAGES = torch.randn(120, 1, 4, 4, generator=torch.Generator().manual_seed(1))
CLASSES = (IMAGES.mean((1, 2, 3)) > 0).long()


def network() -> pj.Network:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    return pj.capture(nn.Sequential(*layers), inputs=(IMAGES[:2],))


def held_out_share(share: float) -> tuple[torch.Tensor, torch.Tensor]:
    ((_, held),) = Data((IMAGES, CLASSES)).split([share], seed=0)
    inputs, labels = next(held.batches(1000))
    return inputs, labels


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_finetune_keeps_what_is_best_on_samples_that_it_does_not_see(precision: str) -> None:
    # A rate far too high, so that the metric goes up and down.
    step = pj.Finetune(
        epochs=12, lr=0.5, batch_size=8, patience=3, held_out=0.3, precision=precision, schedule="constant"
    )
    result = pj.compress(network(), pj.Recipe(step), data=(IMAGES, CLASSES), task="classification")
    inputs, labels = held_out_share(0.3)
    accuracy = float((result.network.run(inputs)[0].argmax(1) == labels).float().mean())
    note = result.plans[0].notes[1]
    assert note.startswith("accuracy on held-out samples by epochs: ")
    metrics = [float(word) for word in note.partition(": ")[2].partition(";")[0].split(", ")]
    assert len(metrics) <= 12 and max(metrics) == pytest.approx(accuracy, abs=1e-3 if precision == "f32" else 0.03)
    assert note.endswith(f"the weights after epoch {metrics.index(max(metrics)) + 1} are kept")
    assert len(metrics) == 12 or len(metrics) - metrics.index(max(metrics)) - 1 == 3


def test_without_labels_the_loss_on_held_out_samples_is_watched() -> None:
    step = pj.Finetune(epochs=3, teacher="original", held_out=0.2, hints=0.0)
    noisy = network()
    tensors = noisy.tensors()
    changed = noisy.apply([SetWeights(parameter="4.weight", value=torch.zeros_like(tensors["4.weight"]))])
    plan = step.plan(changed, Context(original=noisy, data=Data(IMAGES)))
    assert plan.notes[1].startswith("held-out loss on held-out samples by epochs: ")
    values = [float(v) for v in plan.notes[1].partition(": ")[2].partition(";")[0].split(", ")]
    assert values[-1] < values[0]


# ------------------------------------------------------------------------------------------------------------- trackers
def test_unknown_and_missing_trackers_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no tracker called 'tensorbord'") as caught:
        require_trackers(["tensorbord"])
    assert caught.value.hint == "did you mean 'tensorboard'?"
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="the tracker wandb needs the package wandb") as missing:
        require_trackers(["wandb"])
    assert missing.value.hint == "pip install 'penjing[trackers]'"
    with pytest.raises(InputError, match="trackers need a folder to write to"):
        pj.compress(
            network(), pj.Recipe(pj.Finetune()), data=(IMAGES, CLASSES), task="classification", trackers=["wandb"]
        )


def test_a_tracker_of_ones_own_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        def __init__(self, run: str, folder: Path, step: int) -> None:
            self.file = folder / f"{run}.jsonl"

        def start(self) -> None:
            self.file.touch()

        def log(self, values: dict[str, float], step: int) -> None:
            with self.file.open("a") as file:
                print(json.dumps([step, values]), file=file)

        def finish(self) -> None:
            self.log({"finished": 1.0}, -1)

    monkeypatch.setitem(TRACKERS._items, "own", Own)  # type: ignore[arg-type]
    recipe = pj.Recipe(pj.Finetune(epochs=2, batch_size=24, held_out=0.2))
    settings = {"data": (IMAGES, CLASSES), "task": "classification"}
    tracked = pj.compress(network(), recipe, **settings, resume=tmp_path, trackers=["own"])  # type: ignore[arg-type]
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [step for step, values in rows if "loss" in values] == list(range(1, 9))
    assert [step for step, values in rows if "accuracy" in values] == [4, 8]
    assert rows[-1] == [-1, {"finished": 1.0}]
    untracked = pj.compress(network(), recipe, **settings)  # type: ignore[arg-type]
    assert all(torch.equal(t, untracked.network.tensors()[n]) for n, t in tracked.network.tensors().items())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_trackers_write_under_their_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    folder, monitor = tmp_path / "run", Monitor(metric="error", measure=Scripted(0.5, 0.25))
    tracking = Tracking([name], folder, "step-01-abc")
    train(model(), batches, squared, Training(epochs=2), steps_per_epoch=6, monitor=monitor, tracking=tracking)
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard" / "step-01-abc"))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars("error")] == [(6, 0.5), (12, 0.25)]
        assert [e.step for e in events.Scalars("loss")] == list(range(1, 13))
    elif name == "wandb":
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        assert file.stat().st_size > 0
    else:
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name("penjing").experiment_id])
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "error")] == [
            (6, 0.5),
            (12, 0.25),
        ]
