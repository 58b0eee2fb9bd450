"""Puts an answer on the wire: head, framing, pieces, and where it stops.

Pure: answer and settings in, `Delivery` out, ready to be written piece by piece. Framing is done
here and not by the HTTP server, because a mock must also be able to do what no server does: stop
midway, close early, send trailers, cut its bytes anywhere. Formats: RFC 9112 (HTTP/1.1).
"""

from __future__ import annotations

import gzip
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from itertools import accumulate

from sidecar.mock.content import REQUEST_ID_MARK, Answer, Told
from sidecar.mock.script import BEFORE_HEAD, Framing, Settings

EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </mock>; rel=preconnect\r\n\r\n"
TRAILER_NAME = "x-mock-trailer"

_LAST_CHUNK = b"0\r\n\r\n"
_LAST_CHUNK_WITH_TRAILER = b"0\r\nx-mock-trailer: done\r\n\r\n"
_REASONS = {status.value: status.phrase for status in HTTPStatus} | {529: "Site Overloaded"}
_BODILESS = frozenset((204, 304))


class Ending(Enum):
    """What happens after the last write."""

    DONE = "the answer is complete"
    HANG = "silence, until the client leaves"
    DIE = "the connection closes, the answer being incomplete"


@dataclass(frozen=True, slots=True)
class Delivery:
    """An answer ready to be written.

    `head` ends inside the request id's header line: the call's id is still to be added, and the
    empty line. `events_done[i]` is how many events are wholly out after write `i`. An answer that
    dies or hangs before its head has no head and no writes.
    """

    answer: Answer
    head: bytes
    writes: Sequence[bytes]
    events_done: Sequence[int]
    ending: Ending
    must_close: bool  # the connection cannot serve another request
    has_request_id_mark: bool
    is_failure: bool  # an error status, or an error event on the way
    good_events: int  # events before the error event, or all

    @property
    def is_stream(self) -> bool:
        return self.answer.events is not None

    def tokens_after(self, writes: int) -> int:
        """Output tokens the client has been sent after that many writes."""
        if self.is_stream:
            events = self.events_done[writes - 1] if writes else 0
            return self.answer.tokens_after(min(events, self.good_events))
        return self.answer.output_tokens if self._is_whole_after(writes) else 0

    def told_after(self, writes: int) -> Told | None:
        """The usage the client has been told after that many writes, the last one if several."""
        if self.is_stream:
            events = self.events_done[writes - 1] if writes else 0
            return self.answer.told_after(min(events, self.good_events))
        return self.answer.told_after(0) if self._is_whole_after(writes) else None

    def _is_whole_after(self, writes: int) -> bool:
        return self.ending is Ending.DONE and writes == len(self.writes)


def deliver(
    answer: Answer, settings: Settings, *, allows_gzip: bool, is_head: bool, is_http10: bool
) -> Delivery:
    """The delivery of an answer to a request that is HEAD or not, HTTP/1.0 or not."""
    stop = _stop_point(settings)
    is_stream = answer.events is not None
    pieces, good_events = _pieces(answer, settings)
    is_failure = answer.status >= 300 or good_events < len(pieces)
    if stop is not None and not is_stream and pieces:
        middle = len(pieces[0]) // 2
        pieces = (pieces[0][:middle], pieces[0][middle:])
    ending = Ending.DONE
    if stop is not None and stop <= len(pieces):
        ending = Ending.HANG if settings.die is None else Ending.DIE
    framing = _framing(answer, settings, is_http10=is_http10)
    must_close = framing == "close" or is_http10 or ending is not Ending.DONE
    has_mark = REQUEST_ID_MARK in answer.body
    if stop == BEFORE_HEAD:
        return Delivery(answer, b"", (), (), ending, must_close, has_mark, is_failure, 0)

    coding: tuple[tuple[str, str], ...] = ()
    if settings.encoding == "gzip" and allows_gzip:
        pieces = _compress(pieces, is_stream=is_stream)
        coding = (("content-encoding", "gzip"), ("vary", "accept-encoding"))
    is_bodiless = is_head or answer.status in _BODILESS
    lines = [f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in (*answer.headers, *coding)]
    if settings.retry_after is not None:
        lines.append(f"retry-after: {settings.retry_after}")
    if framing == "length" and answer.status not in _BODILESS:
        lines.append(f"content-length: {sum(map(len, pieces))}")
    elif framing == "chunked" and not is_bodiless:
        lines.append("transfer-encoding: chunked")
        if settings.trailer:
            lines.append(f"trailer: {TRAILER_NAME}")
    lines.append(f"{answer.request_id_header}: ")

    if is_bodiless:
        pieces = ()
    if ending is not Ending.DONE:
        pieces = pieces[:stop]
    writes, events_done = _split(pieces, settings.split)
    if framing == "chunked" and not is_bodiless:
        writes = _frame(writes)
        if ending is Ending.DONE:
            # One write for the last event and the end of the body.
            tail = _LAST_CHUNK_WITH_TRAILER if settings.trailer else _LAST_CHUNK
            writes = (*writes[:-1], writes[-1] + tail) if writes else (tail,)
            events_done = events_done or (0,)
    head = "\r\n".join(lines).encode("latin-1")
    return Delivery(
        answer, head, writes, events_done, ending, must_close, has_mark, is_failure, good_events
    )


def allows_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding value takes gzip (RFC 9110, 12.5.3)."""
    for part in accept_encoding.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() in ("gzip", "x-gzip", "*"):
            return weight.replace(" ", "").rstrip("0.") not in ("q=", "q")
    return False


def _stop_point(settings: Settings) -> int | None:
    return settings.die if settings.die is not None else settings.hang


def _pieces(answer: Answer, settings: Settings) -> tuple[tuple[bytes, ...], int]:
    """The body before framing, an event a piece; and how many come before the error event."""
    if answer.events is None:
        pieces = (answer.body,) if answer.body else ()
        return pieces, 0 if answer.is_refusal else len(pieces)
    at = settings.error_event
    if at is None or at > len(answer.events):
        return answer.events, len(answer.events)
    return (*answer.events[:at], answer.error_event), at


def _framing(answer: Answer, settings: Settings, *, is_http10: bool) -> Framing:
    wanted = settings.body or ("length" if answer.events is None else "chunked")
    if settings.trailer:
        wanted = "chunked"
    # HTTP/1.0 knows no chunks.
    return "close" if wanted == "chunked" and is_http10 else wanted


def _compress(pieces: tuple[bytes, ...], *, is_stream: bool) -> tuple[bytes, ...]:
    """The pieces in one gzip member; those of a stream flushed, so each can be read at once."""
    if not is_stream and len(pieces) == 1:
        return (gzip.compress(pieces[0], mtime=0),)
    compressor = zlib.compressobj(wbits=31)
    made = [compressor.compress(piece) + compressor.flush(zlib.Z_SYNC_FLUSH) for piece in pieces]
    if made:
        made[-1] += compressor.flush()
    return tuple(made)


def _split(pieces: tuple[bytes, ...], size: int | None) -> tuple[tuple[bytes, ...], Sequence[int]]:
    """Writes of `size` bytes each, whatever they cut, and the events done after each."""
    if size is None:
        return pieces, range(1, len(pieces) + 1)
    whole = b"".join(pieces)
    ends = list(accumulate(map(len, pieces)))
    starts = range(0, len(whole), size)
    writes = tuple(whole[at : at + size] for at in starts)
    return writes, tuple(bisect_right(ends, min(at + size, len(whole))) for at in starts)


def _frame(writes: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Each write as an HTTP chunk; equal writes share one bytes object."""
    made: dict[bytes, bytes] = {}
    for data in writes:
        # An empty chunk would end the body.
        if data and data not in made:
            made[data] = b"%x\r\n%b\r\n" % (len(data), data)
    return tuple(made.get(data, b"") for data in writes)
