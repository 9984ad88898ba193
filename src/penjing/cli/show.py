"""What several verbs print: of a report, of the layers of a package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penjing.cli.screen import Screen


def show_report(screen: Screen, report: Mapping[str, Any], title: str | None = None) -> None:
    """One table a target, then the headline, then what did not get better."""
    from penjing.cli import views

    for target in report["targets"]:
        name = f"On {views.pretty(target['result']['runtime'])}"
        screen.say()
        screen.say(views.target_table(target, f"{title}, {name[:1].lower()}{name[1:]}" if title else name))
    screen.say()
    if report.get("headline"):
        screen.line(str(report["headline"]))
    for sentence in views.warnings(report):
        screen.warn(sentence)


def show_ladder(screen: Screen, path: Path) -> list[dict[str, Any]]:
    """A line for each layer of a package; the same as plain values."""
    from penjing import package

    rungs = package.inspect(path).ladder
    for rung in rungs:
        screen.line(str(rung))
    return [rung.to_dict() for rung in rungs]
