"""Filters that tests put into a chain: they wait, or remember what happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallFilter,
    CallNext,
    End,
    Rejected,
    Reply,
)


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
    """Remembers how many answers have begun, and how attempts ended, debt by debt."""

    def __init__(self, config: object, kit: object) -> None:
        super().__init__(config, kit)  # type: ignore[arg-type]
        self.begun = 0
        self.ends: list[End] = []
        self.settled: list[End] = []

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        attempt.on_end(self.ends.append)
        attempt.on_settle(self._settle)
        reply = await call_next(attempt)
        self.begun += 1
        return reply

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


class FailsLate(CallFilter):
    """Has a bug, and a reply in its hand when it shows."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        await call_next(call)
        raise RuntimeError("secret detail of a bug")


class RefusesLate(CallFilter):
    """Refuses the call once it has seen the reply."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        await call_next(call)
        raise Rejected(451, "not_for_you", "the answer is not for you", retry_after_s=1.2)


class Refuses(CallFilter):
    """Refuses every call."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        raise Rejected(429, "too_many", "one at a time", retry_after_s=1.2, headers={"x-why": "1"})


class Doubled:
    """Every byte twice, and a mark at the end."""

    def feed(self, data: bytes) -> bytes:
        return bytes(byte for byte in data for _ in range(2))

    def finish(self) -> bytes:
        return b"the end"


class Doubles(CallFilter):
    """Changes the bytes of every answer, and their number."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)
        reply.body.map(Doubled())
        return reply


class Torn:
    """Fails at the second piece."""

    def __init__(self) -> None:
        self.pieces = 0

    def feed(self, data: bytes) -> bytes:
        self.pieces += 1
        if self.pieces > 1:
            raise RuntimeError("secret detail of a bug")
        return data

    def finish(self) -> bytes:
        raise RuntimeError("secret detail of a bug")


class Tears(CallFilter):
    """Changes the bytes of every answer, and fails at it."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)
        reply.body.map(Torn())
        return reply


class Twice(CallFilter):
    """Asks twice, and returns the second reply."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        first = await call_next(call)
        first.discard()
        return await call_next(call)


class AnswersItself(CallFilter):
    """Asks nobody."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        return Reply.of(200, b'{"made":"here"}')


class TapsBadly(CallFilter):
    """Looks at every event, and fails at it."""

    taps_events = True

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)
        reply.body.tap_events(self._fail)
        reply.body.tap_bytes(self._fail)
        return reply

    def _fail(self, seen: object) -> None:
        raise RuntimeError("a tap failed")
