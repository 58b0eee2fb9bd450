"""Admission: a bound on the calls in flight, and a queue for the others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from enum import Enum
from functools import partial
from math import ceil
from typing import Literal, NamedTuple

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from filters.algo.by_model import ByModel
from filters.algo.fair_queue import FairQueue, Waiter
from sidecar.api import (
    Call,
    CallFilter,
    CallNext,
    Counter,
    End,
    FilterConfig,
    Gauge,
    HeaderName,
    Histogram,
    Key,
    Kit,
    Rejected,
    Reply,
)

Priority = Literal["high", "normal", "low"]
CLASSES: tuple[Priority, ...] = ("high", "normal", "low")
RANKS: dict[str, int] = {name: rank for rank, name in enumerate(CLASSES)}

HAS_SLOT: Key[bool] = Key("queue_slot")
"""A retry or a hedge outside brings a call by more than once: it would wait for itself."""

HOLDS_REMEMBERED = 32
"""How long the last calls were in flight tells how long the next ones will be."""


class PriorityQueue(CallFilter):
    """Bounds the calls in flight; the others wait by class, and fairly by team within a class.

    Switch it on where several teams, or urgent and patient calls of one application, share
    upstreams that can become full. Place it inside of the limits and the cache, so that what they
    refuse or answer never waits, and outside of router, fallback and retry: a place is held until
    the end of the call, all its tries together.
    """

    class Config(FilterConfig):
        """The first four are the queue's, which all teams share: set them in `filters:`."""

        max_in_flight: PositiveInt | None = None
        """Calls between here and the end of their answers, streams included; over all workers.
        null: as many as there may be connections to all upstreams (`pool.max_connections`)."""
        max_waiting: NonNegativeInt = 1000
        """Calls that wait; over all workers. Beyond it the least important one is refused."""
        max_wait_s: PositiveFloat = 30.0
        """A call that has waited so long is refused."""
        age_s: PositiveFloat = 5.0
        """Waiting that long makes up for one class."""
        priority: Priority | None = None
        """The class of these calls; null: the team's `priority`."""
        models: dict[str, Priority] = {}
        """The class of calls for some models, by name or pattern; goes before `priority`."""
        header: HeaderName | None = "x-priority"
        """In which the caller may name the class; null: none."""
        caller_may_raise: bool = False
        """It may name a higher class, too, and not only a lower one."""
        weight: PositiveInt = 1
        """The team's share within a class, against the weights of the other teams."""

    config: Config

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._now = kit.clock.monotonic
        workers = kit.workers
        slots = kit.max_connections  # of this process
        if config.max_in_flight is not None:
            slots = max(1, config.max_in_flight // workers)
        self._bounds = Bounds(
            slots=slots,
            waiting=config.max_waiting and max(1, config.max_waiting // workers),
            age_s=config.age_s,
        )
        self._models = ByModel({name: RANKS[each] for name, each in config.models.items()})
        self._queue = kit.resources.get(("priority_queue",), lambda: Queue(kit, self._bounds))

    async def start(self) -> None:
        self._queue.bounds_of(self, self._bounds)

    async def stop(self) -> None:
        self._queue.bounds_of(self, None)

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        queue = self._queue
        if not call.targets or HAS_SLOT in call:  # answered by ourselves, or let in before
            return call_next(call)
        if queue.in_flight < queue.bounds.slots:  # then nobody waits
            queue.take_slot(call, self._now())
            return call_next(call)
        return self._wait(call, call_next)

    async def _wait(self, call: Call, call_next: CallNext) -> Reply:
        config, queue, now = self.config, self._queue, self._now()
        place = Place(call)
        rank = self._rank(call)
        waiter = Waiter(place, rank=rank, group=self.kit.team, weight=config.weight)
        left_s = call.time_left(now)
        why = queue.enter(waiter, left_s, now)
        if why is None:
            limit = Why.TIMEOUT if config.max_wait_s < left_s else Why.DEADLINE
            wait_s = min(config.max_wait_s, left_s)
            timer = self.kit.clock.call_later(wait_s, partial(queue.refuse, waiter, limit))
            try:
                why = await place.turn
            finally:
                timer.cancel()
                queue.leave(waiter)
                call.held_s += self._now() - now
        if why is None:
            return await call_next(call)
        wait_s = queue.expected_wait_s(waiter, self._now())
        queue.refused(rank, why)
        raise self._refusal(why, wait_s)

    def _rank(self, call: Call) -> int:
        """The class of a call: what is configured, or what its caller asks for and may have."""
        config = self.config
        rank = self._models.find(call.model)
        if rank is None:
            rank = RANKS[config.priority or call.team.priority]
        if config.header is not None:
            asked = RANKS.get(call.headers.get(config.header, "").strip().lower())
            if asked is not None and (asked > rank or config.caller_may_raise):
                return asked
        return rank

    def _refusal(self, why: Why, wait_s: float) -> Rejected:
        """What the caller is told. `wait_s`: what it would have to wait if it came now."""
        slots, waiting = self._queue.bounds.slots, self._queue.bounds.waiting
        after_s = max(1.0, wait_s)
        if why is Why.DEADLINE:
            text = "the time that the caller allows was over before the call's turn came"
            return Rejected(504, "deadline_exceeded", text, retry_after_s=after_s)
        if why is Why.TOO_LATE:
            text = (
                f"{slots} calls are in flight and the wait is about {ceil(wait_s)} s, longer than "
                "the caller allows: try again later, or allow more"
            )
            return Rejected(503, "deadline_too_short", text, retry_after_s=after_s)
        if why is Why.TIMEOUT:
            text = f"waited {self.config.max_wait_s:g} s behind {slots} calls in flight"
            return Rejected(503, "queue_timeout", text, retry_after_s=after_s)
        text = f"{slots} calls are in flight and {waiting} wait: try again later"
        if why is Why.PUSHED_OUT:
            text = f"{slots} calls are in flight, {waiting} wait, and a more important one came"
        return Rejected(503, "queue_full", text, retry_after_s=after_s)


class Why(Enum):
    """Why a call was refused; a label."""

    FULL = "full"  # and nobody was less important
    PUSHED_OUT = "pushed_out"  # full, and a more important call came
    TOO_LATE = "too_late"  # its turn would come after the caller's deadline
    DEADLINE = "deadline"  # it waited until there
    TIMEOUT = "timeout"  # it waited `max_wait_s`


class Bounds(NamedTuple):
    """What one process allows."""

    slots: int
    waiting: int
    age_s: float


class Place:
    """A waiting call, and the future that ends its wait: None, or why it is refused."""

    __slots__ = ("call", "turn")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.turn: asyncio.Future[Why | None] = asyncio.get_running_loop().create_future()


class Queue:
    """The slots of this process and who waits for one. Whenever a slot is free, nobody waits.

    A slot belongs to a call from the moment it is given, before the call's task has heard of it,
    and comes back at the call's end: so none is lost when the task is cancelled in between.
    """

    def __init__(self, kit: Kit, bounds: Bounds) -> None:
        self.bounds = bounds
        self.in_flight = 0
        self._now = kit.clock.monotonic
        self._waiters: FairQueue[Place] = FairQueue(len(CLASSES), age_s=bounds.age_s)
        self._bounds: dict[PriorityQueue, Bounds] = {}
        self._holds: deque[float] = deque(maxlen=HOLDS_REMEMBERED)  # times in flight
        make = kit.metrics
        self._gauge: Gauge = make.gauge(
            "llm_sidecar_queue_in_flight", "Calls that the queue has let through."
        ).child()
        waiting = make.gauge("llm_sidecar_queue_waiting", "Calls that wait.", ("class",))
        self._waiting: list[Gauge] = [waiting.child(name) for name in CLASSES]
        waits = make.histogram(
            "llm_sidecar_queue_wait_seconds", "Of calls that waited and got in.", ("class",)
        )
        self._waits: list[Histogram] = [waits.child(name) for name in CLASSES]
        self._refused = make.counter(
            "llm_sidecar_queue_refused", "Calls refused by the queue.", ("class", "why")
        )

    # Slots

    def take_slot(self, call: Call, now: float) -> None:
        """Give `call` a slot until its end."""
        call[HAS_SLOT] = True
        self.in_flight += 1
        self._gauge.value += 1
        call.on_end(partial(self._release, now))

    def _release(self, taken_at: float, end: End) -> None:
        was_full = self.in_flight >= self.bounds.slots
        self.in_flight -= 1
        self._gauge.value -= 1
        now = self._now()
        self._holds.append(now - taken_at)
        if was_full:  # else nobody waits
            self._fill(now)

    def _fill(self, now: float) -> None:
        """Give free slots to those whose turn it is."""
        while self.in_flight < self.bounds.slots:
            waiter = self._waiters.pop(now)
            if waiter is None:
                return
            place = waiter.item
            self._waiting[waiter.rank].value -= 1
            if place.turn.done():  # it is leaving, and was about to say so
                continue
            self._waits[waiter.rank].observe(now - waiter.came_at)
            self.take_slot(place.call, now)
            place.turn.set_result(None)

    def bounds_of(self, owner: PriorityQueue, bounds: Bounds | None) -> None:
        """Take the bounds of a filter that has started, or forget those of one that stopped.

        Those that came last count: a reload's at once, and if it fails, the old ones again.
        """
        self._bounds.pop(owner, None)
        if bounds is not None:
            self._bounds[owner] = bounds
        if self._bounds:
            self.bounds = next(reversed(self._bounds.values()))
            self._waiters.age_s = self.bounds.age_s
            self._fill(self._now())

    # Waiting

    def enter(self, waiter: Waiter[Place], left_s: float, now: float) -> Why | None:
        """Let it wait, or say why not. `left_s`: how long its caller has patience."""
        if left_s <= 0:
            return Why.DEADLINE
        if self.expected_wait_s(waiter, now) > left_s:
            return Why.TOO_LATE
        if len(self._waiters) >= self.bounds.waiting:
            loser = self._waiters.push_out(waiter, now)
            if loser is None:
                return Why.FULL
            self._waiting[loser.rank].value -= 1
            self._tell(loser, Why.PUSHED_OUT)
        self._waiters.put(waiter, now)
        self._waiting[waiter.rank].value += 1
        return None

    def leave(self, waiter: Waiter[Place]) -> None:
        """It does not wait any more. Nothing, if it had its turn or was refused."""
        if self._waiters.remove(waiter):
            self._waiting[waiter.rank].value -= 1

    def refuse(self, waiter: Waiter[Place], why: Why) -> None:
        """End its wait without a slot."""
        self.leave(waiter)
        self._tell(waiter, why)

    def _tell(self, waiter: Waiter[Place], why: Why) -> None:
        if not waiter.item.turn.done():
            waiter.item.turn.set_result(why)

    def expected_wait_s(self, waiter: Waiter[Place], now: float) -> float:
        """How long `waiter` would wait if it came now, in seconds, by the usual time in
        flight of the last calls; 0 while none has ended."""
        if not self._holds:
            return 0.0
        # The median: a few very slow calls, or an outage that is over, refuse nobody.
        hold_s = sorted(self._holds)[len(self._holds) // 2]
        turns = self._waiters.ahead(waiter, now) + 1
        return turns * hold_s / self.bounds.slots

    def refused(self, rank: int, why: Why) -> None:
        counter: Counter = self._refused.child(CLASSES[rank], why.value)
        counter.value += 1

    def __repr__(self) -> str:
        return f"<Queue {self.in_flight}/{self.bounds.slots} waiting={len(self._waiters)}>"
