"""Sensitivity: what a network says as one part of it after the other is silenced, as a value."""

from __future__ import annotations

import json
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

    `metric` is the task's (None without labels), `output_error` the mean over samples of ‖y − y₀‖ / ‖y₀‖ of the main
    output.
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

    `metric` describes the network as it is: `{"name", "value", "unit", "higher_is_better"}`, None without labels.
    """

    network: str
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
        """How much worse than the whole network a point is: of the metric, or its output error where there is none."""
        if self.metric is None or point.metric is None:
            return point.output_error
        change = float(self.metric["value"]) - point.metric
        return change if self.metric["higher_is_better"] else -change

    def most_sensitive(self, count: int | None = None) -> tuple[str, ...]:
        """Groups by their mean loss over the ratios, largest first."""

        def harm(group: str) -> tuple[float, float]:
            points = self.curve(group)
            return sum(map(self.loss, points)) / len(points), sum(p.output_error for p in points)

        return tuple(sorted(self.groups, key=harm, reverse=True)[:count])

    def spare(self, group: str) -> float:
        """The largest ratio up to which the group costs next to nothing on its own: at most two points of a
        fraction, two per cent of another metric, or an output error of 0.1 without labels."""
        limit = _SMALL_ERROR
        if self.metric is not None:
            limit = _SMALL_LOSS if is_fraction(self.metric) else _SMALL_LOSS * abs(self.metric["value"])
        best = 0.0
        for point in self.curve(group):
            if self.loss(point) > limit + 1e-9:
                break
            best = point.ratio
        return best

    def show(self, point: Point) -> str:
        """The metric of a point as text, or its output error where there is none."""
        if self.metric is None or point.metric is None:
            return words.number(point.output_error)
        return words.metric_value({**self.metric, "value": point.metric})

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
