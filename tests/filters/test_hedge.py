"""When a second attempt is made, whose answer counts, and that the other one ends at once."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from filters.algo.estimate import estimate_input
from filters.hedge import Hedge
from sidecar.api import (
    LOST_USAGE,
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallError,
    CallFilter,
    CallNext,
    End,
    Headers,
    Outcome,
    Phase,
    Reply,
    Usage,
)
from sidecar.dialects.endpoint import OTHER
from tests.contract.scenarios import FIRST, SCENARIOS, Journal, Scenario
from tests.contract.test_ends import no_collector
from tests.support.harness import MODEL, Harness, Run, ScriptedSource, Use, broken

__all__ = ["no_collector"]

EAGER = {"min_samples": 1, "min_delay_s": 0.0, "max_extra_share": 1.0}
SLOW_S = 0.5
"""What the taught calls took."""


class AttemptEnds(AttemptFilter):
    """Notes how attempts ended, and whether their call had ended before."""

    def __init__(self, config: Any, kit: Any) -> None:
        super().__init__(config, kit)
        self.ends: dict[int, Outcome] = {}
        self.came_late = False

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        call, number = attempt.call, attempt.number

        def note(end: End) -> None:
            assert number not in self.ends
            self.ends[number] = end.outcome
            self.came_late |= call.end is not None and end.outcome is Outcome.DISCARDED

        attempt.on_end(note)
        return await call_next(attempt)


class Try:
    """One attempt that reached the upstream, and waits for what the test says."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.source = ScriptedSource()
        self.is_cancelled = False

    def answer(self, status: int = 200, data: bytes = b'{"ok": true}') -> None:
        self.answered.set_result(Reply.of(status, data))

    def stream(self, status: int = 200) -> None:
        """Head and first event; the stream goes on."""
        self.source.feed(FIRST)
        headers = Headers({"content-type": "text/event-stream"})
        self.answered.set_result(Reply(status, headers, self.source.body))

    def fail(self, error: Exception | None = None) -> None:
        self.answered.set_exception(error or broken(Phase.CONNECT))


class Scene:
    """A hedge in front of an upstream whose answers the test gives, one by one."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.clock = harness.clock
        self.tries: list[Try] = []
        harness.upstream.answer = self._answer

    async def _answer(self, attempt: Attempt) -> Reply:
        this = Try()
        self.tries.append(this)
        try:
            return await this.answered
        except asyncio.CancelledError:
            this.is_cancelled = True
            raise

    async def begin(self, call: Call | None = None) -> Run:
        """A call whose first attempt has reached the upstream."""
        self.tries.clear()
        self._seen.ends.clear()
        run = self.harness.start(call)
        await turns()
        assert len(self.tries) == 1
        return run

    async def pass_time(self, seconds: float) -> None:
        self.clock.turn(seconds)
        await turns()

    async def late(self, call: Call | None = None) -> tuple[Run, Try, Try]:
        """A call that is being hedged, and its two tries."""
        run = await self.begin(call)
        await self.pass_time(1.0)
        first, second = self.tries
        return run, first, second

    async def teach(self, *times_s: float, status: int = 200, **call: Any) -> None:
        """Calls that took so long."""
        for each in times_s:
            run = await self.begin(self.harness.call(**call) if call else None)
            await self.pass_time(each)
            self.tries[0].answer(status)
            await run.ended()

    def hedges(self, result: str) -> float:
        labels = {"upstream": "fake", "result": result}
        return float(self.harness.value("llm_sidecar_hedges", **labels))

    @property
    def ends(self) -> dict[int, Outcome]:
        """How the last call's attempts ended, by their number."""
        assert not self._seen.came_late
        return self._seen.ends

    @property
    def _seen(self) -> AttemptEnds:
        (seen,) = (each for each in self.harness.filters if isinstance(each, AttemptEnds))
        return seen

    async def nothing_left(self) -> None:
        assert len(self.harness.tasks) == 0
        assert self.clock._timers == []


async def turns() -> None:
    """Let everybody run who can."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def scene(*outside: type[CallFilter], **settings: Any) -> AsyncIterator[Scene]:
    """Hedges at once when the first byte is later than `SLOW_S`, or by `settings`."""
    use = Use(Hedge, {**EAGER, **settings})
    async with Harness(*outside, use, AttemptEnds) as harness:
        at = Scene(harness)
        await at.teach(SLOW_S)
        yield at
        await at.nothing_left()


# When


async def test_nobody_is_asked_twice_before_enough_was_learned() -> None:
    async with scene(min_samples=3) as at:
        run = await at.begin()
        await at.pass_time(1000.0)
        assert len(at.tries) == 1
        run.client_leaves()  # teaches nothing
        await run.ended()
        await at.teach(0.4, 0.4)
        run, first, _ = await at.late()
        first.answer()
        await run.ended()


async def test_second_attempt_starts_at_the_learned_quantile() -> None:
    async with scene(quantile=0.9, min_samples=20) as at:
        await at.teach(*([0.1] * 17), 2.0, 7.0, 8.0)  # 21 with the first: nine in ten took <= 2.0
        run = await at.begin()
        await at.pass_time(1.99)
        assert len(at.tries) == 1
        await at.pass_time(0.01)
        assert len(at.tries) == 2
        at.tries[0].answer()
        await run.ended()


async def test_second_attempt_never_starts_earlier_than_the_least_delay() -> None:
    async with scene(min_delay_s=2.0) as at:
        run = await at.begin()
        await at.pass_time(1.99)
        assert len(at.tries) == 1
        await at.pass_time(0.01)
        assert len(at.tries) == 2
        at.tries[0].answer()
        await run.ended()


async def test_call_that_is_answered_in_time_is_asked_once() -> None:
    async with scene() as at:
        run = await at.begin()
        await at.pass_time(0.4)
        at.tries[0].answer()
        assert (await run.ended()).outcome is Outcome.COMPLETED
        await at.pass_time(10.0)
        assert len(at.tries) == 1
        assert LOST_USAGE not in run.call


async def test_models_and_streams_are_learned_apart() -> None:
    async with scene() as at:
        for body in ({"model": "other"}, {"model": MODEL, "stream": True}):
            run = await at.begin(at.harness.call(body))
            await at.pass_time(1000.0)
            assert len(at.tries) == 1
            at.tries[0].answer()
            await run.ended()


async def test_bad_answers_teach_nothing() -> None:
    async with scene(min_samples=2) as at:
        await at.teach(0.1, 0.1, status=500)
        await at.teach(0.1, status=429)
        run = await at.begin()
        await at.pass_time(1000.0)
        assert len(at.tries) == 1
        at.tries[0].answer()
        await run.ended()


async def test_first_attempts_that_were_given_up_count_as_slow() -> None:
    """Or the quantile would sink below what calls really take, and everything be hedged."""
    async with scene(quantile=0.5) as at:
        for _ in range(3):
            run, _, second = await at.late()
            await at.pass_time(0.1)
            second.answer()
            await run.ended()
        (lane,) = at.harness.filters[0]._lanes.values()  # type: ignore[attr-defined]
        assert lane.times.at(1.0) == pytest.approx(1.1)
        assert lane.times.at(0.5) == SLOW_S
        assert len(lane.times) == 7


async def test_never_more_second_attempts_than_the_share_of_calls() -> None:
    async with scene(max_extra_share=0.1) as at:
        extra = 0
        for calls in range(2, 100):
            run = await at.begin()
            await at.pass_time(1000.0)
            extra += len(at.tries) - 1
            assert extra <= 0.1 * calls
            at.tries[0].answer()
            await run.ended()
        assert extra == 9


async def test_a_body_that_streams_is_sent_once() -> None:
    class Body:
        async def readany(self) -> bytes:
            return b""

        async def hold(self) -> bytes:
            return b""

    async with scene() as at:
        call = at.harness.call()
        call.body, call.upload = None, Body()
        run = await at.begin(call)
        await at.pass_time(1000.0)
        assert len(at.tries) == 1
        at.tries[0].answer()
        await run.ended()


async def test_what_names_no_model_is_asked_once() -> None:
    async with scene() as at:
        for _ in range(2):
            run = await at.begin(at.harness.call(path="/fake/batches"))
            await at.pass_time(1000.0)
            assert len(at.tries) == 1
            at.tries[0].answer()
            await run.ended()
        listing = await at.harness.run(at.harness.call(method="GET", path="/v1/models", body=b""))
        assert listing.client.status == 200


@pytest.mark.parametrize(("timeout_s", "tries"), [("0.9", 1), ("1.1", 2)])
async def test_nobody_is_asked_again_when_the_deadline_leaves_no_time(
    timeout_s: str, tries: int
) -> None:
    async with scene() as at:  # half a second until it is late, and half for the second
        call = at.harness.call(headers=[("x-request-timeout", timeout_s)])
        run = await at.begin(call)
        await at.pass_time(0.6)
        assert len(at.tries) == tries
        at.tries[0].answer()
        await run.ended()


# Whose answer


async def test_second_answer_wins_when_it_comes_first() -> None:
    async with scene() as at:
        run, first, second = await at.late()
        second.answer(200, b'{"second": 1}')
        await run.ended()
        assert run.client.data == b'{"second": 1}'
        assert first.is_cancelled
        assert at.ends == {1: Outcome.DISCARDED, 2: Outcome.COMPLETED}
        assert at.hedges("won") == 1


async def test_first_answer_wins_when_it_comes_first() -> None:
    async with scene() as at:
        run, first, second = await at.late()
        first.answer(404, b'{"first": 1}')  # the caller's mistake: no other answer would do better
        await run.ended()
        assert run.client.data == b'{"first": 1}'
        assert second.is_cancelled
        assert at.ends == {1: Outcome.COMPLETED, 2: Outcome.DISCARDED}
        assert at.hedges("lost") == 1


async def test_a_stream_that_wins_flows_on() -> None:
    async with scene() as at:
        run, first, second = await at.late()
        second.stream()
        await run.begun()
        assert first.is_cancelled
        second.source.feed(FIRST)
        second.source.finish()
        await run.ended()
        assert run.client.data == FIRST * 2
        assert at.ends == {1: Outcome.DISCARDED, 2: Outcome.COMPLETED}


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_bad_answer_waits_for_the_other(status: int) -> None:
    async with scene() as at:
        run, first, second = await at.late()
        first.stream(status)
        await turns()
        assert not second.is_cancelled
        second.answer()
        await run.ended()
        assert run.client.status == 200
        assert first.source.is_aborted
        assert at.ends == {1: Outcome.DISCARDED, 2: Outcome.COMPLETED}
        assert at.hedges("won") == 1


async def test_a_failed_second_attempt_does_not_end_the_first() -> None:
    async with scene() as at:
        run, first, second = await at.late()
        second.fail()
        await turns()
        assert not first.is_cancelled
        first.answer()
        await run.ended()
        assert run.client.status == 200
        assert at.ends == {1: Outcome.COMPLETED, 2: Outcome.UPSTREAM_FAILED}
        assert at.hedges("lost") == 1


@pytest.mark.parametrize("is_first_earlier", [True, False])
async def test_of_two_bad_answers_the_firsts_counts(is_first_earlier: bool) -> None:
    async with scene() as at:
        run, first, second = await at.late()
        if is_first_earlier:
            first.answer(503, b'{"first": 1}')
            await turns()
            second.answer(500, b'{"second": 1}')
        else:
            second.fail()
            await turns()
            first.answer(503, b'{"first": 1}')
        await run.ended()
        assert (run.client.status, run.client.data) == (503, b'{"first": 1}')
        assert at.hedges("failed") == 1
        assert LOST_USAGE not in run.call


async def test_of_two_failures_the_firsts_is_raised() -> None:
    async with scene() as at:
        run, first, second = await at.late()
        first.fail(broken(Phase.HEAD))
        await turns()
        second.answer(500)
        end = await run.ended()
        assert end.outcome is Outcome.UPSTREAM_FAILED
        assert isinstance(end.error, CallError)
        assert run.client.headers["x-sidecar-error"] == "upstream_closed"


async def test_a_failure_before_it_is_late_is_raised_at_once() -> None:
    async with scene() as at:
        run = await at.begin()
        at.tries[0].fail()
        assert (await run.ended()).outcome is Outcome.UPSTREAM_FAILED
        assert len(at.tries) == 1


async def test_of_two_answers_in_the_same_turn_the_firsts_counts() -> None:
    async with scene() as at:
        run, first, second = await at.late()
        second.stream()
        first.answer(200, b'{"first": 1}')
        await run.ended()
        assert run.client.data == b'{"first": 1}'
        assert second.source.is_aborted
        assert at.ends == {1: Outcome.COMPLETED, 2: Outcome.DISCARDED}
        assert run.call[LOST_USAGE].input > 0


async def test_a_mistake_of_a_filter_in_the_second_attempt_is_logged_and_the_first_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scene() as at:
        run, first, second = await at.late()
        second.fail(LookupError("a mistake"))
        await turns()
        first.answer()
        with caplog.at_level(logging.ERROR):
            await run.ended()
        assert [record.message for record in caplog.records] == ["hedge_failed"]
        assert run.client.status == 200


async def test_a_mistake_of_a_filter_in_the_first_attempt_counts_as_its_answer() -> None:
    async with scene() as at:
        run, first, second = await at.late()
        second.answer(500)
        await turns()
        first.fail(LookupError("a mistake"))
        assert (await run.ended()).outcome is Outcome.ABORTED
        assert run.client.status == 500
        assert run.client.headers["x-sidecar-error"] == "internal_error"


# What it costs


async def test_what_the_given_up_attempt_was_sent_is_counted() -> None:
    async with scene() as at:
        run, _, second = await at.late()
        second.answer()
        await run.ended()
        assert run.call[LOST_USAGE] == Usage(estimate_input(run.call), 0)


async def test_wait_for_both_is_counted_once() -> None:
    async with scene() as at:
        run, _, second = await at.late()
        await at.pass_time(2.0)
        second.answer()
        await run.ended()
        assert run.call.upstream_wait_s == pytest.approx(3.0)


async def test_every_try_of_a_retry_outside_may_be_hedged() -> None:
    class Again(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            reply = await call_next(call)
            if reply.status < 500:
                return reply
            reply.discard()
            return await call_next(call)

    async with scene(Again) as at:
        run, first, second = await at.late()
        first.answer(500)
        second.answer(500)
        await turns()
        await at.pass_time(1.0)
        third, fourth = at.tries[2:]
        fourth.answer()
        await run.ended()
        assert third.is_cancelled
        assert run.client.status == 200
        assert run.call.attempts == 4


# Leaving


@pytest.mark.parametrize("is_hedged", [False, True])
async def test_client_that_leaves_ends_all_attempts(is_hedged: bool) -> None:
    async with scene() as at:
        run = await at.begin()
        if is_hedged:
            await at.pass_time(1.0)
        run.client_leaves()
        assert (await run.ended()).outcome is Outcome.CLIENT_GONE
        assert len(at.tries) == 1 + is_hedged
        assert all(each.is_cancelled for each in at.tries)
        assert set(at.ends.values()) == {Outcome.CLIENT_GONE}
        assert at.hedges("gone") == is_hedged
        assert (LOST_USAGE in run.call) is is_hedged  # the first is the call's own


async def test_client_that_leaves_with_a_bad_answer_in_hand() -> None:
    async with scene() as at:
        run, first, second = await at.late()
        first.stream(500)
        await turns()
        run.client_leaves()
        await run.ended()
        assert second.is_cancelled
        assert first.source.is_aborted


async def test_shutdown_ends_both() -> None:
    async with scene() as at:
        run, first, second = await at.late()
        run.abort()
        assert (await run.ended()).outcome is Outcome.ABORTED
        assert first.is_cancelled
        assert second.is_cancelled
        assert at.ends == {1: Outcome.ABORTED, 2: Outcome.ABORTED}


# Every kind of end, once there is something to hedge by


async def taught(scenario: Scenario, journal: Journal, harness: Harness) -> None:
    """Leave the filter in the state in which the next call is started as one to hedge."""
    hedge = next(each for each in harness.filters if isinstance(each, Hedge))
    run = await Harness.run(harness, harness.call())
    for is_stream in (False, True):
        lane = hedge._lanes.get(("fake", MODEL, is_stream))
        if lane is not None:
            lane.times.add(SLOW_S)
            lane.extra.add_call(1.0)
            lane.extra.add_call(1.0)
    del run
    for each in (journal.call_debts, journal.attempt_debts, journal.settled, journal.canaries):
        each.clear()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
@pytest.mark.usefixtures("no_collector")
async def test_every_kind_of_end_while_a_hedge_is_due(scenario: Scenario) -> None:
    journal = Journal()
    async with scenario.harness(Use(Hedge, EAGER), journal) as harness:
        await taught(scenario, journal, harness)
        client = (await scenario.play(harness)).client
        if scenario.data is not None:
            assert client.data == scenario.data
        await harness.settled()
        assert journal.call_debts == [f"inner {scenario.call_end}", f"outer {scenario.call_end}"]
        if scenario.attempt_end is not None:
            end = scenario.attempt_end
            assert journal.attempt_debts == [f"inner {end}", f"outer {end}"]
        assert [ref() for ref in journal.canaries] == [None] * len(journal.canaries)
        assert harness.clock._timers == []


@pytest.mark.parametrize("winner", [0, 1])
@pytest.mark.usefixtures("no_collector")
async def test_a_hedged_call_is_freed_without_the_collector(winner: int) -> None:
    async with scene() as at:
        run, *tries = await at.late()
        tries[winner].answer()
        await run.ended()
        call = weakref.ref(run._task)  # its frames hold the call
        del run, tries
        at.tries.clear()
        await turns()
        assert call() is None


@pytest.mark.usefixtures("no_collector")
async def test_an_error_that_a_retry_outside_swallows_is_freed_without_the_collector() -> None:
    async def fails(call: Call) -> Reply:
        raise broken(Phase.CONNECT)

    async with scene() as at:
        hedge = at.harness.filters[0]
        assert isinstance(hedge, Hedge)
        try:
            await hedge.handle(at.harness.call(), fails)
        except CallError as error:
            swallowed = weakref.ref(error)
        await turns()
        assert swallowed() is None


async def test_path_that_the_sidecar_does_not_know_is_asked_once() -> None:
    async with scene() as at:
        call = at.harness.call()
        call.endpoint = OTHER
        run = await at.begin(call)
        await at.pass_time(60.0)
        (only,) = at.tries
        only.answer()
        assert (await run.ended()).outcome is Outcome.COMPLETED
