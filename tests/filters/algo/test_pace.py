"""Charges are spread evenly over the period, with no more than a burst at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from filters.algo.pace import Pace

SECOND_US = 1_000_000

arrivals = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3), st.integers(0, 300_000), st.integers(0, 3 * SECOND_US)),
        st.integers(1, 12),
    ),
    max_size=80,
)


@given(arrivals, st.integers(1, 200), st.integers(1, 10))
def test_no_stretch_of_time_holds_more_than_a_burst_and_the_even_rate(
    pauses: list[tuple[int, int]], limit: int, burst: int
) -> None:
    burst = min(burst, limit)  # above it, the window is what holds
    pace, now_us = Pace(SECOND_US), 0
    taken: list[tuple[int, int]] = []
    for pause_us, amount in pauses:
        now_us += pause_us
        if pace.wait_us(now_us, amount, limit, burst) == 0:
            pace.charge(now_us, amount, limit)
            taken.append((now_us, amount))
    for first in range(len(taken)):
        total = 0
        for at_us, amount in taken[first:]:
            total += amount
            assert (total - burst) * SECOND_US <= (at_us - taken[first][0]) * limit


@given(arrivals, st.integers(1, 200), st.integers(1, 10))
def test_wait_is_exact(pauses: list[tuple[int, int]], limit: int, burst: int) -> None:
    pace, now_us = Pace(SECOND_US), 0
    for pause_us, amount in pauses:
        now_us += pause_us
        wait_us = pace.wait_us(now_us, amount, limit, burst)
        assert (wait_us == -1) == (amount > burst)
        if wait_us > 0:
            assert pace.wait_us(now_us + wait_us - 1, amount, limit, burst) == 1
            now_us += wait_us
        if wait_us >= 0:
            assert pace.wait_us(now_us, amount, limit, burst) == 0
            assert pace.room(now_us, limit, burst) >= amount
            pace.charge(now_us, amount, limit)


def test_a_burst_is_there_again_after_its_time() -> None:
    pace = Pace(SECOND_US)
    granted = 0
    while pace.wait_us(0, 1, 10, 3) == 0:
        pace.charge(0, 1, 10)
        granted += 1
    assert granted == 3
    assert pace.room(0, 10, 3) == 0
    assert pace.wait_us(0, 1, 10, 3) == 100_000
    assert pace.room(100_000, 10, 3) == 1
    assert pace.room(300_000, 10, 3) == 3


def test_a_lower_limit_does_not_wait_longer_than_a_period_for_what_a_higher_one_charged() -> None:
    pace = Pace(SECOND_US)
    for _ in range(3_000):
        pace.charge(0, 1, 6_000)
    assert pace.wait_us(0, 1, 60, 10) == round(SECOND_US * 51 / 60)
    assert pace.wait_us(SECOND_US, 10, 60, 10) == 0


def test_nothing_passes_at_a_rate_of_zero() -> None:
    assert Pace(SECOND_US).wait_us(0, 6, 0, 5) == -1


def test_a_clock_that_goes_back_frees_nothing() -> None:
    pace = Pace(SECOND_US)
    pace.charge(5 * SECOND_US, 3, 10)
    assert pace.wait_us(4 * SECOND_US, 1, 10, 3) == SECOND_US + 100_000
