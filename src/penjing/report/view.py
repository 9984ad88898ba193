"""From report.json to what the pages show: rows of text, bars and marks. No HTML here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penjing.budget import is_fraction, parse_constraints
from penjing.evaluation import words
from penjing.report.charts import bars, capital, intervals
from penjing.report.sensitivity import sensitivity_view

Values = Mapping[str, Any]
Row = dict[str, Any]

_GOOD, _BAD, _SAME = "good", "bad", "same"

# label, key in M, key in "change", formatter, words for less and more, explanation
_SIZES: tuple[tuple[str, str, str, Callable[[Any], str], str, str, str], ...] = (
    (
        "Size on the wire",
        "wire_bytes",
        "wire",
        words.size,
        "smaller",
        "larger",
        "the packed .penjing file that is sent",
    ),
    ("Size of the file", "file_bytes", "file", words.size, "smaller", "larger", "what the runtime opens on the device"),
    (
        "Peak memory",
        "peak_memory_bytes",
        "memory",
        words.size,
        "less",
        "more",
        "of a fresh process that only runs the file",
    ),
    ("Parameters", "parameters", "parameters", words.amount, "fewer", "more", "trained numbers in the network"),
    ("Multiply-adds", "macs", "macs", words.amount, "fewer", "more", "arithmetic for one sample (MACs)"),
)


def view(report: Values) -> dict[str, Any]:
    """Everything that the templates print."""
    targets = [_target(target) for target in report["targets"]]
    network = report["network"]
    return {
        "title": network.get("name") or "network",
        "headline": capital(report.get("headline") or words.headline(report["targets"][0])),
        "warnings": [
            {"text": text, "tone": _BAD if text.startswith("Regression") else "warn"}
            for text in report.get("warnings") or ()
        ],
        "verdict": _verdict(report["verdict"], report["result"].get("metric")),
        "targets": targets,
        "compared": report.get("baseline") is not None,
        "inputs": ", ".join(
            f"{i['name']} {'×'.join(map(str, i['shape']))} {i['dtype']}" for i in network.get("inputs", ())
        ),
        "steps": [_step(step) for step in report.get("steps") or ()],
        "sensitivity": sensitivity_view(report.get("sensitivity")),
        "artifacts": [_artifact(row) for row in report.get("artifacts") or ()],
        "facts": _facts(report),
        "glossary": _GLOSSARY,
    }


def _target(target: Values) -> Row:
    result, baseline, best = target["result"], target.get("baseline"), target.get("best_uncompressed")
    several = baseline is not None and best is not None and best["precision"] != baseline["precision"]
    columns = [("baseline", baseline)] if baseline else []
    if several:
        columns.append(("best uncompressed", best))
    columns.append(("result" if baseline else "measured", result))
    rows = _rows(target, [measurement for _, measurement in columns if measurement is not None])
    return {
        "name": target["target"],
        "setting": words.setting(result),
        "columns": [{"label": label, "setting": words.setting(m)} for label, m in columns if m is not None],
        "rows": rows,
        "charts": bars(target, several) if baseline else [],
        "interval": intervals(columns),
        "note": _note(target, several),
        "executed": _executed(target.get("executed") or {}),
    }


def _rows(target: Values, columns: Sequence[Values]) -> list[Row]:
    result, change = target["result"], target.get("change") or {}
    rows: list[Row] = []
    metric = result.get("metric")
    if metric:
        cells = [
            {"text": words.metric_value(m.get("metric")), "more": words.metric_interval(m.get("metric"))}
            for m in columns
        ]
        direction = "higher is better" if metric.get("higher_is_better", True) else "lower is better"
        text, tone, why = _metric_change(change.get("metric"), metric)
        rows.append(
            {
                "label": capital(words.name_of(metric)),
                "help": f"{direction}; {metric['n']:,} samples; below: 95 % interval",
                "cells": cells,
                "change": text,
                "more": why,
                "tone": tone,
            }
        )
    for key, label in (("p50", "Latency, typical"), ("p95", "Latency, slow runs")):
        if result.get("latency_ms"):
            rows.append(_latency_row(label, key, columns, change, result))
    if result.get("throughput_per_s"):
        rows.append(_throughput_row(columns, change, result))
    for label, key, name, show, less, more, explanation in _SIZES:
        if any(m.get(key) is not None for m in columns):
            ratio = change.get(name)
            rows.append(
                {
                    "label": label,
                    "help": explanation,
                    "cells": [{"text": show(m.get(key)), "more": ""} for m in columns],
                    "change": "" if not ratio else words.times(ratio, less, more),
                    "more": "",
                    "tone": _tone(ratio),
                }
            )
    return rows


def _latency_row(label: str, key: str, columns: Sequence[Values], change: Values, result: Values) -> Row:
    batch = result.get("latency_batch", 1)
    samples = "one sample" if batch == 1 else f"{batch} samples"
    values = [(m.get("latency_ms") or {}).get(key) for m in columns]
    row: Row = {
        "label": label,
        "help": f"half of the runs with {samples} are faster (p50)"
        if key == "p50"
        else "19 of 20 runs are faster (p95)",
        "cells": [{"text": words.milliseconds(value, beside=values), "more": ""} for value in values],
        "change": "",
        "more": "",
        "tone": _SAME,
    }
    latency = change.get("latency")
    if latency and key == "p50":
        row["tone"] = {"faster": _GOOD, "slower": _BAD}.get(latency["verdict"], _SAME)
        measurable = row["tone"] != _SAME
        row["change"] = "no measurable difference"
        if measurable:
            row["change"] = words.times(latency["ratio"], "faster", "slower", same=0)
        row["more"] = _factors(latency["ci95"])
    return row


def _throughput_row(columns: Sequence[Values], change: Values, result: Values) -> Row:
    batch = result.get("throughput_batch") or 1
    found = change.get("throughput")
    tone = _SAME if not found else {"faster": _GOOD, "slower": _BAD}.get(found["verdict"], _SAME)
    text = "" if not found else "no measurable difference"
    if found and tone != _SAME:
        text = words.times(found["ratio"], "more", "less", same=0)
    return {
        "label": "Throughput",
        "help": f"samples a second, {batch} at a time",
        "cells": [{"text": words.amount(m.get("throughput_per_s"), "/s"), "more": ""} for m in columns],
        "change": text,
        "more": _factors(found["ci95"]) if found else "",
        "tone": tone,
    }


def _factors(ci95: Sequence[float | None]) -> str:
    low, high = ci95
    if not low or not high:
        return ""
    return f"95 %: {1 / high:.2f}× to {1 / low:.2f}× the speed"


def _metric_change(change: Values | None, metric: Values) -> tuple[str, str, str]:
    if not change or change.get("difference") is None:
        return "", _SAME, ""
    show = words.points if is_fraction(metric) else words.signed
    unit = " points" if is_fraction(metric) else (f" {metric['unit']}" if metric.get("unit") else "")
    text = f"{show(change['difference'])}{unit}"
    low, high = change.get("ci95") or (None, None)
    if low is None or high is None:
        return text, _SAME, ""
    spread = f"95 %: {show(low)} to {show(high)}"
    if low <= 0 <= high:
        return text, _SAME, f"{spread}; could be chance"
    better = (low > 0) == bool(metric.get("higher_is_better", True))
    return text, _GOOD if better else _BAD, spread


def _tone(ratio: float | None) -> str:
    if ratio is None or abs(ratio - 1) <= words.SAME:
        return _SAME
    return _GOOD if ratio < 1 else _BAD


def _note(target: Values, several: bool) -> str:
    if not target.get("baseline"):
        return "There was no baseline to compare with."
    runs = (target["result"].get("latency_ms") or {}).get("n")
    if several:
        fastest = words.setting(target["best_uncompressed"])
        best = f"Speed is compared with the best uncompressed setting ({fastest}), the rest with the baseline."
    else:
        best = "On this machine the runtime has one uncompressed setting; everything is compared with it."
    return (
        f"{best} Timed in turns in one process{f', about {runs:,} runs each' if runs else ''}; the medians are shown."
    )


def _executed(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} operations in {precision}" for precision, count in ordered)


def _verdict(verdict: Values, metric: Values | None) -> Row:
    rows = [_constraint(row, metric) for row in verdict["constraints"]]
    kept = sum(row["met"] for row in rows)
    if not rows:
        summary = ""
    elif kept == len(rows):
        summary = "Every constraint is met" if kept > 1 else "The constraint is met"
    else:
        summary = (
            f"{len(rows) - kept} of {len(rows)} constraints not met" if len(rows) > 1 else "The constraint is not met"
        )
    return {"met": bool(verdict["met"]), "summary": summary, "rows": rows}


def _constraint(row: Values, metric: Values | None) -> Row:
    constraint = parse_constraints(row["text"])[0]

    def show(value: float | None) -> str:
        if value is None:
            return "not measured"
        if constraint.kind == "ratio":
            return f"{value:.3g}×"
        if constraint.quantity == "metric":
            fraction = is_fraction(metric or {})
            if constraint.kind == "change":
                return words.points(value) + " points" if fraction else words.signed(value)
            return f"{100 * value:.2f} %" if fraction else words.number(value, 4)
        if constraint.kind == "change":
            return words.signed(100 * value) + " %"
        if constraint.quantity == "latency":
            return words.milliseconds(value)
        if constraint.quantity in ("size", "wire", "memory"):
            return words.size(value)
        return words.amount(value, "/s" if constraint.quantity == "throughput" else "")

    sign = "at most" if constraint.at_most else "at least"
    return {
        "text": row["text"],
        "limit": f"{sign} {show(row['limit'])}",
        "value": show(row["value"]),
        "met": bool(row["met"]),
    }


def _step(step: Values) -> Row:
    before, after = step.get("before") or {}, step.get("after") or {}
    settings = step.get("settings") or {}
    reasons = step.get("reasons") or []
    metric = after.get("metric") or before.get("metric")
    return {
        "name": step["name"],
        "settings": ", ".join(f"{key}={_short(value)}" for key, value in settings.items()),
        "seconds": "" if step.get("seconds") is None else f"{step['seconds']:.1f} s",
        "parameters": _arrow(before.get("parameters"), after.get("parameters"), words.amount),
        "macs": _arrow(before.get("macs"), after.get("macs"), words.amount),
        "metric_name": "" if not isinstance(metric, Mapping) else words.name_of(metric),
        "metric": _arrow(before.get("metric"), after.get("metric"), _metric),
        "reasons": [
            {
                "layer": reason.get("layer", ""),
                "score": "" if reason.get("score") is None else words.number(float(reason["score"])),
                "choice": reason.get("choice", ""),
                "why": reason.get("why", ""),
            }
            for reason in reasons
        ],
        "notes": step.get("notes") or [],
    }


def _metric(value: Any) -> str:
    if isinstance(value, Mapping):
        share = {**value, "unit": "%"} if value.get("name") in ("accuracy", "agreement", "mean IoU") else value
        return words.metric_value(share)
    return words.number(float(value), 4)


def _arrow(before: Any, after: Any, show: Callable[[Any], str]) -> str:
    if before is None and after is None:
        return ""
    if before is None or after is None:
        return show(after if before is None else before)
    old, new = show(before), show(after)
    return new if old == new else f"{old} → {new}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _artifact(row: Values) -> Row:
    parity = row.get("parity") or {}
    agreement = parity.get("agreement")
    return {
        "path": row["path"],
        "runtime": row["runtime"],
        "bytes": words.size(row.get("bytes")),
        "sha256": row.get("sha256", ""),
        "widened": words.widened(row.get("widened") or ()),
        "max_abs": "–" if parity.get("max_abs") is None else f"{parity['max_abs']:.2g}",
        "agreement": "–" if agreement is None else f"{100 * agreement:.1f} %",
    }


def _facts(report: Values) -> list[tuple[str, str]]:
    environment = report.get("environment") or {}
    memory = (report["result"].get("memory") or {}).get("counted")
    data = report.get("data") or {}
    pairs: list[tuple[str, Any]] = [
        ("Processor", environment.get("processor")),
        ("Cores", environment.get("cores")),
        ("Instructions", ", ".join(environment.get("instructions") or ())),
        ("Memory", words.size(environment["memory_bytes"]) if environment.get("memory_bytes") else None),
        ("System", environment.get("system")),
        ("Python", environment.get("python")),
        ("Packages", ", ".join(f"{k} {v}" for k, v in (environment.get("packages") or {}).items())),
        ("Seed", environment.get("seed")),
        ("Counted in peak memory", memory),
        ("Measured on", f"{data['samples']:,} samples, SHA-256 {data['sha256'][:16]}…" if data.get("sha256") else None),
        ("Network", f"SHA-256 {report['network']['digest'][:16]}…" if report["network"].get("digest") else None),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


_GLOSSARY = (
    ("Baseline", "the network as it was before compression, in float32, on the same runtime"),
    (
        "Best uncompressed",
        "the same network in the fastest arithmetic that this machine offers without compressing anything, such as "
        "bfloat16. A compressed network that is slower than this gains no speed, whatever it gains over float32.",
    ),
    ("95 % interval", "where the true value lies, given that only so many samples were measured"),
    ("Could be chance", "the interval of the change contains zero: the samples cannot tell the two networks apart"),
    (
        "Parity",
        "how far the exported file's outputs are from the network's own: checked before anything was measured",
    ),
    (
        "Latency",
        "how long one run takes when nothing else runs; measured in turns with the baseline, so the ratio is fair",
    ),
)
