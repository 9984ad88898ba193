"""Fidelity: how much a network still says what the baseline says. Needs no labels.

Per sample: the relative error of the main output, ``‖y - b‖ / ‖b‖`` over everything but the batch; and, where the main
output looks like class scores (n, classes), whether the top choice is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penjing.evaluation.intervals import Scores, mean_interval
from penjing.evaluation.measurement import Metric

_LEAST_NORM = 1e-12
_BEYOND = 1e9


@dataclass(frozen=True)
class Agreement:
    """Per sample: relative error (n,), and agreement of the top choice (n,) where there are classes to choose from."""

    relative_error: Scores
    agreement: Scores | None

    @classmethod
    def joined(cls, parts: Sequence[Agreement]) -> Agreement:
        """Batches one after the other."""
        agreements = [part.agreement for part in parts if part.agreement is not None]
        return cls(
            np.concatenate([part.relative_error for part in parts]),
            np.concatenate(agreements) if len(agreements) == len(parts) else None,
        )

    @property
    def scores(self) -> Scores:
        """What serves as the metric when no task is known: the agreement, else the relative error."""
        return self.relative_error if self.agreement is None else self.agreement

    def metric(self, *, seed: int = 0) -> Metric:
        """``agreement`` (higher is better) where there are classes, else ``relative_error`` (lower is better)."""
        higher = self.agreement is not None
        return Metric.of(
            mean_interval(self.scores, seed=seed),
            name="agreement" if higher else "relative_error",
            unit="%" if higher else "",
            higher_is_better=higher,
        )

    def to_dict(self) -> dict[str, Any]:
        """Means and the worst sample."""
        return {
            "relative_error": float(self.relative_error.mean()),
            "worst_relative_error": float(self.relative_error.max()),
            "agreement": None if self.agreement is None else float(self.agreement.mean()),
            "n": len(self.relative_error),
        }


def compare_outputs(
    reference: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]], *, names: Sequence[str] = ()
) -> Agreement:
    """Compare flat outputs of one batch, batch first; the main one is ``logits``, else the first of floats."""
    main = next((i for i, array in enumerate(reference) if np.issubdtype(array.dtype, np.floating)), 0)
    if "logits" in names:
        main = list(names).index("logits")
    before, after = np.asarray(reference[main]), np.asarray(outputs[main])
    n = before.shape[0] if before.ndim else 1
    flat_before = before.reshape(n, -1).astype(np.float64)
    flat_after = after.reshape(n, -1).astype(np.float64)
    # Equal infinities (masked scores) do not differ; unequal ones differ beyond measure, which must not become NaN.
    difference = np.subtract(flat_after, flat_before, out=np.zeros_like(flat_after), where=flat_after != flat_before)
    norm = np.linalg.norm(np.where(np.isfinite(flat_before), flat_before, 0.0), axis=1)
    error = np.nan_to_num(np.linalg.norm(difference, axis=1) / np.maximum(norm, _LEAST_NORM), posinf=_BEYOND)
    if not np.issubdtype(before.dtype, np.floating):
        return Agreement(error, (flat_before == flat_after).mean(axis=1))
    if before.ndim != 2 or before.shape[-1] < 2:
        return Agreement(error, None)
    return Agreement(error, (before.argmax(axis=-1) == after.argmax(axis=-1)).astype(np.float64))
