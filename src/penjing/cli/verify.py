"""penjing verify: whether a package is what its maker signed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli.options import AtLeast, Json, Signature
from penjing.cli.screen import Screen


def verify(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A package, its folder, or a bundle's folder.")],
    key: Annotated[
        list[str],
        typer.Option("--key", metavar="KEY.pub", help="The maker's public key. Give it again for more: one is enough."),
    ],
    signature: Signature = None,
    at_least: AtLeast = None,
    json: Json = False,
) -> int:
    """Verifies that WHAT is what the holder of KEY signed, and still holds; says what is wrong otherwise.

    [bold]penjing verify net.penjing --key maker.pub --at-least 2[/]
    """
    from penjing.package import signatures

    screen: Screen = context.obj
    with screen.task("verify"):
        signed = signatures.verify(
            Path(what).expanduser(),
            [Path(k).expanduser() for k in key],
            signature=None if signature is None else Path(signature).expanduser(),
            at_least=at_least,
        )
    until = "" if signed.expires is None else f", until {signed.expires:%Y-%m-%d %H:%M} UTC"
    screen.line(f"{what}: release {signed.release}, signed by {signed.key[:12]}{until}")
    screen.emit(
        {
            "schema": 1,
            "release": signed.release,
            "expires": None if signed.expires is None else signed.expires.isoformat(),
            "key": signed.key,
            "files": signed.files,
            "predicate": signed.predicate,
        }
    )
    return 0
