"""A cache on disk: survives, stays within its bounds, is never torn, and holds nobody up.

What all caches do is tested in test_entry_cache.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from filters.stores import disk_cache
from filters.stores.cache import CacheStoreSettings
from filters.stores.disk_cache import READ_S, SCHEMA, TRUST_S, USED_EVERY_S, DiskCache
from filters.stores.entry import decode, size_of
from filters.stores.sqlite import Database
from sidecar.api import Usage
from sidecar.metrics import Metrics
from tests.support.cached import NOW, entry, figure
from tests.support.harness import FakeClock

ONE = size_of(entry())
WITHIN_S = 10.0


class Disk:
    """Processes that use one file: each `open` is one more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.opened: list[tuple[DiskCache, Database]] = []

    def open(self, **changes: int) -> DiskCache:
        settings = {"max_bytes": 1_000 * ONE, "max_entry_bytes": 100 * ONE, "max_entries": 1_000}
        bounds = CacheStoreSettings.model_validate(settings | changes)
        database = Database(self.path, SCHEMA, replace_broken=True)
        cache = DiskCache(database, bounds, self.clock, self.metrics)
        self.opened.append((cache, database))
        return cache

    async def close(self) -> None:
        while self.opened:
            cache, database = self.opened.pop()
            await cache.close()
            await database.close()

    async def written(self) -> None:
        """Return once what was put is in the file, and the loop knows."""
        for _, database in self.opened:
            await database.ask(lambda connection: None)
        await until(lambda: not any(cache._waiting_bytes for cache, _ in self.opened))

    def rows(self, query: str = "SELECT key FROM entries ORDER BY id") -> list[object]:
        connection = sqlite3.connect(self.path)
        try:
            return [row[0] for row in connection.execute(query)]
        finally:
            connection.close()

    def run(self, statement: str, *values: object) -> None:
        """As somebody else who has the file open."""
        connection = sqlite3.connect(self.path)
        with connection:
            connection.execute(statement, values)
        connection.close()


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Disk]:
    disk = Disk(tmp_path / "cache.db")
    yield disk
    await disk.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not holds():  # noqa: ASYNC110 - it is a thread that changes
            await asyncio.sleep(0.001)


async def keys_in(cache: DiskCache, keys: str) -> str:
    return "".join([key for key in keys if await cache.get(key) is not None])


# Surviving


async def test_entries_survive_a_restart(disk: Disk) -> None:
    cache = disk.open()
    for number in range(100):
        cache.put(f"k{number}", entry(b"%d" % number))
    await disk.close()
    cache = disk.open()
    for number in range(100):
        assert await cache.get(f"k{number}") == entry(b"%d" % number)
    assert figure(disk.metrics, "entries", "disk") == 100
    assert figure(disk.metrics, "bytes", "disk") == sum(
        size_of(entry(b"%d" % number)) for number in range(100)
    )


KILLED = """
import asyncio, sys, time
from pathlib import Path
from filters.stores.cache import CacheStoreSettings
from filters.stores.disk_cache import SCHEMA, DiskCache
from filters.stores.sqlite import Database
from sidecar.clock import SystemClock
from sidecar.metrics import Metrics
from tests.support.cached import entry

async def main():
    database = Database(Path(sys.argv[1]), SCHEMA)
    settings = CacheStoreSettings(max_entries=10**6, max_bytes=10**9)
    cache = DiskCache(database, settings, SystemClock(), Metrics())
    for number in range(10**9):
        body = b"%d," % number * 300
        cache.put(f"k{number}", entry(body, expires_at=time.time() + 3600))
        if number % 100 == 99:
            await asyncio.sleep(0)
            if number % 500 == 499:
                await database.ask(lambda connection: None)
                print(number, flush=True)

asyncio.run(main())
"""


async def test_kill_while_writing_loses_the_last_few_and_tears_none(disk: Disk) -> None:
    arguments = [sys.executable, "-c", KILLED, str(disk.path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        written = 0
        while written < 3_000:
            written = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        written = max([written, *map(int, process.stdout.read().split())])
    disk.clock = FakeClock()
    cache = disk.open(max_entries=10**6, max_bytes=10**9)
    found = 0
    for key in disk.rows():
        kept = await cache.get(str(key))
        assert kept is not None
        assert kept.body == f"{str(key)[1:]},".encode() * 300
        found += 1
    assert found > written
    await disk.written()
    assert figure(disk.metrics, "errors", "disk") == 0
    assert figure(disk.metrics, "entries", "disk") == found


async def test_torn_entry_is_a_miss_counted_and_deleted(disk: Disk) -> None:
    disk.open().put("k", entry())
    await disk.close()
    disk.run("UPDATE entries SET data = CAST(substr(data, 1, length(data) - 1) AS BLOB)")
    cache = disk.open()
    assert await cache.get("k") is None
    assert figure(disk.metrics, "errors", "disk") == 1
    assert disk.rows() == []


async def test_damaged_file_is_replaced(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.path.write_bytes(b"no database" * 1_000)
    cache = disk.open()
    cache.put("k", entry())
    await disk.written()
    assert disk.rows() == ["k"]
    assert [record.message for record in caplog.records] == ["database_replaced"]


# Bounds


async def test_entry_used_last_stays(disk: Disk) -> None:
    cache = disk.open(max_entries=3)
    for key in "abc":
        cache.put(key, entry())
        disk.clock.turn(USED_EVERY_S)
    await disk.written()
    assert await cache.get("a") is not None
    cache.put("d", entry())
    await disk.written()
    assert await keys_in(cache, "abcd") == "acd"
    assert figure(disk.metrics, "evictions", "disk") == 1
    assert figure(disk.metrics, "entries", "disk") == 3


async def test_bytes_are_bounded(disk: Disk) -> None:
    cache = disk.open(max_bytes=10 * ONE, max_entry_bytes=10 * ONE)
    for number in range(30):
        cache.put(f"k{number}", entry())
    await disk.written()
    assert figure(disk.metrics, "bytes", "disk") == 10 * ONE
    assert disk.rows() == [f"k{number}" for number in range(20, 30)]
    assert await cache.get("k0") is None


async def test_expired_entries_go_first(disk: Disk) -> None:
    cache = disk.open(max_entries=3)
    for key, life_s in (("a", 3600.0), ("b", 10.0), ("c", 3600.0)):
        cache.put(key, entry(expires_at=NOW + life_s))
    disk.clock.turn(11.0)
    cache.put("d", entry())
    await disk.written()
    assert disk.rows() == ["a", "c", "d"]
    assert figure(disk.metrics, "evictions", "disk") == 0


async def test_narrower_bounds_hold_from_the_first_look(disk: Disk) -> None:
    cache = disk.open()
    for number in range(10):
        cache.put(f"{number}", entry())
        disk.clock.turn(1.0)
    await disk.close()
    cache = disk.open(max_entries=4)
    assert await keys_in(cache, "0123456789") == "6789"


async def test_use_is_written_once_a_minute(disk: Disk) -> None:
    cache = disk.open()
    cache.put("k", entry())
    used = "SELECT used_at FROM entries"
    await disk.written()
    disk.clock.turn(USED_EVERY_S - 1.0)
    await cache.get("k")
    assert disk.rows(used) == [NOW]
    disk.clock.turn(TRUST_S + 1.0)
    await cache.get("k")
    assert disk.rows(used) == [disk.clock.wall()]


# The memory in front of it


async def test_repeated_hits_are_answered_from_memory(disk: Disk) -> None:
    cache = disk.open()
    cache.put("k", entry())
    await disk.written()
    disk.run("DELETE FROM entries")
    assert await cache.get("k") is not None
    disk.clock.turn(TRUST_S)
    assert await cache.get("k") is None


async def test_purge_by_another_process_holds_after_a_moment(disk: Disk) -> None:
    ours, theirs = disk.open(), disk.open()
    ours.put("k", entry())
    await disk.written()
    assert await theirs.get("k") == entry()
    assert await ours.purge(team="red") == 1
    assert await ours.get("k") is None
    disk.clock.turn(TRUST_S)
    assert await theirs.get("k") is None


async def test_look_that_began_before_a_purge_brings_nothing_back(disk: Disk) -> None:
    cache = disk.open()
    cache.put("k", entry())
    await disk.close()
    cache = disk.open()
    look = asyncio.ensure_future(cache.get("k"))
    await asyncio.sleep(0)
    assert await cache.purge() == 1
    await look
    assert await cache.get("k") is None


async def test_what_is_not_written_yet_is_purged_too(disk: Disk) -> None:
    cache = disk.open()
    for key in "abc":
        cache.put(key, entry(team="blue" if key == "b" else "red"))
    assert await cache.purge(team="red") == 2
    assert await keys_in(cache, "abc") == "b"
    await disk.written()
    assert disk.rows() == ["b"]


async def test_purge_of_many_goes_in_steps_and_counts_all(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_cache, "DELETED_TOGETHER", 7)
    cache = disk.open()
    for number in range(100):
        cache.put(f"k{number}", entry(team="blue" if number % 3 else "red"))
    assert await cache.purge(team="blue") == 66
    assert await cache.purge() == 34
    await until(lambda: figure(disk.metrics, "entries", "disk") == 0)
    assert figure(disk.metrics, "bytes", "disk") == 0


# Nobody waits


async def test_more_than_the_disk_can_take_is_dropped_and_counted(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_cache, "MAX_WAITING_BYTES", 3 * ONE)
    cache = disk.open()
    for key in "abcde":
        cache.put(key, entry())
    assert figure(disk.metrics, "dropped", "disk", "busy") == 2
    await disk.written()
    cache.put("f", entry())
    assert await keys_in(cache, "abcdef") == "abcf"


async def test_disk_that_hangs_makes_one_look_wait_a_little_and_no_other(disk: Disk) -> None:
    cache = disk.open()
    cache.put("k", entry())
    await disk.written()
    disk.clock.turn(TRUST_S)
    hangs = threading.Event()
    disk.opened[0][1].post(lambda connection: hangs.wait())
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        assert await cache.get("k") is None
        assert READ_S <= loop.time() - begun < 20 * READ_S
        begun = loop.time()
        for _ in range(100):
            assert await cache.get("k") is None
        assert loop.time() - begun < READ_S
    finally:
        hangs.set()
    assert figure(disk.metrics, "errors", "disk") == 101
    await until(lambda: not cache._is_stuck)
    assert await cache.get("k") == entry()


async def test_caller_that_leaves_during_a_look_stops_nothing(disk: Disk) -> None:
    cache = disk.open()
    cache.put("k", entry())
    await disk.written()
    disk.clock.turn(TRUST_S)
    hangs = threading.Event()
    disk.opened[0][1].post(lambda connection: hangs.wait())
    look = asyncio.ensure_future(cache.get("k"))
    await asyncio.sleep(0)
    look.cancel()
    await asyncio.wait([look])
    hangs.set()
    assert await cache.get("k") == entry()


async def test_file_that_cannot_be_read_or_written_is_a_miss_and_counted(disk: Disk) -> None:
    cache = disk.open()
    cache.put("k", entry())
    await disk.written()
    disk.run("ALTER TABLE entries RENAME TO others")
    cache.put("l", entry())
    disk.clock.turn(TRUST_S)
    assert await cache.get("k") is None
    assert figure(disk.metrics, "errors", "disk") == 1
    await disk.written()
    assert figure(disk.metrics, "dropped", "disk", "failed") == 1
    with pytest.raises(ValueError, match="cannot be purged now"):
        await cache.purge()


async def test_entry_that_cannot_be_written_leaves_memory_again(disk: Disk) -> None:
    cache = disk.open()
    cache.put("k", entry(usage=Usage(2**64)))
    await disk.written()
    disk.clock.turn(TRUST_S)
    assert await cache.get("k") is None
    assert figure(disk.metrics, "dropped", "disk", "failed") == 1


async def test_closed_file_is_a_miss(disk: Disk) -> None:
    cache = disk.open()
    await disk.opened[0][1].close()
    cache.put("k", entry())
    assert await cache.get("k") is None
    assert figure(disk.metrics, "dropped", "disk", "busy") == 1


async def test_processes_say_each_its_part_of_what_the_file_holds(tmp_path: Path) -> None:
    metrics, caches = [Metrics(), Metrics()], []
    databases = [Database(tmp_path / "cache.db", SCHEMA) for _ in metrics]
    for each, database in zip(metrics, databases, strict=True):
        settings = CacheStoreSettings()
        caches.append(DiskCache(database, settings, FakeClock(), each, processes=2))
    caches[0].put("a", entry())
    await databases[0].ask(lambda connection: None)
    await caches[1].get("b")
    await until(lambda: sum(figure(each, "entries", "disk") for each in metrics) == 1.0)
    assert repr(caches[1]) == f"<DiskCache entries=1 bytes={ONE} waiting=0>"
    for database in databases:
        await database.close()


async def test_what_is_kept_is_no_code() -> None:
    """Never pickle: whoever writes in the file must not run here."""
    assert decode(b"cos\nsystem\n(S'true'\ntR.") is None


async def test_sure_miss_does_not_ask_the_file(tmp_path: Path) -> None:
    metrics = Metrics()
    database = Database(tmp_path / "cache.db", SCHEMA)
    settings = CacheStoreSettings()
    cache = DiskCache(database, settings, FakeClock(), metrics, has_bloom=True)
    cache.put("a", entry())
    await cache.get("b")
    await until(lambda: cache._sure is not None and cache._sure._bloom is not None)
    hangs = threading.Event()
    database.post(lambda connection: hangs.wait())
    for number in range(20):
        assert await cache.get(f"no{number}") is None
    hangs.set()
    assert figure(metrics, "bloom", "sure_miss") == 20
    assert await cache.get("a") == entry()
    await cache.close()
    await database.close()
