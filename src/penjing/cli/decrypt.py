"""penjing decrypt: the package inside a sealed one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli import options, passphrases
from penjing.cli.outputs import output_package
from penjing.cli.screen import Screen


def decrypt(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The sealed package, or its folder.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The package to write, ending in .penjing; or a folder.")],
    identity: Annotated[
        str,
        typer.Option(
            "--identity", metavar="KEY", help="The private key: of penjing keygen --kind age, age-keygen, or SSH."
        ),
    ],
    passphrase_file: passphrases.File = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            min=1,
            metavar="N",
            help="Only the first N quality layers, as far as a pull has come: OUT is a folder then, for unpack.",
        ),
    ] = None,
    layout: options.Layout = "file",
    json: options.Json = False,
) -> int:
    """Opens a sealed package: OUT is, bit for bit, what was sealed.

    [bold]penjing decrypt sealed.penjing net.penjing --identity reader[/]
    [bold]penjing decrypt sealed.penjing.pull first --identity reader --layers 1[/]
    """
    from penjing.package import sealing

    screen: Screen = context.obj
    path = output_package(out, layout if layers is None else "directory")
    secret = passphrases.passphrase_of(identity, passphrase_file)
    key = Path(identity).expanduser()
    size = sealing.decrypt(
        Path(file).expanduser(), path, key, passphrase=secret, layers=layers, layout=layout, progress=screen
    )
    screen.line(f"{path}: {size:,} bytes, opened")
    screen.emit({"schema": 1, "path": str(path), "bytes": size})
    return 0
