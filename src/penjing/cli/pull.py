"""penjing pull: a package fetched from web servers."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

import typer

from penjing.cli import options
from penjing.cli.outputs import output_package
from penjing.cli.screen import Screen
from penjing.errors import InputError


def pull(
    context: typer.Context,
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="URL",
            help="A package, its folder, or a volume, on a web server. Several: mirrors, or hosts with a share each.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="The package to write; by default it is called as in the URL."
        ),
    ] = None,
    until_bytes: Annotated[
        int | None,
        typer.Option(
            "--until-bytes", min=0, metavar="N", help="End with the parts in the first N bytes; the next pull goes on."
        ),
    ] = None,
    layers: options.Layers = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=64, metavar="N", help="Requests at a time.")] = 4,
    layout: options.Layout = "file",
    json: options.Json = False,
) -> int:
    """Fetches a package; every part is checked, and what has come is kept for another try.

    [bold]penjing pull https://example.org/net.penjing[/]   [bold]penjing pull URL1 URL2 --out net.penjing[/]
    """
    from penjing.package import transfer

    screen: Screen = context.obj
    text = out or _called(urls[0], layout)
    path = output_package(text, layout)
    screen.kept = f"what has come is kept in {path}.pull, the same command goes on there"
    done = transfer.pull(urls, path, until_bytes=until_bytes, layers=layers, jobs=jobs, layout=layout, progress=screen)
    came = f"{done.fetched_bytes:,} came now"
    if done.complete:
        screen.line(f"{done.path}: {done.bytes:,} bytes, {came}")
    else:
        screen.line(f"{done.path}: {done.here_bytes:,} of {done.bytes:,} bytes, {came}")
        early = "--until-bytes" if layers is None else "--layers"
        screen.note(f"{len(done.missing)} parts are to come: the same command without {early} goes on")
        if layers is not None:
            screen.note(f"the network runs already: penjing unpack {done.path} NET.safetensors --layers {layers}")
    screen.emit(
        {
            "schema": 1,
            "path": str(done.path),
            "complete": done.complete,
            "bytes": done.bytes,
            "here_bytes": done.here_bytes,
            "fetched_bytes": done.fetched_bytes,
            "missing": list(done.missing),
        }
    )
    return 0


def _called(url: str, layout: str) -> str:
    """What the package is called in a URL."""
    from penjing.package.directory import MANIFEST
    from penjing.package.sources import address

    path = PurePosixPath(address(url).path)
    name = (path.parent if path.name == MANIFEST else path).name.removesuffix(".penjing")
    if not name or name.startswith("."):
        raise InputError("the URL does not say what to call the package", hint="name it with --out")
    return name if layout == "directory" else f"{name}.penjing"
