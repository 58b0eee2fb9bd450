"""A second attempt for calls whose first byte is late."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Annotated

from pydantic import Field, NonNegativeFloat

from filters.algo.estimate import count_lost
from filters.algo.extra_share import ExtraShare
from filters.algo.quantile import Quantile
from sidecar.api import (
    LOST_USAGE,
    Call,
    CallError,
    CallFilter,
    CallNext,
    Counter,
    FilterConfig,
    Kit,
    Reply,
    Target,
    forget_frames,
)

REMEMBERED = 256
"""Answers that the learned quantile is of."""

Answer = Reply | Exception
Try = asyncio.Task[Answer]


class Hedge(CallFilter):
    """Asks a second time when the first byte is later than nearly always, and takes who answers
    first.

    Switch it on where a few slow answers hurt more than a few per cent of extra cost: both attempts
    are paid for. Place it inside of retry, so that each try may be hedged, and of whatever must see
    a call once. Only calls at the endpoints that answer from a model are hedged: to ask twice for
    anything else, such as a batch or a job of fine-tuning, may do it twice.
    """

    gives = frozenset({LOST_USAGE})

    class Config(FilterConfig):
        """When to ask again, and how often at most."""

        quantile: Annotated[float, Field(gt=0, lt=1)] = 0.95
        """The second attempt starts when so many of the last calls had their first byte already."""
        min_samples: Annotated[int, Field(ge=1, le=REMEMBERED)] = 50
        """Answers to learn from before the first hedge."""
        min_delay_s: NonNegativeFloat = 0.2
        """But never earlier than this."""
        max_extra_share: Annotated[float, Field(gt=0, le=1)] = 0.05
        """Second attempts for each call, at most."""

    config: Config

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._now = kit.clock.monotonic
        self._lanes: dict[tuple[str, str, bool], Lane] = kit.resources.get(("hedge",), dict)
        self._hedges = kit.metrics.counter(
            "llm_sidecar_hedges", "Second attempts for a late first byte.", ("upstream", "result")
        )

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        target = call.current_target
        if target is None or call.upload is not None or not _may_be_asked_twice(call):
            return call_next(call)
        # A stream has its first byte after the first token, any other answer after the last.
        key = (target.upstream.name, target.model or call.label, call.is_stream)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane()
        lane.extra.add_call(self.config.max_extra_share)
        delay_s = self._delay_s(call, lane)
        if delay_s is None:
            return self._timed(call, call_next, lane)
        return self._hedged(call, call_next, lane, delay_s, target)

    def _delay_s(self, call: Call, lane: Lane) -> float | None:
        """When to ask again; None: this call is not hedged."""
        config, times = self.config, lane.times
        if len(times) < config.min_samples or not lane.extra.has_one:
            return None
        delay_s = max(config.min_delay_s, times.at(config.quantile))
        needed_s = delay_s + times.at(0.5)
        return delay_s if needed_s < call.time_left(self._now()) else None

    async def _timed(self, call: Call, call_next: CallNext, lane: Lane) -> Reply:
        """One attempt; how long a good answer took is remembered."""
        started_at = self._now()
        reply = await call_next(call)
        if _is_good(reply):
            lane.times.add(self._now() - started_at)
        return reply

    async def _hedged(
        self, call: Call, call_next: CallNext, lane: Lane, delay_s: float, target: Target
    ) -> Reply:
        answer = await self._race(call, call_next, lane, delay_s, target)
        if isinstance(answer, Reply):
            return answer
        try:
            raise answer
        finally:
            del answer  # or it would hold its traceback, and that this frame

    async def _race(
        self, call: Call, call_next: CallNext, lane: Lane, delay_s: float, target: Target
    ) -> Answer:
        """The answer of the first attempt, or of a second one. Cancelled, it ends both."""
        started_at = self._now()
        first = self._start(call, call_next, lane)
        second: Try | None = None
        try:
            await self._patience(first, delay_s)
            if first.done() or not lane.extra.take():
                await asyncio.wait((first,))
                return first.result()
            second = self._start(call, call_next, lane)
            await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
            if not (_has_good(first) or _has_good(second)):
                await asyncio.wait((first, second))
        except asyncio.CancelledError:
            if second is not None:
                count_lost(call)
                self._count(target, "gone")
            await self._give_up(first, second)
            raise
        if not _has_good(second):
            self._count(target, "lost" if _has_good(first) else "failed")
            winner, loser = first, second
        elif _has_good(first):  # both in the same turn
            self._count(target, "lost")
            winner, loser = first, second
        else:
            self._count(target, "won")
            if not first.done():  # it takes at least so long
                lane.times.add(self._now() - started_at)
            winner, loser = second, first
        if not loser.done() or _has_good(loser):
            count_lost(call)
        await self._give_up(loser)
        return winner.result()

    def _start(self, call: Call, call_next: CallNext, lane: Lane) -> Try:
        return self.kit.tasks.start(self._try(call, call_next, lane), name="hedge")

    async def _try(self, call: Call, call_next: CallNext, lane: Lane) -> Answer:
        try:
            return await self._timed(call, call_next, lane)
        except Exception as error:
            return error  # raised by who asked, if this is the try that counts

    async def _patience(self, first: Try, delay_s: float) -> None:
        """Return when `first` is over, or after `delay_s`."""
        late: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.kit.clock.call_later(delay_s, lambda: late.set_result(None))
        try:
            await asyncio.wait((first, late), return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()

    async def _give_up(self, *tries: Try | None) -> None:
        """End these attempts: their connections are closed, and so are answers that they have."""
        left = [each for each in tries if each is not None]
        for each in left:
            each.cancel()
        await asyncio.wait(left)
        for each in left:
            answer = None if each.cancelled() else each.result()
            if isinstance(answer, Reply):
                answer.discard()
            elif isinstance(answer, Exception):
                if not isinstance(answer, CallError):
                    self.kit.log.error("hedge_failed", exc_info=answer)
                forget_frames(answer)

    def _count(self, target: Target, result: str) -> None:
        counter: Counter = self._hedges.child(target.upstream.name, result)
        counter.value += 1


class Lane:
    """What is known of one kind of calls: upstream, model, stream or not."""

    __slots__ = ("extra", "times")

    def __init__(self) -> None:
        self.times = Quantile(REMEMBERED)
        """Seconds until a good answer."""
        self.extra = ExtraShare()


def _may_be_asked_twice(call: Call) -> bool:
    """Whether to answer is all that it does; of an unknown path nobody knows."""
    endpoint = call.endpoint
    return endpoint.has_model and endpoint.name != "other"


def _is_good(answer: Answer) -> bool:
    return isinstance(answer, Reply) and answer.status < 500 and answer.status != 429


def _has_good(task: Try) -> bool:
    """Whether an attempt is over and its answer can be used."""
    return task.done() and not task.cancelled() and not task.exception() and _is_good(task.result())
