"""Who is next: classes, ageing, shares by weight, and nobody is forgotten or kept too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.algo.fair_queue import FairQueue, Waiter

HIGH, NORMAL, LOW = range(3)
AGE_S = 5.0
GROUPS = ("a", "b", "c")


def queue(age_s: float = AGE_S) -> FairQueue[str]:
    return FairQueue(3, age_s=age_s)


def waiter(item: str = "", *, rank: int = NORMAL, group: str = "a", weight: int = 1) -> Waiter[str]:
    return Waiter(item, rank=rank, group=group, weight=weight)


def put(into: FairQueue[str], items: str, now: float = 0.0, **more: object) -> list[Waiter[str]]:
    """One waiter for each letter."""
    put = [waiter(item, **more) for item in items]  # type: ignore[arg-type]
    for each in put:
        into.put(each, now)
    return put


def popped(out_of: FairQueue[str], now: float = 0.0) -> str:
    """Everybody who waits, in the order of their turns, in the same moment."""
    items = ""
    while (each := out_of.pop(now)) is not None:
        items += each.item
    return items


def test_nobody_is_next_when_nobody_waits() -> None:
    assert queue().pop(0.0) is None


def test_within_a_group_who_came_first_is_first() -> None:
    waiting = queue()
    put(waiting, "abc")
    assert popped(waiting) == "abc"


def test_a_higher_class_goes_first_whenever_it_came() -> None:
    waiting = queue()
    put(waiting, "l", rank=LOW)
    put(waiting, "n", rank=NORMAL)
    put(waiting, "h", rank=HIGH)
    assert repr(waiting) == "<FairQueue 1 1 1>"
    assert popped(waiting) == "hnl"


def test_groups_take_turns_though_one_came_with_many() -> None:
    waiting = queue()
    put(waiting, "aaaa", group="a")
    put(waiting, "bb", group="b")
    assert popped(waiting) == "ababaa"


def test_turns_follow_the_weights() -> None:
    waiting = queue()
    put(waiting, "a" * 40, group="a", weight=3)
    put(waiting, "b" * 40, group="b", weight=1)
    assert Counter(popped(waiting)[:40]) == {"a": 30, "b": 10}


def test_a_group_that_comes_late_has_not_saved_turns() -> None:
    waiting = queue()
    put(waiting, "a" * 20, group="a")
    for _ in range(10):
        waiting.pop(0.0)
    put(waiting, "b" * 10, group="b")
    assert popped(waiting) in ("ab" * 10, "ba" * 10)


def test_waiter_moves_up_one_class_for_each_age() -> None:
    waiting = queue()
    put(waiting, "l", now=0.0, rank=LOW)
    put(waiting, "n", now=4.9, rank=NORMAL)
    assert waiting.pop(4.9).item == "n"  # type: ignore[union-attr]
    put(waiting, "n", now=5.0, rank=NORMAL)
    put(waiting, "h", now=5.0, rank=HIGH)
    assert popped(waiting, 5.0) == "hln"


def test_low_counts_as_high_after_two_ages_and_goes_before_those_who_came_later() -> None:
    waiting = queue()
    put(waiting, "l", now=0.0, rank=LOW)
    put(waiting, "h", now=9.9, rank=HIGH)
    assert popped(waiting, 10.0) == "lh"


def test_those_who_moved_up_share_by_weight_too() -> None:
    waiting = queue()
    put(waiting, "a" * 12, now=0.0, rank=LOW, group="a")
    put(waiting, "b" * 12, now=10.0, rank=HIGH, group="b", weight=2)
    assert Counter(popped(waiting, 10.0)[:9]) == {"a": 3, "b": 6}


def test_another_age_applies_to_those_who_wait_already() -> None:
    waiting = queue(age_s=100.0)
    put(waiting, "l", now=0.0, rank=LOW)
    put(waiting, "h", now=1.0, rank=HIGH)
    waiting.age_s = 1.0
    assert popped(waiting, 2.0) == "lh"


def test_who_leaves_is_gone_and_its_group_was_not_charged() -> None:
    waiting = queue()
    first, *_ = put(waiting, "xaa", group="a")
    put(waiting, "bb", group="b")
    assert waiting.remove(first)
    assert not first.is_waiting
    assert not waiting.remove(first)
    assert len(waiting) == 4
    assert popped(waiting) == "abab"


def test_group_that_left_and_came_back_keeps_its_place() -> None:
    waiting = queue()
    (left,) = put(waiting, "x", group="a")
    put(waiting, "bbb", group="b")
    waiting.remove(left)
    put(waiting, "a", group="a")
    assert popped(waiting) == "abbb"


def test_who_had_its_turn_can_not_leave_any_more() -> None:
    waiting = queue()
    (one,) = put(waiting, "a")
    waiting.pop(0.0)
    assert not waiting.remove(one)


def test_newest_of_the_lowest_class_below_gives_way() -> None:
    waiting = queue()
    put(waiting, "1", rank=NORMAL)
    put(waiting, "23", rank=LOW, group="b")
    put(waiting, "4", rank=HIGH)
    out = waiting.push_out(waiter(rank=HIGH), 0.0)
    assert out is not None
    assert out.item == "3"
    assert not out.is_waiting
    assert sorted(each.item for each in waiting) == ["1", "2", "4"]


def test_nobody_of_the_same_or_a_higher_class_gives_way_within_a_group() -> None:
    waiting = queue()
    put(waiting, "1", rank=NORMAL)
    put(waiting, "2", rank=HIGH)
    assert waiting.push_out(waiter(rank=NORMAL), 0.0) is None
    assert waiting.push_out(waiter(rank=LOW), 0.0) is None
    assert len(waiting) == 2


def test_who_has_moved_up_does_not_give_way_to_its_new_class() -> None:
    waiting = queue()
    put(waiting, "1", now=0.0, rank=LOW)
    assert waiting.push_out(waiter(rank=NORMAL), 5.0) is None


def test_newest_of_a_group_with_more_than_its_share_gives_way() -> None:
    waiting = queue()
    put(waiting, "1234", group="a")
    put(waiting, "5", group="b")
    out = waiting.push_out(waiter(group="b"), 0.0)
    assert out is not None
    assert out.item == "4"


@pytest.mark.parametrize(("weight", "gives_way"), [(1, True), (2, False), (4, False)])
def test_share_of_a_full_queue_counts_by_weight(weight: int, gives_way: bool) -> None:
    waiting = queue()
    put(waiting, "1234", group="a", weight=weight)
    put(waiting, "5", group="b")
    assert (waiting.push_out(waiter(group="b"), 0.0) is not None) is gives_way


def test_those_ahead_are_the_higher_classes_and_the_own_group() -> None:
    waiting = queue()
    put(waiting, "hh", rank=HIGH, group="b")
    put(waiting, "nnn", rank=NORMAL, group="a")
    put(waiting, "llll", rank=LOW, group="a")
    assert waiting.ahead(waiter(rank=HIGH, group="b"), 0.0) == 2
    assert waiting.ahead(waiter(rank=NORMAL), 0.0) == 5
    assert waiting.ahead(waiter(rank=LOW), 0.0) == 9


def test_those_ahead_of_a_small_group_are_not_the_whole_of_a_large_one() -> None:
    waiting = queue()
    put(waiting, "a" * 100, group="a")
    assert waiting.ahead(waiter(group="b"), 0.0) == 1
    assert waiting.ahead(waiter(group="b", weight=4), 0.0) == 1
    assert waiting.ahead(waiter(group="a"), 0.0) == 100


# Whatever happens

ranks = st.sampled_from([HIGH, NORMAL, LOW])
groups = st.sampled_from(GROUPS)
weights = st.fixed_dictionaries(dict.fromkeys(GROUPS, st.integers(1, 5)))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), ranks, groups),
        st.tuples(st.just("pop")),
        st.tuples(st.just("leave"), st.integers(0, 50)),
        st.tuples(st.just("push_out"), ranks, groups),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 2.0, 5.0, 20.0])),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(steps, weights)
def test_everybody_comes_out_once_and_those_of_a_group_in_their_order(
    steps: list[tuple[object, ...]], weights: Mapping[str, int]
) -> None:
    waiting, inside, now = queue(), list[Waiter[str]](), 0.0
    for step, *args in steps:
        if step == "put":
            rank, group = args
            each = waiter(rank=rank, group=group, weight=weights[group])  # type: ignore
            waiting.put(each, now)
            inside.append(each)
        elif step == "wait":
            now += args[0]  # type: ignore[operator]
        elif step == "leave" and inside:
            assert waiting.remove(inside.pop(args[0] % len(inside)))  # type: ignore[operator]
        elif step == "push_out":
            rank, group = args
            new = waiter(rank=rank, group=group, weight=weights[group])  # type: ignore
            if (out := waiting.push_out(new, now)) is not None:
                inside.remove(out)
                assert class_of(out, now) >= rank  # type: ignore[operator]
        elif step == "pop":
            each_out = waiting.pop(now)
            assert (each_out is None) == (not inside)
            if each_out is None:
                continue
            inside.remove(each_out)
            best = min((class_of(each, now) for each in inside), default=LOW)
            assert class_of(each_out, now) <= best
            before = [
                each
                for each in inside
                if each.group == each_out.group and class_of(each, now) == class_of(each_out, now)
            ]
            assert all(each_out.number < each.number for each in before)
        assert len(waiting) == len(inside)
        assert sorted(each.number for each in waiting) == sorted(each.number for each in inside)
    while (last := waiting.pop(now)) is not None:
        inside.remove(last)
    assert not inside


def class_of(each: Waiter[str], now: float) -> int:
    """The class it counts as at `now`, if the queue has looked by then."""
    return max(HIGH, each.rank - int((now - each.came_at) / AGE_S))


@settings(deadline=None)
@given(weights, st.integers(1, 60))
def test_shares_follow_the_weights_at_every_moment(weights: Mapping[str, int], turns: int) -> None:
    waiting, served = queue(), Counter[str]()
    for group, weight in weights.items():
        put(waiting, group * turns, group=group, weight=weight)
    for turn in range(1, turns + 1):
        each = waiting.pop(0.0)
        assert each is not None
        served[each.group] += 1
        for group, weight in weights.items():
            fair = turn * weight / sum(weights.values())
            assert abs(served[group] - fair) < 1 + weight / max(1, min(weights.values()))


@settings(deadline=None)
@given(
    weights,
    st.lists(st.tuples(ranks, groups), max_size=30),
    st.lists(st.tuples(ranks, groups), min_size=1),
    st.sampled_from([0.1, 1.0, 7.0]),
)
def test_nobody_starves(
    weights: Mapping[str, int],
    before: list[tuple[int, str]],
    newcomers: list[tuple[int, str]],
    turn_s: float,
) -> None:
    """However many come after it, a low one is served within a number of turns that depends on who
    was there before it, on the weights and on the ageing, and on nothing else."""
    waiting, now = queue(), 0.0
    for rank, group in before:
        put(waiting, "-", rank=rank, group=group, weight=weights[group])
    (patient,) = put(waiting, "x", rank=LOW, group="a", weight=weights["a"])
    until_high = int(2 * AGE_S / turn_s) + 1
    own_turns = len(before) + 1  # at the worst all of them are of its group
    rounds = own_turns / weights["a"] + 1
    bound = until_high + own_turns + rounds * (weights["b"] + weights["c"]) + len(GROUPS)
    turns = 0
    while patient.is_waiting:
        for rank, group in newcomers:  # more than leave: the queue only grows
            put(waiting, "-", now=now, rank=rank, group=group, weight=weights[group])
        waiting.pop(now)
        now += turn_s
        turns += 1
        assert turns <= bound
