"""No window of a period ever holds more than the limit, and a refusal says how long to wait."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from filters.algo.window import BUCKETS, Bucket, Window

PERIOD_US = 60_000_000
WIDTH_US = PERIOD_US // BUCKETS


class Taken(NamedTuple):
    at_us: int
    amount: int


def take(window: Window, now_us: int, amount: int, limit: int) -> Bucket | None:
    if window.wait_us(now_us, amount, limit):
        return None
    return window.charge(now_us, amount)


def settle(window: Window, now_us: int, bucket: Bucket, charged: int, amount: int) -> None:
    """What was `charged` into `bucket` was really `amount`; more is a debt of now."""
    if amount > charged:
        window.charge(now_us, amount - charged)
    else:
        window.give_back(bucket, charged - amount)


def most_in_any_window(taken: list[Taken], period_us: int) -> int:
    """Every window that holds the most ends with one of them."""
    return max(
        (
            sum(each.amount for each in taken if last.at_us - period_us < each.at_us <= last.at_us)
            for last in taken
        ),
        default=0,
    )


periods = st.integers(1, 2 * PERIOD_US)
limits = st.integers(1, 50)


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A period, and pauses before amounts: many together, and whole periods apart."""
    period_us = draw(periods)
    pause = st.one_of(
        st.integers(0, 3), st.integers(0, period_us // 30 + 1), st.integers(0, 2 * period_us)
    )
    return period_us, draw(st.lists(st.tuples(pause, st.integers(0, 60)), max_size=80))


@given(arrivals(), limits)
def test_no_window_of_a_period_holds_more_than_the_limit(
    arrived: tuple[int, list[tuple[int, int]]], limit: int
) -> None:
    period_us, pauses = arrived
    window, now_us, taken = Window(period_us), 0, []
    for pause_us, amount in pauses:
        now_us += pause_us
        if take(window, now_us, amount, limit) is not None:
            taken.append(Taken(now_us, amount))
    assert most_in_any_window(taken, period_us) <= limit


@given(arrivals(), limits, st.data())
def test_amounts_that_were_settled_down_never_exceed_the_limit_in_any_window(
    arrived: tuple[int, list[tuple[int, int]]], limit: int, data: st.DataObject
) -> None:
    period_us, pauses = arrived
    window, now_us = Window(period_us), 0
    taken: list[Taken] = []
    open_ones: list[tuple[int, Bucket]] = []
    for pause_us, amount in pauses:
        now_us += pause_us
        bucket = take(window, now_us, amount, limit)
        if bucket is not None:
            open_ones.append((len(taken), bucket))
            taken.append(Taken(now_us, amount))
        if open_ones and data.draw(st.booleans()):
            index, bucket = open_ones.pop(data.draw(st.integers(0, len(open_ones) - 1)))
            really = data.draw(st.integers(0, taken[index].amount))
            settle(window, now_us, bucket, taken[index].amount, really)
            taken[index] = Taken(taken[index].at_us, really)
    assert most_in_any_window(taken, period_us) <= limit
    assert window.used >= 0


@given(arrivals(), limits)
def test_wait_of_a_refusal_is_exact(arrived: tuple[int, list[tuple[int, int]]], limit: int) -> None:
    period_us, pauses = arrived
    window, now_us = Window(period_us), 0
    for pause_us, amount in pauses:
        now_us += pause_us
        wait_us = window.wait_us(now_us, amount, limit)
        if wait_us > 0:
            assert window.wait_us(now_us + wait_us - 1, amount, limit) == 1
            assert window.wait_us(now_us + wait_us, amount, limit) == 0
            now_us += wait_us
        assert (wait_us == -1) == (amount > limit)
        if wait_us >= 0:
            window.charge(now_us, amount)


@given(arrivals())
def test_it_keeps_no_more_than_62_buckets(arrived: tuple[int, list[tuple[int, int]]]) -> None:
    period_us, pauses = arrived
    window, now_us = Window(period_us), 0
    for pause_us, amount in pauses * 3:
        now_us += pause_us
        window.wait_us(now_us, amount, 10**9)
        window.charge(now_us, amount)
        assert len(window._buckets) <= BUCKETS + 2


@given(arrivals())
def test_what_is_used_is_never_more_than_it_says(
    arrived: tuple[int, list[tuple[int, int]]],
) -> None:
    period_us, pauses = arrived
    window, now_us = Window(period_us), 0
    for pause_us, amount in pauses:
        now_us += pause_us
        said = window.used
        window.wait_us(now_us, 0, 0)
        assert window.used <= said
        window.charge(now_us, amount)
        assert len(window._buckets) <= BUCKETS + 2


def test_a_double_burst_around_the_border_of_a_minute_is_refused() -> None:
    window = Window(PERIOD_US)
    before, after = PERIOD_US - 1_000, PERIOD_US + 1_000
    assert sum(take(window, before, 1, 100) is not None for _ in range(150)) == 100
    assert sum(take(window, after, 1, 100) is not None for _ in range(150)) == 0


def test_evenly_spread_calls_at_the_limit_are_all_granted() -> None:
    window = Window(PERIOD_US)
    assert all(take(window, second * 1_000_000, 1, 60) for second in range(300))


def test_a_charge_leaves_after_a_period_and_no_later_one_renews_it() -> None:
    window = Window(PERIOD_US)
    window.charge(0, 50)
    for second in range(1, 60):
        window.charge(second * 1_000_000, 1)
    assert window.wait_us(PERIOD_US - 1, 0, 10**9) == 0
    assert window.used == 109
    assert window.wait_us(PERIOD_US, 0, 10**9) == 0
    assert window.used == 59


def test_charges_close_together_leave_a_sixtieth_of_the_period_late_at_most() -> None:
    window = Window(PERIOD_US)
    for now_us in range(0, WIDTH_US, 1_000):
        window.charge(now_us, 1)
    assert len(window._buckets) == 1
    assert window.is_idle(PERIOD_US + WIDTH_US)


def test_what_is_given_back_is_free_at_once() -> None:
    window = Window(PERIOD_US)
    bucket = window.charge(0, 100)
    window.charge(5_000_000, 0)
    settle(window, 5_000_000, bucket, 100, 30)
    assert window.used == 30
    assert window.wait_us(5_000_000, 70, 100) == 0


def test_nothing_is_given_back_of_what_counts_no_more() -> None:
    window = Window(PERIOD_US)
    bucket = window.charge(0, 100)
    window.charge(PERIOD_US, 40)
    settle(window, PERIOD_US, bucket, 100, 0)
    assert window.used == 40


def test_a_debt_counts_from_now_on_and_later_ones_wait_for_it() -> None:
    window = Window(PERIOD_US)
    bucket = window.charge(0, 50)
    settle(window, 30_000_000, bucket, 50, 250)
    assert window.used == 250
    assert window.wait_us(30_000_000, 1, 100) == 60_000_000
    assert window.wait_us(60_000_000, 1, 100) == 30_000_000
    assert window.wait_us(90_000_000, 1, 100) == 0


def test_changed_limit_applies_to_what_was_counted() -> None:
    window = Window(PERIOD_US)
    window.charge(0, 50)
    assert window.wait_us(1_000_000, 1, 50) > 0
    assert window.wait_us(1_000_000, 1, 51) == 0
    assert window.wait_us(1_000_000, 1, 20) > 0


def test_a_clock_that_goes_back_frees_nothing() -> None:
    window = Window(PERIOD_US)
    window.charge(10_000_000, 100)
    assert window.wait_us(9_000_000, 1, 100) == 61_000_000
    window.charge(9_000_000, 1)
    assert window.wait_us(69_999_999, 1, 1) == 1
