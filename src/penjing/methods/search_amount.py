"""SearchAmount: how much another Step may take away before the metric falls below a floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from penjing.data import Data
from penjing.errors import EditError, RecipeError
from penjing.network import Edit, Network
from penjing.network.composing import compose
from penjing.recipe import Context, Plan, Reason, Step, step
from penjing.recipe.judging import HELD_OUT, Judge, read_floor, require_judge
from penjing.task import Task
from penjing.training import randomness

#: Whether an amount holds the floor.
Holds = Callable[[float], bool]


def bisection(most: float, trials: int, resolution: float, holds: Holds) -> float | None:
    """The largest amount found up to `most` that holds, by halving what lies between one that does and one that does
    not, in at most `trials` trials or until they are within `resolution`; None if none held.

    If some amount fails, all above it are taken to fail.
    """
    if holds(most):
        return most
    good, bad = 0.0, most
    for _ in range(trials - 1):
        if bad - good <= resolution:
            break
        middle = (good + bad) / 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good or None


def grid(most: float, trials: int, resolution: float, holds: Holds) -> float | None:
    """The largest of `trials` evenly spaced amounts up to `most` that holds, tried from above; None if none does."""
    return next((a for i in range(trials, 0, -1) if holds(a := most * i / trials)), None)


#: Where a bisection ends if nothing is said, as a share of the most that may go: finer than networks have channels.
_FINEST = 1e-3
_METHODS = {"bisection": bisection, "grid": grid}


@step
@dataclass(frozen=True, kw_only=True)
class SearchAmount(Step):
    """Take away with `step` as much as `floor` allows, at most what `step` itself says.

    `floor` is about the task's metric: "accuracy>=-1%" beside the network that came in, "accuracy>=91%" by itself. A
    trial plans `step` with a smaller amount, then `after` (for example `Finetune`) if there is one, and measures what
    comes out on samples that neither of them saw. Which amounts: `method` "bisection" halves the interval between what
    holds and what does not, `trials` times at most, or until it is no wider than `resolution` (a thousandth of the
    most if nothing is said); "grid" goes down through `trials` evenly spaced amounts until one holds, and takes nothing
    for granted of those below.

    With `folds=1` the share `held_out` of the samples is held out (0.2 if nothing is said), and the network that was
    judged is the result. With more, every sample is held out once: for each fold the Steps see the others, the mean
    over the folds must hold the floor (k-fold cross-validation; its standard error is noted), and the Steps are then
    planned again with all samples. A network remembers what it was trained on: beside that the floor is stricter than
    on other samples.

    With `errors` above 0 the floor must be held by so many standard errors of the difference, sample by sample: a few
    samples cannot prove that little is lost. With `stretch` above 1 it must also be held by what is to be expected of
    samples that the network was not trained on, told from outputs `stretch` times as far off (see `Judge`).

    An amount that `step` cannot reach counts as one that does not hold. If none holds, nothing changes, and the plan
    says so.
    """

    step: Step
    floor: str
    method: str = "bisection"
    trials: int = 8
    folds: int = 1
    held_out: float | None = None
    after: Step | None = None
    resolution: float | None = None
    errors: float = 0.0
    stretch: float = 1.0

    def __post_init__(self) -> None:
        self.require_share("step")
        read_floor(self, self.floor)
        self.require_one_of("method", tuple(_METHODS))
        self.require_whole("trials", 1)
        self.require_whole("folds", 1)
        self.require_between("held_out", 0, 1, open_low=True, open_high=True)
        self.require_step("after")
        self.require_between("resolution", 0, 1, open_low=True)
        self.require_between("errors", 0, float("inf"))
        self.require_between("stretch", 1, float("inf"))
        if self.folds > 1 and self.held_out is not None:
            raise RecipeError(
                "SearchAmount takes either folds or held_out, got both", hint="each of k folds holds 1/k of the samples"
            )
        if self.method == "grid" and self.resolution is not None:
            raise RecipeError(
                "SearchAmount.resolution ends a bisection; a grid is as fine as trials says",
                hint="leave resolution away, or use method='bisection'",
            )

    def check(self, context: Context) -> None:
        """What `step` and `after` need; labelled samples and a task to judge by."""
        self.step.check(context)
        if self.after is not None:
            self.after.check(context)
        require_judge(self, self.floor, context)

    def plan(self, network: Network, context: Context) -> Plan:
        """Tries amounts on copies; the Plan holds the Edits of the largest that holds the floor."""
        self.check(context)
        with randomness.seeded(context.seed):
            return _Search(self, network, context).plan()


@dataclass(frozen=True)
class _Made:
    """What `step` with some amount and `after` make of the network."""

    network: Network
    edits: tuple[Edit, ...]
    plans: tuple[Plan, ...]


class _Search:
    """The trials of one Step on one network."""

    def __init__(self, settings: SearchAmount, network: Network, context: Context) -> None:
        self.settings, self.network, self.context = settings, network, context
        shares = [1 / settings.folds] * settings.folds if settings.folds > 1 else [settings.held_out or HELD_OUT]
        pairs = list(cast(Data, context.data).split(shares, seed=context.seed))
        self.seen = [seen for seen, _ in pairs]
        constraint, task = read_floor(settings, settings.floor), cast(Task, context.task)
        held = [held for _, held in pairs]
        self.judge = Judge(
            constraint, task, held, network, context.progress, errors=settings.errors, stretch=settings.stretch
        )
        self.best: tuple[float, _Made] | None = None
        self.reasons: list[Reason] = []
        self.failures: list[RecipeError | EditError] = []

    def plan(self) -> Plan:
        settings = self.settings
        most = cast(float, settings.step.share())
        description = f"searching how much {settings.step.name} may take"
        with self.context.progress.task(description, settings.trials) as advance:

            def holds(amount: float) -> bool:
                good = self._holds(amount)
                advance(1)
                return good

            amount = _METHODS[settings.method](most, settings.trials, settings.resolution or _FINEST * most, holds)
        if len(self.failures) == len(self.reasons):  # not one amount could be reached: it is not for the amount
            raise self.failures[-1]
        if amount is None or self.best is None:
            least = min(r.score for r in self.reasons if r.score is not None)
            note = f"no amount from {least:.4g} to {most:.4g} holds {settings.floor}: nothing changes"
            self.context.progress.note(note)
            return Plan(step=settings, reasons=tuple(self.reasons), notes=(note,))
        made = self.best[1] if settings.folds == 1 else self._make(amount, self._all_samples)
        last = ", ".join(f"{p.step.name}({_fields(p.step)})" for p in made.plans)
        notes = [f"{amount:.4g} of at most {most:.4g} holds {settings.floor}: {last}"]
        notes += [f"{p.step.name}: {note}" for p in made.plans for note in p.notes]
        reasons = (*self.reasons, *(r for p in made.plans for r in p.reasons))
        return Plan(step=settings, edits=made.edits, reasons=reasons, notes=tuple(notes))

    @property
    def _all_samples(self) -> Data:
        return cast(Data, self.context.data)

    def _holds(self, amount: float) -> bool:
        """Tries an amount on every fold, and keeps the largest that is good."""
        made: list[_Made] = []

        def networks() -> Iterator[Network]:
            for seen in self.seen:  # one at a time: large networks need not all be held at once
                made[:] = [self._make(amount, seen)]
                yield made[0].network

        try:
            verdict = self.judge.judge(networks())
        except (RecipeError, EditError) as error:
            self.failures.append(error)
            return self._note(amount, False, error.message)
        if verdict.met and (self.best is None or amount > self.best[0]):
            self.best = amount, made[0]
        return self._note(amount, verdict.met, verdict.words)

    def _note(self, amount: float, good: bool, words: str) -> bool:
        name = f"trial {len(self.reasons) + 1}"
        self.reasons.append(Reason(layer=name, choice="holds" if good else "does not hold", score=amount, why=words))
        self.context.progress.note(f"{name}, {amount:.4g}: {self.reasons[-1].choice}; {words}")
        return good

    def _make(self, amount: float, samples: Data) -> _Made:
        context = replace(self.context, data=samples)
        edits: tuple[Edit, ...] = ()
        current, plans = self.network, list[Plan]()
        steps: Sequence[Step | None] = (self.settings.step.taking(amount), self.settings.after)
        for inner in steps:
            if inner is not None:
                randomness.seed(context.seed)  # amounts differ in nothing else
                plans.append(inner.plan(current, context))
                edits, current = compose(self.network, edits, plans[-1].edits, now=current)
        return _Made(current, edits, tuple(plans))


def _fields(inner: Step) -> str:
    return ", ".join(f"{field}={value!r}" for field, value in inner.settings().items())
