"""Identical calls share one upstream call, and none of them can spoil it for the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest

from filters.cache import Cache
from filters.cost import CallCost
from filters.stores import flights
from filters.token_counter import TokenCounter
from sidecar.api import (
    CACHED,
    USAGE,
    Attempt,
    Call,
    CallFilter,
    CallNext,
    FilterConfig,
    Outcome,
    Phase,
    Reply,
    Usage,
)
from sidecar.call import deadline_exceeded
from tests.filters.test_cache import (
    ANSWER,
    DONE,
    EVENTS,
    TOOK,
    USAGE_EVENT,
    ask,
    asking,
    caching,
    word,
)
from tests.support.harness import MODEL, PATIENCE_S, Harness, Run, Use, broken

WHOLE = b"".join([*EVENTS, DONE])


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    async with caching() as harness:
        yield harness


def held(harness: Harness) -> asyncio.Event:
    """Let the upstream answer once this is set."""
    go = asyncio.Event()

    async def answer(attempt: Attempt) -> Reply:
        await go.wait()
        return Reply.of(200, ANSWER)

    harness.upstream.answer = answer
    return go


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def streaming(harness: Harness, count: int, **fields: Any) -> list[Run]:
    return [harness.start(asking(harness, stream=True, **fields)) for _ in range(count)]


async def begin(harness: Harness, count: int, first: bytes = EVENTS[0]) -> list[Run]:
    """So many calls on one stream that has begun."""
    harness.upstream.answer = harness.upstream.stream(first)
    runs = streaming(harness, count)
    for run in runs:
        await run.begun()
    return runs


async def test_identical_calls_make_one_upstream_call_and_all_get_the_whole_answer(
    harness: Harness,
) -> None:
    go = held(harness)
    runs = [harness.start(asking(harness)) for _ in range(1000)]
    await turns()
    go.set()
    for run in runs:
        await run.ended()
    assert len(harness.upstream.sent) == 1
    assert {run.client.data for run in runs} == {ANSWER}
    assert [word(run) for run in runs] == ["miss"] + ["join"] * 999


async def test_one_of_them_pays(harness: Harness) -> None:
    go = held(harness)
    runs = [harness.start(asking(harness)) for _ in range(5)]
    await turns()
    go.set()
    for run in runs:
        await run.ended()
    assert [run.call.attempts for run in runs] == [1, 0, 0, 0, 0]
    assert [run.call.get(CACHED) for run in runs] == [None, *["join"] * 4]
    assert {run.call[USAGE] for run in runs} == {TOOK}


async def test_followers_join_the_live_stream_from_its_first_byte(harness: Harness) -> None:
    (first,) = await begin(harness, 1)
    harness.upstream.source.feed(EVENTS[1])
    (late,) = streaming(harness, 1)
    await late.begun()
    await turns()
    assert late.client.data == first.client.data == EVENTS[0] + EVENTS[1]
    harness.upstream.source.feed(EVENTS[2])
    assert late.client.data == first.client.data
    harness.upstream.source.feed(USAGE_EVENT, DONE)
    harness.upstream.source.finish()
    await first.ended()
    await late.ended()
    assert late.client.data == first.client.data == WHOLE
    assert len(harness.upstream.sent) == 1
    assert (word(first), word(late)) == ("miss", "join")
    assert first.call[USAGE] == late.call[USAGE] == TOOK
    assert (CACHED in first.call, late.call[CACHED]) == (False, "join")


async def test_leader_that_leaves_mid_stream_does_not_cut_the_followers(harness: Harness) -> None:
    leader, follower = await begin(harness, 2)
    leader.client_leaves()
    await leader.ended()
    assert not harness.upstream.source.is_aborted
    harness.upstream.source.feed(*EVENTS[1:], USAGE_EVENT, DONE)
    harness.upstream.source.finish()
    assert (await follower.ended()).outcome is Outcome.COMPLETED
    assert follower.client.data == WHOLE
    assert word(await ask(harness, stream=True)) == "hit"


async def test_next_one_pays_when_the_leader_leaves(harness: Harness) -> None:
    leader, second, third = await begin(harness, 3)
    leader.client_leaves()
    await leader.ended()
    harness.upstream.source.feed(*EVENTS[1:], USAGE_EVENT, DONE)
    harness.upstream.source.finish()
    await second.ended()
    await third.ended()
    assert [run.call.attempts for run in (leader, second, third)] == [0, 1, 0]
    assert [run.call.get(CACHED) for run in (leader, second, third)] == ["join", None, "join"]
    assert second.call[USAGE] == TOOK


async def test_leader_that_leaves_before_the_first_byte_does_not_cut_the_followers(
    harness: Harness,
) -> None:
    go = held(harness)
    leader, follower = harness.start(asking(harness)), harness.start(asking(harness))
    await turns()
    leader.client_leaves()
    await leader.ended()
    go.set()
    await follower.ended()
    assert follower.client.data == ANSWER
    assert (leader.call.attempts, follower.call.attempts) == (0, 1)
    assert (leader.call[CACHED], CACHED in follower.call) == ("join", False)


async def test_upstream_is_left_with_the_last_of_them(harness: Harness) -> None:
    runs = await begin(harness, 3)
    source = harness.upstream.source
    for run in runs:
        assert not source.is_aborted
        run.client_leaves()
        await run.ended()
    assert source.is_aborted
    assert [run.call.get(CACHED) for run in runs] == ["join", "join", None]
    assert [run.call.attempts for run in runs] == [0, 0, 1]
    assert runs[2].call[USAGE].is_estimated
    await harness.settled()
    (again,) = await begin(harness, 1)
    assert word(again) == "miss"
    again.client_leaves()
    await again.ended()


async def test_upstream_is_left_when_all_leave_before_it_answers(harness: Harness) -> None:
    harness.upstream.answer = harness.upstream.silent()
    runs = [harness.start(asking(harness)) for _ in range(2)]
    await turns()
    for run in runs:
        run.client_leaves()
        await run.ended()
    await harness.settled()
    assert [run.call.attempts for run in runs] == [0, 1]
    assert runs[1].call[USAGE].is_estimated  # its provider may have read the prompt


async def test_failure_reaches_all_of_them_and_is_asked_for_once(harness: Harness) -> None:
    harness.upstream.answer = harness.upstream.failing(broken(Phase.HEAD))
    runs = [harness.start(asking(harness)) for _ in range(3)]
    for run in runs:
        assert (await run.ended()).outcome is Outcome.UPSTREAM_FAILED
    assert len(harness.upstream.sent) == 1
    assert [run.call.attempts for run in runs] == [1, 0, 0]


async def test_stream_that_breaks_off_breaks_off_for_all(harness: Harness) -> None:
    runs = await begin(harness, 3)
    harness.upstream.source.feed(EVENTS[1])
    harness.upstream.source.fail()
    for run in runs:
        assert (await run.ended()).outcome is Outcome.UPSTREAM_FAILED
        assert run.client.data == EVENTS[0] + EVENTS[1]
        assert not run.client.is_complete
    assert [CACHED in run.call for run in runs] == [False, True, True]


async def test_deadline_of_the_first_is_not_the_others(harness: Harness) -> None:
    asked = 0

    async def answer(attempt: Attempt) -> Reply:
        nonlocal asked
        asked += 1
        if asked > 1:
            return Reply.of(200, ANSWER)
        async with asyncio.timeout(PATIENCE_S):
            while attempt.call.time_left(harness.clock.monotonic()) > 0:  # noqa: ASYNC110 - the clock is turned
                await asyncio.sleep(0)
        raise deadline_exceeded()

    harness.upstream.answer = answer
    hurried = harness.start(asking(harness, headers={"x-request-timeout": "5"}))
    await turns()
    patient = harness.start(asking(harness, headers={"x-request-timeout": "50"}))
    await turns()
    harness.clock.turn(6)
    await turns()
    assert asked == 1  # it goes on for the one that has more time
    harness.clock.turn(45)
    hurried.client_leaves()
    await hurried.ended()
    assert (await patient.ended()).status == 504


async def test_one_with_more_time_asks_again_when_the_first_one_s_is_over(
    harness: Harness,
) -> None:
    asked = 0

    async def answer(attempt: Attempt) -> Reply:
        nonlocal asked
        asked += 1
        if asked > 1:
            return Reply.of(200, ANSWER)
        await asyncio.sleep(0.01)
        raise deadline_exceeded()  # of a timer that was set before the other one came

    harness.upstream.answer = answer
    hurried = harness.start(asking(harness, headers={"x-request-timeout": "5"}))
    await turns()
    patient = harness.start(asking(harness))
    await turns()
    harness.clock.turn(5)
    assert (await hurried.ended()).status == 504
    await patient.ended()
    assert (patient.client.status, asked) == (200, 2)


async def test_deadline_of_a_follower_ends_only_its_own_wait(harness: Harness) -> None:
    go = held(harness)
    patient = harness.start(asking(harness))
    await turns()
    hurried = harness.start(asking(harness, headers={"x-request-timeout": "0.05"}))
    assert (await hurried.ended()).outcome is Outcome.REJECTED
    assert hurried.client.status == 504
    go.set()
    await patient.ended()
    assert patient.client.data == ANSWER


async def test_stream_and_whole_answer_are_asked_for_each(harness: Harness) -> None:
    go = held(harness)
    whole = harness.start(asking(harness))
    streamed = harness.start(asking(harness, stream=True))
    await turns()
    assert len(harness.upstream.sent) == 2
    go.set()
    await whole.ended()
    await streamed.ended()
    assert (word(whole), word(streamed)) == ("miss", "miss")


async def test_calls_do_not_share_if_told() -> None:
    async with caching(single_flight=False) as harness:
        go = held(harness)
        runs = [harness.start(asking(harness)) for _ in range(3)]
        await turns()
        assert len(harness.upstream.sent) == 3
        go.set()
        for run in runs:
            await run.ended()


async def test_slow_reader_does_not_hold_up_the_others(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = await begin(harness, 2)
    body = slow._body
    assert body is not None
    body.pause()
    harness.upstream.source.feed(*EVENTS[1:])
    assert fast.client.data == b"".join(EVENTS)
    assert slow.client.data == EVENTS[0]
    assert not harness.upstream.source.is_paused
    harness.upstream.source.feed(USAGE_EVENT, DONE)
    harness.upstream.source.finish()
    await fast.ended()
    assert slow.call.end is None
    body.resume()
    await slow.ended()
    assert slow.client.data == fast.client.data == WHOLE
    assert slow.client.is_complete


async def test_upstream_waits_when_all_of_them_read_slowly(harness: Harness) -> None:
    runs = await begin(harness, 2)
    source = harness.upstream.source
    bodies = [run._body for run in runs]
    for body in bodies:
        assert body is not None
        assert not source.is_paused
        body.pause()
    assert source.is_paused
    assert bodies[1] is not None
    bodies[1].resume()
    assert not source.is_paused
    runs[1].client_leaves()  # the one that reads
    await runs[1].ended()
    assert source.is_paused
    runs[0].client_leaves()
    await runs[0].ended()


async def test_reader_that_is_too_slow_is_cut_off_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flights, "SLACK_BYTES", 0)
    async with caching(max_entry_bytes=2000) as harness:
        slow, fast = await begin(harness, 2)
        assert slow._body is not None
        slow._body.pause()
        for _ in range(20):
            harness.upstream.source.feed(EVENTS[1])
        end = await slow.ended()
        assert end.outcome is Outcome.ABORTED
        assert slow.client.error is not None
        assert slow.client.error.code == "slow_reader"
        harness.upstream.source.feed(DONE)
        harness.upstream.source.finish()
        assert (await fast.ended()).outcome is Outcome.COMPLETED
        assert fast.client.data.count(EVENTS[1]) == 20
        assert (CACHED in slow.call, CACHED in fast.call) == (True, False)


async def test_payer_that_leaves_with_its_last_bytes_unread_pays_what_was_reported(
    harness: Harness,
) -> None:
    (run,) = await begin(harness, 1)
    assert run._body is not None
    run._body.pause()
    harness.upstream.source.feed(*EVENTS[1:], USAGE_EVENT, DONE)
    harness.upstream.source.finish()
    run.client_leaves()
    await run.ended()
    assert run.call[USAGE] == TOOK
    assert run.call.attempts == 1


async def test_payer_that_leaves_before_it_took_anything_of_a_stream_that_is_over_pays_it(
    harness: Harness,
) -> None:
    harness.upstream.answer = harness.upstream.stream(EVENTS[0])
    runs = streaming(harness, 2)
    while not harness.upstream.source.asked:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0)
    harness.upstream.source.feed(*EVENTS[1:], USAGE_EVENT, DONE)
    harness.upstream.source.finish()
    for run in runs:
        run.client_leaves()
    for run in runs:
        await run.ended()
    assert [run.call.attempts for run in runs] == [1, 0]
    assert runs[0].call[USAGE] == TOOK
    assert [run.call.get(CACHED) for run in runs] == [None, "join"]


async def test_refusal_that_is_shared_is_no_cached_answer(harness: Harness) -> None:
    harness.upstream.answer = harness.upstream.whole(b'{"error":{}}', status=503)
    runs = [harness.start(asking(harness)) for _ in range(3)]
    for run in runs:
        await run.ended()
        assert run.client.status == 503
    assert [CACHED in run.call for run in runs] == [False] * 3
    assert [run.call.attempts for run in runs] == [1, 0, 0]


async def test_hit_of_an_answer_without_usage_is_counted(harness: Harness) -> None:
    bare = b'{"choices":[{"message":{"content":"Fine, thanks, and you?"}}]}'
    harness.upstream.answer = harness.upstream.whole(bare)
    first, second = await ask(harness), await ask(harness)
    assert (word(second), second.call[USAGE]) == ("hit", first.call[USAGE])
    assert second.call[USAGE].is_estimated


async def test_answer_longer_than_may_be_kept_is_not_joined_any_more() -> None:
    async with caching(max_entry_bytes=1500) as harness:
        (first,) = await begin(harness, 1)
        harness.upstream.source.feed(*[EVENTS[1]] * 20)
        source = harness.upstream.source
        (late,) = streaming(harness, 1)
        await late.begun()
        assert len(harness.upstream.sent) == 2
        source.feed(DONE)
        source.finish()
        await first.ended()
        assert first.client.data.count(EVENTS[1]) == 20
        late.client_leaves()
        await late.ended()


async def test_all_recordings_together_are_bounded() -> None:
    async with caching(max_bytes=3000, max_entry_bytes=3000) as harness:
        (one,) = await begin(harness, 1)
        source = harness.upstream.source
        source.feed(*[EVENTS[1]] * 9)
        harness.upstream.answer = harness.upstream.stream(EVENTS[0])
        other = harness.start(asking(harness, "Another", stream=True))
        await other.begun()
        harness.upstream.source.feed(*[EVENTS[1]] * 9, DONE)
        harness.upstream.source.finish()
        await other.ended()
        source.feed(DONE)
        source.finish()
        await one.ended()
        assert other.client.data.count(EVENTS[1]) == 9
        cache = next(each for each in harness.filters if isinstance(each, Cache))
        assert cache._room.left == 3000


async def test_nothing_is_left_when_all_is_over(harness: Harness) -> None:
    runs = await begin(harness, 2)
    harness.upstream.source.feed(*EVENTS[1:], DONE)
    harness.upstream.source.finish()
    for run in runs:
        await run.ended()
    await harness.settled()
    cache = next(each for each in harness.filters if isinstance(each, Cache))
    counter = next(each for each in harness.filters if isinstance(each, TokenCounter))
    assert cache._flights == {}
    assert cache._room.left == cache.config.max_bytes
    assert counter._kept.bytes == 0


async def test_usage_is_on_the_shared_call_for_those_inside(harness: Harness) -> None:
    seen: list[Usage | None] = []
    answer = harness.upstream.whole(ANSWER)

    async def watched(attempt: Attempt) -> Reply:
        call: Call = attempt.call
        attempt.on_end(lambda end: seen.append(call.get(USAGE)))
        return await answer(attempt)

    harness.upstream.answer = watched
    await ask(harness)
    assert seen == [TOOK]


async def test_refusal_is_shared_only_by_the_very_same_requests(harness: Harness) -> None:
    async def answer(attempt: Attempt) -> Reply:
        await turns()
        is_bad = b"metadata" in attempt.body
        return Reply.of(400 if is_bad else 200, b'{"error":{}}' if is_bad else ANSWER)

    harness.upstream.answer = answer
    bad = [harness.start(asking(harness, metadata={"x": 1})) for _ in range(2)]
    good = [harness.start(asking(harness)) for _ in range(2)]
    for run in (*bad, *good):
        await run.ended()
    assert [run.client.status for run in bad] == [400, 400]
    assert [run.client.status for run in good] == [200, 200]
    assert len(harness.upstream.sent) == 2


class Broken(CallFilter):
    """Fails in one way or another with the reply in its hands."""

    class Config(FilterConfig):
        how: str

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)
        if self.config.how == "raise":
            raise LookupError
        reply.body.map(Raising())
        return reply


class Raising:
    def feed(self, data: bytes) -> bytes:
        raise LookupError

    def finish(self) -> bytes:
        return b""


@pytest.mark.parametrize("how", ["raise", "map"])
async def test_filter_that_fails_behind_leaves_nobody_waiting_and_nothing_open(how: str) -> None:
    async with Harness(TokenCounter, Cache, Use(Broken, {"how": how})) as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        runs = [harness.start(asking(harness)) for _ in range(2)]
        for run in runs:
            assert (await run.ended()).outcome is Outcome.ABORTED
        harness.upstream.answer = harness.upstream.stream(EVENTS[0])
        stream = harness.start(asking(harness, stream=True))
        await stream.ended()
        assert stream.client.status == 500 or stream.client.error is not None
        if how == "raise":
            assert harness.upstream.source.is_aborted
        await harness.settled()


async def test_answer_that_comes_in_pieces_tells_each_of_them_what_it_cost() -> None:
    prices = {MODEL: {"input": 1, "output": 1}}
    uses = Use(CallCost, {"prices": prices}), TokenCounter, Cache
    async with Harness(*uses) as harness:
        upstream = harness.upstream
        upstream.answer = upstream.stream(ANSWER[:20], media_type="application/json")
        runs = [harness.start(asking(harness)) for _ in range(3)]
        await upstream.asked.wait()
        await turns()
        upstream.source.finish(ANSWER[20:])
        for run in runs:
            await run.ended()
        paid = str(Decimal(TOOK.input + TOOK.output) / 1_000_000)
        assert [run.client.headers["x-sidecar-cost"] for run in runs] == [paid, "0", "0"]
        assert [run.client.data for run in runs] == [ANSWER] * 3


async def test_headers_for_the_payer_alone_do_not_reach_the_others(harness: Harness) -> None:
    async def answer(attempt: Attempt) -> Reply:
        await turns()
        reply = Reply.of(200, ANSWER)
        reply.headers["set-cookie"] = "session=payer"
        reply.headers["x-ratelimit-remaining-requests"] = "3"
        return reply

    harness.upstream.answer = answer
    payer, other = (harness.start(asking(harness)) for _ in range(2))
    await payer.ended()
    await other.ended()
    assert payer.client.headers["set-cookie"] == "session=payer"
    assert {"set-cookie", "x-ratelimit-remaining-requests"}.isdisjoint(other.client.headers)


async def test_purge_reaches_what_is_under_way(harness: Harness) -> None:
    go = held(harness)
    run = harness.start(asking(harness))
    await turns()
    await harness.resources.of_kind("panel")["cache"].act({"purge": "all"})
    go.set()
    await run.ended()
    assert word(await ask(harness)) == "miss"


async def test_call_that_asks_again_is_counted_once(harness: Harness) -> None:
    async def answer(attempt: Attempt) -> Reply:
        await turns()
        return Reply.of(400 if b"metadata" in attempt.body else 200, ANSWER)

    harness.upstream.answer = answer
    runs = [harness.start(asking(harness, **each)) for each in ({"metadata": {"x": 1}}, {})]
    for run in runs:
        await run.ended()
    counts = [
        harness.value("llm_sidecar_cache", team="tests", result=word)
        for word in ("hit", "miss", "join", "bypass")
    ]
    assert counts == [0, 1, 1, 0]


async def test_refusal_reaches_nobody_whose_request_was_another_when_the_first_one_has_left(
    harness: Harness,
) -> None:
    async def answer(attempt: Attempt) -> Reply:
        await turns()
        is_bad = b"metadata" in attempt.body
        return Reply.of(400 if is_bad else 200, b'{"error":{}}' if is_bad else ANSWER)

    harness.upstream.answer = answer
    bad = harness.start(asking(harness, metadata={"x": 1}))
    good = harness.start(asking(harness))
    await turns(2)
    bad.client_leaves()
    await bad.ended()
    await good.ended()
    assert (good.client.status, good.client.data) == (200, ANSWER)
    await harness.settled()
    cache = next(each for each in harness.filters if isinstance(each, Cache))
    assert cache._flights == {}
