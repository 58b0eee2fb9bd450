"""Server-sent events, decoded and encoded without I/O.

Source: WHATWG HTML, section 9.2 "Server-sent events". Bytes may be cut anywhere: inside a line, a
line end or a UTF-8 character. What carries the bytes, and what the events mean, is for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from sidecar.errors import SidecarError


class EventTooLarge(SidecarError):
    """One event is larger than the decoder's bound."""


_UNREAD: Any = object()


class Event:
    """One event; its fields are read only when somebody asks, and then once for all.

    `raw` holds the event's lines with `\\n` line ends, without the blank line that ends it.
    """

    __slots__ = ("_data", "_json", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._data: bytes | None = None
        self._json: Any = _UNREAD

    @property
    def data(self) -> bytes:
        """The `data` lines joined by `\\n`; empty when there are none."""
        if self._data is None:
            raw = self.raw
            if raw.startswith(b"data: ") and b"\n" not in raw:  # nearly every event of an LLM
                self._data = raw[6:]
            else:
                self._data = b"\n".join(self._values(b"data"))
        return self._data

    @property
    def name(self) -> bytes:
        """The last `event` field, or `b"message"`."""
        if b"event" not in self.raw:
            return b"message"
        names = self._values(b"event")
        return (names[-1] if names else b"") or b"message"

    def json(self) -> Any:
        """The data parsed as JSON, or None when it is not JSON (such as `[DONE]`)."""
        if self._json is _UNREAD:
            try:
                self._json = orjson.loads(self._data or self.data)
            except orjson.JSONDecodeError:
                self._json = None
        return self._json

    def last_field(self, name: bytes) -> Any:
        """The value of the data's last field `name`, when that stands in the outermost object.

        Parses from there on only: `usage` tends to stand at the end, behind an answer of any
        length. None when there is no such field, or it stands deeper; then `json` knows.
        """
        data = self.data
        start = data.rfind(b'"%b"' % name)
        if start < 0:
            return None
        try:
            # Valid only if nothing but the outermost object is open there.
            fields = orjson.loads(b"{" + data[start:])
        except orjson.JSONDecodeError:
            return None
        return fields.get(name.decode()) if isinstance(fields, dict) else None

    def _values(self, field: bytes) -> list[bytes]:
        values = []
        for line in self.raw.split(b"\n"):
            name, colon, value = line.partition(b":")
            if name == field:
                values.append(value[1:] if colon and value[:1] == b" " else value)
        return values

    def __repr__(self) -> str:
        return f"<Event {self.name.decode('utf-8', 'replace')} {len(self.data)} B>"


class JsonEvent(Event):
    """A whole JSON reply, shown to event taps as the one event it is."""

    __slots__ = ()

    def __init__(self, data: bytes) -> None:
        self.raw = self._data = data
        self._json = _UNREAD

    @property
    def name(self) -> bytes:
        return b"message"


class Decoder:
    """Bytes in, events out.

    Time and memory are linear in the bytes fed: an event that comes in a thousand pieces is joined
    once. Raises `EventTooLarge` when one event passes `max_event_bytes`; it is spent afterwards.
    """

    __slots__ = ("_carriage_return", "_held", "_max", "_pieces", "_started")

    def __init__(self, max_event_bytes: int = 8 * 1024 * 1024) -> None:
        self._max = max_event_bytes
        self._pieces: list[bytes] = []  # of the event that is still coming
        self._held = 0  # their size
        self._carriage_return = False  # the last byte fed was \r, its \n may still come
        self._started = False

    @property
    def is_between_events(self) -> bool:
        """Whether nothing of an event is held: bytes of whole events could be left out here."""
        return self._started and not self._pieces and not self._carriage_return

    def feed(self, data: bytes) -> Sequence[Event]:
        """The events that `data` completes, in order."""
        if self._carriage_return or b"\r" in data:
            data = self._with_plain_line_ends(data)
        if not self._started and data:
            data = self._without_mark(data)
        pieces = self._pieces
        if pieces:
            if b"\n\n" not in data and not (data[:1] == b"\n" and pieces[-1][-1:] == b"\n"):
                self._hold(data)
                return ()
            pieces.append(data)
            data = b"".join(pieces)
            pieces.clear()
            self._held = 0
        elif b"\n\n" not in data:
            self._hold(data)
            return ()
        *blocks, tail = data.split(b"\n\n")
        if tail:
            self._hold(tail)
        return [
            Event(block)
            for raw in blocks
            if (block := raw.strip(b"\n")) and not (block[:1] == b":" and _is_comment(block))
        ]

    def finish(self) -> Sequence[Event]:
        """The event that the end of the stream completes, if it has any line at all.

        The standard drops it; providers that end without a blank line make us keep it.
        """
        block = b"".join(self._pieces).strip(b"\n")
        self._pieces.clear()
        self._held = 0
        return [Event(block)] if block and not _is_comment(block) else ()

    def _hold(self, data: bytes) -> None:
        if not data:
            return
        self._held += len(data)
        if self._held > self._max:
            self._pieces.clear()
            raise EventTooLarge(f"an event is larger than {self._max} bytes")
        self._pieces.append(data)

    def _with_plain_line_ends(self, data: bytes) -> bytes:
        if self._carriage_return:
            data = b"\r" + data
        self._carriage_return = data[-1:] == b"\r"
        if self._carriage_return:
            data = data[:-1]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _without_mark(self, data: bytes) -> bytes:
        """Drop a byte order mark at the very start, wherever it is cut."""
        mark = b"\xef\xbb\xbf"
        first = b"".join(self._pieces) + data
        if len(first) < 3 and mark.startswith(first):
            return data  # held as a piece; looked at again with the next bytes
        self._started = True
        if first.startswith(mark):
            self._pieces.clear()
            self._held = 0
            return first[3:]
        return data


def _is_comment(block: bytes) -> bool:
    return all(line[:1] == b":" for line in block.split(b"\n"))


def encode(data: bytes, name: str | None = None) -> bytes:
    """One event as bytes. Line ends inside `data` become further `data` lines."""
    head = f"event: {name}\n".encode() if name else b""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return head + b"".join([b"data: " + line + b"\n" for line in lines]) + b"\n"
