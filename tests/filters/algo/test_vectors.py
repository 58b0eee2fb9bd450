"""The nearest of some unit vectors: exact, by group, bounded by entries and bytes and time."""

from __future__ import annotations

from math import cos, pi, sin
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from filters.algo.vectors import LEAST_ROWS, VECTOR_BYTES, Vector, VectorIndex, unit

PLENTY = 1 << 30


def at(degrees: float, dimensions: int = 2) -> Vector:
    """A unit vector at this angle in the plane of the first two axes."""
    angle = degrees * pi / 180
    found = unit([cos(angle), sin(angle), *[0.0] * (dimensions - 2)])
    assert found is not None
    return found


def index(max_entries: int = 100, max_bytes: int = PLENTY) -> VectorIndex[str]:
    return VectorIndex(max_bytes, max_entries)


def put(
    into: VectorIndex[str],
    key: str,
    degrees: float = 0.0,
    *,
    group: str = "g",
    size: int = 0,
    due: float = 100.0,
    now: float = 0.0,
) -> int:
    return into.put(key, group, at(degrees), key.upper(), size, due, now)


def keys(found: list[Any]) -> list[str]:
    return [match.key for match in found]


# Unit vectors


def test_vector_gets_the_length_1() -> None:
    found = unit([3, 4.0])
    assert found is not None
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    "numbers",
    [
        None,
        {},
        "0.1 0.2",
        [],
        [0, 0.0],
        ["0.1", "0.2"],
        [0.1, None],
        [True, 1.0],
        [[0.1]],
        [float("nan"), 1.0],
        [float("inf"), 1.0],
        [1.0] * 16_385,
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_vector_is_none(numbers: object) -> None:
    assert unit(numbers) is None


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_any_numbers_become_a_unit_vector_or_none(numbers: list[float]) -> None:
    found = unit(numbers)
    if found is not None:
        assert float(np.linalg.norm(found)) == pytest.approx(1.0, rel=1e-5)


# Finding


def test_nearest_come_first_with_their_cosines() -> None:
    found = index()
    for key, degrees in (("a", 0.0), ("b", 60.0), ("c", 180.0), ("d", 10.0)):
        put(found, key, degrees)
    matches = found.nearest("g", at(0.0), 0.0, 3)
    assert [(each.key, each.value) for each in matches] == [("a", "A"), ("d", "D"), ("b", "B")]
    cosines = [each.similarity for each in matches]
    assert cosines == pytest.approx([1.0, cos(pi / 18), 0.5], abs=1e-6)
    assert keys(found.nearest("g", at(170.0), 0.0)) == ["c"]
    assert len(found.nearest("g", at(0.0), 0.0, 10)) == 4


def test_only_the_own_group_is_looked_at() -> None:
    found = index()
    put(found, "a", group="one")
    put(found, "b", 5.0, group="other")
    assert keys(found.nearest("one", at(5.0), 0.0, 9)) == ["a"]
    assert found.nearest("third", at(0.0), 0.0) == []


def test_entry_is_not_found_when_its_time_has_come() -> None:
    found = index()
    put(found, "a", due=10.0)
    put(found, "b", 20.0, due=20.0)
    assert keys(found.nearest("g", at(0.0), 9.9)) == ["a"]
    assert keys(found.nearest("g", at(0.0), 10.0, 9)) == ["b"]
    assert found.nearest("g", at(0.0), 20.0) == []
    assert (len(found), found.bytes) == (0, 0)


def test_vector_of_another_dimension_is_like_none() -> None:
    found = index()
    put(found, "a")
    assert found.nearest("g", at(0.0, 3), 0.0) == []
    assert len(found) == 1


def test_vector_of_another_dimension_ends_those_of_its_group() -> None:
    found = index()
    for key in ("a", "b"):
        put(found, key)
    put(found, "c", group="other")
    found.put("d", "g", at(0.0, 3), "D", 0, 100.0, 0.0)
    assert keys(found.nearest("g", at(0.0, 3), 0.0, 9)) == ["d"]
    assert sorted(found.keys()) == ["c", "d"]


# Bounds


def test_the_one_unused_for_longest_goes_first() -> None:
    found = index(max_entries=2)
    put(found, "a")
    put(found, "b", 90.0)
    found.use("a")
    found.use("gone")
    assert put(found, "c", 180.0) == 1
    assert list(found.keys()) == ["a", "c"]
    assert keys(found.nearest("g", at(90.0), 0.0, 9)) == ["a", "c"]


def test_one_whose_time_has_come_does_not_count_as_evicted() -> None:
    found = index(max_entries=1)
    put(found, "a", due=10.0)
    assert put(found, "b", now=10.0) == 0
    assert list(found.keys()) == ["b"]


def test_bytes_are_bounded_with_vectors_and_values() -> None:
    each = VECTOR_BYTES + at(0.0).nbytes + 1000
    found = index(max_bytes=3 * each)
    for key in "abcde":
        put(found, key, size=1000)
    assert "".join(found.keys()) == "cde"
    assert found.bytes == 3 * each
    assert put(found, "large", size=3 * each) == 0
    assert found.peek("large") is None
    assert len(found) == 3


def test_same_key_takes_the_place_of_the_older_one() -> None:
    found = index()
    put(found, "a", 0.0)
    put(found, "a", 90.0, group="other")
    assert found.nearest("g", at(0.0), 0.0) == []
    assert keys(found.nearest("other", at(90.0), 0.0)) == ["a"]
    assert len(found) == 1


def test_popped_is_gone_and_given() -> None:
    found = index()
    put(found, "a")
    assert (found.pop("a"), found.pop("a"), found.peek("a")) == ("A", None, None)
    assert found.bytes == 0


def test_cleared_is_empty() -> None:
    found = index()
    put(found, "a")
    found.clear()
    assert (len(found), found.bytes, found.nearest("g", at(0.0), 0.0)) == (0, 0, [])


def test_state_can_be_read() -> None:
    found = index()
    put(found, "a")
    put(found, "b", group="other")
    each = VECTOR_BYTES + 8
    assert repr(found) == f"<VectorIndex entries=2 groups=2 bytes={2 * each}>"


def test_room_of_a_group_shrinks_with_it() -> None:
    found = index(max_entries=1000)
    for number in range(256):
        put(found, str(number))
    for number in range(1, 256):
        found.pop(str(number))
    assert len(found._groups["g"]._matrix) == LEAST_ROWS


class AgainstPlainSearch(RuleBasedStateMachine):
    """The same as to look at every vector, whatever was put and taken before."""

    def __init__(self) -> None:
        super().__init__()
        self.index = index(max_entries=12)
        self.plain: dict[str, tuple[str, float, float]] = {}  # longest unused first
        self.now = 0.0

    @rule(key=st.integers(0, 20), group=st.sampled_from("gh"), degrees=st.integers(0, 359))
    def put(self, key: int, group: str, degrees: int) -> None:
        self.plain.pop(str(key), None)
        while len(self.plain) >= 12:
            del self.plain[next(iter(self.plain))]
        self.plain[str(key)] = (group, float(degrees), self.now + 50.0)
        put(self.index, str(key), float(degrees), group=group, due=self.now + 50.0, now=self.now)

    @rule(key=st.integers(0, 20))
    def pop(self, key: int) -> None:
        self.plain.pop(str(key), None)
        self.index.pop(str(key))

    @rule(key=st.integers(0, 20))
    def use(self, key: int) -> None:
        if str(key) in self.plain:
            self.plain[str(key)] = self.plain.pop(str(key))
        self.index.use(str(key))

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(group=st.sampled_from("gh"), degrees=st.integers(0, 359), limit=st.integers(1, 5))
    def look(self, group: str, degrees: int, limit: int) -> None:
        for key in [key for key, each in self.plain.items() if each[0] == group]:
            if self.plain[key][2] <= self.now:
                del self.plain[key]
        cosines = sorted(
            (
                cos((each[1] - degrees) * pi / 180)
                for each in self.plain.values()
                if each[0] == group
            ),
            reverse=True,
        )
        found = self.index.nearest(group, at(degrees), self.now, limit)
        assert [each.similarity for each in found] == pytest.approx(cosines[:limit], abs=1e-6)
        for each in found:
            assert self.plain[each.key][0] == group
            assert each.value == each.key.upper()

    @invariant()
    def same_entries(self) -> None:
        assert list(self.index.keys()) == list(self.plain)
        assert self.index.bytes == len(self.plain) * (VECTOR_BYTES + 8)


TestAgainstPlainSearch = AgainstPlainSearch.TestCase
