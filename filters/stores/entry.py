"""One recorded answer, and how it is written where others may read it.

The bytes carry a checksum over all of them: what was torn by a crash, cut short, or written by
somebody else is recognised and never served. They are data alone; nothing in them is run.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from sidecar.api import Usage

VERSION = 1
"""Of the layout. Entries of another one are not read."""
_HEAD = struct.Struct("<4sBIIQ")  # magic, version, bytes of: facts, rhythm, body
_CHECK = struct.Struct("<I")
_MAGIC = b"LSCE"

ENTRY_BYTES = 800
"""What an entry takes besides its parts: the tuple, its key, its places in the cache's tables."""
FIELD_BYTES = 130
"""What a header takes besides its name and value."""
PIECE_BYTES = 120
"""What a piece of the rhythm takes. (All three measured on CPython 3.11.)"""


class Entry(NamedTuple):
    """One recorded answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    """End-to-end ones, as `Headers.raw` gives them."""
    media_type: str
    body: bytes
    """As it came; of a stream its events."""
    rhythm: tuple[tuple[int, int], ...]
    """Of each piece of a stream, milliseconds since the first one and bytes. Empty: not recorded.
    """
    usage: Usage | None
    team: str
    model: str
    """The call's label, by which entries are purged."""
    upstream: str
    """Who answered."""
    upstream_model: str
    created_at: float
    """Unix seconds."""
    expires_at: float
    """Unix seconds."""


def size_of(entry: Entry) -> int:
    """The bytes that an entry is counted with, in every backend: about what it takes in memory."""
    size = ENTRY_BYTES + len(entry.body) + PIECE_BYTES * len(entry.rhythm)
    for name, value in entry.headers:
        size += FIELD_BYTES + len(name) + len(value)
    return size


def is_of(entry: Entry, team: str | None, model: str | None) -> bool:
    """Whether it is of this team and of this model; None: of any."""
    return (team is None or entry.team == team) and (model is None or entry.model == model)


def encode(entry: Entry) -> bytes:
    """The entry as bytes: head, facts, rhythm, body, checksum. Raises ValueError for numbers that
    no real answer has: a piece of 4 GiB, 2**64 tokens."""
    try:
        facts, rhythm = _facts(entry), _rhythm(entry)
    except (TypeError, struct.error) as error:
        raise ValueError(f"the entry cannot be written: {error}") from error
    head = _HEAD.pack(_MAGIC, VERSION, len(facts), len(rhythm), len(entry.body))
    check = crc32(entry.body, crc32(rhythm, crc32(facts, crc32(head))))
    return b"".join((head, facts, rhythm, entry.body, _CHECK.pack(check)))


def _facts(entry: Entry) -> bytes:
    return orjson.dumps(
        (
            entry.status,
            [(name.decode("latin-1"), value.decode("latin-1")) for name, value in entry.headers],
            None if entry.usage is None else list(entry.usage),
            entry.created_at,
            entry.expires_at,
            *(
                _wrapped(text)
                for text in (
                    *(entry.media_type, entry.team, entry.model),
                    *(entry.upstream, entry.upstream_model),
                )
            ),
        )
    )


def _rhythm(entry: Entry) -> bytes:
    numbers = [number for piece in entry.rhythm for number in piece]
    return struct.pack(f"<{len(numbers)}I", *numbers)


def decode(data: bytes) -> Entry | None:
    """The entry that was encoded; None for anything that is not, to the last bit, what `encode`
    gave."""
    try:
        magic, version, facts_bytes, rhythm_bytes, body_bytes = _HEAD.unpack_from(data)
        if magic != _MAGIC or version != VERSION:
            return None
        facts_end = _HEAD.size + facts_bytes
        rhythm_end = facts_end + rhythm_bytes
        body_end = rhythm_end + body_bytes
        if body_end + _CHECK.size != len(data):
            return None
        if (crc32(memoryview(data)[:body_end]),) != _CHECK.unpack_from(data, body_end):
            return None
        facts = orjson.loads(data[_HEAD.size : facts_end])
        numbers = struct.unpack(f"<{rhythm_bytes // 4}I", data[facts_end:rhythm_end])
        return _entry(facts, numbers, data[rhythm_end:body_end])
    except (struct.error, ValueError, TypeError, AttributeError):
        return None  # too short, or by somebody who knows the checksum and not the rest


def _entry(facts: Any, numbers: tuple[int, ...], body: bytes) -> Entry:
    status, headers, usage, created_at, expires_at, *texts = facts
    media_type, team, model, upstream, upstream_model = (_unwrapped(text) for text in texts)
    return Entry(
        int(status),
        tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers),
        media_type,
        body,
        tuple(zip(numbers[::2], numbers[1::2], strict=True)),
        None if usage is None else Usage(*usage),
        team,
        model,
        upstream,
        upstream_model,
        float(created_at),
        float(expires_at),
    )


# Names may hold bytes that are no UTF-8, kept as surrogates, which JSON does not know.


def _wrapped(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("latin-1")


def _unwrapped(text: str) -> str:
    return text if text.isascii() else text.encode("latin-1").decode("utf-8", "surrogatepass")
