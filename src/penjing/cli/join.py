"""penjing join: a package put together from its volumes."""

from __future__ import annotations

from typing import Annotated

import typer

from penjing.cli import options
from penjing.cli.outputs import output_package
from penjing.cli.screen import Screen


def join(
    context: typer.Context,
    volumes: Annotated[
        list[str],
        typer.Argument(metavar="VOLUME", help="Volumes of penjing split, folders, packages; in any order."),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="The package to write, ending in .penjing.")],
    layout: options.Layout = "file",
    json: options.Json = False,
) -> int:
    """Puts a package together from its volumes, and checks every part; what is missing is named.

    [bold]penjing join volumes/* --out net.penjing[/]
    """
    from penjing import package

    screen: Screen = context.obj
    path = output_package(out, layout)
    package.join(volumes, path, layout=layout, progress=screen)
    size = sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size
    screen.line(f"{path}: {size:,} bytes")
    screen.emit({"schema": 1, "path": str(path), "bytes": size})
    return 0
