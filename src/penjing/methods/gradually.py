"""Gradually: what another Step takes at once goes in rounds, and the network recovers in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast

from penjing.analysis.footprint import footprint
from penjing.analysis.remaining import remaining
from penjing.data import Data
from penjing.errors import PenjingError, RecipeError
from penjing.network import Edit, Network
from penjing.network.composing import compose
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.judging import HELD_OUT, Judge, Verdict, read_floor, require_judge
from penjing.recipe.resuming import Rounds
from penjing.task import Task
from penjing.training import randomness

#: The part of the whole that is gone after the part `t` (0 to 1) of the rounds; `whole` is the share that goes in all.
_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cubic": lambda t, whole: 1 - (1 - t) ** 3,
    "linear": lambda t, whole: t,
    "geometric": lambda t, whole: (1 - (1 - whole) ** t) / whole,
    "one-shot": lambda t, whole: 1.0,
}


def scheduled(schedule: str, whole: float, rounds: int) -> list[float]:
    """The shares that are gone after each of the rounds, the last of them exactly `whole`.

    "cubic": s_t = s_f + (s_i - s_f)(1 - t/n)³ with s_i = 0 (Zhu and Gupta 2017, "To prune, or not to prune", §3).
    "geometric": each round takes the same share of what is left (Han et al. 2015; Frankle and Carbin 2019).
    """
    part = _SCHEDULES[schedule]
    return [*(whole * part(r / rounds, whole) for r in range(1, rounds)), whole]


@step
@dataclass(frozen=True, kw_only=True)
class Gradually(Step):
    """Take away in `rounds` what `step` would take at once, and apply `between`, for example `Finetune`, after each.

    After round r of R the share s of `step` is gone as far as `schedule` says: "cubic" s·(1 - (1 - r/R)³), "linear"
    s·r/R, "geometric" 1 - (1 - s)^(r/R), the same share of what is left in each round; with "one-shot" all goes in the
    first round, and the others only do what is in between. Each round decides on the network as it then is; masks of
    earlier rounds stay. Factorize and CodeWeights take once: only "one-shot" or `rounds=1` suits them.

    `floor` holds the task's metric: "accuracy>=-1%" beside the network that came in, "accuracy>=91%" by itself. It is
    measured after each round on the share `held_out` of the samples (0.2 if nothing is said), which neither `step` nor
    `between` sees. The first round below ends it: that round is undone, and what the ones before reached is the result;
    if it was the first, nothing changes. The plan says so. A network remembers what it was trained on: beside that the
    floor is stricter than on other samples.

    `resume` names a folder in which the last round is kept, and the training under way. A run that was killed and is
    started again, with the same network, settings, samples, task and seed, goes on there and ends with the same
    network; another run is refused. With "original" as teacher, it is the original of the recipe in all rounds.
    """

    keeping: ClassVar[tuple[str, ...]] = ("resume",)

    step: Step
    rounds: int = 5
    schedule: str = "cubic"
    between: Step | None = None
    floor: str | None = None
    held_out: float | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        self.require_share("step")
        self.require_whole("rounds", 1)
        self.require_one_of("schedule", tuple(_SCHEDULES))
        self.require_step("between")
        self.require_between("held_out", 0, 1, open_low=True, open_high=True)
        if self.held_out is not None and self.floor is None:
            raise RecipeError("Gradually.held_out is for a floor, and there is none", hint="floor: accuracy>=-1%")
        if self.resume is not None and (not isinstance(self.resume, str) or not self.resume):
            raise RecipeError(
                f"Gradually.resume must be the path of a folder, as text, got {self.resume!r}",
                hint="for example resume='rounds'",
            )
        if self.floor is not None:
            read_floor(self, self.floor)
        for before, share in zip([0.0, *self.shares], self.shares, strict=False):
            if share > before:  # a Step that cannot take less (a pattern) says so now
                self.step.taking(share, before=before)

    @property
    def shares(self) -> list[float]:
        """The share that is gone after each round."""
        return scheduled(self.schedule, cast(float, self.step.share()), self.rounds)

    def share(self) -> float | None:
        """What `step` takes away."""
        return self.step.share()

    def taking(self, share: float, *, before: float = 0.0, left: Mapping[str, float] | None = None) -> Self:
        """These rounds with `step` set to take `share` away, without a folder to resume: it belongs to one run only."""
        return replace(self, step=self.step.taking(share, before=before, left=left), resume=None)

    def check(self, context: Context) -> None:
        """What `step` and `between` need; a floor needs labelled samples and a task."""
        self.step.check(context)
        if self.between is not None:
            self.between.check(context)
        if self.floor is not None:
            require_judge(self, self.floor, context)

    def plan(self, network: Network, context: Context) -> Plan:
        """Goes through all rounds on copies; one set of Edits leads from `network` to what they reached."""
        self.check(context)
        with randomness.seeded(context.seed):
            return _Run(self, network, context).plan()


class _Run:
    """The rounds of one Step on one network."""

    def __init__(self, settings: Gradually, start: Network, context: Context) -> None:
        self.settings, self.start, self.progress = settings, start, context.progress
        self.kept = Rounds(settings.resume, settings, start, context) if settings.resume is not None else None
        self.context = replace(context, trainings=self.kept.trainings(context.trainings)) if self.kept else context
        self.judge: Judge | None = None
        if settings.floor is not None:
            share = HELD_OUT if settings.held_out is None else settings.held_out
            ((seen, held),) = cast(Data, context.data).split([share], seed=context.seed)
            self.context = replace(self.context, data=seen)
            constraint, task = read_floor(settings, settings.floor), cast(Task, context.task)
            self.judge = Judge(constraint, task, [held], start, context.progress)

    def plan(self) -> Plan:
        done = self.kept.finished() if self.kept else None
        if done is not None:
            return replace(done, step=self.settings)
        first, reached = self._begin()
        current = self.start.apply(reached.edits)
        for number in range(first, self.settings.rounds + 1):
            edits, after, notes = self._round(number, reached.edits, current)
            verdict = self.judge.judge([after]) if self.judge else None
            good = verdict is None or verdict.met
            reasons = (*reached.reasons, self._row(number, after, verdict))
            self.progress.note(f"{reasons[-1].layer}: {reasons[-1].choice}; {reasons[-1].why}")
            if not good:
                stays = "nothing changes" if number == 1 else f"what round {number - 1} left is the result"
                said = f"round {number} fell below {self.settings.floor}: {stays}"
                self.progress.note(said)
                reached = replace(reached, reasons=reasons, notes=(*reached.notes, said))
                break
            reached = replace(reached, edits=edits, reasons=reasons, notes=(*reached.notes, *notes))
            current = after
            if self.kept:
                self.kept.keep(number, reached)
        final = replace(reached, reasons=(*reached.reasons, *_weights(self.start, current)))
        if self.kept:
            self.kept.finish(final)
        return final

    def _begin(self) -> tuple[int, Plan]:
        """The round to begin with, and what is planned until then."""
        found = self.kept.latest() if self.kept else None
        if found is None:
            return 1, Plan(step=self.settings)
        self.progress.note(f"going on after round {found[0]}, which {self.settings.resume} holds")
        return found[0] + 1, replace(found[1], step=self.settings)

    def _round(
        self, number: int, edits: tuple[Edit, ...], current: Network
    ) -> tuple[tuple[Edit, ...], Network, list[str]]:
        """What one round adds to `edits`, the network after it, and the notes of its Steps."""
        settings, shares = self.settings, [0.0, *self.settings.shares]
        notes: list[str] = []
        steps = [settings.between] if settings.between else []
        if shares[number] > shares[number - 1]:
            left = remaining(self.start, current, edits, lambda name: matches(settings.step.where, name))
            taken = settings.step.taking(shares[number], before=shares[number - 1], left=left if number > 1 else None)
            steps.insert(0, taken)
        # Every round draws other samples in another order; the first draws what the Step alone would.
        context = replace(self.context, seed=self.context.seed + number - 1)
        for inner in steps:
            randomness.seed(context.seed)
            with _naming(f"round {number} of {settings.rounds}"):
                plan = inner.plan(current, context)
                edits, current = compose(self.start, edits, plan.edits, now=current)
            notes += [f"round {number}, {inner.name}: {note}" for note in plan.notes]
        return edits, current, notes

    def _row(self, number: int, after: Network, verdict: Verdict | None) -> Reason:
        share, rounds = self.settings.shares[number - 1], self.settings.rounds
        size, now = footprint(self.start), footprint(after)
        parts = [
            f"parameters {now.parameters / max(size.parameters, 1):.1%}",
            f"multiply-accumulates {now.macs / max(size.macs, 1):.1%}",
        ]
        if after.masks:
            zero = sum(int((~m).sum()) for m in after.masks.values()) / sum(m.numel() for m in after.masks.values())
            parts.append(f"{zero:.1%} of masked tensors zero")
        if verdict is not None:
            parts.append(verdict.words)
        undone = verdict is not None and not verdict.met
        choice = "undone" if undone else "kept"
        return Reason(layer=f"round {number} of {rounds}", choice=choice, score=share, why="; ".join(parts))


def _weights(start: Network, end: Network) -> Iterator[Reason]:
    """What all rounds together made of every matrix and kernel."""
    old, new = start.tensors(), end.tensors()
    for name in start.parameter_names:
        if old[name].ndim < 2:
            continue
        before = "×".join(map(str, old[name].shape))
        if name not in new:
            yield Reason(layer=name, choice="gone", why=before)
            continue
        after = "×".join(map(str, new[name].shape))
        if after != before:
            yield Reason(layer=name, choice=after, why=f"of {before}")
        mask = end.masks.get(name)
        if mask is not None:
            zero = 1 - float(mask.float().mean())
            yield Reason(layer=name, choice=f"{zero:.1%} zero", score=zero, why=after)


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Says in which round something went wrong."""
    try:
        yield
    except PenjingError as error:
        raise type(error)(f"{place}: {error.message}", hint=error.hint) from error
