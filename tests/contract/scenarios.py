"""Every way in which a call can be over, played on the harness around one filter."""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallFilter,
    CallNext,
    End,
    Filter,
    Key,
    Outcome,
    Rejected,
    Reply,
)
from tests.support.harness import Harness, Run, Use

FIRST = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
NEXT = b'data: {"choices": [{"delta": {"content": "\xc3\xa9'
LAST = b'"}}]}\n\ndata: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
STREAM = FIRST + NEXT + LAST
WHOLE = b'{"id": "x",  "unknown": [1], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'


@dataclass
class Journal:
    """What the probes around the filter saw."""

    call_debts: list[str] = field(default_factory=list)
    attempt_debts: list[str] = field(default_factory=list)
    settled: list[str] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)
    """Steps that bytes pass on their way, seen where the reply leaves the outermost filter."""
    canaries: list[weakref.ref[Any]] = field(default_factory=list)
    """Things that only a call or an attempt holds."""


class Canary:
    pass


CANARY: Key[Canary] = Key("canary")


def call_probe(journal: Journal, name: str) -> type[CallFilter]:
    class CallProbe(CallFilter):
        sees_refused = True

        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            def note(end: End) -> None:
                journal.call_debts.append(f"{name} {end.outcome}")

            async def settle(end: End) -> None:
                journal.settled.append(f"{name} {end.outcome}")

            call.on_end(note)
            call.on_settle(settle)
            canary = Canary()
            journal.canaries.append(weakref.ref(canary))
            if CANARY not in call:
                call[CANARY] = canary
            reply = await call_next(call)
            if name == "outer":
                journal.stages.append(len(reply.body._stages))
            return reply

    return CallProbe


def attempt_probe(journal: Journal, name: str) -> type[AttemptFilter]:
    class AttemptProbe(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            def note(end: End) -> None:
                journal.attempt_debts.append(f"{name} {end.outcome}")

            attempt.on_end(note)
            canary = Canary()
            journal.canaries.append(weakref.ref(canary))
            if CANARY not in attempt:
                attempt[CANARY] = canary
            return await call_next(attempt)

    return AttemptProbe


class Refuses(CallFilter):
    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        raise Rejected(429, "rate_limited", "slow down", retry_after_s=2.0)


class RefusesAttempt(AttemptFilter):
    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        raise Rejected(429, "rate_limited", "slow down", retry_after_s=2.0)


class Fails(CallFilter):
    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        raise LookupError("a mistake of a filter")


class AnswersInstead(CallFilter):
    """Stands outside: gives the upstream's reply up and answers itself."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)
        reply.discard()
        return Reply.of(200, b'{"mine": 1}')


@dataclass(frozen=True)
class Scenario:
    """`play` runs one call to its end on a harness; the ends are what its debts must be told."""

    name: str
    play: Callable[[Harness], Awaitable[Run]]
    call_end: Outcome
    attempt_end: Outcome | None = None
    """None: no attempt is made."""
    data: bytes | None = None
    """What the client must get; None: an error."""
    is_aborted: bool = False
    """The source of the stream must have been stopped."""
    before: tuple[type[Filter], ...] = ()
    after: tuple[type[Filter], ...] = ()

    def harness(self, use: Use, journal: Journal) -> Harness:
        return Harness(
            *self.before,
            call_probe(journal, "outer"),
            attempt_probe(journal, "outer"),
            use,
            call_probe(journal, "inner"),
            attempt_probe(journal, "inner"),
            *self.after,
        )

    def __str__(self) -> str:
        return self.name


async def completed_whole(harness: Harness) -> Run:
    harness.upstream.answer = harness.upstream.whole(WHOLE)
    return await harness.run()


async def completed_stream(harness: Harness) -> Run:
    run = await _mid_stream(harness)
    harness.upstream.source.feed(NEXT)
    harness.upstream.source.finish(LAST)
    await run.ended()
    return run


async def answered_500(harness: Harness) -> Run:
    harness.upstream.answer = harness.upstream.whole(b'{"error": {}}', status=500)
    return await harness.run()


async def refused(harness: Harness) -> Run:
    return await harness.run()


async def refused_by_the_edge(harness: Harness) -> Run:
    refusal = Rejected(401, "invalid_api_key", "this API key is not known here")
    return await harness.run(harness.call(refusal=refusal))


async def failed_before_head(harness: Harness) -> Run:
    harness.upstream.answer = harness.upstream.failing()
    return await harness.run()


async def died_midway(harness: Harness) -> Run:
    run = await _mid_stream(harness)
    harness.upstream.source.feed(NEXT)
    harness.upstream.source.fail()
    await run.ended()
    return run


async def client_gone_before_reply(harness: Harness) -> Run:
    run = await _waiting(harness)
    run.client_leaves()
    await run.ended()
    return run


async def client_gone_mid_stream(harness: Harness) -> Run:
    run = await _mid_stream(harness)
    run.client_leaves()
    await run.ended()
    return run


async def discarded(harness: Harness) -> Run:
    harness.upstream.answer = harness.upstream.stream(FIRST)
    return await harness.run()


async def aborted_before_reply(harness: Harness) -> Run:
    run = await _waiting(harness)
    run.abort()
    await run.ended()
    return run


async def aborted_mid_stream(harness: Harness) -> Run:
    run = await _mid_stream(harness)
    run.abort()
    await run.ended()
    return run


async def _mid_stream(harness: Harness) -> Run:
    harness.upstream.answer = harness.upstream.stream(FIRST)
    run = harness.start()
    await run.begun()
    return run


async def _waiting(harness: Harness) -> Run:
    harness.upstream.answer = harness.upstream.silent()
    harness.upstream.asked.clear()
    run = harness.start()
    await harness.upstream.asked.wait()
    return run


O = Outcome  # noqa: E741

SCENARIOS = (
    Scenario("completed_whole", completed_whole, O.COMPLETED, O.COMPLETED, WHOLE),
    Scenario("completed_stream", completed_stream, O.COMPLETED, O.COMPLETED, STREAM),
    Scenario("answered_500", answered_500, O.COMPLETED, O.COMPLETED, b'{"error": {}}'),
    Scenario("rejected_inside", refused, O.REJECTED, after=(Refuses,)),
    Scenario("attempt_rejected", refused, O.REJECTED, O.REJECTED, after=(RefusesAttempt,)),
    Scenario("refused_by_the_edge", refused_by_the_edge, O.REJECTED),
    Scenario("filter_failed", refused, O.ABORTED, after=(Fails,)),
    Scenario("failed_before_head", failed_before_head, O.UPSTREAM_FAILED, O.UPSTREAM_FAILED),
    Scenario("died_midway", died_midway, O.UPSTREAM_FAILED, O.UPSTREAM_FAILED, FIRST + NEXT),
    Scenario(
        "client_gone_before_reply", client_gone_before_reply, O.CLIENT_GONE, O.CLIENT_GONE, b""
    ),
    Scenario(
        "client_gone_mid_stream",
        client_gone_mid_stream,
        O.CLIENT_GONE,
        O.CLIENT_GONE,
        FIRST,
        is_aborted=True,
    ),
    Scenario(
        "discarded",
        discarded,
        O.COMPLETED,
        O.DISCARDED,
        b'{"mine": 1}',
        is_aborted=True,
        before=(AnswersInstead,),
    ),
    Scenario("aborted_before_reply", aborted_before_reply, O.ABORTED, O.ABORTED),
    Scenario(
        "aborted_mid_stream", aborted_mid_stream, O.ABORTED, O.ABORTED, FIRST, is_aborted=True
    ),
)
