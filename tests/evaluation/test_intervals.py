"""Intervals against published numbers, against scipy and statistics by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from penjing.errors import DataError
from penjing.evaluation.intervals import mean_interval, newcombe_paired, paired_difference, ratio_interval, wilson


def test_wilson_agrees_with_newcombes_published_examples() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29)[1] == 1.0


def test_paired_proportions_agree_with_newcombe() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635: 36 both, 12 and 2 discordant, method 10
    assert newcombe_paired(both=36, gained=12, lost=2, neither=0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert newcombe_paired(both=36, gained=2, lost=12, neither=0) == pytest.approx((-0.3404, -0.0569), abs=5e-5)
    # without any discordant pair: perfectly associated, so narrower than independent samples by far, but not zero
    low, high = newcombe_paired(both=30, gained=0, lost=0, neither=24)
    assert low == pytest.approx(-high)
    assert 0 < high < 0.08


def test_zero_one_scores_use_wilson() -> None:
    scores = np.array([1.0] * 81 + [0.0] * 182)
    found = mean_interval(scores)
    assert found.method == "wilson"
    assert (found.value, found.n) == (pytest.approx(81 / 263), 263)
    assert (found.low, found.high) == wilson(81, 263)


def test_large_samples_use_student_t_as_scipy_does() -> None:
    scores = np.random.default_rng(0).normal(2.0, 3.0, 5000)
    found = mean_interval(scores)
    expected = stats.t.interval(0.95, 4999, scores.mean(), stats.sem(scores))
    assert found.method == "t"
    assert (found.low, found.high) == pytest.approx(expected)


def test_small_samples_are_bootstrapped_the_same_way_twice() -> None:
    scores = np.random.default_rng(1).exponential(1.0, 60)
    first, again, other = mean_interval(scores, seed=3), mean_interval(scores, seed=3), mean_interval(scores, seed=4)
    assert first == again
    assert first != other
    assert first.low < scores.mean() < first.high
    skew = (first.high - first.value) - (first.value - first.low)
    assert skew > 0  # an exponential's interval leans to the right: a t interval would not


@pytest.mark.parametrize("kind", ["binary", "skewed"])
def test_coverage_is_near_95_percent(kind: str) -> None:
    rng = np.random.default_rng(5)
    covered = 0
    runs = 300 if kind == "binary" else 60
    for _ in range(runs):
        if kind == "binary":
            difference = paired_difference(*_correlated(rng, 200))
            covered += difference.low <= 0.03 <= difference.high
        else:
            found = mean_interval(rng.exponential(1.0, 80))
            covered += found.low <= 1.0 <= found.high
    assert covered / runs > 0.89


def _correlated(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Baseline right with 0.85; the result gains 0.05 and loses 0.02."""
    draw = rng.random(n)
    baseline = (draw < 0.85).astype(float)
    result = baseline.copy()
    result[(draw >= 0.85) & (draw < 0.90)] = 1.0
    result[draw < 0.02] = 0.0
    return baseline, result


def test_paired_differences_count_the_samples_that_changed() -> None:
    baseline = np.array([1, 1, 1, 1, 0, 0, 1, 1, 1, 1], dtype=float)
    result = np.array([1, 1, 0, 0, 1, 0, 1, 1, 1, 0], dtype=float)
    found = paired_difference(baseline, result)
    assert (found.gained, found.lost) == (1, 3)
    assert found.value == pytest.approx(-0.2)
    assert found.p == pytest.approx(stats.binomtest(1, 4, 0.5).pvalue)
    assert found.low < -0.2 < found.high


def test_pairing_is_narrower_than_two_separate_intervals() -> None:
    rng = np.random.default_rng(2)
    baseline = rng.normal(0, 10, 3000)
    result = baseline + rng.normal(0.1, 0.5, 3000)
    paired = paired_difference(baseline, result)
    separate = mean_interval(baseline)
    assert paired.high - paired.low < 0.1 * (separate.high - separate.low)
    assert paired.p < 1e-6
    assert paired.p == pytest.approx(stats.ttest_rel(result, baseline).pvalue)


def test_equal_scores_differ_by_nothing() -> None:
    scores = np.random.default_rng(0).normal(size=50)
    found = paired_difference(scores, scores)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    binary = paired_difference(np.ones(40), np.ones(40))
    assert binary.value == 0.0
    assert binary.low < 0 < binary.high  # forty samples cannot prove that nothing changed


def test_one_sample_has_no_interval() -> None:
    found = mean_interval(np.array([0.3]))
    assert found.value == 0.3
    assert math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize(
    ("scores", "words"), [(np.array([]), "no samples"), (np.array([0.1, np.nan]), "sample 1 is not a finite number")]
)
def test_impossible_scores_are_refused(scores: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        mean_interval(scores)


def test_different_samples_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="3 and 4"):
        paired_difference(np.ones(3), np.ones(4))


def test_ratio_interval_holds_the_median_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(9)
    hits = 0
    for _ in range(400):
        low, high = ratio_interval(rng.lognormal(0.0, 0.3, 25))
        hits += low <= 1.0 <= high
    assert hits / 400 >= 0.93
