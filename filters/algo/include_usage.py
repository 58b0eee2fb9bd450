"""`stream_options.include_usage`: asked for where accounting needs it, and what it adds taken away.

Source: OpenAI API reference, chat completions and completions, `stream_options`: one more event
before `data: [DONE]`, whose `choices` is empty and whose `usage` is the whole call's.
"""

from __future__ import annotations

import re
from typing import Any

from filters.algo.exact_json import is_exact
from sidecar.api import Call, Event

ASKS = frozenset({"chat_completions", "completions"})
"""OpenAI's endpoints whose streams report usage when asked to."""
MARK = b'_tokens"'
"""Stands in every object `usage` of every provider."""
MAX_EVENT_BYTES = 64 * 1024
"""No event with usage alone is longer."""

_BORDERS = re.compile(rb"\r\n\r\n|\n\n|\r\r").search


def ask_for_usage(call: Call) -> bool:
    """Have the upstream asked for usage. False, and nothing is changed, when the caller asks for it
    already, or what it says of `stream_options` is nothing that could be added to."""
    fields = call.json
    body = call.body
    if body is None:
        return False
    if "stream_options" not in fields:
        # Behind the last field, so that all others stay the bytes that they are.
        end = body.rstrip(b" \t\r\n")
        asked: dict[str, Any] = {**fields, "stream_options": {"include_usage": True}}
        call.replace_json(asked, body=end[:-1] + b',"stream_options":{"include_usage":true}}')
        return True
    options = fields["stream_options"]
    if options is None:
        options = {}
    if not isinstance(options, dict) or options.get("include_usage"):
        return False
    if not is_exact(body, fields):  # not all that it says would be said again
        return False
    call.replace_json({**fields, "stream_options": {**options, "include_usage": True}})
    return True


class UsageRemover:
    """Takes the event with usage alone out of a stream; everything else stays as it came.

    A `Transformer` of bytes. An event that has begun is held until it is whole: nobody can use a
    part of one. Longer ones than `MAX_EVENT_BYTES` pass in pieces.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        if not self._held and MARK not in data and data.endswith(b"\n\n"):
            return data  # whole events, and none with usage: nearly every piece
        data = self._held + data
        end = _last_border(data)
        self._held = data[end:]
        if len(self._held) > MAX_EVENT_BYTES:
            end, self._held = len(data), b""
        whole = data[:end]
        return _without(whole) if MARK in whole else whole

    def finish(self) -> bytes:
        held, self._held = self._held, b""
        return b"" if MARK in held and _is_usage_alone(held) else held


def _last_border(data: bytes) -> int:
    """Where the last whole event ends."""
    return max(
        data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0,
        data.rfind(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0,
        data.rfind(b"\r\r") + 2 if b"\r\r" in data else 0,
    )


def _without(data: bytes) -> bytes:
    kept: list[bytes] = []
    done = 0  # up to there it is in `kept`, or left out
    at = data.find(MARK)
    while at >= 0:
        start = max(done, _last_border(data[done:at]) + done)
        border = _BORDERS(data, at)
        end = border.end() if border else len(data)
        if _is_usage_alone(data[start : border.start() if border else end]):
            kept.append(data[done:start])
            done = end
        at = data.find(MARK, end)
    kept.append(data[done:])
    return b"".join(kept)


def _is_usage_alone(event: bytes) -> bool:
    text = event.replace(b"\r\n", b"\n").replace(b"\r", b"\n").strip(b"\n")
    fields = Event(text).json()
    return (
        isinstance(fields, dict)
        and fields.get("choices") == []
        and isinstance(fields.get("usage"), dict)
    )
