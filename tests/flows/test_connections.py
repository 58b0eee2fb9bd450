"""A client's connection over several calls: kept, pipelined, closed when it must be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.flow import CHAT, Flow, Start, chat_body, chat_request, request
from tests.support.upstream import RawUpstream


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


async def test_calls_follow_each_other_on_one_connection(flow: Flow) -> None:
    client = await flow.connect()
    for model in ("gpt", "claude", "gpt"):
        for stream in (False, True):
            answer = await client.call(chat_request(model, stream=stream))
            assert (answer.status, answer.is_whole) == (200, True)
            assert answer.header("connection") is None
    assert len(flow.connections) == 1
    assert len(flow.provider.books.requests) == 6


async def test_pipelined_calls_are_answered_in_order(flow: Flow) -> None:
    client = await flow.connect()
    texts = [f"answer{number}" for number in range(20)]
    client.send(
        b"".join(
            chat_request(stream=number % 2 == 1, x_mock_text=text)
            for number, text in enumerate(texts)
        )
    )
    for text in texts:
        answer = await client.answer()
        assert answer.is_whole
        assert text.encode() in answer.body
    assert len(flow.provider.books.requests) == 20


async def test_pipelined_calls_run_one_after_the_other(flow: Flow) -> None:
    client = await flow.connect()
    client.send(chat_request(x_mock_first_delay_ms="20") * 3)
    for _ in range(3):
        assert (await client.answer()).status == 200
        assert flow.provider.open_requests <= 1
    first, second, third = flow.provider.books.requests
    assert first.finished_at is not None
    assert second.finished_at is not None
    assert first.finished_at <= second.arrived_at
    assert second.finished_at <= third.arrived_at


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (chat_request("none"), 404),
        (request("POST", CHAT, b"{nonsense"), 400),
        (request("POST", CHAT, b"[]"), 400),
        (request("POST", CHAT, b"{}"), 400),
        (request("POST", CHAT), 400),
        (request("GET", "/nowhere"), 404),
        (chat_request(x_mock_status="500"), 500),
        (chat_request(x_mock_status="429"), 429),
        (chat_request(x_mock_die="head"), 502),
        (request("GET", CHAT), 405),
    ],
)
async def test_a_good_call_follows_an_error_on_the_same_connection(
    flow: Flow, bad: bytes, status: int
) -> None:
    client = await flow.connect()
    assert (await client.call(bad)).status == status
    assert (await client.call(chat_request())).status == 200


async def test_connection_close_is_obeyed(flow: Flow) -> None:
    for stream in (False, True):
        client = await flow.connect()
        answer = await client.call(chat_request(stream=stream, connection="close"))
        assert answer.is_whole
        assert answer.header("connection") == "close"
        assert await client.is_closed()


@pytest.mark.parametrize("stream", [False, True])
async def test_http_1_0_without_keep_alive_is_closed(flow: Flow, stream: bool) -> None:
    client = await flow.connect()
    answer = await client.call(request("POST", CHAT, chat_body(stream=stream), version="1.0"))
    assert (answer.status, answer.is_whole) == (200, True)
    assert answer.header("transfer-encoding") is None
    assert await client.is_closed()


async def test_http_1_0_with_keep_alive_is_kept_and_told_so(flow: Flow) -> None:
    client = await flow.connect()
    fields = {"connection": "keep-alive"}
    for body, status in ((chat_body(), 200), (chat_body("none"), 404), (chat_body(), 200)):
        answer = await client.call(request("POST", CHAT, body, fields, version="1.0"))
        assert answer.status == status
        assert answer.header("connection") == "keep-alive"
    streamed = await client.call(
        request("POST", CHAT, chat_body(stream=True), fields, version="1.0")
    )
    assert streamed.body.endswith(b"data: [DONE]\n\n")
    assert streamed.header("connection") == "close"
    assert await client.is_closed()


async def test_a_stream_to_http_1_0_has_the_same_bytes_without_chunks(flow: Flow) -> None:
    new = await flow.call(chat_request(stream=True))
    old = await flow.call(request("POST", CHAT, chat_body(stream=True), version="1.0"))
    assert old.body == new.body


async def test_an_early_error_while_the_body_still_comes_is_readable(flow: Flow) -> None:
    client = await flow.connect()
    head = request("GET", "/nowhere", b"", {"content-length": "1000000"})
    client.send(head + b"x" * 1000)
    answer = await client.answer()
    assert (answer.status, answer.header("connection")) == (404, "close")
    client.send(b"x" * 1000)
    client.leave()


async def test_a_body_that_was_not_read_is_never_the_next_request(flow: Flow) -> None:
    client = await flow.connect()
    second = chat_request()
    head = request("GET", "/nowhere", b"", {"content-length": str(len(second) + 100_000)})
    client.send(head + second + b" " * 100)
    assert (await client.answer()).status == 404
    client.send(second + b" " * 99_000)
    assert b"HTTP/1.1 200" not in await client.rest()
    assert not flow.provider.books.requests


async def test_an_upstream_connection_is_used_again(start: Start, raw: RawUpstream) -> None:
    flow = await start(f"upstreams: {{up-openai: {{base_url: '{raw.base_url}/v1'}}}}")
    client, other = await flow.connect(), await flow.connect()
    connection = None
    for each in (client, other, client):
        each.send(chat_request())
        connection = connection or await raw.accept()
        await connection.read_request()
        connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        assert (await each.answer()).body == b"{}"
    assert raw.accepted == 1
    assert connection is not None
    connection.close()


async def test_two_answers_never_get_mixed_up(flow: Flow) -> None:
    """Many calls at the same time over few connections, each with its own text."""

    async def talk(number: int) -> None:
        client = await flow.connect()
        for turn in range(10):
            text = f"mine{number}x{turn}x"
            answer = await client.call(
                chat_request(stream=turn % 2 == 0, x_mock_text=text, x_mock_split="11")
            )
            assert text.encode() in answer.body.replace(b'"', b"")
            assert answer.is_whole
        client.leave()

    await asyncio.gather(*(talk(number) for number in range(20)))
