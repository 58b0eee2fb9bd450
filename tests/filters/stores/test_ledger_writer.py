"""Records on their way: added up, kept while the place is away, dropped and told beyond that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.stores import ledger as ledger_module
from filters.stores.ledger import (
    AGAIN_S,
    GATHER_S,
    MAX_TOKENS,
    MERGE_AFTER_S,
    MERGE_EVERY_S,
    MERGE_FIRST_S,
    MERGE_PAUSE_S,
    MINUTE_S,
    PRUNE_EVERY_S,
    PRUNE_PAUSE_S,
    TELL_S,
    Ledger,
    NotWritten,
    Record,
    Where,
    place_of,
    sayable,
)
from filters.stores.steady import DOUBT_S
from sidecar.api import Cost, Secret, StoreAddress, Usage
from tests.support.harness import MEMORY, Harness
from tests.support.ledger import USED, kind, record

STORE = StoreAddress(Secret("redis://127.0.0.1:6379/0"))


class Place:
    """A `Writer` that does as the test says."""

    def __init__(self) -> None:
        self.written: list[list[Record]] = []
        self.failure: Exception | None = None
        self.keep_days = 0
        self.pruned_before: list[float] = []
        self.merged_before: list[float] = []
        self.has_more = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, records: Sequence[Record], keep_days: int) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.keep_days = keep_days
        self.written.append(list(records))

    async def prune(self, before_s: float) -> bool:
        self.pruned_before.append(before_s)
        if self.failure is not None:
            raise self.failure
        return self.has_more

    async def merge(self, before_s: float) -> bool:
        self.merged_before.append(before_s)
        if self.failure is not None:
            raise self.failure
        return self.has_more

    @property
    def records(self) -> list[Record]:
        return [each for part in self.written for each in part]

    @property
    def calls(self) -> int:
        return sum(each.calls for each in self.records)

    @property
    def counts(self) -> list[list[tuple[str, int]]]:
        """Of each write: models, and how many calls of them."""
        return [[(each.model, each.calls) for each in part] for part in self.written]


class Desk:
    """A ledger, its place, and a clock turned by hand."""

    def __init__(self) -> None:
        self.harness = Harness()
        self.place = Place()
        kit: Any = self.harness  # it has what a ledger takes of a kit
        self.ledger = Ledger(kit, self.place)

    def enter(self, model: str = "gpt", usage: Usage = USED) -> None:
        """A call ends that took a quarter of a second."""
        cost = Cost(Decimal("0.0000123"), "USD")
        self.ledger.enter(kind(model=model), usage, usage, None, cost, 1, 0.25)

    async def turn(self, seconds: float) -> None:
        self.harness.clock.turn(seconds)
        await self.harness.settled()

    @property
    def dropped(self) -> float:
        return float(self.harness.value("llm_sidecar_ledger_dropped"))


# Adding up


async def test_calls_of_one_kind_in_a_moment_are_one_record_with_their_sums() -> None:
    desk = Desk()
    used = Usage(10, 20, 3, 2, 5, 1)
    costs = [Decimal("0.1"), Decimal("1E-30"), Decimal(10**12)]
    began_s = desk.harness.clock.wall()
    for number, amount in enumerate(costs):
        lost = Usage(100, number)
        desk.ledger.enter(kind(), used, Usage(7, 8), lost, Cost(amount, "USD"), 2, 0.25)
        desk.harness.clock.turn(0.01)
    assert desk.place.written == []
    await desk.turn(GATHER_S)
    (found,) = desk.place.records
    assert found == record(
        time_s=began_s + 0.01 + 0.01,
        calls=3,
        usage=Usage(30, 60, 9, 6, 15, 3),
        reported=Usage(21, 24),
        lost=Usage(300, 3),
        cost="1000000000000.100000000000000000000000000001",
        attempts=6,
        total_s=0.75,
    )
    await desk.ledger.close()


async def test_calls_that_differ_in_anything_are_told_apart() -> None:
    desk = Desk()
    kinds = [
        kind(),
        kind(team="ads"),
        kind(key_id=""),
        kind(endpoint="messages"),
        kind(model="claude"),
        kind(upstream="azure"),
        kind(upstream_model="gpt-4o"),
        kind(status=500),
        kind(outcome="client_gone"),
        kind(cached="hit"),
        kind(is_side=True),
        kind(is_estimated=True),
        kind(currency="CNY"),
        kind(currency=None),
    ]
    for each in kinds * 2:
        desk.ledger.enter(each, None, None, None, None, 1, 0.0)
    await desk.turn(GATHER_S)
    assert [found[1:13] for found in desk.place.records] == kinds
    assert {found.calls for found in desk.place.records} == {2}
    await desk.ledger.close()


async def test_what_nobody_knows_adds_nothing() -> None:
    desk = Desk()
    desk.ledger.enter(kind(currency=None), None, None, None, None, 1, 0.25)
    await desk.turn(GATHER_S)
    assert desk.place.records == [
        record(time_s=desk.place.records[0].time_s, usage=None, reported=None, lost=None, cost=None)
    ]
    await desk.ledger.close()


async def test_figures_that_no_sum_could_hold_are_bounded() -> None:
    desk = Desk()
    desk.enter(usage=Usage(10**30, 5))
    desk.enter(usage=Usage(10, 5))
    await desk.turn(GATHER_S)
    (found,) = desk.place.records
    assert (found.input_tokens, found.output_tokens) == (2 * MAX_TOKENS, 10)
    await desk.ledger.close()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.integers(0, 10**6),
            st.decimals(0, 10**6, places=14),
            st.sampled_from([0.0, 0.03, 1.0, 50.0]),
            st.booleans(),
        )
    )
)
async def test_sums_are_exact_whatever_the_place_does(
    calls: list[tuple[str, int, Decimal, float, bool]],
) -> None:
    desk = Desk()
    entered: dict[tuple[str, int], list[tuple[int, Decimal]]] = {}
    for model, tokens, amount, pause_s, is_away in calls:
        desk.place.failure = NotWritten("away") if is_away else None
        cost, usage = Cost(amount, "USD"), Usage(tokens)
        desk.ledger.enter(kind(model=model), usage, None, None, cost, 1, 0.0)
        minute = int(desk.harness.clock.wall()) // MINUTE_S
        entered.setdefault((model, minute), []).append((tokens, amount))
        if pause_s:
            await desk.turn(pause_s)
    desk.place.failure = None
    await desk.ledger.close()
    found: dict[tuple[str, int], list[int]] = {}
    for each in desk.place.records:
        sums = found.setdefault((each.model, int(each.time_s) // MINUTE_S), [0, 0, 0])
        for index, figure in enumerate((each.calls, each.input_tokens, int(each.cost.scaleb(14)))):
            sums[index] += figure
    assert found == {
        key: [len(each), sum(one for one, _ in each), sum(int(a.scaleb(14)) for _, a in each)]
        for key, each in entered.items()
    }
    assert desk.dropped == 0


# Writing


async def test_records_of_a_moment_are_written_together() -> None:
    desk = Desk()
    for model in ("a", "b", "a", "c", "a"):
        desk.enter(model)
    assert desk.place.written == []
    await desk.turn(GATHER_S)
    assert desk.place.counts == [[("a", 3), ("b", 1), ("c", 1)]]
    await desk.ledger.close()


async def test_another_moment_has_records_of_its_own() -> None:
    desk = Desk()
    for _ in range(3):
        desk.enter()
        await desk.turn(GATHER_S)
    assert desk.place.counts == [[("gpt", 1)], [("gpt", 1)], [("gpt", 1)]]
    assert [b.time_s - a.time_s for a, b in pairwise(desk.place.records)] == [
        pytest.approx(GATHER_S)
    ] * 2
    await desk.ledger.close()


async def test_without_calls_nothing_is_written_and_no_timer_runs() -> None:
    desk = Desk()
    desk.enter()
    await desk.turn(GATHER_S)
    await desk.turn(10 * GATHER_S)
    assert len(desk.place.written) == 1
    assert desk.harness.clock._timers == []
    await desk.ledger.close()


async def test_a_moment_ends_with_its_minute() -> None:
    desk = Desk()
    clock = desk.harness.clock
    clock.turn(MINUTE_S - clock.wall() % MINUTE_S - 0.01)
    desk.enter()
    clock.turn(0.01)
    desk.enter()
    desk.enter()
    await desk.turn(GATHER_S)
    first, second = desk.place.records
    assert (first.calls, second.calls) == (1, 2)
    assert int(first.time_s) // MINUTE_S + 1 == int(second.time_s) // MINUTE_S
    await desk.ledger.close()


async def test_a_clock_that_is_set_back_does_not_keep_a_moment_open() -> None:
    desk = Desk()
    desk.enter()
    desk.harness.clock._wall -= 7200
    await desk.turn(GATHER_S)
    desk.enter()
    clock = desk.harness.clock
    clock.turn(MINUTE_S - clock.wall() % MINUTE_S)
    desk.enter()
    await desk.turn(GATHER_S)
    before, *after = [int(each.time_s) // MINUTE_S for each in desk.place.records]
    assert [before - each for each in after] == [120, 119]
    await desk.ledger.close()


async def test_what_comes_during_a_write_is_written_next_and_once() -> None:
    desk = Desk()
    desk.place.gate.clear()
    desk.enter()
    desk.harness.clock.turn(GATHER_S)
    await asyncio.sleep(0)
    for _ in range(3):  # nothing is added to what is on its way
        desk.enter()
        desk.harness.clock.turn(GATHER_S)
    desk.place.gate.set()
    await desk.harness.settled()
    assert desk.place.counts == [[("gpt", 1)], [("gpt", 3)]]
    await desk.ledger.close()


async def test_many_kinds_are_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "TOGETHER", 2)
    desk = Desk()
    for model in "abcde":
        desk.enter(model)
    await desk.turn(GATHER_S)
    assert [len(each) for each in desk.place.written] == [2, 2, 1]
    desk.place.failure = NotWritten("away")
    for model in "abcde":
        desk.enter(model)
    await desk.turn(GATHER_S)
    desk.place.failure = None
    await desk.ledger.close()
    assert [len(each) for each in desk.place.written] == [2, 2, 1, 2, 2, 1]


async def test_records_wait_while_the_place_is_away_which_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    desk = Desk()
    desk.place.failure = NotWritten("away")
    desk.enter()
    await desk.turn(GATHER_S)
    await desk.turn(AGAIN_S)
    assert (desk.place.calls, desk.dropped) == (0, 0)
    desk.place.failure = None
    desk.enter()
    await desk.turn(AGAIN_S)
    assert (desk.place.calls, desk.dropped) == (2, 0)
    assert [each.message for each in caplog.records] == ["ledger_waits", "ledger_goes_on"]
    await desk.ledger.close()


async def test_what_comes_while_the_place_is_away_is_added_to_what_waits_of_its_minute() -> None:
    desk = Desk()
    clock = desk.harness.clock
    clock.turn(MINUTE_S - clock.wall() % MINUTE_S)
    desk.place.failure = NotWritten("away")
    began_s = clock.wall()
    for _ in range(3 * 60):
        desk.enter()
        await desk.turn(1.0)
    desk.place.failure = None
    await desk.turn(AGAIN_S)
    assert desk.place.counts == [[("gpt", 60)]] * 3  # one write for each minute
    assert sorted(each.time_s - began_s for each in desk.place.records) == [59, 119, 179]
    await desk.ledger.close()


async def test_too_many_kinds_are_dropped_counted_and_told_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_KINDS", 3)
    desk = Desk()
    for model in "abcdedcba":
        desk.enter(model)
    assert desk.dropped == 3
    assert [each.message for each in caplog.records] == ["ledger_dropped"]
    desk.harness.clock.turn(TELL_S)
    await desk.harness.settled()
    assert desk.place.counts == [[("a", 2), ("b", 2), ("c", 2)]]
    desk.place.failure = ValueError("never")
    desk.enter()
    await desk.turn(GATHER_S)
    assert (desk.place.calls, desk.dropped) == (6, 4)
    told: list[Any] = caplog.records
    assert [(each.calls, each.reason) for each in told] == [(1, "too many wait"), (3, "never")]
    await desk.ledger.close()


async def test_when_no_more_kinds_may_wait_those_that_do_are_still_added_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_KINDS", 2)
    desk = Desk()
    desk.place.failure = NotWritten("away")
    for _ in range(3):
        for model in "abc":
            desk.enter(model)
        await desk.turn(GATHER_S)
    desk.place.failure = None
    await desk.turn(AGAIN_S)
    assert (desk.place.counts, desk.dropped) == ([[("a", 3), ("b", 3)]], 3)
    await desk.ledger.close()


async def test_calls_that_cannot_be_written_are_counted_and_not_tried_again() -> None:
    desk = Desk()
    desk.place.failure = ValueError("never")
    for model in "aab":
        desk.enter(model)
    await desk.turn(GATHER_S)
    desk.place.failure = None
    await desk.turn(AGAIN_S)
    assert (desk.place.calls, desk.dropped) == (0, 3)
    await desk.ledger.close()


async def test_close_writes_what_waits_and_what_comes_later_is_dropped() -> None:
    desk = Desk()
    desk.enter()
    await desk.ledger.close()
    await desk.ledger.close()
    assert desk.place.calls == 1
    desk.enter()
    assert desk.dropped == 1


async def test_close_waits_for_a_write_under_way_and_loses_what_cannot_be_written() -> None:
    desk = Desk()
    desk.place.gate.clear()
    desk.enter()
    desk.harness.clock.turn(GATHER_S)
    await asyncio.sleep(0)
    desk.enter()
    closing = asyncio.create_task(desk.ledger.close())
    await asyncio.sleep(0)
    desk.place.failure = NotWritten("away")
    desk.place.gate.set()
    await closing
    assert (desk.place.calls, desk.dropped) == (0, 2)


async def test_a_write_that_is_cancelled_is_not_made_twice() -> None:
    desk = Desk()
    desk.place.gate.clear()
    desk.enter()
    desk.harness.clock.turn(GATHER_S)
    await asyncio.sleep(0)
    await desk.harness.tasks.stop(timeout_s=0)
    desk.place.gate.set()
    await desk.ledger.close()
    assert desk.place.calls == 0  # the thread, or the store, has it already


async def test_old_records_go_in_small_steps_and_then_hourly() -> None:
    desk = Desk()
    for days in (7, 30):
        desk.ledger.join(days)
    desk.place.has_more = True
    await desk.turn(PRUNE_EVERY_S)
    await desk.turn(PRUNE_PAUSE_S)
    desk.place.has_more = False
    await desk.turn(PRUNE_PAUSE_S)
    await desk.turn(PRUNE_EVERY_S - 1)
    assert len(desk.place.pruned_before) == 3
    desk.ledger.leave(30)
    await desk.turn(1)
    now_s = desk.harness.clock.wall()
    # The longest that anyone wants holds.
    assert desk.place.pruned_before[-1] == now_s - 7 * 86_400
    assert desk.place.pruned_before[0] == pytest.approx(now_s - 30 * 86_400 - 3600, abs=100)
    await desk.ledger.close()


async def test_a_failed_pruning_is_told_and_tried_an_hour_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    desk = Desk()
    desk.ledger.join(7)
    desk.place.failure = OSError("no")
    await desk.turn(PRUNE_EVERY_S)
    assert "ledger_not_pruned" in [each.message for each in caplog.records]
    await desk.turn(PRUNE_EVERY_S)
    assert len(desk.place.pruned_before) == 2
    await desk.ledger.close()


async def test_a_clock_that_is_a_year_ahead_prunes_nothing() -> None:
    desk = Desk()
    desk.ledger.join(7)
    clock = desk.harness.clock
    clock._wall += 365 * 86_400
    await desk.turn(PRUNE_EVERY_S)
    assert desk.place.pruned_before == []
    clock._wall -= 365 * 86_400
    await desk.turn(PRUNE_EVERY_S)
    assert desk.place.pruned_before == []  # which of the two was right, nobody knows yet
    for _ in range(int(DOUBT_S / PRUNE_EVERY_S)):
        await desk.turn(PRUNE_EVERY_S)
    assert desk.place.pruned_before == [clock.wall() - 7 * 86_400]
    await desk.ledger.close()


async def test_nothing_is_pruned_in_the_first_hour_when_the_clock_may_not_be_set_yet() -> None:
    desk = Desk()
    desk.ledger.join(7)
    await desk.turn(PRUNE_EVERY_S - 1)
    assert desk.place.pruned_before == []
    await desk.turn(1)
    assert len(desk.place.pruned_before) == 1
    await desk.ledger.close()


async def test_records_of_an_hour_ago_are_merged_in_steps_and_then_every_ten_minutes() -> None:
    desk = Desk()
    desk.ledger.join(7)
    desk.ledger.join(7)
    desk.place.has_more = True
    await desk.turn(MERGE_FIRST_S - 1)
    assert desk.place.merged_before == []
    await desk.turn(1)
    assert desk.place.merged_before == [desk.harness.clock.wall() - MERGE_AFTER_S]
    await desk.turn(MERGE_PAUSE_S)
    desk.place.has_more = False
    await desk.turn(MERGE_PAUSE_S)
    assert len(desk.place.merged_before) == 3
    await desk.turn(MERGE_EVERY_S - 1)
    assert len(desk.place.merged_before) == 3
    await desk.turn(1)
    assert desk.place.merged_before[3:] == [desk.harness.clock.wall() - MERGE_AFTER_S]
    await desk.ledger.close()


async def test_a_failed_merge_is_told_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    desk.ledger.join(7)
    desk.place.failure = OSError("no")
    desk.place.has_more = True
    await desk.turn(MERGE_FIRST_S)
    told: list[Any] = [each for each in caplog.records if each.message == "ledger_not_merged"]
    assert [each.error for each in told] == ["no"]
    await desk.turn(MERGE_EVERY_S - 1)
    assert len(desk.place.merged_before) == 1
    await desk.turn(1)
    assert len(desk.place.merged_before) == 2
    await desk.ledger.close()


async def test_nothing_is_pruned_or_merged_where_no_chain_has_a_ledger_or_after_the_end() -> None:
    desk = Desk()
    desk.ledger.join(7)
    desk.ledger.leave(7)
    await desk.turn(MERGE_FIRST_S)
    assert (desk.place.pruned_before, desk.place.merged_before) == ([], [])
    desk.ledger.join(7)  # a reload brings it back
    await desk.turn(PRUNE_EVERY_S)
    assert [len(desk.place.pruned_before), len(desk.place.merged_before)] == [1, 1]
    await desk.ledger.close()
    desk.ledger.join(7)
    assert desk.harness.clock._timers == []


async def test_a_step_that_ends_after_the_ledger_begins_no_other() -> None:
    desk = Desk()
    held, go_on = asyncio.Event(), asyncio.Event()

    async def merge(before_s: float) -> bool:
        held.set()
        await go_on.wait()
        return True

    desk.place.merge = merge  # type: ignore[method-assign]
    desk.ledger.join(7)
    desk.harness.clock.turn(MERGE_FIRST_S)
    await held.wait()
    await desk.ledger.close()
    go_on.set()
    await desk.harness.settled()
    assert desk.harness.clock._timers == []


async def test_records_are_kept_as_long_as_any_team_wants() -> None:
    desk = Desk()
    for days in (90, 7):
        desk.ledger.join(days)
    desk.enter()
    await desk.turn(GATHER_S)
    assert desk.place.keep_days == 90
    for days in (90, 7):
        desk.ledger.leave(days)
    desk.enter()
    await desk.ledger.close()
    assert desk.place.keep_days == 7  # the last one is gone before the last record is written


@pytest.mark.parametrize(
    ("where", "store", "data_dir", "place"),
    [
        ("auto", STORE, Path("x"), "redis"),
        ("auto", STORE, None, "redis"),
        ("auto", MEMORY, Path("x"), "disk"),
        ("auto", MEMORY, None, None),
        ("disk", STORE, Path("x"), "disk"),
        ("redis", STORE, Path("x"), "redis"),
        ("off", STORE, Path("x"), None),
    ],
)
def test_place_follows_from_the_setting_and_what_there_is(
    where: Where, store: StoreAddress, data_dir: Path | None, place: str | None
) -> None:
    assert place_of(where, store, data_dir) == place


def test_a_place_that_is_not_there_is_refused_with_the_missing_setting() -> None:
    with pytest.raises(ValueError, match="`where: disk` needs a `data_dir`"):
        place_of("disk", STORE, None)
    with pytest.raises(ValueError, match="`where: redis` needs a `store"):
        place_of("redis", MEMORY, Path("x"))


def test_text_that_no_encoding_takes_is_made_sayable() -> None:
    assert sayable("模型") == "模型"
    assert sayable("a\udcff") == "a?"
