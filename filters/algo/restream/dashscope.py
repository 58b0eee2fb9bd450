"""DashScope's own API: frames of `output` and `usage`, and the answer that they amount to.

Source: Alibaba Cloud Model Studio, DashScope API reference, Text generation. Frames hold either the
text so far or what is new of it, as the request has asked (`incremental_output`), and do not say
which. So they are told apart by the texts, for the reasoning and the answer each by itself, and
refused when those could be either. For the same reason an answer becomes one frame: that one is
right in both readings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import orjson

from filters.algo.restream.events import Fields, need, object_of, only
from sidecar.api import Event, Usage

_FRAME = frozenset({"output", "usage", "request_id"})
_OUTPUT = frozenset({"text", "finish_reason", "choices"})
_CHOICE = frozenset({"index", "finish_reason", "message"})
_MESSAGE = frozenset({"role", "content", "reasoning_content"})
_RUNNING = (None, "null")
"""Reasons to have finished, of an answer that has not."""

MIN_GROWTHS = 3
MIN_CHARS = 16
"""What makes sure that each text holds the one before it on purpose: it grew so often, and what is
repeated is so long."""
MAX_REPEATED_CHARS = 3
"""Of a text that the next one begins with, in frames with what is new: more may be all so far."""


def whole(events: list[Event], usage: Usage | None) -> Fields:
    frames = [_frame(event) for event in events]
    need(frames)
    last = frames[-1]
    output = last["output"]
    need(_finish(output) not in _RUNNING)
    for frame in frames[:-1]:
        need(_finish(frame["output"]) in _RUNNING)
    if len(frames) > 1:
        _join(output, [frame["output"] for frame in frames])
    return last


def _frame(event: Event) -> Fields:
    need(event.name in (b"result", b"message"))
    frame = object_of(event)
    only(frame, _FRAME)
    return frame


def _choice(output: Fields) -> Fields | None:
    """The one choice; None when the output is a plain text."""
    choices = output.get("choices")
    if not choices:
        return None
    (choice,) = choices
    return choice  # type: ignore[no-any-return]


def _finish(output: Fields) -> Any:
    choice = _choice(output)
    return (output if choice is None else choice).get("finish_reason")


def _join(last: Fields, outputs: list[Fields]) -> None:
    """Make `last` the output that all of them amount to."""
    said = [_said(output) for output in outputs]
    thoughts, texts = zip(*said, strict=True)
    _put(last, _joined(thoughts), _joined(texts))


def _joined(frames: Sequence[str]) -> str:
    """The text that `frames` amount to, whether they hold all so far or what is new."""
    said = [text for text in frames if text]
    if len(said) < 2:
        return "".join(said)  # the same in both readings
    repeated = [len(one) for one, other in pairwise(said) if other.startswith(one)]
    if len(repeated) < len(said) - 1:
        need(max(repeated, default=0) <= MAX_REPEATED_CHARS)
        return "".join(said)
    grown = sum(len(other) > len(one) for one, other in pairwise(said))
    need(grown >= MIN_GROWTHS and repeated[-1] >= MIN_CHARS)
    need("" not in frames[frames.index(said[0]) :])  # all so far never gets less
    return said[-1]


def _said(output: Fields) -> tuple[str, str]:
    """The reasoning and the text of one frame."""
    only(output, _OUTPUT)
    choice = _choice(output)
    if choice is None:
        return "", output["text"]
    only(choice, _CHOICE)
    message = choice["message"]
    only(message, _MESSAGE)
    content = message.get("content") or ""
    if type(content) is list:
        (part,) = content
        only(part, frozenset({"text"}))
        content = part["text"]
    return message.get("reasoning_content") or "", content


def _put(output: Fields, thought: str, text: str) -> None:
    choice = _choice(output)
    if choice is None:
        output["text"] = text
        return
    message = choice["message"]
    message.setdefault("role", "assistant")
    if thought or "reasoning_content" in message:
        message["reasoning_content"] = thought
    message["content"] = [{"text": text}] if type(message.get("content")) is list else text


def stream(answer: Fields, include_usage: bool) -> Iterator[bytes]:
    only(answer, _FRAME)
    need(_finish(answer["output"]) not in _RUNNING)
    yield b"id:1\nevent:result\n:HTTP_STATUS/200\ndata:%b\n\n" % orjson.dumps(answer)
