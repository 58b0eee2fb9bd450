"""A SQLite file, and the one thread that works on it: for state that survives a restart.

The event loop never waits for a disk. What is posted in one moment is written in one transaction;
a process that is killed loses what was not written yet, and nothing else (the write-ahead log).
Several processes may have the same file open. aiosqlite takes a hop between threads for each
statement (five times the time, measured) and knows no common transaction.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sidecar.api import Kit

log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], Any]

MAX_WAITING = 20_000
"""Pieces of work; more are dropped."""
MAX_TOGETHER = 2_000
"""In one transaction."""
GATHER_S = 0.02
"""So long the thread waits for more to write together; nobody waits for it."""
BUSY_S = 5.0
"""So long another process may write."""
BUSY_PAUSE_S = 0.005
"""Between two attempts to open a file that another process is just making."""
SHORT_BUSY_S = 1.0
"""So long for work that its asker tries again: no stop waits longer for it."""
_END = object()


def open_database(
    kit: Kit, name: str, schema: Sequence[str], *, replace_broken: bool = False
) -> Database:
    """The file `name` in the data directory of the configuration, which must name one.

    `schema` are statements that may run again on each opening. One that is no database, or is
    damaged, is put aside when it may be replaced; otherwise `OSError` says so. The file is opened
    by whoever asks first, at once: call this in `start`.
    """
    if kit.data_dir is None:
        raise ValueError("the configuration names no data_dir")
    path = kit.data_dir / name

    def make() -> Database:
        return Database(path, schema, replace_broken=replace_broken)

    return kit.resources.get(("sqlite", str(path)), make)


class Database:
    """See the module's docstring. Errors of `work` are its asker's; those of posted work are
    logged."""

    def __init__(self, path: Path, schema: Sequence[str], *, replace_broken: bool = False) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._schema = tuple(schema)
        connection = self._open(replace_broken)
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_closed = False
        self._failures = 0
        self._busy_s = BUSY_S
        self._thread = threading.Thread(
            target=self._work_off, args=(connection,), name=f"sqlite {path.name}", daemon=True
        )
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Pieces of work that were not begun yet."""
        return self._waiting.qsize()

    async def ask(
        self, work: Callable[[sqlite3.Connection], T], *, is_tried_again: bool = False
    ) -> T:
        """What `work` returns, run in the thread after all that was posted before, in a transaction
        of its own. It runs also when the asker is cancelled meanwhile. While another process
        writes it waits `BUSY_S`, or not so long if its asker tries again by itself, and then
        raises `sqlite3.OperationalError`."""
        if self._is_closed:
            raise RuntimeError(f"{self.path.name} is closed")
        answer: Future[T] = Future()
        busy_s = min(SHORT_BUSY_S, BUSY_S) if is_tried_again else BUSY_S
        self._waiting.put((work, answer, busy_s))
        return await asyncio.wrap_future(answer)

    def post(self, work: Work) -> bool:
        """Run `work` beside the calls, in order. False: too much is waiting, and it is dropped."""
        if self._is_closed or self._waiting.qsize() >= MAX_WAITING:
            return False
        self._waiting.put((work, None, BUSY_S))
        return True

    async def close(self) -> None:
        """Write what was posted, and close the file. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._waiting.put(_END)
        await asyncio.to_thread(self._thread.join)

    # Opening

    def _open(self, replace_broken: bool) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) or not replace_broken:
                raise OSError(f"{self.path} cannot be used: {error}") from error
        aside = self.path.with_name(f"{self.path.name}.broken")
        log.warning("database_replaced", extra={"file": str(self.path), "aside": str(aside)})
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(f"{self.path}{suffix}")
        os.replace(self.path, aside)
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            raise OSError(f"{self.path} cannot be used: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        # Only this user: what stands in it is the team's business.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        until = time.monotonic() + BUSY_S
        while True:
            try:
                return self._prepare()
            except sqlite3.OperationalError as error:
                # SQLite does not wait where two would wait for each other: both make the file.
                if not _is_busy(error) or time.monotonic() >= until:
                    raise
            time.sleep(BUSY_PAUSE_S)

    def _prepare(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            for statement in self._schema:
                connection.execute(statement)
        except BaseException:
            connection.close()
            raise
        return connection

    # In the thread

    def _work_off(self, connection: sqlite3.Connection) -> None:
        try:
            while self._work_on(connection):
                pass
        finally:
            connection.close()

    def _work_on(self, connection: sqlite3.Connection) -> bool:
        """Write what is posted until somebody asks, or for a moment; whether there may be more."""
        posted: list[Work] = []
        until = 0.0
        while len(posted) < MAX_TOGETHER:
            try:
                if not posted:
                    item = self._waiting.get()
                    until = time.monotonic() + GATHER_S
                else:
                    item = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if item is _END:
                self._write(connection, posted)
                return False
            work, answer, busy_s = item
            if answer is not None:
                self._write(connection, posted)
                self._wait_for_others(connection, busy_s)
                self._answer(connection, work, answer)
                return True
            posted.append(work)
        self._write(connection, posted)
        return True

    def _wait_for_others(self, connection: sqlite3.Connection, busy_s: float) -> None:
        if busy_s != self._busy_s:
            connection.execute(f"PRAGMA busy_timeout={round(busy_s * 1000)}")
            self._busy_s = busy_s

    def _answer(self, connection: sqlite3.Connection, work: Work, answer: Future[Any]) -> None:
        # Its asker may be gone; it is done anyway.
        is_wanted = answer.set_running_or_notify_cancel()
        try:
            result = _in_transaction(connection, [work])
        except BaseException as error:
            if is_wanted:
                answer.set_exception(error)
        else:
            if is_wanted:
                answer.set_result(result)

    def _write(self, connection: sqlite3.Connection, posted: Sequence[Work]) -> None:
        """All of them in one transaction; when one fails, each in its own."""
        if not posted:
            return
        self._wait_for_others(connection, BUSY_S)
        try:
            _in_transaction(connection, posted)
        except Exception as first:
            if _is_busy(first):  # each would wait as long, and for the same
                for _ in posted:
                    self._failed(first)
                return
            for work in posted:
                try:
                    _in_transaction(connection, [work])
                except Exception as error:
                    self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        # The 1st, 2nd, 4th, 8th: a full disk fails all.
        if self._failures & (self._failures - 1) == 0:
            log.error(
                "database_write_failed",
                extra={"file": str(self.path), "failures": self._failures, "error": str(error)},
            )

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<Database {self.path.name} {state} waiting={self.waiting}>"


def _is_busy(error: Exception) -> bool:
    """Whether another process, or another connection of this one, has locked the file."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # above it stands the reason
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _in_transaction(connection: sqlite3.Connection, works: Sequence[Work]) -> Any:
    """Run them; the last one's result."""
    result = None
    connection.execute("BEGIN IMMEDIATE")
    try:
        for work in works:
            result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite may have rolled it back itself: a full disk
            connection.execute("ROLLBACK")
        raise
    return result
