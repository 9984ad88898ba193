"""Numbers and verdicts as a newcomer reads them. Works on the plain values of report.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from penjing.budget import is_fraction

Values = Mapping[str, Any]
MINUS = "−"
SAME = 0.03
_NAMED = 5  # layers in one sentence
_BUSY = 4.0


def number(value: float, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent for everyday sizes: 0.123, 4.2, 93.4, 1230."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{decimals}f}".replace("-", MINUS)


def amount(value: float | None, unit: str = "") -> str:
    """Engineering form: 1234567 → ``1.23 M``."""
    if value is None:
        return "–"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{number(value / size)} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip() if float(value).is_integer() else f"{number(value)} {unit}".strip()


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    return amount(value, "B")


def milliseconds(value: float | None, *, beside: Iterable[float | None] = ()) -> str:
    """Milliseconds; microseconds where neither it nor any value that it stands ``beside`` reaches 1 ms."""
    if value is None:
        return "–"
    small = max([value, *(other for other in beside if other is not None)]) < 1
    return f"{number(value * 1e3)} µs" if small else f"{number(value)} ms"


def metric_value(metric: Values | None) -> str:
    """``93.39 %`` for fractions, otherwise four digits with the unit."""
    if not metric or metric.get("value") is None:
        return "–"
    if is_fraction(metric):
        return f"{100 * metric['value']:.2f} %"
    return f"{number(metric['value'], 4)} {metric.get('unit') or ''}".strip()


def metric_interval(metric: Values | None) -> str:
    """``92.9 to 93.9 %``; empty where there is no interval."""
    low, high = (metric or {}).get("ci95") or (None, None)
    if metric is None or low is None or high is None:
        return ""
    if is_fraction(metric):
        return f"{100 * low:.2f} to {100 * high:.2f} %"
    return f"{number(low, 4)} to {number(high, 4)}"


def signed(value: float, digits: int = 3) -> str:
    """With a true sign: ``+0.4``, ``−1.2``, ``±0``."""
    text = number(abs(value), digits)
    return "±0" if float(text.replace(MINUS, "-")) == 0 else ("+" if value > 0 else MINUS) + text


def points(value: float) -> str:
    """A change of a fraction in percentage points, two decimals."""
    rounded = round(100 * value, 2)
    return "±0.00" if rounded == 0 else f"{'+' if rounded > 0 else MINUS}{abs(rounded):.2f}"


def metric_change(change: Values | None, metric: Values | None) -> str:
    """``−0.40 points (95 %: −0.71 to −0.09)``."""
    if not change or metric is None or change.get("difference") is None:
        return ""
    fraction = is_fraction(metric)
    show = points if fraction else signed
    unit = " points" if fraction else (f" {metric['unit']}" if metric.get("unit") else "")
    low, high = change.get("ci95") or (None, None)
    spread = f" (95 %: {show(low)} to {show(high)})" if low is not None and high is not None else ""
    return f"{show(change['difference'])}{unit}{spread}"


def times(ratio: float, better: str, worse: str, *, same: float = SAME) -> str:
    """A ratio result/reference in words: 0.25 → ``4× smaller``; within ``same`` (3 %) it is ``about the same``."""
    if abs(ratio - 1) <= same:
        return "about the same"
    factor = 1 / ratio if ratio < 1 else ratio
    shown = f"{factor:.0f}" if factor >= 100 else f"{factor:.1f}" if factor >= 1.95 else f"{factor:.2f}"
    return f"{shown}× {better if ratio < 1 else worse}"


def setting(measurement: Values) -> str:
    """``openvino, bf16, 2 threads``."""
    threads = measurement.get("threads")
    parts = [measurement.get("runtime"), measurement.get("precision")]
    if threads:
        parts.append(f"{threads} thread" + ("" if threads == 1 else "s"))
    return ", ".join(str(part) for part in parts if part)


def headline(target: Values) -> str:
    """The report in one sentence, from one entry of ``targets``."""
    result, change = target["result"], target.get("change") or {}
    metric = result.get("metric")
    if not target.get("baseline"):
        parts = [f"{size(result.get('wire_bytes'))} on the wire"]
        if result.get("latency_ms"):
            parts.append(f"{milliseconds(result['latency_ms']['p50'])} on {setting(result)}")
        if metric:
            parts.append(f"{name_of(metric)} {metric_value(metric)}")
        return ", ".join(parts)
    parts = []
    if change.get("wire"):
        parts.append(
            times(change["wire"], "smaller", "larger") + _on(change["wire"], " on the wire", " size on the wire")
        )
    latency = change.get("latency")
    if latency:
        parts.append(_speed(latency, target))
    if metric and change.get("metric"):
        parts.append(f"{name_of(metric)} {metric_change(change['metric'], metric)}")
    return ", ".join(parts)


def warnings(target: Values) -> list[str]:
    """What a reader must not overlook, in sentences: regressions, and what the numbers cannot say."""
    result, baseline, change = target["result"], target.get("baseline"), target.get("change") or {}
    found = []
    latency = change.get("latency")
    if latency and latency["verdict"] == "slower":
        best = target.get("best_uncompressed") or baseline or {}
        found.append(
            f"Regression: on {result['runtime']} the result is {latency['ratio']:.2f}× slower than the uncompressed "
            f"network at its best ({setting(best)}). Do not deploy it there for speed."
        )
    elif latency and latency["verdict"] != "faster":
        saved = ": there it only saves space" if (change.get("wire") or 1) < 1 - SAME else ""
        found.append(
            f"On {result['runtime']} the result is not measurably faster than the uncompressed network at its best"
            f"{saved}."
        )
    throughput = change.get("throughput")
    if throughput and throughput["verdict"] == "slower":
        found.append(
            f"Regression: at {result.get('throughput_batch')} samples a time the result processes "
            f"{throughput['ratio']:.2f}× fewer samples a second than the uncompressed network at its best."
        )
    for key, what in (("file", "file"), ("wire", "package"), ("memory", "peak memory")):
        if change.get(key) and change[key] > 1.03:
            found.append(f"On {result['runtime']} its {what} is {change[key]:.2f}× larger than the baseline's.")
    latencies = [m["latency_ms"] for m in (result, baseline) if m and m.get("latency_ms")]
    spread = max((each["p95"] / each["p50"] for each in latencies if each["p50"]), default=1.0)
    if spread > _BUSY:
        found.append(
            f"The machine was busy while timing on {result['runtime']} (slow runs took {spread:.0f}× the typical "
            "time): trust the ratios, which were taken in turns, more than the milliseconds."
        )
    plain = target.get("best_uncompressed") or baseline
    if plain and _crowded(plain):
        found.append(
            f"On {result['runtime']} the uncompressed network processes fewer samples a second "
            f"{plain['throughput_batch']} at a time than one by one: its threads waited for each other or for other "
            f"programs. The throughput ratio flatters the result; measure again on {result['runtime']}:threads=1."
        )
    found += in_float(target)
    found += _doubts(result, change)
    return found


def in_float(target: Values) -> list[str]:
    """The layers on integer grids that a runtime executed in float, a sentence for each arithmetic."""
    layers: dict[str, list[str]] = {}
    for layer, precision in (target.get("in_float") or {}).items():
        layers.setdefault(precision, []).append(layer)
    return [
        f"On {target['result']['runtime']} {len(names)} layer{'s' * (len(names) > 1)} on integer grids really ran in "
        f"{precision}: {_some(names)}."
        for precision, names in layers.items()
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _crowded(measurement: Values) -> bool:
    """Whether many at a time take longer for each sample than one by one, which no healthy machine shows."""
    latency, rate = measurement.get("latency_ms"), measurement.get("throughput_per_s")
    if not latency or not rate or not latency["p50"]:
        return False
    return bool(rate < 0.9 * 1e3 * measurement.get("latency_batch", 1) / latency["p50"])


def name_of(metric: Values) -> str:
    """The metric's name in reading form."""
    return str(metric.get("name", "metric")).replace("_", " ")


def _doubts(result: Values, change: Values) -> list[str]:
    metric, difference = result.get("metric") or {}, change.get("metric") or {}
    found = []
    if difference.get("ci95") and None not in difference["ci95"] and is_fraction(metric):
        width = 100 * (difference["ci95"][1] - difference["ci95"][0])
        if width > 2 and difference.get("n", 0) < 2000:
            found.append(
                f"With {difference['n']} samples the change of {name_of(metric)} is known only to "
                f"±{width / 2:.1f} points: measure on more to be surer."
            )
    if (result.get("memory") or {}).get("error"):
        found.append(f"Peak memory could not be measured: {result['memory']['error']}")
    return found


def _on(ratio: float, suffix: str, same: str) -> str:
    return same if abs(ratio - 1) <= SAME else suffix


def _speed(latency: Values, target: Values) -> str:
    several = len(target.get("uncompressed") or ()) > 1
    best = target.get("best_uncompressed") or target["baseline"]
    plain = f"{best['runtime']}, {best['precision']}"
    what = f"the best uncompressed setting ({plain})" if several else f"uncompressed ({plain})"
    if latency["verdict"] == "no measurable difference":
        return f"no measurable difference in speed to {what}"
    return f"{times(latency['ratio'], 'faster', 'slower', same=0)} than {what}"


def widened(rows: Iterable[Values]) -> str:
    """What a file holds wider than the network: "2 tensors of int3 as int4 (no int3 in the file): a, b"; or ""."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        kinds.setdefault((row["kind"], row["stored"], row["why"]), []).append(row["tensor"])
    several = [
        f"{len(names)} tensor{'s' * (len(names) > 1)} of {kind} as {stored} ({why}): {_some(names)}"
        for (kind, stored, why), names in kinds.items()
    ]
    return "wider than in the network: " + "; ".join(several) if several else ""
