"""One HTTP/1.1 connection to an upstream, one exchange at a time.

Source: RFC 9112 (framing, persistence), RFC 9110 (methods, status, trailers). llhttp parses
strictly; what it leaves open (size of the head, end by close, bytes nobody asked for) is here.
"""

from __future__ import annotations

import asyncio
from math import inf
from time import monotonic
from typing import Protocol

import httptools

from sidecar.call import Timeouts, Upload
from sidecar.errors import CallError, Phase, Retry, UpstreamError
from sidecar.headers import Headers, RawFields
from sidecar.reply import Body, Reply
from sidecar.transport.deadlines import Deadlines

MAX_HEAD_BYTES = 128 * 1024
MAX_TRAILERS = 64
READ_BYTES = 64 * 1024

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Fields of one connection, never passed on (RFC 9110, 7.6.1)."""

# All connections of a process read into one buffer: the loop fills it and calls `buffer_updated`
# before it reads from any other socket, and by then llhttp has copied out what we keep. It bounds
# what one read can bring, and an idle stream owns no buffer.
_READ_BUFFER = memoryview(bytearray(READ_BYTES))


class Owner(Protocol):
    """Who keeps the connection: its pool."""

    deadlines: Deadlines

    def released(self, connection: Connection) -> None:
        """The exchange is over and the connection may serve another."""
        ...

    def closed(self, connection: Connection) -> None:
        """The connection is gone."""
        ...


class Connection(asyncio.BufferedProtocol):
    """A connection and the exchange that runs on it. It is the `Source` of its reply's body."""

    __slots__ = (
        "__weakref__",
        "_body",
        "_deadlines",
        "_head_bytes",
        "_headers",
        "_is_done",
        "_is_head_request",
        "_is_poisoned",
        "_is_reusable",
        "_is_until_close",
        "_last_read",
        "_loop",
        "_owner",
        "_parser",
        "_paused",
        "_pieces",
        "_reply",
        "_silence_s",
        "_total_at",
        "_total_s",
        "_upload",
        "_waiter",
        "_writable",
        "due",
        "idle_since",
        "transport",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, owner: Owner) -> None:
        self._loop = loop
        self._owner = owner
        self._parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self._is_poisoned = False  # the far side sent what nobody asked for
        self._writable: asyncio.Future[None] | None = None
        self._deadlines = owner.deadlines
        self.due = inf  # when `on_time` is to be called
        self._waiter: asyncio.Future[Reply] | None = None
        self._upload: asyncio.Task[None] | None = None
        self._pieces: list[bytes] = []
        self._headers: RawFields = []
        self._reset()

    def _reset(self) -> None:
        self._body: Body | None = None
        self._reply: Reply | None = None
        self._head_bytes = 0
        self._is_done = False
        self._is_reusable = False
        self._is_until_close = False
        self._is_head_request = False
        self._paused = False
        self._last_read = 0.0
        self._silence_s = 0.0
        self._total_s = 0.0
        self._total_at = 0.0

    @property
    def is_open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    # The exchange

    def begin(
        self,
        method: str,
        head: bytes,
        body: bytes,
        upload: Upload | None,
        timeouts: Timeouts,
        total_at: float,
    ) -> asyncio.Future[Reply]:
        """Send one request; the future is done once the first byte of the reply's body is here.

        It fails with `UpstreamError`. Whoever stops waiting for it must call `give_up`. Raises
        `Unsent` when the connection turned out to be closed before anything was written.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            raise Unsent
        loop = self._loop
        self._is_head_request = method == "HEAD"
        self._silence_s = timeouts.silence_s
        self._total_s = timeouts.total_s
        self._total_at = total_at
        waiter = self._waiter = loop.create_future()
        if upload is None and len(body) <= READ_BYTES:
            transport.write(head + body if body else head)
        elif upload is None:
            transport.write(head)
            transport.write(body)  # larger than a copy is worth
        else:
            transport.write(head)
            self._upload = loop.create_task(self._send_upload(upload, timeouts.first_byte_s))
        self._arm(timeouts.first_byte_s)
        return waiter

    def give_up(self, waiter: asyncio.Future[Reply]) -> None:
        """Close the connection, since nobody waits for the exchange of `waiter` any more.

        The answer may have come in the same turn, and the connection be another's by now.
        """
        if self._waiter is waiter:
            self.abort()
        elif not waiter.cancelled() and waiter.exception() is None:
            waiter.result().discard()

    async def _send_upload(self, upload: Upload, first_byte_s: float) -> None:
        """Stream a request body, chunked; an early answer or a failure ends it."""
        try:
            while data := await upload.readany():
                transport = self.transport
                if transport is None or transport.is_closing():
                    return
                transport.write(b"%x\r\n%b\r\n" % (len(data), data))
                if self._writable is not None:
                    await self._writable
                if self._waiter is not None:
                    self._arm(first_byte_s)  # counts from the last byte written
            if self.transport is not None:
                self.transport.write(b"0\r\n\r\n")
                if self._waiter is not None:
                    self._arm(first_byte_s)
        except CallError as error:  # the client's body is too large, or broke off
            self._fail_exchange(error)
        except Exception as error:
            self._fail_exchange(
                CallError(400, "request_body_broken", "the request body broke off"), error
            )

    def _fail_exchange(self, error: CallError, cause: Exception | None = None) -> None:
        """Give the running exchange up; whoever waits for it gets `error`."""
        error.__cause__ = cause
        waiter, body = self._waiter, self._body
        self.abort()
        if waiter is not None:
            if not waiter.done():
                waiter.set_exception(error)
        elif body is not None:
            body.fail(error)

    # Source of the body

    def pause(self) -> None:
        if not self._paused and not self._is_done and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._last_read = self._loop.time()  # silence while we did not listen does not count
            if self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once; nothing more is fed and nobody is told but the owner."""
        self._waiter = None
        self._body = None
        self._reply = None
        self._is_done = True
        self._is_poisoned = True
        self.due = inf
        if self._upload is not None:
            self._upload.cancel()
            self._upload = None
        if self.transport is not None:
            self.transport.abort()

    # Time

    def _arm(self, delay_s: float) -> None:
        due = self._deadlines.after(delay_s if delay_s < self._total_s else self._total_s)
        self.due = due if due < self._total_at else self._total_at

    def on_time(self) -> None:
        """A deadline has passed: which, and is it still one?"""
        now = self._loop.time()
        if now >= self._total_at - 0.001:
            phase = Phase.SEND if self._reply is None else Phase.BODY
            self._fail_exchange(_timeout(phase, "the upstream took too long in total"))
        elif self._waiter is not None:
            phase = Phase.HEAD if self._head_bytes else Phase.SEND
            self._fail_exchange(_timeout(phase, "the upstream did not answer in time"))
        else:
            # While we do not listen there is no silence of the upstream's.
            silent_at = (now if self._paused else self._last_read) + self._silence_s
            if silent_at <= now + 0.001:
                self._fail_exchange(_timeout(Phase.BODY, "the upstream fell silent"))
            else:  # the tick goes on as it is: it need not be finer for what is left
                self.due = min(silent_at, self._total_at)

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._deadlines.members.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _READ_BUFFER

    def buffer_updated(self, count: int) -> None:
        if self._waiter is None and self._body is None:
            # Nobody asked: an idle connection that gets bytes, such as a 408 before its close.
            self._is_poisoned = True
            if self.transport is not None:
                self.transport.abort()
            return
        self._last_read = self._loop.time()
        try:
            self._parser.feed_data(_READ_BUFFER[:count])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._is_done:  # after a HEAD answer the parser may stumble; we are done then
                self._flush()
                self._broken(error)
                return
        if not self._pieces:  # head, trailers or chunk extensions: bytes that nobody else bounds
            self._head_bytes += count
            if self._head_bytes > MAX_HEAD_BYTES:
                self._broken(None)
                return
        if self._is_done:
            if self._is_head_request and bytes(_READ_BUFFER[count - 4 : count]) != b"\r\n\r\n":
                self._is_reusable = False  # a body that must not be there follows
            self._complete()
        else:
            self._flush()

    def _take_pieces(self) -> bytes:
        """What this read brought, as one piece."""
        pieces = self._pieces
        if not pieces:
            return b""
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return data

    def _flush(self) -> None:
        """Hand over what this read brought; the message goes on."""
        data = self._take_pieces()
        body = self._body
        if data and body is not None:
            self._head_bytes = 0
            if self._waiter is not None:
                if self._waiter.done():  # cancelled in this very turn: nobody takes the answer
                    self.abort()
                    return
                self._answer()
                self._arm(self._silence_s)
            body.feed(data)

    def _answer(self) -> None:
        """Hand the reply to whoever waits for it."""
        waiter, self._waiter = self._waiter, None
        reply = self._reply
        if waiter is not None and reply is not None and not waiter.done():
            reply.first_byte_at = monotonic()  # uvloop's own clock counts whole milliseconds
            waiter.set_result(reply)

    def _complete(self) -> None:
        """The message is over: free the connection, then tell the body."""
        data = self._take_pieces()
        body = self._body
        self.due = inf
        self._answer()
        if self._upload is not None:
            if not self._upload.done():
                self._upload.cancel()  # answered early: the rest of our body is of no use
                self._is_reusable = False
            self._upload = None
        transport = self.transport
        is_reusable = (
            self._is_reusable
            and not self._is_poisoned
            and transport is not None
            and not transport.is_closing()
        )
        if self._paused and is_reusable:
            transport.resume_reading()  # type: ignore[union-attr]
        self._reset()
        if is_reusable:
            self._owner.released(self)
        else:
            self._is_poisoned = True
            if transport is not None:
                transport.abort()
        if body is not None:
            body.finish(data)

    def _broken(self, error: Exception | None) -> None:
        phase = Phase.HEAD if self._reply is None else Phase.BODY
        retry = Retry.SAME if self._reply is None else Retry.NO
        message = "the upstream's answer is not valid HTTP/1.1"
        self._fail_exchange(UpstreamError(phase, retry, "upstream_protocol_error", message), error)

    def eof_received(self) -> bool:
        return False  # close our side too; connection_lost tells the rest

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        if self._body is not None and self._is_until_close and exc is None:
            self._is_done = True
            self._complete()
        elif not self._is_poisoned and (self._waiter is not None or self._body is not None):
            self._fail_exchange(self._lost(), exc)
        self._is_poisoned = True
        self.due = inf
        self._deadlines.members.discard(self)
        del self._parser  # it refers back to us: a cycle
        self._owner.closed(self)

    def _lost(self) -> UpstreamError:
        if self._reply is not None:
            message = "the upstream broke the answer off"
            return UpstreamError(Phase.BODY, Retry.NO, "upstream_closed", message)
        if self._head_bytes:
            message = "the upstream closed the connection inside the head of its answer"
            return UpstreamError(Phase.HEAD, Retry.SAME, "upstream_closed", message)
        message = "the upstream closed the connection without an answer"
        return NoAnswer(Phase.SEND, Retry.SAME, "upstream_closed", message)

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    # llhttp's callbacks

    def on_message_begin(self) -> None:
        if self._waiter is None or self._reply is not None:
            self._is_poisoned = True  # an answer nobody asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_done:
            return
        if self._reply is None:
            self._headers.append((name.lower(), value))
        elif self._body is not None and len(self._body.trailers) < MAX_TRAILERS:
            self._body.trailers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        fields = self._headers
        self._headers = []
        if status < 200:
            if status == 101:
                raise ValueError("101 Switching Protocols, though no upgrade was asked for")
            self._head_bytes = 0
            return
        if self._is_poisoned:
            return
        media_type = encoding = ""
        length: int | None = None
        is_chunked = False
        dropped: list[bytes] = []  # fields that the far side calls hop-by-hop
        kept: RawFields = []
        for field in fields:
            name, value = field
            if name == b"content-length":
                length = int(value)
                continue  # written with the body, if it is passed on as it is
            if name == b"content-type":
                media_type = value.partition(b";")[0].strip().lower().decode("latin-1")
            elif name == b"content-encoding":
                encoding = value.strip().lower().decode("latin-1")
            elif name in HOP_BY_HOP:
                if name == b"transfer-encoding":
                    is_chunked = True
                elif name == b"connection":
                    dropped += [each.strip() for each in value.lower().split(b",")]
                continue
            kept.append(field)
        if dropped:
            kept = [field for field in kept if field[0] not in dropped]
        has_body = not (self._is_head_request or status in (204, 304))
        self._is_until_close = has_body and length is None and not is_chunked
        body = self._body = Body(self, media_type=media_type, encoding=encoding, length=length)
        self._reply = Reply(status, Headers.of_raw(kept), body)
        if self._is_head_request:
            # llhttp would wait for the body that Content-Length speaks of.
            self._is_reusable = self._parser.should_keep_alive()
            self._is_done = True
            self._parser = httptools.HttpResponseParser(self)

    def on_body(self, data: bytes) -> None:
        if not self._is_done:
            self._pieces.append(data)

    def on_message_complete(self) -> None:
        if self._reply is None or self._is_done:  # 1xx, or bytes nobody asked for
            return
        self._is_done = True
        self._is_reusable = self._parser.should_keep_alive()


class Unsent(Exception):
    """The connection was closed before anything was written: nothing was sent."""


class NoAnswer(UpstreamError):
    """The connection closed after the request and before any byte of an answer."""


def _timeout(phase: Phase, message: str) -> UpstreamError:
    retry = Retry.NO if phase is Phase.BODY else Retry.SAME
    return UpstreamError(phase, retry, "upstream_timeout", message, status=504)
