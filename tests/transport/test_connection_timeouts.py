"""Each wait has its limit, and the error says which one it was."""

from __future__ import annotations

import asyncio
import socket

import pytest

from sidecar.call import Timeouts
from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.transport.upstream import LiveUpstream
from tests.support.attempts import Begin, OpenUpstream, ScriptedUpload, attached, make_attempt
from tests.support.upstream import RawUpstream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"
SHORT_S = 0.08
SOON_S = 1.0
"""Far longer than SHORT_S, far shorter than any default."""


async def elapsed_s(work: asyncio.Task[object]) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.wait([work], timeout=5.0)
    return loop.time() - began


async def test_connect_that_nobody_accepts(open_upstream: OpenUpstream) -> None:
    async with RawUpstream(backlog=0) as full:
        # The kernel takes one connection for a backlog of 0, and lets the next ones wait.
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", full.port))
        try:
            upstream = open_upstream(full.base_url, proxy="none")
            attempt = make_attempt(upstream, timeouts=Timeouts(connect_s=SHORT_S))
            task = asyncio.create_task(upstream.send(attempt))
            assert await elapsed_s(task) < SOON_S
            error = task.exception()
            assert isinstance(error, UpstreamError)
            assert (error.phase, error.retry, error.status) == (Phase.CONNECT, Retry.SAME, 504)
            assert error.code == "upstream_connect_timeout"
        finally:
            for filler in fillers:
                filler.close()


async def test_tls_handshake_that_never_comes(open_upstream: OpenUpstream) -> None:
    async with RawUpstream() as silent:
        upstream = open_upstream(f"https://127.0.0.1:{silent.port}", proxy="none")
        attempt = make_attempt(upstream, timeouts=Timeouts(connect_s=SHORT_S))
        task = asyncio.create_task(upstream.send(attempt))
        connection = await silent.accept()
        assert await elapsed_s(task) < SOON_S
        error = task.exception()
        assert isinstance(error, UpstreamError)
        assert (error.phase, error.status) == (Phase.CONNECT, 504)
        await connection.closed()


async def test_answer_that_does_not_begin(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(first_byte_s=SHORT_S))
    assert await elapsed_s(exchange.reply) < SOON_S
    error = exchange.reply.exception()
    assert isinstance(error, UpstreamError)
    assert (error.phase, error.code, error.status) == (Phase.SEND, "upstream_timeout", 504)
    assert error.retry is Retry.SAME
    await exchange.connection.closed()


async def test_head_that_does_not_end(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(first_byte_s=SHORT_S))
    exchange.connection.write(b"HTTP/1.1 200 OK\r\nx: ")
    assert await elapsed_s(exchange.reply) < SOON_S
    error = exchange.reply.exception()
    assert isinstance(error, UpstreamError)
    assert (error.phase, error.code, error.status) == (Phase.HEAD, "upstream_timeout", 504)
    await exchange.connection.closed()


async def test_head_without_a_byte_of_the_body(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(first_byte_s=SHORT_S))
    exchange.connection.write(HEAD)
    assert await elapsed_s(exchange.reply) < SOON_S
    error = exchange.reply.exception()
    assert isinstance(error, UpstreamError)
    assert (error.phase, error.code, error.status) == (Phase.HEAD, "upstream_timeout", 504)
    assert error.retry is Retry.SAME
    await exchange.connection.closed()


async def test_interim_answers_do_not_prolong_the_wait(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(first_byte_s=SHORT_S))

    async def keep_saying_continue() -> None:
        while True:
            exchange.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await asyncio.sleep(SHORT_S / 8)

    talking = asyncio.create_task(keep_saying_continue())
    try:
        assert await elapsed_s(exchange.reply) < SOON_S
        assert isinstance(exchange.reply.exception(), UpstreamError)
    finally:
        talking.cancel()


async def test_upstream_that_does_not_read_an_upload(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    upload = ScriptedUpload(*[b"x" * 64 * 1024] * 400)
    attempt = make_attempt(upstream, upload=upload, timeouts=Timeouts(first_byte_s=SHORT_S))
    task = asyncio.create_task(upstream.send(attempt))
    sock = await raw.accept_socket()
    try:
        assert await elapsed_s(task) < SOON_S
        error = task.exception()
        assert isinstance(error, UpstreamError)
        assert (error.phase, error.code) == (Phase.SEND, "upstream_timeout")
    finally:
        sock.close()


async def test_silence_inside_the_body(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(silence_s=SHORT_S))
    exchange.connection.write(HEAD + b"first")
    sink = attached((await exchange.reply).body)
    await sink.over()
    error = sink.error
    assert isinstance(error, UpstreamError)
    assert (error.phase, error.code, error.status) == (Phase.BODY, "upstream_timeout", 504)
    assert error.retry is Retry.NO
    await exchange.connection.closed()


async def test_bytes_now_and_then_are_no_silence(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(silence_s=0.2))
    exchange.connection.write(HEAD)
    for _ in range(10):  # 0.5 s altogether
        exchange.connection.write(b"x")
        await asyncio.sleep(0.05)
    sink = attached((await exchange.reply).body)
    await sink.over()
    assert sink.data == b"x" * 10


async def test_pause_by_a_slow_client_is_no_silence(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(silence_s=SHORT_S))
    exchange.connection.write(HEAD + b"first")
    reply = await exchange.reply
    sink = attached(reply.body)
    reply.body.pause()
    with pytest.raises(TimeoutError):
        await sink.until(lambda: sink.is_over, within_s=4 * SHORT_S)
    reply.body.resume()
    exchange.connection.write(b" last")
    await sink.over()
    assert sink.data == b"first last"


async def test_silence_counts_anew_after_a_pause(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(silence_s=SHORT_S))
    exchange.connection.write(HEAD + b"first")
    reply = await exchange.reply
    sink = attached(reply.body)
    reply.body.pause()
    reply.body.resume()
    await sink.over()
    assert isinstance(sink.error, UpstreamError)


async def test_body_that_nobody_takes_yet_is_no_silence(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(silence_s=SHORT_S))
    exchange.connection.write(HEAD + b"first")
    reply = await exchange.reply
    closed = asyncio.create_task(exchange.connection.closed())
    await asyncio.wait([closed], timeout=3 * SHORT_S)
    assert not closed.done()
    exchange.connection.write(b" last")
    sink = attached(reply.body)
    await sink.over()
    assert sink.data == b"first last"


async def test_whole_attempt_before_the_answer(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(total_s=SHORT_S))
    assert await elapsed_s(exchange.reply) < SOON_S
    error = exchange.reply.exception()
    assert isinstance(error, UpstreamError)
    assert (error.phase, error.code, error.status) == (Phase.SEND, "upstream_timeout", 504)


async def test_whole_attempt_while_bytes_still_flow(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(total_s=0.2))
    exchange.connection.write(b"HTTP/1.1 200 OK\r\n\r\n")

    async def keep_talking() -> None:
        while True:
            exchange.connection.write(b"x")
            await asyncio.sleep(0.01)

    talking = asyncio.create_task(keep_talking())
    try:
        sink = attached((await exchange.reply).body)
        await sink.until(lambda: sink.is_over, within_s=SOON_S)
        error = sink.error
        assert isinstance(error, UpstreamError)
        assert (error.phase, error.code, error.retry) == (
            Phase.BODY,
            "upstream_timeout",
            Retry.NO,
        )
    finally:
        talking.cancel()


async def test_whole_attempt_while_the_client_is_paused(begin: Begin) -> None:
    exchange = await begin(timeouts=Timeouts(total_s=0.2, silence_s=0.05))
    exchange.connection.write(HEAD + b"first")
    reply = await exchange.reply
    sink = attached(reply.body)
    reply.body.pause()
    await sink.until(lambda: sink.is_over, within_s=SOON_S)
    assert isinstance(sink.error, UpstreamError)


async def test_whole_attempt_bounds_connecting_too(open_upstream: OpenUpstream) -> None:
    async with RawUpstream() as silent:
        upstream = open_upstream(f"https://127.0.0.1:{silent.port}", proxy="none")
        attempt = make_attempt(upstream, timeouts=Timeouts(total_s=SHORT_S))
        task = asyncio.create_task(upstream.send(attempt))
        await silent.accept()
        assert await elapsed_s(task) < SOON_S
        error = task.exception()
        assert isinstance(error, UpstreamError)
        assert (error.phase, error.status) == (Phase.CONNECT, 504)


async def test_kept_connection_has_no_timer_of_the_call_before(
    begin: Begin, upstream: LiveUpstream
) -> None:
    exchange = await begin(timeouts=Timeouts(silence_s=SHORT_S, total_s=2 * SHORT_S))
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    sink = attached((await exchange.reply).body)
    await sink.over()
    again = await begin(on=exchange.connection)
    done, _ = await asyncio.wait([again.reply], timeout=4 * SHORT_S)
    assert not done
    again.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    assert (await again.reply).status == 200
