"""Folders that keep what long work has reached, so that it goes on there after it was killed. The rounds of one Step:

    run.json                   whose work it is: settings, network, task, samples and seed, as digests
    round-0003.safetensors     the Plan after so many rounds; the one before is deleted once this one is whole
    round/                     checkpoints of the trainings of the round under way
    plan.safetensors           the Plan in the end

and the Steps of one recipe:

    run.json                   as above
    step-02.safetensors        the Plan of a Step that is done
    step-02.json               the seconds that it took
    step-03/                   checkpoints of the trainings of the Step under way, each named by all that goes into it
    tensorboard/ wandb/ …      what trackers write

Every file appears whole or not at all (`penjing.files`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from penjing.data import Data
from penjing.errors import InputError, RecipeError
from penjing.files import appearing
from penjing.network import Network
from penjing.recipe.context import Context
from penjing.recipe.plans import Plan
from penjing.recipe.steps import Step
from penjing.training import Checkpoint, Tracking, count_processes, is_main_process, randomness, wait_for_all

#: Samples that tell one data set from another, beside their number.
_SAMPLES = 256
_NAMES = {
    "settings": "settings",
    "network": "network",
    "original": "original network",
    "teachers": "teachers",
    "task": "task",
    "data": "samples",
    "seed": "seed",
    "processes": "number of processes",
}


class Rounds:
    """The rounds of one run in a folder, which is made if it is not there.

    Raises RecipeError if the folder holds another run's: other settings, network, samples, task, seed or number of
    processes. Samples must be read alike every time; a Dataset that varies them by generators of its own is another one
    each time.
    """

    def __init__(self, folder: str | Path, step: Step, network: Network, context: Context) -> None:
        self.folder, self._step = Path(folder), step
        _claim(self.folder, f"{step.name}.resume", {step.name: step.done()}, network, context)

    def finished(self) -> Plan | None:
        """The Plan in the end, if it came to that."""
        file = self.folder / "plan.safetensors"
        return _loaded(file) if file.exists() else None

    def latest(self) -> tuple[int, Plan] | None:
        """The last round that was kept, and the Plan after it."""
        kept = self._kept()
        return (max(kept), _loaded(kept[max(kept)])) if kept else None

    def trainings(self, outer: Trainings | None) -> Trainings:
        """Where a round keeps what its trainings have reached; curves go where they went."""
        folder = self.folder / "round"
        return replace(outer, folder=folder) if outer else Trainings(folder, "round", self.folder)

    def keep(self, number: int, plan: Plan) -> None:
        """Writes the Plan after round `number`."""
        if not _mine_to_write():
            return
        earlier = self._kept()
        plan.save(self.folder / f"round-{number:04}.safetensors")
        for file in earlier.values():
            file.unlink(missing_ok=True)
        self.trainings(None).forget()

    def finish(self, plan: Plan) -> None:
        """Writes the Plan in the end."""
        if not _mine_to_write():
            return
        plan.save(self.folder / "plan.safetensors")
        for file in self._kept().values():
            file.unlink(missing_ok=True)
        self.trainings(None).forget()

    def _kept(self) -> dict[int, Path]:
        files = {f.stem.removeprefix("round-"): f for f in self.folder.glob("round-*.safetensors")}
        return {int(number): file for number, file in files.items() if number.isdecimal()}


class Steps:
    """The Steps of one recipe in a folder, which is made if it is not there; otherwise like `Rounds`."""

    def __init__(
        self, folder: str | Path, steps: Iterable[Step], network: Network, context: Context, trackers: Sequence[str]
    ) -> None:
        self.folder, self._trackers = Path(folder), tuple(trackers)
        settings = [{step.name: step.done()} for step in steps]
        _claim(self.folder, "resume", settings, network, context)

    def done(self, number: int) -> tuple[Plan, float] | None:
        """The Plan of Step `number`, and the seconds that it took, if it is done."""
        file, seconds = self._files(number)
        if not file.exists():
            return None
        plan = _loaded(file)
        try:
            return plan, float(json.loads(seconds.read_text(encoding="utf8")))
        except (OSError, ValueError, TypeError) as error:
            raise _unreadable(seconds, error) from error

    def trainings(self, number: int) -> Trainings:
        """Where Step `number` keeps what its trainings have reached."""
        return Trainings(self.folder / f"step-{number:02}", f"step-{number:02}", self.folder, self._trackers)

    def keep(self, number: int, plan: Plan, seconds: float) -> None:
        """Writes the Plan of Step `number`; its trainings are needed no more."""
        if not _mine_to_write():
            return
        file, beside = self._files(number)
        with appearing(beside) as aside:
            aside.write_text(json.dumps(seconds), encoding="utf8")
        plan.save(file)
        self.trainings(number).forget()

    def _files(self, number: int) -> tuple[Path, Path]:
        return self.folder / f"step-{number:02}.safetensors", self.folder / f"step-{number:02}.json"


@dataclass(frozen=True)
class Trainings:
    """The trainings of one Step, whatever other Step runs them and how often.

    A training is known by all that goes into it; `within` holds what its Step, network and samples do not tell: the
    settings of a Step around it that changes the training itself.
    """

    folder: Path
    name: str
    logs: Path
    trackers: tuple[str, ...] = ()
    within: tuple[str, ...] = ()

    def inside(self, step: Step) -> Trainings:
        """These, run by a Step that changes them by `Context.after_step` or `penalty`."""
        return replace(self, within=(*self.within, json.dumps({step.name: step.done()})))

    def of(self, step: Step, network: Network, context: Context) -> tuple[Checkpoint | None, Tracking | None]:
        """The checkpoint and the curves of the training of `network` by `step`; no checkpoint where `after_step`
        or `penalty` do something to it that nobody named by `inside`."""
        run = [_run({step.name: step.done()}, network, context), *self.within]
        digest = hashlib.sha256(json.dumps(run).encode()).hexdigest()[:16]
        tracking = Tracking(self.trackers, self.logs, f"{self.name}-{digest[:8]}") if self.trackers else None
        if (context.after_step or context.penalty) and not self.within:
            return None, tracking
        return Checkpoint(self.folder / f"training-{digest}.safetensors", context.watcher), tracking

    def forget(self) -> None:
        """Deletes the checkpoints."""
        for file in self.folder.glob("training-*.safetensors"):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's file is in there
            self.folder.rmdir()


def _loaded(file: Path) -> Plan:
    try:
        return Plan.load(file)
    except InputError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> RecipeError:
    said = error.message if isinstance(error, InputError) else f"{file} cannot be read ({error})"
    return RecipeError(f"resume: {said}", hint=f"delete the folder {file.parent} to begin anew")


def _mine_to_write() -> bool:
    """Whether this process writes; when it may: all have read by then what they go on from."""
    wait_for_all()
    return is_main_process()


def _run(settings: Any, network: Network, context: Context) -> dict[str, Any]:
    """Whose work it is: what must be the same for the same result."""
    return {
        "settings": settings,
        "network": network_digest(network),
        "original": network_digest(context.original),
        "teachers": {name: [network_digest(n) for n in held] for name, held in context.teachers.items()},
        "task": context.task.name if context.task else None,
        "data": None if context.data is None else _data_digest(context.data, context.seed),
        "seed": context.seed,
        "processes": count_processes(),
    }


def _claim(folder: Path, field: str, settings: Any, network: Network, context: Context) -> None:
    """Makes `folder` that of this run; raises RecipeError if it is another's."""
    run, file = _run(settings, network, context), folder / "run.json"
    text = json.dumps(run, indent=2)  # what comes back from JSON is compared: tuples are lists there
    if not file.exists():
        if is_main_process():
            with appearing(file) as aside:
                aside.write_text(text, encoding="utf8")
        return
    try:
        known = json.loads(file.read_text(encoding="utf8"))
        others = [word for key, word in _NAMES.items() if known[key] != json.loads(text)[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(file, error) from error
    if others:
        raise RecipeError(
            f"{field}: {folder} holds another run, with other {' and '.join(others)}",
            hint="name another folder, or delete this one to begin anew",
        )


def network_digest(network: Network) -> str:
    """SHA-256 of graph and tensors. What happened to it before does not matter."""
    topology, arrays = network.replace(history=()).state()
    found = hashlib.sha256(topology.encode())
    for name in sorted(arrays):
        _take(found, arrays[name], name)
    return found.hexdigest()


def _data_digest(data: Data, seed: int) -> str:
    """SHA-256 of the number of samples, if it is known, and of the first ones."""
    try:
        found = hashlib.sha256(str(len(data)).encode())
    except TypeError:
        found = hashlib.sha256()
    with randomness.seeded(seed):  # a DataLoader that shuffles begins alike every time
        for batch in data.batches(64, limit=_SAMPLES):
            for path, value in pytree.tree_leaves_with_path(batch):
                if isinstance(value, Tensor):
                    _take(found, value.detach().cpu().numpy(), pytree.keystr(path))
    return found.hexdigest()


def _take(found: Any, array: np.ndarray[Any, Any], name: str) -> None:
    found.update(f"{name} {array.dtype.str} {array.shape}".encode())
    found.update(np.ascontiguousarray(array).tobytes())
