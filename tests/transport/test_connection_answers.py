"""Answers, byte for byte: where each ends, and whether the connection serves another."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.transport.upstream import LiveUpstream
from tests.support.attempts import EMPTY_POOL, Begin, attached, make_attempt, until, whole
from tests.support.upstream import RawUpstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def test_body_with_content_length_arrives_whole(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(
        b"HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nX-Two: 1\r\nX-Two: 2\r\n"
        b"Content-Length: 11\r\n\r\nhello world"
    )
    reply = await exchange.reply
    assert reply.status == 201
    assert reply.headers.getall("x-two") == ["1", "2"]
    assert reply.body.length == 11
    assert reply.body.media_type == "text/plain"
    assert await whole(reply) == b"hello world"


async def test_answer_split_at_every_byte_is_the_same_answer(begin: Begin) -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx: y\r\n\r\n"
        b"3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nt: v\r\n\r\n"
    )
    exchange = await begin()
    for cut in range(1, len(answer)):
        exchange.connection.write(answer[:cut])
        await asyncio.sleep(0)  # two reads, when the loop likes it
        exchange.connection.write(answer[cut:])
        reply = await exchange.reply
        assert await whole(reply) == b"abcde"
        assert reply.headers["x"] == "y"
        assert reply.body.trailers == [(b"t", b"v")]
        exchange = await begin(on=exchange.connection)
    exchange.connection.write(OK)
    assert await whole(await exchange.reply) == b"ok"


async def test_chunks_are_joined_and_their_extensions_ignored(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'5;name=value\r\nhello\r\n6;q="a;b"\r\n world\r\n0;last\r\n\r\n'
    )
    reply = await exchange.reply
    assert reply.body.length is None
    assert "transfer-encoding" not in reply.headers
    assert await whole(reply) == b"hello world"


async def test_trailers_are_kept_and_are_not_headers_of_the_next_answer(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        b"2\r\nok\r\n0\r\nx-checksum: 1\r\nx-end: a\r\n\r\n"
    )
    reply = await exchange.reply
    assert await whole(reply) == b"ok"
    assert reply.body.trailers == [(b"x-checksum", b"1"), (b"x-end", b"a")]
    again = await begin(on=exchange.connection)
    again.connection.write(OK)
    reply = await again.reply
    assert set(reply.headers) <= {"content-length"}
    assert reply.body.trailers == []
    assert await whole(reply) == b"ok"


async def test_body_without_framing_ends_with_the_connection(
    begin: Begin, upstream: LiveUpstream
) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\n\r\nfirst ")
    sink = attached((await exchange.reply).body)
    exchange.connection.write(b"second")
    await sink.until(lambda: sink.data == b"first second")
    assert not sink.is_over
    exchange.connection.close()
    await sink.over()
    assert sink.is_finished
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


async def test_body_without_framing_that_ends_in_a_reset_has_failed(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\n\r\nfirst")
    sink = attached((await exchange.reply).body)
    await sink.until(lambda: sink.data == b"first")
    exchange.connection.reset()
    await sink.over()
    assert isinstance(sink.error, UpstreamError)
    assert (sink.error.phase, sink.error.retry) == (Phase.BODY, Retry.NO)


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("POST", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("POST", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
        ("POST", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        ("POST", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ],
)
async def test_answer_without_body_is_whole_at_its_head_and_keeps_the_connection(
    begin: Begin, method: str, head: bytes
) -> None:
    exchange = await begin(method=method)
    exchange.connection.write(head)
    reply = await asyncio.wait_for(exchange.reply, 2.0)
    assert reply.body.is_whole
    assert await whole(reply) == b""
    again = await begin(on=exchange.connection)
    again.connection.write(OK)
    assert await whole(await again.reply) == b"ok"


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ],
)
async def test_answer_without_body_is_whole_at_its_head_whatever_its_framing_says(
    begin: Begin, method: str, head: bytes
) -> None:
    exchange = await begin(method=method)
    exchange.connection.write(head)
    reply = await asyncio.wait_for(exchange.reply, 2.0)
    assert await whole(reply) == b""


async def test_interim_answers_are_skipped(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 100 Continue\r\nx-interim: 1\r\n\r\n")
    exchange.connection.write(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK)
    reply = await exchange.reply
    assert reply.status == 200
    assert set(reply.headers) <= {"content-length"}
    assert await whole(reply) == b"ok"
    again = await begin(on=exchange.connection)
    again.connection.write(OK)
    assert await whole(await again.reply) == b"ok"


async def test_switching_protocols_is_refused(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    )
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    assert caught.value.code == "upstream_protocol_error"
    await exchange.connection.closed()


async def test_compressed_body_passes_as_it_came(begin: Begin) -> None:
    packed = gzip.compress(b"a" * 1000)
    exchange = await begin()
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    exchange.connection.write(head + packed)
    reply = await exchange.reply
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.body.encoding == "gzip"
    assert await whole(reply) == packed


async def test_hop_by_hop_fields_are_not_passed_on(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nKeep-Alive: timeout=5\r\n"
        b"X-Hop: 1\r\nProxy-Authenticate: Basic\r\nTE: trailers\r\nTrailer: t\r\nX-End: 1\r\n"
        b"Content-Length: 0\r\n\r\n"
    )
    reply = await exchange.reply
    assert {name.lower() for name in reply.headers} - {"content-length"} == {"x-end"}


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive, Close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_connection_is_closed_after_an_answer_that_says_so(
    begin: Begin, upstream: LiveUpstream, answer: bytes
) -> None:
    exchange = await begin()
    exchange.connection.write(answer)
    assert await whole(await exchange.reply) == b"ok"
    await exchange.connection.closed()
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


async def test_http_1_0_connection_is_kept_when_it_says_so(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"
    )
    assert await whole(await exchange.reply) == b"ok"
    again = await begin(on=exchange.connection)
    again.connection.write(OK)
    assert await whole(await again.reply) == b"ok"


async def test_calls_one_after_another_share_one_connection(begin: Begin, raw: RawUpstream) -> None:
    exchange = await begin()
    for _ in range(20):
        exchange.connection.write(OK)
        assert await whole(await exchange.reply) == b"ok"
        exchange = await begin(on=exchange.connection)
    exchange.connection.write(OK)
    assert await whole(await exchange.reply) == b"ok"
    assert raw.accepted == 1
    assert not raw.has_waiting()


async def test_large_body_arrives_byte_for_byte(begin: Begin) -> None:
    data = bytes(range(256)) * 16 * 1024  # 4 MiB
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data))
    exchange.connection.write(data)
    assert await whole(await exchange.reply) == data


async def test_reply_comes_with_the_first_byte_of_the_body_not_with_the_head(
    begin: Begin,
) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
    done, _ = await asyncio.wait([exchange.reply], timeout=0.05)
    assert not done
    exchange.connection.write(b"o")
    sink = attached((await exchange.reply).body)
    assert sink.data == b"o"
    exchange.connection.write(b"k")
    await sink.over()
    assert sink.data == b"ok"


# An upstream that dies


async def test_upstream_that_dies_before_its_answer(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.close()
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    error = caught.value
    assert (error.phase, error.retry, error.status) == (Phase.SEND, Retry.SAME, 502)


async def test_upstream_that_dies_inside_the_head(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\nconte")
    exchange.connection.close()
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    error = caught.value
    assert (error.phase, error.retry, error.status) == (Phase.HEAD, Retry.SAME, 502)


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\na\r\nfirst",
    ],
)
async def test_upstream_that_dies_inside_the_body(begin: Begin, answer: bytes, ending: str) -> None:
    exchange = await begin()
    exchange.connection.write(answer)
    sink = attached((await exchange.reply).body)
    await sink.until(lambda: sink.data == b"first")
    getattr(exchange.connection, ending)()
    await sink.over()
    error = sink.error
    assert isinstance(error, UpstreamError)
    assert (error.phase, error.retry, error.code) == (Phase.BODY, Retry.NO, "upstream_closed")


async def test_body_that_died_before_anybody_took_it_fails_when_it_is_taken(
    begin: Begin,
) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst")
    reply = await exchange.reply
    exchange.connection.close()
    sink = attached(reply.body)
    await sink.over()
    assert sink.data == b"first"
    assert isinstance(sink.error, UpstreamError)


async def test_many_calls_at_once_get_their_own_answers(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    async def call_one(number: int) -> bytes:
        reply = await upstream.send(make_attempt(upstream, "GET", f"/{number}"))
        return await whole(reply)

    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(call_one(number)) for number in range(30)]
        for connection in [await raw.accept() for _ in calls][::-1]:
            name = (await connection.read_request()).split(b" ")[1]
            connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(name) + name)
    assert [call.result() for call in calls] == [b"/%d" % number for number in range(30)]
