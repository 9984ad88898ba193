"""Measurement: the numbers taken of one network on one target, in the form M of report.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from penjing.evaluation.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A task's metric over ``n`` samples.

    ``unit`` is ``"%"`` for a fraction that is shown as a percentage. ``ci95`` is the 95 % interval, ``method`` how it
    was made.
    """

    name: str
    value: float
    n: int
    ci95: tuple[float, float]
    unit: str = ""
    higher_is_better: bool = True
    method: str = ""

    @classmethod
    def of(cls, interval: Interval, *, name: str, unit: str, higher_is_better: bool) -> Metric:
        """The metric whose mean and interval were computed from per-sample scores."""
        return cls(
            name=name,
            value=interval.value,
            n=interval.n,
            ci95=(interval.low, interval.high),
            unit=unit,
            higher_is_better=higher_is_better,
            method=interval.method,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an interval that does not exist becomes ``[null, null]``."""
        return {
            "name": self.name,
            "value": self.value,
            "n": self.n,
            "ci95": [None if math.isnan(end) else end for end in self.ci95],
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "method": self.method,
        }


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything measured of one network on one target; None stands for what was not measured.

    Latency is in milliseconds for ``latency_batch`` samples at a time, throughput in samples a second at
    ``throughput_batch``.
    """

    runtime: str
    device: str
    threads: int | None
    precision: str
    metric: Metric | None = None
    latency_ms: dict[str, float | int] | None = None
    latency_batch: int = 1
    throughput_per_s: float | None = None
    throughput_batch: int | None = None
    peak_memory_bytes: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    file_bytes: int | None = None
    wire_bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    fidelity: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """M of report.json."""
        return {
            "runtime": self.runtime,
            "device": self.device,
            "threads": self.threads,
            "precision": self.precision,
            "metric": None if self.metric is None else self.metric.to_dict(),
            "latency_ms": self.latency_ms,
            "latency_batch": self.latency_batch,
            "throughput_per_s": self.throughput_per_s,
            "throughput_batch": self.throughput_batch,
            "peak_memory_bytes": self.peak_memory_bytes,
            "memory": self.memory,
            "file_bytes": self.file_bytes,
            "wire_bytes": self.wire_bytes,
            "parameters": self.parameters,
            "macs": self.macs,
            "fidelity": self.fidelity,
        }
