"""Context: what a planner may look at besides the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from penjing.data import Data
from penjing.network import Network
from penjing.progress import SILENT, Progress
from penjing.task import Task
from penjing.training import AfterStep

if TYPE_CHECKING:
    from penjing.recipe.resuming import Trainings


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a planner may look at besides the network: the original network, samples, the task, the seed; what a
    Step that trains is to do after each training step; and where its checkpoints and curves are kept, if anywhere.
    """

    original: Network
    data: Data | None = None
    task: Task | None = None
    seed: int = 0
    progress: Progress = SILENT
    after_step: AfterStep | None = None
    trainings: Trainings | None = None
