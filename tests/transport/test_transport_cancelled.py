"""A call that is given up closes its connection at once, whatever it was doing."""

from __future__ import annotations

import asyncio
import time

import pytest

from sidecar.call import Outcome
from sidecar.reply import Reply
from sidecar.transport.connection import Connection
from sidecar.transport.upstream import LiveUpstream
from tests.support.attempts import (
    EMPTY_POOL,
    Begin,
    OpenUpstream,
    ScriptedUpload,
    attached,
    make_attempt,
    until,
    whole,
)
from tests.support.proxy import ConnectProxy
from tests.support.upstream import RawConnection, RawUpstream

AT_ONCE_S = 0.05
"""Generous: the promise is 5 ms, but both ends and the test share one loop here."""


async def cancelled(task: asyncio.Task[Reply]) -> float:
    """Cancel, and the time of it."""
    at = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return at


async def closes_at_once(connection: RawConnection, cancelled_at: float) -> None:
    assert await connection.closed() - cancelled_at < AT_ONCE_S


async def test_while_the_name_is_looked_up(
    open_upstream: OpenUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    asked, answered = asyncio.Event(), asyncio.Event()

    async def slow_getaddrinfo(*args: object, **kwargs: object) -> list[object]:
        asked.set()
        await answered.wait()
        raise OSError("nobody waits for this")

    upstream = open_upstream("http://slow.test", proxy="none")
    monkeypatch.setattr(type(loop), "getaddrinfo", slow_getaddrinfo, raising=True)
    task = asyncio.create_task(upstream.send(make_attempt(upstream)))
    await asked.wait()
    await cancelled(task)
    assert repr(upstream.pool) == EMPTY_POOL
    answered.set()  # the look-up itself is shared and ends by itself


async def test_while_waiting_for_a_connection(
    raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(raw.base_url, proxy="none", pool={"max_connections": 1})
    running = asyncio.create_task(upstream.send(make_attempt(upstream)))
    connection = await raw.accept()
    waiting = asyncio.create_task(upstream.send(make_attempt(upstream)))
    await until(lambda: "waiting=1" in repr(upstream.pool))
    await cancelled(waiting)
    assert repr(upstream.pool) == "<Pool open=1 idle=0 connecting=0 waiting=0>"
    await closes_at_once(connection, await cancelled(running))


async def test_while_connecting(open_upstream: OpenUpstream) -> None:
    async with RawUpstream(backlog=0) as full:
        upstreams = [open_upstream(full.base_url, proxy="none") for _ in range(4)]
        tasks = [asyncio.create_task(each.send(make_attempt(each))) for each in upstreams]
        await until(lambda: sum("open=1" in repr(each.pool) for each in upstreams) == 1)
        for task in tasks:
            await cancelled(task)
        for upstream in upstreams:
            await until(lambda pool=upstream.pool: repr(pool) == EMPTY_POOL, within_s=AT_ONCE_S)


async def test_in_the_tls_handshake(open_upstream: OpenUpstream, raw: RawUpstream) -> None:
    upstream = open_upstream(f"https://127.0.0.1:{raw.port}", proxy="none")
    task = asyncio.create_task(upstream.send(make_attempt(upstream)))
    connection = await raw.accept()
    assert (await connection.read_exactly(1)) == b"\x16"
    await closes_at_once(connection, await cancelled(task))
    assert repr(upstream.pool) == EMPTY_POOL


async def test_while_the_proxy_opens_the_tunnel(
    open_upstream: OpenUpstream, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", raw.base_url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    upstream = open_upstream("https://192.0.2.1")
    task = asyncio.create_task(upstream.send(make_attempt(upstream)))
    connection = await raw.accept()
    assert (await connection.read_head()).startswith(b"CONNECT 192.0.2.1:443 ")
    await closes_at_once(connection, await cancelled(task))
    assert repr(upstream.pool) == EMPTY_POOL


async def test_in_the_tls_handshake_behind_a_proxy(
    open_upstream: OpenUpstream, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ConnectProxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "")
        upstream = open_upstream(f"https://127.0.0.1:{raw.port}")
        task = asyncio.create_task(upstream.send(make_attempt(upstream)))
        connection = await raw.accept()
        assert (await connection.read_exactly(1)) == b"\x16"
        await closes_at_once(connection, await cancelled(task))
        assert repr(upstream.pool) == EMPTY_POOL


async def test_while_waiting_for_the_answer(begin: Begin, upstream: LiveUpstream) -> None:
    exchange = await begin()
    await closes_at_once(exchange.connection, await cancelled(exchange.reply))
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


async def test_inside_the_head(begin: Begin, upstream: LiveUpstream) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\nx: ")
    (connection,) = upstream.pool._open
    await until(lambda: connection._head_bytes > 0)
    await closes_at_once(exchange.connection, await cancelled(exchange.reply))


async def test_between_the_head_and_the_first_byte(begin: Begin, upstream: LiveUpstream) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
    (connection,) = upstream.pool._open
    await until(lambda: connection._reply is not None)
    await closes_at_once(exchange.connection, await cancelled(exchange.reply))


@pytest.mark.parametrize("is_taken", [True, False])
async def test_inside_the_body(begin: Begin, upstream: LiveUpstream, is_taken: bool) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst")
    reply = await exchange.reply
    sink = attached(reply.body) if is_taken else None
    at = time.monotonic()
    reply.body.abort(Outcome.CLIENT_GONE)
    await closes_at_once(exchange.connection, at)
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)
    assert sink is None or not sink.is_over


async def test_inside_the_body_while_paused(begin: Begin) -> None:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst")
    reply = await exchange.reply
    attached(reply.body)
    reply.body.pause()
    at = time.monotonic()
    reply.body.abort(Outcome.CLIENT_GONE)
    await closes_at_once(exchange.connection, at)


async def test_from_inside_a_write_of_the_body(begin: Begin, upstream: LiveUpstream) -> None:
    exchange = await begin()
    exchange.connection.write(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n"
    )
    reply = await exchange.reply
    seen: list[bytes] = []

    class Leaving:
        def write(self, data: bytes) -> None:
            seen.append(data)
            if len(seen) == 2:
                reply.body.abort(Outcome.CLIENT_GONE)

        def finish(self) -> None:
            raise AssertionError("not the whole")

        def fail(self, error: Exception) -> None:
            raise AssertionError("nobody is left to be told")

    reply.body.attach(Leaving())
    exchange.connection.write(b"6\r\nsecond\r\n")
    await exchange.connection.closed()
    assert seen == [b"first", b"second"]
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


@pytest.mark.parametrize("is_full", [True, False])
async def test_inside_an_upload(raw: RawUpstream, upstream: LiveUpstream, is_full: bool) -> None:
    upload = ScriptedUpload(*[b"x" * 64 * 1024] * (400 if is_full else 1))
    task = asyncio.create_task(upstream.send(make_attempt(upstream, upload=upload)))
    connection = await raw.accept()
    if is_full:
        (ours,) = upstream.pool._open
        await until(lambda: ours._writable is not None)
    else:
        await connection.read_head()
    at = await cancelled(task)
    await closes_at_once(connection, at)
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)
    await until(lambda: len(asyncio.all_tasks()) == 1)


async def test_in_the_turn_that_brings_the_whole_answer(
    begin: Begin, upstream: LiveUpstream
) -> None:
    """The connection is free already, perhaps another's: it must not be closed."""
    exchange = await begin()
    released = upstream.pool.released

    def released_and_cancelled(which: Connection) -> None:
        upstream.pool.released = released  # type: ignore[method-assign]
        released(which)
        exchange.reply.cancel()

    upstream.pool.released = released_and_cancelled  # type: ignore[method-assign]
    ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    exchange.connection.write(ok)
    with pytest.raises(asyncio.CancelledError):
        await exchange.reply
    again = await begin(on=exchange.connection)
    again.connection.write(ok)
    assert await whole(await again.reply) == b"ok"


async def test_in_the_turn_that_brings_the_first_byte(
    begin: Begin, upstream: LiveUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = await begin()
    answer = Connection._answer

    def answer_and_cancel(connection: Connection) -> None:
        answer(connection)
        exchange.reply.cancel()

    monkeypatch.setattr(Connection, "_answer", answer_and_cancel)
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nf")
    with pytest.raises(asyncio.CancelledError):
        await exchange.reply
    await exchange.connection.closed()
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


async def test_in_the_turn_before_the_first_byte_is_read(
    begin: Begin, upstream: LiveUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiting was cancelled, but the task has not run since: nobody will take the answer."""
    exchange = await begin()
    flush = Connection._flush

    def cancel_and_flush(connection: Connection) -> None:
        exchange.reply.cancel()
        flush(connection)

    monkeypatch.setattr(Connection, "_flush", cancel_and_flush)
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nf")
    with pytest.raises(asyncio.CancelledError):
        await exchange.reply
    await exchange.connection.closed()
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


async def test_many_calls_cancelled_at_random_moments_leak_nothing(
    raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(raw.base_url, proxy="none", pool={"max_connections": 5})
    ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

    async def serve(connection: RawConnection) -> None:
        try:
            while True:
                await connection.read_head()
                connection.write(ok[:20])
                await asyncio.sleep(0)
                connection.write(ok[20:])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    async def listen() -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(serve(await raw.accept()))

    async def call_one(number: int) -> bytes:
        reply = await upstream.send(make_attempt(upstream, "GET", f"/{number}"))
        return await whole(reply)

    listening = asyncio.create_task(listen())
    try:
        calls = [asyncio.create_task(call_one(number)) for number in range(300)]
        for number, call in enumerate(calls):
            if number % 3:
                call.cancel()
                await asyncio.sleep(0)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results[::3] == [b"ok"] * 100
        upstream.pool.close()
        await until(lambda: repr(upstream.pool) == EMPTY_POOL)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
