"""Nested inputs and outputs as plain containers whose leaves are names, e.g. ((“x”,), {}) or {"logits": "logits"}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def leaves(structure: Any, values: Any = None) -> dict[str, Any]:
    """Name → value for every leaf; `values` has the same structure (None: the names themselves).

    Raises KeyError, IndexError or TypeError where `values` is of another structure.
    """
    found: dict[str, Any] = {}

    def walk(part: Any, value: Any) -> None:
        if isinstance(part, str):
            found[part] = part if values is None else value
        elif isinstance(part, dict):
            for key, inner in part.items():
                walk(inner, None if values is None else value[key])
        else:
            if values is not None and len(value) != len(part):
                raise IndexError(len(value))
            for i, inner in enumerate(part):
                walk(inner, None if values is None else value[i])

    walk(structure, values)
    return found


def substitute(structure: Any, values: Mapping[str, Any]) -> Any:
    """The structure with every name replaced by its value."""
    if isinstance(structure, str):
        return values[structure]
    if isinstance(structure, dict):
        return {k: substitute(v, values) for k, v in structure.items()}
    return type(structure)(substitute(v, values) for v in structure)


def structure_to_json(structure: Any) -> Any:
    """JSON that keeps tuples and lists apart."""
    if isinstance(structure, str):
        return structure
    if isinstance(structure, dict):
        return {"dict": {k: structure_to_json(v) for k, v in structure.items()}}
    inner = [structure_to_json(v) for v in structure]
    return {"tuple": inner} if isinstance(structure, tuple) else inner


def structure_from_json(value: Any) -> Any:
    """What `structure_to_json` wrote; raises ValueError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [structure_from_json(v) for v in value]
    if isinstance(value, dict) and len(value) == 1:
        if "tuple" in value:
            return tuple(structure_from_json(v) for v in value["tuple"])
        if "dict" in value:
            return {k: structure_from_json(v) for k, v in value["dict"].items()}
    raise ValueError("not a structure of inputs or outputs")
