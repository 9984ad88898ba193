"""Measurements of networks on the runtimes that will run them, and the Report of an evaluation."""

from penjing.budget import Constraint, parse_constraints, verdict
from penjing.evaluation.assemble import evaluate
from penjing.evaluation.curves import Point, Sensitivity
from penjing.evaluation.describe import data_digest, describe, digest, wire_bytes
from penjing.evaluation.environment import environment
from penjing.evaluation.intervals import mean_interval, paired_difference
from penjing.evaluation.latency import LatencySettings, compare, interleave
from penjing.evaluation.measurement import Measurement, Metric
from penjing.evaluation.memory import Memory, peak_memory
from penjing.evaluation.result import Report, TargetResult
from penjing.evaluation.silencing import sensitivity

__all__ = [
    "Constraint",
    "LatencySettings",
    "Measurement",
    "Memory",
    "Metric",
    "Point",
    "Report",
    "Sensitivity",
    "TargetResult",
    "compare",
    "data_digest",
    "describe",
    "digest",
    "environment",
    "evaluate",
    "interleave",
    "mean_interval",
    "paired_difference",
    "parse_constraints",
    "peak_memory",
    "sensitivity",
    "verdict",
    "wire_bytes",
]
