"""Latency of several sessions side by side: interleaved in one process, so that their ratio survives a noisy machine.

Every round visits every session once, in an order shuffled anew. A visit is a short block: some calls that are thrown
away (the caches and thread pools were the other session's a moment ago) and then the timed ones. So each session runs
as it would in a loop of its own, and what the machine does meanwhile (frequency, neighbours) falls on all of them
alike.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penjing.errors import InputError
from penjing.progress import SILENT, Progress

_DISCARD_MS = 2.0
_TIMED_MS = 4.0
_MOST_PER_BLOCK = 50


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """How long to measure.

    Attributes:
        warm_up: calls of each session before anything is timed.
        seconds: aim for each session's share; slow ones get fewer rounds, though never fewer than ``least_rounds``.
        least_rounds: rounds at least; ``most_rounds``: at most.
    """

    warm_up: int = 10
    seconds: float = 2.0
    least_rounds: int = 9
    most_rounds: int = 60

    def __post_init__(self) -> None:
        if self.warm_up < 1 or self.least_rounds < 1 or self.most_rounds < self.least_rounds or not self.seconds > 0:
            raise InputError(
                "latency settings need warm_up >= 1, seconds > 0 and 1 <= least_rounds <= most_rounds, "
                f"got {self.warm_up}, {self.seconds}, {self.least_rounds} and {self.most_rounds}"
            )


@dataclass(frozen=True)
class Timings:
    """Milliseconds of every timed call of one session, (n,), and the median of each round, (rounds,)."""

    calls: NDArray[np.float64]
    rounds: NDArray[np.float64]

    @property
    def p50(self) -> float:
        """Median of all calls, ms."""
        return float(np.median(self.calls))

    @property
    def p95(self) -> float:
        """95th percentile of all calls, ms."""
        return float(np.percentile(self.calls, 95))

    @property
    def n(self) -> int:
        """Number of timed calls."""
        return len(self.calls)

    def to_dict(self) -> dict[str, float | int]:
        """``{"p50", "p95", "n"}`` as in report.json."""
        return {"p50": self.p50, "p95": self.p95, "n": self.n}


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    settings: LatencySettings | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timings]:
    """Time calls side by side; ``runs`` maps a name to a function that does the work once.

    Raises:
        InputError: nothing to run.
    """
    settings = settings or LatencySettings()
    if not runs:
        raise InputError("there is nothing to time")
    names = list(runs)
    typical = {name: _warm_up(runs[name], settings.warm_up, clock) for name in names}
    discard = {name: _calls(_DISCARD_MS, typical[name]) for name in names}
    timed = {name: _calls(_TIMED_MS, typical[name]) for name in names}
    slowest = max((discard[name] + timed[name]) * typical[name] for name in names)
    wanted = math.ceil(settings.seconds * 1e3 / max(slowest, 1e-6))
    rounds = min(max(wanted, settings.least_rounds), settings.most_rounds)

    rng = np.random.default_rng(seed)
    calls: dict[str, list[float]] = {name: [] for name in names}
    medians: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection of the caller's garbage is nobody's latency
    try:
        with progress.task("timing, interleaved", rounds) as advance:
            for _ in range(rounds):
                for index in rng.permutation(len(names)):
                    name = names[int(index)]
                    block = _block(runs[name], discard[name], timed[name], clock)
                    calls[name].extend(block)
                    medians[name].append(float(np.median(block)))
                advance(1)
    finally:
        if collecting:
            gc.enable()
    return {name: Timings(np.asarray(calls[name]), np.asarray(medians[name])) for name in names}


def _warm_up(run: Callable[[], object], calls: int, clock: Callable[[], int]) -> float:
    return float(np.median(_block(run, 1, calls, clock)))


def _block(run: Callable[[], object], discard: int, timed: int, clock: Callable[[], int]) -> list[float]:
    for _ in range(discard):
        run()
    taken = []
    for _ in range(timed):
        start = clock()
        run()
        taken.append(max(clock() - start, 1) / 1e6)
    return taken


def _calls(aim_ms: float, typical_ms: float) -> int:
    return min(max(math.ceil(aim_ms / max(typical_ms, 1e-6)), 1), _MOST_PER_BLOCK)
