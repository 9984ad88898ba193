"""The choice of widths: against every choice there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from penjing.tensors.bit_allocation import exchanged, least_harm


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("constraints", [1, 2])
def test_no_choice_that_fits_does_less_harm(seed: int, constraints: int) -> None:
    random = np.random.default_rng(seed)
    options = random.integers(1, 4, 6)
    harms = [list(random.exponential(size=n) * 10.0 ** random.integers(-6, 6)) for n in options]
    tables = [[list(random.uniform(0, 1e6, n)) for n in options] for _ in range(constraints)]
    limits = [float(np.mean([sum(map(max, t)), sum(map(min, t))])) for t in tables]

    def total(table: list[list[float]], choice: tuple[int, ...] | list[int]) -> float:
        return sum(row[i] for row, i in zip(table, choice, strict=True))

    def fits(choice: tuple[int, ...] | list[int]) -> bool:
        return all(total(t, choice) <= limit for t, limit in zip(tables, limits, strict=True))

    possible = [c for c in itertools.product(*map(range, options)) if fits(c)]
    chosen = least_harm(harms, list(zip(tables, limits, strict=True)))
    if not possible:
        assert chosen is None
        return
    assert chosen is not None and fits(chosen)
    assert total(harms, chosen) <= min(total(harms, c) for c in possible) * (1 + 1e-5)


def test_harms_of_all_sizes_are_told_apart() -> None:
    """A budget is used up even where one option's harm is a million times the sum of the best ones."""
    random = np.random.default_rng(0)
    base = random.exponential(size=40) * 10.0 ** random.uniform(-9, -3, 40)
    harms = [[h * 256.0**-i for i in (3, 2, 1, 0)] for h in base]
    harms[0] = [1e-12, 1e-9, 1e-6, 1e3]
    costs = [[8.0, 6.0, 4.0, 2.0]] * 40
    chosen = least_harm(harms, [(costs, 4.0 * 40)])
    assert chosen is not None
    spent = sum(row[i] for row, i in zip(costs, chosen, strict=True))
    assert 158.0 <= spent <= 160.0
    total = sum(row[i] for row, i in zip(harms, chosen, strict=True))
    for a, b in itertools.permutations(range(40), 2):  # no exchange of one step between two layers is better
        if chosen[a] > 0 and chosen[b] < 3:
            other = (
                total - harms[a][chosen[a]] - harms[b][chosen[b]] + harms[a][chosen[a] - 1] + harms[b][chosen[b] + 1]
            )
            assert other >= total * (1 - 1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_exchanges_end_where_no_pair_helps(seed: int) -> None:
    """Harms that do not add up, against the sum itself over every choice within two exchanges; limits hold."""
    random = np.random.default_rng(seed)
    sizes = [3, 2, 4, 3, 1]
    first = np.cumsum([0, *sizes[:-1]])
    rows = random.normal(size=(sum(sizes), 6)) * 10.0 ** random.uniform(-1, 1, (sum(sizes), 1))
    gram = rows @ rows.T
    table = [list(random.uniform(0, 1, n)) for n in sizes]
    start = [int(np.argmin(row)) for row in table]
    costs = [(table, 0.7 * sum(map(max, table)))]

    def harm(choice: tuple[int, ...] | list[int]) -> float:
        return float(rows[first + np.asarray(choice)].sum(0) @ rows[first + np.asarray(choice)].sum(0))

    def fits(choice: tuple[int, ...] | list[int]) -> bool:
        return sum(row[i] for row, i in zip(table, choice, strict=True)) <= costs[0][1]

    found = exchanged(gram, sizes, start, costs)
    assert fits(found) and harm(found) < harm(start)
    near = [
        c
        for c in itertools.product(*map(range, sizes))
        if fits(c) and sum(a != b for a, b in zip(c, found, strict=True)) <= 2
    ]
    assert harm(found) <= min(map(harm, near)) * (1 + 1e-6)
    assert exchanged(gram, sizes, found, costs) == found


def test_exchanges_of_one_layer_alone() -> None:
    assert exchanged(np.diag([3.0, 1.0]), [2], [0], []) == [0]  # a pair is two layers
    assert exchanged(np.diag([3.0, 1.0, 5.0, 2.0]), [2, 2], [0, 0], []) == [1, 1]


def test_what_cannot_fit() -> None:
    assert least_harm([[1.0, 2.0]], [([[5.0, 4.0]], 3.0)]) is None
    assert least_harm([[1.0, 2.0]], [([[5.0, 4.0]], 4.0)]) == [1]
    assert least_harm([[2.0, 1.0], [3.0]], []) == [1, 0]


@pytest.mark.parametrize(
    ("harms", "costs"),
    [([], []), ([[1.0], []], []), ([[math.nan]], []), ([[1.0]], [([[math.inf]], 1.0)]), ([[1.0]], [([[]], 1.0)])],
)
def test_bad_tables_are_refused(harms: list[list[float]], costs: list[tuple[list[list[float]], float]]) -> None:
    with pytest.raises(ValueError, match="option|finite"):
        least_harm(harms, costs)
