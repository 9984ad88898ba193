"""compress: recipe + network → smaller network, with what every step did. The only orchestrator."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from penjing import digests
from penjing.analysis.footprint import footprint
from penjing.data import Data
from penjing.errors import InputError, PenjingError, RecipeError
from penjing.network import Network
from penjing.progress import SILENT, Progress
from penjing.recipe import Context, Plan, Recipe, Step
from penjing.recipe.judging import scores_of
from penjing.recipe.resuming import Steps
from penjing.task import Task, get_task
from penjing.training import left_alone, randomness, require_trackers

#: Samples that the metric before and after each step is taken on; the final figures of a report come from all of them.
STEP_SAMPLES = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What `compress` gives: the smaller network, the recipe, a Plan and a row of before and after for every step."""

    network: Network
    original: Network
    recipe: Recipe
    plans: tuple[Plan, ...] = field(repr=False)
    steps: tuple[dict[str, Any], ...]
    seed: int = 0


def compress(
    network: Network,
    recipe: Recipe,
    *,
    data: Any = None,
    task: str | Task | None = None,
    test: Any = None,
    seed: int = 0,
    teachers: Mapping[str, Network | Sequence[Network]] | None = None,
    resume: str | Path | None = None,
    trackers: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Result:
    """Applies the Steps of `recipe` in order.

    `data`: samples to calibrate, reconstruct and train with (labels are looked at only if `task` is given). `test`:
    samples to take the metric before and after each step with; without them nothing is measured in between. Neither
    `network` nor any object of the caller's is changed. The same seed gives the same result on the same machine.
    `teachers`: further networks (or several together) by the names that Steps know them by; "original" is `network`.

    `resume` names a folder in which everything that is reached is kept: Steps that are done, and trainings under way.
    A run that was killed at any moment and is started again, with the same network, recipe, samples, task and seed,
    goes on there and ends with the same network, to the last bit; another run is refused. `trackers` ("tensorboard",
    "wandb", "mlflow") draw the curves of all trainings, and write into that folder.

    Started by `accelerate launch` in several processes, all give the same result, and the first one writes.

    Raises RecipeError or DataError before any work is done where a Step lacks what it needs, naming the step's number.
    """
    if not isinstance(network, Network):
        raise InputError(
            f"compress takes a Network, got {type(network).__name__}", hint="network = pj.capture(model, inputs=(x,))"
        )
    if not isinstance(recipe, Recipe):
        raise InputError(
            f"compress takes a Recipe, got {type(recipe).__name__}", hint="pj.Recipe(pj.PruneChannels(ratio=0.5))"
        )
    if not len(recipe):
        raise RecipeError("the recipe has no steps", hint="to measure a network as it is, evaluate it")
    known = get_task(task)
    samples = None if data is None else Data(data)
    held_out = None if test is None else Data(test)
    if resume is not None and not str(resume):
        raise InputError("resume must name a folder, got ''", hint="for example resume='run'")
    if trackers and resume is None:
        raise InputError("trackers need a folder to write to, and resume names none", hint="for example resume='run'")
    require_trackers(trackers)
    if alone := left_alone():
        progress.note(alone)
        warnings.warn(alone, stacklevel=2)  # a script's progress is silent; the command line shows the note alone
    context = Context(
        original=network,
        data=samples,
        task=known,
        seed=seed,
        progress=progress,
        teachers=_named({} if teachers is None else teachers),
    )
    for number, step in enumerate(recipe, 1):
        with _naming(number, step):
            step.check(context)
    _refuse_other_precisions(network)
    if samples is not None:
        network.bind(samples.first(1 if network.batch_is_dynamic else network.inputs[0].shape[0]))
    kept = None if resume is None else Steps(resume, recipe, network, context, trackers)
    current = network.replace(task=known.name) if known else network
    plans: list[Plan] = []
    rows: list[dict[str, Any]] = []
    before = _look(current, held_out, known, progress)
    for number, step in enumerate(recipe, 1):
        came_from = digests.digest(*(network if number == 1 else current).state())
        started = time.perf_counter()
        done = kept.done(number) if kept else None
        own = replace(context, trainings=kept.trainings(number)) if kept else context
        # A caller's no_grad is not meant for what trains in here.
        with _naming(number, step), torch.inference_mode(False), torch.enable_grad(), randomness.seeded(seed):
            plan = done[0] if done else step.plan(current, own)
            current = current.apply(plan.edits)
        seconds = done[1] if done else time.perf_counter() - started
        if done:
            progress.note(f"step {number} ({step.name}) is done: {resume} holds its plan")
        elif kept:
            kept.keep(number, plan, seconds)
        current = current.record(
            {"event": "step", "name": step.name, "settings": step.done(), "seed": seed, "before": came_from}
        )
        after = _look(current, held_out, known, progress)
        plans.append(plan)
        rows.append(
            {"name": step.name, "settings": step.settings(), "seconds": seconds, "before": before, "after": after}
        )
        before = after
    return Result(network=current, original=network, recipe=recipe, plans=tuple(plans), steps=tuple(rows), seed=seed)


def _named(teachers: Mapping[str, Network | Sequence[Network]]) -> dict[str, tuple[Network, ...]]:
    """Every name's networks; "original" and "self" are taken."""
    if not isinstance(teachers, Mapping):
        raise InputError(
            f"teachers must be networks by their names, got {type(teachers).__name__}",
            hint="teachers={'big': network}",
        )
    named: dict[str, tuple[Network, ...]] = {}
    for name, given in teachers.items():
        held = (given,) if isinstance(given, Network) else tuple(given) if isinstance(given, Sequence) else (given,)
        wrong = next((n for n in held if not isinstance(n, Network)), None)
        if wrong is not None or not held:
            got = "nothing" if not held else type(wrong).__name__
            raise InputError(f"teacher {name!r} must be a Network or several, got {got}", hint="capture it first")
        if name in ("original", "self"):
            raise InputError(f"a teacher cannot be called {name!r}: that is taken", hint="give it another name")
        named[str(name)] = held
    return named


def _refuse_other_precisions(network: Network) -> None:
    for name in network.parameter_names:
        held = network.tensors()[name]
        if held.is_floating_point() and held.dtype != torch.float32:
            raise InputError(
                f"{network.name} holds {name} in {str(held.dtype).removeprefix('torch.')}; Steps work on float32",
                hint="capture(model.float(), ...): integers are made from float32, and so is what trains",
            )


@contextlib.contextmanager
def _naming(number: int, step: Step) -> Iterator[None]:
    """Adds the step's number to what goes wrong in it."""
    try:
        yield
    except PenjingError as error:
        raise type(error)(f"step {number} ({step.name}): {error.message}", hint=error.hint) from error


def _look(network: Network, test: Data | None, task: Task | None, progress: Progress) -> dict[str, Any]:
    """Parameters, MACs and, with held-out samples, the metric in torch: the small measurement between steps."""
    size = footprint(network)
    row: dict[str, Any] = {"parameters": size.parameters, "macs": size.macs}
    if test is None or task is None:
        return row
    every = scores_of(network, test, task, limit=STEP_SAMPLES, progress=progress)
    row["metric"] = {"name": task.metric, "value": every.mean().item(), "n": len(every), "runtime": "torch"}
    return row
