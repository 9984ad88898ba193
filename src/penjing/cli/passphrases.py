"""Passphrases of keys: from a file, or asked for unseen; never from the command line, which others can see."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated

import typer

from penjing.errors import InputError

File = Annotated[
    str | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="A file whose first line is the passphrase of the key; without it, it is asked for where it is needed.",
    ),
]


def passphrase_of(key: str, file: str | None) -> str | None:
    """The passphrase of the private key in a file; None where it is under none."""
    from penjing.package import keys

    if not keys.needs_passphrase(Path(key).expanduser()):
        return None
    return _from_file(file) if file is not None else _asked(f"passphrase of {key}: ", "the key is under a passphrase")


def new_passphrase(file: str | None) -> str:
    """A passphrase for a new key: from a file, or asked for twice."""
    if file is not None:
        return _from_file(file)
    first = _asked("passphrase of the new key: ", "a passphrase is to be asked for")
    if first != _asked("the same again: ", "a passphrase is to be asked for"):
        raise InputError("the two passphrases differ", hint="try again")
    return first


def _from_file(file: str) -> str:
    try:
        lines = Path(file).expanduser().read_text(encoding="utf8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the passphrase in {file} cannot be read", hint="its first line is the passphrase") from error
    if not lines or not lines[0]:
        raise InputError(f"the first line of {file} is empty", hint="it should be the passphrase")
    return lines[0]


def _asked(question: str, why: str) -> str:
    if not sys.stdin.isatty():
        raise InputError(f"{why}, and there is no terminal to ask on", hint="give it with --passphrase-file FILE")
    return getpass.getpass(question, stream=sys.stderr)
