"""Time and timers: the machine's, and the one that tests turn by hand."""

from __future__ import annotations

import asyncio
import time

import pytest

from sidecar.clock import Clock, SystemClock
from tests.support.harness import FakeClock


async def test_clock_of_the_machine_calls_once_after_the_delay() -> None:
    clock: Clock = SystemClock()
    called: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    begun = clock.monotonic()
    clock.call_later(0.01, lambda: called.set_result(clock.monotonic()))
    assert not called.done()
    async with asyncio.timeout(5.0):
        assert await called - begun >= 0.009


async def test_timer_of_the_machine_that_is_cancelled_does_not_call() -> None:
    clock = SystemClock()
    called: list[str] = []
    timer = clock.call_later(0.0, lambda: called.append("cancelled"))
    timer.cancel()
    timer.cancel()
    await clock.sleep(0.005)
    assert called == []


def test_clock_of_the_machine_has_both_its_readings() -> None:
    clock = SystemClock()
    assert clock.monotonic() == pytest.approx(time.monotonic(), abs=5.0)
    assert clock.wall() == pytest.approx(time.time(), abs=5.0)


# The clock of the tests


def test_timers_fire_when_the_clock_is_turned_past_them_in_the_order_of_their_times() -> None:
    clock, called = FakeClock(), list[str]()
    clock.call_later(2.0, lambda: called.append("two"))
    clock.call_later(1.0, lambda: called.append("one"))
    clock.call_later(3.5, lambda: called.append("later"))
    clock.turn(0.5)
    assert called == []
    clock.turn(2.5)
    assert called == ["one", "two"]
    clock.turn(0.5)
    assert called == ["one", "two", "later"]
    clock.turn(10.0)
    assert called == ["one", "two", "later"]


def test_timer_that_is_cancelled_never_fires_not_even_by_one_of_the_same_turn() -> None:
    clock, called = FakeClock(), list[str]()

    def fire() -> None:
        called.append("first")
        second.cancel()

    first = clock.call_later(1.0, fire)
    second = clock.call_later(2.0, lambda: called.append("second"))
    clock.turn(5.0)
    assert called == ["first"]
    first.cancel()  # late, and twice: harmless
    second.cancel()


def test_timer_may_set_itself_again() -> None:
    clock, called = FakeClock(), list[float]()

    def again() -> None:
        called.append(clock.monotonic())
        clock.call_later(1.0, again)

    clock.call_later(1.0, again)
    for _ in range(3):
        clock.turn(1.0)
    assert called == [1_001.0, 1_002.0, 1_003.0]


async def test_turning_wakes_sleepers_and_moves_both_readings() -> None:
    clock = FakeClock(monotonic=10.0, wall=100.0)
    sleeping = asyncio.ensure_future(clock.sleep(2.0))
    await asyncio.sleep(0)
    clock.turn(1.0)
    await asyncio.sleep(0)
    assert not sleeping.done()
    clock.turn(1.0)
    await sleeping
    assert (clock.monotonic(), clock.wall()) == (12.0, 102.0)
