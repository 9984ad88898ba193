"""What an index claims, checked: the small words in which layout.py and its neighbours refuse one."""

from __future__ import annotations

from typing import Any, NoReturn

from penjing.errors import PackageError


def bad_index(why: str) -> NoReturn:
    """Raises PackageError for an index that no writer makes."""
    raise PackageError(f"the package's index makes no sense: {why}", hint="it is damaged or was made to harm")


def field(front: dict[str, Any], key: str, kind: type) -> Any:
    """A value of the index's JSON, of the right kind."""
    value = front.get(key)
    if not isinstance(value, kind):
        bad_index(f"'{key}' is missing or of the wrong kind")
    return value


def naturals(values: Any, what: str) -> list[int]:
    """A list of whole numbers of 0 and up."""
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        bad_index(f"{what} is no list of numbers")
    return values
