"""The provider at the far end: answers what the `x-bench` header of a request orders.

`json SIZE` gets a chat completion of SIZE bytes. `stream ID` gets a head and a first event, then
nothing: whoever holds the `Upstream` finds the open stream under its id and sends each further
event by hand. Clients and upstream share a process, so both read the same clock.
"""

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import cast

from bench import wire

_EVENT_CHUNK = wire.chunk(wire.EVENT)
_STREAM_START = wire.STREAM_HEAD + _EVENT_CHUNK
_LAST = wire.chunk(wire.LAST_EVENTS)
_USAGE = wire.chunk(wire.USAGE_EVENT)
_DONE = wire.chunk(wire.DONE_EVENT)


class UpstreamConnection(asyncio.Protocol):
    """One connection from a proxy; carries one call after the other."""

    def __init__(self, upstream: "Upstream") -> None:
        self._upstream = upstream
        self._reader = wire.MessageReader()
        self._wants_usage = False
        self._transport: asyncio.Transport
        self.closed_at = 0.0
        self.on_closed: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._upstream.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if not self._wants_usage:
            self._wants_usage = b"include_usage" in data
        if self._reader.feed(data):
            self._answer()

    def eof_received(self) -> None:
        self._note_closed()

    def connection_lost(self, exc: Exception | None) -> None:
        self._note_closed()
        self._upstream.connections.discard(self)

    def _note_closed(self) -> None:
        if not self.closed_at:
            self.closed_at = perf_counter()
            if self.on_closed is not None:
                self.on_closed()

    def _answer(self) -> None:
        self._upstream.calls += 1
        order, _, argument = self._reader.header(b"x-bench").partition(b" ")
        if order == b"json":
            self._transport.write(self._upstream.json_answer(int(argument)))
            self._wants_usage = False
        elif order == b"stream":
            self._upstream.streams[int(argument)] = self
            self._transport.write(_STREAM_START)
        else:
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    def send_event(self) -> None:
        """One event, one write. Does nothing once the peer has gone."""
        if not self.closed_at:
            self._transport.write(_EVENT_CHUNK)

    def finish(self) -> None:
        """The closing events as an OpenAI upstream sends them, and the end of the body."""
        if not self.closed_at:
            usage = _USAGE if self._wants_usage else b""
            self._transport.write(_LAST + usage + _DONE + wire.END_OF_CHUNKS)
            self._wants_usage = False

    def abort(self) -> None:
        self._transport.abort()


class Upstream:
    """A listener on a loopback port of its own, its counters and its open streams by id."""

    def __init__(self) -> None:
        self.calls = 0
        self.port = 0
        self.streams: dict[int, UpstreamConnection] = {}
        self.connections: set[UpstreamConnection] = set()
        self._answers: dict[int, bytes] = {}
        self._server: asyncio.Server | None = None

    def json_answer(self, size_bytes: int) -> bytes:
        answer = self._answers.get(size_bytes)
        if answer is None:
            answer = self._answers[size_bytes] = wire.json_answer(size_bytes)
        return answer

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: UpstreamConnection(self), "127.0.0.1", 0, backlog=4096
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        for connection in list(self.connections):
            connection.abort()
        self.streams.clear()
        if self._server is not None:
            self._server.close()
            self._server = None
