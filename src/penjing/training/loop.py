"""The one training loop. Every Step that learns hands it a module, batches and a loss.

Devices and processes are Accelerate's job: the same loop runs on a CPU, on a GPU and, started by `accelerate launch`,
in several processes, each of which takes every n-th batch. All of them end with the same weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penjing.errors import DataError, RecipeError
from penjing.progress import SILENT, Progress, detail
from penjing.training import randomness
from penjing.training.averaging import Average
from penjing.training.checkpoint import (
    Checkpoint,
    Signals,
    Snapshot,
    optimizer_state,
    put_back,
    restore_optimizer,
    tensors_of,
)
from penjing.training.precision import autocast
from penjing.training.processes import Team, accelerator, is_main_process
from penjing.training.schedules import rate
from penjing.training.settings import OPTIMIZERS, Diverged, Monitor, Trained, Training
from penjing.training.trackers import Log, Tracking

Batch = tuple[Any, ...]  #: (inputs, labels, …): what `loss` takes apart; the first tensor in it counts the samples
#: (the module, the share of the steps that is done, the learning rate) → nothing: changes the module in place. It may
#: remember its last call, which a training that goes on after a kill repeats first; a Watcher remembers more.
AfterStep = Callable[[nn.Module, float, float], None]

#: With several processes, so many steps lie between two looks at whether a checkpoint is due: a look costs a message.
_LOOKS = 16
#: Trackers get at most about so many points of the loss.
_POINTS = 500


def train(
    module: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    training: Training,
    *,
    steps_per_epoch: int,
    keep: Mapping[str, Tensor] | None = None,
    frozen: Callable[[str], bool] = lambda name: False,
    companions: tuple[nn.Module, ...] = (),
    after_step: AfterStep | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    rates: Mapping[str, float] | None = None,
    monitor: Monitor | None = None,
    checkpoint: Checkpoint | None = None,
    tracking: Tracking | None = None,
    alone: bool = False,
    progress: Progress = SILENT,
    description: str = "training",
) -> Trained:
    """Train `module` in place and leave it on the CPU in eval mode.

    `batches(epoch)` yields the batches of one pass, about `steps_per_epoch`; `loss(module, batch)` a scalar. `keep`
    holds boolean masks by parameter name: where False, the weight stays zero after every step. Parameters for which
    `frozen(name)` is true stay as they are. `rates` multiplies the learning rate of single parameters. `companions` (a
    teacher) are moved to the same device. `after_step` may change weights after each step (a penalty's proximal step);
    what `penalty` makes of the module is added to each loss.
    The same seed gives the same result.

    With a `monitor` a metric is measured after every pass, and the weights that were best are what remains. `tracking`
    draws loss, rate and metric. With a `checkpoint`, a training that was killed goes on when it is called again with
    the same arguments, and ends with the same bits; one that had ended gives its result again. Ctrl-C then waits for
    the step's end and leaves a checkpoint. `alone`: of several processes, each trains by itself on all batches, with
    the same result.

    Raises Diverged on a loss that is not finite and DataError when there are no batches. Whatever interrupts this
    leaves only the caller's own copy half trained.
    """
    kept = checkpoint.load() if checkpoint else None
    if kept is not None and "trained" in kept.numbers:
        put_back(module, _unnamed("module/", kept.tensors))
        module.eval()
        return Trained(**kept.numbers["trained"])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and not frozen(name))
    groups = _parameter_groups(module, training, rates or {})
    if not groups:
        raise RecipeError("there is nothing to train: no parameter is selected", hint="widen 'where', or drop the step")
    # The caller's random numbers stay as they were, whatever dropout draws here.
    with randomness.seeded(training.seed):
        run = _Run(module, loss, training, groups, steps_per_epoch, keep or {}, companions, monitor, alone)
        run.after_step, run.penalty = after_step, penalty
        try:
            with (
                autocast((run.prepared, *companions), run.accelerator.device, training.precision),
                progress.task(description, run.total) as advance,
                Signals.deferred(checkpoint is not None) as signals,
            ):
                if checkpoint is not None:
                    run.go_on(kept, description, progress)
                if run.step:
                    advance(run.step)
                with tracking.open(run.step) if tracking else nullcontext(None) as log:
                    while run.taken or (run.step < run.total and not run.stopped):
                        for said in run.one_pass(batches, log):
                            advance(1)
                            detail(progress, said)
                            if checkpoint is not None:
                                run.keep(checkpoint, signals, progress)
                run.end()
        finally:
            module.to("cpu")
            module.eval()
            module.zero_grad(set_to_none=True)
        trained = run.trained()
    if checkpoint is not None and is_main_process():
        checkpoint.save(Snapshot({"trained": vars(trained)}, _named("module/", tensors_of(module))))
    return trained


class _Run:
    """A training under way: what changes from step to step, kept and put back together."""

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module, Batch], Tensor],
        training: Training,
        groups: list[dict[str, Any]],
        steps_per_epoch: int,
        masks: Mapping[str, Tensor],
        companions: tuple[nn.Module, ...],
        monitor: Monitor | None,
        alone: bool,
    ) -> None:
        self.module, self.loss, self.training = module, loss, training
        self.monitor = monitor
        self.after_step: AfterStep | None = None
        self.penalty: Callable[[nn.Module], Tensor] | None = None
        # A network may have outputs that no loss looks at, and then parameters without a gradient.
        self.accelerator = accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
        self.team = Team(self.accelerator, alone)
        turns = math.ceil(steps_per_epoch / self.team.size)
        self.total = max(1, math.ceil(training.epochs * math.ceil(turns / training.accumulate)))
        module.train()
        self.prepared = self.accelerator.prepare_model(module, evaluation_mode=self.team.size == 1)
        self.optimizer = self.accelerator.prepare_optimizer(OPTIMIZERS[training.optimizer](groups, training.lr))
        device = self.accelerator.device
        for companion in companions:
            companion.to(device)
        self.masks = {n: m.to(device) for n, m in masks.items()}
        self.mean = Average(module, training.average) if training.average else None
        self.step = self.epoch = self.taken = 0  # taken: the steps of this pass
        self.losses: list[float] = []  # as much of the mean over all samples as this process has
        self.loss_now = math.nan  # the mean over its own samples
        self.metrics: list[float] = []
        self.best: int | None = None  # the pass whose weights are kept in best_tensors
        self.best_tensors: dict[str, Tensor] = {}
        self.at_start: dict[str, Any] = {}  # random numbers, as this pass began
        self.now: dict[str, Any] | None = None  # and as they were kept, while a pass is read again

    @property
    def stopped(self) -> bool:
        """Whether the metric has not got better for too long."""
        patience = self.monitor.patience if self.monitor else None
        return patience is not None and self.best is not None and len(self.metrics) - self.best >= patience

    def one_pass(self, batches: Callable[[int], Iterator[Batch]], log: Log | None) -> Iterator[str]:
        """The steps of a pass, or those that are left of it; after each, how it looks."""
        if self.taken:
            randomness.restore(self.at_start)
        else:
            self.at_start = randomness.states()
        groups = _groups(batches(self.epoch), self.team, self.training.accumulate)
        for _ in itertools.islice(
            groups, self.taken
        ):  # read again: what follows depends on it, whatever varies samples
            pass
        if self.now is not None:
            randomness.restore(self.now)
            self.now = None
        while self.step < self.total and (group := next(groups, None)):
            self.learn(group)
            if log is not None and self._to_be_logged():
                log({"loss": self.loss_now, "lr": self.optimizer.param_groups[0]["lr"]}, self.step)
            yield f"loss {self.loss_now:.4g}" + self._metric_words()
        if not self.taken:
            raise DataError("the data gave no batch to train on", hint="give at least one whole batch of samples")
        if self.monitor is not None:
            self._measure(self.monitor)
            if log is not None:
                log({self.monitor.metric: self.metrics[-1]}, self.step)
        self.epoch, self.taken = self.epoch + 1, 0

    def learn(self, group: Sequence[tuple[Batch, float]]) -> None:
        """One step, by the gradient of the mean loss over all samples of every process's `group`."""
        training, optimizer = self.training, self.optimizer
        share = rate(training.schedule, self.step, self.total, training.warmup)
        for own in optimizer.param_groups:
            own["lr"] = training.lr * share * own["rate"]
        optimizer.zero_grad()
        current = 0.0
        for number, (batch, weight) in enumerate(group):
            with self._without_exchange(number < len(group) - 1):
                value = self.loss(self.prepared, _to(batch, self.accelerator.device))
                if self.penalty is not None:
                    value = value + self.penalty(self.module)
                value = value * weight
                current += float(value.detach())
                if not math.isfinite(current):
                    raise Diverged(
                        f"training diverged: the loss was {current} at step {self.step + 1} of {self.total}",
                        hint=f"lower the learning rate (it was {training.lr}), or look at the samples' values",
                    )
                self.accelerator.backward(value)
        self.losses.append(current)
        self.loss_now = current / (sum(weight for _, weight in group) or 1)
        if training.clip is not None:
            self.accelerator.clip_grad_norm_(self.prepared.parameters(), training.clip)
        optimizer.step()
        if self.after_step is not None:
            self.after_step(self.module, (self.step + 1) / self.total, optimizer.param_groups[0]["lr"])
        _hold_zeros(self.module, self.masks)
        if self.mean is not None:
            self.mean.update(self.step)
        self.step, self.taken = self.step + 1, self.taken + 1

    def end(self) -> None:
        """Makes the module what the training gives: the average, the best."""
        if self.best is not None:
            put_back(self.module, self.best_tensors)
        elif self.mean is not None:
            self.mean.apply()
        self.team.agree(self.module)

    def trained(self) -> Trained:
        """What was done, the losses those of all processes."""
        losses = [sum(every) / self.team.size for every in zip(*self.team.from_all(self.losses), strict=True)]
        part = max(1, math.ceil(len(losses) / 10))
        tenths = [losses[i : i + part] for i in range(0, len(losses), part)]
        return Trained(self.step, [sum(t) / len(t) for t in tenths], self.metrics, self.best)

    def _without_exchange(self, wanted: bool) -> AbstractContextManager[Any]:
        return self.accelerator.no_sync(self.prepared) if wanted and self.team.size > 1 else nullcontext()

    def _measure(self, monitor: Monitor) -> None:
        """The metric of what the training would give now; the best is remembered."""
        before = {n: t.clone() for n, t in tensors_of(self.module).items()} if self.mean is not None else {}
        if self.mean is not None:
            self.mean.apply()
        self.team.agree(self.module)
        self.module.eval()
        with torch.no_grad(), randomness.seeded(self.training.seed):  # on the same samples each time
            value = self.team.first_says(float(monitor.measure(self.module)))
        self.module.train()
        self.metrics.append(value)
        sign = 1 if monitor.higher_is_better else -1
        if not math.isnan(value) and (self.best is None or sign * value > sign * self.metrics[self.best - 1]):
            self.best = len(self.metrics)
            self.best_tensors = {n: t.clone() for n, t in tensors_of(self.module).items()}
        if before:
            put_back(self.module, before)

    def _metric_words(self) -> str:
        return f", {self.monitor.metric} {self.metrics[-1]:.4g}" if self.monitor and self.metrics else ""

    def _to_be_logged(self) -> bool:
        return self.step % max(1, self.total // _POINTS) == 0 or self.step == self.total

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def keep(self, checkpoint: Checkpoint, signals: Signals, progress: Progress) -> None:
        """After a step: a checkpoint if one is due, and what a signal that came in the meantime asks for."""
        if self.team.size > 1 and self.step % _LOOKS:
            return
        order = self.team.first_says(2 if signals.came is not None else int(checkpoint.due()))
        if order:
            own = self.team.from_all({"losses": self.losses, "now": randomness.states()})
            if is_main_process():
                checkpoint.save(self._snapshot(own))
        if order == 2:
            progress.note(f"{checkpoint.file} keeps the training as it is after step {self.step}: start again to go on")
            signals.deliver()

    def _snapshot(self, own: list[dict[str, Any]]) -> Snapshot:
        numbers = {
            "step": self.step,
            "epoch": self.epoch,
            "taken": self.taken,
            "metrics": self.metrics,
            "best": self.best,
            "at_start": self.at_start,
            "own": own,
        }
        tensors = _named("module/", tensors_of(self.module)) | optimizer_state(self.optimizer)
        if self.mean is not None:
            tensors |= _named("mean/", self.mean.by_name)
        return Snapshot(numbers, tensors | _named("best/", self.best_tensors))

    def go_on(self, kept: Snapshot | None, description: str, progress: Progress) -> None:
        """Puts back what was kept, if anything was, in all processes alike."""
        step = 0 if kept is None else kept.numbers["step"]
        if len(set(self.team.from_all(step))) > 1:
            raise RecipeError(
                "the processes of this training do not see the same checkpoint",
                hint="name a folder that all machines share",
            )
        if kept is None:
            return
        numbers, tensors = kept.numbers, kept.tensors
        if self.after_step is not None:  # what it does to the weights is overwritten
            self.after_step(self.module, step / self.total, 0.0)
        put_back(self.module, _unnamed("module/", tensors))
        restore_optimizer(self.optimizer, tensors)
        if self.mean is not None:
            self.mean.put_back(_unnamed("mean/", tensors))
        self.best_tensors = _unnamed("best/", tensors)
        self.step, self.epoch, self.taken = step, numbers["epoch"], numbers["taken"]
        self.metrics, self.best, self.at_start = numbers["metrics"], numbers["best"], numbers["at_start"]
        own = numbers["own"][self.team.index]
        self.losses, self.now = own["losses"], own["now"]
        progress.note(f"{description}: going on after step {step} of {self.total}")


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + n: t for n, t in tensors.items()}


def _unnamed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def call(module: nn.Module, inputs: Any) -> Any:
    """Run a module on a batch's inputs: a tensor, a tuple of positional ones or a dictionary of named ones."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, tuple | list):
        return module(*inputs)
    return module(inputs)


def _parameter_groups(module: nn.Module, training: Training, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """What trains, by its decay and its own factor of the learning rate."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim > 1, rates.get(name, 1.0)), []).append(parameter)
    return [
        {"params": own, "weight_decay": training.weight_decay if decayed else 0.0, "rate": rate}
        for (decayed, rate), own in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def _groups(batches: Iterator[Batch], team: Team, count: int) -> Iterator[list[tuple[Batch, float]]]:
    """This process's share of a pass, `count` batches at a time, as many as there are at the end; with each its weight:
    the mean of all processes' weighted losses is the mean over all samples."""
    rounds = iter(lambda: list(itertools.islice(batches, team.size)), [])
    while turns := list(itertools.islice(rounds, count)):
        if team.size == len(turns) == 1:
            yield [(turns[0][0], 1.0)]
            continue
        samples = sum(_size(batch) for turn in turns for batch in turn)
        # All step together: for whom no batch is left, the first one's counts nothing.
        yield [
            (turn[team.index], _size(turn[team.index]) * team.size / samples)
            if team.index < len(turn)
            else (turn[0], 0.0)
            for turn in turns
        ]


def _size(batch: Batch) -> int:
    return len(next(t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)))


@torch.no_grad()
def _hold_zeros(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        module.get_parameter(name).mul_(mask)


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved: Batch = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
    return moved
