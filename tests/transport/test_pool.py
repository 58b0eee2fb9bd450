"""Connections that are kept, shared, waited for, and replaced when they went stale."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.call import Timeouts
from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.reply import Reply
from sidecar.transport import pool as pool_module
from sidecar.transport.connection import Connection
from sidecar.transport.upstream import LiveUpstream
from tests.support.attempts import EMPTY_POOL, Begin, OpenUpstream, make_attempt, until, whole
from tests.support.upstream import RawConnection, RawUpstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture
async def single(raw: RawUpstream, open_upstream: OpenUpstream) -> LiveUpstream:
    """An upstream that may have one connection."""
    return open_upstream(raw.base_url, proxy="none", pool={"max_connections": 1})


async def answer(connection: RawConnection) -> bytes:
    request = await connection.read_request()
    connection.write(OK)
    return request


def start(upstream: LiveUpstream, path: str, **kwargs: object) -> asyncio.Task[Reply]:
    attempt = make_attempt(upstream, "GET", path, **kwargs)  # type: ignore[arg-type]
    return asyncio.create_task(upstream.send(attempt))


async def occupied(
    upstream: LiveUpstream, raw: RawUpstream
) -> tuple[asyncio.Task[Reply], RawConnection]:
    """A call whose request has arrived and whose answer the test owes, and its connection."""
    running = start(upstream, "/0")
    connection = await raw.accept()
    await connection.read_request()
    return running, connection


async def in_order(upstream: LiveUpstream, *paths: str) -> list[asyncio.Task[Reply]]:
    """Calls that queue for the pool, each after the one before."""
    tasks = []
    for number, path in enumerate(paths):
        tasks.append(start(upstream, path))
        await until(lambda number=number: f"waiting={number + 1}" in repr(upstream.pool))
    return tasks


async def test_connection_used_last_is_used_first(raw: RawUpstream, upstream: LiveUpstream) -> None:
    first, second = start(upstream, "/1"), start(upstream, "/2")
    connections = [await raw.accept(), await raw.accept()]
    by_path = {(await each.read_request()).split(b" ")[1]: each for each in connections}
    by_path[b"/2"].write(OK)
    assert await whole(await second) == b"ok"
    by_path[b"/1"].write(OK)
    assert await whole(await first) == b"ok"
    for number in range(3):
        again = start(upstream, f"/again{number}")
        assert b"/again" in await answer(by_path[b"/1"])
        assert await whole(await again) == b"ok"
    assert repr(upstream.pool) == "<Pool open=2 idle=2 connecting=0 waiting=0>"


async def test_never_more_connections_than_allowed_and_callers_are_served_in_order(
    raw: RawUpstream, single: LiveUpstream
) -> None:
    running, connection = await occupied(single, raw)
    waiting = await in_order(single, "/1", "/2", "/3")
    assert not raw.has_waiting()
    connection.write(OK)
    assert await whole(await running) == b"ok"
    for number, task in enumerate(waiting, 1):
        assert b"/%d " % number in await answer(connection)
        assert await whole(await task) == b"ok"
    assert raw.accepted == 1


async def test_caller_in_the_queue_is_not_overtaken_when_a_connection_closes(
    raw: RawUpstream, single: LiveUpstream
) -> None:
    running, connection = await occupied(single, raw)
    first, second = await in_order(single, "/1", "/2")
    late: list[asyncio.Task[Reply]] = []
    (open_one,) = single.pool._open
    closed = single.pool.closed

    def closed_and_late(which: Connection) -> None:
        single.pool.closed = closed  # type: ignore[method-assign]
        late.append(start(single, "/late"))  # has its turn before those who are woken now
        closed(which)

    single.pool.closed = closed_and_late  # type: ignore[method-assign]
    open_one.abort()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    served = []
    connection = await raw.accept()
    for _ in range(3):
        served.append((await answer(connection)).split(b" ")[1])
    assert served == [b"/1", b"/2", b"/late"]
    for task in (first, second, *late):
        assert await whole(await task) == b"ok"


async def test_cancelled_caller_leaves_the_queue_and_the_next_is_served(
    raw: RawUpstream, single: LiveUpstream
) -> None:
    running, connection = await occupied(single, raw)
    first, second = await in_order(single, "/1", "/2")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert "waiting=1" in repr(single.pool)
    connection.write(OK)
    assert await whole(await running) == b"ok"
    assert b"/2 " in await answer(connection)
    assert await whole(await second) == b"ok"


async def test_caller_cancelled_in_the_turn_that_served_it_hands_on_what_it_got(
    raw: RawUpstream, single: LiveUpstream
) -> None:
    running, connection = await occupied(single, raw)
    first, second = await in_order(single, "/1", "/2")
    released = single.pool.released

    def released_and_cancelled(which: Connection) -> None:
        single.pool.released = released  # type: ignore[method-assign]
        released(which)
        first.cancel()

    single.pool.released = released_and_cancelled  # type: ignore[method-assign]
    connection.write(OK)
    assert await whole(await running) == b"ok"
    assert b"/2 " in await answer(connection)
    assert await whole(await second) == b"ok"
    assert first.cancelled()
    assert raw.accepted == 1


async def test_caller_cancelled_in_the_turn_that_would_have_served_it_is_passed_over(
    raw: RawUpstream, single: LiveUpstream
) -> None:
    running, connection = await occupied(single, raw)
    first, second = await in_order(single, "/1", "/2")
    released = single.pool.released

    def cancelled_and_released(which: Connection) -> None:
        single.pool.released = released  # type: ignore[method-assign]
        first.cancel()
        released(which)

    single.pool.released = cancelled_and_released  # type: ignore[method-assign]
    connection.write(OK)
    assert await whole(await running) == b"ok"
    assert b"/2 " in await answer(connection)
    assert await whole(await second) == b"ok"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_caller_that_waited_too_long_is_told_so(
    raw: RawUpstream, single: LiveUpstream
) -> None:
    running, connection = await occupied(single, raw)
    with pytest.raises(UpstreamError) as caught:
        await start(single, "/1", timeouts=Timeouts(connect_s=0.05))
    error = caught.value
    assert (error.phase, error.status, error.code) == (Phase.POOL, 504, "upstream_pool_timeout")
    assert error.retry is Retry.ELSEWHERE
    assert "waiting=0" in repr(single.pool)
    connection.write(OK)
    assert await whole(await running) == b"ok"


async def test_failed_connect_lets_the_next_caller_try(
    single: LiveUpstream, raw: RawUpstream
) -> None:
    connect, begun = single.pool._connect, asyncio.Event()
    fail = asyncio.Event()

    async def failing_once(pool: object) -> object:
        single.pool._connect = connect
        begun.set()
        await fail.wait()
        raise UpstreamError(Phase.CONNECT, Retry.SAME, "upstream_unreachable", "no")

    single.pool._connect = failing_once  # type: ignore[assignment]
    first = start(single, "/1")
    await begun.wait()
    (second,) = await in_order(single, "/2")
    fail.set()
    with pytest.raises(UpstreamError):
        await first
    assert b"/2 " in await answer(await raw.accept())
    assert await whole(await second) == b"ok"


async def test_caller_cancelled_while_connecting_lets_the_next_caller_try(
    single: LiveUpstream, raw: RawUpstream
) -> None:
    connect, begun = single.pool._connect, asyncio.Event()

    async def hanging_once(pool: object) -> object:
        single.pool._connect = connect
        begun.set()
        return await asyncio.get_running_loop().create_future()

    single.pool._connect = hanging_once  # type: ignore[assignment]
    first = start(single, "/1")
    await begun.wait()
    (second,) = await in_order(single, "/2")
    first.cancel()
    assert b"/2 " in await answer(await raw.accept())
    assert await whole(await second) == b"ok"


async def test_idle_connection_is_closed_after_its_time(
    raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    upstream = open_upstream(raw.base_url, proxy="none", pool={"idle_s": 0.05})
    task = start(upstream, "/")
    connection = await raw.accept()
    await answer(connection)
    assert await whole(await task) == b"ok"
    await connection.closed()
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


async def test_closing_the_pool_closes_what_is_idle_now_and_the_rest_when_it_is_over(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    first, second = start(upstream, "/1"), start(upstream, "/2")
    one, other = await raw.accept(), await raw.accept()
    await answer(one)
    await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
    upstream.pool.close()
    await one.closed()
    await answer(other)
    assert await whole(await first) == b"ok"
    assert await whole(await second) == b"ok"
    await other.closed()
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


# Connections that went stale


@pytest.fixture
async def kept(begin: Begin) -> RawConnection:
    """A connection that has served and is idle."""
    exchange = await begin()
    exchange.connection.write(OK)
    assert await whole(await exchange.reply) == b"ok"
    return exchange.connection


async def test_idle_connection_that_the_far_side_closes_is_forgotten(
    kept: RawConnection, upstream: LiveUpstream
) -> None:
    kept.close()
    await until(lambda: repr(upstream.pool) == EMPTY_POOL)


async def test_connection_closed_unnoticed_while_idle_is_replaced_before_anything_is_sent(
    kept: RawConnection,
    raw: RawUpstream,
    upstream: LiveUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "DOUBT_AFTER_S", 0.0)
    kept.shut_down()  # the loop has had no turn to notice
    connection = upstream.pool.take_idle()
    assert connection is None
    task = start(upstream, "/")
    await answer(await raw.accept())
    assert await whole(await task) == b"ok"


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", []),
        ("HEAD", []),
        ("PUT", []),
        ("DELETE", []),
        ("POST", [("Idempotency-Key", "1")]),
    ],
)
async def test_request_that_a_kept_connection_lost_is_repeated_when_that_is_safe(
    kept: RawConnection,
    begin: Begin,
    raw: RawUpstream,
    method: str,
    headers: list[tuple[str, str]],
) -> None:
    exchange = await begin(on=kept, method=method, headers=headers, body=b"x")
    kept.close()
    fresh = await raw.accept()
    assert await fresh.read_request() == exchange.request
    fresh.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    assert (await exchange.reply).status == 200


async def test_post_that_a_kept_connection_lost_is_not_repeated(
    kept: RawConnection, begin: Begin, raw: RawUpstream
) -> None:
    exchange = await begin(on=kept, body=b"x")
    kept.close()
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    assert (caught.value.phase, caught.value.retry) == (Phase.SEND, Retry.SAME)
    assert not raw.has_waiting()


async def test_request_is_not_repeated_once_a_byte_of_an_answer_was_here(
    kept: RawConnection, begin: Begin, raw: RawUpstream
) -> None:
    exchange = await begin(on=kept, method="GET")
    kept.write(b"H")
    kept.close()
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    assert caught.value.phase is Phase.HEAD
    assert not raw.has_waiting()


async def test_request_on_a_fresh_connection_is_never_repeated(
    begin: Begin, raw: RawUpstream
) -> None:
    exchange = await begin(method="GET")
    exchange.connection.close()
    with pytest.raises(UpstreamError) as caught:
        await exchange.reply
    assert (caught.value.phase, caught.value.retry) == (Phase.SEND, Retry.SAME)
    assert not raw.has_waiting()


async def test_repeated_request_goes_to_a_fresh_connection_and_only_once(
    kept: RawConnection, begin: Begin, raw: RawUpstream
) -> None:
    exchange = await begin(on=kept, method="GET")
    kept.close()
    fresh = await raw.accept()
    await fresh.read_request()
    fresh.close()
    with pytest.raises(UpstreamError):
        await exchange.reply
    assert not raw.has_waiting()
