"""Filters that tests put into a chain: they wait, or remember what happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sidecar.api import Attempt, AttemptFilter, AttemptNext, Call, CallFilter, CallNext, End, Reply


class Queue(CallFilter):
    """Holds every call until `go` is set: before the upstream is asked, or with its reply."""

    is_behind = False

    def __init__(self, config: object, kit: object) -> None:
        super().__init__(config, kit)  # type: ignore[arg-type]
        self.go = asyncio.Event()
        self.waiting = 0

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        if not self.is_behind:
            await self._wait()
            return await call_next(call)
        reply = await call_next(call)
        await self._wait()
        return reply

    async def _wait(self) -> None:
        self.waiting += 1
        try:
            await self.go.wait()
        finally:
            self.waiting -= 1


class QueueBehind(Queue):
    """Holds every call once its reply is there."""

    is_behind = True


class Ends(CallFilter):
    """Remembers how calls ended, debt by debt."""

    def __init__(self, config: object, kit: object) -> None:
        super().__init__(config, kit)  # type: ignore[arg-type]
        self.ends: list[End] = []
        self.settled: list[End] = []

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        call.on_end(self.ends.append)
        call.on_settle(self._settle)
        return await call_next(call)

    async def _settle(self, end: End) -> None:
        self.settled.append(end)


class AttemptEnds(AttemptFilter):
    """Remembers how attempts ended, debt by debt."""

    def __init__(self, config: object, kit: object) -> None:
        super().__init__(config, kit)  # type: ignore[arg-type]
        self.ends: list[End] = []
        self.settled: list[End] = []

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        attempt.on_end(self.ends.append)
        attempt.on_settle(self._settle)
        return await call_next(attempt)

    async def _settle(self, end: End) -> None:
        self.settled.append(end)


class AtReply(CallFilter):
    """Calls `then` in the turn of the loop in which a reply is there."""

    then: Callable[[], None] = staticmethod(lambda: None)

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)
        self.then()
        return reply


class Fails(CallFilter):
    """Has a bug."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        raise RuntimeError("secret detail of a bug")
