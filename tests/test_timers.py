"""What is made of the seconds that calls take, by a clock that the test sets: medians, turns, what is taken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from jointopt.cost.operators import Operator
from jointopt.timing import timers
from jointopt.timing.backend import Backend
from jointopt.timing.timers import EACH, LEAST, in_turns, time_export, time_exports, time_operators
from quant.formats import scheme


class Clock:
    """Time passes by what is called alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def call(self, name: str, seconds: Iterator[float] | float) -> Callable[[], None]:
        def called() -> None:
            self.called.append(name)
            self.now += seconds if isinstance(seconds, float) else next(seconds)

        return called


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: found.now, monotonic=lambda: found.now))
    return found


def test_calls_take_turns_and_the_first_two_of_each_do_not_count(clock):
    first, second = clock.call("a", iter([90.0, 70.0, 1, 9, 2])), clock.call("b", iter([80.0, 60.0, 3, 3, 20]))
    assert in_turns([first, second], rounds=3) == [2, 3]
    assert clock.called == ["a", "b"] * 5


def test_calls_go_on_for_as_many_seconds_as_are_asked_for(clock):
    assert in_turns([clock.call("a", 0.25), clock.call("b", 0.75)], rounds=1, least=20) == [0.25, 0.75]
    assert clock.now == 20 and len(clock.called) == 2 * 20


def test_exports_are_timed_as_if_the_machine_had_been_as_fast_for_all(clock, monkeypatch):
    """It is a fifth as fast for the second, half as fast for the third."""
    paces, pace, asked = iter([1.0, 5.0, 2.0]), [0.0], []

    def run_of(folder: float, inputs: object, backend: Backend) -> Callable[[], None]:
        pace[0] = next(paces)

        def run() -> None:
            asked.append(folder)
            clock.now += folder * pace[0]

        return run

    monkeypatch.setattr(timers, "run_of_export", run_of)
    assert time_exports(iter([1.0, 3.0, 0.5]), {}, Backend(), rounds=2, least=0.0) == [2.0, 6.0, 1.0]
    assert asked == [1.0] * 8 + [3.0, 1.0] * 4 + [0.5, 1.0] * 4


def test_an_export_of_some_milliseconds_is_timed_for_a_second(clock, monkeypatch):
    monkeypatch.setattr(timers, "run_of_export", lambda *given: clock.call("run", 2**-7))
    assert time_export("folder", {}, Backend(), rounds=3) == 2**-7
    assert clock.now >= LEAST


def test_calling_the_backend_and_a_reader_s_rounding_are_taken_off_what_an_operator_takes(monkeypatch):
    """A fused convolution is timed with its reader's rounding, that by itself too, and last what does nothing."""
    static = scheme("W8A8_STATIC")
    asked = [Operator("conv", 8, 8, 16, area=9, scheme=static, reader=static), Operator("linear", 8, 8, 4)]
    made, least = [], []

    def timed(seconds: list[float]) -> list[float]:
        def turns(calls: list, rounds: int, at_least: float) -> list[float]:
            made.append([type(call).__name__.strip("_") for call in calls])
            least.append(at_least)
            return seconds

        monkeypatch.setattr(timers, "in_turns", turns)
        return time_operators(asked, 1, Backend())

    monkeypatch.setattr(timers, "_sessions", lambda modules, inputs, backend: list(modules))
    assert timed([10.0, 4.0, 3.0, 1.0]) == [10 - 1 - (3 - 1), 4 - 1]
    assert timed([1.5, 0.5, 3.0, 1.0]) == [0, 0]
    assert made[0] == ["Fused", "Linear", "Rounding", "Identity"] and least[0] == max(LEAST, 4 * EACH)
