"""Where a verb's output goes: one JSON object to standard output, everything for people to standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

# A bar that lives for less than this only flickers; without a terminal, only work longer than _LONG is worth a line.
_SHORT = 0.4
_LONG = 10.0


class Screen:
    """Text, tables and progress to standard error; implements `penjing.progress.Progress`.

    `emit` prints the JSON object, if the person asked for it. Library code that prints to standard output cannot spoil
    the object: while `guarding_stdout` is entered, file descriptor 1 leads to standard error.
    """

    def __init__(self, *, json_wanted: bool = False) -> None:
        self.json_wanted = json_wanted
        self.kept = ""  # what is not lost if the verb is stopped now, as a sentence
        self.console = Console(stderr=True, highlight=False, soft_wrap=False)
        self._bars: Progress | None = None
        self._tasks: list[TaskID] = []
        self._stdout: int | None = None

    # -- text -------------------------------------------------------------------------------------------------
    def say(self, item: RenderableType = "") -> None:
        """Text (rich markup) or a table, for people."""
        self.console.print(item)

    def note(self, text: str) -> None:
        """One plain sentence while work goes on."""
        self.console.print(escape(text), style="dim", soft_wrap=True)

    def warn(self, text: str) -> None:
        """A plain sentence that a reader must not overlook."""
        self.console.print(escape(text), style="yellow", soft_wrap=True)

    def line(self, text: str) -> None:
        """A plain line that is never wrapped nor read as markup."""
        self.console.print(escape(text), soft_wrap=True)

    # -- the JSON object --------------------------------------------------------------------------------------
    def emit(self, value: dict[str, Any]) -> None:
        """Prints `value` on standard output if --json was given; NaN and infinities become null."""
        if not self.json_wanted:
            return
        data = (json.dumps(_finite(value), ensure_ascii=False, default=str) + "\n").encode()
        if self._stdout is None:
            sys.stdout.write(data.decode())
            sys.stdout.flush()
            return
        while data:
            data = data[os.write(self._stdout, data) :]

    @contextmanager
    def guarding_stdout(self) -> Iterator[None]:
        """Inside, whatever writes to standard output, Python or native code, lands on standard error."""
        sys.stdout.flush()
        self._stdout = os.dup(1)
        before = sys.stdout
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        try:
            yield
        finally:
            sys.stdout = before
            sys.stdout.flush()
            os.dup2(self._stdout, 1)
            os.close(self._stdout)
            self._stdout = None

    # -- progress ---------------------------------------------------------------------------------------------
    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A stretch of work: a bar on a terminal; elsewhere one line at its end, and only if it was long."""
        if not self.console.is_terminal:
            start = time.monotonic()
            yield lambda n: None
            if (seconds := time.monotonic() - start) > _LONG:
                self.note(f"{description}: {seconds:.0f} s")
            return
        bars = self._started()
        start = time.monotonic()
        number = bars.add_task(escape(description), total=total, visible=False, detail="")
        self._tasks.append(number)

        def advance(n: int = 1) -> None:
            bars.update(number, advance=n, visible=time.monotonic() - start > _SHORT)

        try:
            if total is None:
                bars.update(number, visible=True)
            yield advance
        finally:
            bars.remove_task(number)
            self._tasks.remove(number)
            self._stopped()

    def detail(self, text: str) -> None:
        """A few words beside the innermost bar."""
        if self._bars is not None and self._tasks:
            self._bars.update(self._tasks[-1], detail=escape(text))

    def _started(self) -> Progress:
        if self._bars is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            more = (TimeRemainingColumn(compact=True), TextColumn("{task.fields[detail]}", style="dim"))
            self._bars = Progress(*columns, *more, console=self.console, transient=True)
            self._bars.start()
        return self._bars

    def _stopped(self) -> None:
        if not self._tasks and self._bars is not None:
            self._bars.stop()
            self._bars = None


def _finite(value: Any) -> Any:
    """The same value with what JSON cannot say (NaN, infinities) as None, and tuples as lists."""
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
