"""Step: one instruction as a plain value, and what reads it from plain data."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

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

    #: The fields that say how much goes, each with what its number counts: "zero" the share that is zero afterwards,
    #: earlier zeros with it; "goes" the share that goes of what is there; "macs", "parameters" the share of the
    #: footprint's count that stays, and "stays" that of anything else. Schedules and searches turn these.
    amounts: ClassVar[Mapping[str, str]] = {}

    #: Why this Step cannot take more where it has taken something already; empty if it can.
    once: ClassVar[str] = ""

    #: Whether this Step trains, and heeds `Context.after_step`.
    learns: ClassVar[bool] = False

    #: Fields that only say where a run keeps its own files: no part of what was done to the network.
    keeping: ClassVar[tuple[str, ...]] = ()

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
        """The fields that differ from their defaults, as plain data; a Step in a field is {name: its settings}."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)}
        return {k: {v.name: v.settings()} if isinstance(v, Step) else v for k, v in held.items()}

    def done(self) -> dict[str, Any]:
        """The settings for a network's history: those that made it what it is, the same wherever it was made."""
        return {k: v for k, v in self.settings().items() if k not in self.keeping}

    def share(self) -> float | None:
        """How much this Step takes away, as a share between 0 and 1: the largest of its `amounts`; None if none is set.

        `PruneChannels(keep_macs=0.3)` takes 0.7 of the multiply-accumulates away.
        """
        return max(self._going().values(), default=None)

    def taking(self, share: float, *, before: float = 0.0, left: Mapping[str, float] | None = None) -> Self:
        """This Step set to take `share` away, all its `amounts` in proportion.

        In a schedule, `before` is what an earlier `taking` of the same Step took from the network as it was at the
        start, and `left` the measured shares ("macs", "parameters") that it still has; `share` is then of the start,
        too.
        """
        whole = self.share()
        if not whole:
            raise RecipeError(f"{self.name} does not say how much to take away", hint=_how_to_say(type(self)))
        if share == whole and not before:
            return self
        if before and self.once:
            raise RecipeError(
                f"{self.name} cannot take away in rounds: {self.once}",
                hint="schedule='one-shot' takes all in the first round; SearchAmount finds how much may go",
            )
        changed: dict[str, Any] = {}
        for field, most in self._going().items():
            counts = self.amounts[field]
            goes, gone = most * share / whole, most * before / whole
            stays = min(1.0, (1 - goes) / max((left or {}).get(counts, 1 - gone), 1e-12))
            changed[field] = goes if counts == "zero" else 1 - stays if counts == "goes" else stays
        return dataclasses.replace(self, **changed)

    def _going(self) -> dict[str, float]:
        held = {f: (getattr(self, f), counts) for f, counts in self.amounts.items()}
        return {
            f: v if counts in ("zero", "goes") else 1 - v for f, (v, counts) in held.items() if v is not None and v <= 1
        }

    def require_between(
        self,
        field: str,
        low: float,
        high: float,
        *,
        open_low: bool = False,
        open_high: bool = False,
        share: bool = True,
    ) -> None:
        """Raises `PruneChannels.ratio must be between 0 and 1, got 1.5` unless the field is None or inside; no limit at
        all still means a finite number. `share`: from 0 to 1 is a share, which may have been meant in percent."""
        value = getattr(self, field)
        if value is None:
            return
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        wanted = _field_types(type(self))[field]
        if good and isinstance(value, float) and float not in (typing.get_args(wanted) or (wanted,)):
            raise RecipeError(
                f"{self.name}.{field} must be a whole number, got {value!r}", hint=_remedy(type(self), field, low, high)
            )
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
                limits = f"a {'finite ' if isinstance(value, int | float) else ''}number {limits}"
            raise RecipeError(
                f"{self.name}.{field} must be {limits}, got {value!r}",
                hint=(_percent(value, low, high) if share else None) or _remedy(type(self), field, low, high),
            )

    def require_one_of(self, field: str, known: Sequence[Any]) -> None:
        """Raises with a "did you mean" unless the field has one of the known values."""
        value = getattr(self, field)
        if value not in known:
            words = [str(k) for k in known]
            raise RecipeError(
                f"{self.name}.{field} must be one of {', '.join(words)}, got {value!r}",
                hint=did_you_mean(str(value), words),
            )

    def require_whole(self, field: str, low: int) -> None:
        """Raises unless the field is a whole number of at least `low`."""
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise RecipeError(
                f"{self.name}.{field} must be a whole number of at least {low}, got {value!r}",
                hint=_remedy(type(self), field, low),
            )

    def require_names(self, field: str) -> None:
        """Raises unless the field holds a name, a list of names (as strings) or None."""
        value = getattr(self, field)
        names = [value] if isinstance(value, str) else value
        if value is not None and not (isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names)):
            raise RecipeError(
                f"{self.name}.{field} must be a name or a list of names, got {value!r}",
                hint="names are 'original' and those of teachers={name: network}, --teacher NAME=MODEL",
            )

    def require_step(self, field: str) -> None:
        """Raises unless the field holds a Step or None."""
        inner = getattr(self, field)
        if inner is not None and not isinstance(inner, Step):
            raise RecipeError(
                f"{self.name}.{field} must be a Step or nothing, got {inner!r}", hint=did_you_mean(str(inner), STEPS)
            )

    def require_share(self, field: str) -> None:
        """Raises unless the field holds a Step that says how much it takes away, and all of `where` is left to it."""
        inner = getattr(self, field)
        if self.where != "*":
            raise RecipeError(f"{self.name}.where selects nothing, got {self.where!r}", hint=f"give it to {field}")
        able = ", ".join(n for n in STEPS if STEPS.get(n).amounts)
        if isinstance(inner, Step) and inner.share():
            return
        if isinstance(inner, Step) and inner.amounts:
            raise RecipeError(
                f"{self.name}.{field} must say what share {inner.name} takes away", hint=_how_to_say(type(inner))
            )
        got = inner.name if isinstance(inner, Step) else repr(inner)
        raise RecipeError(
            f"{self.name}.{field} must be a Step that takes something away, got {got}", hint=f"one of {able}"
        )


def _how_to_say(kind: type[Step]) -> str:
    return f"set {' or '.join(kind.amounts)}" if kind.amounts else f"{kind.__name__} has no field for that"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _percent(value: Any, low: float, high: float) -> str | None:
    if isinstance(value, int | float) and (low, high) == (0, 1) and 1 < value <= 100:
        return f"write {value / 100:g} for {value:g} %"
    return None


def _remedy(kind: type[Step], field: str, low: float = 1, high: float = float("inf")) -> str:
    """A hint where any number from `low` to `high` would do: what happens without one, or a number that works."""
    default = _default(next(f for f in dataclasses.fields(kind) if f.name == field))
    if default is not None and default is not dataclasses.MISSING:
        return f"left away it is {default!r}"
    if default is None and high == float("inf"):  # what suits here depends on the network
        return "it may be left away"
    middle = (low + high) / 2 if high < float("inf") else max(low, 1)
    example = f"for example {field}={middle:g}"
    return example if default is dataclasses.MISSING else f"{example}; it may be left away"


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
    if not patterns:
        raise RecipeError("where is an empty list, which selects nothing", hint="leave it away to select everything")
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]

    def hit(pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(p, pattern) for p in paths)

    wanted = [p for p in patterns if not p.startswith("!")]
    return (not wanted or any(map(hit, wanted))) and not any(hit(p[1:]) for p in patterns if p.startswith("!"))


def step_from(row: Any, place: str) -> Step:
    """The Step in plain data: its name, or {name: fields}; raises RecipeError that begins with `place`."""
    if isinstance(row, str):
        row = {row: {}}
    if not isinstance(row, Mapping) or len(row) != 1:
        raise RecipeError(f"{place}: a step is one name with its fields", hint="- PruneChannels: {ratio: 0.5}")
    ((name, fields),) = row.items()
    fields = {} if fields is None else fields
    try:
        kind = STEPS.get(str(name))
    except RecipeError as error:
        raise RecipeError(f"{place}: {error.message}", hint=error.hint) from error
    types_of = _field_types(kind)
    names = f"its fields: {', '.join(types_of)}"
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{place}: the fields of {name} must be a mapping, got {fields!r}", hint=names)
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in fields and _default(f) is dataclasses.MISSING]
    built: dict[str, Any] = {}
    for field, value in fields.items():
        if field not in types_of:
            raise RecipeError(f"{place}: {name} has no field '{field}'", hint=did_you_mean(str(field), types_of))
        if _takes_a_step(types_of[field]) and isinstance(value, str | Mapping):
            built[field] = step_from(value, f"{place}: {name}.{field}")
            continue
        built[field] = value
        if not _fits(value, types_of[field]):
            wanted = _words(types_of[field])
            hint = _remedy(kind, field)
            if _takes_a_step(types_of[field]):
                hint = f"for example {field}: {{PruneChannels: {{ratio: 0.5}}}}"
            elif "text" in wanted and isinstance(value, int):
                hint = f"put it in quotes, {field}: '…': YAML reads some words as numbers"
            raise RecipeError(f"{place}: {name}.{field} must be {wanted}, got {value!r}", hint=hint)
    if missing:
        raise RecipeError(f"{place}: {name} needs the field '{missing[0]}'", hint=names)
    try:
        return kind(**built)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error.message}", hint=error.hint) from error


def _field_types(kind: type[Step]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}


def _words(wanted: Any) -> str:
    """A type in plain words: float | None is "a number or nothing"."""
    kinds = typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,)

    def word(kind: Any) -> str:
        if kind in _WORDS:
            return _WORDS[kind]
        if isinstance(kind, type) and issubclass(kind, Step):
            return "a Step"
        origin = typing.get_origin(kind) or kind
        return {list: "a list", tuple: "a list", dict: "a mapping"}.get(origin, str(kind))

    return " or ".join(dict.fromkeys(map(word, kinds)))


def _takes_a_step(wanted: Any) -> bool:
    return wanted is Step or Step in typing.get_args(wanted)


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
