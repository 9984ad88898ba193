"""Regularize: training that drives whole channels to zero, and then the cut that costs nothing any more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from penjing.analysis.penalties import group_lasso, growing
from penjing.errors import RecipeError
from penjing.network import Network, RemoveChannels
from penjing.network.composing import compose
from penjing.recipe import Context, Plan, Step, step

_PENALTIES = ("greg", "group-lasso")
_STRENGTH = {"greg": 10.0, "group-lasso": 1e-3}


@step
@dataclass(frozen=True, kw_only=True)
class Regularize(Step):
    """Train with a penalty on whole channels, then remove those that `step` says.

    `step` is a Step that removes channels or heads, `train` one that trains.

    - "greg": `step` chooses first; a decay on what it chose grows with every training step, so that the others learn to
      do without (Wang et al. 2021, "Neural pruning via growing regularization", GReg-1). By itself it would shrink
      them by exp(-`strength`).
    - "group-lasso": every channel pays for its norm, `strength` times the learning rate and the root of its number of
      entries, and `step` chooses among what is left (Wen et al. 2016, "Learning structured sparsity").

    `strength` is 10 for "greg" and 0.001 for "group-lasso" if nothing is said. `where` belongs to the inner Steps.
    """

    step: Step
    train: Step
    penalty: str = "greg"
    strength: float | None = None

    def __post_init__(self) -> None:
        self.require_share("step")
        if not isinstance(self.train, Step) or not self.train.learns:
            got = self.train.name if isinstance(self.train, Step) else repr(self.train)
            raise RecipeError(f"Regularize.train must be a Step that trains, got {got}", hint="for example Finetune")
        self.require_one_of("penalty", _PENALTIES)
        self.require_between("strength", 0, float("inf"), open_low=True)

    def check(self, context: Context) -> None:
        """What the inner Steps need."""
        self.step.check(context)
        self.train.check(context)

    def plan(self, network: Network, context: Context) -> Plan:
        """Trains a copy and cuts it; the Plan holds the removals and the values of what is left."""
        strength = _STRENGTH[self.penalty] if self.strength is None else self.strength
        if self.penalty == "greg":
            # Only the choice is taken: refitted weights would be of no use to the training.
            plain: dict[str, Any] = {"reconstruct": False} if hasattr(self.step, "reconstruct") else {}
            chooser = replace(self.step, **plain)
            chosen = chooser.plan(network, context)
            removals = [e for e in chosen.edits if isinstance(e, RemoveChannels)]
            self._require(removals, network)
            after_step = growing(network, removals, strength)
        else:
            after_step = group_lasso(network.groups(), strength)
        trainings = context.trainings.inside(self) if context.trainings else None
        trained = self.train.plan(network, replace(context, after_step=after_step, trainings=trainings))
        edits, now = compose(network, (), trained.edits)
        if self.penalty == "greg":
            cut = replace(chosen, edits=tuple(removals))
        else:
            cut = self.step.plan(now, context)
            self._require([e for e in cut.edits if isinstance(e, RemoveChannels)], network)
        edits, _ = compose(network, edits, cut.edits, now=now)
        return Plan(step=self, edits=edits, reasons=cut.reasons, notes=(*trained.notes, *cut.notes))

    def _require(self, removals: list[RemoveChannels], network: Network) -> None:
        if not removals:
            raise RecipeError(
                f"Regularize finds nothing that {self.step.name} would remove of {network.name}",
                hint="it takes Steps that remove channels or heads, set to take some away",
            )
