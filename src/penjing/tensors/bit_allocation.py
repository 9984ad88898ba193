"""Which width for which layer: the choice of least harm whose costs fit, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

_SCALINGS = 4
_HOPELESS = 1e4


def least_harm(
    harms: Sequence[Sequence[float]], costs: Sequence[tuple[Sequence[Sequence[float]], float]]
) -> list[int] | None:
    """For every layer the index of its option, so that the sum of harms is least and no sum of costs is over its limit.

    `harms[layer][option]`; `costs` is a list of (cost[layer][option], limit). Layers may have different numbers of
    options. None if no choice fits. An integer programme with one binary variable an option (HAWQ-V3, Yao et al. 2021,
    §3.4), solved by HiGHS.

    Raises ValueError for a layer without options and for numbers that are not finite.
    """
    if not harms or any(not row for row in harms):
        raise ValueError("every layer needs at least one option")
    sizes = [len(row) for row in harms]
    objective = np.concatenate([np.asarray(row, dtype=float) for row in harms])
    spent = [np.concatenate([np.asarray(row, dtype=float) for row in table]) for table, _ in costs]
    if any(len(row) != len(objective) for row in spent):
        raise ValueError("every option needs a cost")
    if not all(np.isfinite(row).all() for row in (objective, *spent)):
        raise ValueError("harms and costs must be finite")
    owner = np.repeat(np.arange(len(sizes)), sizes)
    one = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    # Scaled to about 1: the solver's tolerances are absolute.
    rows = [
        csr_array(row[None] / max(1e-300, abs(limit), row.max())) for row, (_, limit) in zip(spent, costs, strict=True)
    ]
    ends = [limit / max(1e-300, abs(limit), row.max()) for row, (_, limit) in zip(spent, costs, strict=True)]
    constraints = LinearConstraint(
        vstack([one, *rows]),
        np.concatenate([np.ones(len(sizes)), np.full(len(rows), -np.inf)]),
        np.concatenate([np.ones(len(sizes)), ends]),
    )
    scale = max(1e-300, float(np.abs(objective).max()))
    # The solver stops within 1e-6 of the best, and harms differ by more than that factor: one is to be about the least
    # sum, which fractions of options give nearly; what alone does far more harm than that is not told apart.
    for _ in range(_SCALINGS):
        scaled = np.minimum(objective / scale, _HOPELESS)
        relaxed = milp(scaled, bounds=Bounds(0, 1), constraints=constraints)
        if relaxed.x is None:
            return None
        scale *= max(1e-12, float(relaxed.fun))
    found = milp(
        np.minimum(objective / scale, _HOPELESS),
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:
        return None
    return [int(part.argmax()) for part in np.split(found.x, np.cumsum(sizes)[:-1])]
