"""Trackers: where the curves of a training are drawn. Accelerate knows how to speak to them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from penjing.errors import InputError, MissingExtraError
from penjing.registry import Registry
from penjing.training import randomness
from penjing.training.processes import is_main_process

#: (values by name, the step) → nothing.
Log = Callable[[Mapping[str, float], int], None]
#: (the run's name, the folder to write under, the step that the run goes on after) → a tracker of Accelerate's kind.
MakeTracker = Callable[[str, Path, int], GeneralTracker]

TRACKERS: Registry[MakeTracker] = Registry("tracker")
_PROJECT = "penjing"
_PACKAGES = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Tracking:
    """The trackers `names` of one training, called `run`; they write under `folder`."""

    names: Sequence[str]
    folder: Path
    run: str

    @contextmanager
    def open(self, step: int) -> Iterator[Log]:
        """Takes values from `step` on; a run that goes on after a kill goes on in its own curves.

        Only the first of several processes writes.
        """
        if not is_main_process():
            yield lambda values, step: None
            return
        with ExitStack() as ends:
            found = []
            before = randomness.states()  # whatever a tracker draws for its names
            for name in self.names:
                tracker = TRACKERS.get(name)(self.run, self.folder, step)
                tracker.start()
                ends.callback(tracker.finish)
                found.append(tracker)
            randomness.restore(before)

            def log(values: Mapping[str, float], step: int) -> None:
                for tracker in found:
                    tracker.log(dict(values), step=step)

            yield log


def require_trackers(names: Sequence[str]) -> None:
    """Raises InputError for an unknown tracker, and MissingExtraError for one that is not installed."""
    if isinstance(names, str) or not all(isinstance(n, str) for n in names):
        raise InputError(
            f"trackers must be a list of names, got {names!r}", hint="for example trackers=['tensorboard']"
        )
    for name in names:
        TRACKERS.get(name)
        if name in _PACKAGES:
            _package(name)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"the tracker {name} needs the package {name}, which cannot be imported ({error})",
            hint="pip install 'penjing[trackers]'",
        ) from error


@TRACKERS.register("tensorboard")
def _tensorboard(run: str, folder: Path, step: int) -> GeneralTracker:
    _package("tensorboard")
    return TensorBoardTracker(run, folder / "tensorboard", purge_step=step + 1)


@TRACKERS.register("wandb")
def _wandb(run: str, folder: Path, step: int) -> GeneralTracker:
    """Weights & Biases, offline unless WANDB_MODE says otherwise."""
    wandb = _package("wandb")
    mode = os.environ.get("WANDB_MODE", "offline")
    resume = None if mode == "offline" else "allow"
    quiet = wandb.Settings(silent=True)
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    return WandBTracker(_PROJECT, name=run, id=run, resume=resume, mode=mode, dir=str(folder), settings=quiet)


@TRACKERS.register("mlflow")
def _mlflow(run: str, folder: Path, step: int) -> GeneralTracker:
    """MLflow, in a data base under the folder unless MLFLOW_TRACKING_URI says otherwise."""
    mlflow = _package("mlflow")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    known: list[Any] = []
    if mlflow.get_experiment_by_name(_PROJECT) is not None:
        known = mlflow.search_runs(
            experiment_names=[_PROJECT], filter_string=f"attributes.run_name = '{run}'", output_format="list"
        )
    artifacts = (folder / "mlflow").resolve().as_uri()
    return MLflowTracker(_PROJECT, artifacts, run_id=known[0].info.run_id if known else None, run_name=run)
