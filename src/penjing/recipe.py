"""Step, Recipe and Plan: instructions as plain values, and their YAML and JSON."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from torch import Tensor

from penjing.data import Data
from penjing.errors import InputError, RecipeError
from penjing.files import appearing
from penjing.network import storage
from penjing.network.edits import EDITS, Call, Edit
from penjing.network.network import Network
from penjing.progress import SILENT, Progress
from penjing.registry import Registry, did_you_mean
from penjing.task import Task

STEPS: Registry[type[Step]] = Registry("Step", error=RecipeError)
S = TypeVar("S", bound="type[Step]")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a planner may look at besides the network: the original network, samples, the task, the seed."""

    original: Network
    data: Data | None = None
    task: Task | None = None
    seed: int = 0
    progress: Progress = SILENT


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


# ------------------------------------------------------------------------------------------------------------- Plan
@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a layer is treated as it is: its score (None: not scored), the choice, and one clause of explanation."""

    layer: str
    choice: str
    score: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What a Step decided for one Network: Edits and the table of reasons. Printable, savable, replayable by
    `network.apply`.
    """

    step: Step
    edits: tuple[Edit, ...] = ()
    reasons: tuple[Reason, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.step.settings().items())
        lines = [f"{self.step.name}({settings}): {len(self.edits)} edits", *(f"  note: {n}" for n in self.notes)]
        width = max((len(r.layer) for r in self.reasons), default=0)
        choice = max((len(r.choice) for r in self.reasons), default=0)
        for r in self.reasons:
            score = "" if r.score is None else f"{r.score:.4g}"
            lines.append(f"  {r.layer:<{width}}  {r.choice:<{choice}}  {score:>10}  {r.why}".rstrip())
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file with everything, to be replayed later."""
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        described = {
            "step": {self.step.name: self.step.settings()},
            "edits": [_edit_to_json(e, i, arrays) for i, e in enumerate(self.edits)],
            "reasons": [dataclasses.asdict(r) for r in self.reasons],
            "notes": list(self.notes),
        }
        storage.write(Path(path), json.dumps(described), arrays, key="penjing.plan")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `save` wrote."""
        text, arrays = storage.read(Path(path), key="penjing.plan")
        try:
            described = json.loads(text)
            return cls(
                step=_step_from(described["step"], "the plan"),
                edits=tuple(_edit_from_json(e, arrays) for e in described["edits"]),
                reasons=tuple(Reason(**r) for r in described["reasons"]),
                notes=tuple(described["notes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a readable plan ({error})") from error


def _edit_to_json(edit: Edit, number: int, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            arrays[path] = value.detach().cpu().contiguous().numpy()
            kind = "parameter" if isinstance(value, torch.nn.Parameter) else "tensor"
            return {kind: path}
        if isinstance(value, Call):
            return {"call": [value.operator, list(value.arguments), dict(value.keywords)]}
        if isinstance(value, Mapping):
            return {"map": {k: plain(v, f"{path}/{k}") for k, v in value.items()}}
        if isinstance(value, tuple):
            return {"tuple": [plain(v, f"{path}/{i}") for i, v in enumerate(value)]}
        return value

    fields = {f.name: plain(getattr(edit, f.name), f"{number}/{f.name}") for f in dataclasses.fields(edit)}
    return {type(edit).__name__: fields}


def _edit_from_json(row: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> Edit:
    def value(given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        ((kind, inner),) = given.items()
        if kind in ("tensor", "parameter"):
            tensor = torch.from_numpy(np.array(arrays[inner]))
            return torch.nn.Parameter(tensor) if kind == "parameter" else tensor
        if kind == "call":
            return Call(operator=inner[0], arguments=tuple(inner[1]), keywords=inner[2])
        return {k: value(v) for k, v in inner.items()} if kind == "map" else tuple(value(v) for v in inner)

    ((name, fields),) = row.items()
    return EDITS[name](**{k: value(v) for k, v in fields.items()})


# ----------------------------------------------------------------------------------------------------------- Recipe
class Recipe:
    """An ordered list of Steps: `Recipe(PruneChannels(ratio=0.5), Quantize())`; reads and writes YAML and JSON."""

    def __init__(self, *steps: Step) -> None:
        for s in steps:
            if isinstance(s, type) and issubclass(s, Step):
                raise RecipeError(
                    f"a Recipe is made of Steps, got the class {s.__name__}", hint=f"write {s.__name__}()"
                )
            if not isinstance(s, Step):
                raise RecipeError(
                    f"a Recipe is made of Steps, got {type(s).__name__}", hint=did_you_mean(str(s), STEPS.names())
                )
        self.steps: tuple[Step, ...] = steps

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.steps == other.steps

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __repr__(self) -> str:
        return f"Recipe({', '.join(map(repr, self.steps))})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {"steps": [{"PruneChannels": {"ratio": 0.5}}, …]}."""
        return {"steps": [{s.name: s.settings()} for s in self.steps]}

    @classmethod
    def from_dict(cls, described: Any) -> Recipe:
        """What `to_dict` gave; raises RecipeError naming the step's number for anything unknown."""
        if (
            not isinstance(described, Mapping)
            or set(described) != {"steps"}
            or not isinstance(described["steps"], list)
        ):
            raise RecipeError(
                "a recipe is a mapping with one entry 'steps', which is a list",
                hint="steps: [{PruneChannels: {ratio: 0.5}}]",
            )
        return cls(*(_step_from(row, f"step {i}") for i, row in enumerate(described["steps"], 1)))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a `.yaml`, `.yml` or `.json` file."""
        file = Path(path)
        try:
            text = file.read_text(encoding="utf8")
        except FileNotFoundError:
            raise InputError(f"there is no recipe {file}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the recipe {file}: {error}") from error
        try:
            described = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise RecipeError(
                f"{file} is not valid {'JSON' if file.suffix == '.json' else 'YAML'}: {' '.join(str(error).split())}"
            ) from error
        try:
            return cls.from_dict(described)
        except RecipeError as error:
            raise RecipeError(f"{file.name}: {error.message}", hint=error.hint) from error

    def dump(self, path: str | Path) -> Path:
        """Writes `.json`, or YAML under any other name."""
        file = Path(path)
        text = (
            json.dumps(self.to_dict(), indent=2) + "\n"
            if file.suffix == ".json"
            else yaml.safe_dump(self.to_dict(), sort_keys=False)
        )
        with appearing(file) as aside:
            aside.write_text(text, encoding="utf8")
        return file


def _step_from(row: Any, place: str) -> Step:
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
