"""Records on their way: gathered, kept while the place is away, dropped and told beyond that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from filters.stores import ledger as ledger_module
from filters.stores.ledger import (
    AGAIN_S,
    GATHER_S,
    PRUNE_EVERY_S,
    PRUNE_FIRST_S,
    PRUNE_PAUSE_S,
    TELL_S,
    Ledger,
    NotWritten,
    Record,
    Where,
    place_of,
    sayable,
    tokens_of,
)
from sidecar.api import Secret, StoreAddress, Usage
from tests.support.harness import MEMORY, Harness
from tests.support.ledger import record

STORE = StoreAddress(Secret("redis://127.0.0.1:6379/0"))


class Place:
    """A `Writer` that does as the test says."""

    def __init__(self) -> None:
        self.written: list[list[Record]] = []
        self.failure: Exception | None = None
        self.keep_days = 0
        self.pruned_before: list[float] = []
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

    @property
    def count(self) -> int:
        return sum(map(len, self.written))


class Desk:
    """A ledger, its place, and a clock turned by hand."""

    def __init__(self) -> None:
        self.harness = Harness()
        self.place = Place()
        kit: Any = self.harness  # it has what a ledger takes of a kit
        self.ledger = Ledger(kit, self.place)

    async def turn(self, seconds: float) -> None:
        self.harness.clock.turn(seconds)
        await self.harness.settled()

    @property
    def dropped(self) -> float:
        return float(self.harness.value("llm_sidecar_ledger_dropped"))


async def test_records_of_a_moment_are_written_together() -> None:
    desk = Desk()
    for number in range(5):
        desk.ledger.enter(record(id=str(number)))
    assert desk.place.written == []
    await desk.turn(GATHER_S)
    assert [[each.id for each in part] for part in desk.place.written] == [
        ["0", "1", "2", "3", "4"]
    ]
    await desk.ledger.close()


async def test_what_comes_during_a_write_is_written_next_and_once() -> None:
    desk = Desk()
    desk.place.gate.clear()
    desk.ledger.enter(record(id="first"))
    desk.harness.clock.turn(GATHER_S)
    await asyncio.sleep(0)
    desk.ledger.enter(record(id="second"))
    desk.place.gate.set()
    await desk.harness.settled()
    assert [[each.id for each in part] for part in desk.place.written] == [["first"], ["second"]]
    await desk.ledger.close()


async def test_records_wait_while_the_place_is_away_which_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    desk = Desk()
    desk.place.failure = NotWritten("away")
    desk.ledger.enter(record())
    await desk.turn(GATHER_S)
    await desk.turn(AGAIN_S)
    assert (desk.place.count, desk.dropped) == (0, 0)
    desk.place.failure = None
    desk.ledger.enter(record())
    await desk.turn(AGAIN_S)
    assert (desk.place.count, desk.dropped) == (2, 0)
    assert [each.message for each in caplog.records] == ["ledger_waits", "ledger_goes_on"]
    await desk.ledger.close()


async def test_what_is_too_much_is_dropped_counted_and_told_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_WAITING", 3)
    desk = Desk()
    for _ in range(5):
        desk.ledger.enter(record())
    assert desk.dropped == 2
    assert [each.message for each in caplog.records] == ["ledger_dropped"]
    desk.harness.clock.turn(TELL_S)
    await desk.harness.settled()
    desk.place.failure = ValueError("never")
    desk.ledger.enter(record())
    await desk.turn(GATHER_S)
    assert (desk.place.count, desk.dropped) == (3, 3)
    told: list[Any] = caplog.records
    assert [(each.records, each.reason) for each in told] == [(1, "too many wait"), (2, "never")]
    await desk.ledger.close()


async def test_records_that_cannot_be_written_are_not_tried_again() -> None:
    desk = Desk()
    desk.place.failure = ValueError("never")
    desk.ledger.enter(record())
    await desk.turn(GATHER_S)
    desk.place.failure = None
    await desk.turn(AGAIN_S)
    assert (desk.place.count, desk.dropped) == (0, 1)
    await desk.ledger.close()


async def test_close_writes_what_waits_and_what_comes_later_is_dropped() -> None:
    desk = Desk()
    desk.ledger.enter(record())
    await desk.ledger.close()
    await desk.ledger.close()
    assert desk.place.count == 1
    desk.ledger.enter(record())
    assert desk.dropped == 1


async def test_close_waits_for_a_write_under_way_and_loses_what_cannot_be_written() -> None:
    desk = Desk()
    desk.place.gate.clear()
    desk.ledger.enter(record())
    desk.harness.clock.turn(GATHER_S)
    await asyncio.sleep(0)
    desk.ledger.enter(record())
    closing = asyncio.create_task(desk.ledger.close())
    await asyncio.sleep(0)
    desk.place.failure = NotWritten("away")
    desk.place.gate.set()
    await closing
    assert (desk.place.count, desk.dropped) == (0, 2)


async def test_a_write_that_is_cancelled_is_not_made_twice() -> None:
    desk = Desk()
    desk.place.gate.clear()
    desk.ledger.enter(record())
    desk.harness.clock.turn(GATHER_S)
    await asyncio.sleep(0)
    await desk.harness.tasks.stop(timeout_s=0)
    desk.place.gate.set()
    await desk.ledger.close()
    assert desk.place.count == 0  # the thread, or the store, has it already


async def test_old_records_go_in_small_steps_and_then_daily() -> None:
    desk = Desk()
    for days in (7, 30):
        desk.ledger.join(days)
    desk.place.has_more = True
    await desk.turn(PRUNE_FIRST_S)
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
    assert desk.place.pruned_before[0] == pytest.approx(now_s - 31 * 86_400, abs=100)
    await desk.ledger.close()


async def test_a_failed_pruning_is_told_and_tried_the_next_day(
    caplog: pytest.LogCaptureFixture,
) -> None:
    desk = Desk()
    desk.ledger.join(7)
    desk.place.failure = OSError("no")
    await desk.turn(PRUNE_FIRST_S)
    assert [each.message for each in caplog.records] == ["ledger_not_pruned"]
    await desk.turn(PRUNE_EVERY_S)
    assert len(desk.place.pruned_before) == 2
    await desk.ledger.close()


async def test_records_are_kept_as_long_as_any_team_wants() -> None:
    desk = Desk()
    for days in (90, 7):
        desk.ledger.join(days)
    desk.ledger.enter(record())
    await desk.turn(GATHER_S)
    assert desk.place.keep_days == 90
    for days in (90, 7):
        desk.ledger.leave(days)
    desk.ledger.enter(record())
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


def test_figures_that_no_sum_could_hold_are_bounded() -> None:
    usage, reported, lost = tokens_of(record(usage=Usage(10**30, 5, is_estimated=True)))
    assert usage == Usage(10**12, 5, is_estimated=True)
    assert (reported, lost) == (Usage(10, 12), Usage())


def test_text_that_no_encoding_takes_is_made_sayable() -> None:
    assert sayable("模型") == "模型"
    assert sayable("a\udcff") == "a?"
