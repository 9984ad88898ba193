"""Context: what a planner may look at besides the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from penjing.data import Data
from penjing.errors import RecipeError
from penjing.network import Network
from penjing.progress import SILENT, Progress
from penjing.registry import did_you_mean
from penjing.task import Task
from penjing.training import AfterStep, Checkpoint, Tracking, Watcher

if TYPE_CHECKING:
    from penjing.recipe.resuming import Trainings
    from penjing.recipe.steps import Step


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a planner may look at besides the network: the original network, samples, the task, the seed; other
    networks by the names that Steps know them by; what a Step that trains is to do besides: `after_step` after each
    training step, `penalty` of the module in training added to each loss, `rates` factors of the learning rates of
    single parameters; the `watcher` whose memory checkpoints keep; and where checkpoints and curves are kept, if
    anywhere.
    """

    original: Network
    data: Data | None = None
    task: Task | None = None
    seed: int = 0
    progress: Progress = SILENT
    after_step: AfterStep | None = None
    watcher: Watcher | None = None
    trainings: Trainings | None = None
    penalty: Callable[[nn.Module], Tensor] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    teachers: Mapping[str, tuple[Network, ...]] = field(default_factory=dict)

    def kept(self, step: Step, network: Network) -> tuple[Checkpoint | None, Tracking | None]:
        """The checkpoint and the curves of the training of `network` by `step`, if they are kept anywhere."""
        return self.trainings.of(step, network, self) if self.trainings else (None, None)

    def networks(self, name: str, place: str) -> tuple[Network, ...]:
        """The networks that a Step calls `name`: "original", or those given under it; raises RecipeError that begins
        with `place` if there are none."""
        known = {"original": (self.original,), **self.teachers}
        if name not in known:
            given = f"give it: teachers={{{name!r}: network}}, on the command line --teacher {name}=MODEL"
            hint = did_you_mean(name, known) if self.teachers else given
            raise RecipeError(f"{place}: no network called {name!r} was given", hint=hint)
        return known[name]
