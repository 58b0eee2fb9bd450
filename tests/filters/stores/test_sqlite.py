"""A database: what is posted is written in order and together, and survives; what fails is told."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from filters.stores import sqlite
from filters.stores.sqlite import Database

SCHEMA = ("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, text TEXT)",)


def insert(number: int, text: str = "x") -> sqlite.Work:
    return lambda connection: connection.execute("INSERT INTO rows VALUES (?, ?)", (number, text))


def count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM rows").fetchone()[0])


async def test_what_was_posted_before_is_there_when_it_is_asked_for(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.db", SCHEMA)
    assert all(database.post(insert(number)) for number in range(1000))
    assert await database.ask(count) == 1000
    await database.close()


async def test_close_writes_what_was_posted(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.db", SCHEMA)
    for number in range(5000):
        database.post(insert(number))
    await database.close()
    await database.close()
    assert count(sqlite3.connect(tmp_path / "a.db")) == 5000
    assert not database.post(insert(9999))
    with pytest.raises(RuntimeError, match="closed"):
        await database.ask(count)


async def test_one_that_fails_takes_no_other_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(tmp_path / "a.db", SCHEMA)
    for number in (1, 2, 2, 3):
        database.post(insert(number))
    assert await database.ask(count) == 3
    assert [record.message for record in caplog.records] == ["database_write_failed"]
    await database.close()


async def test_error_of_what_is_asked_is_the_asker_s_and_changes_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.db", SCHEMA)

    def half(connection: sqlite3.Connection) -> None:
        insert(1)(connection)
        raise LookupError("no more")

    with pytest.raises(LookupError):
        await database.ask(half)
    assert await database.ask(count) == 0
    await database.close()


async def test_asker_that_goes_away_harms_nobody(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.db", SCHEMA)
    held, go_on = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        held.set()
        go_on.wait(10)

    holding = asyncio.create_task(database.ask(hold))
    waiting = asyncio.create_task(database.ask(insert(1)))
    await asyncio.to_thread(held.wait, 10)
    for task in (holding, waiting):
        task.cancel()
    await asyncio.wait((holding, waiting))
    go_on.set()
    assert await database.ask(count) == 1
    await database.close()


async def test_commit_that_fails_leaves_no_transaction_open(tmp_path: Path) -> None:
    schema = (
        "CREATE TABLE IF NOT EXISTS parents (id INTEGER PRIMARY KEY)",
        "CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, text TEXT, parent INTEGER "
        "REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED)",
        "PRAGMA foreign_keys=ON",
    )
    database = Database(tmp_path / "a.db", schema)
    with pytest.raises(sqlite3.IntegrityError):
        await database.ask(lambda each: each.execute("INSERT INTO rows VALUES (1, 'x', 7)"))
    assert await database.ask(count) == 0
    await database.close()


async def test_too_much_is_dropped_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "MAX_WAITING", 10)
    database = Database(tmp_path / "a.db", SCHEMA)
    held, go_on = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        held.set()
        go_on.wait(10)

    holding = asyncio.create_task(database.ask(hold))
    await asyncio.to_thread(held.wait, 10)
    accepted = [database.post(insert(number)) for number in range(20)]
    assert accepted == [True] * 10 + [False] * 10
    go_on.set()
    await holding
    assert await database.ask(count) == 10
    await database.close()


async def test_two_have_the_same_file_open(tmp_path: Path) -> None:
    one, other = Database(tmp_path / "a.db", SCHEMA), Database(tmp_path / "a.db", SCHEMA)
    for number in range(0, 400, 2):
        one.post(insert(number))
        other.post(insert(number + 1))
    await one.close()
    assert await other.ask(count) == 400
    await other.close()


async def test_a_file_that_another_process_is_just_making_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    maker.execute("BEGIN IMMEDIATE")  # then the switch to WAL fails at once
    paused: list[float] = []

    def pause(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 3:
            maker.execute("COMMIT")

    monkeypatch.setattr(time, "sleep", pause)
    database = Database(tmp_path / "a.db", SCHEMA)
    assert len(paused) == 3
    assert await database.ask(count) == 0
    await database.close()
    maker.close()


def test_a_file_that_stays_locked_is_told_after_the_time_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_S", 0.02)
    maker = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    maker.execute("BEGIN IMMEDIATE")
    with pytest.raises(OSError, match="database is locked"):
        Database(tmp_path / "a.db", SCHEMA)
    maker.close()


async def test_file_and_directory_are_this_user_s_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "a.db"
    database = Database(path, SCHEMA)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    await database.close()


async def test_broken_file_is_put_aside_where_it_may_be_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(b"not a database at all, but long enough to look like one" * 100)
    with pytest.raises(OSError, match=r"a\.db cannot be used"):
        Database(path, SCHEMA)
    database = Database(path, SCHEMA, replace_broken=True)
    assert await database.ask(count) == 0
    assert (tmp_path / "a.db.broken").read_bytes().startswith(b"not a database")
    assert "database_replaced" in [record.message for record in caplog.records]
    await database.close()


def test_killed_process_loses_only_what_it_had_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    program = """
import sys, asyncio
from pathlib import Path
from filters.stores.sqlite import Database

async def main():
    database = Database(Path(sys.argv[1]), sys.argv[2:])
    for number in range(10**6):
        database.post(lambda connection, number=number: connection.execute(
            "INSERT INTO rows VALUES (?, ?)", (number, "x" * 500)))
        if number % 500 == 499:
            await database.ask(lambda connection: None)
            print(number + 1, flush=True)

asyncio.run(main())
"""
    arguments = [sys.executable, "-c", program, str(path), *SCHEMA]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        written = 0
        while written < 3000:
            written = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        later = [int(line) for line in process.stdout.read().splitlines()]
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    numbers = [row[0] for row in connection.execute("SELECT number FROM rows ORDER BY number")]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= max([written, *later])
    connection.close()
