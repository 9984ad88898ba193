"""penjing encrypt: a package that only its recipients can read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli import options, passphrases
from penjing.cli.outputs import output_package
from penjing.cli.screen import Screen


def encrypt(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The package, or its folder.")],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="The sealed package to write, ending in .penjing; or a folder.")
    ],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="WHO",
            help="A recipient: age1…, 'ssh-ed25519 …', or a file of them. Give it again for more.",
        ),
    ],
    identity: Annotated[
        str | None,
        typer.Option(
            "--identity", metavar="KEY", help="FILE is sealed: opened with KEY, WHO are added to its recipients."
        ),
    ] = None,
    passphrase_file: passphrases.File = None,
    layout: options.Layout = "file",
    json: options.Json = False,
) -> int:
    """Seals a package for its recipients, part by part, by age.

    [bold]penjing encrypt net.penjing sealed.penjing --to reader.pub[/]
    """
    from penjing.package import sealing

    screen: Screen = context.obj
    path, source = output_package(out, layout), Path(file).expanduser()
    who = [w if w.startswith(("age1", "ssh-")) else str(Path(w).expanduser()) for w in to]
    if identity is None:
        size = sealing.encrypt(source, path, who, layout=layout, progress=screen)
    else:
        secret = passphrases.passphrase_of(identity, passphrase_file)
        size = sealing.admit(source, path, who, Path(identity).expanduser(), passphrase=secret, layout=layout)
    screen.line(f"{path}: {size:,} bytes, sealed")
    screen.emit({"schema": 1, "path": str(path), "bytes": size})
    return 0
