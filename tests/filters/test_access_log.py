"""One line a call, whatever its end: who, what, how long; never a secret."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from filters.access_log import AccessLog
from filters.sign import Sign, SignSettings
from filters.token_counter import TokenCounter
from sidecar.api import (
    Attempt,
    Call,
    CallError,
    CallFilter,
    CallNext,
    Phase,
    Rejected,
    Reply,
    Retry,
    Secret,
    UpstreamError,
)
from tests.contract.scenarios import FIRST, SCENARIOS, Scenario
from tests.support.harness import MODEL, Harness, Use

FIELDS = {
    *("event", "time", "id", "team", "endpoint", "method", "model", "upstream", "attempts"),
    *("status", "outcome", "bytes_in", "bytes_out", "first_byte_ms", "held_ms", "overhead_ms"),
    "total_ms",
}
USAGE = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 2}}'

ENDS: dict[str, dict[str, Any]] = {
    "completed_whole": {"status": 200, "attempts": 1},
    "completed_stream": {"status": 200, "attempts": 1},
    "answered_500": {"status": 500, "attempts": 1},
    "rejected_inside": {"status": 429, "attempts": 0, "error": "rate_limited"},
    "attempt_rejected": {"status": 429, "attempts": 1, "error": "rate_limited"},
    "refused_by_the_edge": {"status": 401, "attempts": 0, "error": "invalid_api_key"},
    "filter_failed": {"status": 500, "attempts": 0, "error": "internal_error"},
    "failed_before_head": {"status": 502, "attempts": 1, "error": "upstream_closed"},
    "died_midway": {"status": 200, "attempts": 1, "error": "upstream_closed"},
    "client_gone_before_reply": {"status": 0, "attempts": 1},
    "client_gone_mid_stream": {"status": 200, "attempts": 1},
    "discarded": {"status": 200, "attempts": 1},
    "aborted_before_reply": {"status": 503, "attempts": 1, "error": "shutting_down"},
    "aborted_mid_stream": {"status": 200, "attempts": 1, "error": "shutting_down"},
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
async def test_one_line_for_every_kind_of_end(scenario: Scenario) -> None:
    async with Harness(*scenario.before, AccessLog, *scenario.after) as harness:
        run = await scenario.play(harness)
    (line,) = harness.lines
    expected = ENDS[scenario.name]
    assert {name: line[name] for name in expected} == expected
    assert set(line) - {"error"} == FIELDS
    assert ("error" in line) is ("error" in expected)
    assert line["outcome"] == scenario.call_end
    assert line["bytes_in"] == run.call.bytes_in
    assert line["bytes_out"] == len(run.client.data)
    orjson.dumps(line)


async def test_line_says_who_called_what() -> None:
    async with Harness(AccessLog) as harness:
        await harness.run()
    (line,) = harness.lines
    assert line["event"] == "call"
    assert (line["id"], line["team"], line["method"]) == ("call_1", "tests", "POST")
    assert (line["endpoint"], line["model"], line["upstream"]) == (
        "chat_completions",
        MODEL,
        "fake",
    )


async def test_call_to_no_upstream_has_none() -> None:
    async with Harness(AccessLog) as harness:
        await harness.run(harness.call(b"", method="GET", path="/v1/models"))
    (line,) = harness.lines
    assert (line["endpoint"], line["model"], line["upstream"]) == ("models", None, None)


async def test_times_tell_our_part_from_the_upstreams() -> None:
    async with Harness(AccessLog) as harness:

        async def answer(attempt: Attempt) -> Reply:
            attempt.first_byte_at = attempt.started_at + 3.0
            harness.clock.turn(3.5)
            return await stream(attempt)

        stream = harness.upstream.stream(FIRST)
        harness.upstream.answer = answer
        began = harness.clock.wall()
        run = harness.start()
        await run.begun()
        harness.clock.turn(2.0)
        harness.upstream.source.finish()
        await run.ended()
    (line,) = harness.lines
    assert line["first_byte_ms"] == pytest.approx(3500)
    assert line["overhead_ms"] == pytest.approx(500)
    assert line["total_ms"] == pytest.approx(5500)
    assert line["time"] == pytest.approx(began + 5.5)


async def test_time_that_a_call_was_held_on_purpose_is_not_our_overhead() -> None:
    class Holds(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            harness.clock.turn(2.0)
            call.held_s += 1.5
            return await call_next(call)

    async with Harness(AccessLog, Holds) as harness:
        await harness.run()
    (line,) = harness.lines
    assert line["first_byte_ms"] == pytest.approx(2000)
    assert line["held_ms"] == pytest.approx(1500)
    assert line["overhead_ms"] == pytest.approx(500)


async def test_tokens_are_told_when_they_are_counted() -> None:
    async with Harness(AccessLog, TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.whole(USAGE)
        await harness.run()
    (line,) = harness.lines
    assert (line["input_tokens"], line["output_tokens"]) == (3, 2)


@pytest.mark.parametrize(
    "error",
    [
        None,
        UpstreamError(Phase.TLS, Retry.NO, "tls_failed", "canary in a message"),
        Rejected(429, "rate_limited", "canary in a message"),
        CallError(500, "internal_error", "canary in a message"),
        LookupError("canary in an exception"),
    ],
)
async def test_line_has_no_header_no_body_and_no_key(error: Any) -> None:
    settings = SignSettings(scheme="bearer", key=Secret("canary-of-the-upstream"))
    use = Use(Sign, {}, {"fake": settings})
    async with Harness(AccessLog, TokenCounter, use) as harness:
        harness.upstream.answer = harness.upstream.whole(b'{"canary": 1}')
        if error is not None:
            harness.upstream.answer = harness.upstream.failing(error)
        call = harness.call(
            {"model": MODEL, "messages": [{"role": "user", "content": "canary"}]},
            query="key=canary",
            headers=[
                ("authorization", "Bearer canary"),
                ("x-api-key", "canary"),
                ("x-a", "canary"),
            ],
        )
        await harness.run(call)
    assert b"canary" not in orjson.dumps(harness.lines)


async def test_long_model_name_is_cut() -> None:
    async with Harness(AccessLog) as harness:
        refusal = Rejected(404, "model_not_found", "no such model")
        call = harness.call(refusal=refusal)
        call.model = "m" * 100_000
        await harness.run(call)
    assert len(orjson.dumps(harness.lines)) < 2_000
