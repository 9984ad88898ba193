"""One way to register and look up everything that extensions can add."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from penjing.errors import InputError, PenjingError

T = TypeVar("T")
U = TypeVar("U")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known words, or all of them if none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    if near:
        likeness = [difflib.SequenceMatcher(None, word, n).ratio() for n in near]
        # A clear best stands alone.
        near = [n for n, alike in zip(near, likeness, strict=True) if alike > likeness[0] - 0.1]
        return "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    return "known: " + ", ".join(names) if names else "none is registered"


class Registry(Generic[T]):
    """Names to things of one kind, e.g. Steps, criteria, runtimes.

    `error` is the PenjingError raised for an unknown name.
    """

    def __init__(self, kind: str, *, error: type[PenjingError] = InputError) -> None:
        self.kind = kind
        self._error = error
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[U], U]:
        """Decorator: registers what it decorates under `name`; a second one of the same name is refused."""

        def add(item: U) -> U:
            if name in self._items and self._items[name] is not item:
                raise InputError(f"{self.kind} '{name}' is registered already")
            self._items[name] = item  # type: ignore[assignment]
            return item

        return add

    def get(self, name: str) -> T:
        """The thing called `name`; raises with a "did you mean" for an unknown one."""
        try:
            return self._items[name]
        except (KeyError, TypeError):
            raise self._error(
                f"there is no {self.kind} called {name!r}", hint=did_you_mean(str(name), self._items)
            ) from None

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
