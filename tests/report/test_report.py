"""The pages: self-contained, escaped, complete, and the same story as the JSON."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from penjing.errors import InputError
from penjing.evaluation import words
from penjing.report import render_html, render_markdown

EVIL = '<script>alert("x")</script> | `a` *b* <img src=x onerror=y>'
VOID = {"meta", "br", "img", "link", "input", "hr", "col", "wbr"}


def measured(precision: str, accuracy: float, p50: float, wire: int, macs: int) -> dict[str, Any]:
    return {
        "runtime": "openvino",
        "device": "cpu",
        "threads": 2,
        "precision": precision,
        "metric": {
            "name": "accuracy",
            "value": accuracy,
            "n": 10000,
            "ci95": [accuracy - 0.005, accuracy + 0.005],
            "unit": "%",
            "higher_is_better": True,
            "method": "wilson",
        },
        "latency_ms": {"p50": p50, "p95": 1.3 * p50, "n": 1200},
        "latency_batch": 1,
        "throughput_per_s": 900 / p50,
        "throughput_batch": 64,
        "peak_memory_bytes": 90_000_000,
        "memory": {"counted": "Python, the runtime and the artefact"},
        "file_bytes": 2 * wire,
        "wire_bytes": wire,
        "parameters": 850_000,
        "macs": macs,
        "fidelity": {"relative_error": 0.1},
    }


def report(ratio: float = 0.5, verdict: str = "faster") -> dict[str, Any]:
    baseline = measured("f32", 0.9339, 4.0, 3_400_000, 125_000_000)
    best = measured("bf16", 0.9338, 3.0, 3_400_000, 125_000_000)
    result = measured("int8", 0.9299, 3.0 * ratio, 340_000, 60_000_000)
    speed = {"ratio": ratio, "ci95": [0.95 * ratio, 1.05 * ratio], "verdict": verdict, "reference": "bf16"}
    target = {
        "target": "openvino",
        "baseline": baseline,
        "best_uncompressed": best,
        "uncompressed": [baseline, best],
        "result": result,
        "change": {
            "metric": {"difference": -0.004, "ci95": [-0.0071, -0.0009], "p": 0.01, "n": 10000},
            "latency": speed,
            "throughput": speed,
            "wire": 0.1,
            "file": 0.1,
            "memory": 1.0,
            "parameters": 1.0,
            "macs": 0.48,
        },
        "artifacts": [],
        "executed": {"int8": 57, "f32": 3},
    }
    artifact = {
        "path": "network-openvino.onnx",
        "runtime": "openvino",
        "bytes": 700_000,
        "sha256": "ab" * 32,
        "parity": {"max_abs": 0.0123, "agreement": 0.998},
    }
    return {
        "schema": 1,
        "headline": words.headline(target),
        "warnings": words.warnings(target),
        "network": {"name": "resnet56", "inputs": [{"name": "x", "shape": ["N", 3, 32, 32], "dtype": "float32"}]},
        "baseline": baseline,
        "best_uncompressed": best,
        "result": result,
        "change": target["change"],
        "steps": [
            {
                "name": "PruneChannels",
                "settings": {"keep_macs": 0.48},
                "seconds": 12.34,
                "before": {"parameters": 850_000, "macs": 125_000_000, "metric": {"name": "accuracy", "value": 0.93}},
                "after": {"parameters": 500_000, "macs": 60_000_000, "metric": {"name": "accuracy", "value": 0.68}},
                "reasons": [
                    {"layer": "layer1.0.conv1", "score": 0.25, "choice": "keep 9 of 16", "why": "lowest norms"}
                ],
                "notes": [],
            }
        ],
        "verdict": {
            "met": False,
            "constraints": [
                {"text": "latency<=0.6x", "value": ratio, "limit": 0.6, "met": ratio <= 0.6},
                {"text": "accuracy>=-0.1%", "value": -0.004, "limit": -0.001, "met": False},
            ],
        },
        "artifacts": [artifact],
        "targets": [target],
        "data": {"samples": 10000, "sha256": "cd" * 32},
        "environment": {"python": "3.11", "packages": {"torch": "2.13"}, "cores": 2, "seed": 0},
    }


class Page(HTMLParser):
    """What a browser would see: balance of tags, every request it would make, ids, table headers without scope."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.requests: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.bare_headers = 0
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.requests += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.requests += [name for name in given if name.startswith("on")]
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "th" and "scope" not in given:
            self.bare_headers += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def seen(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    page.text = " ".join(page.text.split())
    return page


def test_the_page_needs_nothing_but_itself() -> None:
    html = render_html(report())
    page = seen(html)
    assert page.requests == []
    assert "script" not in page.tags and "link" not in page.tags
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert len(html.encode()) < 1_500_000


def test_the_page_is_accessible() -> None:
    html = render_html(report())
    page = seen(html)
    assert '<html lang="en">' in html
    assert page.tags.count("h1") == page.tags.count("main") == 1
    assert page.bare_headers == 0
    assert len(set(page.ids)) == len(page.ids)
    assert 'name="viewport"' in html and "prefers-color-scheme:dark" in html
    for reference in re.findall(r'aria-labelledby="([^"]+)"', html):
        assert reference in page.ids


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_every_page_tells_the_whole_story(render: Any) -> None:
    text = render(report()).replace("\\", "")
    text = seen(text).text if render is render_html else text
    assert "10.0× smaller on the wire, 2.0× faster than the best uncompressed setting (openvino, bf16)" in text
    assert "accuracy −0.40 points (95 %: −0.71 to −0.09)" in text
    for part in (
        *("93.39 %", "93.38 %", "92.99 %", "4.00 ms", "3.00 ms", "1.50 ms", "340 kB", "125 M", "60.0 M"),
        *("PruneChannels", "keep_macs=0.48", "12.3 s", "93.00 % → 68.00 %", "layer1.0.conv1", "keep 9 of 16"),
        *("at least −0.10 points", "at most 0.6×", "0.5×", "57 operations in int8", "ab" * 32, "99.8 %"),
        *("torch 2.13", "10,000 samples", "x N×3×32×32 float32", "2.1× fewer"),
    ):
        assert part in text, part


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_a_regression_is_said_in_words(render: Any) -> None:
    text = render(report(ratio=1.4, verdict="slower"))
    assert "1.40× slower than the best uncompressed setting" in text
    assert "Regression: on openvino the result is 1.40× slower" in text
    assert "Do not deploy it there for speed" in text


def test_a_busy_machine_is_named() -> None:
    values = report()
    assert words.warnings(values["targets"][0]) == []
    values["result"]["latency_ms"]["p95"] = 12 * values["result"]["latency_ms"]["p50"]
    (warning,) = words.warnings(values["targets"][0])
    assert "The machine was busy while timing on openvino (slow runs took 12× the typical time)" in warning


def test_names_of_others_stay_text() -> None:
    values = report()
    values["network"]["name"] = EVIL
    values["steps"][0]["reasons"][0]["why"] = EVIL
    values["steps"][0]["name"] = EVIL
    values["steps"][0]["settings"] = {"where": EVIL}
    values["artifacts"][0]["path"] = EVIL
    page = seen(render_html(values))
    assert "script" not in page.tags and "img" not in page.tags
    assert 'alert("x")' in page.text
    markdown = render_markdown(values)
    assert "<script" not in markdown and "<img" not in markdown
    rows = [line for line in markdown.splitlines() if "onerror" in line and line.startswith("|")]
    assert rows
    for row in rows:  # no cell more than its table has
        table = markdown.splitlines()
        head = next(i for i in range(table.index(row), -1, -1) if table[i].startswith("|--"))
        assert len(re.findall(r"(?<!\\)\|", row)) == table[head].count("|")


def test_markdown_tables_are_whole() -> None:
    table: list[int] = []
    for line in [*render_markdown(report()).splitlines(), ""]:
        if line.startswith("|"):
            table.append(len(re.findall(r"(?<!\\)\|", line)))
        elif table:
            assert len(table) >= 3 and len(set(table)) == 1, table
            table = []


def test_a_report_without_baseline_steps_or_constraints() -> None:
    values = report()
    target = values["targets"][0]
    target.update(baseline=None, best_uncompressed=None, uncompressed=[], change={})
    values.update(baseline=None, best_uncompressed=None, change={}, steps=[], artifacts=[], warnings=[])
    values["verdict"] = {"met": True, "constraints": []}
    values["headline"] = words.headline(target)
    for text in (render_html(values), render_markdown(values)):
        assert "340 kB on the wire" in text
        assert "Constraints" not in text and "Step by step" not in text
    seen(render_html(values))


def test_numbers_that_were_not_measured_leave_a_dash() -> None:
    values = report()
    for m in (values["result"], values["baseline"], values["best_uncompressed"]):
        m["metric"]["ci95"] = [None, None]
    values["result"]["peak_memory_bytes"] = None
    values["targets"][0]["change"]["memory"] = None
    page = seen(render_html(values))
    assert "–" in page.text and "None" not in page.text and "nan" not in page.text.lower().split()


def test_other_versions_are_refused() -> None:
    for wrong in ({"schema": 2}, {**copy.deepcopy(report()), "targets": []}):
        with pytest.raises(InputError, match=r"not a report\.json of version 1"):
            render_html(wrong)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.123456, "0.123"),
        (0.000512, "0.000512"),
        (4.2, "4.20"),
        (93.41, "93.4"),
        (1234.5, "1234"),
        (-2, "−2.00"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.25, "4.0× smaller"), (0.9, "1.11× smaller"), (1.5, "1.50× larger"), (1.01, "about the same")]
)
def test_ratios_in_words(ratio: float, text: str) -> None:
    assert words.times(ratio, "smaller", "larger") == text


def test_times_and_sizes_in_words() -> None:
    assert [words.milliseconds(v) for v in (0.0812, 0.25, 3.456, None)] == ["81.2 µs", "250 µs", "3.46 ms", "–"]
    assert [words.milliseconds(v, beside=(0.9, 1.2)) for v in (0.9, 1.2)] == ["0.900 ms", "1.20 ms"]
    assert [words.size(v) for v in (512, 22_700, 3_400_000)] == ["512 B", "22.7 kB", "3.40 MB"]
    assert [words.points(v) for v in (-0.004, 0.00001, 0.0123)] == ["−0.40", "±0.00", "+1.23"]
