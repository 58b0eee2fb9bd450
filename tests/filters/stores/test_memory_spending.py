"""Spending of one process, and of several that have the same file open."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.stores import memory_spending
from filters.stores.memory_spending import (
    KEEP_S,
    LEASE_S,
    PRUNE_EVERY_S,
    READ_S,
    SCHEMA,
    WRITE_S,
    MemoryHeld,
    MemoryPurse,
    MemorySpending,
)
from filters.stores.spending import Account, Crossed, Level, Line
from filters.stores.sqlite import Database
from sidecar.api import CallFilter
from tests.support.harness import FakeClock, Harness

NOW = 1_700_000_000
DAY = Account("tokens|day 2023-11-14|team=search", NOW + 3600)
MONTH = Account("usd|month 2023-11-01|team=search", NOW + 9 * 86_400)
HARD = [Line(0, 1000)]
FINDS_WITHIN_S = 5.0


class Process:
    """One process with its counts, and its own connection to the file if there is one."""

    def __init__(self, path: Path | None, clock: FakeClock, workers: int = 1) -> None:
        self.harness = Harness(CallFilter, workers=workers)
        self.harness.clock = clock
        self.database = None if path is None else Database(path, SCHEMA)
        kit = self.harness._make(CallFilter).kit
        self.spending = MemorySpending(kit, self.database)

    async def written(self) -> None:
        """Return once all that was counted is in the file."""
        self.spending._write()
        await self.harness.settled()

    async def looked(self) -> None:
        """Return once it has looked at the file again."""
        self.spending._look()
        await self.harness.settled()

    async def close(self) -> None:
        await self.harness.tasks.stop(timeout_s=FINDS_WITHIN_S)
        await self.spending.close()
        if self.database is not None:
            await self.database.close()


Start = Callable[..., Any]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(wall=NOW)


@pytest.fixture
async def start(tmp_path: Path, clock: FakeClock) -> AsyncIterator[Start]:
    """Starts processes that share a file; `path=None`: that have none."""
    made: list[Process] = []

    async def start_one(**more: Any) -> Process:
        path = more.pop("path", tmp_path / "budgets.db")
        process = Process(path, clock, **more)
        made.append(process)
        await process.spending.load()
        return process

    yield start_one
    for process in made:
        await process.close()


def reserve(purse: MemoryPurse, *amounts: int, lines: Any = HARD) -> MemoryHeld:
    held = purse.reserve_now(amounts, lines)
    assert isinstance(held, MemoryHeld), held
    return held


# One process


async def test_what_is_reserved_and_spent_counts_for_the_next(start: Start) -> None:
    purse = (await start(path=None)).spending.purse([DAY])
    held = reserve(purse, 600)
    assert held.totals == [600]
    assert purse.reserve_now([401], HARD) == Crossed(0, Level(0, 600))
    held.settle([100])
    assert reserve(purse, 900).totals == [1000]
    assert await purse.levels() == [Level(100, 900)]


async def test_nothing_is_reserved_when_one_line_would_be_crossed(start: Start) -> None:
    purse = (await start(path=None)).spending.purse([DAY, MONTH])
    lines = [Line(0, 1000), Line(1, 5), Line(0, 50)]
    assert purse.reserve_now([100, 6], lines) == Crossed(1, Level(0, 0))
    assert purse.reserve_now([100, 5], lines) == Crossed(2, Level(0, 0))
    assert await purse.levels() == [Level(0, 0), Level(0, 0)]
    reserve(purse, 50, 5, lines=lines)


async def test_settling_again_changes_nothing(start: Start) -> None:
    purse = (await start(path=None)).spending.purse([DAY])
    held = reserve(purse, 600)
    held.settle([100])
    held.settle([500])
    assert await purse.levels() == [Level(100, 0)]


async def test_purses_of_the_same_account_share_it(start: Start) -> None:
    spending = (await start(path=None)).spending
    reserve(spending.purse([DAY]), 600)
    assert spending.purse([MONTH, DAY]).reserve_now([0, 401], [Line(1, 1000)]) == Crossed(
        0, Level(0, 600)
    )


steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, 400)),
        st.tuples(st.just("settle"), st.integers(0, 30)),
    ),
    max_size=60,
)


@given(steps, st.integers(1, 1000))
def test_with_exact_estimates_nothing_is_ever_over_a_hard_limit(
    steps: list[tuple[str, int]], most: int
) -> None:
    kit = Harness(CallFilter).filters[0].kit
    purse = MemorySpending(kit, None).purse([DAY])
    held: list[tuple[MemoryHeld, int]] = []
    spent = 0
    for word, number in steps:
        if word == "reserve":
            found = purse.reserve_now([number], [Line(0, most)])
            fits = spent + sum(amount for _, amount in held) + number <= most
            assert isinstance(found, MemoryHeld) == fits
            if isinstance(found, MemoryHeld):
                held.append((found, number))
        elif held:
            grant, amount = held.pop(number % len(held))
            used = amount * (number % 4) // 3
            grant.settle([used])
            spent += used
        (level,) = (purse._level(each) for each in purse._sums)
        assert level == (spent, sum(amount for _, amount in held))
        assert level.spent + level.reserved <= most


async def test_workers_without_a_file_have_their_share(start: Start) -> None:
    purse = (await start(path=None, workers=4)).spending.purse([DAY])
    assert reserve(purse, 250).totals == [1000]
    assert purse.reserve_now([1], HARD) == Crossed(0, Level(0, 1000))


async def test_accounts_are_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_spending, "MAX_ACCOUNTS", 4)
    process = await start(path=None)
    spending = process.spending
    for number in range(10):
        purse = spending.purse([Account(f"tokens|day 2023-11-14|key={number}", NOW + 3600)])
        if number < 7:
            reserve(purse, 300).settle([300])
        else:  # the fourth and those after it are counted together
            assert purse.reserve_now([300], HARD) == Crossed(0, Level(900, 0))
    assert len(spending._sums) == 5
    process.harness.clock.turn(3600)  # the day is over
    tomorrow = Account("tokens|day 2023-11-15|key=8", NOW + 90_000)
    reserve(spending.purse([tomorrow]), 1000)
    assert list(spending._sums) == [tomorrow.key]


# The file


async def test_what_was_spent_is_there_after_a_restart(start: Start) -> None:
    first = await start()
    purse = first.spending.purse([DAY, MONTH])
    reserve(purse, 600, 70).settle([500, 2**52])
    await first.close()
    second = await start()
    assert await second.spending.purse([DAY, MONTH]).levels() == [Level(500, 0), Level(2**52, 0)]


async def test_it_is_written_a_moment_later_whoever_asks(start: Start, clock: FakeClock) -> None:
    process = await start()
    reserve(process.spending.purse([DAY]), 600).settle([500])
    clock.turn(WRITE_S)
    await process.harness.settled()
    assert process.database is not None
    read = "SELECT spent, reserved FROM spending"
    assert await process.database.ask(lambda c: c.execute(read).fetchall()) == [(500, 0)]


async def test_another_process_sees_what_was_spent_and_is_reserved(start: Start) -> None:
    one, other = await start(), await start()
    here, there = one.spending.purse([DAY]), other.spending.purse([DAY])
    reserve(here, 300).settle([200])
    reserve(here, 100)
    await one.written()
    assert await there.levels() == [Level(0, 0)]  # not yet
    await other.looked()
    assert await there.levels() == [Level(200, 100)]
    assert there.reserve_now([701], HARD) == Crossed(0, Level(200, 100))
    reserve(there, 700)
    await other.written()
    await one.looked()
    assert await here.levels() == [Level(200, 800)]


async def test_it_looks_every_second(start: Start, clock: FakeClock) -> None:
    one, other = await start(), await start()
    for spent in (200, 500):
        reserve(one.spending.purse([DAY]), 300).settle([spent])
        await one.written()
        clock.turn(READ_S)
        await other.harness.settled()
    assert await other.spending.purse([DAY]).levels() == [Level(700, 0)]


async def test_a_file_that_nobody_has_written_is_not_read(start: Start) -> None:
    one, other = await start(), await start()
    asked: list[str] = []
    assert other.database is not None
    await other.database.ask(lambda connection: connection.set_trace_callback(asked.append))
    await other.looked()
    assert not [each for each in asked if each.startswith("SELECT")]
    reserve(one.spending.purse([DAY]), 300)
    await one.written()
    await other.looked()
    assert [each for each in asked if each.startswith("SELECT")]
    await other.database.ask(lambda connection: connection.set_trace_callback(None))


async def test_reservations_of_a_process_that_died_run_out(start: Start, clock: FakeClock) -> None:
    one, other = await start(), await start()
    purse = one.spending.purse([DAY])
    reserve(purse, 300).settle([200])
    reserve(purse, 100)
    await one.written()
    await other.looked()
    assert await other.spending.purse([DAY]).levels() == [Level(200, 100)]
    assert one.spending._read_timer is not None
    one.spending._read_timer.cancel()  # it is dead
    clock.turn(LEASE_S)
    await other.looked()
    assert await other.spending.purse([DAY]).levels() == [Level(200, 0)]


async def test_reservations_of_one_that_lives_do_not(start: Start, clock: FakeClock) -> None:
    one, other = await start(), await start()
    reserve(one.spending.purse([DAY]), 100)
    await one.written()
    for _ in range(15):
        clock.turn(READ_S)
        await one.written()
        await other.looked()
        await one.harness.settled()
    assert await other.spending.purse([DAY]).levels() == [Level(0, 100)]


async def test_what_could_not_be_written_is_written_later_though_nothing_changes_any_more(
    start: Start, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    process = await start()
    assert process.database is not None
    rename = "ALTER TABLE {} RENAME TO {}".format
    await process.database.ask(lambda c: c.execute(rename("spending", "away")))
    reserve(process.spending.purse([DAY]), 300).settle([200])
    for _ in range(3):
        await process.written()
    assert [each.message for each in caplog.records] == ["budgets_not_written"]
    await process.database.ask(lambda c: c.execute(rename("away", "spending")))
    clock.turn(READ_S)
    await process.harness.settled()
    clock.turn(WRITE_S)
    await process.harness.settled()
    other = await start()
    assert await other.spending.purse([DAY]).levels() == [Level(200, 0)]


async def test_a_write_that_is_cancelled_is_made_when_it_closes(start: Start) -> None:
    process = await start()
    reserve(process.spending.purse([DAY]), 300).settle([200])
    process.spending._write()
    await process.close()
    other = await start()
    assert await other.spending.purse([DAY]).levels() == [Level(200, 0)]


async def test_what_is_long_over_is_deleted_while_the_process_lives(
    start: Start, clock: FakeClock
) -> None:
    process = await start()
    spending = process.spending
    reserve(spending.purse([DAY, MONTH]), 300, 300).settle([300, 300])
    await process.written()
    clock.turn(3600 + KEEP_S - PRUNE_EVERY_S + 1)
    await process.harness.settled()
    assert await accounts(process) == [DAY.key, MONTH.key]  # late calls may still be settled
    clock.turn(PRUNE_EVERY_S)
    await process.harness.settled()
    assert await accounts(process) == [MONTH.key]
    assert list(spending._sums) == [MONTH.key]


async def test_a_clock_that_is_a_year_ahead_deletes_no_budget(
    start: Start, clock: FakeClock
) -> None:
    process = await start()
    purse = process.spending.purse([DAY, MONTH])
    reserve(purse, 300, 300).settle([300, 300])
    await process.written()
    clock._wall += 365 * 86_400
    clock.turn(PRUNE_EVERY_S)
    await process.harness.settled()
    assert await accounts(process) == [DAY.key, MONTH.key]
    assert list(process.spending._sums) == [DAY.key, MONTH.key]
    await process.close()
    late = await start()  # the clock is wrong from the start, and set a moment later
    clock._wall -= 365 * 86_400
    clock.turn(PRUNE_EVERY_S)
    await late.harness.settled()
    assert await accounts(late) == [DAY.key, MONTH.key]


async def test_a_file_that_cannot_be_read_is_told_once_and_calls_go_on(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    process = await start()
    assert process.database is not None
    purse = process.spending.purse([DAY])
    await process.database.ask(lambda connection: connection.execute("DROP TABLE spending"))
    for _ in range(3):
        process.spending._version = -1
        await process.looked()
    assert [record.message for record in caplog.records] == ["budgets_not_read"]
    reserve(purse, 100).settle([0])
    await process.database.ask(lambda connection: connection.execute(SCHEMA[0]))
    await process.looked()


async def test_loading_again_does_nothing(start: Start) -> None:
    process = await start()
    timer = process.spending._read_timer
    await process.spending.load()
    assert process.spending._read_timer is timer


async def accounts(process: Process) -> list[str]:
    """Whose rows are in the file."""
    assert process.database is not None
    read = "SELECT account FROM spending ORDER BY account"
    rows = await process.database.ask(lambda connection: connection.execute(read).fetchall())
    return [account for (account,) in rows]


async def test_closing_while_it_reads_leaves_nothing(start: Start) -> None:
    process = await start()
    reserve(process.spending.purse([DAY]), 100).settle([70])
    process.spending._look()
    await process.spending.close()
    await process.database.close()
    other = await start()
    assert await other.spending.purse([DAY]).levels() == [Level(70, 0)]


CHILD = """
import asyncio, sys
from pathlib import Path
from filters.stores.memory_spending import SCHEMA, MemorySpending
from filters.stores.spending import Account, Line
from filters.stores.sqlite import Database
from sidecar.api import CallFilter
from sidecar.clock import SystemClock
from tests.support.harness import Harness

async def main():
    harness = Harness(CallFilter)
    harness.clock = SystemClock()
    spending = MemorySpending(harness._make(CallFilter).kit, Database(Path(sys.argv[1]), SCHEMA))
    await spending.load()
    purse = spending.purse([Account("a", 4_000_000_000), Account("b", 4_000_000_000)])
    number = 0
    while True:
        purse.reserve_now([3, 3], [Line(0, 2**52)]).settle([1, 1])
        number += 1
        if number % 100 == 0:
            print(number, flush=True)
            await asyncio.sleep(0.001)

asyncio.run(main())
"""


def test_a_process_that_is_killed_loses_a_moment_and_tears_nothing(tmp_path: Path) -> None:
    path = tmp_path / "budgets.db"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert child.stdout is not None
    seen = 0
    while seen < 20_000:
        seen = int(child.stdout.readline())
    reader = sqlite3.connect(path)

    def spent() -> list[int]:
        rows = reader.execute("SELECT account, spent FROM spending ORDER BY account").fetchall()
        return [int(value) for _, value in rows]

    before = spent()
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().split()
    child.wait()
    child.stdout.close()
    counted = int(rest[-1]) if rest else seen
    here, there = spent()
    reader.close()
    assert here == there >= before[0]  # both accounts of one call, or none
    assert here <= counted + 100


async def test_many_settlements_are_few_transactions(start: Start, clock: FakeClock) -> None:
    process = await start()
    purse = process.spending.purse([DAY])
    begun: list[str] = []
    assert process.database is not None
    await process.database.ask(lambda connection: connection.set_trace_callback(begun.append))
    for _ in range(500):
        reserve(purse, 1).settle([1])
    clock.turn(WRITE_S)
    await process.harness.settled()
    await process.database.ask(lambda connection: connection.set_trace_callback(None))
    assert len([each for each in begun if each.startswith("INSERT")]) == 1
