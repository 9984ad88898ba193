"""The entry point of the command line: the verbs, the exit codes, and what an error looks like.

Exit codes: 0 done; 2 bad input or usage; 3 a budget that could not be met; 1 a bug; 130 interrupted.
Bad input prints an `error:` line and a `hint:` line, never a traceback. With --json, the object on standard output is
then {"error": ..., "hint": ...}.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated

import typer

from penjing._version import __version__
from penjing.cli import (
    compress,
    decrypt,
    demo,
    deploy,
    diff,
    doctor,
    encrypt,
    evaluate,
    inspect,
    join,
    keygen,
    pack,
    patch,
    pull,
    sensitivity,
    sign,
    split,
    unpack,
    verify,
)
from penjing.cli.screen import Screen
from penjing.errors import OutputError, PenjingError

app = typer.Typer(
    name="penjing",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    pretty_exceptions_enable=False,
)
for _verb, _group in (
    (compress.compress, "Make smaller, and prove it"),
    (evaluate.evaluate, "Make smaller, and prove it"),
    (deploy.deploy, "Make smaller, and prove it"),
    (sensitivity.sensitivity, "Make smaller, and prove it"),
    (pack.pack, "Files"),
    (unpack.unpack, "Files"),
    (inspect.inspect, "Files"),
    (split.split, "Files"),
    (join.join, "Files"),
    (pull.pull, "Files"),
    (diff.diff, "Files"),
    (patch.patch, "Files"),
    (keygen.keygen, "Who made it, and who may read it"),
    (sign.sign, "Who made it, and who may read it"),
    (verify.verify, "Who made it, and who may read it"),
    (encrypt.encrypt, "Who made it, and who may read it"),
    (decrypt.decrypt, "Who made it, and who may read it"),
    (demo.demo, "Start here"),
    (doctor.doctor, "Start here"),
):
    app.command(rich_help_panel=_group, no_args_is_help=False)(_verb)

_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
}
_STOPPED = (130, 143)  # by Ctrl-C, by SIGTERM
# typer brings its own copy of click; this is the base of its usage errors, whichever copy that is.
_UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penjing {__version__}")
        raise typer.Exit()


@app.callback(epilog="Try [bold]penjing demo[/]. In Python: [bold]import penjing as pj[/].")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Makes trained neural networks smaller and faster, with the measurements that prove it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line on `arguments` (default: those of the process) and returns its exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    screen = Screen(json_wanted="--json" in args)
    helping = any(a in ("-h", "--help", "--version") for a in args)
    with _quiet(), _termination():
        try:
            if helping:
                return _code(app(args, prog_name="penjing", standalone_mode=False, obj=screen))
            with screen.guarding_stdout():
                try:
                    return _code(app(args, prog_name="penjing", standalone_mode=False, obj=screen), screen)
                except (Exception, KeyboardInterrupt, SystemExit, _Terminated) as error:
                    return _failed(screen, error)
        except BrokenPipeError:
            with suppress(OSError):  # the reader of standard output went away: nobody is left to tell
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        except _UsageError as error:
            return _failed(screen, error)


def _code(result: object, screen: Screen | None = None) -> int:
    """The exit code of what a verb returned; typer turns Ctrl-C into the code 130."""
    code = result if isinstance(result, int) else 0
    if code == 130 and screen is not None:
        return _failed(screen, KeyboardInterrupt())
    return code


def _failed(screen: Screen, error: BaseException) -> int:
    """Says what went wrong and returns the exit code."""
    message, hint, code = _explain(error)
    if code in _STOPPED and screen.kept:
        message = f"{message.partition(':')[0]}: {screen.kept}"
    screen.line(f"error: {message}" if code != 130 else message)
    if hint:
        screen.line(f"hint: {hint}")
    screen.emit({"error": message, "hint": hint})
    return code


def _explain(error: BaseException) -> tuple[str, str | None, int]:
    """Message, hint and exit code for an error that reached the outermost call."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: nothing was written", None, 130
    if isinstance(error, _Terminated):
        return "terminated: nothing was written", None, 143
    if isinstance(error, SystemExit):
        return (
            f"code named on the command line left by sys.exit({error.code!r})",
            "take the call out of what is imported",
            2,
        )
    if isinstance(error, PenjingError):
        return error.message, error.hint or "penjing COMMAND --help explains every argument", 2
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "penjing"
        text = error.format_message().strip()  # type: ignore[attr-defined]
        return text[:1].lower() + text[1:].rstrip("."), f"{path} --help lists what it takes", 2
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        full = OutputError(f"{error.filename or 'a file'}: {(error.strerror or str(error)).lower()}")
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return full.message, "name another file", 2
        return full.message, "free some room, or name another place to write to", 2
    if isinstance(error, MemoryError):
        return "out of memory", "use smaller batches or a machine with more memory", 2
    return f"this is a bug in penjing: {type(error).__name__}: {error}", f"please report it with {_keep(error)}", 1


def _keep(error: BaseException) -> str:
    """Writes the traceback aside for a bug report and returns the file's name: a terminal is no place for it."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="penjing-bug-", suffix=".txt", delete=False) as file:
            file.write(text)
            return file.name
    except OSError:
        return "this: " + text


class _Terminated(BaseException):
    """SIGTERM, as an exception so that everything half-done is cleared away."""


@contextmanager
def _termination() -> Iterator[None]:
    """Inside, SIGTERM unwinds like an error does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated()

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """The process made fit for a screen: no warnings or log lines of libraries, and none of them phones home.

    Importing openvino sends usage statistics unless openvino_telemetry is absent, so for this process it is.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the fresh processes that measure memory
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with suppress(OSError):  # package.module:callable is looked for here too, as python -m does
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    sys.exit(main())
