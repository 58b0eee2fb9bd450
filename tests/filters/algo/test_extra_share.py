"""Never more extra attempts than the share of the calls."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from filters.algo.extra_share import MOST_KEPT, ExtraShare


@settings(deadline=None)
@given(st.floats(0.01, 1.0), st.lists(st.integers(0, 3), max_size=300))
def test_never_more_than_the_share_of_all_calls_so_far(share: float, wanted: list[int]) -> None:
    """`wanted`: how often each call asks for one."""
    extra, taken = ExtraShare(), list[int]()
    for asks in wanted:
        extra.add_call(share)
        taken.append(sum(extra.take() for _ in range(asks)))
        assert sum(taken) <= share * len(taken) + 1e-6
    for begin in range(0, len(taken), 7):
        window = taken[begin:]
        assert sum(window) <= share * len(window) + MOST_KEPT + 1e-6


def test_what_is_not_used_is_kept_up_to_a_bound() -> None:
    extra = ExtraShare()
    for _ in range(1000):
        extra.add_call(0.05)
    assert extra.has_one
    assert sum(extra.take() for _ in range(100)) == MOST_KEPT
    assert not extra.has_one


def test_first_of_all_calls_gets_none() -> None:
    extra = ExtraShare()
    extra.add_call(0.5)
    assert not extra.has_one
    assert not extra.take()
