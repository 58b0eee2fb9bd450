"""Thousands of callers of a real sidecar, and the books of the provider behind it, call by call.

Callers are raw connections, as in the drill: callers and provider share one core, the sidecar has
another. Each call has an id that goes through to the provider and into the ledger, so that all
three can be laid side by side. Answers are read when all calls are over.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import orjson

from bench.wire import MessageReader
from sidecar.mock import MockProvider, Received, Script
from sidecar.mock.books import Books
from sidecar.mock.content import Told

CHAT, MESSAGES, EMBEDDINGS = "/v1/chat/completions", "/v1/messages", "/v1/embeddings"
WITHIN_S = 20.0
"""Only a test that fails waits so long."""
MAX_TOKENS = 6
ID = "x-request-id"
_ID = ID.encode()


# Callers


@dataclass(slots=True, eq=False)
class Ask:
    """One call, and what came of it."""

    id: str
    team: str
    model: str
    path: str
    text: str
    is_stream: bool = False
    wants_usage: bool = False
    temperature: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict)
    leaves_after: int | None = None
    """Events of a stream; None: the caller stays."""
    leaves_at: bytes = b""
    """The caller goes when it sees this."""
    data: bytes = b""
    """All that came, head and framing included."""
    is_whole: bool = False
    has_left: bool = False

    @property
    def body(self) -> bytes:
        body: dict[str, Any] = {"model": self.model}
        if self.path == EMBEDDINGS:
            body["input"] = self.text
        else:
            body |= {
                "max_tokens": MAX_TOKENS,
                "temperature": self.temperature,
                "stream": self.is_stream,
            }
            body["messages"] = [{"role": "user", "content": self.text}]
        if self.wants_usage:
            body["stream_options"] = {"include_usage": True}
        return orjson.dumps(body)

    def request(self, key: str) -> bytes:
        data = self.body
        fields = {
            "host": "accounts",
            "authorization": f"Bearer {key}",
            "content-type": "application/json",
            "content-length": str(len(data)),
            ID: self.id,
            **self.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"POST {self.path} HTTP/1.1\r\n{lines}\r\n".encode() + data

    @property
    def has_enough(self) -> bool:
        """Whether its caller goes now."""
        events = self.data.count(b"\n\n")
        if self.leaves_after is not None and events >= self.leaves_after:
            return True
        return bool(self.leaves_at) and self.leaves_at in self.data

    @property
    def words(self) -> int:
        """Tokens of the input, as the mock provider counts."""
        return len(self.text.split())


class Line(asyncio.Protocol):
    """A connection to the sidecar with one call at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader = MessageReader()
        self._ask: Ask | None = None
        self._done: asyncio.Future[None] | None = None
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def begin(self, ask: Ask, key: str) -> asyncio.Future[None]:
        """Send the request; done when all of the answer is here, or its caller or the sidecar has
        gone."""
        assert self._transport is not None
        self._ask = ask
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(ask.request(key))
        return self._done

    async def look(self, key: str) -> None:
        """Return once the sidecar has taken all that was sent to it before, over any connection."""
        ask = Ask("", "", "", "", "")
        self._ask, self._done = ask, asyncio.get_running_loop().create_future()
        assert self._transport is not None
        head = f"GET /v1/models HTTP/1.1\r\nhost: accounts\r\nauthorization: Bearer {key}\r\n\r\n"
        self._transport.write(head.encode())
        await self._done

    def leave(self) -> None:
        """Close at once, as a client does that is not interested any more."""
        if self._ask is not None:
            self._ask.has_left = True
        self.close()
        self._end()

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        ask = self._ask
        assert ask is not None, f"nobody asked for {data!r}"
        ask.data += data
        if self._reader.feed(data):
            ask.is_whole = True
            if b"\r\nconnection: close" in self._reader.head:
                self.close()
            self._end()
        elif ask.has_enough:
            self.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._end()

    def _end(self) -> None:
        self._ask = None
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Lines:
    """Connections to one sidecar, each used again by the next call."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle: list[Line] = []

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line]:
        while self._idle:
            line = self._idle.pop()
            if line.is_open:
                break
        else:
            loop = asyncio.get_running_loop()
            _, line = await loop.create_connection(Line, *self._address)
        try:
            yield line
        except BaseException:
            line.close()
            raise
        if line.is_open:
            self._idle.append(line)

    def close(self) -> None:
        for line in self._idle:
            line.close()


# What they got


class Answer(NamedTuple):
    """An answer as its caller sees it."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_good: bool
    """All of it came, and it is no error."""
    usage: tuple[int, int] | None
    """As it stands in it: input and output."""
    words: int
    """Of what a stream says."""


def read(ask: Ask) -> Answer | None:
    """None: not even a head came."""
    head, has_head, rest = ask.data.partition(b"\r\n\r\n")
    if not has_head:
        return None
    status_line, *lines = head.decode().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    status = int(status_line[9:12])
    body = unchunked(rest) if headers.get("transfer-encoding") == "chunked" else rest
    if "text/event-stream" not in headers.get("content-type", ""):
        usage = None
        if ask.is_whole and status == 200:
            usage = _usage(orjson.loads(body))
        return Answer(status, headers, body, ask.is_whole and status == 200, usage, 0)
    events = [
        orjson.loads(text)
        for block in body.split(b"\n\n")
        if (text := block.rpartition(b"data: ")[2]).startswith(b"{") and text.endswith(b"}")
    ]
    usage = None
    for event in events:
        usage = _usage(event) or _usage(event.get("message") or {}) or usage
    last = b"data: [DONE]\n\n" if ask.path == CHAT else b'data: {"type":"message_stop"}\n\n'
    is_good = ask.is_whole and status == 200 and body.endswith(last)
    words = len("".join(map(_text_of, events)).split())
    return Answer(status, headers, body, is_good, usage, words)


def _usage(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    usage = fields.get("usage")
    if not usage:
        return None
    tokens_in = usage.get("prompt_tokens", usage.get("input_tokens"))
    return tokens_in, usage.get("completion_tokens", usage.get("output_tokens", 0))


def _text_of(event: Mapping[str, Any]) -> str:
    deltas = [event, *event.get("choices", ())]
    texts = [(each.get("delta") or {}) for each in deltas]
    return "".join(each.get("content") or each.get("text") or "" for each in texts)


def unchunked(data: bytes) -> bytes:
    """A chunked body without its framing, as far as it came."""
    parts: list[bytes] = []
    position = 0
    while True:
        end = data.find(b"\r\n", position)
        if end < 0 or not (size := int(data[position:end], 16)):
            return b"".join(parts)
        parts.append(data[end + 2 : end + 2 + size])
        position = end + 2 + size + 2


# The provider


class Served(NamedTuple):
    """One request at the provider."""

    model: str
    told: Told | None
    sent: int
    """Tokens of the output that were written."""
    status: int | None
    is_answered: bool
    is_left: bool


class Provider:
    """A scripted provider in this process, with its books by the callers' ids."""

    def __init__(self, script: str) -> None:
        self._mock = MockProvider(
            script=Script.parse(script), keep_requests=0, on_done=self._is_over
        )
        self._mock.books = _Books(self._has_come)
        self.served: defaultdict[str, list[Served]] = defaultdict(list)
        self._arrived: set[str] = set()
        self._awaited: dict[str, asyncio.Future[None]] = {}

    async def start(self) -> str:
        """Its address."""
        return await self._mock.start()

    async def stop(self) -> None:
        await self._mock.stop()

    @property
    def books(self) -> Books:
        return self._mock.books

    async def has(self, call_id: str) -> None:
        """Return once a request of this call is here."""
        if call_id not in self._arrived:
            future = self._awaited[call_id] = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(WITHIN_S):
                await future

    async def rests(self) -> None:
        """Return once nothing is under way."""
        await self._mock.wait_for(lambda: not self._mock.open_requests, WITHIN_S)

    def _has_come(self, received: Received) -> None:
        call_id = _id_of(received)
        self._arrived.add(call_id)
        future = self._awaited.pop(call_id, None)
        if future is not None and not future.done():
            future.set_result(None)

    def _is_over(self, received: Received) -> None:
        self.served[_id_of(received)].append(
            Served(
                received.model,
                received.told,
                received.output_tokens_sent,
                received.status,
                received.is_answered,
                received.client_gone,
            )
        )


def _id_of(received: Received) -> str:
    return next((v.decode() for name, v in received.raw_headers if name.lower() == _ID), "")


class _Books(Books):
    """Tells when a request has come."""

    def __init__(self, has_come: Callable[[Received], None]) -> None:
        super().__init__(max_requests=0)
        self._has_come = has_come

    def add(self, received: Received) -> None:
        super().add(received)
        self._has_come(received)
