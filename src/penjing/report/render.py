"""Templates filled with the view of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from penjing.errors import InputError
from penjing.evaluation import Report, Sensitivity
from penjing.report.sensitivity import sensitivity_view
from penjing.report.view import view

_LOADER = jinja2.PackageLoader("penjing.report", "templates")
_HTML = jinja2.Environment(
    loader=_LOADER, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
)
_TEXT = jinja2.Environment(
    loader=_LOADER, autoescape=False, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
)


def render_html(report: Report | Mapping[str, Any]) -> str:
    """One self-contained page (style and charts inside, no script, no request) for a Report or a report.json's content.

    Raises:
        InputError: not a report of a version that this penjing reads.
    """
    return _HTML.get_template("report.html.j2").render(_seen(report))


def render_markdown(report: Report | Mapping[str, Any]) -> str:
    """The same as Markdown with GitHub's tables.

    Raises:
        InputError: not a report of a version that this penjing reads.
    """
    return _TEXT.get_template("report.md.j2").render(_seen(report)).strip() + "\n"


def render_sensitivity(curves: Sensitivity) -> str:
    """One self-contained page of curves alone, drawn as they are in a report.

    Raises:
        InputError: there is not one curve.
    """
    seen = sensitivity_view({"curves": curves.to_dict()}, beside=False)
    return _HTML.get_template("sensitivity.html.j2").render(sensitivity=seen)


def _cell(value: object) -> str:
    """Text that neither ends a table's cell nor starts HTML or a link."""
    text = " ".join(str(value).split())
    for character in "\\|<>[]`*_":
        text = text.replace(character, {"<": "&lt;", ">": "&gt;"}.get(character, "\\" + character))
    return text


def _breakable(name: str) -> Markup:
    """The path of a layer, which may be broken behind its dots and underscores."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])(?=.)", name))


_TEXT.filters["cell"] = _cell
_HTML.filters["breakable"] = _breakable


def _seen(report: Report | Mapping[str, Any]) -> dict[str, Any]:
    values = report.to_dict() if isinstance(report, Report) else report
    if values.get("schema") != 1 or not values.get("targets"):
        raise InputError("this is not a report.json of version 1", hint="penjing evaluate writes one")
    return view(values)
