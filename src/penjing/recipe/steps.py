"""Step: one instruction as a plain value, and what reads it from plain data."""

from __future__ import annotations

import dataclasses
import fnmatch
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from penjing.errors import RecipeError
from penjing.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from penjing.network import Network
    from penjing.recipe.context import Context
    from penjing.recipe.plans import Plan

STEPS: Registry[type[Step]] = Registry("Step", error=RecipeError)
S = TypeVar("S", bound="type[Step]")


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One instruction: a frozen dataclass of plain data whose `plan` decides on Edits and changes nothing.

    `where` selects parameters or layers by shell patterns of their paths; a list is any of them; a leading `!`
    excludes.
    """

    where: str | list[str] = "*"

    def check(self, context: Context) -> None:  # noqa: B027  most Steps need nothing
        """Raises DataError or RecipeError if `context` lacks what this Step needs; called for all Steps before any
        work.
        """

    @abstractmethod
    def plan(self, network: Network, context: Context) -> Plan:
        """What this Step would do to `network`."""

    @property
    def name(self) -> str:
        """The class's name: `PruneChannels`."""
        return type(self).__name__

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain data."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)}

    def require_between(
        self, field: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
    ) -> None:
        """Raises `PruneChannels.ratio must be between 0 and 1, got 1.5` unless the field is None or inside."""
        value = getattr(self, field)
        if value is None:
            return
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not good
            or not (low < value if open_low else low <= value)
            or not (value < high if open_high else value <= high)
        ):
            limits = (
                f"between {low:g} and {high:g}"
                if high != float("inf")
                else f"above {low:g}"
                if open_low
                else f"at least {low:g}"
            )
            if good and open_high and value == high:
                limits = f"below {high:g}"
            if not good:
                limits = f"a number {limits}"
            raise RecipeError(f"{self.name}.{field} must be {limits}, got {value!r}", hint=_hint(value, low, high))

    def require_one_of(self, field: str, known: Sequence[Any]) -> None:
        """Raises with a "did you mean" unless the field has one of the known values."""
        value = getattr(self, field)
        if value not in known:
            words = [str(k) for k in known]
            raise RecipeError(
                f"{self.name}.{field} must be one of {', '.join(words)}, got {value!r}",
                hint=did_you_mean(str(value), words),
            )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _hint(value: Any, low: float, high: float) -> str | None:
    if isinstance(value, int | float) and (low, high) == (0, 1) and 1 < value <= 100:
        return f"write {value / 100:g} for {value:g} %"
    return None


def step(cls: S) -> S:
    """Class decorator that makes a Step known to recipes under its class name."""
    return STEPS.register(cls.__name__)(cls)


def matches(where: str | Sequence[str], name: str) -> bool:
    """Whether a parameter or layer path is selected: `a.b.weight` is by `a.b.weight`, `a.b`, `a.*`, `*`; `!a.*`
    excludes.
    """
    patterns = [where] if isinstance(where, str) else where
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise RecipeError(
            f"where must be a pattern or a list of patterns, got {where!r}", hint="for example where='layer1.*'"
        )
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]

    def hit(pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(p, pattern) for p in paths)

    wanted = [p for p in patterns if not p.startswith("!")]
    return (not wanted or any(map(hit, wanted))) and not any(hit(p[1:]) for p in patterns if p.startswith("!"))


def step_from(row: Any, place: str) -> Step:
    if isinstance(row, str):
        row = {row: {}}
    if not isinstance(row, Mapping) or len(row) != 1:
        raise RecipeError(f"{place}: a step is one name with its fields", hint="- PruneChannels: {ratio: 0.5}")
    ((name, fields),) = row.items()
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{place}: the fields of {name} must be a mapping, got {fields!r}")
    kind = STEPS.get(str(name))
    types_of = _field_types(kind)
    for field, value in fields.items():
        if field not in types_of:
            raise RecipeError(f"{place}: {name} has no field '{field}'", hint=did_you_mean(str(field), types_of))
        if not _fits(value, types_of[field]):
            wanted = str(types_of[field]).replace("<class '", "").replace("'>", "").replace(" | None", " or nothing")
            raise RecipeError(f"{place}: {name}.{field} must be {wanted}, got {value!r}")
    try:
        return kind(**fields)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error.message}", hint=error.hint) from error


def _field_types(kind: type[Step]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _fits(value: Any, wanted: Any) -> bool:
    origin = typing.get_origin(wanted)
    if wanted is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, w) for w in typing.get_args(wanted))
    if origin is typing.Literal:
        return value in typing.get_args(wanted)
    if origin in (list, tuple):
        inner = typing.get_args(wanted)[:1]
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value if inner)
    if origin is dict:
        return isinstance(value, dict)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)
