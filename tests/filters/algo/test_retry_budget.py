"""Retries stay a share of the calls, whatever their order; a quiet upstream gets some, too."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.retry_budget import KEPT_S, RetryBudget


def budget(share: float = 0.2, min_per_s: float = 1.0) -> RetryBudget:
    return RetryBudget(share=share, min_per_s=min_per_s, now=0.0)


@given(
    steps=st.lists(
        st.tuples(st.floats(0.0, 5.0), st.sampled_from(["first", "retry", "charge"])), max_size=200
    ),
    share=st.floats(0.0, 1.0),
    min_per_s=st.floats(0.0, 5.0),
)
def test_retries_never_exceed_what_the_calls_and_the_time_have_paid_for(
    steps: list[tuple[float, str]], share: float, min_per_s: float
) -> None:
    mine, now, firsts, retries = budget(share, min_per_s), 0.0, 0, 0
    for elapsed_s, step in steps:
        now += elapsed_s
        if step == "first":
            mine.deposit(now)
            firsts += 1
        elif step == "retry":
            retries += mine.take(now)
        else:
            mine.charge(now)
        assert retries <= min_per_s * KEPT_S + share * firsts + min_per_s * now + 1e-6


def test_when_everything_fails_a_fifth_of_the_calls_is_retried() -> None:
    mine, taken = budget(), 0
    for number in range(60_000):  # a minute of 1,000 calls a second, each wanting three retries
        now = number / 1000
        mine.deposit(now)
        taken += sum(mine.take(now) for _ in range(3))
    assert 0.2 * 60_000 <= taken <= 0.2 * 60_000 + 10 + 60


def test_a_few_calls_an_hour_are_retried_all_the_same() -> None:
    mine = budget()
    for hour in range(5):
        now = hour * 3600.0
        mine.deposit(now)
        assert [mine.take(now) for _ in range(3)] == [True] * 3


def test_empty_budget_refuses_and_fills_with_time_alone() -> None:
    mine = budget()
    assert sum(mine.take(0.0) for _ in range(100)) == 10
    assert not mine.take(0.0)
    assert mine.take(2.0)


def test_ten_good_minutes_do_not_pay_for_a_storm() -> None:
    mine = budget()
    for number in range(60_000):  # ten minutes of 100 calls a second
        mine.deposit(number / 100)
    taken = sum(mine.take(600.0) for _ in range(10_000))
    assert taken == pytest.approx((1.0 + 0.2 * 100) * KEPT_S, abs=2)


def test_share_without_a_minimum_starts_empty() -> None:
    mine = budget(share=0.5, min_per_s=0.0)
    assert not mine.take(0.0)
    mine.deposit(0.0)
    mine.deposit(0.0)
    assert mine.take(0.0)
    assert not mine.take(0.0)


def test_somebody_else_s_retries_leave_less_but_never_a_debt() -> None:
    mine = budget()
    for _ in range(100):
        mine.charge(0.0)
    assert not mine.take(0.0)
    assert mine.take(1.5)


def test_clock_that_stands_still_or_steps_back_changes_nothing() -> None:
    mine = budget()
    for _ in range(10):
        mine.take(5.0)
    assert not mine.take(4.0)
    assert repr(mine) == "<RetryBudget held=0.0>"
