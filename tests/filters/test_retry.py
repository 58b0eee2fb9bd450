"""Retry: what is tried again, after how long, and what the caller is told when it is over."""

from __future__ import annotations

import asyncio
import gc
import gzip
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from filters.algo.estimate import estimate_input
from filters.retry import RetryCalls
from sidecar.api import (
    LOST_USAGE,
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallFilter,
    CallNext,
    Headers,
    Outcome,
    Phase,
    Rejected,
    Reply,
    Retry,
    UpstreamError,
    Usage,
)
from sidecar.dialects.endpoint import OTHER
from tests.support.harness import Answer, Harness, Run, ScriptedSource, Use

OK = b'{"ok": true}'
EVENT = b'data: {"choices": []}\n\n'

Play = tuple[Run, list[float]]


def retry_harness(
    section: Mapping[str, Any] | None = None, *, rand: float = 1.0, **settings: Any
) -> Harness:
    """A harness around one `retry`; jitter is at its most, so that waits are the bounds."""
    sections = {"fake": RetryCalls.UpstreamConfig(**(section or {}))}
    harness = Harness(Use(RetryCalls, settings, sections))
    retry = harness.filters[0]
    assert isinstance(retry, RetryCalls)
    retry.rand = lambda: rand
    return harness


def reply(
    status: int = 200,
    body: bytes = b'{"error": {"message": "m"}}',
    *,
    encoding: str = "",
    media_type: str = "application/json",
    **headers: str,
) -> Answer:
    """A whole answer with headers, whose names are written with `_`."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}

    async def answer(attempt: Attempt) -> Reply:
        found = Reply.of(status, body, media_type=media_type)
        found.body.encoding = encoding
        found.headers.update(fields)
        return found

    return answer


def error(**fields: Any) -> bytes:
    return orjson.dumps({"error": {"message": "m", **fields}})


def failing(
    phase: Phase = Phase.CONNECT,
    retry: Retry = Retry.SAME,
    code: str = "upstream_down",
    **more: Any,
) -> Answer:
    async def answer(attempt: Attempt) -> Reply:
        raise UpstreamError(phase, retry, code, "it did not work", **more)

    return answer


def one_after_the_other(harness: Harness, *answers: Answer) -> None:
    """Each attempt gets the next answer; the last one stays."""
    left = list(answers)

    async def answer(attempt: Attempt) -> Reply:
        script = left.pop(0) if len(left) > 1 else left[0]
        return await script(attempt)

    harness.upstream.answer = answer


async def play(harness: Harness, call: Call | None = None) -> Play:
    """The call served to its end, the clock turned whenever it waits; and how long it waited."""
    run, waits = harness.start(call), []
    async with asyncio.timeout(5.0):
        while run.call.end is None:
            await asyncio.sleep(0)
            if waits_until := [due for due, _ in harness.clock._sleepers]:
                wait_s = min(waits_until) - harness.clock.monotonic()
                waits.append(round(wait_s, 6))
                harness.clock.turn(wait_s + 1e-9)  # sums of floats may fall short
                await asyncio.sleep(0)
    await run.ended()
    return run, waits


async def play_all(harness: Harness, *answers: Answer, call: Call | None = None) -> Play:
    one_after_the_other(harness, *answers)
    async with harness:
        return await play(harness, call)


async def until(condition: Callable[[], object]) -> None:
    """Let the others run until `condition` holds."""
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 - a scripted wait tells nobody that it began
            await asyncio.sleep(0)


def tries(harness: Harness) -> int:
    return len(harness.upstream.sent)


def retried(harness: Harness, reason: str) -> Any:
    return harness.value("llm_sidecar_retries", upstream="fake", reason=reason)


def denied(harness: Harness, why: str) -> Any:
    return harness.value("llm_sidecar_retries_denied", upstream="fake", why=why)


def is_told_not_to_retry(run: Run) -> bool:
    return run.client.headers.get("x-should-retry") == "false"


# What is tried again


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
async def test_temporary_status_is_tried_again(status: int) -> None:
    harness = retry_harness()
    run, waits = await play_all(harness, reply(status), reply(200, OK))
    assert (run.client.status, run.client.data) == (200, OK)
    assert (tries(harness), waits) == (2, [0.5])
    assert retried(harness, str(status)) == 1
    assert "x-should-retry" not in run.client.headers


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422, 501, 505])
async def test_other_status_passes_at_once_and_untouched(status: int) -> None:
    harness = retry_harness()
    run, waits = await play_all(harness, reply(status, b"{}"))
    assert (run.client.status, run.client.data, waits) == (status, b"{}", [])
    assert tries(harness) == 1
    assert not is_told_not_to_retry(run)
    assert not [denied(harness, why) for why in ("code", "attempts") if denied(harness, why)]


@pytest.mark.parametrize(
    "phase", [Phase.RESOLVE, Phase.CONNECT, Phase.SEND, Phase.HEAD, Phase.FIRST_EVENT]
)
async def test_error_that_the_same_upstream_may_get_over_is_tried_again(phase: Phase) -> None:
    harness = retry_harness()
    run, _ = await play_all(harness, failing(phase), reply(200, OK))
    assert (run.client.data, tries(harness)) == (OK, 2)
    assert retried(harness, phase.value) == 1


@pytest.mark.parametrize("retry", [Retry.NO, Retry.ELSEWHERE])
async def test_other_errors_are_raised(retry: Retry) -> None:
    harness = retry_harness()
    run, waits = await play_all(harness, failing(Phase.TLS, retry))
    assert (run.client.status, tries(harness), waits) == (502, 1, [])
    assert not is_told_not_to_retry(run)


async def test_refusal_of_our_own_is_no_upstream_failure() -> None:
    harness = retry_harness()

    async def refuse(attempt: Attempt) -> Reply:
        raise Rejected(503, "store_unavailable", "away", retry_after_s=1.0)

    run, waits = await play_all(harness, refuse)
    assert (run.client.status, tries(harness), waits) == (503, 1, [])


async def test_stream_that_dies_after_its_first_byte_is_not_tried_again() -> None:
    harness = retry_harness()
    async with harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        run = harness.start()
        await run.begun()
        harness.upstream.source.fail()
        end = await run.ended()
    assert end.outcome is Outcome.UPSTREAM_FAILED
    assert (tries(harness), run.client.data) == (1, EVENT)


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (error(type="insufficient_quota", code="credit_balance_exhausted"), ""),
        (gzip.compress(error(type="insufficient_quota"), mtime=0), "gzip"),
        (error(code="organization_spend_limit_exceeded", type="x"), ""),
    ],
)
async def test_429_that_is_about_money_is_not(body: bytes, encoding: str) -> None:
    harness = retry_harness()
    run, waits = await play_all(harness, reply(429, body, encoding=encoding))
    assert (run.client.status, run.client.data, waits) == (429, body, [])
    assert (tries(harness), denied(harness, "code")) == (1, 1)
    assert is_told_not_to_retry(run)


@pytest.mark.parametrize(
    ("provider", "answer"),
    [
        ("anthropic", reply(429, error(details={"error_code": "enforced_spend_limit_reached"}))),
        ("ark", reply(429, error(code="QuotaExceeded"))),
        ("ark", reply(403, error(code="AccountOverdueError"))),
        ("zhipu", reply(429, error(code="1113"))),
        ("dashscope", reply(400, b'{"code": "Arrearage", "message": "m"}')),
        ("bedrock", reply(400, b"{}", x_amzn_errortype="ServiceQuotaExceededException:http://x/")),
        ("qianfan_v1", reply(200, b'{"error_code": 17, "error_msg": "m"}')),
        ("hunyuan", reply(200, b'{"Response":{"Error":{"Code":"ResourceUnavailable.InArrears"}}}')),
        ("spark", reply(200, b'{"code": 11201, "message": "m", "sid": "s"}')),
        ("gemini", reply(429, error(details=[{"violations": [{"quotaId": "XPerDayY"}]}]))),
        ("gemini", reply(429, error(details=[{"violations": [{"quotaValue": "0"}]}]))),
    ],
)
async def test_money_and_daily_limits_are_known_in_every_provider_s_words(
    provider: str, answer: Answer
) -> None:
    harness = retry_harness({"provider": provider})
    run, waits = await play_all(harness, answer, reply(200, OK))
    assert (tries(harness), waits) == (1, [])
    assert run.client.data != OK
    assert is_told_not_to_retry(run)
    assert denied(harness, "code") == 1


@pytest.mark.parametrize(
    ("provider", "answer"),
    [
        ("hunyuan_openai", reply(400, error(type="runtime_error", code="2003"))),
        ("ark", reply(429, error(code="RateLimitExceeded.EndpointTPMExceeded"))),
        ("bedrock", reply(424, b"{}", x_amzn_errortype="ModelErrorException")),
        ("qianfan_v1", reply(200, b'{"error_code": 18, "error_msg": "m"}')),
        ("hunyuan", reply(200, b'{"Response":{"Error":{"Code":"RequestLimitExceeded.Uin"}}}')),
        ("spark", reply(200, b'{"code": 10110, "message": "m", "sid": "s"}')),
        ("qianfan", reply(200, b'{"code": "rpm_rate_limit_exceeded", "msg": "m"}')),
        (
            "dashscope",
            reply(
                200,
                b'id:1\nevent:error\n:HTTP_STATUS/429\ndata:{"code":"Throttling"}\n\n',
                media_type="text/event-stream",
            ),
        ),
    ],
)
async def test_overload_is_known_in_every_provider_s_words(provider: str, answer: Answer) -> None:
    harness = retry_harness({"provider": provider})
    run, _ = await play_all(harness, answer, reply(200, OK))
    assert (tries(harness), run.client.data) == (2, OK)


async def test_error_inside_of_the_first_bytes_of_a_stream_is_tried_again() -> None:
    harness = retry_harness({"provider": "hunyuan"})
    failed = harness.upstream.stream(b'data: {"ErrorMsg": {"Code": 4001, "Msg": "m"}}\n\n')
    async with harness:
        one_after_the_other(harness, failed, reply(200, OK))
        run, _ = await play(harness)
        assert harness.upstream.source.is_aborted
    assert run.client.data == OK


async def test_good_answers_of_such_providers_pass_as_they_came() -> None:
    for provider, data in (
        ("qianfan_v1", b'{"id":"as-1","result":"error_code 18"}'),
        ("spark", b'{"code":0,"message":"Success","choices":[]}'),
        ("hunyuan", b'{"Response":{"Choices":[],"ErrorMsg":null}}'),
    ):
        harness = retry_harness({"provider": provider})
        run, waits = await play_all(harness, reply(200, data))
        assert (run.client.data, waits, tries(harness)) == (data, [], 1)


async def test_a_200_that_says_error_is_no_business_of_a_provider_that_uses_statuses() -> None:
    harness = retry_harness()
    data = b'{"error_code": 18}'
    run, _ = await play_all(harness, reply(200, data))
    assert (run.client.data, tries(harness)) == (data, 1)


async def test_token_that_expired_is_tried_once_with_a_new_one() -> None:
    harness = retry_harness({"provider": "qianfan_v1"})
    run, _ = await play_all(harness, reply(200, b'{"error_code": 111}'))
    assert (tries(harness), run.client.data) == (2, b'{"error_code": 111}')


@pytest.mark.parametrize(
    ("provider_code", "count"),
    [("", 2), ("overloaded_error", 2), ("insufficient_quota", 1), ("invalid_request_error", 1)],
)
async def test_error_event_that_came_first_is_judged_by_its_code(
    provider_code: str, count: int
) -> None:
    harness = retry_harness()
    failed = failing(Phase.FIRST_EVENT, provider_code=provider_code)
    await play_all(harness, failed, reply(200, OK))
    assert tries(harness) == count


async def test_provider_is_known_by_the_upstream_s_host() -> None:
    harness = Harness(RetryCalls)
    harness.upstream.host = "aip.baidubce.com"
    await play_all(harness, reply(200, b'{"error_code": 18}'), reply(200, OK))
    assert tries(harness) == 2


async def test_configured_statuses_and_codes_go_over_the_provider_s() -> None:
    section = {"also_retry": [425, "insufficient_quota"], "never_retry": ["boom", 503]}
    for answer, count in (
        (reply(425), 2),
        (reply(429, error(code="insufficient_quota")), 2),
        (reply(500, error(code="boom")), 1),
        (reply(503), 1),
    ):
        harness = retry_harness(section)
        await play_all(harness, answer, reply(200, OK))
        assert tries(harness) == count


async def test_upstream_s_own_word_goes_over_its_status() -> None:
    for answer, count, is_denied in (
        (reply(503, x_should_retry="false"), 1, 1),
        (reply(400, x_should_retry="true"), 4, 0),
        (reply(400, x_should_retry="false"), 1, 0),
    ):
        harness = retry_harness()
        await play_all(harness, answer)
        assert tries(harness) == count
        assert denied(harness, "code") == is_denied


# The body of an answer that is judged


async def test_refusal_whose_body_comes_late_is_read_and_still_passes_whole() -> None:
    body = error(type="insufficient_quota")
    harness = retry_harness()
    source = ScriptedSource(media_type="application/json", length=len(body))
    source.feed(body[:1])

    async def answer(attempt: Attempt) -> Reply:
        return Reply(429, Headers({"content-type": "application/json"}), source.body)

    async with harness:
        harness.upstream.answer = answer
        run = harness.start()
        await harness.upstream.asked.wait()
        await until(lambda: not source.is_paused)
        source.feed(body[1:30])
        source.finish(body[30:])
        await run.ended()
    assert (run.client.status, run.client.data, tries(harness)) == (429, body, 1)


async def test_answers_that_are_not_returned_are_given_up() -> None:
    harness = retry_harness()
    sources: list[ScriptedSource] = []

    async def answer(attempt: Attempt) -> Reply:
        source = ScriptedSource(media_type="application/json")
        source.feed(b"x" * 20_000)  # more than is looked at
        sources.append(source)
        return Reply(503, Headers(), source.body)

    async with harness:
        harness.upstream.answer = answer
        run = harness.start()
        while len(sources) < 4:
            await asyncio.sleep(0)
            harness.clock.turn(20.0)
        await run.begun()
        assert [each.is_aborted for each in sources] == [True, True, True, False]
        sources[-1].finish(b"y")
        await run.ended()
    assert run.client.data == b"x" * 20_000 + b"y"


# How long is waited


async def test_backoff_doubles_and_is_capped() -> None:
    harness = retry_harness(max_attempts=6, base_s=1.0, max_s=5.0)
    _, waits = await play_all(harness, reply(503))
    assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]


async def test_jitter_is_full_or_equal() -> None:
    _, waits = await play_all(retry_harness(rand=0.5), reply(503))
    assert waits == [0.25, 0.5, 1.0]
    _, waits = await play_all(retry_harness(rand=0.5, jitter="equal"), reply(503))
    assert waits == [0.375, 0.75, 1.5]


DATE = "Mon, 01 Jul 2024 08:00:00 GMT"  # far from the harness's clock


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry_after": "3"}, 3.0),
        ({"retry_after": "0.25"}, 0.25),
        ({"retry_after_ms": "1500", "retry_after": "9"}, 1.5),
        ({"retry_after": "Mon, 01 Jul 2024 08:00:07 GMT", "date": DATE}, 7.0),
        ({"retry_after": formatdate(1_700_000_004, usegmt=True)}, 4.0),
        ({"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "6s"}, 6.0),
        ({"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "120ms"}, 0.12),
        ({"x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "2"}, 2.0),
        (
            {
                "anthropic_ratelimit_requests_remaining": "0",
                "anthropic_ratelimit_requests_reset": "2024-07-01T08:00:05Z",
                "date": DATE,
            },
            5.0,
        ),
        (
            {
                "retry_after": "1",
                "x_ratelimit_remaining_requests": "0",
                "x_ratelimit_reset_requests": "9s",
            },
            1.0,
        ),
        # A window that is not used up says nothing, nor does a wait of 0: back off.
        ({"x_ratelimit_remaining_requests": "5", "x_ratelimit_reset_requests": "6s"}, 0.5),
        ({"retry_after": "0"}, 0.5),
    ],
)
async def test_wait_that_is_asked_for_is_waited(headers: dict[str, str], wait_s: float) -> None:
    harness = retry_harness(rand=0.0, jitter="equal", base_s=1.0)
    _, waits = await play_all(harness, reply(429, **headers), reply(200, OK))
    assert waits == [wait_s]


@pytest.mark.parametrize("rand", [0.0, 0.5, 0.999])
async def test_hint_is_never_undercut(rand: float) -> None:
    harness = retry_harness(rand=rand)
    _, waits = await play_all(harness, reply(429, retry_after="10"), reply(200, OK))
    assert 10.0 <= waits[0] <= 12.5


async def test_delay_in_google_s_body_is_waited() -> None:
    harness = retry_harness({"provider": "gemini"}, rand=0.0)
    body = error(code=429, details=[{"retryDelay": "12.5s"}])
    _, waits = await play_all(harness, reply(429, body), reply(200, OK))
    assert waits == [12.5]


async def test_longer_windows_are_waited_for_longer() -> None:
    harness = retry_harness({"provider": "dashscope"})
    body = b'{"code": "Throttling.AllocationQuota"}'
    _, waits = await play_all(harness, reply(429, body), reply(429, body), reply(200, OK))
    assert waits == [2.0, 4.0]


@pytest.mark.parametrize(
    "headers",
    [
        {"retry_after": "21"},
        {"retry_after": formatdate(1_700_000_100, usegmt=True)},
        {"x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "6m0s"},
    ],
)
async def test_wait_that_is_too_long_is_left_to_the_caller(headers: dict[str, str]) -> None:
    harness = retry_harness()
    run, waits = await play_all(harness, reply(429, **headers))
    assert (run.client.status, tries(harness), waits) == (429, 1, [])
    assert run.client.headers.get("retry-after") == headers.get("retry_after")
    assert not is_told_not_to_retry(run)
    assert denied(harness, "hint") == 1


async def test_wait_of_just_the_longest_is_waited() -> None:
    harness = retry_harness(rand=0.5)
    _, waits = await play_all(harness, reply(429, retry_after="20"), reply(200, OK))
    assert waits == [22.5]


async def test_time_waited_is_the_call_s_own_and_not_the_upstream_s() -> None:
    run, _ = await play_all(retry_harness(), reply(503), reply(503), reply(200, OK))
    assert run.call.held_s == pytest.approx(1.5)
    assert run.call.upstream_wait_s == 0.0


# What we hold back ourselves


@pytest.mark.parametrize("phase", [Phase.ADMIT, Phase.SIGN])
async def test_attempt_that_we_held_back_is_waited_for_and_is_no_try(phase: Phase) -> None:
    harness = retry_harness(rand=0.0, budget_share=0.0, budget_min_per_s=0.1)
    held = failing(phase, Retry.ELSEWHERE, "circuit_open", status=503, retry_after_s=2.0)
    run, waits = await play_all(harness, *[held] * 6, reply(503), reply(200, OK))
    assert waits == [2.0] * 6 + [0.0]  # the one retry that the budget has was still there
    assert run.client.data == OK
    assert retried(harness, phase.value) == 6


async def test_all_such_waiting_together_is_bounded() -> None:
    harness = retry_harness(rand=0.0)
    held = failing(Phase.ADMIT, Retry.ELSEWHERE, "circuit_open", status=503, retry_after_s=8.0)
    run, waits = await play_all(harness, held)
    assert waits == [8.0, 8.0]
    assert (run.client.status, run.client.headers["retry-after"]) == (503, "8")
    assert not is_told_not_to_retry(run)
    assert denied(harness, "hint") == 1


async def test_caller_s_deadline_bounds_it_instead() -> None:
    harness = retry_harness(rand=0.0)
    held = failing(Phase.ADMIT, Retry.ELSEWHERE, "circuit_open", status=503, retry_after_s=8.0)
    call = harness.call(headers=[("x-request-timeout", "60")])
    run, waits = await play_all(harness, held, call=call)
    assert waits == [8.0] * 7
    assert (run.client.status, denied(harness, "deadline")) == (503, 1)


async def test_patience_of_an_sdk_is_no_wish_to_be_held_so_long() -> None:
    harness = retry_harness(rand=0.0)
    held = failing(Phase.ADMIT, Retry.ELSEWHERE, "circuit_open", status=503, retry_after_s=8.0)
    call = harness.call(headers=[("x-stainless-read-timeout", "600")])
    _, waits = await play_all(harness, held, call=call)
    assert waits == [8.0, 8.0]


async def test_refusal_that_does_not_say_how_long_goes_elsewhere() -> None:
    harness = retry_harness()
    run, waits = await play_all(harness, failing(Phase.ADMIT, Retry.ELSEWHERE, status=503))
    assert (run.client.status, waits, tries(harness)) == (503, [], 1)


async def test_refusal_of_no_time_at_all_does_not_spin() -> None:
    harness = retry_harness(max_s=0.1, rand=0.0)
    held = failing(Phase.ADMIT, Retry.ELSEWHERE, status=503, retry_after_s=0.0)
    _, waits = await play_all(harness, held)
    assert waits == [0.01] * len(waits)
    assert len(waits) <= 10


async def test_upstream_that_was_asked_and_names_a_time_counts_as_a_try() -> None:
    harness = retry_harness(rand=0.0)
    failed = failing(Phase.HEAD, Retry.ELSEWHERE, retry_after_s=1.0)
    _, waits = await play_all(harness, failed)
    assert (waits, tries(harness)) == ([1.0] * 3, 4)


# Where it ends


async def test_attempts_are_bounded_and_the_last_answer_is_the_caller_s() -> None:
    harness = retry_harness()
    last = reply(503, b'{"error": {"message": "the last"}}', retry_after="1")
    run, _ = await play_all(harness, reply(500), reply(502), failing(), last)
    assert (run.client.status, tries(harness)) == (503, 4)
    assert b"the last" in run.client.data
    assert run.client.headers["retry-after"] == "1"
    assert denied(harness, "attempts") == 1


async def test_attempts_may_be_other_at_an_upstream() -> None:
    harness = retry_harness({"max_attempts": 2})
    await play_all(harness, reply(503))
    assert tries(harness) == 2


@pytest.mark.parametrize("last", [reply(503), failing()])
async def test_caller_is_told_not_to_multiply_our_tries(last: Answer) -> None:
    run, _ = await play_all(retry_harness(), last)
    assert is_told_not_to_retry(run)
    run, _ = await play_all(retry_harness(tell_client=False), last)
    assert not is_told_not_to_retry(run)


async def test_caller_is_left_alone_where_all_retrying_is_its_own() -> None:
    run, waits = await play_all(retry_harness(max_attempts=1), reply(503))
    assert waits == []
    assert not is_told_not_to_retry(run)


async def test_deadline_is_never_slept_over() -> None:
    harness = retry_harness()
    call = harness.call(headers=[("x-request-timeout", "1.6")])
    run, waits = await play_all(harness, reply(503), call=call)
    assert waits == [0.5, 1.0]  # the next would be 2.0, with 0.1 left
    assert (run.client.status, tries(harness)) == (503, 3)
    assert denied(harness, "deadline") == 1
    assert not is_told_not_to_retry(run)


async def test_hint_beyond_the_deadline_is_not_waited_for() -> None:
    harness = retry_harness()
    call = harness.call(headers=[("x-request-timeout", "5")])
    run, waits = await play_all(harness, reply(429, retry_after="6"), call=call)
    assert (run.client.status, waits, run.client.headers["retry-after"]) == (429, [], "6")
    assert denied(harness, "deadline") == 1


async def test_timeout_of_the_sdk_is_a_deadline_too() -> None:
    harness = retry_harness()
    call = harness.call(headers=[("x-stainless-timeout", "1")])
    run, waits = await play_all(harness, failing(), call=call)
    assert (run.client.status, waits) == (502, [0.5])


# The budget


async def test_storm_of_failures_gets_a_fifth_of_the_calls_as_retries() -> None:
    harness = retry_harness(rand=0.0)
    async with harness:
        harness.upstream.answer = reply(503)
        for _ in range(1000):
            await play(harness)
    assert tries(harness) == 1000 + 20 + 200
    assert denied(harness, "budget") > 0
    assert retried(harness, "503") == 220


async def test_caller_is_told_when_the_budget_is_empty() -> None:
    harness = retry_harness(budget_share=0.0, budget_min_per_s=0.0)
    run, waits = await play_all(harness, reply(503))
    assert (waits, denied(harness, "budget")) == ([], 1)
    assert is_told_not_to_retry(run)


async def test_budget_is_the_upstream_s_over_reloads_and_teams() -> None:
    first = retry_harness(budget_share=0.0, budget_min_per_s=0.1, rand=0.0)
    second = retry_harness(budget_share=0.0, budget_min_per_s=0.1, rand=0.0)
    second.resources = first.resources
    second.filters[0].kit = first.filters[0].kit
    first.upstream.answer = second.upstream.answer = reply(503)
    async with first:
        await play(first)
        await play(second)
    assert (tries(first), tries(second)) == (2, 1)


async def test_retries_of_the_sdk_itself_are_counted_and_use_the_budget() -> None:
    harness = retry_harness(rand=0.0, budget_min_per_s=0.2)
    async with harness:
        harness.upstream.answer = reply(200, OK)
        for count in ("0", "1", "2"):
            headers = [("x-stainless-retry-count", count)]
            run, _ = await play(harness, harness.call(headers=headers))
            assert run.client.status == 200  # never refused
        harness.upstream.answer = reply(503)
        await play(harness)
    assert harness.value("llm_sidecar_client_retries", team="tests") == 2
    assert (tries(harness), denied(harness, "budget")) == (4, 1)


async def test_sdk_s_retry_is_counted_once_though_a_fallback_tries_two_targets() -> None:
    class TriesTwice(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            (await call_next(call)).discard()
            return await call_next(call)

    harness = Harness(TriesTwice, RetryCalls)
    call = harness.call(headers=[("x-stainless-retry-count", "1")])
    await play_all(harness, reply(200, OK), call=call)
    assert harness.value("llm_sidecar_client_retries", team="tests") == 1


# What an attempt is made of


class Spoils(AttemptFilter):
    """Changes whatever an attempt may be changed in."""

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        attempt.headers.add("x-attempt", str(attempt.number))
        del attempt.headers["x-keep"]
        attempt.path += "?spoiled"
        attempt.body += b"spoiled"
        return await call_next(attempt)


async def test_every_attempt_starts_from_the_pristine_request() -> None:
    sections = {"fake": RetryCalls.UpstreamConfig()}
    harness = Harness(Use(RetryCalls, {}, sections), Spoils)
    call = harness.call(headers=[("x-keep", "1"), ("x-other", "2")])
    body = call.body or b""
    await play_all(harness, reply(503), failing(), reply(200, OK), call=call)
    for number, sent in enumerate(harness.upstream.sent, 1):
        assert sent.headers == {"x-other": "2", "x-attempt": str(number)}
        assert sent.path == "/v1/chat/completions?spoiled"
        assert sent.body == body + b"spoiled"
    assert tries(harness) == 3


class FakeUpload:
    async def readany(self) -> bytes:
        return b""

    async def hold(self) -> bytes:
        return b"held"


@pytest.mark.parametrize("answer", [reply(503), reply(429, retry_after="1"), failing(Phase.SEND)])
async def test_body_that_streamed_is_never_sent_twice(answer: Answer) -> None:
    harness = retry_harness()
    call = harness.call()
    call.upload = FakeUpload()
    run, waits = await play_all(harness, answer, reply(200, OK), call=call)
    assert (tries(harness), waits) == (1, [])
    assert run.client.status >= 400
    assert not is_told_not_to_retry(run)
    assert denied(harness, "upload") == 1


@pytest.mark.parametrize("phase", [Phase.RESOLVE, Phase.CONNECT])
async def test_body_that_was_not_sent_yet_may_be(phase: Phase) -> None:
    harness = retry_harness()
    call = harness.call()
    call.upload = FakeUpload()
    run, _ = await play_all(harness, failing(phase), reply(200, OK), call=call)
    assert run.client.data == OK


async def test_body_that_was_held_after_all_may_be_sent_again() -> None:
    class Holds(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            await attempt.hold_body()
            return await call_next(attempt)

    harness = Harness(RetryCalls, Holds)
    call = harness.call()
    call.upload = FakeUpload()
    await play_all(harness, reply(503), reply(200, OK), call=call)
    assert [each.body for each in harness.upstream.sent] == [b"held"] * 2


@pytest.mark.parametrize(
    ("answer", "is_lost"),
    [
        (failing(Phase.SEND), True),
        (failing(Phase.HEAD), True),
        (failing(Phase.CONNECT), False),
        (reply(503), False),
    ],
)
async def test_input_of_an_attempt_that_may_have_been_worked_on_counts_as_lost(
    answer: Answer, is_lost: bool
) -> None:
    harness = retry_harness()
    run, _ = await play_all(harness, answer, reply(200, OK))
    lost = Usage(estimate_input(run.call), 0) if is_lost else None
    assert run.call.get(LOST_USAGE) == lost


@pytest.mark.parametrize("phase", [Phase.SEND, Phase.HEAD])
async def test_what_passes_through_and_may_have_been_done_is_not_sent_again(phase: Phase) -> None:
    harness = retry_harness()
    call = harness.call(b'{"input_file_id": "f"}', path="/fake/batches")
    run, waits = await play_all(harness, failing(phase), reply(200, OK), call=call)
    assert (tries(harness), waits) == (1, [])
    assert not is_told_not_to_retry(run)
    assert denied(harness, "repeat") == 1


async def test_path_that_we_do_not_know_and_may_have_begun_something_is_not_sent_again() -> None:
    harness = retry_harness()
    call = harness.call()
    call.endpoint = OTHER
    _, waits = await play_all(harness, failing(Phase.HEAD), reply(200, OK), call=call)
    assert (tries(harness), waits) == (1, [])


@pytest.mark.parametrize(
    ("answer", "method", "headers"),
    [
        (failing(Phase.CONNECT), "POST", []),
        (reply(503), "POST", []),
        (failing(Phase.HEAD), "GET", []),
        (failing(Phase.HEAD), "POST", [("idempotency-key", "k")]),
        (failing(Phase.FIRST_EVENT, provider_code="overloaded"), "POST", []),
    ],
)
async def test_what_passes_through_is_sent_again_where_that_is_safe(
    answer: Answer, method: str, headers: list[tuple[str, str]]
) -> None:
    harness = retry_harness()
    call = harness.call(b"{}", method=method, path="/fake/batches", headers=headers)
    run, _ = await play_all(harness, answer, reply(200, OK), call=call)
    assert (tries(harness), run.client.data) == (2, OK)


async def test_call_without_an_upstream_passes() -> None:
    harness = retry_harness()
    async with harness:
        run = await harness.run(harness.call(method="GET", path="/v1/models"))
    assert run.client.status == 200


# Leaving


Leave = Callable[[Run], None]


@pytest.mark.parametrize("answer", [reply(503), failing()])
@pytest.mark.parametrize("leave", [Run.client_leaves, Run.abort])
async def test_wait_ends_at_once_with_its_call(answer: Answer, leave: Leave) -> None:
    harness = retry_harness()
    async with harness:
        harness.upstream.answer = answer
        run = harness.start()
        await until(lambda: harness.clock._sleepers)
        harness.clock.turn(0.1)
        leave(run)
        await run.ended()
        assert not harness.clock._sleepers
        assert run.call.held_s == pytest.approx(0.1)
    assert tries(harness) == 1


async def test_client_that_leaves_while_a_refusal_is_read_leaves_nothing_open() -> None:
    harness = retry_harness()
    async with harness:
        harness.upstream.answer = harness.upstream.stream(b"{", status=503)
        run = harness.start()
        await harness.upstream.asked.wait()
        await until(lambda: "resume" in harness.upstream.source.asked)
        run.client_leaves()
        await run.ended()
        assert harness.upstream.source.is_aborted


Script = Callable[[Harness], Awaitable[None]]


async def fails_for_good(harness: Harness) -> None:
    one_after_the_other(harness, failing(), reply(503), failing())
    await play(harness)


async def gets_over_it(harness: Harness) -> None:
    one_after_the_other(harness, failing(), reply(503), reply(200, OK))
    await play(harness)


async def leaves(harness: Harness) -> None:
    harness.upstream.answer = failing()
    run = harness.start()
    await until(lambda: harness.clock._sleepers)
    run.client_leaves()
    await run.ended()


@pytest.mark.parametrize("script", [fails_for_good, gets_over_it, leaves])
async def test_nothing_of_a_call_or_its_attempts_is_kept(script: Script) -> None:
    class Marked:
        pass

    marks: list[weakref.ref[Any]] = []

    class Marks(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            mark = Marked()
            attempt.on_end(lambda end, mark=mark: None)  # type: ignore[misc]
            marks.append(weakref.ref(mark))
            return await call_next(attempt)

    harness = Harness(RetryCalls, Marks)
    gc.collect()
    gc.disable()
    try:
        async with harness:
            await script(harness)
            assert marks
            assert [mark() for mark in marks] == [None] * len(marks)
    finally:
        gc.enable()


# Cost and settings


async def test_call_that_works_costs_hardly_anything() -> None:
    """The promise is 2 µs; the bound here leaves room for a busy machine."""
    harness = retry_harness()
    answer = Reply.of(200, OK)
    call = harness.call()

    async def call_next(call: Call) -> Reply:
        return answer

    retry = harness.filters[0]
    assert isinstance(retry, RetryCalls)
    best = 1.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(200):
            await retry.handle(call, call_next)
        best = min(best, (time.perf_counter() - started) / 200)
    assert best < 6e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"max_attempts": 0},
        {"base_s": 0.0},
        {"max_s": 0.0},
        {"jitter": "none"},
        {"budget_share": -0.1},
        {"budget_min_per_s": -1.0},
        {"tries": 3},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RetryCalls.Config.model_validate(settings)


@pytest.mark.parametrize(
    "section",
    [{"provider": "acme"}, {"max_attempts": 0}, {"also_retry": [True]}, {"never_retry": "x"}],
)
def test_section_that_makes_no_sense_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RetryCalls.UpstreamConfig.model_validate(section)
