"""Constraints such as ``accuracy>=-1%, latency<=0.5x, size<=2MB``: reading them, and holding measurements against them.

One constraint is ``QUANTITY >= LIMIT`` or ``QUANTITY <= LIMIT``:

=============================  ========================================================================================
quantity                       what is compared
=============================  ========================================================================================
``metric`` or its own name     the task's metric (``accuracy``, ``loss``, ``fidelity``, …)
``latency``                    median latency; ``x`` is against the *best* uncompressed setting of that runtime
``throughput``                 samples a second; ``x`` likewise
``size`` (or ``file``)         bytes of the exported artefact
``wire``                       bytes of the packed network
``memory``                     peak memory of a fresh process
``macs``, ``parameters``       counts
=============================  ========================================================================================

Limits: ``0.5x`` or ``50%`` of the baseline; ``-1%`` or ``+5%`` is a change (for a metric between 0 and 1: in points);
``5ms``, ``2MB``, ``2MiB``, ``30M``, ``92%`` of a metric, or a plain number is absolute.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penjing.errors import BudgetError

QUANTITIES = ("metric", "latency", "throughput", "size", "wire", "memory", "macs", "parameters")
_ALIASES = {"file": "size", "params": "parameters", "bytes": "size"}
_METRIC_NAMES = (
    *("accuracy", "loss", "fidelity", "agreement", "relative_error", "perplexity", "psnr", "mean_iou", "f1"),
    *("nats_per_token", "mse", "mae", "rmse", "r2", "error", "nll", "score", "top1", "auc"),
)
_UNITS: dict[str, dict[str, float]] = {
    "latency": {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3},
    "throughput": {"/s": 1.0},
    "macs": {"k": 1e3, "m": 1e6, "g": 1e9},
    "parameters": {"k": 1e3, "m": 1e6, "g": 1e9},
}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_PATTERN = re.compile(
    r"\s*(?P<quantity>[A-Za-z_][\w .-]*?)\s*(?P<compare><=|>=|=<|=>|==|<|>|=)\s*"
    r"(?P<sign>[+\-−]?)\s*(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*(?P<unit>[A-Za-zµ%/]*)\s*"
)
_FIELDS = {
    "size": "file_bytes",
    "wire": "wire_bytes",
    "memory": "peak_memory_bytes",
    "macs": "macs",
    "parameters": "parameters",
    "throughput": "throughput_per_s",
}


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """One constraint.

    Attributes:
        text: as the user wrote it.
        quantity: one of ``QUANTITIES``.
        name: the metric's own name when the user used one (``accuracy``), else the quantity.
        at_most: True for ``<=``.
        kind: ``"ratio"`` (limit 0.5 = half the baseline), ``"change"`` (limit -0.01 = one hundredth less) or
        ``"absolute"``. limit: milliseconds, bytes, counts or metric units for absolute limits.
        percent: the limit was written with ``%`` (a change of a metric is then in points or relative, by the metric).
    """

    text: str
    quantity: str
    name: str
    at_most: bool
    kind: str
    limit: float
    percent: bool = False

    @property
    def relative(self) -> bool:
        """Whether a baseline is needed to judge it."""
        return self.kind != "absolute"

    def check(
        self, result: Mapping[str, Any], baseline: Mapping[str, Any] | None, best: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The verdict row ``{"text", "value", "limit", "met"}`` for measurements in report.json's form M.

        ``best`` is the best uncompressed setting, which speed is held against; the baseline where it is None.

        Raises:
            BudgetError: the metric has another name, or a baseline is needed and missing.
        """
        if self.quantity == "metric":
            metric = result.get("metric") or {}
            if self.name not in ("metric", _plain_name(str(metric.get("name", "")))):
                raise BudgetError(
                    f"the constraint '{self.text}' speaks of '{self.name}', but the metric here is "
                    f"'{metric.get('name', 'not measured')}'",
                    hint="use the metric's own name, or 'metric'",
                )
        reference = (best or baseline) if self.quantity in ("latency", "throughput") else baseline
        if self.relative and reference is None:
            raise BudgetError(
                f"the constraint '{self.text}' compares with a baseline, but there is none",
                hint="give baseline=, or an absolute limit such as 'latency<=5ms'",
            )
        value = _read(self.quantity, result)
        if self.relative and value is not None:
            before = _read(self.quantity, reference or {})
            value = None if before is None else self._against(value, before, result)
        slack = 1e-9 * max(1.0, abs(self.limit))  # 0.92 - 0.93 is a little below -0.01
        met = value is not None and (value <= self.limit + slack if self.at_most else value >= self.limit - slack)
        return {"text": self.text, "value": value, "limit": self.limit, "met": met}

    def _against(self, value: float, before: float, result: Mapping[str, Any]) -> float | None:
        if self.kind == "change":
            if self.quantity == "metric" and (not self.percent or is_fraction(result.get("metric") or {})):
                return value - before
            return None if before == 0 else (value - before) / abs(before)
        return None if before == 0 else value / before


def is_fraction(metric: Mapping[str, Any]) -> bool:
    """Whether a metric of report.json's form lives between 0 and 1 and is shown as a percentage."""
    return metric.get("unit") in ("%", "fraction") or metric.get("method") == "wilson"


def parse_constraints(text: str) -> tuple[Constraint, ...]:
    """Read comma- or semicolon-separated constraints.

    Raises:
        BudgetError: a part that cannot be read, an unknown quantity or a unit that does not fit it.
    """
    parts = [part.strip() for part in re.split(r"[;,\n]|\band\b", text) if part.strip()]
    if not parts:
        raise BudgetError("the constraints are empty", hint="for example: 'latency<=0.5x, accuracy>=-1%'")
    return tuple(_parse(part) for part in parts)


def verdict(
    constraints: tuple[Constraint, ...],
    result: Mapping[str, Any],
    baseline: Mapping[str, Any] | None,
    best: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``{"met", "constraints": [...]}`` of report.json; met when every constraint is (so: when there is none)."""
    rows = [constraint.check(result, baseline, best) for constraint in constraints]
    return {"met": all(row["met"] for row in rows), "constraints": rows}


def _parse(text: str) -> Constraint:
    found = _PATTERN.fullmatch(text)
    example = "write it like 'latency<=0.5x', 'size<=2MB', 'accuracy>=-1%'"
    if found is None:
        raise BudgetError(f"cannot read the constraint '{text}'", hint=example)
    compare = found["compare"]
    if compare in ("==", "="):
        raise BudgetError(f"the constraint '{text}' must use <= or >=", hint=example)
    name = _plain_name(found["quantity"])
    name = _ALIASES.get(name, name)
    quantity = name if name in QUANTITIES else "metric"
    if quantity == "metric" and name != "metric" and name not in _METRIC_NAMES:
        known = (*QUANTITIES, *_METRIC_NAMES)
        close = _closest(name, known)
        if close:
            raise BudgetError(
                f"the constraint '{text}' names an unknown quantity; did you mean '{close}'?", hint=example
            )
    number = float(found["number"])
    sign = {"+": 1.0, "": 1.0}.get(found["sign"], -1.0)
    kind, limit, percent = _limit(text, quantity, number, found["sign"], found["unit"])
    return Constraint(
        text=text,
        quantity=quantity,
        name=name,
        at_most="<" in compare,
        kind=kind,
        limit=sign * limit,
        percent=percent,
    )


def _limit(text: str, quantity: str, number: float, sign: str, unit: str) -> tuple[str, float, bool]:
    if unit in ("x", "X"):
        if sign:
            raise BudgetError(f"the ratio in '{text}' takes no sign", hint="0.5x is half of the baseline")
        return "ratio", number, False
    if unit == "%":
        if sign:
            return "change", number / 100, True
        return ("absolute" if quantity == "metric" else "ratio"), number / 100, True
    if quantity == "metric":
        if unit:
            raise BudgetError(f"unknown unit '{unit}' in '{text}'", hint="a metric takes %, x or a plain number")
        return ("change" if sign else "absolute"), number, False
    if sign:
        raise BudgetError(f"the change in '{text}' needs a percent sign", hint="for example 'latency<=-50%'")
    if not unit:
        if quantity == "latency":
            raise BudgetError(f"'{text}' needs a unit", hint="for example 'latency<=5ms' or 'latency<=0.5x'")
        return "absolute", number, False
    table = _BYTES if quantity in ("size", "wire", "memory") else _UNITS[quantity]
    if unit.lower() not in table:
        raise BudgetError(f"unknown unit '{unit}' in '{text}'", hint="known here: x, %, " + ", ".join(table))
    return "absolute", number * table[unit.lower()], False


def _read(quantity: str, measurement: Mapping[str, Any]) -> float | None:
    if quantity == "metric":
        found = (measurement.get("metric") or {}).get("value")
    elif quantity == "latency":
        found = (measurement.get("latency_ms") or {}).get("p50")
    else:
        found = measurement.get(_FIELDS[quantity])
    return None if found is None else float(found)


def _plain_name(text: str) -> str:
    """``Mean IoU`` and ``mean-iou`` → ``mean_iou``."""
    return re.sub(r"[\s-]+", "_", text.strip().lower())


def _closest(name: str, known: tuple[str, ...]) -> str | None:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return found[0] if found else None
