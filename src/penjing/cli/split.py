"""penjing split: a package divided among files or hosts."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from penjing.cli import options
from penjing.cli.outputs import output_folder
from penjing.cli.screen import Screen
from penjing.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def split(
    context: typer.Context,
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A .penjing file, or its folder.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="The folder for the volumes, new or empty.")],
    into: Annotated[int | None, typer.Option("--into", min=1, metavar="N", help="The number of volumes.")] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="BYTES", help="What a volume may have at most: 500000, 10MB, 4MiB.")
    ] = None,
    layout: options.Layout = "file",
    json: options.Json = False,
) -> int:
    """Divides PACKAGE into volumes; without --into and --size, into a folder to put on a web server.

    [bold]penjing split net.penjing --into 3 --out volumes[/]   [bold]penjing split net.penjing --out net[/]
    """
    from penjing import package as packages
    from penjing.package import directory

    screen: Screen = context.obj
    limit = None if size is None else _bytes(size)
    whole = into is None and limit is None
    folder = output_folder(out, ours=directory.is_ours if whole else lambda found: False)
    written = packages.split(package, folder, into=into, size=limit, layout=layout, progress=screen)
    for path in written:
        screen.line(str(path))
    screen.emit({"schema": 1, "volumes": [str(path) for path in written]})
    return 0


def _bytes(text: str) -> int:
    """A size such as 500000, 10MB or 4MiB, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise InputError(f"--size {text!r} is no size", hint="write 500000, 10MB or 4MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])
