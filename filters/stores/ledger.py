"""What each call used, written down beside the calls and read back for `sidecar usage`.

This is all that others import of it. Whoever enters a record only appends it to a list; every
`GATHER_S` the list is handed to a place, which writes it together: a SQLite file
(`disk_ledger`), or sums in the shared store (`redis_ledger`). While the place is away the list
waits, up to `MAX_WAITING` records; what is more is dropped, counted and told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from filters.algo.usage_report import Line, Query
from sidecar.api import Clock, Cost, Counter, Kit, StoreAddress, Timer, Usage

log = logging.getLogger(__name__)

Where = Literal["auto", "disk", "redis", "off"]
Place = Literal["disk", "redis"]

GATHER_S = 0.03
AGAIN_S = 1.0
"""After a failure the place is tried so often."""
MAX_WAITING = 20_000
"""Records; some 10 MB."""
TELL_S = 60.0
"""What is dropped is told so often."""

PRUNE_FIRST_S = 60.0
"""After the start, which has other things to do."""
PRUNE_EVERY_S = 86_400.0
PRUNE_PAUSE_S = 1.0
"""Between two steps; each is short, so that no record waits long."""


class Record(NamedTuple):
    """One call at its end, or one further call that was made for it."""

    time_s: float
    """Of the end; Unix seconds."""
    id: str
    team: str
    key_id: str
    """Stands for the caller's key; empty when it came with none."""
    endpoint: str
    model: str
    """As the caller named it."""
    upstream: str
    upstream_model: str
    status: int
    outcome: str
    cached: str
    """`hit`, `join`, or empty."""
    is_side: bool
    usage: Usage | None
    """What stands in the answer, or was counted in its place."""
    reported: Usage | None
    """What the provider reported for this call; nothing for a cached one."""
    lost: Usage | None
    cost: Cost | None
    """None: not known. That of side calls is in the call they were made for."""
    attempts: int
    total_s: float


NO_USAGE = Usage()
MAX_TOKENS = 10**12
"""Of one call: an upstream may report anything, and sums must fit into 64 bits."""


def tokens_of(record: Record) -> tuple[Usage, Usage, Usage]:
    """Its usage, what was reported and what was lost, in figures that can be added up."""
    return _bounded(record.usage), _bounded(record.reported), _bounded(record.lost)


def _bounded(usage: Usage | None) -> Usage:
    if usage is None:
        return NO_USAGE
    if max(usage) <= MAX_TOKENS:
        return usage
    return Usage._make(min(each, MAX_TOKENS) for each in usage)


def sayable(text: str) -> str:
    """What UTF-8 can say of it: a caller's text may hold a lone surrogate."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class NotWritten(Exception):
    """The place is away and has written nothing of it: it may be tried again."""


class NoLedger(Exception):
    """There is nothing to read; the message says why and what to do."""


class Writer(Protocol):
    """Where records go."""

    async def write(self, records: Sequence[Record], keep_days: int) -> None:
        """All of them, or none and `NotWritten`. Any other exception: they are lost."""
        ...

    async def prune(self, before_s: float) -> bool:
        """Forget some of what ended before `before_s` (Unix seconds); whether there may be more.
        Whatever it raises, it is asked again the next day."""
        ...


class Ledger:
    """The records of this process on their way to a place; see the module's docstring."""

    def __init__(self, kit: Kit, writer: Writer) -> None:
        self._writer = writer
        self._clock: Clock = kit.clock
        self._tasks = kit.tasks
        self._records: list[Record] = []
        self._keeps: list[int] = []
        self._keep_days = 1
        self._timer: Timer | None = None
        self._pruning: Timer | None = None
        self._running: asyncio.Task[None] | None = None
        self._is_away = False
        self._is_closed = False
        self._dropped: Counter = kit.metrics.counter(
            "llm_sidecar_ledger_dropped", "Records of calls that could not be written."
        ).child()
        self._untold = 0
        self._tell_at = 0.0

    def enter(self, record: Record) -> None:
        """Write it soon. Never waits, never raises. On the event loop."""
        records = self._records
        if len(records) >= MAX_WAITING or self._is_closed:
            self._lost(1, "closed" if self._is_closed else "too many wait")
            return
        records.append(record)
        if self._timer is None:
            self._timer = self._clock.call_later(GATHER_S, self._begin)

    def join(self, keep_days: int) -> None:
        """A filter begins to use it. Records are kept as long as any of them wants."""
        self._keeps.append(keep_days)
        self._keep_days = max(self._keeps)
        if self._pruning is None and not self._is_closed:
            self._pruning = self._clock.call_later(PRUNE_FIRST_S, self._prune)

    def leave(self, keep_days: int) -> None:
        """It does so no more."""
        self._keeps.remove(keep_days)
        if self._keeps:  # what the last one wanted holds for what still waits
            self._keep_days = max(self._keeps)

    async def close(self) -> None:
        """Write what waits. What cannot be written now is lost. Idempotent."""
        self._is_closed = True
        for timer in (self._timer, self._pruning):
            if timer is not None:
                timer.cancel()
        self._timer = self._pruning = None
        if self._running is not None:
            await asyncio.wait((self._running,))
        if self._records:
            await self._write()
        if self._records:
            self._lost(len(self._records), "closed")
            self._records = []

    # Writing

    def _begin(self) -> None:
        self._running = self._tasks.start(self._write_all(), name="ledger")

    async def _write_all(self) -> None:
        """Until nothing waits, or the place is away; `_timer` stands until then."""
        try:
            while self._records and await self._write():
                pass
        finally:
            self._running = self._timer = None
            if self._records and not self._is_closed:
                self._timer = self._clock.call_later(AGAIN_S, self._begin)

    async def _write(self) -> bool:
        """Whether the place is there; if not, the records still wait."""
        records = self._records
        count = len(records)
        try:
            await self._writer.write(records[:count], self._keep_days)
        except NotWritten as error:
            if not self._is_away:
                self._is_away = True
                log.warning("ledger_waits", extra={"error": str(error)})
            return False
        except asyncio.CancelledError:  # it is on its way, and will be written
            del records[:count]
            raise
        except Exception as error:
            self._lost(count, str(error) or type(error).__name__)
        del records[:count]
        if self._is_away:
            self._is_away = False
            log.info("ledger_goes_on", extra={"records": count})
        return True

    def _lost(self, count: int, reason: str) -> None:
        self._dropped.inc(count)
        self._untold += count
        now = self._clock.monotonic()
        if now >= self._tell_at:
            log.warning("ledger_dropped", extra={"records": self._untold, "reason": reason})
            self._untold, self._tell_at = 0, now + TELL_S

    # Pruning

    def _prune(self) -> None:
        self._tasks.start(self._prune_once(), name="ledger: prune")

    async def _prune_once(self) -> None:
        has_more = False
        try:
            if self._keeps:
                before_s = self._clock.wall() - self._keep_days * 86_400
                has_more = await self._writer.prune(before_s)
        except Exception as error:
            log.warning("ledger_not_pruned", extra={"error": str(error)})
        if not self._is_closed:
            pause_s = PRUNE_PAUSE_S if has_more else PRUNE_EVERY_S
            self._pruning = self._clock.call_later(pause_s, self._prune)

    def __repr__(self) -> str:
        return f"<Ledger {self._writer!r} waiting={len(self._records)}>"


def place_of(where: Where, store: StoreAddress, data_dir: Path | None) -> Place | None:
    """Where records go with this setting; None: nowhere. Raises ValueError, which names what the
    configuration lacks."""
    if where == "off":
        return None
    if where == "disk" and data_dir is None:
        raise ValueError("ledger: `where: disk` needs a `data_dir` in the configuration")
    if where == "redis" and store.url is None:
        raise ValueError("ledger: `where: redis` needs a `store: redis://…` in the configuration")
    if where != "auto":
        return where
    if store.url is not None:
        return "redis"
    return "disk" if data_dir is not None else None


def open_ledger(kit: Kit, place: Place) -> Ledger:
    """The ledger of this process, the same for all teams and through reloads. Call it in `start`.

    Raises OSError when the file cannot be used, RuntimeError when the package for the store is not
    installed.
    """
    # Only what is asked for: neither is loaded where it is not used.
    if place == "redis":
        from filters.stores.redis import open_redis
        from filters.stores.redis_ledger import RedisLedger

        redis = open_redis(kit)
        return kit.resources.get(("ledger", kit.store), lambda: Ledger(kit, RedisLedger(redis)))
    from filters.stores.disk_ledger import open_disk_ledger

    disk = open_disk_ledger(kit)
    return kit.resources.get(("ledger", kit.data_dir), lambda: Ledger(kit, disk))


def read_ledgers(
    wheres: Iterable[Where], store: StoreAddress, data_dir: Path | None, query: Query
) -> Iterator[Line]:
    """What was written with these settings of filters, added up; each place is read once. It works
    beside a running sidecar and without one. Blocks. Raises NoLedger."""
    wheres = set(wheres)
    if not wheres:
        raise NoLedger("no records are kept: add `ledger` to the list `call` of a chain")
    try:
        places = {place_of(each, store, data_dir) for each in wheres}
    except ValueError as error:
        raise NoLedger(str(error)) from None
    if places == {None}:
        raise NoLedger(
            "no records are kept: set `data_dir`, such as `data_dir: .sidecar`, or a `store`, and "
            "not `where: off` for the filter `ledger`"
        )
    if "disk" in places:
        from filters.stores.disk_ledger import read_disk

        assert data_dir is not None, "place_of has seen to it"
        yield from read_disk(data_dir, query)
    if "redis" in places:
        from filters.stores.redis_ledger import read_redis

        yield from read_redis(store, query)
