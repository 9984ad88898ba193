"""Interleaved timing with a clock of our own: the schedule and the arithmetic, no real time."""

import numpy as np
import pytest

from penjing.errors import InputError
from penjing.evaluation.latency import LatencySettings, Ratio, Timings, compare, interleave


class Machine:
    """A clock that only moves when a session runs; it can slow everything down from some moment on."""

    def __init__(self, slow_from_ms: float = float("inf")) -> None:
        self.now = 0
        self.order: list[str] = []
        self.slow_from = slow_from_ms * 1e6

    def session(self, name: str, ms: float):
        def run() -> None:
            factor = 3 if self.now >= self.slow_from else 1
            self.now += int(ms * factor * 1e6)
            self.order.append(name)

        return run

    def clock(self) -> int:
        return self.now


def test_every_call_is_timed_for_what_it_is() -> None:
    machine = Machine()
    runs = {"a": machine.session("a", 1.0), "b": machine.session("b", 4.0)}
    found = interleave(runs, clock=machine.clock)
    assert found["a"].p50 == pytest.approx(1.0)
    assert found["b"].p95 == pytest.approx(4.0)
    assert compare(found["a"], found["b"]).value == pytest.approx(0.25)
    assert found["a"].n == len(found["a"].calls) > 50


def test_sessions_take_turns_in_changing_order() -> None:
    machine = Machine()
    interleave({name: machine.session(name, 20.0) for name in "abc"}, clock=machine.clock)
    turns = "".join(machine.order)[3 * 11 :]  # after warm-up: blocks of one discarded and one timed call
    rounds = [turns[i : i + 6 : 2] for i in range(0, len(turns), 6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1


def test_a_machine_that_slows_down_midway_does_not_change_the_ratio() -> None:
    machine = Machine(slow_from_ms=300)
    found = interleave({"a": machine.session("a", 2.0), "b": machine.session("b", 3.0)}, clock=machine.clock)
    ratio = compare(found["a"], found["b"])
    assert found["b"].calls.max() == pytest.approx(9.0)
    assert found["b"].calls.min() == pytest.approx(3.0)
    assert ratio.low <= 2 / 3 + 1e-9 and ratio.high >= 2 / 3 - 1e-9
    assert ratio.verdict == "faster"


def test_slow_sessions_get_fewer_rounds_but_enough() -> None:
    machine = Machine()
    found = interleave({"a": machine.session("a", 2000.0)}, clock=machine.clock, settings=LatencySettings(warm_up=1))
    assert len(found["a"].rounds) == 9


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.5, 0.9, "faster"), (1.1, 1.3, "slower"), (0.9, 1.1, "no measurable difference")],
)
def test_a_ratio_says_what_it_means(low: float, high: float, words: str) -> None:
    assert Ratio(value=(low + high) / 2, low=low, high=high).verdict == words


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="nothing to time"):
        interleave({})
    with pytest.raises(InputError, match="warm_up"):
        LatencySettings(warm_up=0)
    one = Timings(np.ones(3), np.ones(3))
    with pytest.raises(InputError, match="same rounds"):
        compare(one, Timings(np.ones(3), np.ones(2)))
