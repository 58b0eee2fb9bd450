"""Chains: what runs around what, and which orders do not load."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.api import (
    USAGE,
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallFilter,
    CallNext,
    Filter,
    Key,
    Reply,
)
from sidecar.chain import check_order, link_attempt, link_call
from tests.support.harness import Harness

COST: Key[float] = Key("cost")


class Plain(CallFilter):
    pass


class PlainAttempt(AttemptFilter):
    pass


class GivesUsage(CallFilter):
    gives = frozenset({USAGE})


class NeedsUsage(CallFilter):
    needs = frozenset({USAGE})


class NeedsBoth(CallFilter):
    needs = frozenset({USAGE, COST})


class ReadsUsage(CallFilter):
    reads = frozenset({USAGE})


class AttemptReadsBoth(AttemptFilter):
    reads = frozenset({USAGE, COST})


class GivesAndReadsCost(CallFilter):
    gives = frozenset({COST})
    reads = frozenset({COST})


class AttemptGivesCost(AttemptFilter):
    gives = frozenset({COST})


class AttemptNeedsUsage(AttemptFilter):
    needs = frozenset({USAGE})


class AttemptNeedsCost(AttemptFilter):
    needs = frozenset({COST})


class Last(AttemptFilter):
    must_be_last = True


class CallLast(CallFilter):
    must_be_last = True


def recorder(kind: type[Filter], name: str, seen: list[str]) -> type[Filter]:
    class Records(kind):  # type: ignore[misc,valid-type]
        async def handle(self, subject: object, call_next: object) -> Reply:
            seen.append(f"{name} in")
            reply: Reply = await call_next(subject)  # type: ignore[operator]
            seen.append(f"{name} out")
            return reply

    return Records


async def test_call_filters_stand_around_attempt_filters_each_in_their_order() -> None:
    seen: list[str] = []
    names = [(AttemptFilter, "c"), (CallFilter, "a"), (CallFilter, "b"), (AttemptFilter, "d")]
    async with Harness(*(recorder(kind, name, seen) for kind, name in names)) as harness:
        await harness.run()
    order = "abcd"
    assert seen == [f"{each} in" for each in order] + [f"{each} out" for each in reversed(order)]


@pytest.mark.parametrize("kind", [CallFilter, AttemptFilter])
async def test_calls_go_past_a_filter_that_has_nothing_to_do(kind: type[Filter]) -> None:
    seen: list[str] = []

    class Idle(recorder(kind, "idle", seen)):  # type: ignore[misc]
        is_idle = True

    async with Harness(Idle, recorder(kind, "busy", seen)) as harness:
        await harness.run()
    assert seen == ["busy in", "busy out"]


async def test_chain_of_nobody_is_its_end() -> None:
    reply = Reply.of(200, b"")

    async def last(subject: object) -> Reply:
        return reply

    assert link_call([], last) is last
    assert link_attempt([], last) is last


async def test_filter_may_call_what_is_behind_it_several_times() -> None:
    seen: list[str] = []

    class Twice(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            (await call_next(call)).discard()
            return await call_next(call)

    async with Harness(Twice, recorder(CallFilter, "inner", seen)) as harness:
        run = await harness.run()
    assert run.call.attempts == 2
    assert seen.count("inner in") == 2


async def test_filter_may_answer_without_what_is_behind_it() -> None:
    class Answers(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            return Reply.of(200, b'{"here": 1}')

    async with Harness(Answers) as harness:
        run = await harness.run()
    assert run.client.data == b'{"here": 1}'
    assert harness.upstream.sent == []
    assert run.call.attempts == 0


async def test_attempt_filter_may_answer_instead_of_the_upstream() -> None:
    class Answers(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            return Reply.of(503, b"{}")

    async with Harness(Answers) as harness:
        run = await harness.run()
    assert run.client.status == 503
    assert harness.upstream.sent == []


async def test_base_filter_handles_nothing() -> None:
    for base in (Plain, PlainAttempt):
        with pytest.raises(NotImplementedError):
            await base(None, None).handle(None, None)  # type: ignore[arg-type]


ORDERS: list[tuple[list[type[Filter]], list[type[Filter]], list[tuple[str, int, str]]]] = [
    ([], [], []),
    ([Plain, GivesUsage, NeedsUsage], [AttemptNeedsUsage, Last], []),
    (
        [NeedsUsage, GivesUsage],
        [],
        [("call", 0, "needs usage: put a filter that gives it before it")],
    ),
    (
        [Plain, NeedsBoth],
        [],
        [
            ("call", 1, "needs cost: put a filter that gives it before it"),
            ("call", 1, "needs usage: put a filter that gives it before it"),
        ],
    ),
    (
        [Plain],
        [AttemptNeedsUsage],
        [("attempt", 0, "needs usage: put a filter that gives it before it")],
    ),
    ([], [AttemptGivesCost, AttemptNeedsCost], []),
    (
        [],
        [AttemptNeedsCost, AttemptGivesCost],
        [("attempt", 0, "needs cost: put a filter that gives it before it")],
    ),
    ([PlainAttempt], [], [("call", 0, "is an attempt filter: move it to the list `attempt`")]),
    ([], [Plain], [("attempt", 0, "is a call filter: move it to the list `call`")]),
    (
        [],
        [Last, PlainAttempt],
        [("attempt", 0, "must be the last of the list `attempt`: move it there")],
    ),
    # Reads: by the end of the call, wherever the giver stands.
    ([ReadsUsage, GivesUsage], [], []),
    ([GivesUsage, ReadsUsage], [], []),
    ([GivesUsage], [AttemptReadsBoth, AttemptGivesCost], []),
    ([GivesAndReadsCost], [], []),
    (
        [ReadsUsage],
        [AttemptGivesCost],
        [("call", 0, "reads usage: put a filter that gives it into the chain")],
    ),
    (
        [NeedsUsage],
        [AttemptReadsBoth],
        [
            ("call", 0, "needs usage: put a filter that gives it before it"),
            ("attempt", 0, "reads cost: put a filter that gives it into the chain"),
            ("attempt", 0, "reads usage: put a filter that gives it into the chain"),
        ],
    ),
    (
        [CallLast, Plain],
        [Last],
        [("call", 0, "must be the last of the list `call`: move it there")],
    ),
    (
        [NeedsUsage, PlainAttempt],
        [Last, PlainAttempt],
        [
            ("call", 0, "needs usage: put a filter that gives it before it"),
            ("call", 1, "is an attempt filter: move it to the list `attempt`"),
            ("attempt", 0, "must be the last of the list `attempt`: move it there"),
        ],
    ),
]


@pytest.mark.parametrize(("call", "attempt", "mistakes"), ORDERS)
def test_order_is_checked_and_every_mistake_named(
    call: list[type[Filter]],
    attempt: list[type[Filter]],
    mistakes: list[tuple[str, int, str]],
) -> None:
    assert check_order(call, attempt) == mistakes


def test_a_filter_that_gives_what_is_missing_is_named() -> None:
    def giver_of(key: Key[Any]) -> tuple[str, str] | None:
        return {USAGE: ("counter", "call"), COST: ("cost", "attempt")}.get(key)

    assert check_order([ReadsUsage], [AttemptNeedsCost], giver_of) == [
        ("call", 0, "reads usage: add counter, which gives it, to the list `call`"),
        ("attempt", 0, "needs cost: put cost before it"),
    ]


async def test_chain_adds_no_coroutine_of_its_own() -> None:
    """What a filter awaits is the next filter's own coroutine."""
    awaited: list[str] = []

    class Looks(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            coroutine = call_next(call)
            awaited.append(getattr(coroutine, "__qualname__", ""))
            return await coroutine

    class Named(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            return await call_next(call)

    async with Harness(Looks, Named) as harness:
        await harness.run()
    assert awaited[0].endswith("Named.handle")
