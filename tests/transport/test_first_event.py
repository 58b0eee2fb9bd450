"""`wait_for: event`: a 200 that begins with an error is a failed attempt, not an answer."""

from __future__ import annotations

import asyncio
import time

import pytest

from sidecar.call import Timeouts
from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.transport.upstream import LiveUpstream
from tests.support.attempts import Exchange, OpenUpstream, attached, make_attempt, until, whole
from tests.support.upstream import RawUpstream

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
ERROR = b'data: {"error": {"code": "overloaded", "message": "try later"}}\n\n'
EVENT = b'data: {"choices": []}\n\n'


@pytest.fixture
async def waiting(raw: RawUpstream, open_upstream: OpenUpstream) -> LiveUpstream:
    return open_upstream(raw.base_url, proxy="none", wait_for="event")


async def begin(
    upstream: LiveUpstream, raw: RawUpstream, timeouts: Timeouts | None = None
) -> Exchange:
    attempt = make_attempt(upstream, timeouts=timeouts)
    task = asyncio.create_task(upstream.send(attempt))
    connection = await raw.accept()
    return Exchange(task, connection, await connection.read_request())


async def test_error_event_fails_the_attempt_and_closes_the_connection(
    waiting: LiveUpstream, raw: RawUpstream
) -> None:
    exchange = await begin(waiting, raw)
    exchange.connection.write(STREAM + ERROR)
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    error = caught.value
    assert (error.phase, error.retry) == (Phase.FIRST_EVENT, Retry.SAME)
    assert "overloaded" in error.message
    assert (error.code, error.provider_code) == ("upstream_error_event", "overloaded")
    await exchange.connection.closed()


async def test_first_event_is_awaited_wherever_it_is_cut(
    waiting: LiveUpstream, raw: RawUpstream
) -> None:
    exchange = await begin(waiting, raw)
    exchange.connection.write(STREAM + b": a comment\n\n")
    for number in range(len(ERROR) - 1):
        exchange.connection.write(ERROR[number : number + 1])
        await asyncio.sleep(0)
    assert not exchange.reply.done()
    exchange.connection.write(b"\n")
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    assert caught.value.phase is Phase.FIRST_EVENT


async def test_event_that_is_no_error_lets_the_whole_stream_pass(
    waiting: LiveUpstream, raw: RawUpstream
) -> None:
    exchange = await begin(waiting, raw)
    exchange.connection.write(STREAM + EVENT[:5])
    exchange.connection.write(EVENT[5:])
    reply = await exchange.reply
    exchange.connection.write(ERROR)  # the second event is the client's
    exchange.connection.close()
    assert await whole(reply) == EVENT + ERROR


async def test_body_that_is_no_stream_is_not_looked_at(
    waiting: LiveUpstream, raw: RawUpstream
) -> None:
    exchange = await begin(waiting, raw)
    body = b'{"error": {"code": "x"}}'
    exchange.connection.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % len(body)
        + body
    )
    assert await whole(await exchange.reply) == body


async def test_stream_without_events_passes(waiting: LiveUpstream, raw: RawUpstream) -> None:
    exchange = await begin(waiting, raw)
    exchange.connection.write(STREAM + b": nothing\n\n")
    exchange.connection.close()
    assert await whole(await exchange.reply) == b": nothing\n\n"


async def test_first_event_larger_than_what_is_held_passes(
    waiting: LiveUpstream, raw: RawUpstream
) -> None:
    exchange = await begin(waiting, raw)
    event = b"data: " + b"x" * 200_000 + b"\n\n"
    exchange.connection.write(STREAM + event)
    sink = attached((await exchange.reply).body)
    exchange.connection.close()
    await sink.over()
    assert sink.data == event


async def test_upstream_that_dies_before_its_first_event_may_be_tried_again(
    waiting: LiveUpstream, raw: RawUpstream
) -> None:
    exchange = await begin(waiting, raw)
    exchange.connection.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        b"2\r\n: \r\n"
    )
    await until(lambda: "open=1" in repr(waiting.pool))
    exchange.connection.close()
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    assert caught.value.retry is Retry.SAME


async def test_first_event_that_does_not_come_in_time(
    waiting: LiveUpstream, raw: RawUpstream
) -> None:
    exchange = await begin(waiting, raw, Timeouts(first_byte_s=0.1))
    exchange.connection.write(STREAM + b": wait\n\n")
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    error = caught.value
    assert (error.phase, error.code, error.status) == (Phase.FIRST_EVENT, "upstream_timeout", 504)
    await exchange.connection.closed()


async def test_call_given_up_before_the_first_event_closes_its_connection_at_once(
    waiting: LiveUpstream, raw: RawUpstream
) -> None:
    exchange = await begin(waiting, raw)
    exchange.connection.write(STREAM + b": wait\n\n")
    (connection,) = waiting.pool._open
    await until(lambda: connection._body is not None and connection._body._more is not None)
    at = time.monotonic()
    exchange.reply.cancel()
    assert await exchange.connection.closed() - at < 0.05
    with pytest.raises(asyncio.CancelledError):
        await exchange.reply
