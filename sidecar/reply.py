"""A reply and its body, which is pushed: from the upstream's socket through taps to the client.

    source ──feed──► [taps] ─► [map] ─► [taps] ──write──► sink

The source (a connection, or a filter that answers itself) feeds bytes. Until a sink is attached
the body holds the first ones and pauses the source, so that nothing unbounded exists while filters
decide. Afterwards each piece passes in the turn of the loop that read it: no task, no queue.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

from sidecar.call import COMPLETED, Outcome
from sidecar.errors import CallError, SidecarError
from sidecar.headers import Headers, RawFields
from sidecar.sse import Decoder, Event, JsonEvent

log = logging.getLogger(__name__)

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""The most that event taps may make us hold: one event of a stream, or one whole JSON reply."""


class Source(Protocol):
    """Whoever feeds a body."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self) -> None:
        """Stop for good, at once; nothing may be fed afterwards."""
        ...


class Sink(Protocol):
    """Whoever takes a body's bytes."""

    def write(self, data: bytes) -> None: ...
    def finish(self) -> None:
        """The body is complete."""
        ...

    def fail(self, error: CallError) -> None:
        """The body broke off; what was written is not the whole."""
        ...


class Owner(Protocol):
    """Whose body it is."""

    def body_ended(self, body: Body, outcome: Outcome, error: CallError | None) -> None: ...


class Transformer(Protocol):
    """Changes a body's bytes, piece by piece. Sync; called in the loop's turn."""

    def feed(self, data: bytes) -> bytes: ...
    def finish(self) -> bytes: ...


class Stage(Protocol):
    """One step that bytes pass on their way to the sink."""

    def feed(self, data: bytes) -> bytes: ...
    def finish(self) -> bytes: ...
    def whole(self, data: bytes) -> bytes:
        """`feed` and `finish` at once, for a body that came in one piece."""
        ...


ByteTap = Callable[[bytes], None]
EventTap = Callable[[Event], None]


class Body:
    """The bytes of one reply.

    Filters use `tap_bytes`, `tap_events`, `map` and `discard`; sources `feed`, `finish` and `fail`;
    the edge `attach`, `take` and `abort`. A body ends once: delivered in full, failed or aborted.
    """

    __slots__ = (
        "_ended",
        "_error",
        "_held",
        "_more",
        "_owner",
        "_sink",
        "_source",
        "_stages",
        "dropped_taps",
        "encoding",
        "is_arrived",
        "length",
        "media_type",
        "trailers",
    )

    def __init__(
        self,
        source: Source | None = None,
        *,
        media_type: str = "",
        encoding: str = "",
        length: int | None = None,
    ) -> None:
        self._source = source
        self._sink: Sink | None = None
        self._held: list[bytes] = []
        self._stages: list[Stage] = []
        self._owner: Owner | None = None
        self._more: asyncio.Future[None] | None = None
        self._error: CallError | None = None
        self._ended: Outcome | None = None
        self.is_arrived = False  # the source has fed all there is, or failed
        self.media_type = media_type
        self.encoding = encoding
        self.length = length  # Content-Length, as the upstream announced it; None: not known
        self.trailers: RawFields = []
        self.dropped_taps = 0

    @classmethod
    def of(cls, data: bytes, *, media_type: str = "") -> Body:
        """A body that is already whole."""
        body = cls(media_type=media_type, length=len(data))
        if data:
            body._held.append(data)
        body.is_arrived = True
        return body

    # For filters

    def tap_bytes(self, tap: ByteTap) -> None:
        """Show `tap` every piece before it is written. A tap that raises is dropped and counted."""
        self._taps().byte_taps.append(tap)

    def tap_events(self, tap: EventTap, *, containing: bytes = b"") -> None:
        """Show `tap` every event before its bytes are written, or those whose bytes contain this.

        A stream comes as its events, a JSON reply as one event at its end, anything else not at
        all. All event taps between two maps share one decoder. Say `containing` when you can: a
        piece without it is not even decoded.
        """
        taps = self._taps()
        taps.event_taps.append((containing, tap))

    def map(self, transformer: Transformer) -> None:
        """Change the bytes. Taps registered before see the original, later ones the result."""
        self._stages.append(_Map(transformer))
        self.length = None

    def discard(self) -> None:
        """Give the reply up unread: its upstream is closed and its attempt ends as DISCARDED."""
        self.abort(Outcome.DISCARDED)

    @property
    def is_stream(self) -> bool:
        """Whether this is a stream of server-sent events."""
        return self.media_type == "text/event-stream"

    @property
    def is_whole(self) -> bool:
        """Whether every byte is in hand and none was passed on yet."""
        return (
            self.is_arrived and self._error is None and self._sink is None and self._ended is None
        )

    def peek(self) -> bytes:
        """The bytes in hand before anybody takes them."""
        return b"".join(self._held)

    async def wait_for(self, size: int) -> None:
        """Wait until so many bytes are in hand, or all there are; they stay in hand."""
        seen = total = 0  # a total that goes on: what drips in comes in many pieces
        while True:
            held = self._held
            total += sum(map(len, held[seen:]))
            seen = len(held)
            if total >= size or self.is_arrived or self._ended is not None:
                return
            await self._feed_more()

    async def _feed_more(self) -> None:
        """Let the source go on until it has fed something, or is over."""
        self._more = asyncio.get_running_loop().create_future()
        if self._source is not None:
            self._source.resume()
        await self._more

    async def first_event(self, *, max_bytes: int = 64 * 1024) -> Event | None:
        """Wait for the first event of a stream without taking it; None when there is none.

        Holds at most about `max_bytes`. Raises what the source failed with before.
        """
        decoder, seen, size = Decoder(max_event_bytes=max_bytes), 0, 0
        while True:
            for piece in self._held[seen:]:
                size += len(piece)
                if events := decoder.feed(piece):
                    return events[0]
            seen = len(self._held)
            if self._error is not None:
                raise self._error
            if self._ended is not None:  # given up by somebody else meanwhile
                return None
            if self.is_arrived or size > max_bytes:
                return next(iter(decoder.finish()), None)
            await self._feed_more()

    def _taps(self) -> _Taps:
        if not self._stages or not isinstance(self._stages[-1], _Taps):
            self._stages.append(_Taps(self))
        return self._stages[-1]  # type: ignore[return-value]

    # For sources

    def feed(self, data: bytes) -> None:
        """Take the next bytes: pass them on, or hold them and pause the source."""
        sink = self._sink
        if sink is not None:
            try:
                for stage in self._stages:
                    data = stage.feed(data)
            except Exception as error:
                self._map_failed(error)
                return
            if data:
                sink.write(data)
            return
        if self._ended is not None:
            return
        self._held.append(data)
        if self._source is not None:
            self._source.pause()
        if self._more is not None:
            self._wake()

    def finish(self, data: bytes = b"") -> None:
        """Everything was fed, `data` being the last of it."""
        self.is_arrived = True
        self._source = None
        if self._sink is not None:
            if data:
                self.feed(data)
            if self._ended is None:
                self._complete()
            return
        if data and self._ended is None:
            self._held.append(data)
        if self._more is not None:
            self._wake()

    def fail(self, error: CallError) -> None:
        """The source broke off; what was fed is not the whole."""
        self.is_arrived = True
        self._source = None
        self._error = error
        if self._sink is not None:
            self._break_off(error)
        elif self._more is not None:
            self._wake()

    def _wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    # For the edge

    def owned_by(self, owner: Owner) -> None:
        """Tell `owner` once how the body ended; the core turns that into the attempt's end."""
        if self._ended is None:
            self._owner = owner
        else:
            owner.body_ended(self, self._ended, self._error)

    def attach(self, sink: Sink) -> None:
        """Pass everything held, and from now on every piece, to `sink`."""
        if self._ended is not None:  # a filter returned what it had given up
            sink.fail(self._error or CallError(500, "internal_error", "the answer was given up"))
            return
        self._sink = sink
        held, self._held = self._held, []
        for data in held:
            if self._ended is not None:  # the sink aborted us
                return
            self.feed(data)
        if self._ended is not None:
            return
        if self._error is not None:
            self._break_off(self._error)
        elif self.is_arrived:
            self._complete()
        elif self._source is not None:
            self._source.resume()

    def take(self) -> bytes:
        """The whole body at once, through taps and maps; only when `is_whole`. Ends the body."""
        held = self._held
        data = held[0] if len(held) == 1 else b"".join(held)
        try:
            for stage in self._stages:
                data = stage.whole(data)
        except Exception:
            self._end(Outcome.ABORTED, None)
            raise
        self._end(COMPLETED, None)
        return data

    def pause(self) -> None:
        """The sink is full."""
        if self._source is not None:
            self._source.pause()

    def resume(self) -> None:
        """The sink has room again."""
        if self._source is not None:
            self._source.resume()

    def abort(self, outcome: Outcome, error: CallError | None = None) -> None:
        """Stop the source and end as `outcome`; nothing is written any more. Safe at any time."""
        source, self._source = self._source, None
        if source is not None:
            source.abort()
        self._end(outcome, error)

    # Endings

    def _complete(self) -> None:
        data = b""
        try:
            for stage in self._stages:
                data = (stage.feed(data) if data else b"") + stage.finish()
        except Exception as error:
            self._map_failed(error)
            return
        sink = self._sink
        if data and sink is not None:
            sink.write(data)
        self._end(COMPLETED, None)
        if sink is not None:
            sink.finish()

    def _break_off(self, error: CallError) -> None:
        sink = self._sink
        self._end(Outcome.UPSTREAM_FAILED, error)
        if sink is not None:
            sink.fail(error)

    def _map_failed(self, error: Exception) -> None:
        """A transformer raised: what follows cannot be trusted, so the answer breaks off here."""
        log.error("map_failed", exc_info=error)
        sink = self._sink
        failure = CallError(500, "internal_error", "a filter failed while changing the answer")
        self.abort(Outcome.ABORTED, failure)
        if sink is not None:
            sink.fail(failure)

    def _end(self, outcome: Outcome, error: CallError | None) -> None:
        if self._ended is not None:
            return
        self._ended = outcome
        self._error = error
        self._held.clear()
        self._stages = []  # taps are closures over the call: a cycle, were they kept
        self._sink = None
        if self._more is not None:
            self._wake()
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.body_ended(self, outcome, error)

    def __repr__(self) -> str:
        state = (
            "ended" if self._ended is not None else "flowing" if self._sink is not None else "held"
        )
        return f"<Body {self.media_type or '-'} {state}>"


class Reply:
    """An answer: status, end-to-end headers, and the body whose first byte is already here."""

    __slots__ = ("body", "first_byte_at", "headers", "status")

    def __init__(self, status: int, headers: Headers, body: Body) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.first_byte_at = 0.0  # when the upstream's first byte was read; 0: made here

    @classmethod
    def of(cls, status: int, data: bytes, *, media_type: str = "application/json") -> Reply:
        """An answer made here, whole."""
        headers = Headers({"content-type": media_type})
        return cls(status, headers, Body.of(data, media_type=media_type))

    def peeked(self, max_bytes: int = 4096) -> bytes:
        """The beginning of what is here of the body, decompressed; it stays in hand."""
        data = self.body.peek()[:max_bytes]
        if self.body.encoding in ("gzip", "x-gzip", "deflate"):
            try:
                inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
                return inflate.decompress(data, max_bytes)
            except zlib.error:
                pass
        return data

    async def beginning(self, max_bytes: int = 4096, *, within_s: float = 1.0) -> bytes:
        """`peeked`, having waited a moment for what is not here yet."""
        if not self.body.is_arrived:
            try:
                async with asyncio.timeout(within_s):
                    await self.body.wait_for(max_bytes)
            except TimeoutError:
                pass
        return self.peeked(max_bytes)

    def discard(self) -> None:
        """Give the reply up; what a filter does with every reply that it does not return."""
        self.body.discard()

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.body!r}>"


class _Map:
    """A transformer among the stages."""

    __slots__ = ("feed", "finish")

    def __init__(self, transformer: Transformer) -> None:
        self.feed = transformer.feed
        self.finish = transformer.finish

    def whole(self, data: bytes) -> bytes:
        return (self.feed(data) if data else b"") + self.finish()


class _Taps:
    """The taps between two maps. Taps are read-only, so the bytes pass as they came."""

    __slots__ = ("_body", "_reader", "byte_taps", "event_taps")

    def __init__(self, body: Body) -> None:
        self._body = body
        self._reader: _EventReader | None = None
        self.byte_taps: list[ByteTap] = []
        self.event_taps: list[tuple[bytes, EventTap]] = []

    def feed(self, data: bytes) -> bytes:
        if self.byte_taps:
            for byte_tap in tuple(self.byte_taps):
                try:
                    byte_tap(data)
                except Exception:
                    self._drop(byte_tap)
        if self.event_taps:
            reader = self._reader
            if reader is None:
                reader = self._reader = _EventReader.of(self._body.media_type, self._body.encoding)
            if reader.is_between_events and data.endswith(b"\n\n"):
                for containing, _ in self.event_taps:
                    if containing in data:
                        break
                else:  # whole events, and nobody wants them: nearly every piece of a stream
                    return data
            try:
                events = reader.feed(data)
            except (SidecarError, zlib.error):
                self._drop_all()
            else:
                self._show(events)
        return data

    def finish(self) -> bytes:
        if self.event_taps and self._reader is not None:
            self._show(self._reader.finish())
        return b""

    def whole(self, data: bytes) -> bytes:
        body = self._body
        if self.byte_taps or body.media_type != "application/json" or body.encoding:
            if data:
                self.feed(data)
            self.finish()
        elif data and len(data) <= MAX_EVENT_BYTES:
            self._show((JsonEvent(data),))
        elif data:
            self._drop_all()
        return data

    def _show(self, events: Sequence[Event]) -> None:
        for event in events:
            for containing, tap in tuple(self.event_taps):
                if containing in event.raw:
                    try:
                        tap(event)
                    except Exception:
                        self._drop(tap)

    def _drop(self, tap: ByteTap | EventTap) -> None:
        name = getattr(tap, "__qualname__", repr(tap))
        log.exception("tap_dropped", extra={"tap": name})  # noqa: LOG004 - called by handlers
        self._body.dropped_taps += 1
        self.byte_taps = [each for each in self.byte_taps if each is not tap]
        self.event_taps = [each for each in self.event_taps if each[1] is not tap]

    def _drop_all(self) -> None:
        log.warning("event_taps_dropped", extra={"media_type": self._body.media_type})
        self._body.dropped_taps += len(self.event_taps)
        self.event_taps.clear()


class _EventReader:
    """Turns a body's bytes into events, by its media type."""

    @property
    def is_between_events(self) -> bool:
        """Whether a piece of whole events may be left out."""
        return False

    @staticmethod
    def of(media_type: str, encoding: str) -> _EventReader:
        reader: _EventReader
        if media_type == "text/event-stream":
            reader = _SseReader()
        elif media_type == "application/json" or media_type.endswith("+json"):
            reader = _JsonReader()
        else:
            return _EventReader()
        if not encoding or encoding == "identity":
            return reader
        if encoding in ("gzip", "x-gzip", "deflate"):
            return _InflatingReader(reader)
        return _EventReader()

    def feed(self, data: bytes) -> Sequence[Event]:
        return ()

    def finish(self) -> Sequence[Event]:
        return ()


class _SseReader(_EventReader):
    def __init__(self) -> None:
        self._decoder = decoder = Decoder(MAX_EVENT_BYTES)
        self.feed = decoder.feed  # type: ignore[method-assign]
        self.finish = decoder.finish  # type: ignore[method-assign]

    @property
    def is_between_events(self) -> bool:
        return self._decoder.is_between_events


class _JsonReader(_EventReader):
    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Sequence[Event]:
        self._size += len(data)
        if self._size > MAX_EVENT_BYTES:
            self._pieces.clear()
            raise SidecarError(f"a JSON reply is larger than {MAX_EVENT_BYTES} bytes")
        self._pieces.append(data)
        return ()

    def finish(self) -> Sequence[Event]:
        pieces = self._pieces
        return [JsonEvent(pieces[0] if len(pieces) == 1 else b"".join(pieces))] if pieces else ()


class _InflatingReader(_EventReader):
    """Looks inside a compressed body; the client still gets the bytes as they came.

    Output is bounded by the reader behind it, input by the pieces: a bomb only costs the taps.
    """

    def __init__(self, inner: _EventReader) -> None:
        self._inner = inner
        self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)

    def feed(self, data: bytes) -> Sequence[Event]:
        events: list[Event] = []
        while data:
            events.extend(self._inner.feed(self._inflate.decompress(data, 256 * 1024)))
            data = self._inflate.unconsumed_tail
        return events

    def finish(self) -> Sequence[Event]:
        return self._inner.finish()
