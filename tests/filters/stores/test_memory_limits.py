"""Limits in the memory of one process: all or nothing, given back where it was taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.stores import memory_limits
from filters.stores.memory_limits import MemoryLimits
from filters.stores.rules import Grant, Refusal, Rule, Slot
from tests.support.harness import FakeClock
from tests.support.limits import Charge, take

MINUTE = Rule("requests_per_minute", 10, 60.0)
SECOND = Rule("requests_per_second", 5, 1.0)
TOKENS = Rule("tokens_per_minute", 1_000, 60.0)


class Desk:
    """A store with its clock; `take` and `refuse` say what the test expects."""

    def __init__(self, sharers: int = 1) -> None:
        self.clock = FakeClock()
        self.limits = MemoryLimits(self.clock, sharers)

    def ask(self, *charges: Charge, slots: Sequence[Slot] = ()) -> Grant | Refusal:
        meter = self.limits.meter([(key, rule) for key, rule, _ in charges], slots)
        return meter.take_now([charge.amount for charge in charges])

    def take(self, *charges: Charge, slots: Sequence[Slot] = ()) -> Grant:
        result = self.ask(*charges, slots=slots)
        assert isinstance(result, Grant), result
        return result

    def refuse(self, *charges: Charge, slots: Sequence[Slot] = ()) -> Refusal:
        result = self.ask(*charges, slots=slots)
        assert isinstance(result, Refusal), result
        return result

    def left(self, key: str, rule: Rule) -> int:
        """What remains, as a refusal says."""
        return self.refuse(Charge(key, rule, rule.limit + 1)).remaining


def test_limit_is_granted_and_not_more() -> None:
    desk = Desk()
    for left in range(9, -1, -1):
        desk.take(Charge("a", MINUTE))
        assert desk.left("a", MINUTE) == left
    assert desk.refuse(Charge("a", MINUTE)) == Refusal(0, 60.0, 0)


def test_after_the_wait_of_a_refusal_the_same_is_granted() -> None:
    desk = Desk()
    desk.clock.turn(0.1234567)
    for _ in range(10):
        desk.take(Charge("a", MINUTE))
        desk.clock.turn(1.7)
    refusal = desk.refuse(Charge("a", MINUTE, 3))
    desk.clock.turn(refusal.wait_s - 0.000_01)
    desk.refuse(Charge("a", MINUTE, 3))
    desk.clock.turn(0.000_01)
    desk.take(Charge("a", MINUTE, 3))


def test_refusal_takes_nothing_of_the_rules_that_had_room() -> None:
    desk = Desk()
    for _ in range(5):
        desk.take(Charge("a", MINUTE), Charge("a", SECOND))
    for _ in range(20):
        assert desk.refuse(Charge("a", MINUTE), Charge("a", SECOND)).index == 1
    desk.take(Charge("a", MINUTE))
    assert desk.left("a", MINUTE) == 4


def test_refusal_names_the_rule_that_takes_longest() -> None:
    desk = Desk()
    for _ in range(5):
        desk.take(Charge("a", SECOND))
    desk.take(Charge("a", MINUTE, 10))
    refusal = desk.refuse(Charge("a", SECOND), Charge("a", MINUTE))
    assert refusal == Refusal(1, 60.0, 0)
    desk.clock.turn(60.0)
    desk.take(Charge("a", SECOND), Charge("a", MINUTE))


def test_charge_larger_than_its_limit_is_never_granted() -> None:
    desk = Desk()
    assert desk.refuse(Charge("a", MINUTE, 11)) == Refusal(0, math.inf, 10)
    bursty = Rule("paced", 10, 60.0, burst=2)
    assert desk.refuse(Charge("a", bursty, 3)).wait_s == math.inf
    desk.take(Charge("a", MINUTE, 10))


def test_keys_rules_and_periods_never_mix() -> None:
    desk = Desk()
    desk.take(Charge("a", MINUTE, 10))
    for other in (
        Charge("b", MINUTE, 10),
        Charge("a", MINUTE._replace(name="other"), 10),
        Charge("a", MINUTE._replace(period_s=61.0), 10),
    ):
        desk.take(other)
    desk.refuse(Charge("a", MINUTE))


def test_the_same_cannot_be_charged_twice_in_one_take() -> None:
    desk = Desk()
    with pytest.raises(ValueError, match="two rules"):
        desk.limits.meter([("a", MINUTE), ("a", MINUTE._replace(limit=6))])
    with pytest.raises(ValueError, match="two slots"):
        desk.limits.meter([], [Slot("a", 1), Slot("a", 1)])
    desk.take(Charge("a", MINUTE, 10), slots=[Slot("a", 1)])
    assert desk.left("a", MINUTE) == 0


def test_burst_is_spread_evenly_within_the_limit() -> None:
    desk = Desk()
    rule = Rule("paced", 60, 60.0, burst=3)
    for left in (2, 1, 0):
        desk.take(Charge("a", rule))
        assert desk.left("a", rule) == left
    assert desk.refuse(Charge("a", rule)) == Refusal(0, 1.0, 0)
    desk.clock.turn(1.0)
    desk.take(Charge("a", rule))


def test_limit_holds_over_a_burst_that_is_larger() -> None:
    desk = Desk()
    rule = Rule("paced", 5, 60.0, burst=50)
    for _ in range(5):
        desk.take(Charge("a", rule))
    assert desk.refuse(Charge("a", rule)).wait_s == 60.0


# Settling


def test_reservation_is_settled_down_to_what_it_really_cost() -> None:
    desk = Desk()
    grant = desk.take(Charge("a", TOKENS, 900))
    desk.refuse(Charge("a", TOKENS, 200))
    desk.clock.turn(5.0)
    grant.settle(0, 300)
    desk.take(Charge("a", TOKENS, 700))
    assert desk.left("a", TOKENS) == 0


def test_debt_may_exceed_the_limit_and_is_waited_for() -> None:
    desk = Desk()
    grant = desk.take(Charge("a", TOKENS, 100))
    desk.clock.turn(10.0)
    grant.settle(0, 2_000)
    assert desk.refuse(Charge("a", TOKENS, 1)) == Refusal(0, 60.0, 0)
    desk.clock.turn(60.0)
    desk.take(Charge("a", TOKENS, 1_000))


def test_debt_of_a_paced_rule_is_paced_as_well() -> None:
    desk = Desk()
    rule = Rule("paced", 60, 60.0, burst=2)
    desk.take(Charge("a", rule)).settle(0, 3)
    assert desk.refuse(Charge("a", rule)).wait_s == 2.0


def test_even_nothing_waits_for_a_debt_of_a_paced_rule() -> None:
    desk = Desk()
    rule = Rule("paced", 60, 60.0, burst=2)
    desk.take(Charge("a", rule)).settle(0, 100)
    desk.clock.turn(2.0)
    assert desk.refuse(Charge("a", rule, 0)).wait_s == 58.0
    desk.clock.turn(58.0)
    desk.take(Charge("a", rule, 2))


def test_only_the_first_settlement_counts() -> None:
    desk = Desk()
    grant = desk.take(Charge("a", TOKENS, 500))
    grant.settle(0, 100)
    grant.settle(0, 0)
    grant.settle(0, 900)
    desk.take(Charge("a", TOKENS, 1))
    assert desk.left("a", TOKENS) == 899


def test_reservation_that_nobody_settles_leaves_by_itself() -> None:
    desk = Desk()
    desk.take(Charge("a", TOKENS, 600))
    desk.clock.turn(30.0)
    desk.take(Charge("a", TOKENS, 400))
    desk.clock.turn(30.0)
    desk.take(Charge("a", TOKENS, 600))
    assert desk.left("a", TOKENS) == 0


def test_settling_after_the_reservation_has_left_gives_nothing_back() -> None:
    desk = Desk()
    grant = desk.take(Charge("a", TOKENS, 600))
    desk.clock.turn(60.0)
    desk.take(Charge("a", TOKENS, 1_000))
    grant.settle(0, 0)
    desk.refuse(Charge("a", TOKENS, 1))


def test_changed_limit_applies_to_the_same_counts() -> None:
    desk = Desk()
    desk.take(Charge("a", MINUTE, 10))
    desk.take(Charge("a", MINUTE._replace(limit=15), 4))
    assert desk.left("a", MINUTE._replace(limit=15)) == 1
    desk.refuse(Charge("a", MINUTE._replace(limit=12)))


# Slots


def test_slots_are_limited_and_come_back() -> None:
    desk = Desk()
    grants = [desk.take(slots=[Slot("a", 2)]) for _ in range(2)]
    assert desk.refuse(slots=[Slot("a", 2)]) == Refusal(0, 0.0, 0)
    grants[0].release()
    grants[0].release()
    desk.take(slots=[Slot("a", 2)])
    desk.refuse(slots=[Slot("a", 2)])


def test_index_of_a_slot_comes_after_the_charges_and_nothing_is_charged() -> None:
    desk = Desk()
    desk.take(slots=[Slot("b", 1)])
    refusal = desk.refuse(Charge("a", MINUTE, 10), slots=[Slot("a", 1), Slot("b", 1)])
    assert refusal.index == 2
    desk.take(Charge("a", MINUTE, 10), slots=[Slot("a", 1)])


def test_no_slot_is_taken_when_a_charge_does_not_fit() -> None:
    desk = Desk()
    desk.take(Charge("a", MINUTE, 10))
    assert desk.refuse(Charge("a", MINUTE), slots=[Slot("a", 1)]).index == 0
    desk.take(slots=[Slot("a", 1)])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=100), st.integers(1, 5))
def test_never_more_in_flight_than_there_are_slots(
    steps: list[tuple[bool, int]], limit: int
) -> None:
    desk, open_ones = Desk(), []
    for is_take, which in steps:
        if is_take:
            result = desk.ask(slots=[Slot("a", limit)])
            assert isinstance(result, Grant) == (len(open_ones) < limit)
            if isinstance(result, Grant):
                open_ones.append(result)
        elif open_ones:
            grant = open_ones.pop(which % len(open_ones))
            grant.release()
            grant.release()


# Shares and size


def test_processes_that_do_not_know_of_each_other_share_the_limit() -> None:
    desk = Desk(sharers=3)
    for _ in range(3):
        desk.take(Charge("a", MINUTE))
    desk.refuse(Charge("a", MINUTE))
    grants = [desk.take(slots=[Slot("a", 7)]) for _ in range(2)]
    desk.refuse(slots=[Slot("a", 7)])
    for grant in grants:
        grant.release()


def test_charge_larger_than_a_share_waits_for_an_empty_window() -> None:
    desk = Desk(sharers=4)
    desk.take(Charge("a", TOKENS, 1))
    assert desk.refuse(Charge("a", TOKENS, 600)).wait_s == 60.0
    desk.clock.turn(60.0)
    desk.take(Charge("a", TOKENS, 600))
    desk.refuse(Charge("a", TOKENS, 1))
    assert desk.refuse(Charge("a", TOKENS, 1_001)).wait_s == math.inf


def test_windows_that_count_nothing_are_dropped_when_there_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_limits, "MANY", 100)
    desk = Desk()
    desk.limits._sweep_at = 100
    for number in range(100):
        desk.take(Charge(f"old-{number}", SECOND))
    desk.clock.turn(30.0)
    desk.take(Charge("a", MINUTE, 10))
    for number in range(50):
        desk.take(Charge(f"new-{number}", SECOND))
    assert len(desk.limits) == 51
    desk.refuse(Charge("a", MINUTE))


def test_a_meter_finds_its_counts_again_that_were_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "MANY", 100)
    desk = Desk()
    desk.limits._sweep_at = 100
    mine = desk.limits.meter([("a", TOKENS)], [Slot("a", 1)])
    early = mine.take_now([100])
    assert isinstance(early, Grant)
    early.release()
    desk.clock.turn(70.0)
    for number in range(150):
        desk.take(Charge(f"new-{number}", SECOND))
    early.settle(0, 500)  # a debt of 400, long after all of it has left
    assert desk.left("a", TOKENS) == 600
    late = mine.take_now([600])
    assert isinstance(late, Grant)
    assert desk.left("a", TOKENS) == 0
    desk.refuse(slots=[Slot("a", 1)])
    for number in range(150):
        desk.take(Charge(f"other-{number}", SECOND))
    late.settle(0, 0)
    late.release()
    assert desk.left("a", TOKENS) == 600
    desk.take(slots=[Slot("a", 1)])


def test_store_says_what_it_holds() -> None:
    desk = Desk()
    desk.take(Charge("a", MINUTE), slots=[Slot("a", 2)])
    assert repr(desk.limits) == "<MemoryLimits counts=1 in_flight=1>"


async def test_take_answers_without_waiting() -> None:
    desk = Desk()
    assert isinstance(await take(desk.limits, [Charge("a", MINUTE)]), Grant)
