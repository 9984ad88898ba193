"""Intervals for means of per-sample scores, and for the difference of two means taken on the same samples.

Sources: Wilson (1927) for proportions; Newcombe (1998), "Improved confidence intervals for the difference between
binomial proportions based on paired data", method 10, for paired ones; McNemar (1947) in its exact binomial form;
Efron's BCa bootstrap (scipy) for small samples of any other score, Student's t for large ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from penjing.errors import DataError

Scores = NDArray[np.float64]

_LEVEL = 0.95
_Z = float(stats.norm.ppf(0.5 + _LEVEL / 2))
_BOOTSTRAP_UP_TO = 1000  # with more samples the t interval agrees with the bootstrap to the digits that are printed
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean (or a difference of means), its 95 % interval, the number of samples, and how the interval was made."""

    value: float
    low: float
    high: float
    n: int
    method: str


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """``result - baseline`` on the same samples: value, 95 % interval, two-sided p, and the test's name.

    ``gained`` and ``lost`` count the samples whose 0/1 score rose or fell; None for other scores.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    method: str
    gained: int | None = None
    lost: int | None = None


def is_binary(scores: Scores) -> bool:
    """Whether every score is exactly 0 or 1."""
    return bool(np.all((scores == 0) | (scores == 1)))


def mean_interval(scores: Scores, *, seed: int = 0) -> Interval:
    """The mean of per-sample scores of shape (n,) with its 95 % interval.

    0/1 scores: Wilson. Otherwise the BCa bootstrap up to 1000 samples, Student's t above. One sample, or scores that
    are all equal, have no spread to estimate: other than for 0/1 scores the interval is then (nan, nan) and (v, v).

    Raises:
        DataError: no scores, or a score that is not a finite number.
    """
    scores = _checked(scores)
    n = len(scores)
    value = float(scores.mean())
    if is_binary(scores):
        low, high = wilson(int(scores.sum()), n)
        return Interval(value=value, low=low, high=high, n=n, method="wilson")
    low, high, method = _spread(scores, seed)
    return Interval(value=value, low=low, high=high, n=n, method=method)


def paired_difference(baseline: Scores, result: Scores, *, seed: int = 0) -> PairedDifference:
    """``mean(result) - mean(baseline)`` for scores (n,) of the same samples in the same order, with its 95 % interval.

    0/1 scores: Newcombe's paired interval and the exact McNemar test. Otherwise the interval of the mean of the
    per-sample differences (bootstrap or t, as in :func:`mean_interval`) and the paired t test.

    Raises:
        DataError: different numbers of scores, none, or a score that is not a finite number.
    """
    baseline, result = _checked(baseline), _checked(result)
    if len(baseline) != len(result):
        raise DataError(f"a paired comparison needs the same samples: got {len(baseline)} and {len(result)} scores")
    n = len(baseline)
    difference = result - baseline
    value = float(result.mean() - baseline.mean())
    if is_binary(baseline) and is_binary(result):
        gained, lost = int(np.sum(difference > 0)), int(np.sum(difference < 0))
        low, high = newcombe_paired(
            both=int(np.sum((baseline == 1) & (result == 1))),
            gained=gained,
            lost=lost,
            neither=int(np.sum((baseline == 0) & (result == 0))),
        )
        p = 1.0 if gained + lost == 0 else float(stats.binomtest(gained, gained + lost, 0.5).pvalue)
        return PairedDifference(
            value=value, low=low, high=high, p=p, n=n, method="mcnemar, newcombe", gained=gained, lost=lost
        )
    if np.all(difference == difference[0]):
        p = 1.0 if difference[0] == 0 else (0.0 if n > 1 else math.nan)
    else:
        p = float(stats.ttest_rel(result, baseline).pvalue)
    low, high, method = _spread(difference, seed)
    return PairedDifference(value=value, low=low, high=high, p=p, n=n, method=f"paired {method}")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for ``successes`` of ``n``."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    # Exactly 0 and 1 at the ends: rounding there would print an interval that excludes its own value.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def newcombe_paired(*, both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """Newcombe's method 10: the 95 % interval of (gained - lost) / n for a 2×2 table of paired 0/1 scores."""
    n = both + gained + lost + neither
    p_result, p_baseline = (both + gained) / n, (both + lost) / n
    low_r, high_r = wilson(both + gained, n)
    low_b, high_b = wilson(both + lost, n)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    phi = 0.0
    if margins > 0:
        cross = float(both * neither - gained * lost)
        if cross > 0:  # Newcombe's continuity correction; negative association is taken as it is
            cross = max(0.0, cross - n / 2)
        phi = cross / math.sqrt(margins)
    down_r, up_r = p_result - low_r, high_r - p_result
    down_b, up_b = p_baseline - low_b, high_b - p_baseline
    value = p_result - p_baseline
    below = math.sqrt(max(0.0, down_r**2 - 2 * phi * down_r * up_b + up_b**2))
    above = math.sqrt(max(0.0, up_r**2 - 2 * phi * up_r * down_b + down_b**2))
    return max(-1.0, value - below), min(1.0, value + above)


def ratio_interval(ratios: Scores) -> tuple[float, float]:
    """95 % interval of the median of positive per-round ratios (n,), from order statistics: no shape is assumed."""
    ordered = np.sort(np.asarray(ratios, dtype=np.float64))
    n = len(ordered)
    if n < 6:  # with fewer than six values no pair of order statistics covers the median with 95 %
        return float(ordered[0]), float(ordered[-1])
    k = int(stats.binom.ppf((1 - _LEVEL) / 2, n, 0.5))
    if stats.binom.cdf(k - 1, n, 0.5) > (1 - _LEVEL) / 2:
        k -= 1
    k = max(k, 1)
    return float(ordered[k - 1]), float(ordered[n - k])


def _checked(scores: Scores) -> Scores:
    scores = np.asarray(scores, dtype=np.float64).reshape(-1)
    if len(scores) == 0:
        raise DataError("there are no samples to measure on", hint="give at least one batch of (inputs, labels)")
    if not np.all(np.isfinite(scores)):
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise DataError(f"the score of sample {bad} is not a finite number")
    return scores


def _spread(values: Scores, seed: int) -> tuple[float, float, str]:
    n = len(values)
    if n == 1:
        return math.nan, math.nan, "none (one sample)"
    if np.all(values == values[0]):
        return float(values[0]), float(values[0]), "none (no spread)"
    if n <= _BOOTSTRAP_UP_TO:
        rng = np.random.default_rng(seed)
        found = stats.bootstrap(
            (values,), np.mean, confidence_level=_LEVEL, n_resamples=_RESAMPLES, method="BCa", rng=rng
        ).confidence_interval
        if np.isfinite(found.low) and np.isfinite(found.high):
            return float(found.low), float(found.high), "bootstrap"
    half = float(stats.t.ppf(0.5 + _LEVEL / 2, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    mean = float(values.mean())
    return mean - half, mean + half, "t"
