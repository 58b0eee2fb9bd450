"""`application/vnd.amazon.eventstream`, decoded without I/O: how Amazon Bedrock streams.

Source: AWS, "Event stream encoding". A message is a prelude of two lengths and their CRC-32,
typed headers, a payload, and the CRC-32 of it all; integers are big-endian. Bytes may be cut
anywhere. What carries the bytes, and what the messages mean, is for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from uuid import UUID
from zlib import crc32

from sidecar.errors import SidecarError

MAX_HEADERS_BYTES = 128 * 1024
MAX_PAYLOAD_BYTES = 24 * 1024 * 1024

_PRELUDE = Struct(">III")  # of the whole message, of its headers, CRC-32 of these two
_CRC = Struct(">I")
_FRAME_BYTES = _PRELUDE.size + _CRC.size  # what is neither headers nor payload

# Types of a header's value.
_TRUE, _FALSE, _INT8, _INT16, _INT32, _INT64, _BYTES, _STRING, _TIMESTAMP, _UUID = range(10)
_WIDTHS = {
    _TRUE: 0,
    _FALSE: 0,
    _INT8: 1,
    _INT16: 2,
    _INT32: 4,
    _INT64: 8,
    _TIMESTAMP: 8,
    _UUID: 16,
}
"""Bytes of a value; the types that are not here have their length before the value."""

HeaderValue = bool | int | bytes | str | UUID
"""A timestamp is an `int`, Unix milliseconds."""


class BadMessage(SidecarError):
    """Bytes that are no message: cut off, altered on the way, or larger than the bound."""


class Message:
    """One message. `total_length` counts its bytes on the wire."""

    __slots__ = ("headers", "payload", "total_length")

    def __init__(self, headers: dict[str, HeaderValue], payload: bytes, total_length: int) -> None:
        self.headers = headers
        self.payload = payload
        self.total_length = total_length

    @property
    def is_exception(self) -> bool:
        """Whether it ends the stream with a failure, modelled or not; the HTTP status was 200."""
        return self.headers.get(":message-type") in ("exception", "error")

    @property
    def event_type(self) -> str:
        """The name of the event, the exception or the error; empty when there is none."""
        headers = self.headers
        for name in (":event-type", ":exception-type", ":error-code"):
            value = headers.get(name)
            if isinstance(value, str):
                return value
        return ""

    def __repr__(self) -> str:
        kind = "exception " if self.is_exception else ""
        return f"<Message {kind}{self.event_type} {len(self.payload)} B>"


class Decoder:
    """Bytes in, messages out.

    Holds no more than one message and what was fed last; time is linear in the bytes fed. Raises
    `BadMessage` for what is none, as soon as it is seen: a length beyond `max_message_bytes` with
    the prelude. Messages of the same feed before it are lost, and the decoder is spent.
    """

    __slots__ = ("_buffer", "_max", "_needed")

    def __init__(
        self, max_message_bytes: int = MAX_PAYLOAD_BYTES + MAX_HEADERS_BYTES + _FRAME_BYTES
    ) -> None:
        self._max = max_message_bytes
        self._buffer = bytearray()  # of the message that is still coming
        self._needed = _PRELUDE.size  # bytes before anything more can be said of it

    def feed(self, data: bytes) -> Sequence[Message]:
        """The messages that `data` completes, in order."""
        buffer = self._buffer
        buffer += data
        messages = []
        start = 0
        while len(buffer) - start >= self._needed:
            total, headers_length = self._lengths(buffer, start)
            if len(buffer) - start < total:
                self._needed = total
                break
            messages.append(_message(bytes(buffer[start : start + total]), headers_length))
            start += total
            self._needed = _PRELUDE.size
        if start:
            del buffer[:start]
        return messages

    def finish(self) -> None:
        """The stream has ended. Raises `BadMessage` when that was inside a message."""
        if self._buffer:
            raise BadMessage(f"the stream ended {len(self._buffer)} bytes into a message")

    def _lengths(self, buffer: bytearray, start: int) -> tuple[int, int]:
        """Bytes of the message that begins at `start`, and of its headers."""
        total, headers_length, crc = _PRELUDE.unpack_from(buffer, start)
        if crc32(buffer[start : start + 8]) != crc:
            raise BadMessage("a message's lengths do not match their checksum")
        if total > self._max:
            raise BadMessage(f"a message is larger than {self._max} bytes")
        if headers_length > MAX_HEADERS_BYTES:
            raise BadMessage(f"a message's headers are larger than {MAX_HEADERS_BYTES} bytes")
        if total < headers_length + _FRAME_BYTES:
            raise BadMessage("a message is shorter than its headers")
        return total, headers_length


def _message(frame: bytes, headers_length: int) -> Message:
    end = len(frame) - _CRC.size
    if crc32(memoryview(frame)[:end]) != _CRC.unpack_from(frame, end)[0]:
        raise BadMessage("a message does not match its checksum")
    payload_start = _PRELUDE.size + headers_length
    headers = _headers(frame[_PRELUDE.size : payload_start])
    return Message(headers, frame[payload_start:end], len(frame))


def _headers(block: bytes) -> dict[str, HeaderValue]:
    """Each header is the name's length (1 byte), the name, the type (1 byte) and the value."""
    headers: dict[str, HeaderValue] = {}
    end = len(block)
    at = 0
    while at < end:
        name_start = at + 1
        at = name_start + block[at]
        if at >= end:
            raise BadMessage("a header's name is longer than the headers")
        name = _text(block[name_start:at])
        kind = block[at]
        at += 1
        width = _WIDTHS.get(kind)
        if width is None:
            if kind not in (_BYTES, _STRING):
                raise BadMessage(f"a header's value has the unknown type {kind}")
            width = int.from_bytes(block[at : at + 2], "big")
            at += 2
        value_start = at
        at += width
        if at > end:
            raise BadMessage("a header's value is longer than the headers")
        if name in headers:
            raise BadMessage("a header comes twice")
        headers[name] = _value(kind, block[value_start:at])
    return headers


def _value(kind: int, raw: bytes) -> HeaderValue:
    if kind == _STRING:
        return _text(raw)
    if kind == _BYTES:
        return raw
    if kind == _UUID:
        return UUID(bytes=raw)
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE
    return int.from_bytes(raw, "big", signed=True)


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise BadMessage("a header is not UTF-8 text") from None
