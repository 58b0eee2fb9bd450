"""Records on disk: exact sums, read beside a writer, whole after a kill."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from decimal import Decimal
from math import inf
from pathlib import Path
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
from filters.stores.ledger import NoLedger, NotWritten
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
