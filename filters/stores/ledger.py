"""What calls used, added up beside them and read back for `sidecar usage`.

This is all that others import of it. What calls of the same kind used is added up at once; every
`GATHER_S` the sums go to a place, one record for each kind however many calls there were: a SQLite
file (`disk_ledger`), or the shared store (`redis_ledger`). While the place is away they wait, and
what comes meanwhile is added to them, but never to a record of another minute. No more than
`MAX_KINDS` of them wait: calls that would need another one are dropped, counted and told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice, takewhile
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from filters.algo.usage_report import EXACT, NOTHING, Line, Query
from filters.stores.steady import SteadyClock
from sidecar.api import Clock, Cost, Counter, Kit, StoreAddress, Timer, Usage

log = logging.getLogger(__name__)

Where = Literal["auto", "disk", "redis", "off"]
Place = Literal["disk", "redis"]

GATHER_S = 0.1
AGAIN_S = 1.0
"""After a failure the place is tried so often."""
MAX_KINDS = 20_000
"""Records that wait; some 20 MB."""
TOGETHER = 1_000
"""Records in one write, so that no turn of the loop is long."""
MINUTE_S = 60
TELL_S = 60.0
"""What is dropped is told so often."""

PRUNE_EVERY_S = 3_600.0
"""And not before: by then a clock that was wrong at the start has been set."""
PRUNE_PAUSE_S = 1.0
"""Between two steps; each is short, so that no record waits long."""
MERGE_AFTER_S = 3_600
"""Until then it is known to a tenth of a second when calls ended, later to the minute."""
MERGE_FIRST_S = 60.0
"""After the start, which has other things to do."""
MERGE_EVERY_S = 600.0
MERGE_PAUSE_S = 0.1

MAX_TOKENS = 10**12
"""For each call of a record: an upstream may report anything, and sums must fit into 64 bits."""


class Kind(NamedTuple):
    """What the calls of a record have in common."""

    team: str
    key_id: str
    """Stands for the caller's key; empty when there was none."""
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
    is_estimated: bool
    currency: str | None
    """None: what they cost is not known."""


class Record(NamedTuple):
    """Calls of one kind that ended in one moment, or further calls that were made for such.

    The figures are sums over them.
    """

    time_s: float
    """When the last of them ended; Unix seconds. All ended in the same minute."""
    team: str
    """This and what follows, down to `currency`: as in their `Kind`."""
    key_id: str
    endpoint: str
    model: str
    upstream: str
    upstream_model: str
    status: int
    outcome: str
    cached: str
    is_side: bool
    is_estimated: bool
    currency: str | None
    calls: int
    input_tokens: int
    """What stands in the answers, or was counted in its place."""
    output_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    cache_write_1h_tokens: int
    reasoning_tokens: int
    reported_input_tokens: int
    """What the provider reported for these calls; nothing for cached ones."""
    reported_output_tokens: int
    lost_input_tokens: int
    lost_output_tokens: int
    attempts: int
    total_s: float
    cost: Decimal
    """Exact. That of side calls is in the calls they were made for."""


@dataclass(slots=True, eq=False)
class Sums:
    """The figures of a record that calls are still added to."""

    time_s: float = 0.0
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    reported_input_tokens: int = 0
    reported_output_tokens: int = 0
    lost_input_tokens: int = 0
    lost_output_tokens: int = 0
    attempts: int = 0
    total_s: float = 0.0
    cost: Decimal = NOTHING

    def add(self, other: Sums) -> None:
        """What others of the same kind used."""
        self.time_s = max(self.time_s, other.time_s)
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.cost = EXACT.add(self.cost, other.cost)

    def record(self, kind: Kind) -> Record:
        """As it is now, in figures that can be added up."""
        most = self.calls * MAX_TOKENS
        tokens = [min(getattr(self, name), most) for name in _TOKENS]
        rest = (self.attempts, self.total_s, self.cost)
        return Record._make((self.time_s, *kind, self.calls, *tokens, *rest))


_TOKENS = tuple(name for name in Record._fields if name.endswith("_tokens"))
_NUMBERS = ("calls", *_TOKENS, "attempts", "total_s")
_add = EXACT.add


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
        """All of them, which are of one minute, or none and `NotWritten`. Any other exception: they
        are lost."""
        ...

    async def prune(self, before_s: float) -> bool:
        """Forget some of what ended before `before_s` (Unix seconds); whether there may be more.
        Whatever it raises, it is asked again an hour later."""
        ...

    async def merge(self, before_s: float) -> bool:
        """Make one record of some that are alike, of a minute that ended before `before_s` (Unix
        seconds); whether there may be more. Whatever it raises, it is asked again."""
        ...


class Chore:
    """Something that is done beside the calls, in steps with pauses, and then again and again."""

    def __init__(
        self,
        kit: Kit,
        name: str,
        step: Callable[[], Awaitable[bool]],
        first_s: float,
        pause_s: float,
        every_s: float,
    ) -> None:
        self._clock: Clock = kit.clock
        self._tasks = kit.tasks
        self._name = name
        self._step = step
        self._first_s = first_s
        self._pause_s = pause_s
        self._every_s = every_s
        self._timer: Timer | None = None
        """The last one; None: it has not begun."""
        self._is_over = False

    def begin(self) -> None:
        """Soon, unless it has begun or is over."""
        if self._timer is None and not self._is_over:
            self._wait(self._first_s)

    def cancel(self) -> None:
        """No further step, for good."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self, delay_s: float) -> None:
        self._timer = self._clock.call_later(delay_s, self._go_on)

    def _go_on(self) -> None:
        self._tasks.start(self._do_step(), name=f"ledger: {self._name}")

    async def _do_step(self) -> None:
        has_more = await self._step()
        if not self._is_over:
            self._wait(self._pause_s if has_more else self._every_s)


class Ledger:
    """The records of this process on their way to a place; see the module's docstring."""

    def __init__(self, kit: Kit, writer: Writer) -> None:
        self._writer = writer
        self._clock: Clock = kit.clock
        self._steady = SteadyClock(kit.clock)
        self._tasks = kit.tasks
        self._open: dict[Kind, Sums] = {}
        """Of this moment."""
        self._minute_ends_s = 0.0
        """And with it the moment; Unix seconds. 0: no call has ended in it yet."""
        self._waiting: dict[tuple[int, Kind], Sums] = {}
        """Of moments that are over, by their minutes since 1970."""
        self._on_their_way = 0
        """Records that are being written; nothing is added to them."""
        self._keeps: list[int] = []
        self._keep_days = 1
        self._timer: Timer | None = None
        self._again: Timer | None = None
        self._chores = (
            Chore(kit, "prune", self._prune, PRUNE_EVERY_S, PRUNE_PAUSE_S, PRUNE_EVERY_S),
            Chore(kit, "merge", self._merge, MERGE_FIRST_S, MERGE_PAUSE_S, MERGE_EVERY_S),
        )
        self._running: asyncio.Task[None] | None = None
        self._is_away = False
        self._is_closed = False
        self._dropped: Counter = kit.metrics.counter(
            "llm_sidecar_ledger_dropped", "Calls of which no record could be written."
        ).child()
        self._untold = 0
        self._tell_at = 0.0

    def enter(
        self,
        kind: Kind,
        usage: Usage | None,
        reported: Usage | None,
        lost: Usage | None,
        cost: Cost | None,
        attempts: int,
        total_s: float,
    ) -> None:
        """A call ended: add what it used to its kind. Never waits. On the event loop."""
        now_s = self._clock.wall()
        if now_s >= self._minute_ends_s:
            self._end_moment()
            self._minute_ends_s = (now_s // MINUTE_S + 1) * MINUTE_S
        sums = self._open.get(kind)
        if sums is None:
            sums = self._begin(kind, now_s)
            if sums is None:
                return
        sums.time_s = now_s
        sums.calls += 1
        sums.attempts += attempts
        sums.total_s += total_s
        if usage is not None:
            tokens_in, tokens_out, cached, written, reasoning, written_1h, _ = usage
            sums.input_tokens += tokens_in
            sums.output_tokens += tokens_out
            if cached:
                sums.cached_tokens += cached
            if written:
                sums.cache_write_tokens += written
                sums.cache_write_1h_tokens += written_1h
            if reasoning:
                sums.reasoning_tokens += reasoning
        if reported is not None:
            sums.reported_input_tokens += reported.input
            sums.reported_output_tokens += reported.output
        if lost is not None:
            sums.lost_input_tokens += lost.input
            sums.lost_output_tokens += lost.output
        if cost is not None:
            sums.cost = _add(sums.cost, cost.amount)

    def join(self, keep_days: int) -> None:
        """A filter begins to use it. Records are kept as long as any of them wants."""
        self._keeps.append(keep_days)
        self._keep_days = max(self._keeps)
        for chore in self._chores:
            chore.begin()

    def leave(self, keep_days: int) -> None:
        """It does so no more."""
        self._keeps.remove(keep_days)
        if self._keeps:  # what the last one wanted holds for what still waits
            self._keep_days = max(self._keeps)

    async def close(self) -> None:
        """Write what waits. What cannot be written now is lost. Idempotent."""
        self._is_closed = True
        for timer in (self._timer, self._again, *self._chores):
            if timer is not None:
                timer.cancel()
        self._timer = self._again = None
        if self._running is not None:
            await asyncio.wait((self._running,))
        self._end_moment()
        while self._waiting and await self._write():
            pass
        if self._waiting:
            self._lost(_calls(self._waiting), "closed")
            self._waiting = {}

    # Gathering

    def _begin(self, kind: Kind, now_s: float) -> Sums | None:
        """The first record of its kind in this moment; None: there are too many."""
        if self._is_closed:
            self._lost(1, "closed")
            return None
        count = len(self._open) + len(self._waiting) + self._on_their_way
        if count >= MAX_KINDS and (_minute(now_s), kind) not in self._waiting:
            self._lost(1, "too many wait")
            return None
        if self._timer is None:
            self._timer = self._clock.call_later(GATHER_S, self._gather)
        sums = self._open[kind] = Sums()
        return sums

    def _gather(self) -> None:
        self._timer = None
        self._end_moment()
        if self._running is None and self._again is None:
            self._begin_writing()

    def _end_moment(self) -> None:
        sums_of, self._open = self._open, {}
        self._minute_ends_s = 0.0
        for kind, sums in sums_of.items():
            self._wait((_minute(sums.time_s), kind), sums)

    def _wait(self, key: tuple[int, Kind], sums: Sums) -> None:
        there = self._waiting.setdefault(key, sums)
        if there is not sums:
            there.add(sums)

    # Writing

    def _begin_writing(self) -> None:
        self._again = None
        self._running = self._tasks.start(self._write_all(), name="ledger")

    async def _write_all(self) -> None:
        """Until nothing waits, or the place is away."""
        try:
            while self._waiting and await self._write():
                pass
        finally:
            self._running = None
            if self._waiting and not self._is_closed:
                self._again = self._clock.call_later(AGAIN_S, self._begin_writing)

    async def _write(self) -> bool:
        """Whether the place is there; if not, the records still wait."""
        minute, _ = next(iter(self._waiting))
        alike = takewhile(lambda key: key[0] == minute, self._waiting)
        keys = list(islice(alike, TOGETHER))
        batch = {key: self._waiting.pop(key) for key in keys}
        records = [sums.record(kind) for (_, kind), sums in batch.items()]
        self._on_their_way = len(records)
        try:
            await self._writer.write(records, self._keep_days)
        except NotWritten as error:
            for key, sums in batch.items():
                self._wait(key, sums)
            if not self._is_away:
                self._is_away = True
                log.warning("ledger_waits", extra={"error": str(error)})
            return False
        except Exception as error:
            self._lost(_calls(batch), str(error) or type(error).__name__)
        finally:  # also when we are cancelled: then it is on its way, and will be written
            self._on_their_way = 0
        if self._is_away:
            self._is_away = False
            log.info("ledger_goes_on", extra={"records": len(records)})
        return True

    def _lost(self, count: int, reason: str) -> None:
        self._dropped.inc(count)
        self._untold += count
        now = self._clock.monotonic()
        if now >= self._tell_at:
            log.warning("ledger_dropped", extra={"calls": self._untold, "reason": reason})
            self._untold, self._tell_at = 0, now + TELL_S

    # Chores: a step of each; whether there may be more

    async def _prune(self) -> bool:
        if not self._keeps or not self._steady.is_trusted():  # nobody says how long, or what time
            return False
        try:
            return await self._writer.prune(self._clock.wall() - self._keep_days * 86_400)
        except Exception as error:
            log.warning("ledger_not_pruned", extra={"error": str(error)})
            return False

    async def _merge(self) -> bool:
        if not self._keeps:
            return False
        try:
            return await self._writer.merge(self._clock.wall() - MERGE_AFTER_S)
        except Exception as error:
            log.warning("ledger_not_merged", extra={"error": str(error)})
            return False

    def __repr__(self) -> str:
        return f"<Ledger {self._writer!r} waiting={len(self._open) + len(self._waiting)}>"


def _minute(time_s: float) -> int:
    return int(time_s) // MINUTE_S


def _calls(waiting: Mapping[tuple[int, Kind], Sums]) -> int:
    return sum(sums.calls for sums in waiting.values())


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
