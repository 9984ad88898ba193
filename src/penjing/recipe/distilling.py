"""A training by the answers of other networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from penjing.analysis.expose import exposing
from penjing.analysis.features import Comparison, Pair, feature_pairs
from penjing.analysis.learner import Learner
from penjing.data import Data
from penjing.errors import RecipeError
from penjing.network import Network, SetWeights
from penjing.recipe.answers import AnswerLoss
from penjing.recipe.context import Context
from penjing.recipe.continuation import continued
from penjing.recipe.judging import scores_of
from penjing.recipe.lessons import (
    channels_last,
    count_batches,
    keepable,
    laid_out,
    learned,
    lessons,
    one_pass,
    rates_of,
    require_batch_size,
    varies,
)
from penjing.recipe.plans import Plan, Reason
from penjing.recipe.resuming import network_digest
from penjing.recipe.steps import matches
from penjing.recipe.watching import watching
from penjing.task import class_dimension, primary
from penjing.tensors.distillation import Softening, merged, spread
from penjing.training import Batch, Monitor, call, train

#: Samples that a peer's metric is told of.
_PEER_SAMPLES = 1000


class Distilling:
    """One training of a student by its teachers and with its peers, as the Step `settings` (a Distill) says."""

    def __init__(self, settings: Any, network: Network, context: Context) -> None:
        self.settings, self.network, self.context = settings, network, context
        self.data, self.held = settings.apart(cast(Data, context.data), context.seed)
        self.dim = class_dimension(context.task, network.task)
        named = [(n, context.networks(n, "Distill.teacher")) for n in settings.taught_by if n != "self"]
        self.teachers = [network for _, several in named for network in several]
        self.peers = [(n, held) for n in settings.mutual for held in context.networks(n, "Distill.mutual")]
        self.free = all(n.batch_is_dynamic for n in (network, *self.teachers, *(p for _, p in self.peers)))
        self.first = self.data.first(16 if self.free else settings.batch_size)
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
        answers = self._answers_of_one_shape(every)
        if self.dim is None:
            self.answer_loss = replace(self.answer_loss, scale=spread(answers[-1]))

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

    def _answers_of_one_shape(self, modules: list[nn.Module]) -> list[Tensor]:
        networks = (self.network, *(p for _, p in self.peers), *self.teachers)
        answers = [self._first_answer(n, m) for n, m in zip(networks, modules, strict=False)]
        shapes = [a.shape for a in answers]
        if self.dim is not None and shapes[0][self.dim] < 2:
            raise RecipeError(
                f"Distill: {self.network.name} scores one class only", hint="task='regression', or no task"
            )
        for network, shape in zip(networks, shapes, strict=True):
            if network.has_integer_grids and any(network is p for _, p in self.peers):
                raise RecipeError(
                    f"Distill.mutual: {network.name} is quantized and cannot learn", hint="let it be a teacher"
                )
            require_batch_size(self.settings, network, self.settings.batch_size)
            if shape != shapes[0]:
                one, other = ("×".join(["N", *map(str, s[1:])]) for s in (shape, shapes[0]))
                raise RecipeError(
                    f"Distill: the main output of {network.name} is {one} and that of {self.network.name} {other}",
                    hint="teachers, peers and student must answer the same question, with as many classes",
                )
        return answers

    @torch.no_grad()
    def _first_answer(self, network: Network, module: nn.Module) -> Tensor:
        try:
            return self._main(call(module, laid_out(self.first, self.fast)), module)
        except (RuntimeError, TypeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise RecipeError(
                f"Distill: {network.name} does not take the samples of {self.network.name}: {why}",
                hint="teachers, peers and student look at the same inputs",
            ) from error

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
        if constant and settings.cache is not None and varies(self.data, self.context.seed):
            raise RecipeError(
                "Distill.cache keeps answers, and these samples are others each time they are read",
                hint="leave cache away, or let the dataset give its samples as they are",
            )
        constant &= settings.cache is not None or (settings.epochs > 1 and keepable(self.data, self.context.seed))
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
