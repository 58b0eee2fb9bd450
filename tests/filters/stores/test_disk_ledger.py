"""Records on disk: exact sums, read beside a writer, whole after a kill."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, closing
from decimal import Decimal
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.algo.usage_report import MEASURES, Line, Query
from filters.stores import disk_ledger
from filters.stores.disk_ledger import (
    COLUMNS,
    NAME,
    SCHEMA,
    DiskLedger,
    open_disk_ledger,
    read_disk,
)
from filters.stores.ledger import MAX_TOKENS, MINUTE_S, NoLedger, NotWritten, Record
from filters.stores.sqlite import Database
from sidecar.api import Cost, Usage
from tests.support.harness import Harness
from tests.support.ledger import NOON_S, cached, record

EVER = Query(("model",), 0.0, inf)


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[DiskLedger]:
    database = Database(tmp_path / NAME, SCHEMA)
    yield DiskLedger(database)
    await database.close()


def sums(line: Line) -> dict[str, int]:
    return {name: each for name, each in zip(MEASURES, line.sums, strict=True) if each}


async def test_sums_of_every_kind_are_told_apart(disk: DiskLedger, tmp_path: Path) -> None:
    records = [
        record(usage=Usage(10, 20, 3, 2, 5, 1, False), reported=Usage(10, 20)),
        record(usage=Usage(7, 8, is_estimated=True), reported=Usage(7, 1), lost=Usage(100, 0)),
        cached(usage=Usage(10, 20, 3)),
        record(is_side=True, usage=Usage(4, 0), reported=Usage(4, 0), cost="0"),
    ]
    await disk.write(records, 90)
    (line,) = read_disk(tmp_path, EVER)
    assert (line.names, line.currency, line.cost) == (("gpt",), "USD", Decimal("0.0000246"))
    assert sums(line) == {
        "calls": 3,
        "cached_calls": 1,
        "input_tokens": 27,
        "output_tokens": 48,
        "cached_input_tokens": 6,
        "cache_write_tokens": 2,
        "cache_write_1h_tokens": 1,
        "reasoning_tokens": 5,
        "estimated_calls": 1,
        "saved_input_tokens": 10,
        "saved_output_tokens": 20,
        "reported_input_tokens": 17,
        "reported_output_tokens": 21,
        "lost_input_tokens": 100,
        "side_calls": 1,
        "side_input_tokens": 4,
    }


async def test_a_record_counts_for_all_its_calls(disk: DiskLedger, tmp_path: Path) -> None:
    records = [
        record(calls=5, usage=Usage(50, 60), cost="0.5"),
        record(calls=4, usage=Usage(40, 4, is_estimated=True), reported=None, cost="0.25"),
        cached(calls=3, usage=Usage(30, 3)),
        record(calls=2, is_side=True, usage=Usage(8, 0), reported=Usage(8, 0), cost="0"),
    ]
    await disk.write(records, 90)
    (line,) = read_disk(tmp_path, EVER)
    assert line.cost == Decimal("0.75")
    assert sums(line) == {
        "calls": 12,
        "cached_calls": 3,
        "input_tokens": 120,
        "output_tokens": 67,
        "estimated_calls": 4,
        "saved_input_tokens": 30,
        "saved_output_tokens": 3,
        "reported_input_tokens": 10,
        "reported_output_tokens": 12,
        "side_calls": 2,
        "side_input_tokens": 8,
    }


async def test_groups_are_those_that_are_asked_for(disk: DiskLedger, tmp_path: Path) -> None:
    await disk.write([record(), record(status=500), record(team="ads"), record(cost=None)], 90)
    by = ("team", "upstream", "upstream_model", "endpoint", "key", "cached", "status", "hour")
    found = {
        (line.names, line.currency): line.sums[0]
        for line in read_disk(tmp_path, Query(by, 0.0, inf))
    }
    slot = int(NOON_S)
    rest = ("openai", "gpt-4o-mini", "chat_completions", "0123456789abcdef", "")
    assert found == {
        (("search", *rest, 200, slot), "USD"): 1,
        (("search", *rest, 500, slot), "USD"): 1,
        (("ads", *rest, 200, slot), "USD"): 1,
        (("search", *rest, 200, slot), None): 1,
    }


async def test_only_what_ended_in_the_time_and_is_asked_for_counts(
    disk: DiskLedger, tmp_path: Path
) -> None:
    records = [
        record(time_s=NOON_S - 0.001),
        record(time_s=NOON_S),
        record(time_s=NOON_S + 59.999, team="ads"),
        record(time_s=NOON_S + 59.999, model="claude"),
        record(time_s=NOON_S + 60),
    ]
    await disk.write(records, 90)

    def calls(team: str | None = None, model: str | None = None) -> int:
        query = Query(("team",), NOON_S, NOON_S + 60, team, model)
        return sum(line.sums[0] for line in read_disk(tmp_path, query))

    assert (calls(), calls("search"), calls("ads"), calls("none")) == (3, 2, 1, 0)
    assert (calls(model="gpt"), calls("search", "claude"), calls("ads", "claude")) == (2, 1, 0)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.decimals(0, 10**6, places=14), min_size=1, max_size=200))
def test_money_is_added_without_rounding(amounts: list[Decimal]) -> None:
    total = disk_ledger._ExactSum()
    for each in amounts:
        total.step(format(each, "f"))
    assert int(Decimal(total.finalize()).scaleb(14)) == sum(
        int(each.scaleb(14)) for each in amounts
    )


async def test_money_stands_as_decimal_text(disk: DiskLedger, tmp_path: Path) -> None:
    costs = [Decimal("1E-7"), Decimal("0.1"), Decimal("0.20")]
    await disk.write([record(cost=Cost(each, "USD")) for each in costs], 90)
    (line,) = read_disk(tmp_path, EVER)
    assert line.cost == Decimal("0.3000001")
    rows = sqlite3.connect(tmp_path / NAME).execute("SELECT cost, typeof(cost) FROM calls")
    assert rows.fetchall() == [("0.0000001", "text"), ("0.1", "text"), ("0.20", "text")]


async def test_what_an_upstream_or_a_caller_makes_up_can_be_written(
    disk: DiskLedger, tmp_path: Path
) -> None:
    most = Usage(10**12, 10**12, 10**12, 10**12, 10**12, 10**12)
    name = "\udcff\0'; DROP TABLE calls"
    wild = record(usage=most, reported=most, lost=most, model=name, upstream_model=name)
    await disk.write([wild] * 100, 90)
    (line,) = read_disk(tmp_path, EVER)
    assert line.names == ("?\0'; DROP TABLE calls",)
    assert sums(line)["input_tokens"] == 100 * 10**12


async def test_columns_are_those_of_the_table(disk: DiskLedger, tmp_path: Path) -> None:
    rows = sqlite3.connect(tmp_path / NAME).execute("PRAGMA table_info(calls)").fetchall()
    assert tuple(row[1] for row in rows) == COLUMNS


async def test_a_row_holds_all_of_its_record(disk: DiskLedger, tmp_path: Path) -> None:
    await disk.write([record(calls=3, lost=Usage(1, 2), attempts=4, total_s=0.1236)], 90)
    connection = sqlite3.connect(tmp_path / NAME)
    connection.row_factory = sqlite3.Row
    row = dict(connection.execute("SELECT * FROM calls").fetchone())
    assert row == {
        "time_ms": int(NOON_S * 1000),
        "team": "search",
        "key_id": "0123456789abcdef",
        "endpoint": "chat_completions",
        "model": "gpt",
        "upstream": "openai",
        "upstream_model": "gpt-4o-mini",
        "status": 200,
        "outcome": "completed",
        "cached": "",
        "is_side": 0,
        "is_estimated": 0,
        "currency": "USD",
        "calls": 3,
        "input_tokens": 10,
        "output_tokens": 12,
        "cached_tokens": 0,
        "cache_write_tokens": 0,
        "cache_write_1h_tokens": 0,
        "reasoning_tokens": 0,
        "reported_input_tokens": 10,
        "reported_output_tokens": 12,
        "lost_input_tokens": 1,
        "lost_output_tokens": 2,
        "attempts": 4,
        "total_ms": 124,
        "cost": "0.0000123",
    }
    connection.close()


async def test_of_unknown_cost_the_row_says_nothing(disk: DiskLedger, tmp_path: Path) -> None:
    await disk.write([record(cost=None)], 90)
    rows = sqlite3.connect(tmp_path / NAME).execute("SELECT cost, currency FROM calls")
    assert rows.fetchall() == [(None, None)]


async def test_old_records_are_deleted_a_step_at_a_time(
    disk: DiskLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_ledger, "PRUNE_STEP", 2)
    records = [record(time_s=NOON_S + number) for number in range(5)]
    await disk.write(records, 90)
    assert await disk.prune(NOON_S + 3)
    assert not await disk.prune(NOON_S + 3)
    (line,) = read_disk(tmp_path, EVER)
    assert line.sums[0] == 2


async def test_a_locked_file_is_to_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("filters.stores.sqlite.BUSY_S", 0.01)
    database = Database(tmp_path / NAME, SCHEMA)
    disk = DiskLedger(database)
    other = sqlite3.connect(tmp_path / NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(NotWritten, match="locked"):
        await disk.write([record()], 90)
    assert list(read_disk(tmp_path, EVER)) == []  # readers do not wait for a writer
    other.execute("ROLLBACK")
    await disk.write([record()], 90)
    other.close()
    (line,) = read_disk(tmp_path, EVER)
    assert line.sums[0] == 1
    await database.close()


# Merging

LATER_S = NOON_S + 86_400
"""When all has long been over."""
MINUTE_MS = MINUTE_S * 1000
EXACTLY = (
    "SELECT time_ms / 60000, team, key_id, endpoint, model, upstream, upstream_model, status, "
    "outcome, cached, is_side, is_estimated, currency, MAX(time_ms), SUM(calls), "
    "SUM(input_tokens), SUM(output_tokens), SUM(cached_tokens), SUM(cache_write_tokens), "
    "SUM(cache_write_1h_tokens), SUM(reasoning_tokens), SUM(reported_input_tokens), "
    "SUM(reported_output_tokens), SUM(lost_input_tokens), SUM(lost_output_tokens), "
    "SUM(attempts), SUM(total_ms), exact(cost), COUNT(cost) > 0 FROM calls "
    "GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
)
"""All that is known of each minute and kind, asked for in another way than merging does."""


class UnitsSum:
    """Adds money as whole numbers of 1e-20."""

    def __init__(self) -> None:
        self.sum = 0

    def step(self, amount: str | None) -> None:
        whole, _, part = (amount or "0").partition(".")
        self.sum += int(whole + part.ljust(20, "0"))

    def finalize(self) -> str:
        return str(self.sum)


def known(folder: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / NAME)) as connection:
        connection.create_aggregate("exact", 1, UnitsSum)  # type: ignore[arg-type]
        return connection.execute(EXACTLY).fetchall()


def asked(folder: Path, sql: str) -> Any:
    """The one value."""
    with closing(sqlite3.connect(folder / NAME)) as connection:
        return connection.execute(sql).fetchone()[0]


def rows_of(folder: Path, columns: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / NAME)) as connection:
        return connection.execute(f"SELECT {columns} FROM calls ORDER BY rowid").fetchall()


async def merge_all(disk: DiskLedger, before_s: float = LATER_S) -> int:
    """In how many steps."""
    steps = 0
    while await disk.merge(before_s):
        steps += 1
    return steps


async def test_rows_of_a_minute_become_one_for_each_kind_with_the_time_of_the_newest(
    disk: DiskLedger, tmp_path: Path
) -> None:
    records = [
        record(time_s=NOON_S, cost="0.1"),
        record(time_s=NOON_S + 59.9, calls=2, usage=Usage(1, 2, 3, 4, 5, 6), cost="0.20"),
        record(time_s=NOON_S + 30, model="claude", cost=None),
        record(time_s=NOON_S + 60, cost="0.4"),
        record(time_s=NOON_S + 30, cost="0.0000000000000000000000001", lost=Usage(7, 8)),
        record(time_s=NOON_S + 31, model="claude", cost=None, attempts=3, total_s=0.0005),
    ]
    await disk.write(records, 90)
    assert await merge_all(disk) == 2
    columns = "model, time_ms, calls, input_tokens, lost_output_tokens, attempts, total_ms, cost"
    noon_ms = int(NOON_S * 1000)
    assert sorted(rows_of(tmp_path, columns)) == [
        ("claude", noon_ms + 31_000, 2, 20, 0, 4, 250, None),
        ("gpt", noon_ms + 59_900, 4, 21, 8, 3, 750, "0.3000000000000000000000001"),
        ("gpt", noon_ms + 60_000, 1, 10, 0, 1, 250, "0.4"),
    ]


SOME = st.builds(
    record,
    time_s=st.integers(0, 4 * MINUTE_MS - 1).map(lambda ms: NOON_S + ms / 1000),
    calls=st.integers(1, 3),
    usage=st.builds(Usage, *[st.integers(0, MAX_TOKENS)] * 6, is_estimated=st.booleans()),
    reported=st.builds(Usage, st.integers(0, 9), st.integers(0, 9)),
    lost=st.none() | st.builds(Usage, st.integers(0, 9), st.integers(0, 9)),
    cost=st.none()
    | st.builds(Cost, st.decimals(0, 10**6, places=20), st.sampled_from(["USD", "CNY"])),
    attempts=st.integers(0, 3),
    total_s=st.floats(0, 100),
    model=st.sampled_from(["gpt", "gpt\0", "gpt\0a", "\udcff", "'", " "]),
    team=st.sampled_from(["search", "ads"]),
    status=st.sampled_from([200, 500]),
    cached=st.sampled_from(["", "hit"]),
    is_side=st.booleans(),
)
ROUNDS = st.lists(
    st.tuples(st.lists(SOME | st.just(record()), min_size=1, max_size=30), st.integers(0, 9)),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(ROUNDS, st.integers(1, 8))
async def test_merging_changes_no_sum_and_no_minute_whatever_comes_between_its_steps(
    rounds: list[tuple[list[Record], int]], step: int
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_ledger, "MERGE_STEP", step)
        merged, plain = [Path(folder) / name for name in ("merged", "plain")]
        databases = [Database(each / NAME, SCHEMA) for each in (merged, plain)]
        disk, other = map(DiskLedger, databases)
        for records, steps in rounds:
            await disk.write(records, 90)
            await other.write(records, 90)
            for _ in range(steps):
                await disk.merge(LATER_S)
            assert known(merged) == known(plain)
        await merge_all(disk)
        assert known(merged) == known(plain)
        assert asked(merged, "SELECT COUNT(*) FROM calls") == len(known(plain))
        for each in databases:
            await each.close()


async def test_only_minutes_that_ended_before_are_merged(disk: DiskLedger, tmp_path: Path) -> None:
    await disk.write([record(time_s=NOON_S + second) for second in range(180)], 90)
    assert await merge_all(disk, NOON_S + 119.9) == 1
    minutes = [time_ms // MINUTE_MS for (time_ms,) in rows_of(tmp_path, "time_ms")]
    assert [minutes.count(each) for each in sorted(set(minutes))] == [1, 60, 60]
    assert await merge_all(disk, NOON_S + 120) == 1
    assert len(rows_of(tmp_path, "1")) == 1 + 1 + 60


async def test_what_is_merged_is_not_touched_again_until_something_is_added(
    disk: DiskLedger, tmp_path: Path
) -> None:
    def changes() -> Any:
        return disk._database.ask(lambda connection: connection.total_changes)

    await disk.write([record(time_s=NOON_S + 60 * each) for each in range(5)], 90)
    before = await changes()
    assert await merge_all(disk) == 5
    assert await changes() == before + 5  # minutes of one row each: taken from the list, no more
    await disk.write([record(time_s=NOON_S + 60)], 90)  # it had to wait
    assert await merge_all(disk) == 1
    assert len(rows_of(tmp_path, "1")) == 5
    before = await changes()
    assert await merge_all(disk) == 0
    assert await changes() == before


@pytest.mark.parametrize("apart_ms", [0, 1])
async def test_a_minute_with_many_rows_and_kinds_is_merged_in_bounded_steps(
    disk: DiskLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart_ms: int
) -> None:
    monkeypatch.setattr(disk_ledger, "MERGE_STEP", 10)
    for number in range(100):
        time_s = NOON_S + number * apart_ms / 1000
        await disk.write([record(time_s=time_s, model=f"gpt-{number % 30}")], 90)
    before = known(tmp_path)
    assert await merge_all(disk) == (10 if apart_ms else 2)
    assert known(tmp_path) == before
    assert len(rows_of(tmp_path, "1")) == 30


async def test_merged_rows_stay_in_order_of_time_and_free_space_is_used_again(
    disk: DiskLedger, tmp_path: Path
) -> None:
    pages = []
    for hour in range(8):
        begin_s = NOON_S + 3600 * hour
        await disk.write([record(time_s=begin_s + second) for second in range(3600)], 90)
        await merge_all(disk, begin_s + 3600)
        pages.append(asked(tmp_path, "PRAGMA page_count"))
    assert pages[-1] < pages[0] * 1.2
    times = rows_of(tmp_path, "time_ms")
    assert len(times) == 8 * 60
    assert times == sorted(times)


async def test_a_locked_file_is_merged_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("filters.stores.sqlite.BUSY_S", 0.01)
    database = Database(tmp_path / NAME, SCHEMA)
    disk = DiskLedger(database)
    await disk.write([record(), record()], 90)
    with closing(sqlite3.connect(tmp_path / NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            await disk.merge(LATER_S)
        other.execute("ROLLBACK")
    assert await merge_all(disk) == 1
    assert rows_of(tmp_path, "calls") == [(2,)]
    await database.close()


MERGES = """
import asyncio, os, signal, sys
from pathlib import Path
from filters.stores import disk_ledger
from filters.stores.disk_ledger import NAME, SCHEMA, DiskLedger
from filters.stores.sqlite import Database

async def main():
    disk = DiskLedger(Database(Path(sys.argv[1]) / NAME, SCHEMA))
    steps, last = 0, int(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    while steps != last and await disk.merge(float("1e12")):
        steps += 1
    if steps == last:  # killed when its rows are deleted and the merged ones not there yet
        disk_ledger._added = lambda costs: os.kill(os.getpid(), signal.SIGKILL)
        await disk.merge(float("1e12"))
    print(steps, flush=True)

asyncio.run(main())
"""


def merging(folder: Path, steps: int = -1) -> subprocess.Popen[str]:
    """Another process that merges once it is told to; it is killed in the step after so many."""
    arguments = [sys.executable, "-c", MERGES, str(folder), str(steps)]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True)


async def written(folder: Path, records: Sequence[Record]) -> None:
    database = Database(folder / NAME, SCHEMA)
    await DiskLedger(database).write(records, 90)
    await database.close()


async def test_killed_in_a_step_it_has_merged_whole_minutes_and_lost_or_doubled_nothing(
    tmp_path: Path,
) -> None:
    await written(tmp_path, [record(time_s=NOON_S + second) for second in range(600)])
    before = known(tmp_path)
    with merging(tmp_path, steps=3) as process:
        process.communicate("go\n")
    assert process.returncode == -signal.SIGKILL
    assert known(tmp_path) == before
    assert len(rows_of(tmp_path, "1")) == 3 + 7 * 60
    assert asked(tmp_path, "PRAGMA integrity_check") == "ok"
    with merging(tmp_path) as process:
        told, _ = process.communicate("go\n")
    assert told.split() == ["ready", "7"]
    assert known(tmp_path) == before
    assert len(rows_of(tmp_path, "1")) == 10


async def test_processes_that_merge_one_file_share_the_work_and_readers_see_the_same_sums(
    tmp_path: Path,
) -> None:
    minutes = 300
    await written(
        tmp_path,
        [
            record(time_s=NOON_S + 6 * number, model=model)
            for number in range(10 * minutes)
            for model in ("gpt", "claude")
        ],
    )
    before, lines = known(tmp_path), list(read_disk(tmp_path, EVER))
    with ExitStack() as stack:
        processes = [stack.enter_context(merging(tmp_path)) for _ in range(2)]
        for each in processes:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        for each in processes:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        while any(each.poll() is None for each in processes):
            assert list(read_disk(tmp_path, EVER)) == lines
        steps = [int(each.communicate()[0]) for each in processes]
    assert sum(steps) == minutes  # no minute twice
    assert known(tmp_path) == before
    assert len(rows_of(tmp_path, "1")) == 2 * minutes


async def test_who_has_begun_to_read_sees_what_was_there_until_the_end(
    disk: DiskLedger, tmp_path: Path
) -> None:
    await disk.write([record()] * 10, 90)
    count = "SELECT COUNT(*), SUM(calls) FROM calls"
    with closing(sqlite3.connect(tmp_path / NAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute(count).fetchone() == (10, 10)
        assert await merge_all(disk) == 1  # which does not wait for it
        assert reader.execute(count).fetchone() == (10, 10)
        reader.execute("COMMIT")
        assert reader.execute(count).fetchone() == (1, 10)


# Reading


def test_without_a_file_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoLedger, match=r"ledger\.db: there is no ledger yet"):
        list(read_disk(tmp_path, EVER))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_ledger_is_told(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no database" * 1000)
    with pytest.raises(NoLedger, match=r"ledger\.db: it cannot be read: file is not a database"):
        list(read_disk(tmp_path, EVER))


def test_a_file_with_other_columns_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / NAME)) as connection:
        connection.execute("CREATE TABLE calls (time_ms INTEGER, id TEXT)")
        connection.execute("INSERT INTO calls VALUES (1, 'one')")
        connection.commit()
    kit: Any = Harness(data_dir=tmp_path)
    told = r"ledger\.db cannot be used: no such column: \w+: another version has begun it, move it"
    with pytest.raises(OSError, match=told):
        open_disk_ledger(kit)
    with pytest.raises(NoLedger, match=r"it cannot be read: no such .*: another version has begun"):
        list(read_disk(tmp_path, EVER))
    with closing(sqlite3.connect(tmp_path / NAME)) as connection:
        assert connection.execute("SELECT * FROM calls").fetchall() == [(1, "one")]


def test_a_damaged_file_is_refused_and_not_taken_for_another_version(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no database" * 1000)
    kit: Any = Harness(data_dir=tmp_path)
    with pytest.raises(OSError, match=r"cannot be used: file is not a database$"):
        open_disk_ledger(kit)


async def test_it_is_read_after_everybody_has_closed_it_and_is_not_changed(tmp_path: Path) -> None:
    database = Database(tmp_path / NAME, SCHEMA)
    await DiskLedger(database).write([record()], 90)
    await database.close()
    before = (tmp_path / NAME).read_bytes()
    (line,) = read_disk(tmp_path, EVER)
    assert line.sums[0] == 1
    assert (tmp_path / NAME).read_bytes() == before


async def test_it_is_read_in_a_folder_with_an_odd_name(tmp_path: Path) -> None:
    folder = tmp_path / "a?b#c%20d"
    database = Database(folder / NAME, SCHEMA)
    await DiskLedger(database).write([record()], 90)
    (line,) = read_disk(folder, EVER)
    assert line.sums[0] == 1
    await database.close()


# Kills

WRITES = """
import asyncio, sys
from pathlib import Path
from filters.stores.disk_ledger import NAME, SCHEMA, DiskLedger
from filters.stores.sqlite import Database
from tests.support.ledger import record

async def main():
    disk = DiskLedger(Database(Path(sys.argv[1]) / NAME, SCHEMA))
    for number in range(10**6):
        await disk.write([record(model=f"gpt-{part}") for part in range(20)], 90)
        print(number + 1, flush=True)

asyncio.run(main())
"""


def test_killed_mid_write_it_holds_whole_batches_and_all_that_were_written(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", WRITES, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 100:
            pass
        os.kill(process.pid, signal.SIGKILL)
        told = [int(line) for line in process.stdout.read().splitlines()]
    lines = list(read_disk(tmp_path, EVER))
    (batches,) = {line.sums[0] for line in lines}
    assert len(lines) == 20
    assert batches >= max([100, *told])
    assert all(line.cost == batches * Decimal("0.0000123") for line in lines)
    connection = sqlite3.connect(tmp_path / NAME)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_file_of_another_user_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(NoLedger, match=r"ledger\.db: Permission denied$"):
        list(read_disk(tmp_path, EVER))


async def test_a_model_that_no_encoding_takes_can_be_asked_for(tmp_path: Path) -> None:
    database = Database(tmp_path / NAME, SCHEMA)
    await DiskLedger(database).write([record(model="\udcff"), record()], 90)
    await database.close()
    (line,) = read_disk(tmp_path, Query(("model",), 0.0, inf, model="\udcff"))
    assert (line.names, line.sums[0]) == (("?",), 1)
    assert list(read_disk(tmp_path, Query(("model",), 0.0, inf, team="\udcff"))) == []


async def test_reading_needs_no_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path / NAME, SCHEMA)
    await DiskLedger(database).write([record()], 90)
    await database.close()
    asked: list[str] = []
    connect = sqlite3.connect

    def traced(*arguments: Any, **more: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **more)
        connection.set_trace_callback(asked.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    assert len(list(read_disk(tmp_path, EVER))) == 1
    assert asked[0] == "PRAGMA temp_store=MEMORY"
