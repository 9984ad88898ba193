"""Sensitivity: what a network says as one part of it after the other is silenced, as a value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penjing.budget import is_fraction
from penjing.errors import InputError
from penjing.evaluation import words
from penjing.files import appearing

SCHEMA = 1
#: What counts as no loss: this output error where there is no metric; two points of a fraction, two per cent of another
#: metric.
_SMALL_ERROR, _SMALL_LOSS = 0.1, 0.02


@dataclass(frozen=True, kw_only=True)
class Point:
    """One group with `removed` of its `size` units (entries of a weight) silenced, asked for as `ratio` of them.

    `metric` is the task's (None without labels, or where it is not a finite number), `output_error` the mean over
    samples of ‖y − y₀‖ / ‖y₀‖ of the main output.
    """

    group: str
    size: int
    ratio: float
    removed: int
    metric: float | None
    output_error: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What `sensitivity` found: `rows`, group after group in the order of the network, ratio after ratio.

    `network` is the name of the network and `digest` its SHA-256. `metric` describes it as it is:
    `{"name", "value", "unit", "higher_is_better"}`, None without labels.
    """

    network: str
    digest: str
    kind: str
    criterion: str
    reconstruct: bool
    samples: int
    seed: int
    metric: dict[str, Any] | None
    rows: tuple[Point, ...]
    inexact: dict[str, str]

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups (or weights), in the order of the network."""
        return tuple(dict.fromkeys(row.group for row in self.rows))

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios that were tried."""
        return tuple(dict.fromkeys(row.ratio for row in self.rows))

    def curve(self, group: str) -> tuple[Point, ...]:
        """The points of one group, by rising ratio.

        Raises InputError if there is none of that name.
        """
        found = tuple(row for row in self.rows if row.group == group)
        if not found:
            raise InputError(f"there is no curve for {group!r}", hint=f"there are {', '.join(self.groups)}")
        return found

    def loss(self, point: Point) -> float:
        """How much worse than the whole network a point is: of the metric (infinitely, where it is not a number), or
        its output error where there is no metric."""
        if self.metric is None:
            return point.output_error
        if point.metric is None:
            return math.inf
        change = float(self.metric["value"]) - point.metric
        return change if self.metric["higher_is_better"] else -change

    def most_sensitive(self, count: int | None = None) -> tuple[str, ...]:
        """Groups by their mean loss over the ratios, largest first."""

        def harm(group: str) -> tuple[float, float]:
            points = self.curve(group)
            return sum(map(self.loss, points)) / len(points), sum(p.output_error for p in points)

        return tuple(sorted(self.groups, key=harm, reverse=True)[:count])

    def spare(self, group: str) -> float:
        """The largest ratio up to which the group costs next to nothing on its own: a loss of at most `small`."""
        best = 0.0
        for point in self.curve(group):
            if self.loss(point) > self.small + 1e-9:
                break
            best = point.ratio
        return best

    @property
    def small(self) -> float:
        """What counts as next to nothing: a loss of two points of a fraction, of two per cent of another metric, or
        an output error of 0.1 without labels."""
        if self.metric is None:
            return _SMALL_ERROR
        return _SMALL_LOSS if is_fraction(self.metric) else _SMALL_LOSS * abs(self.metric["value"])

    def show(self, point: Point) -> str:
        """The metric of a point as text (a dash where it is not a number), or its output error where there is none."""
        if self.metric is None:
            return words.number(point.output_error)
        return words.metric_value({**self.metric, "value": point.metric})

    def brief(self, point: Point) -> str:
        """`show` in a few characters, without the unit that `measure` names: "93.4", "0.123", "–"."""
        if self.metric is None or point.metric is None or not is_fraction(self.metric):
            return self.show(point).removesuffix(f" {self._unit}")
        return f"{100 * point.metric:.1f}"

    @property
    def measure(self) -> str:
        """What the numbers of `brief` are: "accuracy in %", "PSNR in dB", "output error"."""
        name = "output error" if self.metric is None else words.name_of(self.metric)
        return f"{name} in {self._unit}" if self._unit else name

    @property
    def _unit(self) -> str:
        if self.metric is None:
            return ""
        return "%" if is_fraction(self.metric) else str(self.metric.get("unit") or "")

    @property
    def what(self) -> str:
        """What the curves are of: "accuracy 93.39 %" or "output error"."""
        return (
            "output error"
            if self.metric is None
            else f"{words.name_of(self.metric)}, {words.metric_value(self.metric)} with everything in place"
        )

    def __str__(self) -> str:
        unit = "channels" if self.kind == "channels" else "weights"
        head = f"{self.what}, as {unit} go by {self.criterion}; {self.samples} samples; the most sensitive first"
        rows = [["group", unit, "may lose", *(f"{ratio:.0%}" for ratio in self.ratios)]]
        for group in self.most_sensitive():
            points = self.curve(group)
            rows.append([group, f"{points[0].size:,}", f"{self.spare(group):.0%}", *map(self.show, points)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([head, *lines])

    # ------------------------------------------------------------------------------------------------- plain values
    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"schema": SCHEMA, **asdict(self), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """What `to_dict` gave.

        Raises InputError if it is anything else.
        """
        try:
            if values["schema"] != SCHEMA:
                raise InputError(f"these curves have version {values['schema']}; this penjing reads {SCHEMA}")
            rows = tuple(Point(**row) for row in values["rows"])
            return cls(**{k: v for k, v in values.items() if k not in ("schema", "rows")}, rows=rows)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError("this is not what penjing sensitivity writes", hint="measure it again") from error

    def save(self, path: str | Path) -> Path:
        """Writes one JSON file, whole.

        Raises OutputError if it cannot be written there.
        """
        with appearing(path) as aside:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            aside.write_text(text + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Reads what `save` wrote.

        Raises InputError if there is no such file, or it is not one.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as sensitivity curves", hint="measure it again") from error
