"""A quantile is exact, and of the last observations only."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.algo.quantile import Quantile

values = st.lists(st.sampled_from([0.1, 0.2, 0.25, 1.0, 3.0]) | st.floats(0, 100), min_size=1)


@settings(deadline=None)
@given(values, st.integers(1, 20), st.floats(0.01, 1.0))
def test_it_is_the_smallest_value_that_covers_the_share_of_the_last_ones(
    observed: list[float], size: int, share: float
) -> None:
    quantile = Quantile(size)
    for value in observed:
        quantile.add(value)
    last = observed[-size:]
    assert len(quantile) == len(last)
    found = quantile.at(share)
    assert found in last
    assert sum(value <= found for value in last) >= share * len(last) - 1e-9
    assert sum(value < found for value in last) < share * len(last)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.01, 1), (0.05, 5), (0.5, 50), (0.95, 95), (0.951, 96), (1.0, 100)]
)
def test_quantiles_of_one_to_a_hundred(share: float, expected: int) -> None:
    quantile = Quantile(100)
    for value in range(100, 0, -1):
        quantile.add(float(value))
    assert quantile.at(share) == expected


def test_what_is_older_is_forgotten() -> None:
    quantile = Quantile(3)
    for value in (9.0, 9.0, 9.0, 1.0, 2.0, 3.0):
        quantile.add(value)
    assert [quantile.at(share) for share in (0.1, 0.5, 1.0)] == [1.0, 2.0, 3.0]


def test_there_is_none_of_nothing() -> None:
    with pytest.raises(IndexError):
        Quantile(3).at(0.5)
