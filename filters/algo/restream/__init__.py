"""A recorded stream as the whole answer it amounts to, and the other way round, in every dialect.

So that one recorded answer serves both kinds of calls. Nothing is guessed: where a recording holds
anything that is not known to be the same in the other form, there is no other form. Keeping
answers, and deciding who gets them, is for the cache. The official SDKs put streams together, too,
but leniently, and into types of their own; the tests use them as oracles.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import orjson

from filters.algo.exact_json import has_large_float
from filters.algo.restream import (
    anthropic_messages,
    dashscope,
    openai_chat,
    openai_completions,
    openai_responses,
    qianfan,
)
from filters.algo.restream.events import Fields, Unsayable, read
from sidecar.api import Event, Usage

__all__ = ["stream_of", "whole_of"]


class Form(Protocol):
    """How one API says an answer, in both ways. Both raise `Unsayable`, or trip over what has not
    the shape that the API promises."""

    def whole(self, events: list[Event], usage: Usage | None) -> Fields: ...
    def stream(self, answer: Fields, include_usage: bool) -> Iterable[bytes]: ...


_FORMS: dict[tuple[str, str], Form] = {
    ("openai", "chat_completions"): openai_chat,
    ("openai", "completions"): openai_completions,
    ("openai", "responses"): openai_responses,
    ("anthropic", "messages"): anthropic_messages,
}
_BY_DIALECT: dict[str, Form] = {"dashscope": dashscope, "qianfan": qianfan}
"""Of dialects whose endpoints that generate text all say it in one form."""

_MISSHAPEN = (Unsayable, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What a form raises for an answer that is none, such as a list where an object should be."""


def whole_of(
    dialect: str, endpoint: str, stream: bytes, usage: Usage | None = None
) -> bytes | None:
    """The JSON answer that a complete stream amounts to; None when that cannot be said exactly.

    `dialect` and `endpoint` are their names. `usage` is put in where the stream reports none. There
    is none for a stream without its terminator, with an error, or with events or fields that are
    not known. About 1 ms for 500 events.
    """
    form = _form(dialect, endpoint)
    if form is None:
        return None
    try:
        answer = orjson.dumps(form.whole(read(stream), usage))
    except _MISSHAPEN:
        return None
    return None if has_large_float(answer) else answer


def stream_of(dialect: str, endpoint: str, answer: bytes, *, include_usage: bool) -> bytes | None:
    """The events that a whole JSON answer would have been streamed as; None when that cannot be
    said exactly.

    There are few of them, each with some words of the text. `include_usage` is what callers of
    OpenAI's chat and completions ask for to get the event with the usage; the other APIs report it
    always.
    """
    form = _form(dialect, endpoint)
    if form is None:
        return None
    try:
        value: Any = orjson.loads(answer)
        if type(value) is not dict or has_large_float(orjson.dumps(value)):
            return None
        return b"".join(form.stream(value, include_usage))
    except _MISSHAPEN:
        return None


def _form(dialect: str, endpoint: str) -> Form | None:
    return _FORMS.get((dialect, endpoint)) or _BY_DIALECT.get(dialect)
