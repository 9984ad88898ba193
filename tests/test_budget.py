"""Constraints: what is read, what is compared with what, and what is refused."""

import pytest

from penjing.budget import parse_constraints, verdict
from penjing.errors import BudgetError


def measured(
    value: float = 0.90, p50: float = 2.0, file: int = 1_000_000, unit: str = "%", name: str = "accuracy"
) -> dict:
    return {
        "metric": {"name": name, "value": value, "unit": unit},
        "latency_ms": {"p50": p50, "p95": p50 * 1.2, "n": 100},
        "throughput_per_s": 1000 / p50,
        "file_bytes": file,
        "wire_bytes": file // 2,
        "peak_memory_bytes": 50_000_000,
        "macs": 30_000_000,
        "parameters": 200_000,
    }


def row(text: str, result: dict | None = None, baseline: dict | None = None, best: dict | None = None) -> dict:
    found = verdict(parse_constraints(text), result or measured(), baseline, best)
    assert len(found["constraints"]) == 1
    assert set(found["constraints"][0]) == {"text", "value", "limit", "met"}
    assert found["met"] == found["constraints"][0]["met"]
    return found["constraints"][0]


@pytest.mark.parametrize(
    ("text", "value", "limit", "met"),
    [
        ("size<=2MB", 1_000_000, 2_000_000, True),
        ("size<=0.5MiB", 1_000_000, 524_288, False),
        ("file<=1e6", 1_000_000, 1_000_000, True),
        ("wire <= 600 kB", 500_000, 600_000, True),
        ("latency<=1500us", 2.0, 1.5, False),
        ("latency<=0.01s", 2.0, 10.0, True),
        ("macs<=30M", 30e6, 30e6, True),
        ("params<=100k", 200_000, 100_000, False),
        ("memory<=64MiB", 50_000_000, 67_108_864, True),
        ("accuracy>=90%", 0.90, 0.90, True),
        ("metric>=0.95", 0.90, 0.95, False),
        ("throughput>=400", 500.0, 400.0, True),
    ],
)
def test_absolute_limits(text: str, value: float, limit: float, met: bool) -> None:
    found = row(text)
    assert found["text"] == text
    assert found["value"] == pytest.approx(value)
    assert found["limit"] == pytest.approx(limit)
    assert found["met"] is met


@pytest.mark.parametrize(
    ("text", "value", "limit", "met"),
    [
        ("latency<=0.5x", 2.0 / 3.0, 0.5, False),  # against the best uncompressed setting, not the slower baseline
        ("throughput>=1.4x", 1.5, 1.4, True),
        ("size<=0.3x", 0.25, 0.3, True),
        ("size<=30%", 0.25, 0.3, True),
        ("size<=-70%", -0.75, -0.7, True),
        ("accuracy>=-1%", -0.02, -0.01, False),  # 90 % after 92 %: two points
        ("accuracy>=-0.03", -0.02, -0.03, True),
        ("accuracy>=0.97x", 0.90 / 0.92, 0.97, True),
    ],
)
def test_relative_limits(text: str, value: float, limit: float, met: bool) -> None:
    baseline = measured(0.92, p50=6.0, file=4_000_000)
    best = measured(0.92, p50=3.0, file=4_000_000)
    found = row(text, baseline=baseline, best=best)
    assert found["value"] == pytest.approx(value)
    assert found["limit"] == pytest.approx(limit)
    assert found["met"] is met


def test_a_percentage_of_a_metric_without_an_upper_end_is_relative() -> None:
    result, baseline = measured(29.4, unit="dB", name="psnr"), measured(30.0, unit="dB", name="psnr")
    assert row("psnr>=-1%", result, baseline)["value"] == pytest.approx(-0.02)
    assert row("psnr>=-1", result, baseline)["met"] is True


def test_a_loss_may_rise_by_so_much() -> None:
    result, baseline = measured(1.45, unit="nats", name="loss"), measured(1.40, unit="nats", name="loss")
    assert row("loss<=+0.1", result, baseline)["met"] is True
    assert row("loss<=+0.01", result, baseline)["met"] is False


def test_several_constraints_are_met_when_all_are() -> None:
    found = verdict(parse_constraints("size<=2MB, accuracy>=95%; macs<=1G"), measured(), None)
    assert [each["met"] for each in found["constraints"]] == [True, False, True]
    assert found["met"] is False
    assert verdict((), measured(), None) == {"met": True, "constraints": []}


def test_what_was_not_measured_is_not_met() -> None:
    result = {**measured(), "peak_memory_bytes": None}
    assert row("memory<=1GB", result) == {"text": "memory<=1GB", "value": None, "limit": 1e9, "met": False}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("latency", "cannot read"),
        ("latency<=", "cannot read"),
        ("latency==5ms", "<= or >="),
        ("latency<=5", "needs a unit"),
        ("latency<=5MB", "unknown unit 'MB'"),
        ("latncy<=0.5x", "did you mean 'latency'"),
        ("size<=-2MB", "percent sign"),
        ("size<=-0.5x", "takes no sign"),
        ("accuracy>=5ms", "unknown unit 'ms'"),
    ],
)
def test_unreadable_constraints_are_refused(text: str, words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        parse_constraints(text)


def test_a_ratio_needs_a_baseline() -> None:
    with pytest.raises(BudgetError, match="there is none"):
        row("latency<=0.5x")


def test_a_metric_of_another_name_is_refused() -> None:
    with pytest.raises(BudgetError, match="speaks of 'perplexity', but the metric here is 'accuracy'"):
        row("perplexity<=20")
