from __future__ import annotations

import pytest

from penjing.tensors.allocation import CostModel, Share, along_curves, greedy, refill, rounded, uniform

SIZES = {"a": 16, "b": 32}


def chain() -> CostModel:
    """input 3 → a → b → output 10, linear layers."""
    return CostModel(
        0,
        [
            Share(16 * 3, (16, 3), {0: (("a", 1),)}),
            Share(32 * 16, (32, 16), {0: (("b", 1),), 1: (("a", 1),)}),
            Share(10 * 32, (10, 32), {1: (("b", 1),)}),
        ],
    )


def test_the_model_is_exact_for_layers() -> None:
    assert chain().total({}) == 48 + 512 + 320
    assert chain().total({"a": 6, "b": 12}) == pytest.approx(10 * 3 + 20 * 10 + 10 * 20)
    assert chain().saving({"a": 6}, "b", 12) == pytest.approx(12 * 10 + 10 * 12)


@pytest.mark.parametrize(("count", "wanted"), [(5, 8), (8, 8), (9, 16), (0, 8), (31, 32)])
def test_counts_are_rounded_up(count: int, wanted: int) -> None:
    assert rounded(count, 32, 8, 1) == wanted


def test_rounding_never_exceeds_the_group() -> None:
    assert rounded(9, 10, 8, 1) == 10 and rounded(0, 3, None, 5) == 3


def test_uniform_takes_the_same_share() -> None:
    assert uniform(SIZES, 0.25, None, 1) == {"a": 12, "b": 24}


def test_greedy_reaches_the_limit_and_spares_what_hurts() -> None:
    model = chain()
    cheap, dear = [0.01 * i for i in range(17)], [1.0 * i for i in range(33)]
    kept = greedy(SIZES, {"a": cheap, "b": dear}, [(model, 500)], None, 2)
    gone = {g: SIZES[g] - k for g, k in kept.items()}
    assert model.total(gone) <= 500
    assert kept["b"] == 32 or kept["a"] == 2  # the dear group is touched only when the cheap one has nothing left
    assert kept["a"] < 16


def test_greedy_holds_both_limits() -> None:
    first, second = chain(), CostModel(0, [Share(100.0, (32, 1), {0: (("b", 1),)})])
    curves = {"a": [float(i) for i in range(17)], "b": [float(i * i) for i in range(33)]}
    kept = greedy(SIZES, curves, [(first, 600), (second, 60)], None, 1)
    gone = {g: SIZES[g] - k for g, k in kept.items()}
    assert first.total(gone) <= 600 and second.total(gone) <= 60


def test_greedy_moves_in_multiples() -> None:
    curves = {"a": [float(i) for i in range(17)], "b": [float(i) for i in range(33)]}
    kept = greedy(SIZES, curves, [(chain(), 400)], 8, 1)
    assert all(k % 8 == 0 for k in kept.values())


def test_greedy_stops_when_nothing_is_left() -> None:
    curves = {"a": [0.0] * 17, "b": [0.0] * 33}
    assert greedy(SIZES, curves, [(chain(), 0)], None, 4) == {"a": 4, "b": 4}


@pytest.mark.parametrize("round_to", [None, 4])
def test_what_a_large_unit_saved_too_much_is_given_back(round_to: int | None) -> None:
    """A unit of "heads" is a quarter of its layer; "hidden" has units fine enough to fill what that leaves."""
    sizes = {"heads": 4, "hidden": 64}
    model = CostModel(10, [Share(1000.0, (32,), {0: (("heads", 8),)}), Share(640.0, (64,), {0: (("hidden", 1),)})])
    other = CostModel(0, [Share(64.0, (64,), {0: (("hidden", 1),)})])
    curves = {"heads": [200.0 * i for i in range(5)], "hidden": [0.1 * i * i for i in range(65)]}
    limits = [(model, 1200.0), (other, 60.0)]
    kept = greedy(sizes, curves, limits, round_to, 1)
    assert kept == greedy(dict(reversed(sizes.items())), curves, limits, round_to, 1)

    def fits(counts: dict[str, int]) -> bool:
        return all(m.total({g: sizes[g] - k for g, k in counts.items()}) <= limit for m, limit in limits)

    assert fits(kept)
    if round_to is None:
        assert kept == {"heads": 3, "hidden": 44}  # 250 of the 450 to save, 200 more from units of 10
    for group in sizes:
        more = min(kept[group] + (round_to or 1), sizes[group])
        assert more == kept[group] or not fits({**kept, group: more}), group
    assert refill(sizes, kept, curves, limits, round_to) == kept


def test_curves_are_followed_where_they_are_flattest() -> None:
    curves = {"steep": [(0, 0.0), (5, 5.0), (10, 20.0)], "flat": [(0, 0.0), (5, 0.1), (8, 0.2), (10, 50.0)]}
    assert along_curves(curves, 8) == {"steep": 0, "flat": 8}
    assert along_curves(curves, 11) == {"steep": 3, "flat": 8}
    assert along_curves(curves, 20) == {"steep": 10, "flat": 10}
    assert along_curves(curves, 0) == {"steep": 0, "flat": 0}


def test_a_dent_in_a_curve_is_bridged() -> None:
    curves = {"dented": [(5, 10.0), (10, 10.5)], "even": [(10, 15.0)]}
    assert along_curves(curves, 10) == {"dented": 10, "even": 0}
