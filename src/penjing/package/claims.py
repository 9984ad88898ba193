"""What an index claims, checked: the small words in which layout.py and its neighbours refuse one."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from penjing.errors import PackageError

_MOST = 1 << 63  # no number of bytes, elements or parts comes near; larger ones cost time and overflow
_LONGEST = 80  # characters of a name that messages show
_DEEPEST = 100  # lists and objects within one another, so that nothing that walks through them recurses too deep


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
    if any(v >= _MOST for v in values):
        bad_index(f"{what} holds an absurd number")
    return values


def shown(name: str) -> str:
    """A name out of a file, fit for a terminal and for one line of a message."""
    text = name if name.isprintable() else json.dumps(name)[1:-1]
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def is_deep(value: Any) -> bool:
    """Whether JSON values lie so deep within one another that those who walk through them may run out of stack."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True


def is_unicode(value: Any) -> bool:
    """Whether the texts in JSON values, which are not deep, can be written: JSON can name halves of characters."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
