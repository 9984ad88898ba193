"""The one training loop. Every Step that learns hands it a module, batches and a loss.

Devices and processes are Accelerate's job: the same loop runs on a CPU, on a GPU and, started by `accelerate launch`,
in several processes, each of which takes every n-th batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penjing.errors import DataError, RecipeError
from penjing.progress import SILENT, Progress

Batch = tuple[Any, ...]  #: (inputs, labels, …): what `loss` takes apart
#: (the module, the share of the steps that is done, the learning rate) → nothing: changes the module in place.
AfterStep = Callable[[nn.Module, float, float], None]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
}
AUGMENTATIONS = ("flip-crop", "affine")
PRECISIONS = ("f32", "bf16")


class Diverged(RecipeError):
    """A loss that is not a finite number: training was stopped, nothing was kept."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train: `epochs` may be a fraction; the rate `lr` rises linearly over the first `warmup` share of the
    steps and then falls to zero along half a cosine; `clip` bounds the gradient's norm; no decay on one-dimensional
    tensors. With `average` above 0 the result is an exponential average of the weights and the norms' statistics over
    the steps: what was keeps that share at each (less in the first steps, as many as there are to average). With
    `precision` "bf16" networks run under autocast: products in bfloat16, weights, outputs and what is done with them
    in float32."""

    epochs: float = 2
    lr: float = 0.01
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip: float | None = 5.0
    seed: int = 0
    precision: str = "f32"
    average: float = 0.0


@dataclass(frozen=True)
class Trained:
    """What a training did: number of `steps`, and the mean loss over each tenth of them."""

    steps: int
    losses: list[float] = field(default_factory=list)


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
    rates: Mapping[str, float] | None = None,
    progress: Progress = SILENT,
    description: str = "training",
) -> Trained:
    """Train `module` in place and leave it on the CPU in eval mode.

    `batches(epoch)` yields the batches of one pass; `loss(module, batch)` a scalar. `keep` holds boolean masks by
    parameter name: where False, the weight stays zero after every step. Parameters for which `frozen(name)` is true
    stay as they are. `rates` multiplies the learning rate of single parameters. `companions` (a teacher) are moved to
    the same device. `after_step` may change weights after each step (a penalty's proximal step). The same seed gives
    the same result.

    Raises Diverged on a loss that is not finite and DataError when there are no batches. Whatever interrupts this
    leaves only the caller's own copy half trained.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and not frozen(name))
    groups = _parameter_groups(module, training, rates or {})
    if not groups:
        raise RecipeError("there is nothing to train: no parameter is selected", hint="widen 'where', or drop the step")
    accelerator = Accelerator()
    total = max(1, math.ceil(training.epochs * steps_per_epoch / accelerator.num_processes))
    # A fork keeps the caller's random numbers as they were, whatever dropout draws here.
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        module.train()
        optimizer = OPTIMIZERS[training.optimizer](groups, training.lr)
        prepared, optimizer = accelerator.prepare(module, optimizer)
        for companion in companions:
            companion.to(accelerator.device)
        masks = {n: m.to(accelerator.device) for n, m in (keep or {}).items()}
        losses: list[float] = []
        mean = _Average(module, training.average) if training.average else None
        try:
            with (
                _autocast((prepared, *companions), accelerator.device, training.precision),
                progress.task(description, total) as advance,
            ):
                for step, batch in enumerate(_stream(batches, total, accelerator)):
                    _set_rate(optimizer, training, step, total)
                    value = loss(prepared, _to(batch, accelerator.device))
                    current = float(value.detach())
                    if not math.isfinite(current):
                        raise Diverged(
                            f"training diverged: the loss was {current} at step {step + 1} of {total}",
                            hint=f"lower the learning rate (it was {training.lr}), or look at the samples' values",
                        )
                    losses.append(current)
                    optimizer.zero_grad()
                    accelerator.backward(value)
                    if training.clip is not None:
                        accelerator.clip_grad_norm_(prepared.parameters(), training.clip)
                    optimizer.step()
                    if after_step is not None:
                        after_step(module, (step + 1) / total, optimizer.param_groups[0]["lr"])
                    _hold_zeros(module, masks)
                    if mean is not None:
                        mean.update(step)
                    advance(1)
            if mean is not None:
                mean.apply()
        finally:
            module.to("cpu")
            module.eval()
            module.zero_grad(set_to_none=True)
    part = max(1, math.ceil(len(losses) / 10))
    tenths = [losses[i : i + part] for i in range(0, len(losses), part)]
    return Trained(len(losses), [sum(t) / len(t) for t in tenths])


class _Average:
    """An exponential moving average of a module's floating tensors (Polyak & Juditsky 1992, "Acceleration of
    stochastic approximation by averaging")."""

    def __init__(self, module: nn.Module, keep: float) -> None:
        self._keep = keep
        self._now = [t.detach() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        self._mean = [t.clone() for t in self._now]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number `step`."""
        # Of few steps all count about the same: an average from the start on would hold on to what was not trained.
        keep = min(self._keep, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mean, self._now, 1 - keep)

    @torch.no_grad()
    def apply(self) -> None:
        torch._foreach_copy_(self._now, self._mean)


@contextmanager
def _autocast(modules: Sequence[nn.Module], device: torch.device, precision: str) -> Iterator[None]:
    """Runs `modules` in `precision`; their outputs are float32 all the same."""
    if precision == "f32":
        yield
        return

    def wide(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device.type, torch.bfloat16):
                outputs = forward(*args, **kwargs)
            return pytree.tree_map(
                lambda t: t.float() if isinstance(t, Tensor) and t.dtype == torch.bfloat16 else t, outputs
            )

        return run

    for module in modules:
        module.forward = wide(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def call(module: nn.Module, inputs: Any) -> Any:
    """Run a module on a batch's inputs: a tensor, a tuple of positional ones or a dictionary of named ones."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, tuple | list):
        return module(*inputs)
    return module(inputs)


def augment(inputs: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each varied at random, with zeros coming in.

    "flip-crop": flipped or not and shifted by up to an eighth of its side, as is usual for CIFAR networks (He et al.
    2016, "Deep residual learning", §4.2). "affine": turned by up to 10 degrees, scaled by up to a tenth and shifted by
    up to 1/28 of its side (Simard et al. 2003, "Best practices for convolutional neural networks applied to visual
    document analysis", §3).
    """
    if how not in AUGMENTATIONS or inputs.ndim != 4:
        raise DataError(
            f"augment={how!r} takes images (samples × channels × height × width), got {inputs.ndim} dimensions",
            hint="leave augment empty for other data",
        )
    if how == "affine":
        return _affine(inputs, generator)
    count, _, height, width = inputs.shape
    top, left = max(1, height // 8), max(1, width // 8)
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), inputs.flip(3), inputs)
    padded = nn.functional.pad(images, (left, left, top, top))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.randint(0, 2 * top + 1, (count,), generator=generator)
    columns = torch.randint(0, 2 * left + 1, (count,), generator=generator)
    return windows[torch.arange(count), :, rows, columns]


def _affine(inputs: Tensor, generator: torch.Generator) -> Tensor:
    angle, scale, right, down = torch.rand(4, len(inputs), generator=generator).mul_(2).sub_(1)
    angle, scale = angle * math.radians(10), 1 + 0.1 * scale
    # Coordinates run from -1 to 1: a 28th of the side is 1/14 of them.
    across = torch.stack([scale * angle.cos(), -scale * angle.sin(), right / 14], dim=1)
    along = torch.stack([scale * angle.sin(), scale * angle.cos(), down / 14], dim=1)
    where = torch.stack([across, along], dim=1).to(inputs.dtype)
    grid = nn.functional.affine_grid(where, list(inputs.shape), align_corners=False)
    return nn.functional.grid_sample(inputs, grid, align_corners=False)


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


def _stream(batches: Callable[[int], Iterator[Batch]], total: int, accelerator: Accelerator) -> Iterator[Batch]:
    """`total` batches from as many passes as it takes; with several processes each takes its share of every pass."""
    done = 0
    for epoch in itertools.count():
        before = done
        # Full rounds only: processes that step together must never wait for one that ran out of batches.
        for turn in zip(*[batches(epoch)] * accelerator.num_processes, strict=False):
            if done == total:
                return
            yield turn[accelerator.process_index]
            done += 1
        if done == before:
            raise DataError("the data gave no batch to train on")
        if done == total:
            return


def _set_rate(optimizer: Any, training: Training, step: int, total: int) -> None:
    rise = max(1, round(training.warmup * total))
    if step < rise:
        factor = (step + 1) / rise
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))
    for group in optimizer.param_groups:
        group["lr"] = training.lr * factor * group["rate"]


@torch.no_grad()
def _hold_zeros(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        module.get_parameter(name).mul_(mask)


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved: Batch = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
    return moved
