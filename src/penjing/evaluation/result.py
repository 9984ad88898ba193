"""Report: everything that an evaluation found, in the form of report.json (version 1)."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penjing.evaluation import words
from penjing.evaluation.curves import Sensitivity
from penjing.evaluation.measurement import Measurement
from penjing.files import appearing

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class TargetResult:
    """What was measured on one target.

    ``uncompressed`` are the baseline's measurements at every float precision that this machine has;
    ``best_uncompressed`` is the fastest of them, which speed is held against; ``baseline`` is the plain one
    (float32). ``change`` holds ratios (result / baseline; result / best for speed) and the paired difference of the
    metric. ``in_float`` names the layers that stand on integer grids while the runtime executed them in float.
    """

    target: str
    result: Measurement
    baseline: Measurement | None = None
    best_uncompressed: Measurement | None = None
    uncompressed: tuple[Measurement, ...] = ()
    change: dict[str, Any] = field(default_factory=dict)
    artifacts: tuple[dict[str, Any], ...] = ()
    executed: dict[str, int] = field(default_factory=dict)
    in_float: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """One entry of ``targets`` in report.json."""
        return {
            "target": self.target,
            "baseline": None if self.baseline is None else self.baseline.to_dict(),
            "best_uncompressed": None if self.best_uncompressed is None else self.best_uncompressed.to_dict(),
            "uncompressed": [each.to_dict() for each in self.uncompressed],
            "result": self.result.to_dict(),
            "change": self.change,
            "artifacts": list(self.artifacts),
            "executed": self.executed,
            "in_float": self.in_float,
        }


class ArtifactFolder:
    """The exported files of an evaluation, kept as long as its Report, so that what was measured is what is
    deployed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="penjing-evaluate-", ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)

    def copy(self, name: str, destination: Path) -> bool:
        """Copy one file; False if it is not here."""
        source = self.path / name
        if not source.is_file():
            return False
        shutil.copyfile(source, destination)
        return True


@dataclass(frozen=True, kw_only=True)
class Report:
    """Baseline beside result on one or several targets; the first target is the main one.

    ``str(report)`` is its headline with what a reader must not overlook; :meth:`to_dict` is report.json.
    ``penjing.report`` renders it as HTML and Markdown.

    ``sensitivity`` holds the curves of the baseline, if they were measured, and ``kept`` how many units of each of
    their groups the evaluated network still has.
    """

    network: dict[str, Any]
    targets: tuple[TargetResult, ...]
    verdict: dict[str, Any]
    environment: dict[str, Any]
    steps: tuple[dict[str, Any], ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    kept: dict[str, int] = field(default_factory=dict)
    files: ArtifactFolder | None = field(default=None, compare=False, repr=False)

    @property
    def baseline(self) -> Measurement | None:
        """The baseline in float32 on the main target."""
        return self.targets[0].baseline

    @property
    def best_uncompressed(self) -> Measurement | None:
        """The fastest uncompressed setting on the main target."""
        return self.targets[0].best_uncompressed

    @property
    def result(self) -> Measurement:
        """The evaluated network on the main target."""
        return self.targets[0].result

    @property
    def artifacts(self) -> tuple[dict[str, Any], ...]:
        """The exported files of the evaluated network on every target."""
        return tuple(row for target in self.targets for row in target.artifacts)

    @property
    def met(self) -> bool:
        """Whether every constraint was met (True when there is none)."""
        return bool(self.verdict["met"])

    @property
    def headline(self) -> str:
        """The report in one sentence."""
        return words.headline(self.targets[0].to_dict())

    def __str__(self) -> str:
        found = dict.fromkeys(text for target in self.targets for text in words.warnings(target.to_dict()))
        return "\n".join([self.headline, *found])

    def to_dict(self) -> dict[str, Any]:
        """report.json; numbers that do not exist are null.

        ``sensitivity`` is null, or ``{"curves": what Sensitivity.to_dict gives, "kept": {group: units left}}``.
        """
        targets = [target.to_dict() for target in self.targets]
        main = targets[0]
        found: dict[str, Any] = _plain(
            {
                "schema": SCHEMA,
                "headline": words.headline(main),
                "warnings": list(dict.fromkeys(text for target in targets for text in words.warnings(target))),
                "network": self.network,
                "baseline": main["baseline"],
                "best_uncompressed": main["best_uncompressed"],
                "result": main["result"],
                "change": main["change"],
                "steps": list(self.steps),
                "sensitivity": None
                if self.sensitivity is None
                else {"curves": self.sensitivity.to_dict(), "kept": self.kept},
                "verdict": self.verdict,
                "artifacts": list(self.artifacts),
                "targets": targets,
                "data": self.data,
                "environment": self.environment,
            }
        )
        return found

    def to_json(self) -> str:
        """report.json as text, strict JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write report.json whole.

        Raises:
            OutputError: it cannot be written there.
        """
        path = Path(path)
        with appearing(path) as aside:
            aside.write_text(self.to_json(), encoding="utf-8")
        return path


def _plain(value: Any) -> Any:
    """JSON values only: tuples become lists, paths texts, numpy numbers Python's, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
