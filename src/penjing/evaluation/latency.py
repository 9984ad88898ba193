"""How much faster or slower one session is than another, from timings taken in turns (`penjing.runtimes.timing`)."""

from __future__ import annotations

from dataclasses import dataclass

from penjing.errors import InputError
from penjing.evaluation.intervals import ratio_interval
from penjing.runtimes.timing import LatencySettings, Timings, interleave

__all__ = ["LatencySettings", "Ratio", "Timings", "compare", "interleave"]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """``result time / reference time``: the ratio of the medians, and a 95 % interval from the per-round ratios.

    Below 1 the result is faster. ``verdict`` is ``"faster"``, ``"slower"`` or ``"no measurable difference"``
    (the interval holds 1).
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In words."""
        if self.high < 1.0:
            return "faster"
        return "slower" if self.low > 1.0 else "no measurable difference"


def compare(result: Timings, reference: Timings) -> Ratio:
    """How long ``result`` takes beside ``reference``, measured by :func:`interleave` in the same rounds."""
    if len(result.rounds) != len(reference.rounds):
        raise InputError("timings can be compared only when they come from the same rounds")
    low, high = ratio_interval(result.rounds / reference.rounds)
    value = result.p50 / reference.p50
    # The two estimates differ by a hair (ratio of medians, median of ratios); the interval must hold what is printed.
    return Ratio(value=value, low=min(low, value), high=max(high, value))
