"""A client that reads slowly costs a bounded amount of memory and loses nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from sidecar.edge import EdgeProtocol
from tests.support.flow import Flow, RawClient, Start, chat_request, request, until
from tests.support.upstream import RawConnection, RawUpstream

TOTAL_BYTES = 20 * 1024 * 1024
PER_STREAM_BYTES = 256 * 1024
SMALL_BYTES = 8 * 1024
PIECE = b"data: " + b"x" * (16 * 1024 - 8) + b"\n\n"
CHUNK = b"%x\r\n%b\r\n" % (len(PIECE), PIECE)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


class SlowStream:
    """A stream whose client reads nothing yet; kernel buffers are small on both sides."""

    def __init__(self, flow: Flow, client: RawClient, upstream: RawConnection) -> None:
        self.flow = flow
        self.client = client
        self.upstream = upstream
        (self.edge,) = [each for each in flow.connections if each.call is not None]
        self.pushed_bytes = 0

    @classmethod
    async def begin(cls, flow: Flow, raw: RawUpstream, data: bytes) -> SlowStream:
        client = await flow.connect(receive_bytes=SMALL_BYTES)
        client.stop_reading()
        await until(lambda: flow.connections)
        for each in flow.connections:
            shrink(each)
        client.send(data)
        upstream = await raw.accept(receive_bytes=SMALL_BYTES)
        upstream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BYTES)
        await upstream.read_request()
        return cls(flow, client, upstream)

    @property
    def held_bytes(self) -> int:
        """In the sidecar's own memory: written to the client, but not taken by the kernel."""
        assert self.edge.transport is not None
        return self.edge.transport.get_write_buffer_size()

    async def push(self, total_bytes: int) -> int:
        """Push until everything is taken or nothing moves any more; the most the sidecar held."""
        most = still = 0
        while self.pushed_bytes < total_bytes and still < 50:
            if self.upstream.unsent_bytes < len(CHUNK):
                self.upstream.write(CHUNK)
                self.pushed_bytes += len(PIECE)
                still = 0
            await asyncio.sleep(0)
            still += 1
            most = max(most, self.held_bytes)
        return most


def shrink(edge: EdgeProtocol) -> None:
    assert edge.transport is not None
    sock = edge.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BYTES)


def config(raw: RawUpstream) -> str:
    return f"upstreams: {{up-openai: {{base_url: '{raw.base_url}/v1'}}}}"


async def test_a_stream_that_nobody_reads_is_held_up_at_its_upstream(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    slow = await SlowStream.begin(flow, raw, chat_request(stream=True))
    slow.upstream.write(STREAM_HEAD)
    most = await slow.push(TOTAL_BYTES)
    assert most <= PER_STREAM_BYTES
    # Whatever is on the way, kernels included; each of theirs is twice what it was asked for.
    assert slow.pushed_bytes <= PER_STREAM_BYTES + 4 * 2 * SMALL_BYTES + 2 * len(CHUNK)

    slow.client.read_on()
    answer = asyncio.create_task(slow.client.answer())
    while slow.pushed_bytes < TOTAL_BYTES:
        await slow.push(TOTAL_BYTES)
    slow.upstream.write(b"0\r\n\r\n")
    whole = await answer
    assert whole.is_whole
    assert whole.body == PIECE * (slow.pushed_bytes // len(PIECE))
    assert len(whole.body) >= TOTAL_BYTES


async def test_a_large_plain_answer_that_nobody_reads_is_held_up_as_well(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    slow = await SlowStream.begin(flow, raw, request("GET", "/up-openai/files/1"))
    slow.upstream.write(STREAM_HEAD.replace(b"text/event-stream", b"application/octet-stream"))
    assert await slow.push(TOTAL_BYTES) <= PER_STREAM_BYTES
    slow.client.reset()
    await slow.upstream.closed()


async def test_a_slow_client_that_leaves_ends_its_upstream(start: Start, raw: RawUpstream) -> None:
    flow = await start(config(raw))
    slow = await SlowStream.begin(flow, raw, chat_request(stream=True))
    slow.upstream.write(STREAM_HEAD)
    await slow.push(TOTAL_BYTES)
    slow.client.reset()
    await slow.upstream.closed()
    (line,) = await flow.logged()
    assert line["outcome"] == "client_gone"


async def test_a_slow_client_is_no_silence_of_the_upstream(start: Start, raw: RawUpstream) -> None:
    flow = await start(
        f"upstreams: {{up-openai: {{base_url: '{raw.base_url}/v1', timeouts: {{silence_s: 0.1}}}}}}"
    )
    slow = await SlowStream.begin(flow, raw, chat_request(stream=True))
    slow.upstream.write(STREAM_HEAD)
    await slow.push(TOTAL_BYTES)
    await asyncio.sleep(0.3)  # three times the silence that would end it
    assert flow.running()["calls"] == 1
    slow.client.read_on()
    answer = asyncio.create_task(slow.client.answer())
    await until(lambda: not slow.upstream.unsent_bytes)
    slow.upstream.write(b"0\r\n\r\n")
    whole = await answer
    assert whole.is_whole
    assert len(whole.body) == slow.pushed_bytes


async def test_an_upstream_that_dies_while_the_client_reads_slowly_loses_no_byte(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    slow = await SlowStream.begin(flow, raw, chat_request(stream=True))
    slow.upstream.write(STREAM_HEAD)
    await slow.push(TOTAL_BYTES)
    slow.upstream.close()
    slow.client.read_on()
    answer = await slow.client.answer()
    assert not answer.is_whole
    assert answer.body.startswith(PIECE * (slow.pushed_bytes // len(PIECE)))
    assert b'"code":"upstream_closed"' in answer.body


async def test_pipelined_calls_of_a_slow_client_wait_for_it(start: Start) -> None:
    flow = await start()
    client = await flow.connect(receive_bytes=SMALL_BYTES)
    client.stop_reading()
    await until(lambda: flow.connections)
    (edge,) = flow.connections
    shrink(edge)
    assert edge.transport is not None
    one = chat_request(x_mock_events="200", x_mock_event_bytes="300")  # answers of 40 KB
    client.send(one * 100)
    most, still, seen = 0, 0, -1
    while still < 100:
        await asyncio.sleep(0)
        most = max(most, edge.transport.get_write_buffer_size())
        count = len(flow.provider.books.requests)
        still = still + 1 if count == seen and not flow.provider.open_requests else 0
        seen = count
    assert most <= PER_STREAM_BYTES
    assert seen < 20
    client.read_on()
    for _ in range(100):
        assert (await client.answer()).status == 200
    assert len(flow.provider.books.requests) == 100


async def test_requests_that_wait_behind_a_running_one_are_bounded(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(chat_request())
    upstream = await raw.accept()
    await upstream.read_request()
    client.send(request("GET", "/v1/models", b"", {"x-filler": "f" * 1000}) * 20_000)
    sent = client.writer.transport
    left = -1
    while left != sent.get_write_buffer_size():  # until the kernel takes no more
        left = sent.get_write_buffer_size()
        for _ in range(50):
            await asyncio.sleep(0)
    assert left > 10 * 1024 * 1024
    (edge,) = flow.connections
    assert len(edge._messages) <= 64
    sent.abort()
    upstream.close()


async def test_many_streams_of_clients_that_do_not_read_stay_bounded_together(
    start: Start,
) -> None:
    flow = await start()
    clients = [await flow.connect(receive_bytes=SMALL_BYTES) for _ in range(20)]
    for client in clients:
        client.stop_reading()
        client.send(chat_request(stream=True, x_mock_events="5000", x_mock_event_bytes="1000"))
    await until(lambda: len(flow.connections) == 20)
    await until(lambda: all(each.writing_paused for each in flow.connections))
    for each in flow.connections:
        assert each.transport is not None
        assert each.transport.get_write_buffer_size() <= PER_STREAM_BYTES
    for client in clients:
        client.reset()
    await flow.quiet()
