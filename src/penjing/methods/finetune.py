"""Finetune: train what is left, by labels, by the original network's answers, or by both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penjing.analysis.expose import exposing, shared_sums
from penjing.data import Data, concatenate
from penjing.errors import DataError, RecipeError
from penjing.network import Network, SetWeights
from penjing.progress import Progress
from penjing.recipe import Context, Plan, Reason, Step, matches, step
from penjing.recipe.judging import HELD_OUT
from penjing.recipe.watching import watching
from penjing.task import class_dimension, primary
from penjing.tensors.distillation import matching, soft_labels
from penjing.training import (
    AUGMENTATIONS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    Batch,
    Monitor,
    Trained,
    Training,
    augment,
    call,
    randomness,
    train,
)

#: The teacher's answers are kept, instead of asked for every epoch, while samples and answers stay below this.
_CACHE_BYTES = 2 << 30
#: At most so many residual sums are compared: each takes as long as a layer, and neighbours say nearly the same.
_MOST_HINTS = 8
#: Samples on which channels of student and teacher are compared.
_LIKENESS_SAMPLES = 64


@step
@dataclass(frozen=True, kw_only=True)
class Finetune(Step):
    """Train the selected parameters for `epochs` passes (a fraction is fine) over the data.

    `teacher="original"` adds the answers of the network that the recipe started from as soft labels at
    `temperature`, with the weight `alpha` (the labels get 1 - alpha). Without a task or without labels only the
    teacher is followed, which needs no labels at all. `hints` weighs a further term: the mean relative squared
    error at the residual sums that both networks have (Romero et al. 2015, "FitNets", without adapters), at most
    eight of them, in the channels that are still there: those that correlate. Weights that an earlier step masked
    stay zero; of weights that share levels the levels train. `augment` varies images: "flip-crop" as is usual for
    photographs, "affine" (turned, scaled and shifted a little) for what must not be mirrored, digits say. The norms'
    statistics follow the training samples; with `where`, only tensors it selects change. `precision="bf16"`
    multiplies in bfloat16: about twice as fast on processors that have it, slower on others. `average` (0.998, say)
    gives the exponential average of the weights over the steps instead of the last ones.

    The rate rises over the first twentieth of the steps and then follows `schedule`: "cosine" or "linear" to zero,
    "constant", or "step" (a tenth after half, a hundredth after three quarters). `accumulate` batches together make a
    step. `held_out` keeps a share of the samples apart and measures the task's metric on them after every epoch
    (without labels or a task, the loss): the result is what measured best. `patience` ends the training after so many
    epochs that were no better (a fifth is held out if nothing else is said).
    """

    learns: ClassVar[bool] = True

    epochs: float = 2
    lr: float = 0.01
    teacher: str | None = None
    temperature: float = 4.0
    alpha: float = 0.9
    batch_size: int = 64
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    augment: str | None = None
    hints: float = 0.0
    precision: str = "f32"
    average: float = 0.0
    schedule: str = "cosine"
    accumulate: int = 1
    held_out: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        infinity = float("inf")
        self.require_between("epochs", 0, infinity, open_low=True)
        self.require_between("lr", 0, infinity, open_low=True)
        self.require_one_of("teacher", (None, "original"))
        self.require_between("temperature", 0, infinity, open_low=True)
        self.require_between("alpha", 0, 1)
        self.require_between("batch_size", 1, infinity)
        self.require_one_of("optimizer", tuple(OPTIMIZERS))
        self.require_between("weight_decay", 0, infinity)
        self.require_one_of("augment", (None, *AUGMENTATIONS))
        self.require_between("hints", 0, infinity)
        self.require_between("average", 0, 1, open_high=True)
        self.require_one_of("precision", PRECISIONS)
        self.require_one_of("schedule", SCHEDULES.names())
        self.require_whole("accumulate", 1)
        self.require_between("held_out", 0, 1, open_low=True, open_high=True)
        self.require_between("patience", 1, infinity)
        if self.hints and self.teacher is None:
            raise RecipeError("Finetune.hints needs a teacher to take them from", hint="teacher: original")

    def plan(self, network: Network, context: Context) -> Plan:
        """Trains a copy; the Plan holds the new values of every tensor that changed."""
        self.check(context)
        self._fits(network)
        data, held = cast(Data, context.data), None
        if self.held_out is not None or self.patience is not None:
            ((data, held),) = data.split([self.held_out or HELD_OUT], seed=context.seed)
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
        fast = _channels_last(data, student, *([teacher] if teacher else []))
        batches = self._batches(data, teacher, context, fast)
        loss = _with_penalty(self._loss(network, context, teacher, sums), context.penalty)
        learned = set(network.parameter_names)
        monitor = None
        if held is not None:
            monitor = watching(
                held,
                context.task,
                lambda module, batch: loss(module, (_laid_out(batch[0], fast), *batch[1:])),
                lambda module, inputs: self._outputs(call(module, _laid_out(inputs, fast))),
                batch_size=self.batch_size,
                fixed=not (network.batch_is_dynamic and context.original.batch_is_dynamic),
                patience=self.patience,
            )
        checkpoint, tracking = context.trainings.of(self, network, context) if context.trainings else (None, None)
        trained = train(
            student,
            batches,
            loss,
            Training(
                epochs=self.epochs,
                lr=self.lr,
                optimizer=self.optimizer,
                weight_decay=self.weight_decay,
                seed=context.seed,
                precision=self.precision,
                average=self.average,
                schedule=self.schedule,
                accumulate=self.accumulate,
            ),
            steps_per_epoch=_count_batches(data, self.batch_size),
            keep={n: m for n, m in network.masks.items() if n in learned},
            rates={**_rates(network), **context.rates},
            frozen=lambda name: not matches(self.where, name),
            companions=(teacher,) if teacher is not None else (),
            after_step=context.after_step,
            monitor=monitor,
            checkpoint=checkpoint,
            tracking=tracking,
            progress=context.progress,
            description=f"fine-tuning {network.name}",
        )
        return self._result(network, student, trained, monitor)

    def check(self, context: Context) -> None:
        """Training needs samples, and labels with a task unless a teacher is followed."""
        if context.data is None:
            raise DataError(
                "Finetune needs samples and no data was given", hint="give data, best what it was trained on"
            )
        if self.teacher is None:
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

    def _fits(self, network: Network) -> None:
        if network.has_integer_grids:
            raise RecipeError(
                "Finetune cannot train a network that is already quantized", hint="put Finetune before Quantize"
            )
        if not network.batch_is_dynamic and network.inputs[0].shape[0] != self.batch_size:
            fixed = network.inputs[0].shape[0]
            raise RecipeError(
                f"Finetune.batch_size must be {fixed}, got {self.batch_size}: {network.name} takes no other number",
                hint="capture the network with a batch size that may change",
            )
        if not any(matches(self.where, name) for name in network.parameter_names):
            raise RecipeError(
                f"Finetune.where selects no parameter, got {self.where!r}",
                hint=f"for example where={next(iter(network.parameter_names), '*')!r}",
            )

    def _batches(
        self, data: Data, teacher: nn.Module | None, context: Context, fast: bool
    ) -> Callable[[int], Iterator[Batch]]:
        """Batches (inputs, labels, teacher's answer or None) of an epoch."""
        seed = context.seed
        free = context.original.batch_is_dynamic
        constant = teacher is not None and self.augment is None and not self.hints and self.epochs > 1 and free
        kept: list[Batch] = []  # once a training that goes on, or has ended, turns out to need them

        def of_epoch(epoch: int) -> Iterator[Batch]:
            generator = torch.Generator().manual_seed(seed * 7919 + epoch)
            if teacher is not None and constant and not kept and _fits_in_memory(data):
                with randomness.seeded(seed):  # the same order of samples whenever that is
                    kept.append(_answers(data, teacher, fast, context.progress))
            whole = (
                _slices(kept[0], self.batch_size, generator)
                if kept
                else ((x, y, None) for x, y in data.batches(self.batch_size, shuffle=True, seed=seed * 7919 + epoch))
            )
            for number, (inputs, labels, answer) in enumerate(whole):
                if (number and _size(inputs) == 1) or (not free and _size(inputs) != self.batch_size):
                    continue  # one sample has no variance: it would spoil the statistics of batch norms
                if self.augment is not None:
                    inputs = pytree.tree_map(lambda x: augment(x, self.augment or "", generator), inputs)
                yield _laid_out(inputs, fast), labels, answer

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
            soft = matching(got, answer) if dim is None else soft_labels(got, answer, self.temperature, dim)
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

    def _result(self, network: Network, student: nn.Module, trained: Trained, monitor: Monitor | None) -> Plan:
        before = network.tensors()
        after = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        edits, reasons = [], []
        for name, old in before.items():
            new = after[name].detach().contiguous() if name in after else old
            if not old.is_floating_point() or not matches(self.where, name) or torch.equal(new, old):
                continue
            edits.append(SetWeights(parameter=name, value=new.clone(memory_format=torch.contiguous_format)))
            moved = float((new - old.detach()).norm() / old.detach().norm().clamp_min(1e-12))
            reasons.append(Reason(layer=name, score=moved, choice="trained", why="relative change"))
        notes = [f"{trained.steps} steps; mean loss by tenths: {_row(trained.losses)}"]
        if monitor is not None:
            kept = f"the weights after epoch {trained.best} are kept" if trained.best else "none is a number"
            notes.append(f"{monitor.metric} on held-out samples by epochs: {_row(trained.metrics)}; {kept}")
        return Plan(step=self, edits=tuple(edits), reasons=tuple(reasons), notes=tuple(notes))


def _row(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _with_penalty(
    loss: Callable[[nn.Module, Batch], Tensor], penalty: Callable[[nn.Module], Tensor] | None
) -> Callable[[nn.Module, Batch], Tensor]:
    return loss if penalty is None else lambda module, batch: loss(module, batch) + penalty(module)


def _rates(network: Network) -> dict[str, float]:
    """Learning rates of shared levels: a level's gradient is the sum of as many as share it, which grows at least as
    fast as the root of their number."""
    tensors = network.tensors()
    return {
        name: math.sqrt(tensors[name].numel() / max(1, tensors[book.codes].numel()))
        for book in network.shared_levels().values()
        for name in (book.scale or book.levels,)
    }


def _like(told: Tensor, channels: tuple[int, Tensor] | None) -> Tensor:
    """What a teacher gives, in the channels that its student has."""
    return told if channels is None else told.index_select(channels[0], channels[1].to(told.device))


def _count_batches(data: Data, batch_size: int) -> int:
    try:
        samples = len(data)
    except TypeError:
        return sum(1 for _ in data.batches(batch_size))
    first = _size(next(data.batches(batch_size))[0])
    return max(1, math.ceil(samples / first))


def _size(inputs: Any) -> int:
    return len(next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)))


def _fits_in_memory(data: Data) -> bool:
    try:
        samples = len(data)
    except TypeError:
        return False
    inputs = next(data.batches(1, limit=1))[0]
    return samples * sum(t.nbytes for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)) < _CACHE_BYTES


def _answers(data: Data, teacher: nn.Module, fast: bool, progress: Progress) -> Batch:
    """All samples, their labels and the teacher's answers, in order."""
    parts: list[Batch] = []
    with torch.no_grad(), progress.task("asking the teacher", None) as advance:
        for inputs, labels in data.batches(100):
            parts.append((inputs, labels, primary(call(teacher, _laid_out(inputs, fast)))))
            advance(_size(inputs))
    labels = None if any(p[1] is None for p in parts) else concatenate(p[1] for p in parts)
    return concatenate(p[0] for p in parts), labels, concatenate(p[2] for p in parts)


def _slices(whole: Batch, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    order = torch.randperm(_size(whole[0]), generator=generator)
    for chosen in torch.split(order, batch_size):
        yield pytree.tree_map(lambda x, chosen=chosen: x[chosen] if isinstance(x, Tensor) else x, whole)


def _channels_last(data: Data, *modules: nn.Module) -> bool:
    """Lay convolutional networks out as channels-last, which CPUs run faster, if their graphs can be run that way."""
    inputs = next(data.batches(2, limit=2))[0]
    if not any(isinstance(x, Tensor) and x.ndim == 4 for x in pytree.tree_leaves(inputs)):
        return False
    if any(t.ndim == 5 for module in modules for t in module.state_dict().values()):
        return False  # volumes have a layout of their own
    for module in modules:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with torch.no_grad():
            for module in modules:
                call(module, _laid_out(inputs, True))
    except RuntimeError:  # a view in the graph that wants rows
        for module in modules:
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return False
    return True


def _laid_out(inputs: Any, fast: bool) -> Any:
    def there(value: Any) -> Any:
        four = isinstance(value, Tensor) and value.ndim == 4
        return value.contiguous(memory_format=torch.channels_last) if four else value

    return pytree.tree_map(there, inputs) if fast else inputs
