"""Which width for which layer: the choice of least harm whose costs fit.

Exactly where harms add up, and from there by exchanges where they do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

_SCALINGS = 4
_HOPELESS = 1e4


#: (cost[layer][option], limit) of everything that has a limit.
Costs = Sequence[tuple[Sequence[Sequence[float]], float]]


def least_harm(harms: Sequence[Sequence[float]], costs: Costs) -> list[int] | None:
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


def exchanged(together: NDArray[np.float64], sizes: Sequence[int], chosen: Sequence[int], costs: Costs) -> list[int]:
    """`chosen` after exchanges of one or two layers' options at a time, the best first, as long as one lowers the sum
    of `together` (options, options; all layers' options one after the other, `sizes` of each) over the rows and columns
    chosen, and no sum of costs is over its limit.

    A local optimum of the quadratic programme for harms that do not just add up. `chosen` has to fit.
    """
    owner = np.repeat(np.arange(len(sizes)), sizes)
    first = np.cumsum([0, *sizes[:-1]])
    spent = [(np.concatenate([np.asarray(row, dtype=float) for row in table]), limit) for table, limit in costs]
    now = first + np.asarray(chosen)
    apart = owner[:, None] != owner[None]
    while True:
        old = now[owner]  # by option, what its layer has now
        single = 2 * (together[:, now].sum(1) - together[old][:, now].sum(1))
        mixed = together - together[old] - together[:, old] + together[np.ix_(old, old)]
        single += mixed.diagonal()
        # A pair in which one layer keeps what it has is an exchange of the other alone.
        gains = np.where(apart, single[:, None] + single[None] + 2 * mixed, np.inf)
        for cost, limit in spent:
            more = cost - cost[old]
            gains[more[:, None] + more[None] + cost[now].sum() > limit * (1 + 1e-12)] = np.inf
        a, b = np.unravel_index(int(gains.argmin()), gains.shape)
        if not gains[a, b] < -1e-9 * abs(together[np.ix_(now, now)].sum()):
            return [int(n - f) for n, f in zip(now, first, strict=True)]
        now[owner[[a, b]]] = a, b
