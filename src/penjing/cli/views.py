"""Reports and networks as tables that a newcomer understands. Works on the plain values of report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from penjing.cli.tables import table
from penjing.evaluation import words

if TYPE_CHECKING:
    from penjing.evaluation import Sensitivity

Values = Mapping[str, Any]
Line = tuple[str, ...]

#: Quantities that are the same on every runtime.
EVERYWHERE = ("size on the wire", "parameters", "multiply-adds (MACs)")
_ROWS = 40
_PRETTY = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}


def pretty(runtime: str) -> str:
    """The name of a runtime as its makers write it."""
    return _PRETTY.get(runtime, runtime)


def target_table(target: Values, title: str | None = None) -> Table:
    """One entry of report.json's `targets`: before and after, one row a quantity, the change in words.

    Speed is compared with the fastest uncompressed setting of the same runtime; where that is not the float32 one, it
    has a column of its own.
    """
    made = table(title)
    made.add_column("")
    for column in columns(target):
        made.add_column(column, justify="left" if column == "change" else "right")
    for line in lines(target):
        made.add_row(*line)
    return made


def columns(target: Values) -> list[str]:
    """The headings beside the quantity's name."""
    baseline, best, result = target.get("baseline"), _other_best(target), target["result"]
    if not baseline:
        return [_with_precision("measured", result)]
    middle = [_with_precision("before, fastest", best)] if best else []
    return [_with_precision("before", baseline), *middle, _with_precision("after", result), "change"]


def lines(target: Values) -> list[Line]:
    """(quantity, before, [before at its fastest], after, change) for everything that was measured."""
    baseline, best, result = target.get("baseline") or {}, _other_best(target), target["result"]
    change = target.get("change") or {}
    found: list[Line] = []

    def add(label: str, show: Any, words_of_change: str) -> None:
        shown = [show(m) for m in (baseline, *([best] if best else []), result)] if baseline else [show(result)]
        if any(s not in ("–", "") for s in shown):
            found.append((label, *shown, *([words_of_change] if baseline else [])))

    if metric := result.get("metric"):
        add(words.name_of(metric), _metric, escape(words.metric_change(change.get("metric"), metric)))
    against = (best or baseline).get("latency_ms") or {}
    for label, key in (("latency of one, typical (p50)", "p50"), ("latency of one, slow (p95)", "p95")):
        add(
            label,
            _latency(key),
            _ratio(against.get(key), (result.get("latency_ms") or {}).get(key), "faster", "slower"),
        )
    batch = result.get("throughput_batch")
    rate = _ratio(result.get("throughput_per_s"), (best or baseline).get("throughput_per_s"), "more", "less")
    add(f"throughput, {batch} at once" if batch else "throughput", _throughput, rate)
    for label, key, better, worse in (
        ("size on disk", "file_bytes", "smaller", "larger"),
        ("size on the wire", "wire_bytes", "smaller", "larger"),
        ("peak memory", "peak_memory_bytes", "smaller", "larger"),
        ("parameters", "parameters", "fewer", "more"),
        ("multiply-adds (MACs)", "macs", "fewer", "more"),
    ):
        add(label, _amount(key), _ratio(baseline.get(key), result.get(key), better, worse))
    return found


def warnings(report: Values) -> list[str]:
    """What did not get better, and what the numbers cannot say: one sentence each, none twice."""
    return list(dict.fromkeys(report.get("warnings") or ()))


def steps_table(steps: Sequence[Values]) -> Table:
    """What every Step did to size, MACs and metric, and how long it took."""
    made = table("What every step did")
    for column in ("step", "settings", "parameters", "MACs", "metric", "seconds"):
        made.add_column(column, justify="left" if column in ("step", "settings") else "right", overflow="fold")
    for step in steps:
        before, after = step.get("before") or {}, step.get("after") or {}
        made.add_row(
            str(step.get("name")),
            escape(", ".join(f"{k}={v}" for k, v in (step.get("settings") or {}).items())),
            _arrow(words.amount(before.get("parameters")), words.amount(after.get("parameters"))),
            _arrow(words.amount(before.get("macs")), words.amount(after.get("macs"))),
            _arrow(words.metric_value(before.get("metric")), words.metric_value(after.get("metric"))),
            f"{step.get('seconds') or 0:.1f}",
        )
    return made


def sensitivity_table(
    curves: Sensitivity, kept: Mapping[str, int] | None = None, *, width: int = 120, rows: int = _ROWS
) -> Table:
    """Groups, the most sensitive first, with the metric at each ratio (at every other one where `width` is too small).

    Green is what costs next to nothing. `kept`: how many units of a group are left, if something was compressed.
    """
    order = curves.most_sensitive()[:rows]
    cells = {group: [curves.brief(point) for point in curves.curve(group)] for group in order}
    wide = 2 + max(5, *(len(text) for texts in cells.values() for text in texts))
    left = width - min(40, max(map(len, order))) - (32 if kept else 24)
    stride = next(s for s in range(1, len(curves.ratios) + 1) if len(curves.ratios) // s * wide <= max(left, wide))
    made = table(f"{curves.measure[:1].upper()}{curves.measure[1:]} as each part alone loses so much")
    unit = "channels" if curves.kind == "channels" else "weights"
    made.add_column("group" if curves.kind == "channels" else "weight", overflow="fold")
    for column in (unit, *(("kept",) if kept else ()), "may lose"):
        made.add_column(column, justify="right", no_wrap=True)
    for ratio in curves.ratios[stride - 1 :: stride]:
        made.add_column(f"{ratio:.0%}", justify="right", no_wrap=True)
    for group in order:
        points = curves.curve(group)
        shown = [
            f"[green]{text}[/]" if curves.loss(point) <= curves.small else text
            for point, text in zip(points, cells[group], strict=True)
        ]
        left_over = (f"{kept[group]:,}" if group in kept else "",) if kept else ()
        spare = f"{curves.spare(group):.0%}"
        made.add_row(escape(group), f"{points[0].size:,}", *left_over, spare, *shown[stride - 1 :: stride])
    more = len(curves.groups) - len(order)
    made.caption = f"{curves.what}; units go by {curves.criterion}; {curves.samples:,} samples" + (
        f"; the {rows} most sensitive of {len(curves.groups)}" if more else ""
    )
    made.caption_justify = "left"
    return made


def _other_best(target: Values) -> Values | None:
    """The fastest uncompressed setting, if it is not the baseline itself."""
    best, baseline = target.get("best_uncompressed"), target.get("baseline")
    return best if best and baseline and best.get("precision") != baseline.get("precision") else None


def _with_precision(word: str, measurement: Values) -> str:
    precision = measurement.get("precision")
    return f"{word} ({precision})" if precision else word


def _metric(m: Values) -> str:
    return words.metric_value(m.get("metric"))


def _latency(key: str) -> Any:
    return lambda m: words.milliseconds((m.get("latency_ms") or {}).get(key))


def _throughput(m: Values) -> str:
    return words.amount(m.get("throughput_per_s"), "/s")


def _amount(key: str) -> Any:
    return lambda m: words.amount(m.get(key), "B" if key.endswith("bytes") else "")


def _ratio(old: float | None, new: float | None, better: str, worse: str) -> str:
    """ "2.4× faster" in green, "1.3× slower" in red, "the same" within 3 %."""
    if not old or not new:
        return ""
    ratio = new / old
    if 0.97 <= ratio <= 1.03:
        return "[dim]the same[/]"
    return f"[{'green' if ratio < 1 else 'red'}]{words.times(ratio, better, worse)}[/]"


def _arrow(old: str, new: str) -> str:
    return new if old in (new, "–") else f"{old} → {new}"
