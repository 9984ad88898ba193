"""penjing patch: the next version of a network, of the one before and what changed."""

from __future__ import annotations

from typing import Annotated

import typer

from penjing.cli import options
from penjing.cli.outputs import output_package
from penjing.cli.screen import Screen


def patch(
    context: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The package that the delta was made from, or its folder.")],
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="What penjing diff wrote.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The package to write, ending in .penjing.")],
    layout: options.Layout = "file",
    json: options.Json = False,
) -> int:
    """Makes the new version of OLD and DELTA, bit for bit; another OLD than the delta's is refused.

    [bold]penjing patch old.penjing delta.penjing new.penjing[/]
    """
    from penjing.evaluation import words
    from penjing.package import delta as deltas

    screen: Screen = context.obj
    path = output_package(new, layout)
    with screen.task("patch"):
        size = deltas.patch(old, delta, path, layout=layout, progress=screen)
    screen.line(f"{path}: {words.size(size)}")
    screen.emit({"schema": 1, "path": str(path), "bytes": size})
    return 0
