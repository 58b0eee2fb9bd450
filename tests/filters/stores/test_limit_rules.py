"""The words that limits are asked in."""

from __future__ import annotations

import pytest

from filters.stores.rules import Grant, share


@pytest.mark.parametrize(
    ("limit", "sharers", "part"), [(10, 1, 10), (10, 3, 3), (2, 4, 1), (0, 4, 0), (7, 0, 7)]
)
def test_share_of_a_limit_is_a_whole_part_and_never_nothing(
    limit: int, sharers: int, part: int
) -> None:
    assert share(limit, sharers) == part


def test_grant_of_nothing_may_be_settled_and_released() -> None:
    grant = Grant()
    grant.settle(0, 100)
    grant.release()
    grant.release()
