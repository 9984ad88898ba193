"""penjing sign: who made a package, where it comes from, what was measured."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from penjing.cli import passphrases
from penjing.cli.options import Json
from penjing.cli.outputs import output_file
from penjing.cli.screen import Screen
from penjing.errors import InputError


def sign(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A package, its folder, or a bundle's folder.")],
    key: Annotated[str, typer.Option("--key", metavar="KEY", help="The private key, from penjing keygen.")],
    release: Annotated[
        int, typer.Option("--release", metavar="N", min=0, help="The number of the release; a later one has a larger.")
    ] = 1,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires", metavar="DATE", help="When the signature ends: 2027-12-31 is 00:00 UTC, when that day begins."
        ),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option("--report", metavar="FILE", help="A report.json whose measurements are signed; a bundle has one."),
    ] = None,
    parent: Annotated[
        list[str] | None,
        typer.Option("--parent", metavar="FILE", help="A package that this one was made of. Give it again for more."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Where the signature goes; default: WHAT.dsse.json.")
    ] = None,
    model_signing: Annotated[
        bool,
        typer.Option("--model-signing", help="An OpenSSF signature as well, WHAT.sig; takes a key of kind p256."),
    ] = False,
    passphrase_file: passphrases.File = None,
    json: Json = False,
) -> int:
    """Signs WHAT: its digest, its history and what was measured, in a file beside it.

    [bold]penjing sign net.penjing --key maker --release 2[/]
    """
    from penjing.package import signatures

    screen: Screen = context.obj
    path, private = Path(what).expanduser(), Path(key).expanduser()
    place = output_file(out) if out is not None else signatures.beside(path)
    until = None if expires is None else _date(expires)
    secret = passphrases.passphrase_of(key, passphrase_file)
    extra = None
    with screen.task("sign"):
        if model_signing:
            from penjing.package import openssf

            openssf.require(private, secret)
        signatures.sign(
            path,
            private,
            passphrase=secret,
            release=release,
            expires=until,
            report=None if report is None else Path(report).expanduser(),
            parents=[Path(p).expanduser() for p in parent or ()],
            signature=place,
        )
        if model_signing:
            extra = openssf.sign(path, private, passphrase=secret)
    screen.line(f"{place}: signs {what} as release {release}")
    if extra is not None:
        screen.line(f"{extra}: the same for OpenSSF model-signing")
    screen.emit(
        {
            "schema": 1,
            "signature": str(place),
            "release": release,
            "model_signing": None if extra is None else str(extra),
        }
    )
    return 0


def _date(text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text)
        when = (when.replace(tzinfo=UTC) if when.tzinfo is None else when).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{text!r} is no date", hint="write it as 2027-12-31 or 2027-12-31T12:00+00:00") from error
    if when <= datetime.now(UTC):
        raise InputError(f"{text!r} is past: nobody could verify the signature", hint="a date means 00:00 UTC")
    return when
