"""Plan: what a Step decided for one Network, and its file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penjing.errors import InputError
from penjing.network import storage
from penjing.network.edits import EDITS, Call, Edit
from penjing.recipe.steps import Step, step_from


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
                step=step_from(described["step"], "the plan"),
                edits=tuple(_edit_from_json(e, arrays) for e in described["edits"]),
                reasons=tuple(Reason(**r) for r in described["reasons"]),
                notes=tuple(described["notes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a readable plan ({error})", hint="Plan.save writes one") from error


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
