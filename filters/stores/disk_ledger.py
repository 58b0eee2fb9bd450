"""Records in a SQLite file: one row each, added up by SQL when somebody asks.

Later the rows of a minute are merged into one for each kind. Minutes that rows were written to
since are on a list, so that nothing is looked for and nothing merged in vain; a row that comes late
puts its minute there again.

Money is exact: it stands as decimal text and is added as `Decimal`; SQLite's own sum would be a
float. Several processes may write and merge the same file, and others read it meanwhile (WAL).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from decimal import Decimal
from functools import partial
from pathlib import Path
from urllib.parse import quote

from filters.algo.usage_report import EXACT, NOTHING, SLOT_S, TIMES, Line, Query
from filters.stores.ledger import MINUTE_S, NoLedger, NotWritten, Record, sayable
from filters.stores.sqlite import Database, open_database
from sidecar.api import Kit

NAME = "ledger.db"

COLUMNS = (
    *("time_ms", "team", "key_id", "endpoint", "model", "upstream", "upstream_model"),
    *("status", "outcome", "cached", "is_side", "is_estimated", "currency", "calls"),
    *("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens"),
    *("cache_write_1h_tokens", "reasoning_tokens", "reported_input_tokens"),
    *("reported_output_tokens", "lost_input_tokens", "lost_output_tokens"),
    *("attempts", "total_ms", "cost"),
)
"""As the fields of a record."""
SORT_IN_MEMORY = "PRAGMA temp_store=MEMORY"
"""There may be no folder for temporary files."""
SCHEMA = (
    """CREATE TABLE IF NOT EXISTS calls (
        time_ms INTEGER NOT NULL,
        team TEXT NOT NULL,
        key_id TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        model TEXT NOT NULL,
        upstream TEXT NOT NULL,
        upstream_model TEXT NOT NULL,
        status INTEGER NOT NULL,
        outcome TEXT NOT NULL,
        cached TEXT NOT NULL,
        is_side INTEGER NOT NULL,
        is_estimated INTEGER NOT NULL,
        currency TEXT,
        calls INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        cache_write_tokens INTEGER NOT NULL,
        cache_write_1h_tokens INTEGER NOT NULL,
        reasoning_tokens INTEGER NOT NULL,
        reported_input_tokens INTEGER NOT NULL,
        reported_output_tokens INTEGER NOT NULL,
        lost_input_tokens INTEGER NOT NULL,
        lost_output_tokens INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        total_ms INTEGER NOT NULL,
        cost TEXT
    )""",
    "CREATE INDEX IF NOT EXISTS calls_by_time ON calls (time_ms)",
    """CREATE TABLE IF NOT EXISTS unmerged (
        minute INTEGER PRIMARY KEY,
        done_ms INTEGER NOT NULL
    )""",
    SORT_IN_MEMORY,
    f"SELECT {', '.join(COLUMNS)} FROM calls LIMIT 0",
)
"""The last one fails in a file with other columns. Minutes are those since 1970; before `done_ms`
the rows of one are merged already, but for those that came later."""
INSERT = f"INSERT INTO calls ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
PRUNE_STEP = 1_000
"""Rows; a few milliseconds."""
PRUNE = "DELETE FROM calls WHERE rowid IN (SELECT rowid FROM calls WHERE time_ms < ? LIMIT ?)"

MINUTE_MS = MINUTE_S * 1000
MERGE_STEP = 2_000
"""Rows, and what is merged of their minute already; some five milliseconds."""
TO_MERGE = "INSERT OR IGNORE INTO unmerged VALUES (?, ?)"
OLDEST = "SELECT minute, done_ms FROM unmerged WHERE minute < ? ORDER BY minute LIMIT 1"
NEXT_STEP = (
    "SELECT time_ms FROM calls WHERE time_ms >= ? AND time_ms < ? ORDER BY 1 LIMIT 1 OFFSET ?"
)
_KIND = COLUMNS[1 : COLUMNS.index("calls")]
_FIGURES = COLUMNS[COLUMNS.index("calls") : -1]
MERGED = (
    f"SELECT MIN(rowid), MAX(time_ms), {', '.join(_KIND)}, "
    f"{', '.join(f'SUM({each})' for each in _FIGURES)}, GROUP_CONCAT(cost, ' '), COUNT(*) "
    f"FROM calls WHERE time_ms >= ? AND time_ms < ? GROUP BY {', '.join(_KIND)}"
)
"""`rowid`, `COLUMNS`, and of how many rows. SQL adds whole numbers exactly, at half the time and
without keeping the loop from its work. Money comes as a list: for each row of an aggregate of our
own the thread would wait for the loop."""
DELETE = "DELETE FROM calls WHERE time_ms >= ? AND time_ms < ?"
REPLACE = INSERT.replace("(", "(rowid, ", 1).replace("(?", "(?, ?")
"""A merged row stands where the first of its rows did: rows stay in order of time, pages full."""

ANOTHER_VERSION = "another version has begun it, move it away to go on"
NOT_BEGUN = "there is no ledger yet: `sidecar run` begins it with its start"
IS_EMPTY = "SELECT 1 FROM sqlite_master LIMIT 1"
READ_PATIENCE_S = 5.0
"""So long a reader waits for one who writes at that moment."""

_NAMES = {"key": "key_id"} | dict.fromkeys(TIMES, f"time_ms / {SLOT_S * 1000} * {SLOT_S}")
_OF_CALLS = "SUM(CASE WHEN is_side THEN 0 ELSE {} END)"
_OF_CACHED = "SUM(CASE WHEN cached != '' THEN {} ELSE 0 END)"
_OF_SIDE_CALLS = "SUM(CASE WHEN is_side THEN {} ELSE 0 END)"
_SUMS = (
    _OF_CALLS.format("calls"),
    _OF_CACHED.format("calls"),
    _OF_CALLS.format("input_tokens"),
    _OF_CALLS.format("output_tokens"),
    _OF_CALLS.format("cached_tokens"),
    _OF_CALLS.format("cache_write_tokens"),
    _OF_CALLS.format("cache_write_1h_tokens"),
    _OF_CALLS.format("reasoning_tokens"),
    _OF_CALLS.format("is_estimated * calls"),
    _OF_CACHED.format("input_tokens"),
    _OF_CACHED.format("output_tokens"),
    _OF_CALLS.format("reported_input_tokens"),
    _OF_CALLS.format("reported_output_tokens"),
    "SUM(lost_input_tokens)",
    "SUM(lost_output_tokens)",
    _OF_SIDE_CALLS.format("calls"),
    _OF_SIDE_CALLS.format("input_tokens"),
    _OF_SIDE_CALLS.format("output_tokens"),
)
"""As `MEASURES` of the report."""


def open_disk_ledger(kit: Kit) -> DiskLedger:
    """The file in the data directory, opened now. Raises OSError when it cannot be used."""
    try:
        return DiskLedger(open_database(kit, NAME, SCHEMA))
    except OSError as error:
        cause = error.__cause__
        if isinstance(cause, sqlite3.OperationalError) and _is_of_another_version(cause):
            raise OSError(f"{error}: {ANOTHER_VERSION}") from cause
        raise


class DiskLedger:
    """Writes rows; a `filters.stores.ledger.Writer`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, records: Sequence[Record], keep_days: int) -> None:
        def insert(connection: sqlite3.Connection) -> None:
            connection.executemany(INSERT, map(_row, records))
            minutes = {int(record.time_s) // MINUTE_S for record in records}
            connection.executemany(TO_MERGE, [(each, each * MINUTE_MS) for each in minutes])

        try:
            await self._database.ask(insert, is_tried_again=True)
        except sqlite3.OperationalError as error:  # locked, full, read-only: it may pass
            raise NotWritten(str(error)) from error

    async def prune(self, before_s: float) -> bool:
        def delete(connection: sqlite3.Connection) -> int:
            return connection.execute(PRUNE, (int(before_s * 1000), PRUNE_STEP)).rowcount

        return await self._database.ask(delete, is_tried_again=True) == PRUNE_STEP

    async def merge(self, before_s: float) -> bool:
        step = partial(_merge, before=int(before_s) // MINUTE_S)
        return await self._database.ask(step, is_tried_again=True)

    def __repr__(self) -> str:
        return f"<DiskLedger {self._database!r}>"


def _row(record: Record) -> tuple[object, ...]:
    """`COLUMNS` of it. In the thread."""
    row = record._replace(
        model=sayable(record.model),
        upstream_model=sayable(record.upstream_model),
        outcome=str(record.outcome),
    )
    total_ms = round(record.total_s * 1000)
    cost = None if record.currency is None else format(record.cost, "f")
    return (int(record.time_s * 1000), *row[1:-2], total_ms, cost)


def _merge(connection: sqlite3.Connection, before: int) -> bool:
    """A step in the oldest minute that is before `before` and not merged; whether there was one.
    In the thread."""
    found = connection.execute(OLDEST, (before,)).fetchone()
    if found is None:
        return False
    minute, done_ms = found
    begin_ms, end_ms = minute * MINUTE_MS, (minute + 1) * MINUTE_MS
    beyond = connection.execute(NEXT_STEP, (done_ms, end_ms, MERGE_STEP)).fetchone()
    until_ms = end_ms if beyond is None else max(beyond[0], done_ms + 1)
    groups = connection.execute(MERGED, (begin_ms, until_ms)).fetchall()
    if any(count > 1 for *_, count in groups):
        connection.execute(DELETE, (begin_ms, until_ms))
        connection.executemany(REPLACE, [(*row, _added(costs)) for *row, costs, _ in groups])
    if until_ms < end_ms:
        connection.execute("UPDATE unmerged SET done_ms = ? WHERE minute = ?", (until_ms, minute))
    else:
        connection.execute("DELETE FROM unmerged WHERE minute = ?", (minute,))
    return True


def _added(costs: str | None) -> str | None:
    """The sum of decimal texts with spaces between them."""
    if costs is None:
        return None
    total = NOTHING
    for each in costs.split(" "):
        total = EXACT.add(total, Decimal(each))
    return format(total, "f")


# Reading


class _ExactSum:
    """An aggregate for SQL: adds decimal text; the result is decimal text, too."""

    def __init__(self) -> None:
        self._sum = NOTHING

    def step(self, amount: str | None) -> None:
        if amount is not None:
            self._sum = EXACT.add(self._sum, Decimal(amount))

    def finalize(self) -> str:
        return format(self._sum, "f")


def read_disk(data_dir: Path, query: Query) -> Iterator[Line]:
    """The lines of the file in `data_dir`, read beside whoever writes. Raises NoLedger."""
    path = data_dir / NAME
    try:
        path.stat()
    except FileNotFoundError:
        raise NoLedger(f"{path}: {NOT_BEGUN}") from None
    except OSError as error:  # of another user
        raise NoLedger(f"{path}: {error.strerror}") from error
    sql, values = _select(query)
    try:
        where = f"file:{quote(str(path.resolve()))}?mode=ro"
        with closing(sqlite3.connect(where, uri=True, timeout=READ_PATIENCE_S)) as connection:
            # typeshed has it that aggregates are of integers.
            connection.create_aggregate("exact_sum", 1, _ExactSum)  # type: ignore[arg-type]
            connection.execute(SORT_IN_MEMORY)
            if connection.execute(IS_EMPTY).fetchone() is None:
                raise NoLedger(f"{path}: {NOT_BEGUN}")
            found = connection.execute(sql, values).fetchall()
    except sqlite3.Error as error:
        why = f"{error}: {ANOTHER_VERSION}" if _is_of_another_version(error) else str(error)
        raise NoLedger(f"{path}: it cannot be read: {why}") from error
    count = len(query.by)
    for row in found:
        yield Line(row[:count], row[count], Decimal(row[count + 1]), row[count + 2 :])


def _is_of_another_version(error: sqlite3.Error) -> bool:
    """Whether our SQL does not suit the file: full, locked and damaged ones have other codes."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR


def _select(query: Query) -> tuple[str, list[object]]:
    names = [_NAMES.get(each, each) for each in query.by]
    wheres = ["time_ms >= ?", "time_ms < ?"]
    values: list[object] = [query.since_s * 1000, query.until_s * 1000]
    for column, value in (("team", query.team), ("model", query.model)):
        if value is not None:
            wheres.append(f"{column} = ?")
            values.append(sayable(value))
    groups = ", ".join(str(number) for number in range(1, len(names) + 2))
    sql = (
        f"SELECT {', '.join(names)}, currency, exact_sum(cost), {', '.join(_SUMS)} "
        f"FROM calls WHERE {' AND '.join(wheres)} GROUP BY {groups}"
    )
    return sql, values
