"""Finetune: train what is left, by labels, by the original network's answers, or by both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penjing.analysis.expose import exposing, shared_sums
from penjing.data import Data
from penjing.errors import DataError, RecipeError
from penjing.network import Network
from penjing.recipe import Context, Plan, matches, step
from penjing.recipe.lessons import (
    LearningStep,
    channels_last,
    count_batches,
    keepable,
    laid_out,
    learned,
    lessons,
    one_pass,
    rates_of,
    require_trainable,
)
from penjing.recipe.watching import watching
from penjing.task import class_dimension, primary
from penjing.tensors.distillation import matching, soft_labels, spread
from penjing.training import Batch, call, train

#: At most so many residual sums are compared: each takes as long as a layer, and neighbours say nearly the same.
_MOST_HINTS = 8
#: Samples on which channels of student and teacher are compared.
_LIKENESS_SAMPLES = 64


@step
@dataclass(frozen=True, kw_only=True)
class Finetune(LearningStep):
    """Train the selected parameters for `epochs` passes (a fraction is fine) over the data.

    `teacher="original"` adds the answers of the network that the recipe started from as soft labels at
    `temperature`, with the weight `alpha` (the labels get 1 - alpha). Without a task or without labels only the
    teacher is followed, which needs no labels at all. `hints` weighs a further term: the mean relative squared
    error at the residual sums that both networks have (Romero et al. 2015, "FitNets", without adapters), at most
    eight of them, in the channels that are still there: those that correlate. Weights that an earlier step masked
    stay zero; of weights that share levels the levels train. `augment="flip-crop"` varies images. The norms'
    statistics follow the training samples; with `where`, only tensors it selects change. `precision="bf16"`
    multiplies in bfloat16: about twice as fast on processors that have it, slower on others. `average` (0.998, say)
    gives the exponential average of the weights over the steps instead of the last ones.

    The rate rises over the first twentieth of the steps and then follows `schedule`: "cosine" or "linear" to zero,
    "constant", or "step" (a tenth after half, a hundredth after three quarters). `accumulate` batches together make a
    step. `held_out` keeps a share of the samples apart and measures the task's metric on them after every epoch
    (without labels or a task, the loss): the result is what measured best. `patience` ends the training after so many
    epochs that were no better (a fifth is held out if nothing else is said).
    """

    teacher: str | None = None
    temperature: float = 4.0
    alpha: float = 0.9
    hints: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("teacher", (None, "original"))
        self.require_between("temperature", 0, float("inf"), open_low=True)
        self.require_between("alpha", 0, 1)
        self.require_between("hints", 0, float("inf"))
        if self.hints and self.teacher is None:
            raise RecipeError("Finetune.hints needs a teacher to take them from", hint="teacher: original")

    def plan(self, network: Network, context: Context) -> Plan:
        """Trains a copy; the Plan holds the new values of every tensor that changed."""
        self.check(context)
        require_trainable(self, network, self.batch_size)
        data, held = self.apart(cast(Data, context.data), context.seed)
        looked_at, taught = network, context.original
        sums: dict[str, tuple[int, Tensor] | None] = {}
        if self.hints:
            count = _LIKENESS_SAMPLES if network.batch_is_dynamic else network.inputs[0].shape[0]
            sums = shared_sums(network, context.original, data.first(count), most=_MOST_HINTS)
            if not sums:
                raise RecipeError(
                    f"Finetune.hints finds no residual sum that {network.name} and its original share",
                    hint="leave hints away",
                )
            looked_at, taught = exposing(network, list(sums)), exposing(context.original, list(sums))
        student = looked_at.module()
        teacher = taught.module() if self.teacher else None
        fast = channels_last(data, student, *([teacher] if teacher else []))
        batches = self._batches(data, teacher, context, fast)
        scale = None
        if teacher is not None and class_dimension(context.task, network.task) is None:
            first = data.first(_LIKENESS_SAMPLES if context.original.batch_is_dynamic else self.batch_size)
            with torch.no_grad():
                scale = spread(primary(self._outputs(call(teacher, laid_out(first, fast)))))
        loss = self._loss(network, context, teacher, sums, scale)
        own = set(network.parameter_names)
        monitor = None
        if held is not None:
            monitor = watching(
                held,
                context.task,
                lambda module, batch: loss(module, (laid_out(batch[0], fast), *batch[1:])),
                lambda module, inputs: self._outputs(call(module, laid_out(inputs, fast))),
                batch_size=self.batch_size,
                fixed=not (network.batch_is_dynamic and context.original.batch_is_dynamic),
                patience=self.patience,
            )
        checkpoint, tracking = context.kept(self, network)
        trained = train(
            student,
            batches,
            loss,
            self.training(context.seed),
            steps_per_epoch=count_batches(data, self.batch_size),
            keep={n: m for n, m in network.masks.items() if n in own},
            rates={**rates_of(network), **context.rates},
            frozen=lambda name: not matches(self.where, name),
            companions=(teacher,) if teacher is not None else (),
            after_step=context.after_step,
            penalty=context.penalty,
            monitor=monitor,
            checkpoint=checkpoint,
            tracking=tracking,
            progress=context.progress,
            description=f"fine-tuning {network.name}",
        )
        return learned(self, network, student, trained, monitor=monitor)

    def check(self, context: Context) -> None:
        """Training needs samples, and labels with a task unless a teacher is followed."""
        if context.data is None:
            raise DataError(
                "Finetune needs samples and no data was given", hint="give data, best what it was trained on"
            )
        if self.teacher is None or self.alpha == 0:
            if context.task is None:
                raise RecipeError(
                    "Finetune needs a task to train by labels, and none was given",
                    hint="give a task, or learn without labels by teacher: original",
                )
            if next(context.data.batches(1, limit=1))[1] is None:
                raise DataError(
                    "Finetune needs labels and the data has none",
                    hint="give labelled samples, or learn without labels by teacher: original",
                )

    def _batches(
        self, data: Data, teacher: nn.Module | None, context: Context, fast: bool
    ) -> Callable[[int], Iterator[Batch]]:
        """Batches (inputs, labels, teacher's answer or None) of an epoch."""
        seed = context.seed
        free = context.original.batch_is_dynamic
        constant = teacher is not None and self.augment is None and not self.hints and self.epochs > 1 and free
        constant = constant and keepable(data, seed)
        kept: list[Batch] = []  # once a training that goes on, or has ended, turns out to need them

        def ask(inputs: Any) -> Tensor:
            return primary(call(cast(nn.Module, teacher), laid_out(inputs, fast)))

        def of_epoch(epoch: int) -> Iterator[Batch]:
            if constant and not kept:
                kept.append(lessons(data, [ask], context.progress, seed=seed))
            known, own = kept[0] if kept else None, seed * 7919 + epoch
            for inputs, labels, answers, _ in one_pass(
                data, known, self.batch_size, seed=own, free=free, augmentation=self.augment
            ):
                yield laid_out(inputs, fast), labels, answers[0] if answers else None

        return of_epoch

    def _outputs(self, given: Any) -> Any:
        """A student's own outputs, without the values that are looked at besides."""
        return given[0] if self.hints else given

    def _loss(
        self,
        network: Network,
        context: Context,
        teacher: nn.Module | None,
        sums: Mapping[str, tuple[int, Tensor] | None],
        scale: float | None,
    ) -> Callable[[nn.Module, Batch], Tensor]:
        task = context.task
        dim = class_dimension(task, network.task)

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            inputs, labels, answer = batch
            outputs = call(module, inputs)
            if self.teacher is None:
                return _by_labels(outputs, labels)
            hint = torch.zeros((), device=pytree.tree_leaves(inputs)[0].device)
            if answer is None and teacher is not None:
                with torch.no_grad():
                    answer = call(teacher, inputs)
                if self.hints:
                    (outputs, seen), (answer, told) = outputs, answer
                    hint = self.hints * torch.stack([matching(seen[n], _like(told[n], sums[n])) for n in told]).mean()
                answer = primary(answer)
            got = primary(outputs)
            soft = matching(got, answer, scale) if dim is None else soft_labels(got, answer, self.temperature, dim)
            # At alpha = 1 the labels are not even looked at, so that they may be anything.
            if task is None or labels is None or self.alpha == 1:
                return soft + hint
            return self.alpha * soft + (1 - self.alpha) * _by_labels(outputs, labels) + hint

        def _by_labels(outputs: Any, labels: Any) -> Tensor:
            if task is None or labels is None:
                raise DataError(
                    "a batch without labels cannot be trained on without a teacher",
                    hint="label every sample, or learn without labels by teacher: original",
                )
            return task.loss(outputs, labels)

        return loss


def _like(told: Tensor, channels: tuple[int, Tensor] | None) -> Tensor:
    """What a teacher gives, in the channels that its student has."""
    return told if channels is None else told.index_select(channels[0], channels[1].to(told.device))
