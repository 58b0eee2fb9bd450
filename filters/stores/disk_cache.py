"""Recorded answers in a SQLite file: they survive a restart, and a process that is killed.

    put ──► waiting ──► the file (written in the database's thread, many together)
    get ──► waiting, front (memory; trusted for a moment) ──► the file

What is put is found at once, though it is written a moment later. A process that is killed loses
what was waiting, and nothing else; what a disk has damaged is recognised by its checksum. Several
processes may use the file: what one purges, another still gives from its front for `TRUST_S`.
Bounds hold for the bytes of the entries; the file is a little larger, and does not shrink.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from filters.algo.lru import Lru
from filters.stores.bloom import Page, SureMisses
from filters.stores.entry import Entry, decode, encode, is_of, size_of
from filters.stores.entry_cache import Bounds, EntryCache, Tally
from filters.stores.sqlite import Database
from sidecar.api import Clock, Metrics

FILE = "cache.db"

SCHEMA: Sequence[str] = (
    """CREATE TABLE IF NOT EXISTS entries (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, team TEXT NOT NULL, model TEXT NOT NULL,
        expires_at REAL NOT NULL, used_at REAL NOT NULL, bytes INTEGER NOT NULL,
        data BLOB NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used_at)",
    "CREATE INDEX IF NOT EXISTS entries_by_end ON entries (expires_at)",
    # Kept by the file itself, so that they are right whoever writes, and whenever he is killed.
    "CREATE TABLE IF NOT EXISTS totals (entries INTEGER NOT NULL, bytes INTEGER NOT NULL)",
    "INSERT INTO totals SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM totals)",
    """CREATE TRIGGER IF NOT EXISTS entry_in AFTER INSERT ON entries BEGIN
        UPDATE totals SET entries = entries + 1, bytes = bytes + new.bytes; END""",
    """CREATE TRIGGER IF NOT EXISTS entry_out AFTER DELETE ON entries BEGIN
        UPDATE totals SET entries = entries - 1, bytes = bytes - old.bytes; END""",
)

READ_S = 0.25
"""A look that takes longer is a miss: the upstream is asked instead."""
TRUST_S = 1.0
"""So long the front is believed before the file is asked again."""
FRONT_PART = 8
"""The front has one part in so many of the bytes."""
USED_EVERY_S = 60.0
"""That an entry was used is written so often; the order of leaving is exact to as much."""
MAX_WAITING_BYTES = 32 << 20
"""More than that, and what is put is dropped: the disk is too slow."""
DELETED_TOGETHER = 200
KEYS_IN_A_PAGE = 1_000


class _Waiting:
    """An entry on its way to the file."""

    __slots__ = ("entry", "has_failed", "is_done", "size")

    def __init__(self, entry: Entry, size: int) -> None:
        self.entry = entry
        self.size = size
        self.has_failed = False
        self.is_done = False


class _Shown(NamedTuple):
    """An entry of the front."""

    entry: Entry
    trusted_until: float


class DiskCache(EntryCache):
    """See the module's docstring."""

    BACKEND = NAME = "disk"

    def __init__(
        self,
        database: Database,
        bounds: Bounds,
        clock: Clock,
        metrics: Metrics,
        *,
        processes: int = 1,
        has_bloom: bool = False,
    ) -> None:
        super().__init__(bounds, clock, Tally(metrics, self.BACKEND, processes))
        self._database = database
        self._bounds = bounds
        self._waiting: dict[str, _Waiting] = {}
        self._waiting_bytes = 0
        self._front: Lru[_Shown] = Lru(bounds.max_bytes // FRONT_PART, bounds.max_entries)
        self._purges = 0
        self._is_stuck = False
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        # What the thread tells the loop.
        self._written: deque[tuple[str, _Waiting]] = deque()
        self._totals = (0, 0)
        self._evicted = 0
        self._is_told = False
        self._told_evicted = 0
        self._sure: SureMisses | None = None
        if has_bloom:
            self._sure = SureMisses(
                self._list_keys, clock, metrics, backend=self.BACKEND, processes=processes
            )

    # Looking

    async def _look(self, key: str) -> Entry | None:
        self._begin()
        now = self._clock.wall()
        waiting = self._waiting.get(key)
        if waiting is not None:
            return waiting.entry if waiting.entry.expires_at > now else None
        shown = self._front.get(key, now)
        if shown is not None and shown.trusted_until > self._clock.monotonic():
            return shown.entry
        if self._sure is not None and self._sure.is_absent(key):
            return None
        purges = self._purges
        found = await self._read(key, now)
        if not isinstance(found, Entry):
            self._front.pop(key)
            if found is False:
                self._tally.failed()
            elif self._sure is not None:
                self._sure.was_in_vain()
            return None
        if purges == self._purges:
            self._show(key, found, now)
        return found

    async def _read(self, key: str, now: float) -> Entry | bool | None:
        """False: it could not be read."""

        def find(connection: sqlite3.Connection) -> Entry | bool | None:
            row = connection.execute(
                "SELECT id, used_at, data FROM entries WHERE key = ? AND expires_at > ?", (key, now)
            ).fetchone()
            if row is None:
                return None
            number, used_at, data = row
            entry = decode(data)
            if entry is None:
                connection.execute("DELETE FROM entries WHERE id = ?", (number,))
                return False
            if abs(now - used_at) >= USED_EVERY_S:
                connection.execute("UPDATE entries SET used_at = ? WHERE id = ?", (now, number))
            return entry

        if self._is_stuck:
            return False
        try:
            async with asyncio.timeout(READ_S):
                return await self._database.ask(find)
        except TimeoutError:
            # Until the thread comes to what is posted now, nobody else waits for it.
            self._is_stuck = self._database.post(lambda connection: self._call(self._unstick))
            return False
        except (sqlite3.Error, RuntimeError):
            return False

    def _unstick(self) -> None:
        self._is_stuck = False

    def _show(self, key: str, entry: Entry, now: float) -> None:
        shown = _Shown(entry, self._clock.monotonic() + TRUST_S)
        self._front.put(key, shown, size_of(entry), entry.expires_at, now)

    # Keeping

    def _keep(self, key: str, entry: Entry, size: int) -> bool:
        self._begin()
        if self._waiting_bytes + size > MAX_WAITING_BYTES:
            self._tally.dropped("busy")
            return False
        waiting = _Waiting(entry, size)
        now = self._clock.wall()

        def write(connection: sqlite3.Connection) -> None:
            waiting.has_failed = True
            try:
                connection.execute("DELETE FROM entries WHERE key = ?", (key,))
                connection.execute(
                    "INSERT INTO entries (key, team, model, expires_at, used_at, bytes, data) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (key, entry.team, entry.model, entry.expires_at, now, size, encode(entry)),
                )
                self._make_room(connection, now)
                waiting.has_failed = False
            finally:
                self._written.append((key, waiting))
                self._tell()

        if not self._database.post(write):
            self._tally.dropped("busy")
            return False
        self._waiting[key] = waiting
        self._waiting_bytes += size
        self._show(key, entry, now)
        if self._sure is not None:
            self._sure.add(key)
        return True

    # Purging

    async def purge(
        self, *, key: str | None = None, team: str | None = None, model: str | None = None
    ) -> int | None:
        self._begin()
        given = {"key": key, "team": team, "model": model}
        wanted = {name: value for name, value in given.items() if value is not None}
        where = " AND ".join(["id > ?", *(f"{name} = ?" for name in wanted)])
        last = 0

        def delete(connection: sqlite3.Connection) -> int:
            nonlocal last
            found = connection.execute(
                f"SELECT id FROM entries WHERE {where} ORDER BY id LIMIT {DELETED_TOGETHER}",
                (last, *wanted.values()),
            ).fetchall()
            connection.executemany("DELETE FROM entries WHERE id = ?", found)
            if found:
                last = found[-1][0]
                self._totals = _totals(connection)
                self._tell()
            return len(found)

        self._forget(key, team, model)
        purged = 0
        try:
            # Step by step, so that looks have their turn.
            while gone := await self._database.ask(delete):
                purged += gone
        except (sqlite3.Error, RuntimeError) as error:
            raise ValueError(f"the cache on disk cannot be purged now: {error}") from error
        finally:
            self._forget(key, team, model)  # what was read before it was deleted
        return purged

    def _forget(self, key: str | None, team: str | None, model: str | None) -> None:
        """What the file is to forget, memory forgets first; and looks under way leave nothing."""
        self._purges += 1
        for each in list(self._waiting) if key is None else [key]:
            waiting = self._waiting.get(each)
            if waiting is not None and is_of(waiting.entry, team, model):
                del self._waiting[each]
        for each in self._front.keys() if key is None else [key]:
            shown = self._front.peek(each)
            if shown is not None and is_of(shown.entry, team, model):
                self._front.pop(each)

    async def _list_keys(self, cursor: str | None) -> Page | None:
        def find(connection: sqlite3.Connection) -> list[tuple[str]]:
            return connection.execute(
                "SELECT key FROM entries WHERE key > ? ORDER BY key LIMIT ?",
                (cursor or "", KEYS_IN_A_PAGE),
            ).fetchall()

        try:
            keys = [key for (key,) in await self._database.ask(find)]
        except (sqlite3.Error, RuntimeError):
            return None
        return Page(keys, keys[-1] if len(keys) == KEYS_IN_A_PAGE else None)

    # Between the thread and the loop

    def _begin(self) -> None:
        """At the first use: the bounds may be narrower than those that the file was made with."""
        if self._loop is not None:
            return
        self._loop = asyncio.get_running_loop()
        now = self._clock.wall()

        def look(connection: sqlite3.Connection) -> None:
            self._make_room(connection, now)
            self._tell()

        self._database.post(look)

    def _make_room(self, connection: sqlite3.Connection, now: float) -> None:
        """In the thread: delete what has expired, then what was not used for longest, until the
        bounds hold."""
        entries, of_bytes = _totals(connection)
        while entries > self._bounds.max_entries or of_bytes > self._bounds.max_bytes:
            gone = connection.execute(
                "DELETE FROM entries WHERE id IN "
                "(SELECT id FROM entries WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)",
                (now, DELETED_TOGETHER),
            ).rowcount
            if not gone:
                connection.execute(
                    "DELETE FROM entries WHERE id = "
                    "(SELECT id FROM entries ORDER BY used_at, id LIMIT 1)"
                )
                self._evicted += 1
            entries, of_bytes = _totals(connection)
        self._totals = entries, of_bytes

    def _tell(self) -> None:
        """In the thread: let the loop see what has changed; once for many changes."""
        if not self._is_told:
            self._is_told = True
            self._call(self._hear)

    def _call(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            pass  # the loop is closed: nobody wants to know any more

    def _hear(self) -> None:
        self._is_told = False  # before anything is read: what comes now is told anew
        while self._written:
            key, waiting = self._written.popleft()
            if waiting.is_done:
                continue
            waiting.is_done = True
            self._waiting_bytes -= waiting.size
            if self._waiting.get(key) is waiting:
                del self._waiting[key]
            if waiting.has_failed:
                self._tally.dropped("failed")
        if self._is_closed:
            return
        evicted = self._evicted
        self._tally.evicted(evicted - self._told_evicted)
        self._told_evicted = evicted
        self._tally.holds(*self._totals)

    async def _close(self, *args: object, _conn: object = None, **kwargs: object) -> None:
        """The file is closed by whoever opened it, after what was put is written."""
        self._is_closed = True
        self._tally.holds(0, 0)
        if self._sure is not None:
            await self._sure.close()

    def holds(self) -> tuple[int, int]:
        return self._totals

    def __repr__(self) -> str:
        entries, of_bytes = self._totals
        return f"<DiskCache entries={entries} bytes={of_bytes} waiting={len(self._waiting)}>"


def _totals(connection: sqlite3.Connection) -> tuple[int, int]:
    entries, of_bytes = connection.execute("SELECT entries, bytes FROM totals").fetchone()
    return entries, of_bytes
