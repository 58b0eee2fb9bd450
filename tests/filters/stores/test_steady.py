"""The wall clock is trusted while it goes as the monotonic one does."""

from __future__ import annotations

import pytest

from filters.stores.steady import DOUBT_S, LEAP_S, SteadyClock
from tests.support.harness import FakeClock


def test_a_clock_that_is_corrected_a_little_is_trusted() -> None:
    clock = FakeClock()
    steady = SteadyClock(clock)
    clock.turn(86_400)
    clock._wall += LEAP_S
    assert steady.is_trusted()


@pytest.mark.parametrize("leap_s", [365 * 86_400, -365 * 86_400])
def test_a_clock_that_leapt_is_trusted_again_when_it_has_gone_on_steadily(leap_s: float) -> None:
    clock = FakeClock()
    steady = SteadyClock(clock)
    clock._wall += leap_s
    assert not steady.is_trusted()
    clock.turn(DOUBT_S - 1)
    assert not steady.is_trusted()
    clock.turn(1)
    assert steady.is_trusted()


def test_a_leap_that_was_taken_back_between_two_looks_does_no_harm() -> None:
    clock = FakeClock()
    steady = SteadyClock(clock)
    clock._wall += 365 * 86_400
    clock.turn(60)
    clock._wall -= 365 * 86_400
    assert steady.is_trusted()
