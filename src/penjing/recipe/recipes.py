"""Recipe: Steps in order, and their YAML and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from penjing.errors import InputError, RecipeError
from penjing.files import appearing
from penjing.recipe.steps import STEPS, Step, step_from
from penjing.registry import did_you_mean


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"'{twice}' stands twice in one mapping")
        return super().construct_mapping(node, deep)


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
        return cls(*(step_from(row, f"step {i}") for i, row in enumerate(described["steps"], 1)))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a `.yaml`, `.yml` or `.json` file."""
        file = Path(path)
        try:
            text = file.read_text(encoding="utf8")
        except FileNotFoundError:
            raise InputError(f"there is no recipe {file}", hint="a YAML or JSON file with the entry 'steps'") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the recipe {file}: {error}") from error
        try:
            described = json.loads(text) if file.suffix == ".json" else yaml.load(text, _Loader)
        except (ValueError, yaml.YAMLError) as error:
            raise RecipeError(
                f"{file} is not valid {'JSON' if file.suffix == '.json' else 'YAML'}: {' '.join(str(error).split())}",
                hint="for example steps: [{PruneChannels: {ratio: 0.5}}]",
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
