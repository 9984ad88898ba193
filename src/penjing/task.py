"""Task: what "good" means for a network: a loss to train by and a score a sample, whose mean is the metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penjing.errors import DataError, InputError
from penjing.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Task:
    """A loss, and scores a sample.

    `loss(outputs, labels)` gives a scalar to minimise. `scores(outputs, labels)` gives one number a sample, shape
    (n,); the metric is their mean, so that its interval and paired comparisons are known. `outputs` is the
    network's output as it returns it.
    """

    name: str
    loss: Callable[[Any, Any], Tensor]
    scores: Callable[[Any, Any], Tensor]
    metric: str
    higher_is_better: bool = True
    unit: str = ""


TASKS: Registry[Task] = Registry("task")
#: Tasks whose main output scores classes, with the dimension of these.
_CLASSES = {"classification": 1, "segmentation": 1, "language-modelling": -1}


def get_task(task: str | Task | None) -> Task | None:
    """A built-in task by name, or the user's own as it is; None stays None."""
    if task is None or isinstance(task, Task):
        return task
    return TASKS.get(task)


def class_dimension(task: Task | None, name: str | None = None) -> int | None:
    """The dimension along which a task's main output scores classes (of the task called `name` if none is given); None
    where it does not."""
    return _CLASSES.get((task.name if task else name) or "")


def primary(outputs: Any) -> Tensor:
    """The main tensor of a network's output: itself, `logits` of a dictionary, else the first."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict):
        return primary(outputs["logits"] if "logits" in outputs else next(iter(outputs.values())))
    if isinstance(outputs, tuple | list) and outputs:
        return primary(outputs[0])
    raise InputError(f"the network's output is a {type(outputs).__name__}, in which no tensor can be found")


def _classes(outputs: Any, labels: Any, task: str) -> tuple[Tensor, Tensor]:
    """Logits (n, classes, …) and labels (n, …) as integers, checked."""
    logits = primary(outputs)
    target = torch.as_tensor(labels)
    if target.is_floating_point() or target.dtype == torch.bool:
        raise DataError(f"labels for {task} must be integers, got {target.dtype}")
    if logits.ndim < 2 or logits.shape[0] != target.shape[0] or logits.shape[2:] != target.shape[1:]:
        raise DataError(
            f"{task} needs outputs (n, classes, …) and labels (n, …); got "
            f"{tuple(logits.shape)} and {tuple(target.shape)}",
            hint="choose another --task, or check the data's labels",
        )
    classes = logits.shape[1]
    wrong = (target >= classes) | (target < 0) & (target != -100)
    if wrong.any():
        raise DataError(
            f"a label is {int(target[wrong][0])}, but the network has {classes} classes (0 to {classes - 1})"
        )
    return logits, target.long()


def _cross_entropy(outputs: Any, labels: Any) -> Tensor:
    return F.cross_entropy(*_classes(outputs, labels, "classification"))


def _accuracy(outputs: Any, labels: Any) -> Tensor:
    logits, target = _classes(outputs, labels, "classification")
    return (
        (logits.argmax(1) == target).flatten(1).float().mean(1)
        if target.ndim > 1
        else (logits.argmax(1) == target).float()
    )


def _values(outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    got, target = primary(outputs), torch.as_tensor(labels)
    target = target.to(got.dtype)
    if got.ndim == target.ndim + 1 and got.shape[-1] == 1:
        got = got.squeeze(-1)
    if got.shape != target.shape:
        raise DataError(f"outputs {tuple(got.shape)} and labels {tuple(target.shape)} must have the same shape")
    return got, target


def _squared_error(outputs: Any, labels: Any) -> Tensor:
    return F.mse_loss(*_values(outputs, labels))


def _squared_errors(outputs: Any, labels: Any) -> Tensor:
    got, target = _values(outputs, labels)
    return (got - target).square().reshape(len(got), -1).mean(1)


def _psnr(outputs: Any, labels: Any) -> Tensor:
    return -10 * torch.log10(_squared_errors(outputs, labels).clamp_min(1e-12))


def _tokens(outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    logits = primary(outputs)
    if logits.ndim == 3:
        logits = logits.transpose(1, 2)
    return _classes(logits, labels, "language-modelling")


def _token_loss(outputs: Any, labels: Any) -> Tensor:
    return F.cross_entropy(*_tokens(outputs, labels))


def _token_losses(outputs: Any, labels: Any) -> Tensor:
    logits, target = _tokens(outputs, labels)
    loss = F.cross_entropy(logits, target, reduction="none").reshape(len(target), -1)
    counted = (target != -100).reshape(len(target), -1)
    return loss.sum(1) / counted.sum(1).clamp_min(1)


def _intersection_over_union(outputs: Any, labels: Any) -> Tensor:
    """Mean over the classes present in an image, one number an image."""
    logits, target = _classes(outputs, labels, "segmentation")
    classes = logits.shape[1]
    got = F.one_hot(logits.argmax(1), classes).flatten(1, -2).bool()
    wanted = F.one_hot(target.clamp_min(0), classes).flatten(1, -2).bool() & (target >= 0).flatten(1)[..., None]
    got &= (target >= 0).flatten(1)[..., None]
    both, either = (got & wanted).sum(1).float(), (got | wanted).sum(1).float()
    present = either > 0
    return (both / either.clamp_min(1) * present).sum(1) / present.sum(1).clamp_min(1)


def _segmentation_loss(outputs: Any, labels: Any) -> Tensor:
    return F.cross_entropy(*_classes(outputs, labels, "segmentation"))


for _task in (
    Task(name="classification", loss=_cross_entropy, scores=_accuracy, metric="accuracy", unit="%"),
    Task(name="regression", loss=_squared_error, scores=_squared_errors, metric="mse", higher_is_better=False),
    Task(
        name="language-modelling",
        loss=_token_loss,
        scores=_token_losses,
        metric="nats per token",
        higher_is_better=False,
    ),
    Task(name="segmentation", loss=_segmentation_loss, scores=_intersection_over_union, metric="mean IoU", unit="%"),
    Task(name="reconstruction", loss=_squared_error, scores=_psnr, metric="PSNR", unit="dB"),
):
    TASKS.register(_task.name)(_task)
