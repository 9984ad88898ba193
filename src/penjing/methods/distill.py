"""Distill: train a network by what other networks make of the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from penjing.analysis.expose import exposing
from penjing.analysis.features import Comparison, Pair, feature_pairs
from penjing.analysis.learner import Learner
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.network import Network, SetWeights
from penjing.recipe import Context, Plan, Reason, matches, step
from penjing.recipe.answers import AnswerLoss
from penjing.recipe.continuation import continued
from penjing.recipe.judging import scores_of
from penjing.recipe.lessons import (
    LearningStep,
    channels_last,
    count_batches,
    fits_in_memory,
    laid_out,
    learned,
    lessons,
    one_pass,
    rates_of,
    require_batch_size,
    require_trainable,
)
from penjing.recipe.resuming import network_digest
from penjing.recipe.watching import watching
from penjing.task import class_dimension, primary
from penjing.tensors.distillation import LOGIT_LOSSES, Softening, merged
from penjing.tensors.feature_losses import FEATURE_LOSSES
from penjing.training import Batch, Monitor, call, train

#: Samples that a peer's metric is told of.
_PEER_SAMPLES = 1000


@step
@dataclass(frozen=True, kw_only=True)
class Distill(LearningStep):
    """Train the network by the answers of `teacher`: "original" (what the recipe started from), a name or several of
    `compress(..., teachers=)`, which are averaged by `teacher_weights`, or "self". The student is the network that the
    recipe is at; a teacher may be of any architecture whose main output has the same shape.

    `logits` says how answers are compared where the task has classes: "soft-labels" at `temperature` (the student's own
    may be `student_temperature`), "standardized" (Sun et al. 2024; without a range to copy, 2 is a good temperature),
    "dkd" (Zhao et al. 2022; `target_weight` and `other_weight` are its alpha and beta), "multi-level" (Jin et al.
    2023), "matching" (the values; so, too, where there are no classes). That term weighs `alpha`, the labels 1 - alpha;
    without a task or labels only teachers are followed.

    "self" is the mean teacher (Tarvainen & Valpola 2017): a running average of the student's weights, of which each
    step keeps `self_average`; with `augment` it sees class samples as they are while the student sees them varied. It
    needs labels, or a teacher beside it.

    `features` compares inner values with those of the first teacher, weighed by `feature_weight`: "auto", or
    {student's: teacher's} by names of graph values, paths of layers, or shell patterns of them. `feature_loss` is
    "fitnet" (Romero et al. 2015), "attention" (Zagoruyko & Komodakis 2017), "similarity" (Tung & Mori 2019) or
    "contrast" (after Tian et al. 2020). What must be learned to compare them trains along and is thrown away.

    `mutual` names networks that learn from the student as it learns from them (Zhang et al. 2018, "Deep mutual
    learning"), and from the teacher, unless that is None. The result is the student.

    `sequence` lets the teacher continue the first `prompt` tokens of every sample by so many, the likeliest ones or
    drawn at temperature `sampling`; they take the place of samples and labels (Kim & Rush 2016, "Sequence-level
    knowledge distillation").

    Answers that do not change are asked for once. `cache` is a folder to keep them in, for the next run too.
    """

    keeping: ClassVar[tuple[str, ...]] = ("cache",)

    teacher: str | list[str] | None = "original"
    teacher_weights: list[float] = field(default_factory=list)
    logits: str = "soft-labels"
    temperature: float = 4.0
    student_temperature: float | None = None
    target_weight: float = 1.0
    other_weight: float = 8.0
    alpha: float = 0.9
    self_average: float = 0.999
    features: dict[str, str] | str | None = None
    feature_loss: str = "fitnet"
    feature_weight: float = 1.0
    mutual: list[str] = field(default_factory=list)
    sequence: int = 0
    prompt: int = 8
    sampling: float = 0.0
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        infinity = float("inf")
        self.require_names("teacher")
        self.require_names("mutual")
        if not isinstance(self.mutual, list):
            raise RecipeError(f"Distill.mutual must be a list of names, got {self.mutual!r}", hint="mutual: [peer]")
        self.require_one_of("logits", LOGIT_LOSSES.names())
        self.require_one_of("feature_loss", FEATURE_LOSSES.names())
        for name in ("temperature", "student_temperature"):
            self.require_between(name, 0, infinity, open_low=True)
        for name in ("target_weight", "other_weight", "feature_weight", "sampling"):
            self.require_between(name, 0, infinity)
        self.require_between("alpha", 0, 1)
        self.require_between("self_average", 0, 1, open_high=True)
        self.require_whole("sequence", 0)
        self.require_whole("prompt", 1)
        if not self.taught_by and not self.mutual:
            raise RecipeError(
                "Distill learns from nobody: teacher is empty", hint="teacher: original, or mutual: [name]"
            )
        weights = self.teacher_weights
        if not isinstance(weights, list) or any(not isinstance(w, int | float) or w <= 0 for w in weights):
            raise RecipeError(f"Distill.teacher_weights must be numbers above 0, got {weights!r}", hint="leave it away")
        if not isinstance(self.features, dict) and self.features not in (None, "auto"):
            raise RecipeError(
                f"Distill.features must be 'auto' or a mapping, got {self.features!r}",
                hint="features: {student's value: teacher's value}",
            )
        if self.features is not None and not self.taught_by:
            raise RecipeError("Distill.features needs a teacher to take them from", hint="teacher: original")
        if self.cache is not None and (self.augment or self.features is not None or not self._lasting):
            raise RecipeError(
                "Distill.cache keeps answers that do not change, and augment, features or teacher: self change them",
                hint="leave cache away",
            )
        if self.sequence and not self._lasting:
            raise RecipeError("Distill.sequence needs a teacher that continues the prompts", hint="teacher: original")

    @property
    def taught_by(self) -> list[str]:
        """The names of teachers."""
        return [self.teacher] if isinstance(self.teacher, str) else list(self.teacher or [])

    @property
    def _lasting(self) -> bool:
        return bool(self.taught_by) and "self" not in self.taught_by

    def check(self, context: Context) -> None:
        """Samples and teachers are needed; labels, too, where nobody but the student and its peers says anything."""
        if context.data is None:
            raise DataError("Distill needs samples and no data was given", hint="labels are not needed")
        count = sum(len(context.networks(n, "Distill.teacher")) if n != "self" else 1 for n in self.taught_by)
        if self.teacher_weights and len(self.teacher_weights) != count:
            raise RecipeError(
                f"Distill.teacher_weights has {len(self.teacher_weights)} numbers for {count} teachers",
                hint="one for each, in order",
            )
        for name in self.mutual:
            context.networks(name, "Distill.mutual")
        alone = all(name == "self" for name in self.taught_by)
        unlabelled = context.task is None or next(context.data.batches(1, limit=1))[1] is None
        if alone and (unlabelled or self.alpha == 1):
            raise RecipeError(
                "Distill has nothing to learn the truth from: no teacher but the students themselves, and no labels",
                hint="give labels and a task and alpha below 1, or teacher: original",
            )
        if self.sequence and class_dimension(context.task, context.original.task) != -1:
            raise RecipeError(
                "Distill.sequence continues texts, and the task is no language modelling",
                hint="task='language-modelling', or leave sequence away",
            )

    def plan(self, network: Network, context: Context) -> Plan:
        """Trains copies; the Plan holds the new values of every tensor of the student that changed."""
        self.check(context)
        require_trainable(self, network, self.batch_size)
        return _Lesson(self, network, context).plan()


class _Lesson:
    def __init__(self, settings: Distill, network: Network, context: Context) -> None:
        self.settings, self.network, self.context = settings, network, context
        self.data, self.held = settings.apart(cast(Data, context.data), context.seed)
        self.dim = class_dimension(context.task, network.task)
        named = [(n, context.networks(n, "Distill.teacher")) for n in settings.taught_by if n != "self"]
        self.teachers = [network for _, several in named for network in several]
        self.peers = [(n, held) for n in settings.mutual for held in context.networks(n, "Distill.mutual")]
        self.free = all(n.batch_is_dynamic for n in (network, *self.teachers, *(p for _, p in self.peers)))
        self.first = self.data.first(2 if self.free else settings.batch_size)
        self.pairs = self._pairs()
        exposed = [(network, [a.name for a, _ in self.pairs])]
        looked = self.teachers[:1] if settings.taught_by[:1] != ["self"] else []
        exposed += [(t, [b.name for _, b in self.pairs] if t in looked else []) for t in self.teachers]
        exposed += exposed[:1] if "self" in settings.taught_by else []
        modules = [(exposing(n, list(dict.fromkeys(v))) if v else n).module() for n, v in exposed]
        self.exposed = [m for m, (_, values) in zip(modules, exposed, strict=True) if values]
        shadow = modules.pop() if "self" in settings.taught_by else None
        self.told = modules[1:]
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            comparison = Comparison(self.pairs, settings.feature_loss) if self.pairs else None
        self.learner = Learner(modules[0], [p.module() for _, p in self.peers], shadow, comparison)
        self.weights = self._weights()
        self.answer_loss = AnswerLoss(
            logits=settings.logits if self.dim is not None else None,
            softening=Softening(
                temperature=settings.temperature,
                student_temperature=settings.student_temperature,
                dim=1 if self.dim is None else self.dim,
                target_weight=settings.target_weight,
                other_weight=settings.other_weight,
            ),
            alpha=settings.alpha,
            by_labels=context.task.loss if context.task is not None else None,
        )
        every = [self.learner.student, *self.learner.peers, *self.told, *([shadow] if shadow is not None else [])]
        self.fast = channels_last(self.data, *every)
        self._require_one_shape(every)

    def _pairs(self) -> list[Pair]:
        chosen, how = self.settings.features, self.settings.feature_loss
        if chosen is None:
            return []
        teacher = self.network if self.settings.taught_by[0] == "self" else self.teachers[0]
        return feature_pairs(self.network, teacher, self.first, chosen, how, field="Distill.features")

    def _weights(self) -> list[float]:
        """The weights of answers: of the networks first, of the student's own average last."""
        given = iter(self.settings.teacher_weights)
        own: list[float] = []
        others: list[float] = []
        for name in self.settings.taught_by:
            count = 1 if name == "self" else len(self.context.networks(name, "Distill.teacher"))
            (own if name == "self" else others).extend(next(given, 1.0) for _ in range(count))
        return [*others, *own]

    def _require_one_shape(self, modules: list[nn.Module]) -> None:
        networks = (self.network, *(p for _, p in self.peers), *self.teachers)
        with torch.no_grad():
            shapes = [self._main(call(m, laid_out(self.first, self.fast)), m).shape for m in modules[: len(networks)]]
        for network, shape in zip(networks, shapes, strict=True):
            if network.has_integer_grids and any(network is p for _, p in self.peers):
                raise RecipeError(
                    f"Distill.mutual: {network.name} is quantized and cannot learn", hint="let it be a teacher"
                )
            require_batch_size(self.settings, network, self.settings.batch_size)
            if shape != shapes[0]:
                one, other = ("×".join(map(str, s)) for s in (shape, shapes[0]))
                raise RecipeError(
                    f"Distill: the main output of {network.name} is {one} and that of {self.network.name} {other}",
                    hint="teachers, peers and student must answer the same question, with as many classes",
                )

    def _own(self, outputs: Any, module: nn.Module) -> Any:
        """A network's own outputs, without the inner values that are looked at besides."""
        return outputs[0] if module in self.exposed else outputs

    def _main(self, outputs: Any, module: nn.Module) -> Tensor:
        return primary(self._own(outputs, module))

    # -------------------------------------------------------------------------------------------------------- training
    def plan(self) -> Plan:
        settings, context = self.settings, self.context
        if settings.sequence:
            self.data = continued(
                self.data, self._together, prompt=settings.prompt, tokens=settings.sequence,
                temperature=settings.sampling, seed=context.seed, progress=context.progress,
                fixed=None if self.free else settings.batch_size,
            )  # fmt: skip
        learner, peers = self.learner, [p for _, p in self.peers]
        named = [("student", self.network), *((f"peers.{i}", p) for i, p in enumerate(peers))]
        own = {(place, n) for place, network in named for n in network.parameter_names}
        rates = {f"{at}.{n}": rate for at, network in named for n, rate in rates_of(network).items()}
        added = context.penalty
        monitor = self._monitor()
        checkpoint, tracking = (
            context.trainings.of(settings, self.network, context) if context.trainings else (None, None)
        )
        trained = train(
            learner,
            self._batches(),
            self._loss,
            settings.training(context.seed),
            steps_per_epoch=count_batches(self.data, settings.batch_size),
            keep={f"{at}.{n}": m for at, network in named for n, m in network.masks.items() if (at, n) in own},
            rates=rates | {f"student.{name}": rate for name, rate in self.context.rates.items()},
            frozen=self._frozen,
            companions=tuple(self.told),
            after_step=self._after_step,
            penalty=added and (lambda module: added(cast(Learner, module).student)),
            monitor=monitor,
            checkpoint=checkpoint,
            tracking=tracking,
            progress=context.progress,
            description=f"distilling {self.network.name}",
        )
        notes = [f"{a.name} compared with {b.name}" for a, b in self.pairs]
        plan = learned(settings, self.network, learner.student, trained, notes, monitor)
        return Plan(step=settings, edits=plan.edits, reasons=(*plan.reasons, *self._said_of_peers()), notes=plan.notes)

    def _monitor(self) -> Monitor | None:
        if self.held is None:
            return None

        def outputs(module: nn.Module, inputs: Any) -> Any:
            student = cast(Learner, module).student
            return self._own(call(student, laid_out(inputs, self.fast)), student)

        return watching(
            self.held,
            self.context.task,
            lambda module, batch: self._loss(module, (laid_out(batch[0], self.fast), batch[1], (), None)),
            outputs,
            batch_size=self.settings.batch_size,
            fixed=not self.free,
            patience=self.settings.patience,
        )

    def _frozen(self, name: str) -> bool:
        place, _, path = name.partition(".")
        return place == "shadow" or (place == "student" and not matches(self.settings.where, path))

    def _after_step(self, module: nn.Module, done: float, rate: float) -> None:
        learner = cast(Learner, module)
        if self.context.after_step is not None:
            self.context.after_step(learner.student, done, rate)
        learner.follow(self.settings.self_average)

    def _together(self, inputs: Any) -> Tensor:
        """What the teachers answer together."""
        inputs = laid_out(inputs, self.fast)
        answers = [self._main(call(t, inputs), t) for t in self.told]
        return merged(answers, self.weights[: len(answers)], self.settings.temperature, self.dim)

    def _batches(self) -> Callable[[int], Iterator[Batch]]:
        """Batches (inputs, labels, teachers' answers, inputs as they were where `augment` has varied them)."""
        settings = self.settings
        constant = bool(self.told) and not settings.augment and not self.pairs and self.free
        constant &= settings.cache is not None or (settings.epochs > 1 and fits_in_memory(self.data))
        kept: list[Batch] = []  # once they are needed

        shown = settings.augment is not None and self.learner.shadow is not None and self.dim == 1

        def of_epoch(epoch: int) -> Iterator[Batch]:
            if constant and not kept:
                kept.append(self._answers())
            known, own = kept[0] if kept else None, self.context.seed * 7919 + epoch
            for inputs, labels, answers, plain in one_pass(
                self.data, known, settings.batch_size, seed=own, free=self.free, augmentation=settings.augment
            ):
                yield laid_out(inputs, self.fast), labels, answers, laid_out(plain, self.fast) if shown else None

        return of_epoch

    def _answers(self) -> Batch:
        def asking(module: nn.Module) -> Callable[[Any], Tensor]:
            return lambda inputs: primary(call(module, laid_out(inputs, self.fast)))

        return lessons(
            self.data,
            [asking(t) for t in self.told],
            self.context.progress,
            seed=self.context.seed,
            folder=self.settings.cache,
            digests=[network_digest(t) for t in self.teachers] if self.settings.cache is not None else (),
        )

    # ------------------------------------------------------------------------------------------------------------ loss
    def _loss(self, module: nn.Module, batch: Batch) -> Tensor:
        inputs, labels, answers, plain = batch
        told: dict[str, Tensor] = {}
        if not answers and self.told:
            with torch.no_grad():
                given = [call(t, inputs) for t in self.told]
            if self.pairs and self.settings.taught_by[0] != "self":
                told = given[0][1]
            answers = [self._main(g, t) for g, t in zip(given, self.told, strict=True)]
        outputs, own, compared = module(inputs, told, plain)
        answers = [*answers, *([] if own is None else [primary(own)])]
        teacher = merged(answers, self.weights, self.settings.temperature, self.dim) if answers else None
        loss = self.answer_loss(outputs, teacher, labels)
        if compared is not None and self.learner.comparison is not None:
            loss = loss + self.settings.feature_weight * self.learner.comparison.loss(compared)
        return loss

    def _said_of_peers(self) -> Iterator[Reason]:
        """What every peer has come to, on samples that it learned from."""
        task = self.context.task
        labelled = task is not None and next(self.data.batches(1, limit=1))[1] is not None
        for (name, network), module in zip(self.peers, self.learner.peers, strict=True):
            held, why, score = module.state_dict(), "", None
            if task is not None and labelled:
                after = network.apply(SetWeights(parameter=n, value=held[n]) for n in network.tensors() if n in held)
                scores = [scores_of(n, self.data, task, limit=_PEER_SAMPLES) for n in (network, after)]
                was, score = (float(s.double().mean()) for s in scores)
                why = f"{task.metric} on {len(scores[0])} samples that it learned from; {was:.4g} before"
            yield Reason(layer=f"peer {name}", score=score, choice="learned along", why=why)
