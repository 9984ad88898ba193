"""How to train, what to watch meanwhile, and what came of it: plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from penjing.errors import RecipeError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
}


class Diverged(RecipeError):
    """A loss that is not a finite number: training was stopped, nothing was kept."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train: `epochs` may be a fraction; the rate `lr` rises linearly over the first `warmup` share of the
    steps and then follows `schedule` (of `SCHEDULES`); `clip` bounds the gradient's norm; no decay on one-dimensional
    tensors. A step takes the gradient of `accumulate` batches together. With `average` above 0 the result is an
    exponential average of the weights and the norms' statistics over the steps: what was keeps that share at each (less
    in the first steps, as many as there are to average). With `precision` "bf16" networks run under autocast: products
    in bfloat16, weights, outputs and what is done with them in float32."""

    epochs: float = 2
    lr: float = 0.01
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    warmup: float = 0.05
    schedule: str = "cosine"
    clip: float | None = 5.0
    seed: int = 0
    precision: str = "f32"
    average: float = 0.0
    accumulate: int = 1


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """What is measured after every pass over the data: `measure(module in eval mode)`, called `metric`. The result of
    the training is what measured best; after `patience` passes that were no better (None: never) it ends."""

    metric: str
    measure: Callable[[nn.Module], float]
    higher_is_better: bool = True
    patience: int | None = None


@dataclass(frozen=True)
class Trained:
    """What a training did: number of `steps`, the mean loss over each tenth of them, and what a Monitor measured after
    each pass, with the number of the `best` one (from 1 on)."""

    steps: int
    losses: list[float] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)
    best: int | None = None
