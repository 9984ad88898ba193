"""Judging networks on samples: the scores of a task, and a floor under their mean while Steps look for how much can go.

A floor is a constraint of `penjing.budget` on the task's metric: "accuracy>=-1%" compares with the network that the
Step was given, "accuracy>=91%" with nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penjing.budget import Constraint, is_fraction, parse_constraints
from penjing.data import Data
from penjing.errors import BudgetError, DataError, RecipeError
from penjing.network import Network
from penjing.network.structure import substitute
from penjing.progress import SILENT, Progress
from penjing.recipe.context import Context
from penjing.recipe.steps import Step
from penjing.task import Task

#: Bytes of the first network's outputs that are kept; what is beyond is computed again for every verdict.
_KEPT = 1 << 28
#: The share of the samples that is held out to judge by where nothing is said.
HELD_OUT = 0.2
_BATCH = 100


def scores_of(
    network: Network, data: Data, task: Task, *, limit: int | None = None, progress: Progress = SILENT
) -> Tensor:
    """The task's scores of all samples (or the first `limit`), shape (n,); their mean is the metric.

    Raises DataError for samples without labels.
    """
    fixed = None if network.batch_is_dynamic else network.inputs[0].shape[0]
    found: list[Tensor] = []
    with torch.no_grad(), progress.task(f"{task.metric} of {network.name}", None) as advance:
        for inputs, labels in data.batches(fixed or _BATCH, limit=limit):
            if labels is None:
                raise DataError(
                    f"the task '{task.name}' needs labels, but the data has none", hint="give labelled samples"
                )
            found.append(torch.as_tensor(task.scores(_outputs(network, inputs, fixed), labels)).flatten())
            advance(len(found[-1]))
    return torch.cat(found)


class _Farther:
    """Scores of a network, and of one whose outputs are `stretch` times as far from those of the first one."""

    def __init__(self, network: Network, task: Task, stretch: float, progress: Progress) -> None:
        self._network, self._task, self._stretch, self._progress = network, task, stretch, progress
        self._kept: dict[tuple[int, int], Any] = {}
        self._room = _KEPT

    def scores(self, network: Network, data: Data, fold: int) -> tuple[Tensor, Tensor]:
        """Of all samples of a fold, (n,) each."""
        fixed = None if network.batch_is_dynamic else network.inputs[0].shape[0]
        near, far = list[Tensor](), list[Tensor]()
        with torch.no_grad(), self._progress.task(f"{self._task.metric} of {network.name}", None) as advance:
            for number, (inputs, labels) in enumerate(data.batches(fixed or _BATCH)):
                before, outputs = self._before(inputs, fixed, (fold, number)), _outputs(network, inputs, fixed)
                for found, given in ((near, outputs), (far, pytree.tree_map(self._stretched, outputs, before))):
                    found.append(torch.as_tensor(self._task.scores(given, labels)).flatten())
                advance(len(near[-1]))
        return torch.cat(near), torch.cat(far)

    def _stretched(self, now: Any, before: Any) -> Any:
        if not isinstance(now, Tensor) or not now.is_floating_point():
            return now
        return before + self._stretch * (now - before)

    def _before(self, inputs: Any, fixed: int | None, place: tuple[int, int]) -> Any:
        if place in self._kept:
            return self._kept[place]
        found = _outputs(self._network, inputs, fixed)
        size = sum(t.nbytes for t in pytree.tree_leaves(found) if isinstance(t, Tensor))
        if size <= self._room:
            self._room -= size
            self._kept[place] = found
        return found


def _outputs(network: Network, inputs: Any, fixed: int | None) -> Any:
    """Outputs in their structure; the last samples of a network that takes `fixed` at once are repeated to fill up."""
    count = len(next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)))
    if fixed is None or count >= fixed:
        flat = network.run(inputs)
    else:
        fill = torch.arange(fixed) % count
        filled = pytree.tree_map(lambda t: t[fill] if isinstance(t, Tensor) and len(t) == count else t, inputs)
        flat = tuple(t[:count] if t.ndim and len(t) == fixed else t for t in network.run(filled))
    return substitute(network.structure_out, dict(zip(network.output_names, flat, strict=True)))


def read_floor(step: Step, text: str) -> Constraint:
    """The one constraint on a metric that the field `floor` of `step` holds; raises RecipeError for anything else."""
    hint = "write it like 'accuracy>=-1%' (beside the network as it came) or 'accuracy>=91%'"
    if not isinstance(text, str):
        raise RecipeError(f"{step.name}.floor must be a constraint, got {text!r}", hint=hint)
    try:
        constraints = parse_constraints(text)
    except BudgetError as error:
        raise RecipeError(f"{step.name}.floor: {error.message}", hint=error.hint) from error
    if len(constraints) > 1:
        raise RecipeError(f"{step.name}.floor is one constraint, got {len(constraints)}: {text!r}", hint=hint)
    if constraints[0].quantity != "metric":
        raise RecipeError(f"{step.name}.floor must be about the task's metric, got {text!r}", hint=hint)
    return constraints[0]


def require_judge(step: Step, text: str, context: Context) -> None:
    """Raises DataError or RecipeError unless the samples and the task of `context` can be held against a floor."""
    constraint = read_floor(step, text)
    if context.data is None:
        raise DataError(
            f"{step.name}.floor needs samples to judge by and no data was given", hint="give labelled samples"
        )
    if context.task is None:
        raise RecipeError(f"{step.name}.floor needs a task to judge by, and none was given", hint="give a task")
    if next(context.data.batches(1, limit=1))[1] is None:
        raise DataError(f"{step.name}.floor needs labels and the data has none", hint="give labelled samples")
    made_up = _measured(context.task, 1.0)
    if is_fraction(made_up["metric"]) and constraint.kind != "ratio":
        out = abs(constraint.limit) >= 1 if constraint.kind == "change" else not 0 <= constraint.limit <= 1
        if out:
            raise RecipeError(
                f"{step.name}.floor is out of reach, got {text!r}: {context.task.metric} lies between 0 and 100 %",
                hint=f"for one point less write '{context.task.metric}>=-1%'",
            )
    try:
        constraint.check(made_up, made_up)
    except BudgetError as error:
        raise RecipeError(f"{step.name}.floor: {error.message}", hint=error.hint) from error
    if constraint.at_most == context.task.higher_is_better:
        better, sign = ("higher", ">=") if context.task.higher_is_better else ("lower", "<=")
        raise RecipeError(
            f"{step.name}.floor must hold {context.task.metric} with {sign}, got {text!r}",
            hint=f"{better} is better for the task '{context.task.name}'",
        )


@dataclass(frozen=True)
class Verdict:
    """Whether a floor is `met`, and what was measured, in words."""

    met: bool
    words: str


class Judge:
    """Holds networks against a floor, on samples that the Steps that made them never saw.

    `held` are one or several folds of samples; with several, the mean of their metrics must meet the floor. It must do
    so by `errors` standard errors of the difference, sample by sample.

    A network answers what it was trained on with larger margins than anything else, so small changes of its outputs
    turn fewer answers there than elsewhere. Where outputs err without a direction, the metric falls with the square of
    the error as long as the margins have no gap (the second term of its expansion; the first vanishes). With `stretch`
    above 1 outputs are therefore also taken `stretch` times as far from the first network's, which reaches across the
    gap, and what is lost then, divided by the square of `stretch`, must be within the floor too.
    """

    def __init__(
        self,
        constraint: Constraint,
        task: Task,
        held: Sequence[Data],
        network: Network,
        progress: Progress = SILENT,
        *,
        errors: float = 0.0,
        stretch: float = 1.0,
    ) -> None:
        self.constraint, self._task, self._held, self._progress = constraint, task, held, progress
        self._errors, self._stretch = errors, stretch
        self._farther = _Farther(network, task, stretch, progress)
        self._scores = self._folds([network] * len(held))
        self._before = statistics.fmean(float(s.mean()) for s in self._scores)
        if errors:
            self._require_enough(sum(len(s) for s in self._scores))

    def _require_enough(self, count: int) -> None:
        """Raises DataError where one sample is more than all that may be lost: a few say nothing when they agree."""
        limit = abs(self.constraint.limit)
        if self.constraint.kind == "change" and is_fraction(_measured(self._task, 1.0)["metric"]) and count * limit < 1:
            raise DataError(
                f"one of the {count} samples to judge by is more than the {100 * limit:g} points that may be lost",
                hint=f"{math.ceil(1 / limit):,} samples can tell so little: give more of them, or allow more",
            )

    def judge(self, networks: Iterable[Network]) -> Verdict:
        """The verdict on `networks`, one for every fold."""
        scores, far = self._both(networks)
        folds = [float(s.mean()) for s in scores]
        now = statistics.fmean(folds)
        words = f"{self._task.metric} {self._shown(self._before)} → {self._shown(now)}"
        surely = now
        if self._errors:
            off = torch.cat(scores) - torch.cat(self._scores)
            doubt = self._errors * float(off.std()) / len(off) ** 0.5 if len(off) > 1 else float("inf")
            surely = now - doubt if self._task.higher_is_better else now + doubt
            words += f" ± {self._shown(doubt)}"
        if far:
            expected = self._before + (torch.cat(far).mean().item() - self._before) / self._stretch**2
            surely = min(surely, expected) if self._task.higher_is_better else max(surely, expected)
            words += f", {self._shown(expected)} expected of other samples"
        row = self.constraint.check(_measured(self._task, surely), _measured(self._task, self._before))
        if len(folds) > 1:
            error = statistics.stdev(folds) / len(folds) ** 0.5
            words += f" ± {self._shown(error)} (standard error of {len(folds)} folds)"
        return Verdict(bool(row["met"]), words)

    def _both(self, networks: Iterable[Network]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores by fold; and of stretched outputs, if these count."""
        if self._stretch == 1:
            return self._folds(networks), []
        pairs = [
            self._farther.scores(n, data, fold) for fold, (n, data) in enumerate(zip(networks, self._held, strict=True))
        ]
        return [near.double() for near, _ in pairs], [far.double() for _, far in pairs]

    def _folds(self, networks: Iterable[Network]) -> list[Tensor]:
        return [
            scores_of(n, data, self._task, progress=self._progress).double()
            for n, data in zip(networks, self._held, strict=True)
        ]

    def _shown(self, value: float) -> str:
        fraction = is_fraction(_measured(self._task, value)["metric"])
        return f"{value:.2%}" if fraction else f"{value:.4g} {self._task.unit}".rstrip()


def _measured(task: Task, value: float) -> dict[str, Any]:
    """A metric in report.json's form."""
    return {"metric": {"name": task.metric, "value": value, "unit": task.unit}}
