"""How long work tells that it is going on. The command line draws bars; the library is silent unless asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


class Progress(Protocol):
    """Where long work reports to."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """A stretch of work of `total` units (None: unknown); the context gives a function that advances it by n."""
        ...

    def note(self, text: str) -> None:
        """One sentence for the person who waits."""
        ...


@runtime_checkable
class Detailed(Protocol):
    """Progress that also shows how the work in hand looks: a loss, a metric."""

    def detail(self, text: str) -> None:
        """A few words beside the bar of the innermost task, until the next ones."""
        ...


def detail(progress: Progress, text: str) -> None:
    """Shows `text` where `progress` has a place for it."""
    if isinstance(progress, Detailed):
        progress.detail(text)


class _Silent:
    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield lambda n: None

    def note(self, text: str) -> None:
        return None


SILENT: Progress = _Silent()
