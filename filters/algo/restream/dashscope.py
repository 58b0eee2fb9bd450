"""DashScope's own API: frames of `output` and `usage`, and the answer that they amount to.

Source: Alibaba Cloud Model Studio, DashScope API reference, Text generation. Frames hold either the
text so far or what is new of it, as the request has asked (`incremental_output`), and do not say
which. So they are told apart by the texts, and refused when those could be either. For the same
reason an answer becomes one frame: that one is right in both readings.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    thoughts, texts = ([each[place] for each in said] for place in (0, 1))
    is_growing = _is_growing(thoughts) and _is_growing(texts)
    thought, text = "".join(thoughts), "".join(texts)
    if is_growing and (thoughts[-1], texts[-1]) != (thought, text):
        lengths = [len(one) + len(other) for one, other in said]
        grown = sum(after > before for before, after in pairwise(lengths))
        need(grown >= MIN_GROWTHS and lengths[-2] >= MIN_CHARS)
        return
    _put(last, thought, text)


def _is_growing(texts: list[str]) -> bool:
    return all(after.startswith(before) for before, after in pairwise(texts))


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
