"""How the learning rate falls: by name, a function of the steps done after the rise and of how many there are."""

from __future__ import annotations

import math
from collections.abc import Callable

from penjing.errors import RecipeError
from penjing.registry import Registry

#: (steps done since the rise, steps after the rise) → the share of the highest rate.
Schedule = Callable[[int, int], float]

SCHEDULES: Registry[Schedule] = Registry("schedule", error=RecipeError)


@SCHEDULES.register("cosine")
def _cosine(done: int, of: int) -> float:
    """Half a cosine down to zero (Loshchilov & Hutter 2017, "SGDR", without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * done / of))


@SCHEDULES.register("linear")
def _linear(done: int, of: int) -> float:
    return 1 - done / of


@SCHEDULES.register("constant")
def _constant(done: int, of: int) -> float:
    return 1.0


@SCHEDULES.register("step")
def _step(done: int, of: int) -> float:
    """A tenth after half of the steps, a hundredth after three quarters (He et al. 2016, "Deep residual learning",
    §4.2)."""
    return 0.1 ** (int(2 * done >= of) + int(4 * done >= 3 * of))


def rate(schedule: str, step: int, total: int, warmup: float) -> float:
    """The share of the highest rate at `step` of `total`, with a linear rise over the first `warmup` of them."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return SCHEDULES.get(schedule)(step - rise, max(1, total - rise))
