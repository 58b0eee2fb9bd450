"""What is no HTTP/1.1 is refused, and bytes that nobody asked for never answer a call."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.transport.upstream import LiveUpstream
from tests.support.attempts import EMPTY_POOL, Begin, attached, make_attempt, until, whole
from tests.support.upstream import RawUpstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

BROKEN_HEADS = {
    "length and chunked": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    "chunked and length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Length: 2\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n",
    "list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\n",
    "signed length": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n",
    "huge length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    "bare LF after status": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "bare LF after field": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nA: x\nB: y\r\n\r\n",
    "bare CR in field": b"HTTP/1.1 200 OK\r\nA: x\ry\r\nContent-Length: 0\r\n\r\n",
    "folded field": b"HTTP/1.1 200 OK\r\nA: x\r\n y\r\nContent-Length: 0\r\n\r\n",
    "NUL in field": b"HTTP/1.1 200 OK\r\nA: x\0y\r\nContent-Length: 0\r\n\r\n",
    "space before colon": b"HTTP/1.1 200 OK\r\nA : x\r\nContent-Length: 0\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n",
    "short status": b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "request": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x16",
}


@pytest.mark.parametrize("head", BROKEN_HEADS.values(), ids=BROKEN_HEADS.keys())
async def test_broken_head_is_refused_and_the_connection_closed(
    begin: Begin, upstream: LiveUpstream, head: bytes
) -> None:
    exchange = await begin()
    exchange.connection.write(head)
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    error = caught.value
    assert (error.code, error.status) == ("upstream_protocol_error", 502)
    assert (error.phase, error.retry) == (Phase.HEAD, Retry.SAME)
    await exchange.connection.closed()
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


BROKEN_CHUNKS = {
    "negative size": b"-1\r\nx\r\n",
    "huge size": b"ffffffffffffffffff\r\n",
    "no size": b"\r\n",
    "size no hex": b"0x5\r\nhello\r\n",
    "space in size": b"1 \r\nx\r\n",
    "bare LF after size": b"1\nx\r\n",
    "bare LF after chunk": b"1\r\nx\n",
    "chunk longer than its size": b"1\r\nxy\r\n",
    "NUL in trailer": b"0\r\na: \0\r\n\r\n",
    "folded trailer": b"0\r\na: x\r\n y\r\n\r\n",
}


@pytest.mark.parametrize("chunk", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS.keys())
async def test_broken_chunk_breaks_the_answer_off(
    begin: Begin, upstream: LiveUpstream, chunk: bytes
) -> None:
    exchange = await begin()
    exchange.connection.write(CHUNKED + b"5\r\nfirst\r\n")
    sink = attached((await exchange.reply).body)
    exchange.connection.write(chunk)
    await sink.over()
    error = sink.error
    assert isinstance(error, UpstreamError)
    assert sink.data.startswith(b"first")
    assert (error.phase, error.retry, error.code) == (
        Phase.BODY,
        Retry.NO,
        "upstream_protocol_error",
    )
    await exchange.connection.closed()
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


@pytest.mark.parametrize("filler", [b"x: 1\r\n", b"x: " + b"y" * 1000 + b"\r\n", b"x"])
async def test_head_larger_than_128_kib_is_refused(begin: Begin, filler: bytes) -> None:
    exchange = await begin()
    count = 192 * 1024 // len(filler)
    exchange.connection.write(b"HTTP/1.1 200 OK\r\n" + filler * count)
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    assert caught.value.code == "upstream_protocol_error"
    await exchange.connection.closed()


async def test_head_of_100_kib_is_taken(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100 * 1024 + b"\r\ncontent-length: 2\r\n\r\nok"
    )
    reply = await exchange.reply
    assert len(reply.headers["x"]) == 100 * 1024
    assert await whole(reply) == b"ok"


async def test_trailers_without_end_are_refused(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(CHUNKED + b"5\r\nfirst\r\n0\r\nx: ")
    sink = attached((await exchange.reply).body)
    for _ in range(16):
        exchange.connection.write(b"y" * 64 * 1024)
    await sink.over()
    assert isinstance(sink.error, UpstreamError)
    assert sink.error.code == "upstream_protocol_error"


async def test_framing_between_the_bytes_of_a_long_stream_does_not_add_up(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(CHUNKED + b"1\r\nx\r\n")
    sink = attached((await exchange.reply).body)
    for number in range(2, 8):  # each time at least one read of nothing but framing
        exchange.connection.write(b"1;" + b"y" * 100 * 1024 + b"\r\nx\r\n")
        await sink.until(lambda number=number: len(sink.data) == number or sink.is_over)
    exchange.connection.write(b"0\r\n\r\n")
    await sink.over()
    assert sink.is_finished
    assert sink.data == b"x" * 7


# Bytes nobody asked for


@pytest.mark.parametrize(
    "first",
    [OK, b"HTTP/1.1 204 No Content\r\n\r\n", CHUNKED + b"2\r\nok\r\n0\r\n\r\n"],
)
async def test_second_answer_in_the_same_read_is_nobody_s(
    begin: Begin, raw: RawUpstream, first: bytes
) -> None:
    exchange = await begin()
    exchange.connection.write(first + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged")
    assert await whole(await exchange.reply) == (b"" if b"204" in first else b"ok")
    await exchange.connection.closed()
    again = await begin()
    again.connection.write(OK)
    assert await whole(await again.reply) == b"ok"
    assert raw.accepted == 2


async def test_garbage_after_an_answer_closes_the_connection(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(OK + b"garbage")
    assert await whole(await exchange.reply) == b"ok"
    await exchange.connection.closed()


@pytest.mark.parametrize(
    "unasked",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged",
        b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"H",
        b"\r\n",
        b"garbage",
    ],
)
async def test_idle_connection_that_gets_bytes_is_closed_and_not_used(
    begin: Begin, upstream: LiveUpstream, raw: RawUpstream, unasked: bytes
) -> None:
    exchange = await begin()
    exchange.connection.write(OK)
    assert await whole(await exchange.reply) == b"ok"
    assert "idle=1" in repr(upstream.pool)
    exchange.connection.write(unasked)
    await exchange.connection.closed()
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)
    again = await begin()
    again.connection.write(OK)
    assert await whole(await again.reply) == b"ok"
    assert raw.accepted == 2


async def test_body_of_a_head_answer_is_not_taken_for_the_next_answer(
    begin: Begin, raw: RawUpstream, upstream: LiveUpstream
) -> None:
    exchange = await begin(method="HEAD")
    forged = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"
    exchange.connection.write(
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(forged) + forged
    )
    assert await whole(await exchange.reply) == b""
    await exchange.connection.closed()


async def test_bytes_on_a_new_connection_before_the_request_are_no_answer(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    """The greeting of an SMTP server, say: it may only fail the call."""
    task = asyncio.create_task(upstream.send(make_attempt(upstream)))
    connection = await raw.accept()
    connection.write(b"220 mail.example ESMTP\r\n")
    with pytest.raises(UpstreamError):
        await task
