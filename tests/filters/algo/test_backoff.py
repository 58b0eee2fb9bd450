"""Waits grow, stay inside their bounds, and are never shorter than asked for."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.backoff import SPREAD, Jitter, after_hint_s, backoff_s

RAND = st.floats(0.0, 1.0, exclude_max=True)


@given(
    retry=st.integers(1, 10_000),
    base_s=st.floats(0.001, 100.0),
    max_s=st.floats(0.001, 1000.0),
    rand=RAND,
)
def test_full_jitter_is_between_nothing_and_the_capped_backoff(
    retry: int, base_s: float, max_s: float, rand: float
) -> None:
    wait_s = backoff_s(retry, base_s=base_s, max_s=max_s, jitter="full", rand=rand)
    assert 0.0 <= wait_s <= max_s
    assert retry > 60 or wait_s <= base_s * 2 ** (retry - 1)


@given(
    retry=st.integers(1, 10_000),
    base_s=st.floats(0.001, 100.0),
    max_s=st.floats(0.001, 1000.0),
    rand=RAND,
)
def test_equal_jitter_is_in_the_upper_half_of_the_capped_backoff(
    retry: int, base_s: float, max_s: float, rand: float
) -> None:
    longest_s = backoff_s(retry, base_s=base_s, max_s=max_s, jitter="full", rand=1.0)
    wait_s = backoff_s(retry, base_s=base_s, max_s=max_s, jitter="equal", rand=rand)
    assert longest_s / 2 <= wait_s <= longest_s


@pytest.mark.parametrize("jitter", ["full", "equal"])
def test_backoff_doubles_up_to_its_cap(jitter: Literal["full", "equal"]) -> None:
    kind: Jitter = jitter
    waits = [backoff_s(n, base_s=0.5, max_s=3.0, jitter=kind, rand=1.0) for n in range(1, 6)]
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]


@given(hint_s=st.floats(0.0, 1e6), rand=RAND)
def test_hint_is_never_undercut_and_hardly_exceeded(hint_s: float, rand: float) -> None:
    assert hint_s <= after_hint_s(hint_s, rand) <= hint_s * (1 + SPREAD)


def test_those_who_were_told_the_same_come_back_at_different_times() -> None:
    assert after_hint_s(10.0, 0.0) == 10.0
    assert after_hint_s(10.0, 0.5) == 11.25
