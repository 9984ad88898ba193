"""Curves on the pages: every group is there, marks stand where the recipe cut, and the scales say what they show."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_report import EVIL, report, seen

from penjing.errors import InputError
from penjing.evaluation import Point, Sensitivity
from penjing.report import render_html, render_markdown, render_sensitivity
from penjing.report.charts import nice_ticks
from penjing.report.sensitivity import sensitivity_view

ACCURACY = {"name": "accuracy", "value": 0.9, "unit": "%", "higher_is_better": True}
NATS = {"name": "nats per token", "value": 1.5, "unit": "", "higher_is_better": False}


def curves(groups: dict[str, list[float | None]], size: int = 16, **fields: Any) -> Sensitivity:
    """Curves of `size` units at 25, 50 and 75 %, whose metric (or output error) is given."""
    metric = fields.setdefault("metric", ACCURACY)
    rows = [
        Point(
            group=group, size=size, ratio=ratio, removed=round(ratio * size),
            metric=value if metric else None, output_error=0.5 if metric else value or 0.0,
        )
        for group, values in groups.items()
        for ratio, value in zip((0.25, 0.5, 0.75), values, strict=True)
    ]  # fmt: skip
    settings = {
        "network": "net", "digest": "0" * 64, "kind": "channels", "criterion": "l2", "reconstruct": False,
        "samples": 256, "seed": 0, "inexact": {},
    }  # fmt: skip
    return Sensitivity(**{**settings, **fields, "rows": tuple(rows)})


def with_curves(found: Sensitivity, kept: dict[str, int] | None = None) -> dict[str, Any]:
    return {**report(), "sensitivity": {"curves": found.to_dict(), "kept": kept or {}}}


def view(found: Sensitivity, kept: dict[str, int] | None = None) -> dict[str, Any]:
    seen = sensitivity_view({"curves": found.to_dict(), "kept": kept or {}})
    assert seen is not None
    return seen


THREE = curves({"calm": [0.9, 0.9, 0.89], "stem": [0.8, 0.5, 0.1], "mid": [0.9, 0.85, 0.6]})
SIXTY = curves({f"layer{i}": [0.9, 0.9 - i / 100, 0.2] for i in range(60)})


@pytest.mark.parametrize("found", [THREE, SIXTY])
def test_every_group_is_on_every_page(found: Sensitivity) -> None:
    kept = dict.fromkeys(found.groups, 10)
    html, markdown = render_html(with_curves(found, kept)), render_markdown(with_curves(found, kept))
    page = seen(html)
    assert page.requests == [] and page.bare_headers == 0 and len(set(page.ids)) == len(page.ids)
    for group in found.groups:
        assert html.count(f'<th scope="row"><code>{group}</code>') == 1
        assert len(re.findall(rf"^\| {group} \| 16 \| 10 \| (?:▼ )?38 % \|", markdown, re.MULTILINE)) == 1
    drawn, listed = (3, 3) if found is THREE else (8, 15)
    assert page.tags.count("polyline") == page.tags.count("polygon") == drawn
    got = view(found, kept)
    assert [row["name"] for row in got["listed"] + got["folded"]] == list(found.most_sensitive())
    assert len(got["listed"]) == listed


def test_markdown_tables_stay_whole() -> None:
    for kept in ({}, {"stem": 8}):
        lines = render_markdown(with_curves(THREE, kept)).splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("| group |"))
        table = lines[start : start + 5]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {9 if kept else 7}
        assert table[2].startswith("| stem |") and not lines[start + 5].startswith("|")


def test_a_mark_stands_at_the_share_that_was_cut() -> None:
    got = view(THREE, {"stem": 10, "mid": 16, "calm": 2})
    stem, mid, calm = (next(c for c in got["drawn"] if c["name"] == name) for name in ("stem", "mid", "calm"))
    assert stem["mark"]["x"] == 37.5  # 6 of 16 gone, between the points at 4 and at 8
    between = [dot["y"] for dot in stem["dots"][:2]]
    assert stem["mark"]["y"] == pytest.approx(sum(between) / 2, abs=0.01)
    assert mid["mark"] == {"x": 0.0, "y": got["base"]["at"]}
    assert calm["mark"] == {"x": 87.5, "y": None}  # beyond the last point nothing is known
    assert f'class="here" style="left:37.5%;top:{stem["mark"]["y"]}%"' in render_html(
        with_curves(THREE, {"stem": 10, "mid": 16, "calm": 2})
    )


def test_the_cell_nearest_to_the_cut_is_framed() -> None:
    rows = {r["name"]: r for r in view(THREE, {"stem": 9, "mid": 15, "calm": 1})["rows"]}
    framed = {name: [cell["cut"] for cell in row["cells"]] for name, row in rows.items()}
    assert framed == {"stem": [False, True, False], "mid": [False] * 3, "calm": [False, False, True]}
    between = view(THREE, {"stem": 10})["rows"][0]["cells"]
    assert [cell["cut"] for cell in between] == [False, True, False], "of two as near the deeper one"
    assert rows["stem"]["lost"] == "44 %" and rows["stem"]["spare"] == "0 %" and rows["calm"]["spare"] == "75 %"


def test_deeper_than_a_group_can_bear_is_said() -> None:
    kept = {"stem": 10, "mid": 11, "calm": 8}  # mid lost 5 of 16: 1.25 points on its own
    got = view(THREE, kept)
    assert {row["name"] for row in got["rows"] if row["deep"]} == {"stem"}
    assert got["lead"][-1] == "The recipe cut deeper than a group can bear alone in 1 of 3: stem."
    assert view(THREE, {**kept, "mid": 10})["lead"][-1].endswith("in 2 of 3: stem, mid.")
    beyond = {row["name"]: row["deep"] for row in view(THREE, {"stem": 1, "calm": 1})["rows"]}
    assert beyond["stem"] and not beyond["calm"], "the last point known decides"
    assert "Nowhere" in view(THREE, {"calm": 8})["lead"][-1]
    assert "▼ 38 %" in render_markdown(with_curves(THREE, kept))


def test_the_sentences_are_the_numbers() -> None:
    space = "\N{NO-BREAK SPACE}"
    assert view(THREE)["lead"] == [
        f"stem is the most sensitive: without 25{space}% of its channels and nothing else changed, "
        f"accuracy falls from 90.00{space}% to 80.00{space}%.",
        "1 of 3 groups may lose half or more, each on its own, at next to no cost (at most 2 points).",
    ]
    assert "No group on its own costs more" in view(curves({"a": [0.9, 0.9, 0.89]}))["lead"][0]
    assert "rises from 1.500 to 1.600" in view(curves({"a": [1.6, 2.0, 3.0]}, metric=NATS))["lead"][0]
    assert "the output error is 0.200" in view(curves({"a": [0.2, 0.4, 0.6]}, metric=None))["lead"][0]


def test_worse_is_hotter_and_farther_from_the_whole_network() -> None:
    for found, worse_is_lower in (
        (THREE, True),
        (curves({"a": [0.7, 0.5, 0.1]}, metric={**ACCURACY, "value": 0.82}), True),
        (curves({"a": [1.6, 2.0, 3.0]}, metric=NATS), False),
        (curves({"a": [0.2, 0.4, 0.6]}, metric=None), False),
    ):
        got = view(found)
        chart, row = got["drawn"][0], got["rows"][0]
        heats = [cell["heat"] for cell in row["cells"]]
        assert heats == sorted(heats) and heats[-1] == 100
        heights = [dot["y"] for dot in chart["dots"]]  # per cent from the top
        assert heights == sorted(heights, reverse=not worse_is_lower)
        assert (heights[-1] > got["base"]["at"]) == worse_is_lower
        assert all(0 <= y <= 100 for y in heights)
        labels = [tick["at"] for tick in got["ticks"]] + [got["base"]["at"]]
        assert all(abs(a - b) > 8 for i, a in enumerate(labels) for b in labels[:i]), "labels touch"


def test_one_disaster_does_not_flatten_the_others() -> None:
    groups = {f"g{i}": [1.6, 2.0, 3.0] for i in range(9)} | {"bad": [2.0, 500.0, 1e9], "nan": [1.6, 2.0, None]}
    got = view(curves(groups, metric=NATS))
    assert got["scale"]["high"] == "+4.5 and more"
    rows = {row["name"]: row for row in got["rows"]}
    assert [cell["text"] for cell in rows["nan"]["cells"]] == ["1.600", "2.000", "–"]
    assert rows["g0"]["cells"][2]["heat"] > 50 and rows["nan"]["cells"][2]["heat"] == 100
    assert "nan" not in seen(render_html(with_curves(curves({"a": [1.6, None, 2.0]}, metric=NATS)))).text.split()


def test_noise_is_no_disaster() -> None:
    got = view(curves({"a": [0.9, 0.895, 0.9], "b": [0.905, 0.9, 0.9]}))
    assert max(cell["heat"] for row in got["rows"] for cell in row["cells"]) < 35
    assert got["rows"][1]["cells"][0] == {"text": "90.5", "heat": 0.0, "cut": False}


def test_names_stay_text() -> None:
    found = curves({EVIL: [0.8, 0.5, 0.1]}, inexact={EVIL: EVIL})
    page = seen(render_html(with_curves(found, {EVIL: 8})))
    assert "script" not in page.tags and "img" not in page.tags and page.requests == []
    assert "<script" not in render_markdown(with_curves(found))
    assert "<img" not in render_sensitivity(found)


def test_layers_break_at_their_dots() -> None:
    assert "<code>block_<wbr>1.<wbr>conv</code>" in render_sensitivity(curves({"block_1.conv": [0.8, 0.5, 0.1]}))


def test_a_page_of_its_own() -> None:
    html = render_sensitivity(THREE)
    page = seen(html)
    assert page.requests == [] and page.tags.count("h1") == page.tags.count("main") == 1 and page.bare_headers == 0
    assert "stem is the most sensitive" in page.text and "kept" not in page.text and "drawn for this" not in page.text
    assert page.tags.count("polyline") == 3


def test_reports_without_curves_are_as_before() -> None:
    for values in (report(), {**report(), "sensitivity": None}):
        assert "Sensitivity" not in render_html(values) + render_markdown(values)


@pytest.mark.parametrize("wrong", [{"curves": {}}, {"kept": {"a": 1}}, {"curves": {**THREE.to_dict(), "schema": 9}}])
def test_other_curves_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        render_html({**report(), "sensitivity": wrong})
    with pytest.raises(InputError, match="not one curve"):
        render_sensitivity(curves({}))


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (23, 97, ["40", "60", "80"]),
        (1.3, 7.1, ["2", "4", "6"]),
        (-0.01, 0.27, ["0", "0.1", "0.2"]),
        (-3, 1, ["−3", "−2", "−1", "0", "1"]),
    ],
)
def test_ticks_are_round(low: float, high: float, texts: list[str]) -> None:
    assert [text for _, text in nice_ticks(low, high)] == texts
