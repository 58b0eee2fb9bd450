"""Back-pressure: what nobody takes is not read, and stays with the upstream."""

from __future__ import annotations

import asyncio

from sidecar.reply import Reply
from sidecar.transport.connection import READ_BYTES
from tests.support.attempts import Begin, Exchange, attached, until

TOTAL_BYTES = 32 * 1024 * 1024
"""More than the socket buffers of both sides take."""


async def flood(begin: Begin) -> tuple[Exchange, Reply]:
    exchange = await begin()
    exchange.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % TOTAL_BYTES)
    exchange.connection.write(bytes(TOTAL_BYTES))
    return exchange, await exchange.reply


async def stands_still(exchange: Exchange) -> int:
    """Wait until the upstream can send no more; how many bytes it still has."""
    unsent = -1
    while unsent != exchange.connection.unsent_bytes:
        unsent = exchange.connection.unsent_bytes
        await asyncio.sleep(0.03)
    return unsent


async def test_at_most_one_read_is_held_before_anybody_takes_the_body(begin: Begin) -> None:
    exchange, reply = await flood(begin)
    assert await stands_still(exchange) > 0
    assert 0 < len(reply.body.peek()) <= READ_BYTES


async def test_full_sink_stops_the_reading_and_room_lets_it_go_on(begin: Begin) -> None:
    exchange, reply = await flood(begin)
    sink = attached(reply.body)
    await sink.until(lambda: len(sink.data) > READ_BYTES)
    reply.body.pause()
    taken = len(sink.data)
    assert await stands_still(exchange) > 0
    assert len(sink.data) == taken
    reply.body.resume()
    await sink.over()
    assert len(sink.data) == TOTAL_BYTES
    assert sink.is_finished


async def test_pausing_in_the_turn_of_a_write_stops_at_that_write(begin: Begin) -> None:
    exchange, reply = await flood(begin)

    class OnePieceAtATime:
        def __init__(self) -> None:
            self.sizes: list[int] = []

        def write(self, data: bytes) -> None:
            self.sizes.append(len(data))
            reply.body.pause()

        def finish(self) -> None: ...
        def fail(self, error: Exception) -> None: ...

    sink = OnePieceAtATime()
    reply.body.attach(sink)
    for count in range(2, 6):
        reply.body.resume()
        await until(lambda count=count: len(sink.sizes) == count)
        await asyncio.sleep(0)
        assert len(sink.sizes) == count
    assert max(sink.sizes) <= READ_BYTES
    await stands_still(exchange)
    reply.discard()


async def test_whole_small_answer_leaves_a_connection_that_reads(begin: Begin) -> None:
    """A body in hand paused the connection; the next call must not wait for its taker."""
    exchange = await begin()
    ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    exchange.connection.write(ok)
    first = await exchange.reply
    again = await begin(on=exchange.connection)
    again.connection.write(ok)
    second = await again.reply
    assert first.body.take() == second.body.take() == b"ok"


async def test_pausing_a_body_that_is_over_does_not_touch_the_next_call(begin: Begin) -> None:
    exchange = await begin()
    ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    exchange.connection.write(ok)
    first = await exchange.reply
    again = await begin(on=exchange.connection)
    first.body.pause()
    first.discard()
    again.connection.write(ok)
    assert (await again.reply).body.take() == b"ok"
