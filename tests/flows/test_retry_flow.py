"""Retry over real sockets: what upstreams get, what the official SDKs make of it, and how long it
takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import anthropic
import openai
import pytest

from tests.support.flow import HELLO, Flow, Start, chat_body, chat_request, request, until
from tests.support.upstream import RawUpstream

CHAIN = """
filters: {retry: {base_s: 0.02, max_s: 3.0, jitter: equal}}
chains: {default: {call: [access_log, retry], attempt: [sign]}}
"""
ANSWER = (
    b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n{"ok": true}'
)


@pytest.fixture
async def retrying(start: Start) -> Flow:
    """A sidecar that retries with short waits, before a provider that does as it is told."""
    return await start(CHAIN)


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


def count(flow: Flow) -> int:
    """How often the provider was asked."""
    return len(flow.provider.books.requests)


def gaps(flow: Flow) -> list[float]:
    """Seconds between the provider's requests."""
    times = [each.arrived_at for each in flow.provider.books.requests]
    return [later - earlier for earlier, later in pairwise(times)]


def told(status: int, **more: str) -> dict[str, str]:
    """Headers that make the provider answer so."""
    named = {f"x-mock-{name.replace('_', '-')}": value for name, value in more.items()}
    return {"x-mock-status": str(status), **named}


async def chat(flow: Flow, *, retries: int = 2, **more: Any) -> Any:
    """A chat by OpenAI's SDK, which retries by itself unless it is told not to."""
    async with flow.openai() as client:
        patient = client.with_options(max_retries=retries)
        return await patient.chat.completions.create(model="gpt", messages=HELLO, **more)


async def message(flow: Flow, **more: Any) -> Any:
    """The same by Anthropic's."""
    async with flow.anthropic() as client:
        patient = client.with_options(max_retries=2)
        return await patient.messages.create(model="claude", max_tokens=9, messages=HELLO, **more)


# With the official SDKs


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_s_sdk_does_not_multiply_our_tries(retrying: Flow, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await chat(retrying, stream=stream, extra_headers=told(503))
    assert count(retrying) == 4
    assert caught.value.response.headers["x-should-retry"] == "false"


async def test_anthropic_s_sdk_does_not_multiply_our_tries(retrying: Flow) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        await message(retrying, extra_headers=told(529))
    assert caught.value.status_code == 529
    assert count(retrying) == 4


async def test_sdk_that_is_not_told_makes_twelve_calls_of_four(start: Start) -> None:
    """So that the tests above prove what they say."""
    flow = await start(CHAIN.replace("jitter:", "tell_client: false, jitter:"))
    with pytest.raises(openai.InternalServerError):
        await chat(flow, extra_headers=told(503, retry_after="0.01"))
    assert count(flow) == 12


async def test_sdk_does_not_multiply_our_tries_when_nobody_answers(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(f"{CHAIN}\nupstreams: {{up-openai: {{base_url: '{raw.base_url}'}}}}")
    asking = asyncio.create_task(chat(flow))
    for _ in range(4):
        (await raw.accept()).abort()
    with pytest.raises(openai.APIStatusError) as caught:
        await asking
    assert caught.value.status_code == 502
    assert raw.accepted == 4
    assert not raw.has_waiting()


@pytest.mark.parametrize("encoding", [{}, {"encoding": "gzip"}])
async def test_money_that_is_gone_is_asked_for_once(
    retrying: Flow, encoding: dict[str, str]
) -> None:
    headers = told(429, error_code="insufficient_quota", **encoding)
    with pytest.raises(openai.RateLimitError) as caught:
        await chat(retrying, extra_headers=headers)
    assert caught.value.code == "insufficient_quota"
    assert count(retrying) == 1
    with pytest.raises(anthropic.RateLimitError):
        await message(retrying, extra_headers=told(429, error_code="enforced_spend_limit_reached"))
    assert count(retrying) == 2


async def test_callers_of_both_sdks_never_see_what_passed(start: Start) -> None:
    script = """
    - match: {nth: 1, model: gpt}
      status: 503
    - match: {nth: 2, model: gpt}
      status: 429
      retry_after: 0.05
    - match: {nth: 3, model: gpt}
      die: head
    - match: {nth: 1, model: claude}
      status: 529
    """
    flow = await start(CHAIN, script=script)
    answer = await chat(flow, retries=0)
    assert answer.choices[0].message.content
    assert count(flow) == 4
    said = await message(flow)
    assert said.content
    assert count(flow) == 6


async def test_timeout_of_the_sdk_bounds_our_waiting(retrying: Flow) -> None:
    with pytest.raises(openai.InternalServerError):
        await chat(retrying, retries=0, timeout=1.0, extra_headers=told(503, retry_after="0.6"))
    assert count(retrying) == 2


# Waits


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_in_seconds_is_waited_for(retrying: Flow, status: int) -> None:
    script_headers = {"x_mock_status": str(status), "x_mock_retry_after": "0.2"}
    answer = await retrying.call(chat_request(**script_headers))
    assert answer.status == status
    assert len(gaps(retrying)) == 3
    assert all(0.2 <= gap < 1.0 for gap in gaps(retrying)), gaps(retrying)


async def test_retry_after_as_a_date_is_waited_for_by_the_upstream_s_own_clock(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(f"{CHAIN}\nupstreams: {{up-openai: {{base_url: '{raw.base_url}'}}}}")
    client = await flow.connect()
    client.send(chat_request())
    connection = await raw.accept()
    await connection.read_request()
    connection.write(
        b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n"
        b"date: Mon, 01 Jul 2024 08:00:00 GMT\r\n"
        b"retry-after: Mon, 01 Jul 2024 08:00:01 GMT\r\n\r\n"
    )
    began_at = asyncio.get_running_loop().time()
    await connection.read_request()
    assert 1.0 <= asyncio.get_running_loop().time() - began_at < 2.0
    connection.write(ANSWER)
    assert (await client.answer()).status == 200


async def test_long_retry_after_is_the_caller_s(retrying: Flow) -> None:
    answer = await retrying.call(chat_request(x_mock_status="429", x_mock_retry_after="30"))
    assert (answer.status, answer.header("retry-after")) == (429, "30")
    assert answer.header("x-should-retry") is None
    assert count(retrying) == 1


async def test_deadline_of_the_caller_is_kept(retrying: Flow) -> None:
    began_at = asyncio.get_running_loop().time()
    answer = await retrying.call(
        chat_request(x_request_timeout="1", x_mock_status="503", x_mock_retry_after="0.6")
    )
    assert asyncio.get_running_loop().time() - began_at < 1.0
    assert (answer.status, answer.error["type"]) == (503, "server_error")
    assert count(retrying) == 2


@pytest.mark.parametrize("how", ["leave", "reset"])
async def test_client_that_leaves_during_the_wait_ends_it(retrying: Flow, how: str) -> None:
    client = await retrying.connect()
    client.send(chat_request(x_mock_status="503", x_mock_retry_after="2.5"))
    await until(lambda: count(retrying) == 1 and retrying.running() == {"calls": 1})
    left_at = asyncio.get_running_loop().time()
    getattr(client, how)()
    await retrying.quiet()
    assert asyncio.get_running_loop().time() - left_at < 1.0
    assert count(retrying) == 1


# Before the first byte, and not after it


async def test_error_that_is_the_first_event_is_tried_again(start: Start) -> None:
    script = """
    - match: {nth: 1}
      error_event: 0
    - match: {nth: 2}
      error_event: 0
      error_code: overloaded
    """
    waits = "upstreams: {up-openai: {wait_for: event}, up-anthropic: {wait_for: event}}"
    flow = await start(f"{CHAIN}\n{waits}", script=script)
    async with flow.openai() as client:
        stream = await client.chat.completions.create(model="gpt", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert count(flow) == 3


async def test_first_event_that_speaks_of_money_is_not(start: Start) -> None:
    flow = await start(f"{CHAIN}\nupstreams: {{up-openai: {{wait_for: event}}}}")
    headers = {"x-mock-error-event": "0", "x-mock-error-code": "insufficient_quota"}
    with pytest.raises(openai.APIStatusError) as caught:
        await chat(flow, stream=True, extra_headers=headers)
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert count(flow) == 1


@pytest.mark.parametrize("stop", [{"x_mock_die": "events:3"}, {"x_mock_error_event": "2"}])
async def test_nothing_is_tried_again_after_the_first_byte(
    retrying: Flow, stop: dict[str, str]
) -> None:
    await retrying.call(chat_request(stream=True, **stop))
    assert count(retrying) == 1


async def test_connection_that_dies_before_or_within_the_head_is_tried_again(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(f"{CHAIN}\nupstreams: {{up-openai: {{base_url: '{raw.base_url}'}}}}")
    client = await flow.connect()
    client.send(chat_request())
    for part in (b"", b"HTTP/1.1 200 OK\r\ncontent-le"):
        connection = await raw.accept()
        await connection.read_request()
        connection.write(part)
        connection.close()
    connection = await raw.accept()
    await connection.read_request()
    connection.write(ANSWER)
    assert (await client.answer()).json == {"ok": True}


# The request


async def test_every_try_is_the_same_request(retrying: Flow) -> None:
    body = chat_body(unknown=[1.0, {"é": None}])
    data = request("POST", "/v1/chat/completions", body, {"x-mock-status": "503", "x-mine": "1"})
    answer = await retrying.call(data)
    assert answer.status == 503
    first, *others = retrying.provider.books.requests
    assert first.body == body
    assert first.header("x-mine") == "1"
    assert len(others) == 3
    for other in others:
        assert (other.raw_headers, other.body, other.path) == (
            *(first.raw_headers, first.body, first.path),
        )


async def test_upload_that_streamed_is_not_sent_again(retrying: Flow) -> None:
    data = b"x" * 200_000
    fields = {"content-type": "application/octet-stream", "x-mock-status": "503"}
    answer = await retrying.call(request("POST", "/up-openai/v1/files", data, fields))
    assert answer.status == 503
    (received,) = retrying.provider.books.requests
    assert received.body_bytes == len(data)
    assert answer.header("x-should-retry") is None
