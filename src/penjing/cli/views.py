"""Reports and sizes as tables that a newcomer understands. Works on the plain dictionaries of report.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]
EVERYWHERE = ("size on the wire", "parameters", "multiply-adds (MACs)")  # the same on every runtime


def amount(number: float | None, unit: str = "") -> str:
    """A count in engineering form, three digits: 1234567 -> "1.23 M"; None -> "-"."""
    if number is None:
        return "-"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}{unit}".strip()
    return f"{number:.3g} {unit}".strip()


def bytes_(number: float | None) -> str:
    """A size in decimal kB or MB."""
    return amount(number, "B")


def milliseconds(number: float | None) -> str:
    """A time in ms with three digits."""
    return "-" if number is None else f"{number:.3g} ms"


def metric(value: Row | None) -> str:
    """A metric with its 95 % interval: "97.2 % (96.1 to 98.3)" for fractions, plain numbers otherwise."""
    if not value or value.get("value") is None:
        return "-"
    low, high = value.get("ci95") or (None, None)
    if is_share(value):
        text = f"{100 * value['value']:.2f} %"
        return text + (f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None else "")
    return f"{value['value']:.4g}" + (f" ({low:.4g} to {high:.4g})" if low is not None else "")


def is_share(value: Row) -> bool:
    """Whether a metric is a share of samples, to be shown in per cent."""
    return str(value.get("unit", "")) in ("%", "fraction") or value.get("name") in ("accuracy", "agreement", "top1")


def report_table(report: Row, title: str | None = None) -> Table:
    """Baseline beside result, one row a quantity, with what the change means in words."""
    before, after = report.get("baseline"), report["result"]
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    table.add_column("")
    if before:
        table.add_column("before", justify="right")
    table.add_column("after" if before else "measured", justify="right")
    if before:
        table.add_column("change")
    for row in rows(before, after):
        table.add_row(*(row if before else (row[0], row[2])))
    return table


def rows(before: Row | None, after: Row) -> list[tuple[str, str, str, str]]:
    """(quantity, before, after, change in words) for all that was measured."""
    old = before or {}
    found = []
    name = (after.get("metric") or {}).get("name")
    if name:
        found.append(
            (name, metric(old.get("metric")), metric(after["metric"]), _points(old.get("metric"), after["metric"]))
        )
    for label, key in (("latency, typical (p50)", "p50"), ("latency, slow (p95)", "p95")):
        a, b = (old.get("latency_ms") or {}).get(key), (after.get("latency_ms") or {}).get(key)
        found.append((label, milliseconds(a), milliseconds(b), _ratio(a, b, "faster", "slower")))
    a, b = old.get("throughput_per_s"), after.get("throughput_per_s")
    found.append(("throughput", amount(a, "/s"), amount(b, "/s"), _ratio(b, a, "more", "less")))
    for label, key in (
        ("size on disk", "file_bytes"),
        ("size on the wire", "wire_bytes"),
        ("peak memory", "peak_memory_bytes"),
    ):
        found.append(
            (
                label,
                bytes_(old.get(key)),
                bytes_(after.get(key)),
                _ratio(old.get(key), after.get(key), "smaller", "larger"),
            )
        )
    for label, key in (("parameters", "parameters"), ("multiply-adds (MACs)", "macs")):
        found.append(
            (label, amount(old.get(key)), amount(after.get(key)), _ratio(old.get(key), after.get(key), "fewer", "more"))
        )
    return [r for r in found if r[2] != "-" or r[1] != "-"]


def _points(old: Row | None, new: Row) -> str:
    """The change of a metric, in points for shares."""
    if not old or old.get("value") is None or new.get("value") is None:
        return ""
    change = new["value"] - old["value"]
    return f"{100 * change:+.2f} points" if is_share(new) else f"{change:+.3g}"


def _ratio(old: float | None, new: float | None, better: str, worse: str) -> str:
    """ "2.4× faster" in green, "1.3× slower" in red, "same" within 3 %."""
    if not old or not new:
        return ""
    ratio = old / new
    if 0.97 <= ratio <= 1.03:
        return "[dim]same[/]"
    return f"[green]{ratio:.2f}× {better}[/]" if ratio > 1 else f"[red]{1 / ratio:.2f}× {worse}[/]"


def report_heading(report: Row) -> str:
    """ "openvino (int8, 2 threads), before: openvino (f32)": which setting is compared with which."""
    after, before = report["result"], report.get("baseline")
    text = _setting(after)
    if before:
        text += f"   before: {_setting(before)}"
    return escape(text)


def _setting(m: Row) -> str:
    parts = [str(p) for p in (m.get("precision"), f"{m['threads']} threads" if m.get("threads") else None) if p]
    return f"{m.get('runtime')} ({', '.join(parts)})" if parts else str(m.get("runtime"))


def honest_words(report: Row) -> list[str]:
    """Sentences on what did not get better: nothing is left for the reader to find out."""
    before, after = report.get("baseline"), report["result"]
    if not before:
        return []
    words = []
    old, new = (before.get("latency_ms") or {}).get("p50"), (after.get("latency_ms") or {}).get("p50")
    runtime = after.get("runtime")
    if old and new and new > 1.03 * old:
        words.append(
            f"On {runtime} it is {new / old:.2f}× slower than the original ({before.get('precision')}): "
            "do not deploy it there for speed."
        )
    elif old and new and new > 0.97 * old:
        words.append(
            f"On {runtime} it is not faster than the original ({before.get('precision')}): there it only saves space."
        )
    for key, what in (("file_bytes", "file"), ("wire_bytes", "package"), ("peak_memory_bytes", "peak memory")):
        if before.get(key) and after.get(key) and after[key] > 1.03 * before[key]:
            words.append(f"On {runtime} its {what} is {after[key] / before[key]:.2f}× larger than the original's.")
    return words


def steps_table(steps: Sequence[Row]) -> Table:
    """What every step of the recipe did: parameters, MACs, metric and seconds."""
    table = Table(title="Steps", title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    for column in ("step", "settings", "parameters", "MACs", "metric", "seconds"):
        table.add_column(column, justify="left" if column in ("step", "settings") else "right")
    for step in steps:
        before, after = step.get("before") or {}, step.get("after") or {}
        table.add_row(
            str(step.get("name")),
            escape(", ".join(f"{k}={v}" for k, v in (step.get("settings") or {}).items())),
            _arrow(amount(before.get("parameters")), amount(after.get("parameters"))),
            _arrow(amount(before.get("macs")), amount(after.get("macs"))),
            _arrow(_short(before.get("metric")), _short(after.get("metric"))),
            f"{step.get('seconds', 0):.1f}",
        )
    return table


def _short(value: Any) -> str:
    if isinstance(value, dict):
        number = value.get("value")
        return "-" if number is None else f"{100 * number:.2f} %" if is_share(value) else f"{number:.4g}"
    return "-" if value is None else f"{value:.4g}"


def _arrow(old: str, new: str) -> str:
    return new if old == new else f"{old} → {new}"


def facts(pairs: Sequence[tuple[str, object]], title: str | None = None) -> Table:
    """Names and values, one a line."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, escape(str(value)))
    return table
