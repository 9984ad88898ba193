"""How long work tells that it is going on. The command line draws bars; the library is silent unless asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Where long work reports to."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """A stretch of work of `total` units (None: unknown); the context gives a function that advances it by n."""
        ...

    def note(self, text: str) -> None:
        """One sentence for the person who waits."""
        ...


class _Silent:
    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield lambda n: None

    def note(self, text: str) -> None:
        return None


SILENT: Progress = _Silent()
