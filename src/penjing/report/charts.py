"""Bars and intervals as positions in per cent; the style sheet draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penjing.evaluation import words

Values = Mapping[str, Any]
Row = dict[str, Any]


def bars(target: Values, several: bool) -> list[Row]:
    """One chart a quantity: bars for the baseline, the best uncompressed setting (if another) and the result."""
    named = [("baseline", target["baseline"])]
    if several:
        named.append(("best uncompressed", target["best_uncompressed"]))
    named.append(("result", target["result"]))
    picked: list[tuple[str, str, Callable[[Values], Any], Callable[[Any, list[Any]], str]]] = [
        ("Size on the wire", "shorter is better", lambda m: m.get("wire_bytes"), _size),
        ("Latency, typical", "shorter is better", lambda m: (m.get("latency_ms") or {}).get("p50"), _ms),
        ("Throughput", "longer is better", lambda m: m.get("throughput_per_s"), lambda v, _: words.amount(v, "/s")),
        ("Peak memory", "shorter is better", lambda m: m.get("peak_memory_bytes"), _size),
        ("Multiply-adds", "shorter is better", lambda m: m.get("macs"), lambda v, _: words.amount(v)),
    ]
    charts = []
    for label, direction, read, show in picked:
        values = [(name, read(m)) for name, m in named]
        longest = max((value for _, value in values if value), default=0)
        if not longest or any(value is None for _, value in values):
            continue
        every = [value for _, value in values]
        lengths = [
            {
                "name": name,
                "text": show(value, every),
                "width": round(100 * value / longest, 2),
                "is_result": name == "result",
            }
            for name, value in values
        ]
        charts.append({"label": label, "direction": direction, "bars": lengths})
    return charts


def _size(value: float, every: list[Any]) -> str:
    return words.size(value)


def _ms(value: float, every: list[Any]) -> str:
    return words.milliseconds(value, beside=every)


def intervals(columns: Sequence[tuple[str, Values | None]]) -> Row | None:
    """The metric and its intervals on one axis; None without intervals."""
    found = [(label, m["metric"]) for label, m in columns if m and m.get("metric")]
    found = [(label, metric) for label, metric in found if None not in (metric.get("ci95") or [None])]
    if len(found) < 2:
        return None
    low = min(metric["ci95"][0] for _, metric in found)
    high = max(metric["ci95"][1] for _, metric in found)
    pad = 0.08 * (high - low) or abs(high) * 0.01 or 1.0
    low, high = low - pad, high + pad

    def at(value: float) -> float:
        return round(float(100 * (value - low) / (high - low)), 2)

    marks = [
        {
            "name": label,
            "text": words.metric_value(metric),
            "left": at(metric["ci95"][0]),
            "width": round(at(metric["ci95"][1]) - at(metric["ci95"][0]), 2),
            "dot": at(metric["value"]),
            "is_result": label == "result",
        }
        for label, metric in found
    ]
    direction = "right is better" if found[0][1].get("higher_is_better", True) else "left is better"
    return {"label": capital(words.name_of(found[0][1])), "direction": direction, "marks": marks}


def nice_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Three to five round values between `low` and `high` (above it), with their text."""
    raw = (high - low) / 4.5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, f"{number * step:.6g}".replace("-", words.MINUS)) for number in range(first, last + 1)]


def capital(text: str) -> str:
    """The text with its first letter large."""
    return text[:1].upper() + text[1:]
