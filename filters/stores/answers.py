"""What of an answer is kept, and how a kept one is given again: the same for every cache.

Which calls are for a cache, and where it keeps what, is theirs.
"""

from __future__ import annotations

from filters.algo.cache_key import is_finished
from filters.algo.restream import stream_of, whole_of
from filters.stores.entry import Entry
from filters.stores.rhythm import Rhythm
from sidecar.api import (
    CACHED,
    USAGE,
    Body,
    Call,
    Clock,
    Event,
    Headers,
    JsonEvent,
    Reply,
    Target,
    Usage,
)

STREAM, JSON = "text/event-stream", "application/json"

HEADER = b"x-sidecar-cache"
KEY_HEADER = b"x-sidecar-cache-key"
HIT, MISS, JOIN, BYPASS = b"hit", b"miss", b"join", b"bypass"
"""What answers say of themselves."""

MAX_CONVERTED_BYTES = 128 * 1024
"""A longer answer is not said in the other form: 2 ms at most."""

NOT_KEPT = frozenset(
    {
        *(b"set-cookie", b"date", b"age", b"retry-after", b"content-length", b"x-should-retry"),
        *(b"cache-control", b"expires", b"etag", b"last-modified", b"server-timing"),
    }
)
NOT_KEPT_PREFIXES = (b"x-ratelimit-", b"anthropic-ratelimit-", b"x-sidecar-")
"""Headers of an answer that are true of its moment only."""


def may_keep(call: Call, media_type: str, data: bytes) -> bool:
    """Whether the body of a 200 is an answer, and all of it, and an upstream's: what another cache
    behind this one gave is as old as it is there, and forgotten there."""
    if CACHED in call:
        return False
    dialect = call.dialect
    if media_type == JSON:
        event = JsonEvent(data)
        return isinstance(event.json(), dict) and dialect.error_in(event) is None
    if media_type != STREAM or not is_finished(dialect.name, call.endpoint.name, data):
        return False
    if b"error" not in data:
        return True
    blocks = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n")
    told = [Event(block.strip(b"\n")) for block in blocks if b"error" in block]
    return all(dialect.error_in(event) is None for event in told)


def entry_of(
    call: Call,
    team: str,
    status: int,
    headers: Headers,
    media_type: str,
    data: bytes,
    *,
    now: float,
    ttl_s: float,
    rhythm: tuple[tuple[int, int], ...] = (),
) -> Entry:
    """The answer to `call`, to be given again for `ttl_s` seconds from `now` (Unix seconds)."""
    target = call.current_target
    assert target is not None
    return Entry(
        status=status,
        headers=tuple(field for field in headers.raw() if is_kept(field[0])),
        media_type=media_type,
        body=data,
        rhythm=rhythm,
        usage=call.get(USAGE),
        team=team,
        model=call.label,
        upstream=target.upstream.name,
        upstream_model=target.model or "",
        created_at=now,
        expires_at=now + ttl_s,
    )


def replay(call: Call, entry: Entry, clock: Clock) -> Reply | None:
    """The recorded answer in the form that `call` asks for, which is a hit from now on; None, and
    nothing has happened: it has no such form."""
    media_type, data = entry.media_type, entry.body
    raw = list(entry.headers)
    if entry.status == 200 and (media_type == STREAM) != call.is_stream:
        if len(data) > MAX_CONVERTED_BYTES:
            return None
        converted = _converted(call, entry.media_type, data, entry.usage)
        if converted is None:
            return None
        media_type, data = converted
        raw = _with_type(raw, media_type)
    raw.append((b"age", b"%d" % max(0.0, clock.wall() - entry.created_at)))
    call[CACHED] = "hit"
    if entry.usage is not None:
        call[USAGE] = entry.usage
    call.target = _answered(call, entry)
    if entry.rhythm and media_type == STREAM and data is entry.body:
        body = Rhythm(clock, data, entry.rhythm).body
    else:
        body = Body.of(data, media_type=media_type)
    return Reply(entry.status, Headers.of_raw(raw), body)


def _converted(
    call: Call, media_type: str, data: bytes, usage: Usage | None
) -> tuple[str, bytes] | None:
    """The same answer in the other form: media type and bytes."""
    dialect, endpoint = call.dialect.name, call.endpoint.name
    if media_type == STREAM:
        whole = whole_of(dialect, endpoint, data, usage)
        return None if whole is None else (JSON, whole)
    # With usage: `token_counter` takes it out again if the caller did not ask for it.
    stream = stream_of(dialect, endpoint, data, include_usage=True)
    return None if stream is None else (STREAM, stream)


def _answered(call: Call, entry: Entry) -> Target | None:
    for target in call.targets:
        if target.upstream.name == entry.upstream and (target.model or "") == entry.upstream_model:
            return target
    return call.target


def is_kept(name: bytes) -> bool:
    """Whether a header is true of more than the moment, and of more than one caller."""
    return name not in NOT_KEPT and not name.startswith(NOT_KEPT_PREFIXES)


def _with_type(raw: list[tuple[bytes, bytes]], media_type: str) -> list[tuple[bytes, bytes]]:
    kept = [field for field in raw if field[0] != b"content-type"]
    return [*kept, (b"content-type", media_type.encode())]
