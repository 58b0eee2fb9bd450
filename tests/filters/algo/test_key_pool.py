"""Keys take turns; one that is refused is set aside, one that is limited rests."""

from __future__ import annotations

import pytest

from filters.algo.key_pool import PROBE_S, AllResting, KeyPool, KeyState

ASIDE_S = 600.0


def pool(count: int) -> KeyPool:
    return KeyPool([KeyState() for _ in range(count)], set_aside_s=ASIDE_S)


def chosen(keys: KeyPool, times: int, now: float = 0.0) -> list[int]:
    return [keys.choose(now) for _ in range(times)]


def test_keys_take_turns() -> None:
    assert chosen(pool(3), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_key_that_is_refused_is_set_aside_and_its_neighbours_go_on() -> None:
    keys = pool(3)
    assert keys.refused(1, 0.0)
    assert chosen(keys, 4) == [0, 2, 0, 2]


def test_key_that_was_set_aside_is_tried_again_once_when_its_time_has_come() -> None:
    keys = pool(2)
    keys.refused(0, 0.0)
    assert chosen(keys, 2, ASIDE_S - 1) == [1, 1]
    assert chosen(keys, 4, ASIDE_S) == [0, 1, 1, 1]
    assert chosen(keys, 2, ASIDE_S + PROBE_S) == [0, 1]


def test_key_that_is_accepted_again_takes_its_turns() -> None:
    keys = pool(2)
    keys.refused(0, 0.0)
    chosen(keys, 1, ASIDE_S)
    assert keys.accepted(0, ASIDE_S)
    assert not keys.accepted(0, ASIDE_S)
    assert sorted(chosen(keys, 4, ASIDE_S)) == [0, 0, 1, 1]


def test_refusal_is_news_once() -> None:
    keys = pool(2)
    assert keys.refused(0, 0.0)
    assert not keys.refused(0, 1.0)
    keys.accepted(0, 1.5)
    assert keys.refused(0, 2.0)


def test_key_that_is_limited_rests_for_its_time() -> None:
    keys = pool(2)
    keys.limited(0, 0.0, 10.0)
    assert chosen(keys, 2, 9.9) == [1, 1]
    assert sorted(chosen(keys, 2, 10.0)) == [0, 1]


def test_shorter_rest_does_not_cut_a_longer_one() -> None:
    keys = pool(2)
    keys.limited(0, 0.0, 10.0)
    keys.limited(0, 1.0, 1.0)
    assert chosen(keys, 2, 5.0) == [1, 1]


def test_when_all_rest_the_wait_is_that_of_the_first_to_come_back() -> None:
    keys = pool(3)
    for index, rest_s in enumerate((30.0, 10.0, 20.0)):
        keys.limited(index, 0.0, rest_s)
    with pytest.raises(AllResting) as raised:
        keys.choose(4.0)
    assert raised.value.wait_s == 6.0


def test_key_that_is_set_aside_does_not_count_among_those_that_rest() -> None:
    keys = pool(2)
    keys.refused(0, 0.0)
    keys.limited(1, 0.0, 50.0)
    with pytest.raises(AllResting) as raised:
        keys.choose(0.0)
    assert raised.value.wait_s == 50.0


def test_when_all_are_set_aside_the_next_to_be_tried_is_used() -> None:
    keys = pool(2)
    keys.refused(1, 0.0)
    keys.refused(0, 5.0)
    assert chosen(keys, 2, 6.0) == [1, 1]


@pytest.mark.parametrize("now", [0.0, 1.0, ASIDE_S])
def test_only_key_is_always_used(now: float) -> None:
    keys = pool(1)
    keys.refused(0, 0.0)
    keys.limited(0, 0.0, 1e9)
    assert keys.choose(now) == 0


def test_states_say_what_they_are() -> None:
    state = KeyState()
    keys = KeyPool([state], set_aside_s=ASIDE_S)
    keys.limited(0, 0.0, 2.0)
    assert repr(state) == "<KeyState rests_until=2.0>"
    keys.refused(0, 1.0)
    assert repr(keys) == "<KeyPool [<KeyState ASIDE until=601.0>]>"


def test_answer_to_an_older_attempt_does_not_bring_a_refused_key_back() -> None:
    keys = pool(2)
    keys.refused(0, 5.0)
    assert not keys.accepted(0, 4.0)
    assert chosen(keys, 2, 6.0) == [1, 1]


def test_limit_does_not_bring_a_refused_key_back() -> None:
    keys = pool(2)
    keys.refused(0, 0.0)
    keys.limited(0, 0.0, 1.0)
    assert chosen(keys, 2, 2.0) == [1, 1]


def test_beginning_of_a_rest_is_news_once() -> None:
    keys = pool(2)
    assert keys.limited(0, 0.0, 10.0)
    assert not keys.limited(0, 1.0, 10.0)
    assert keys.limited(0, 11.0, 10.0)


def test_a_key_without_room_is_passed_over_like_one_that_rests() -> None:
    keys = pool(3)
    assert [keys.choose(0.0, {1: 9.0}) for _ in range(3)] == [0, 2, 0]
    keys.limited(2, 0.0, 4.0)
    assert keys.choose(0.0, {1: 9.0}) == 0
    with pytest.raises(AllResting) as caught:
        keys.choose(0.0, {0: 7.0, 1: 9.0})
    assert caught.value.wait_s == 4.0


def test_the_only_key_waits_for_room() -> None:
    keys = pool(1)
    with pytest.raises(AllResting) as caught:
        keys.choose(0.0, {0: 7.0})
    assert caught.value.wait_s == 7.0
