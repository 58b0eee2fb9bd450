"""Tokens reserved before a call, and settled at its end, however it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.algo.estimate import estimate_input
from filters.token_budget import TokenBudget
from filters.token_counter import TokenCounter
from sidecar.api import (
    CACHED,
    LOST_USAGE,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Filter,
    Phase,
    Rejected,
    Reply,
    Retry,
    UpstreamError,
    Usage,
)
from sidecar.chain import check_order
from sidecar.dialects import ANTHROPIC
from tests.support.harness import MODEL, FakeUpstream, Harness, Run, Use

MESSAGES = [{"role": "user", "content": "hello"}]
EVENT = b'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n'


def budgeted(
    settings: dict[str, Any], *inner: type[Filter], counts: bool = False, **more: Any
) -> Harness:
    """With usage as it is reported; with `counts`, also as it is counted here."""
    counter = Use(TokenCounter, {"count_missing": counts})
    return Harness(Use(TokenBudget, settings), counter, *inner, **more)


def chat(harness: Harness, max_tokens: int | None = 100, **more: Any) -> Call:
    body = {"model": MODEL, "messages": MESSAGES, **more}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return harness.call(body)


def used(tokens_in: int, tokens_out: int) -> bytes:
    return orjson.dumps({"usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}})


def error(run: Run) -> Any:
    return orjson.loads(run.client.data)["error"]


async def room(harness: Harness, limit: int) -> int:
    """What is left of a budget of `limit` tokens: the largest answer that a call may ask for."""
    answer, harness.upstream.answer = harness.upstream.answer, harness.upstream.failing()
    call = chat(harness, limit)  # takes the whole window
    run = await harness.run(call)
    harness.upstream.answer = answer
    if run.client.status != 429:
        return limit
    return int(run.client.headers["x-ratelimit-remaining-tokens"])


def books(harness: Harness) -> dict[str, float]:
    """Reservations and settlements."""
    found = {"reserved": harness.value("llm_sidecar_budget_reservations", team="tests")}
    for source in ("reported", "estimated", "refunded"):
        count = harness.value("llm_sidecar_budget_settlements", team="tests", source=source)
        if count:
            found[source] = count
    return found


def tokens(harness: Harness, kind: str, source: str = "reported") -> float:
    value = harness.value("llm_sidecar_budget_tokens", team="tests", kind=kind, source=source)
    assert isinstance(value, float | int)
    return value


# What is reserved


async def test_without_a_budget_every_call_passes_untouched() -> None:
    async with budgeted({}) as harness:
        (each, _) = harness.filters
        assert isinstance(each, TokenBudget)
        assert each.is_idle
        made = len(harness.resources)
        assert (await harness.run()).client.status == 200
        assert len(harness.resources) == made


async def test_five_parallel_calls_never_spend_six_times_the_budget() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        runs = [harness.start(chat(harness, 400)) for _ in range(5)]
        for run in runs:
            await run.begun()
        assert sorted(run.client.status for run in runs) == [200, 200, 429, 429, 429]
        assert len(harness.upstream.sent) == 2
        for run in runs:
            run.client_leaves()
            await run.ended()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 600), st.floats(0, 1), st.floats(0, 30)), min_size=1, max_size=25
    )
)
def test_no_minute_has_more_than_the_budget_when_answers_keep_what_was_asked(
    calls: list[tuple[int, float, float]],
) -> None:
    limit = 1000

    async def play() -> None:
        async with budgeted({"tokens_per_minute": limit}) as harness:
            spent: list[tuple[float, int]] = []
            for asked, part, pause_s in calls:
                call = chat(harness, asked)
                estimate = estimate_input(call)
                out = int(asked * part)
                harness.upstream.answer = harness.upstream.whole(used(estimate, out))
                if (await harness.run(call)).client.status == 200:
                    spent.append((harness.clock.monotonic(), estimate + out))
                now = harness.clock.monotonic()
                assert sum(n for at, n in spent if at > now - 60.0) <= limit
                harness.clock.turn(pause_s)

    asyncio.run(play())


async def test_a_call_without_a_bound_reserves_the_setting_for_its_answer() -> None:
    async with budgeted({"output_tokens_per_minute": 1000, "output_reserve": 600}) as harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        runs = [harness.start(chat(harness, None)) for _ in range(2)]
        for run in runs:
            await run.begun()
        assert [run.client.status for run in runs] == [200, 429]
        assert "may take 600" in error(runs[1])["message"]
        runs[0].client_leaves()
        await runs[0].ended()


@pytest.mark.parametrize(
    ("kind", "path", "bound", "words"),
    [
        ("tokens", None, None, "1020 (20 of input, 1000 reserved for the answer): try again in"),
        ("tokens", None, 500, "520 (20 of input, 500 reserved for the answer): try again in"),
        ("input_tokens", None, None, "20 (20 of input): try again in"),
        ("output_tokens", None, None, "1000 (1000 reserved for the answer): try again in"),
        ("tokens", "/v1/responses", None, "1020 (20 of input, 1000 reserved for the answer)"),
        ("tokens", "/v1/embeddings", None, "20 (20 of input): try again in"),
    ],
)
async def test_a_refusal_says_what_the_call_would_reserve(
    kind: str, path: str | None, bound: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("filters.algo.estimate._SEARCHED_BYTES", 0)  # none is too short to look at
    monkeypatch.setattr("filters.algo.estimate.tokens_of", lambda body: 20)
    async with budgeted({f"{kind}_per_minute": 5000}) as harness:
        harness.upstream.answer = harness.upstream.whole(used(5000, 5000))
        await harness.run(chat(harness))
        body = {"model": MODEL} if bound is None else {"model": MODEL, "max_tokens": bound}
        run = await harness.run(harness.call(body, path=path or "/v1/chat/completions"))
        message = error(run)["message"]
        assert f"has 0 left, and this call may take {words}" in message
        name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        may_be_bound = bound is None and "reserved" in words
        assert message.endswith(f"s, or name {name} to reserve less") == may_be_bound


async def test_every_choice_of_an_answer_is_reserved() -> None:
    async with budgeted({"output_tokens_per_minute": 1000}) as harness:
        await harness.run(chat(harness, 300, n=3))
        assert (await harness.run(chat(harness, 300))).client.status == 429


async def test_a_call_that_may_take_more_than_the_budget_needs_all_of_it() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.whole(used(10, 10))
        assert (await harness.run(chat(harness, 100_000))).client.status == 200
        assert (await harness.run(chat(harness, 100_000))).client.status == 429
        harness.clock.turn(62.0)
        assert (await harness.run(chat(harness, 100_000))).client.status == 200


async def test_a_request_larger_than_the_budget_is_not_to_be_tried_again() -> None:
    async with budgeted({"tokens_per_minute": 100, "per": ["team", "model"]}) as harness:
        run = await harness.run(harness.call({"model": MODEL, "input": "word " * 200}))
        assert run.client.status == 429
        assert error(run)["code"] == "token_budget_too_small"
        assert run.client.headers["x-should-retry"] == "false"
        assert "retry-after" not in run.client.headers
        assert f"team tests, model {MODEL}: 100 tokens a minute" in error(run)["message"]
        assert harness.value("llm_sidecar_limited", team="tests", rule="tokens_per_minute") == 1
        assert books(harness) == {"reserved": 0}


async def test_a_refusal_says_which_budget_and_when_to_come_back() -> None:
    async with budgeted({"input_tokens_per_minute": 10**6, "output_tokens_per_minute": 100}) as h:
        h.upstream.answer = h.upstream.whole(used(20, 100))
        await h.run(chat(h))
        h.clock.turn(20.0)
        run = await h.run(chat(h))
        assert run.client.status == 429
        assert error(run)["code"] == "token_budget_exceeded"
        assert "team tests: 100 output tokens a minute" in error(run)["message"]
        assert "has 0 left, and this call may take 100" in error(run)["message"]
        told_s = int(run.client.headers["retry-after"])
        assert 40 <= told_s <= 42
        assert run.client.headers["x-ratelimit-limit-tokens"] == "100"
        h.clock.turn(told_s)
        assert (await h.run(chat(h))).client.status == 200
        assert h.value("llm_sidecar_limited", team="tests", rule="output_tokens_per_minute") == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"body": b"", "method": "GET", "path": "/v1/models"},
        {"body": b"", "method": "GET", "path": "/fake/v1/files"},
        {"path": "/v1/messages/count_tokens"},
    ],
    ids=lambda asked: str(asked["path"]),
)
async def test_what_takes_no_tokens_is_not_counted(asked: dict[str, Any]) -> None:
    dialect = {"upstream": FakeUpstream(dialect=ANTHROPIC)} if "count" in asked["path"] else {}
    async with budgeted({"tokens_per_minute": 10}, **dialect) as harness:
        for _ in range(3):
            assert (await harness.run(harness.call(**asked))).client.status == 200
        assert books(harness) == {"reserved": 0}


async def test_input_and_output_have_budgets_of_their_own() -> None:
    async with budgeted({"input_tokens_per_minute": 50, "output_tokens_per_minute": 1000}) as h:
        h.upstream.answer = h.upstream.whole(used(45, 1))
        assert (await h.run(chat(h, 10))).client.status == 200
        run = await h.run(chat(h, 10))
        assert "50 input tokens a minute" in error(run)["message"]


async def test_a_long_request_is_no_matter_for_a_budget_of_answers() -> None:
    async with budgeted({"output_tokens_per_minute": 50}) as harness:
        run = await harness.run(chat(harness, 10, input="word " * 200))
        assert run.client.status == 200


# What is settled


async def test_a_reported_usage_takes_the_place_of_the_estimate() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.whole(used(30, 12))
        await harness.run(chat(harness, 900))
        assert await room(harness, 1000) == 1000 - 42
        assert (tokens(harness, "input"), tokens(harness, "output")) == (30, 12)
        assert books(harness) == {"reserved": 1, "reported": 1}


async def test_the_usage_of_a_stream_is_settled_at_its_end() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        run = harness.start(chat(harness, 500))
        await run.begun()
        assert await room(harness, 1000) < 500
        harness.upstream.source.feed(b"data: " + used(30, 12) + b"\n\n")
        harness.upstream.source.finish(b"data: [DONE]\n\n")
        await run.ended()
        assert await room(harness, 1000) == 1000 - 42


async def test_a_call_that_took_more_than_it_had_reserved_leaves_a_debt() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.whole(used(900, 1100))
        await harness.run(chat(harness, 10))
        run = await harness.run(chat(harness, 10))
        assert run.client.status == 429
        harness.clock.turn(int(run.client.headers["retry-after"]))
        assert (await harness.run(chat(harness, 10))).client.status == 200


@pytest.mark.parametrize(
    "phase", [Phase.ADMIT, Phase.SIGN, Phase.RESOLVE, Phase.POOL, Phase.CONNECT, Phase.TLS]
)
async def test_all_is_refunded_when_nothing_was_sent(phase: Phase) -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        failure = UpstreamError(phase, Retry.SAME, "failed", "it failed")
        harness.upstream.answer = harness.upstream.failing(failure)
        await harness.run(chat(harness))
        assert await room(harness, 1000) == 1000
        assert books(harness)["refunded"] == books(harness)["reserved"]


class RefusesLater(CallFilter):
    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        raise Rejected(429, "queue_full", "no")


class AnswersItself(CallFilter):
    """A cache: what it answers has cost nothing, whatever usage stands in it."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        return Reply.of(200, used(500, 500))


@pytest.mark.parametrize("inner", [RefusesLater, AnswersItself])
async def test_all_is_refunded_when_no_attempt_was_made(inner: type[CallFilter]) -> None:
    async with budgeted({"tokens_per_minute": 1000}, inner) as harness:
        for _ in range(20):
            await harness.run(chat(harness, 900))
        assert books(harness) == {"reserved": 20, "refunded": 20}


@pytest.mark.parametrize("status", [400, 429, 500, 529])
async def test_all_is_refunded_for_an_error_without_usage(status: int) -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.whole(b'{"error": {}}', status=status)
        await harness.run(chat(harness))
        assert await room(harness, 1000) == 1000


async def test_all_is_refunded_when_the_first_event_of_a_200_is_an_error() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        failure = UpstreamError(Phase.FIRST_EVENT, Retry.SAME, "upstream_error_event", "overloaded")
        harness.upstream.answer = harness.upstream.failing(failure)
        await harness.run(chat(harness))
        assert await room(harness, 1000) == 1000


@pytest.mark.parametrize("how", ["completed", "died", "left", "aborted"])
async def test_the_reservation_stands_for_an_answer_without_usage(how: str) -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        call = chat(harness, 300)
        run = harness.start(call)
        await run.begun()
        if how == "completed":
            harness.upstream.source.finish(b"data: [DONE]\n\n")
        elif how == "died":
            harness.upstream.source.fail()
        elif how == "left":
            run.client_leaves()
        else:
            run.abort()
        await run.ended()
        assert await room(harness, 1000) == 1000 - 300 - estimate_input(call)
        assert tokens(harness, "output", "estimated") == 300
        assert books(harness)["estimated"] == 1


async def test_the_reservation_stands_when_the_client_leaves_before_the_first_byte() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.silent()
        call = chat(harness, 300)
        run = harness.start(call)
        await harness.upstream.asked.wait()
        run.client_leaves()
        await run.ended()
        assert await room(harness, 1000) == 1000 - 300 - estimate_input(call)


async def test_a_reservation_that_stands_leaves_by_itself_after_a_minute() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.whole(b"{}")
        await harness.run(chat(harness, 900))
        harness.clock.turn(62.0)
        assert await room(harness, 1000) == 1000


async def test_a_stream_that_breaks_off_after_a_first_report_is_not_nearly_free() -> None:
    first = (
        b'event: message_start\ndata: {"type": "message_start", "message": '
        b'{"usage": {"input_tokens": 30, "output_tokens": 1}}}\n\n'
    )
    upstream = FakeUpstream(dialect=ANTHROPIC)
    async with budgeted({"tokens_per_minute": 10_000}, counts=True, upstream=upstream) as harness:
        harness.upstream.answer = harness.upstream.stream(first)
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2000}
        run = harness.start(harness.call(body, path="/v1/messages"))
        await run.begun()
        text = b'data: {"type": "content_block_delta", "delta": {"text": "four word text"}}\n\n'
        harness.upstream.source.feed(*[text] * 40)
        run.client_leaves()
        await run.ended()
        assert tokens(harness, "input") == 30
        assert tokens(harness, "output") == 1  # as it was reported
        guessed = tokens(harness, "output", "estimated")
        assert 1 + guessed == run.call[USAGE].output
        assert guessed > 60  # forty times "four word text"
        assert await room(harness, 10_000) == 10_000 - 30 - 1 - guessed


async def test_answer_that_was_counted_here_is_settled_as_estimated() -> None:
    async with budgeted({"tokens_per_minute": 10_000}, counts=True) as harness:
        harness.upstream.answer = harness.upstream.whole(
            b'{"choices":[{"message":{"content":"x"}}]}'
        )
        run = await harness.run(chat(harness, 300))
        usage = run.call[USAGE]
        assert (tokens(harness, "input"), tokens(harness, "output")) == (0, 0)
        assert tokens(harness, "input", "estimated") == usage.input
        assert tokens(harness, "output", "estimated") == usage.output
        assert await room(harness, 10_000) == 10_000 - usage.input - usage.output


async def test_call_that_a_cache_answered_takes_nothing() -> None:
    class Cached(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            call[CACHED] = "hit"
            call[USAGE] = Usage(30, 40)
            return Reply.of(200, b"{}")

    async with budgeted({"tokens_per_minute": 1000}, Cached) as harness:
        await harness.run(chat(harness, 300))
        assert await room(harness, 1000) == 1000


async def test_tokens_of_attempts_that_were_given_up_count_on_top() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.whole(used(30, 12))
        call = chat(harness)
        call[LOST_USAGE] = Usage(50, 8)
        await harness.run(call)
        assert await room(harness, 1000) == 1000 - 42 - 58
        assert (tokens(harness, "input"), tokens(harness, "input", "estimated")) == (30, 50)
        assert books(harness)["reported"] == 1


async def test_tokens_given_up_count_beside_a_reservation_that_stands() -> None:
    async with budgeted({"tokens_per_minute": 1000}) as harness:
        harness.upstream.answer = harness.upstream.whole(b"{}")
        call = chat(harness)
        call[LOST_USAGE] = Usage(50, 8)
        await harness.run(call)
        assert await room(harness, 1000) == 1000 - 100 - estimate_input(call) - 58


async def test_reservations_and_settlements_are_equal_at_rest() -> None:
    async with budgeted({"tokens_per_minute": 100_000}) as harness:
        upstream = harness.upstream
        for answer in (
            upstream.whole(used(1, 2)),
            upstream.whole(b"{}"),
            upstream.whole(b"{}", status=500),
            upstream.failing(),
            upstream.whole(used(3, 4)),
        ):
            upstream.answer = answer
            await harness.run(chat(harness))
        found = books(harness)
        assert found == {"reserved": 5, "reported": 2, "estimated": 1, "refunded": 2}
        assert (tokens(harness, "input"), tokens(harness, "output")) == (4, 6)


# Its place


def test_without_somebody_who_counts_tokens_it_does_not_load() -> None:
    assert check_order([TokenBudget], []) != []
    assert check_order([TokenBudget, TokenCounter], []) == []
    assert frozenset({USAGE}) == TokenBudget.reads


async def test_a_budget_for_each_key_is_bounded_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("filters.token_budget.MAX_PLANS", 3)
    async with budgeted({"tokens_per_minute": 300, "per": ["key"]}) as harness:
        harness.upstream.answer = harness.upstream.whole(used(1, 200))
        for number in range(8):
            for status in (200, 429):
                headers = [("x-api-key", f"sk-{number}")]
                run = await harness.run(harness.call({"model": MODEL, "n": 1}, headers=headers))
                assert run.client.status == status
        made = harness.filters[0]
        assert isinstance(made, TokenBudget)
        assert len(made._plans) <= 3
