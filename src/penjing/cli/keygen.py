"""penjing keygen: a pair of keys, to sign with or to seal to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli import passphrases
from penjing.cli.options import Json
from penjing.cli.screen import Screen


def keygen(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="KEY", help="The file to write; the public half goes to KEY.pub.")],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="ed25519 to sign, p256 to sign for OpenSSF model-signing, too, age to be sealed to.",
        ),
    ] = "ed25519",
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Ask for a passphrase to keep the key under.")
    ] = False,
    passphrase_file: passphrases.File = None,
    json: Json = False,
) -> int:
    """Makes a key, which only you can read and which nothing overwrites.

    [bold]penjing keygen maker[/]   [bold]penjing keygen reader --kind age --passphrase[/]
    """
    from penjing.package import keys

    screen: Screen = context.obj
    path = Path(file).expanduser()
    secret = passphrases.new_passphrase(passphrase_file) if passphrase or passphrase_file is not None else None
    name = keys.keygen(path, kind=kind, passphrase=secret)
    screen.line(f"{path}: keep this half to yourself")
    screen.line(f"{path}.pub: for everybody ({name})")
    screen.emit({"schema": 1, "private": str(path), "public": f"{path}.pub", "kind": kind, "name": name})
    return 0
