"""What was used last stays; what has expired goes first; bounds hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from filters.algo.lru import SLACK, Lru

FOREVER = 1e9


def test_value_is_there_until_its_time() -> None:
    lru: Lru[str] = Lru(100, 10)
    assert lru.put("a", "x", 10, 5.0, 0.0) == 0
    assert lru.get("a", 4.9) == "x"
    assert lru.get("a", 5.0) is None
    assert lru.get("b", 0.0) is None
    assert lru.peek("a") == "x"


def test_longest_unused_one_makes_room() -> None:
    lru: Lru[str] = Lru(100, 3)
    for key in "abc":
        lru.put(key, key, 10, FOREVER, 0.0)
    lru.get("a", 0.0)
    assert lru.put("d", "d", 10, FOREVER, 0.0) == 1
    assert lru.keys() == ["c", "a", "d"]


def test_large_one_takes_the_room_of_several() -> None:
    lru: Lru[str] = Lru(100, 10)
    for key in "abcd":
        lru.put(key, key, 25, FOREVER, 0.0)
    assert lru.put("e", "e", 60, FOREVER, 0.0) == 3
    assert lru.keys() == ["d", "e"]
    assert lru.bytes == 85


def test_expired_ones_go_first_and_are_not_counted_as_evicted() -> None:
    lru: Lru[str] = Lru(100, 3)
    lru.put("old", "x", 10, FOREVER, 0.0)
    lru.put("short", "x", 10, 1.0, 0.0)
    lru.put("new", "x", 10, FOREVER, 0.0)
    assert lru.put("one more", "x", 10, FOREVER, 2.0) == 0
    assert lru.keys() == ["old", "new", "one more"]


def test_value_put_again_takes_the_place_size_and_time_of_the_old_one() -> None:
    lru: Lru[str] = Lru(100, 3)
    lru.put("a", "x", 90, 1.0, 0.0)
    assert lru.put("a", "y", 20, FOREVER, 0.0) == 0
    assert (len(lru), lru.bytes) == (1, 20)
    lru.put("b", "b", 1, FOREVER, 5.0)  # sweeps
    assert lru.get("a", 5.0) == "y"


def test_too_large_or_expired_one_is_not_kept_and_its_forerunner_is_gone() -> None:
    lru: Lru[str] = Lru(100, 3)
    lru.put("a", "x", 10, FOREVER, 0.0)
    assert lru.put("a", "y", 101, FOREVER, 0.0) == 0
    assert lru.get("a", 0.0) is None
    lru.put("b", "y", 1, 1.0, 1.0)
    assert len(lru) == lru.bytes == 0


def test_times_of_what_was_replaced_do_not_pile_up() -> None:
    lru: Lru[int] = Lru(100, 3)
    for number in range(10_000):
        lru.put("a", number, 10, FOREVER + number, 0.0)
    assert len(lru._dues) <= 2 + SLACK


def test_clear_forgets_everything() -> None:
    lru: Lru[str] = Lru(100, 3)
    lru.put("a", "x", 10, FOREVER, 0.0)
    lru.clear()
    assert (len(lru), lru.bytes, lru.get("a", 0.0)) == (0, 0, None)
    assert repr(lru) == "<Lru entries=0 bytes=0>"


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(1, 60), st.integers(0, 9), st.booleans()),
        max_size=60,
    )
)
def test_bounds_hold_and_only_the_longest_unused_live_one_goes(
    steps: list[tuple[str, int, int, bool]],
) -> None:
    """Against a list, the longest unused one first."""
    lru: Lru[int] = Lru(100, 4)
    model: list[tuple[str, int, int, float]] = []  # key, value, size, due
    for now, (key, size, life, is_put) in enumerate(steps):
        live = [each for each in model if each[3] > now]
        if is_put:
            before = len(model := [each for each in live if each[0] != key])
            if life:
                while sum(each[2] for each in model) + size > 100 or len(model) >= 4:
                    model.pop(0)
            evicted = before - len(model)
            if life:
                model.append((key, now, size, now + life))
            assert lru.put(key, now, size, now + life, now) == evicted
        else:
            found = next((each for each in live if each[0] == key), None)
            if found is not None:
                model.remove(found)
                model.append(found)
            assert lru.get(key, now) == (None if found is None else found[1])
        assert lru.keys() == [each[0] for each in model]
        assert lru.bytes == sum(each[2] for each in model) <= 100
