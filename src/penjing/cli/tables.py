"""The two kinds of table of this command line. Imports nothing heavy: doctor draws them where torch is broken."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table


def table(title: str | None = None) -> Table:
    """An empty table in the one style of this command line."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def facts(pairs: Sequence[tuple[str, object]], title: str | None = None) -> Table:
    """Names and values, one a line."""
    made = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, escape(str(value)))
    return made
