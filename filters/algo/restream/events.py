"""The events of a recorded stream, taken apart and put together: what all forms share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from sidecar.api import Event

Fields = dict[str, Any]

PIECE_CHARS = 200
"""Of a text in one event: few events, and still one sees the text grow."""

DONE = b"data: [DONE]\n\n"


class Unsayable(Exception):
    """There is something here that the other form may have no words for."""


def read(stream: bytes) -> list[Event]:
    """The events of a whole stream; comments are left out.

    Source: WHATWG HTML, section 9.2.6. Nothing is missing here, so nothing is decoded bit by bit.
    """
    if b"\r" in stream:
        stream = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    blocks = stream.removeprefix(b"\xef\xbb\xbf").split(b"\n\n")
    return [Event(block) for each in blocks if (block := each.strip(b"\n")) and _has_data(block)]


def _has_data(block: bytes) -> bool:
    return block.startswith(b"data") or b"\ndata" in block or not block.startswith(b":")


def write(value: Any, name: str = "") -> bytes:
    """One event."""
    data = b"data: %b\n\n" % orjson.dumps(value)
    return b"event: %b\n%b" % (name.encode(), data) if name else data


def object_of(event: Event) -> Fields:
    """The event's data as a JSON object."""
    value = event.json()
    if type(value) is not dict:
        raise Unsayable
    return value


def cut(text: str) -> Iterator[str]:
    """`text` in pieces of at most `PIECE_CHARS`, each ending at the end of a word if it can."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        border = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
        end = border + 1 if border >= start else end
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def only(fields: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raise `Unsayable` when there is anything but `known` fields. What is null says nothing."""
    if not fields.keys() <= known:
        for name in fields.keys() - known:
            if fields[name] is not None:
                raise Unsayable


def need(is_so: object) -> None:
    """Raise `Unsayable` unless `is_so`."""
    if not is_so:
        raise Unsayable
