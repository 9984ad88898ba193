"""Sensitivity curves as what the pages show: a heat map of all groups, charts of the most sensitive, and sentences."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from penjing.budget import is_fraction
from penjing.errors import InputError
from penjing.evaluation import Point, Sensitivity, words
from penjing.report.charts import capital, nice_ticks

Row = dict[str, Any]

#: Up to so many groups all are drawn (listed); of more, only as many as the second number, the rest folded away.
_DRAWN, _DRAWN_OF_MANY = 12, 8
_LISTED, _LISTED_OF_MANY = 20, 15
_NAMED = 3
#: Labels of an axis nearer than this many per cent of its length would touch.
_NEAR = 11


def sensitivity_view(found: Mapping[str, Any] | None, *, beside: bool = True) -> Row | None:
    """Everything that the templates print of `{"curves", "kept"}`, the `sensitivity` of report.json; None without it.

    `beside`: whether it stands beside other measurements, whose samples and runtime are other ones.

    Raises:
        InputError: curves of another version, or none at all.
    """
    if not found:
        return None
    curves = Sensitivity.from_dict(found.get("curves") or {})
    if not curves.rows:
        raise InputError("there is not one curve to draw", hint="measure them again with penjing sensitivity")
    return _Drawing(curves, found.get("kept") or {}, beside).view()


class _Drawing:
    """Curves with the scales that all their charts share."""

    def __init__(self, curves: Sensitivity, kept: Mapping[str, int], beside: bool) -> None:
        self.curves, self.beside = curves, beside
        self.order = curves.most_sensitive()
        self.points = {group: curves.curve(group) for group in self.order}
        self.kept = {group: kept[group] for group in self.order if group in kept}
        self.unit = "channels" if curves.kind == "channels" else "weights"
        self.fraction = curves.metric is not None and is_fraction(curves.metric)
        self.base = 0.0 if curves.metric is None else float(curves.metric["value"])
        self.up = curves.metric is not None and bool(curves.metric["higher_is_better"])
        self.most = self._most()
        worst = self.base - self.most if self.up else self.base + self.most
        every = [v for points in self.points.values() for p in points if (v := self._value(p)) is not None]
        best = (max if self.up else min)([self.base, *every])
        pad = 0.04 * abs(best - worst)
        self.low, self.high = min(best, worst) - pad, max(best, worst) + pad

    def view(self) -> Row:
        """What the templates print."""
        listed = len(self.order) if len(self.order) <= _LISTED else _LISTED_OF_MANY
        drawn = len(self.order) if len(self.order) <= _DRAWN else _DRAWN_OF_MANY
        rows = [self._row(group) for group in self.order]
        return {
            "network": self.curves.network,
            "lead": [sentence.replace(" %", "\N{NO-BREAK SPACE}%") for sentence in self._lead()],
            "caption": self._caption(),
            "measure": capital(self.curves.measure),
            "unit": self.unit,
            "marked": bool(self.kept),
            "ratios": [f"{ratio:.0%}".replace("%", " %") for ratio in self.curves.ratios],
            "rows": rows,
            "listed": rows[:listed],
            "folded": rows[listed:],
            "drawn": [self._chart(group) for group in self.order[:drawn]],
            "columns": _columns(drawn),
            "width": max(_narrow(len(self.curves.ratios)), *(len(c["text"]) + 2 for row in rows for c in row["cells"])),
            "base": {"at": self._at(self.base), "text": self._base_text()},
            "ticks": [{"at": self._at(v), "text": text} for v, text in self._ticks()],
            "scale": {"low": "no loss", "high": self._drop(self.most) + (" and more" if self._is_cut_off() else "")},
        }

    # ------------------------------------------------------------------------------------------------------ sentences
    def _lead(self) -> list[str]:
        """What to read out of the curves: the most sensitive group, what is spare, where the recipe went further."""
        curves, top = self.curves, self.order[0]
        first = next((p for p in self.points[top] if curves.loss(p) > curves.small), None)
        free = f"at most {self._small()}"
        if first is None:
            return [
                f"No group on its own costs more than next to nothing ({free}) at any of these ratios.",
                *self._cut(),
            ]
        gone = f"without {_share(first.removed / first.size)} of its {self.unit} and nothing else changed"
        if curves.metric is None:
            happens = f"the output error is {curves.show(first)}"
        else:
            verb = "falls" if self.up else "rises"
            name, whole = words.name_of(curves.metric), words.metric_value(curves.metric)
            happens = f"{name} {verb} from {whole} to {curves.show(first)}" if first.metric is not None else (
                f"{name} is no number any more"
            )  # fmt: skip
        sentences = [f"{top} is the most sensitive: {gone}, {happens}."]
        if curves.ratios[-1] >= 0.5:
            half = sum(curves.spare(group) >= 0.5 for group in self.order)
            found = f"{half} of {len(self.order)} groups may lose half or more, each" if half else (
                "No group may lose half or more"
            )  # fmt: skip
            sentences.append(f"{found} on its own, at next to no cost ({free}).")
        return sentences + self._cut()

    def _cut(self) -> list[str]:
        """Whether the recipe went further than is free."""
        if not self.kept:
            return []
        deep = [group for group in self.order if self._is_deep(group)]
        if not deep:
            return ["Nowhere did the recipe cut deeper than a group can bear alone; together the cuts may cost more."]
        named = ", ".join(deep[:_NAMED]) + (f" and {len(deep) - _NAMED} more" if len(deep) > _NAMED else "")
        return [f"The recipe cut deeper than a group can bear alone in {len(deep)} of {len(self.kept)}: {named}."]

    def _caption(self) -> str:
        curves = self.curves
        after = (
            "the layers behind make up for it as far as they can, nothing is trained"
            if curves.reconstruct
            else "nothing makes up for it"
        )
        return (
            f"{capital(curves.what)}. Each group alone loses {self.unit}, by {curves.criterion}, and {after}. "
            f"Measured in PyTorch on {curves.samples:,} samples"
            f"{' drawn for this: read the drops, not the level' if self.beside else ''}."
        )

    def _small(self) -> str:
        if self.curves.metric is None:
            return f"an output error of {self.curves.small:g}"
        return self._drop(self.curves.small, signed=False)

    def _drop(self, loss: float, *, signed: bool = True) -> str:
        """A loss as a change: "−12 points", "+0.3"."""
        sign = "" if not signed or self.curves.metric is None else (words.MINUS if self.up else "+")
        if self.fraction:
            return f"{sign}{100 * loss:.3g} points"
        unit = "" if self.curves.metric is None else f" {self.curves.metric.get('unit') or ''}"
        return f"{sign}{words.number(loss, 2)}{unit}".strip()

    # -------------------------------------------------------------------------------------------------- the heat map
    def _row(self, group: str) -> Row:
        points = self.points[group]
        size, nearest = points[0].size, self._nearest(group)
        return {
            "name": group,
            "size": f"{size:,}",
            "spare": _share(self.curves.spare(group)),
            "kept": f"{self.kept[group]:,}" if group in self.kept else "",
            "lost": _share(self._gone(group) or 0.0) if group in self.kept else "",
            "deep": self._is_deep(group),
            "inexact": self.curves.inexact.get(group, ""),
            "cells": [
                {
                    "text": self.curves.brief(point),
                    "heat": round(100 * self._heat(point), 1),
                    "cut": number == nearest,
                }
                for number, point in enumerate(points)
            ],
        }

    def _nearest(self, group: str) -> int | None:
        """The ratio that is nearest to what was cut; None where nothing was, or less than half of the first ratio."""
        gone = self._gone(group)
        if not gone:
            return None
        shares = [0.0, *(p.removed / p.size for p in self.points[group])]
        nearest = min(range(len(shares)), key=lambda i: (abs(shares[i] - gone), -i))
        return None if nearest == 0 else nearest - 1

    def _heat(self, point: Point) -> float:
        """0 to 1; the root spreads the small losses, between which one has to choose."""
        return math.sqrt(min(max(self.curves.loss(point) / self.most, 0.0), 1.0))

    # ---------------------------------------------------------------------------------------------------- the charts
    def _chart(self, group: str) -> Row:
        points = self._whole(group)
        shown = [(round(100 * share, 2), self._at(self._drawn(loss))) for share, loss in points]
        line = " ".join(f"{x:g},{y:g}" for x, y in shown)
        base = self._at(self.base)
        return {
            **{k: v for k, v in self._row(group).items() if k != "cells"},
            "line": line,
            "area": f"{shown[0][0]:g},{base:g} {line} {shown[-1][0]:g},{base:g}",
            "dots": [{"x": x, "y": y} for x, y in shown[1:]],
            "mark": self._mark(group),
        }

    def _mark(self, group: str) -> Row | None:
        """Where the recipe went: `x` the share that is gone, `y` on the curve; None beyond its last point."""
        gone = self._gone(group)
        if gone is None:
            return None
        loss = self._loss_at(group, gone)
        return {"x": round(100 * gone, 2), "y": None if loss is None else self._at(self._drawn(loss))}

    def _whole(self, group: str) -> list[tuple[float, float]]:
        """(share gone, loss) from the network as it is on, one for each number of units."""
        found = {0.0: 0.0}
        for point in self.points[group]:
            found[point.removed / point.size] = self.curves.loss(point)
        return sorted(found.items())

    def _loss_at(self, group: str, gone: float) -> float | None:
        """Between two points on the straight line; None beyond the last one."""
        points = self._whole(group)
        shares = [share for share, _ in points]
        number = bisect.bisect_left(shares, gone - 1e-9)
        if number == len(points):
            return None
        if number == 0 or abs(shares[number] - gone) < 1e-9:
            return points[number][1]
        (start, before), (end, after) = points[number - 1], points[number]
        if math.isinf(before) or math.isinf(after):
            return math.inf
        return before + (after - before) * (gone - start) / (end - start)

    # ---------------------------------------------------------------------------------------------------------- scales
    def _gone(self, group: str) -> float | None:
        """The share that the recipe removed."""
        return 1 - self.kept[group] / self.points[group][0].size if group in self.kept else None

    def _is_deep(self, group: str) -> bool:
        gone = self._gone(group)
        if not gone:
            return False
        loss = self._loss_at(group, gone)
        return (self._whole(group)[-1][1] if loss is None else loss) > self.curves.small + 1e-9

    def _most(self) -> float:
        """The loss at the end of the scale: the largest one, unless it dwarfs what most groups come to."""
        largest = [max(self.curves.loss(p) for p in points) for points in self.points.values()]
        finite = [loss for loss in largest if math.isfinite(loss)]
        most = max(finite, default=0.0)
        if not self.fraction and finite and median(finite) > 0:
            most = min(most, 3 * median(finite))
        least = 2.5 * self.curves.small  # so that noise does not look like a disaster
        return max(most, least) or 1.0

    def _is_cut_off(self) -> bool:
        return any(self.curves.loss(p) > self.most * 1.001 for points in self.points.values() for p in points)

    def _value(self, point: Point) -> float | None:
        """The quantity that is drawn, as far as the scale goes."""
        return self._drawn(self.curves.loss(point))

    def _drawn(self, loss: float) -> float:
        loss = min(loss, self.most)
        return self.base - loss if self.up else self.base + loss

    def _at(self, value: float) -> float:
        """Per cent from the top of a chart."""
        return round(100 * (self.high - value) / (self.high - self.low), 2)

    def _ticks(self) -> Sequence[tuple[float, str]]:
        """Round values with their text, but for those that the value of the whole network would cover."""
        scale, unit = (100, " %") if self.fraction else (1, "")
        found = [(v / scale, text + unit) for v, text in nice_ticks(scale * self.low, scale * self.high)]
        return [(v, text) for v, text in found if abs(self._at(v) - self._at(self.base)) > _NEAR]

    def _base_text(self) -> str:
        if self.fraction:
            return f"{100 * self.base:.3g} %"
        return words.number(self.base)


def _columns(count: int) -> int:
    """Charts a row, so that the last row is not nearly empty."""
    return max(count, 2) if count < 4 else min((4, 3), key=lambda columns: (-count % columns, -columns))


def _narrow(ratios: int) -> int:
    """Characters for each of few columns of numbers, so that their common heading has room."""
    return 7 if ratios > 5 else 30 // ratios


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
