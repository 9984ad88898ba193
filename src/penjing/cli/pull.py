"""penjing pull: a package fetched from web servers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from penjing.cli import options, passphrases
from penjing.cli.outputs import output_package
from penjing.cli.screen import Screen
from penjing.errors import InputError

if TYPE_CHECKING:
    from penjing.package.manifest import Manifest


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
    identity: Annotated[
        str | None,
        typer.Option(
            "--identity", metavar="KEY", help="With --layers, of a sealed package: the key that tells its layers."
        ),
    ] = None,
    passphrase_file: passphrases.File = None,
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
    told = None if identity is None else _layers_told_by(identity, layers, passphrase_file)
    done = transfer.pull(
        urls,
        path,
        until_bytes=until_bytes,
        layers=layers,
        layers_of=told,
        jobs=jobs,
        layout=layout,
        progress=screen,
    )
    came = f"{done.fetched_bytes:,} came now"
    if done.complete:
        screen.line(f"{done.path}: {done.bytes:,} bytes, {came}")
    else:
        screen.line(f"{done.path}: {done.here_bytes:,} of {done.bytes:,} bytes, {came}")
        early = "--until-bytes" if layers is None else "--layers"
        screen.note(f"{len(done.missing)} parts are to come: the same command without {early} goes on")
        if identity is not None:
            screen.note(f"it opens: penjing decrypt {done.path} FOLDER --identity {identity} --layers {layers}")
        elif layers is not None:
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


def _layers_told_by(identity: str, layers: int | None, passphrase_file: str | None) -> Callable[[Manifest], list[int]]:
    from penjing.package import keys, sealing

    if layers is None:
        raise InputError("--identity goes with --layers", hint="without, a sealed package is pulled like any other")
    secret = passphrases.passphrase_of(identity, passphrase_file)
    own = keys.identities(Path(identity).expanduser(), secret)
    return lambda front: sealing.layers_of(front, own)


def _called(url: str, layout: str) -> str:
    """What the package is called in a URL."""
    from penjing.package.directory import MANIFEST
    from penjing.package.sources import address
    from penjing.package.volumes import SUFFIX

    path = PurePosixPath(address(url).path)
    name = (path.parent if path.name == MANIFEST else path).name.removesuffix(".penjing")
    name = re.sub(rf"-\d+of\d+({re.escape(SUFFIX)})?$", "", name)  # of a volume: what was split
    if not name or name.startswith("."):
        raise InputError("the URL does not say what to call the package", hint="name it with --out")
    return name if layout == "directory" else f"{name}.penjing"
