"""Spending that one process counts, kept in a file if there is one: a microsecond a decision.

Processes that have the same file open share their budgets. Each has a row of its own for each
account, writes the whole of what it knows into it (a row that got lost is made good by the next)
and reads the others' every `READ_S`. Between two looks it does not see what they spend and reserve:
by so much they may overrun a budget together. Rows of processes that are gone keep what was spent.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from filters.stores.rules import WhenDown
from filters.stores.spending import Account, Crossed, Level, Line
from filters.stores.steady import SteadyClock
from sidecar.api import Kit, Timer

if TYPE_CHECKING:
    from sqlite3 import Connection

    from filters.stores.sqlite import Database

log = logging.getLogger(__name__)

WRITE_S = 0.02
"""So long changes wait for more of them: a process that is killed loses no more, but for what is
being written."""
READ_S = 1.0
LEASE_S = 10.0
"""What a process has reserved counts for so long since it wrote; it writes every `READ_S`."""
KEEP_S = 86_400
"""So long after its period an account may still be settled."""
PRUNE_EVERY_S = 3_600.0
"""And not before: by then a clock that was wrong at the start has been set."""
MAX_ACCOUNTS = 20_000
"""Further ones are counted together: whose keys are the callers', these could be any number."""
OTHERS = "others"

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS spending (
        account TEXT NOT NULL,
        writer TEXT NOT NULL,
        ends_at INTEGER NOT NULL,
        spent INTEGER NOT NULL,
        reserved INTEGER NOT NULL,
        told_at REAL NOT NULL,
        PRIMARY KEY (account, writer)
    ) WITHOUT ROWID""",
)
WRITE = "INSERT OR REPLACE INTO spending VALUES (?, ?, ?, ?, ?, ?)"
READ = """SELECT account, sum(spent), sum(CASE WHEN told_at > ? THEN reserved ELSE 0 END)
    FROM spending WHERE ends_at > ? AND writer <> ? GROUP BY account"""
PRUNE = "DELETE FROM spending WHERE ends_at < ?"

Row = tuple[str, str, int, int, int, float]
"""As the columns of the file."""

NOTHING = Level(0, 0)


class Sum:
    """One account: what this process knows of it."""

    __slots__ = ("account", "others", "reserved", "spent")

    def __init__(self, account: Account, others: Level) -> None:
        self.account = account
        self.spent = 0
        self.reserved = 0
        self.others = others
        """Spent and reserved by others, and before this process began."""


class MemoryHeld:
    """Reserved of the sums of this process, and settled there."""

    __slots__ = ("_amounts", "_purse", "totals")

    def __init__(self, purse: MemoryPurse, amounts: Sequence[int], totals: Sequence[int]) -> None:
        self._purse: MemoryPurse | None = purse
        self._amounts = amounts
        self.totals = totals

    def settle(self, amounts: Sequence[int]) -> None:
        purse, self._purse = self._purse, None
        if purse is not None:
            purse.settle(self._amounts, amounts)


class MemoryPurse:
    """What one kind of calls is counted in."""

    __slots__ = ("_spending", "_sums")

    def __init__(self, spending: MemorySpending, sums: Sequence[Sum]) -> None:
        self._spending = spending
        self._sums = sums

    async def reserve(
        self, amounts: Sequence[int], lines: Sequence[Line], when_down: WhenDown
    ) -> MemoryHeld | Crossed:
        return self.reserve_now(amounts, lines)

    def reserve_now(self, amounts: Sequence[int], lines: Sequence[Line]) -> MemoryHeld | Crossed:
        """`Purse.reserve`, without waiting for anything. The amounts must not change afterwards."""
        spending, sums = self._spending, self._sums
        totals = []
        index = 0
        for each in sums:
            own = each.spent + each.reserved + amounts[index]
            others = each.others
            totals.append((own + others.spent + others.reserved) * spending.sharers)
            index += 1  # noqa: SIM113 - `enumerate` takes twice as long
        for number, (account, most) in enumerate(lines):
            if totals[account] > most:
                return Crossed(number, self._level(sums[account]))
        index = 0
        for each in sums:
            each.reserved += amounts[index]
            index += 1  # noqa: SIM113
        if spending.is_kept:
            spending.changed(sums)
        return MemoryHeld(self, amounts, totals)

    def settle(self, reserved: Sequence[int], amounts: Sequence[int]) -> None:
        """What was reserved is over, and so much was spent."""
        for each, less, more in zip(self._sums, reserved, amounts, strict=True):
            each.reserved -= less
            each.spent += more
        if self._spending.is_kept:
            self._spending.changed(self._sums)

    async def levels(self) -> list[Level]:
        return [self._level(each) for each in self._sums]

    def _level(self, each: Sum) -> Level:
        others, sharers = each.others, self._spending.sharers
        spent = (each.spent + others.spent) * sharers
        return Level(spent, (each.reserved + others.reserved) * sharers)


class MemorySpending:
    """Counts what this process spends; with a file, also what is spent beside and was before it."""

    def __init__(self, kit: Kit, database: Database | None) -> None:
        self._clock = kit.clock
        self._steady = SteadyClock(kit.clock)
        self._tasks = kit.tasks
        self._database = database
        self._writer = uuid.uuid4().hex[:16]
        self._sums: dict[str, Sum] = {}
        self._others: dict[str, Level] = {}
        self._changed: dict[str, Sum] = {}
        self._write_timer: Timer | None = None
        self._writing: asyncio.Task[None] | None = None
        self._read_timer: Timer | None = None
        self._reading: asyncio.Task[None] | None = None
        self._prune_timer: Timer | None = None
        self._version = 0
        self._is_loaded = False
        self._has_read = True
        self._has_written = True
        self.is_kept = database is not None
        self.sharers = 1 if self.is_kept else max(1, kit.workers)
        """So many processes spend as much as this one, as far as it knows: they see nothing of each
        other."""

    async def load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True
        self._prune_later()
        database = self._database
        if database is None:
            log.warning("budget_not_kept", extra={"hint": "set data_dir, or a store, to keep it"})
            return
        await self._read(database)
        self._read_later()

    def purse(self, accounts: Sequence[Account]) -> MemoryPurse:
        return MemoryPurse(self, [self._sum(account) for account in accounts])

    async def close(self) -> None:
        """Hand over what was not written yet; the database writes it before it closes."""
        for timer in (self._write_timer, self._read_timer, self._prune_timer):
            if timer is not None:
                timer.cancel()
        under_way = [each for each in (self._reading, self._writing) if each is not None]
        for each in under_way:
            each.cancel()
        if under_way:
            await asyncio.wait(under_way)
        if self._database is not None and self._changed:
            rows = self._rows(self._changed)
            self._changed = {}
            self._database.post(lambda connection: connection.executemany(WRITE, rows))

    def _sum(self, account: Account) -> Sum:
        found = self._sums.get(account.key)
        if found is None:
            if len(self._sums) >= MAX_ACCOUNTS:
                self._sweep()
            if len(self._sums) >= MAX_ACCOUNTS:
                # What is counted, and the period, stand in front.
                what, period, _ = account.key.split("|", 2)
                account = Account(f"{what}|{period}|{OTHERS}", account.ends_at)
            found = self._sums.get(account.key)
        if found is None:
            found = Sum(account, self._others.get(account.key, NOTHING))
            self._sums[account.key] = found
        return found

    def _sweep(self) -> None:
        """Drop what is over."""
        now = self._clock.wall()
        self._sums = {
            key: each
            for key, each in self._sums.items()
            if each.account.ends_at > now or each.reserved
        }

    def _prune_later(self) -> None:
        self._prune_timer = self._clock.call_later(PRUNE_EVERY_S, self._prune)

    def _prune(self) -> None:
        """Forget what is over, here and in the file."""
        self._prune_later()
        if not self._steady.is_trusted():
            return
        self._sweep()
        if self._database is not None:
            old = self._clock.wall() - KEEP_S
            self._database.post(lambda connection: connection.execute(PRUNE, (old,)))

    # The file

    def changed(self, sums: Sequence[Sum]) -> None:
        """Write these soon."""
        changed = self._changed
        for each in sums:
            changed[each.account.key] = each
        if self._write_timer is None:
            self._write_timer = self._clock.call_later(WRITE_S, self._write)

    def _write(self) -> None:
        self._write_timer = None
        if self._writing is None and self._changed and self._database is not None:
            self._writing = self._tasks.start(
                self._write_changed(self._database), name="budgets: write"
            )

    async def _write_changed(self, database: Database) -> None:
        """Until nothing has changed meanwhile. What cannot be written now is written with the next
        change, or the next look."""
        changed: dict[str, Sum] = {}
        try:
            while self._changed:
                changed, self._changed = self._changed, {}
                rows = self._rows(changed)
                await database.ask(partial(_write_rows, rows=rows), is_tried_again=True)
                changed = {}
                if self._write_timer is not None:  # there is time to gather more
                    break
        except Exception as error:  # locked for seconds; a full disk
            if self._has_written:
                log.warning("budgets_not_written", extra={"error": str(error)})
            self._has_written = False
        else:
            self._has_written = True
        finally:  # also when it is cancelled: written twice is as good
            self._changed = changed | self._changed
            self._writing = None

    def _rows(self, changed: Mapping[str, Sum]) -> list[Row]:
        now = self._clock.wall()
        return [
            (key, self._writer, each.account.ends_at, each.spent, each.reserved, now)
            for key, each in changed.items()
        ]

    def _read_later(self) -> None:
        self._read_timer = self._clock.call_later(READ_S, self._look)

    def _look(self) -> None:
        """Renew what says that this process lives, and see what others have spent."""
        self._read_later()
        under_way = [each for each in self._sums.values() if each.reserved]
        if under_way or self._changed:
            self.changed(under_way)
        if self._reading is None and self._database is not None:
            self._reading = self._tasks.start(self._read_again(), name="budgets: read")

    async def _read_again(self) -> None:
        database = self._database
        assert database is not None, "there is no file to read"
        try:
            await self._read(database)
        except Exception as error:  # locked for seconds; a disk that has gone
            if self._has_read:
                log.warning("budgets_not_read", extra={"error": str(error)})
            self._has_read = False
        else:
            self._has_read = True
        finally:
            self._reading = None

    async def _read(self, database: Database) -> None:
        now, version = self._clock.wall(), self._version
        # Reservations of a process that died must be seen to run out.
        if any(each.reserved for each in self._others.values()):
            version = 0

        def read(connection: Connection) -> tuple[int, list[Any]] | None:
            (found,) = connection.execute("PRAGMA data_version").fetchone()
            if found == version:  # no other process has written
                return None
            arguments = (now - LEASE_S, now - KEEP_S, self._writer)
            return found, connection.execute(READ, arguments).fetchall()

        answer = await database.ask(read)
        if answer is None:
            return
        self._version, rows = answer
        self._others = {key: Level(spent, reserved) for key, spent, reserved in rows}
        for key, each in self._sums.items():
            each.others = self._others.get(key, NOTHING)

    def __repr__(self) -> str:
        where = self._database.path.name if self._database is not None else "memory"
        return f"<MemorySpending {where} accounts={len(self._sums)}>"


def _write_rows(connection: Connection, rows: Sequence[Row]) -> None:
    connection.executemany(WRITE, rows)
