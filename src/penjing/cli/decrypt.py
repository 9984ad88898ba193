"""penjing decrypt: the package inside a sealed one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli import passphrases
from penjing.cli.options import Json
from penjing.cli.outputs import output_file
from penjing.cli.screen import Screen


def decrypt(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The sealed package, ending in .penjing.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The package to write, ending in .penjing.")],
    identity: Annotated[
        str,
        typer.Option(
            "--identity", metavar="KEY", help="The private key: of penjing keygen --kind age, age-keygen, or SSH."
        ),
    ],
    passphrase_file: passphrases.File = None,
    json: Json = False,
) -> int:
    """Opens a sealed package: OUT is, bit for bit, what was sealed.

    [bold]penjing decrypt sealed.penjing net.penjing --identity reader[/]
    """
    from penjing.evaluation import words
    from penjing.package import sealing

    screen: Screen = context.obj
    path = output_file(out, suffixes=(".penjing",))
    secret = passphrases.passphrase_of(identity, passphrase_file)
    key = Path(identity).expanduser()
    size = sealing.decrypt(Path(file).expanduser(), path, key, passphrase=secret, progress=screen)
    screen.line(f"{path}: {words.size(size)}, opened")
    screen.emit({"schema": 1, "path": str(path), "bytes": size})
    return 0
