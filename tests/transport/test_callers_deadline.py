"""The caller's deadline ends a wait for the upstream, before the upstream's own timeouts do."""

from __future__ import annotations

import asyncio
import socket
import time
from math import inf
from time import monotonic
from typing import Any

import pytest

from sidecar.call import Attempt, Outcome, Timeouts, end_of
from sidecar.errors import Phase, Rejected, UpstreamError
from sidecar.reply import Reply
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
from tests.support.upstream import RawUpstream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
SHORT_S = 0.08
SOON_S = 1.0
"""Far longer than SHORT_S, far shorter than any default."""
AT_ONCE_S = 0.05


def hurried(upstream: LiveUpstream, left_s: float = SHORT_S, **more: Any) -> Attempt:
    """An attempt whose caller waits for so long from now."""
    attempt = make_attempt(upstream, **more)
    call = attempt.call
    call.headers.add("x-request-timeout", f"{left_s + 1:.3f}")  # type: ignore[attr-defined]
    call.received_at = time.monotonic() - 1.0
    return attempt


async def is_given_up(reply: asyncio.Future[Reply], attempt: Attempt) -> float:
    """The time at which the deadline ended the attempt, with what is said of it."""
    began = time.monotonic()
    await asyncio.wait([reply], timeout=5.0)
    at = time.monotonic()
    assert SHORT_S * 0.5 < at - began < SOON_S
    error = reply.exception()
    assert isinstance(error, Rejected)
    assert (error.status, error.code) == (504, "deadline_exceeded")
    end = end_of(error, attempt.call)
    assert end.outcome is Outcome.REJECTED
    assert not end.upstream_fault
    return at


async def test_deadline_ends_the_wait_for_a_head_and_closes_the_connection_at_once(
    upstream: LiveUpstream, begin: Begin
) -> None:
    attempt = hurried(upstream)
    exchange = await begin(attempt)
    at = await is_given_up(exchange.reply, attempt)
    assert await exchange.connection.closed() - at < AT_ONCE_S
    assert repr(upstream.pool) == EMPTY_POOL


async def test_deadline_ends_the_wait_inside_of_a_head_and_for_the_first_byte_after_it(
    upstream: LiveUpstream, begin: Begin
) -> None:
    for written in (HEAD[:20], HEAD):
        attempt = hurried(upstream)
        exchange = await begin(attempt)
        exchange.connection.write(written)
        at = await is_given_up(exchange.reply, attempt)
        assert await exchange.connection.closed() - at < AT_ONCE_S


async def test_deadline_ends_the_wait_for_the_first_event(
    raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(raw.base_url, proxy="none", wait_for="event")
    attempt = hurried(upstream)
    task = asyncio.ensure_future(upstream.send(attempt))
    connection = await raw.accept()
    await connection.read_request()
    connection.write(STREAM + b": wait\n\n")
    at = await is_given_up(task, attempt)
    assert await connection.closed() - at < AT_ONCE_S
    assert repr(upstream.pool) == EMPTY_POOL


async def test_deadline_ends_the_wait_for_a_free_connection_and_leaves_the_one_in_use(
    raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(raw.base_url, proxy="none", pool={"max_connections": 1})
    first = asyncio.ensure_future(upstream.send(make_attempt(upstream)))
    connection = await raw.accept()
    await connection.read_request()
    attempt = hurried(upstream)
    await is_given_up(asyncio.ensure_future(upstream.send(attempt)), attempt)
    assert repr(upstream.pool) == "<Pool open=1 idle=0 connecting=0 waiting=0>"
    connection.write(HEAD + b"0123456789")
    assert await whole(await first) == b"0123456789"


async def test_deadline_ends_the_wait_for_a_connection_that_nobody_accepts(
    open_upstream: OpenUpstream,
) -> None:
    async with RawUpstream(backlog=0) as full:
        # The kernel takes one connection for a backlog of 0, and lets the next ones wait.
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", full.port))
        try:
            upstream = open_upstream(full.base_url, proxy="none")
            attempt = hurried(upstream)
            await is_given_up(asyncio.ensure_future(upstream.send(attempt)), attempt)
            assert repr(upstream.pool) == EMPTY_POOL
        finally:
            for filler in fillers:
                filler.close()


async def test_deadline_ends_an_upload_that_outlasts_it(
    upstream: LiveUpstream, raw: RawUpstream
) -> None:
    upload = ScriptedUpload(b"one")
    attempt = hurried(upstream, upload=upload)
    given = asyncio.Event()

    async def trickle() -> None:
        while not given.is_set():  # the client never stops
            upload.give(b"more")
            await asyncio.sleep(0.005)

    client = asyncio.ensure_future(trickle())
    task = asyncio.ensure_future(upstream.send(attempt))
    connection = await raw.accept()
    at = await is_given_up(task, attempt)
    assert await connection.closed() - at < AT_ONCE_S
    given.set()
    await client


async def test_deadline_that_has_passed_sends_nothing_although_a_connection_is_free(
    upstream: LiveUpstream, begin: Begin
) -> None:
    exchange = await begin()
    exchange.connection.write(HEAD + b"0123456789")
    await whole(await exchange.reply)
    assert "idle=1" in repr(upstream.pool)
    for left_s in (0.0, -0.5):
        with pytest.raises(Rejected) as raised:
            await upstream.send(hurried(upstream, left_s))
        assert raised.value.code == "deadline_exceeded"
    assert "idle=1" in repr(upstream.pool)
    again = await begin(on=exchange.connection)
    assert again.request == exchange.request  # nothing else was written before
    again.connection.write(HEAD + b"0123456789")
    await whole(await again.reply)


async def test_deadline_bounds_the_first_byte_only_and_no_body(
    upstream: LiveUpstream, begin: Begin
) -> None:
    attempt = hurried(upstream)
    exchange = await begin(attempt)
    exchange.connection.write(HEAD + b"01234")
    sink = attached((await exchange.reply).body)
    await until(lambda: attempt.call.time_left(time.monotonic()) < -SHORT_S)
    exchange.connection.write(b"56789")
    await sink.over()
    assert (sink.data, sink.error) == (b"0123456789", None)


async def test_timeouts_that_end_before_the_deadline_are_the_upstreams_fault(
    upstream: LiveUpstream, begin: Begin
) -> None:
    attempt = hurried(upstream, 0.6, timeouts=Timeouts(first_byte_s=SHORT_S))
    exchange = await begin(attempt)
    with pytest.raises(UpstreamError) as raised:
        await exchange.reply
    assert (raised.value.phase, raised.value.code) == (Phase.SEND, "upstream_timeout")
    assert end_of(raised.value, attempt.call).upstream_fault


# No timer of its own when the timeouts end the wait in any case


@pytest.mark.parametrize(
    ("left_s", "is_upload", "expected"),
    [
        (inf, False, False),
        (inf, True, False),
        (600.0, False, False),  # what the SDKs say when nobody has told them otherwise
        (366.0, False, False),  # 5 s, and three times 120 s
        (364.0, False, True),
        (10.0, False, True),
        (600.0, True, True),
    ],
)
async def test_deadline_has_a_timer_only_when_it_may_come_before_the_timeouts(
    upstream: LiveUpstream,
    left_s: float,
    is_upload: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload = ScriptedUpload() if is_upload else None
    if left_s == inf:
        attempt = make_attempt(upstream, upload=upload)
    else:
        attempt = hurried(upstream, left_s, upload=upload)
    timed: list[float] = []

    async def reply(self: LiveUpstream, attempt: Attempt) -> Reply:
        return Reply.of(200, b"")

    async def reply_in_time(self: LiveUpstream, attempt: Attempt) -> Reply:
        timed.append(attempt.call.time_left(monotonic()))
        return Reply.of(200, b"")

    monkeypatch.setattr(LiveUpstream, "_send", reply)
    monkeypatch.setattr(LiveUpstream, "_send_within_deadline", reply_in_time)
    await upstream.send(attempt)
    assert timed == ([pytest.approx(left_s, abs=0.5)] if expected else [])
