"""The last question of a conversation, apart from everything that was said before it.

So that two calls can be compared whose questions mean the same, all else being equal. There is no
question in requests whose answer depends on more than text: on tools, searches, images, sounds.
Source of the fields: the API references of OpenAI (chat completions) and Anthropic (messages).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

CONVERSATIONS = frozenset({("openai", "chat_completions"), ("anthropic", "messages")})
"""Dialects and endpoints whose requests are read here."""

NOT_TEXT_ALONE = (
    *("tools", "functions", "mcp_servers", "container", "audio", "web_search_options"),
    *("enable_search", "search_parameters", "plugins"),  # Alibaba Cloud, xAI, OpenRouter
)
"""Fields of a request by which an answer depends on more, or is more, than text."""
NOT_TEXT_ALONE_IN_MESSAGE = ("tool_calls", "function_call", "tool_call_id", "audio")
_ROLES = frozenset({"system", "developer", "user", "assistant"})

_numbers = re.compile(r"\d+(?:[.,:/-]\d+)*").findall


class Question(NamedTuple):
    text: str
    """What the user said last; of several parts, the last one."""
    rest: bytes
    """All other messages and parts, and the numbers in the text: to texts that differ in a number
    alone, models of language give nearly the same vector."""


def question_of(dialect: str, endpoint: str, body: Mapping[str, Any]) -> Question | None:
    """The last question of a request, or None when there is more than text to it."""
    if (dialect, endpoint) not in CONVERSATIONS:
        return None
    for name in NOT_TEXT_ALONE:
        if body.get(name):
            return None
    if body.get("n") not in (None, 1) or body.get("modalities") not in (None, ["text"]):
        return None
    messages = body.get("messages")
    if type(messages) is not list:
        return None
    last = -1
    for number, message in enumerate(messages):
        role = message.get("role") if type(message) is dict else None
        if type(role) is not str or role not in _ROLES:
            return None
        for name in NOT_TEXT_ALONE_IN_MESSAGE:
            if message.get(name):
                return None
        if not _is_text(message.get("content")):
            return None
        if role == "user":
            last = number
    if last < 0:
        return None
    asked = messages[last]
    content = asked.get("content")
    if type(content) is str:
        text, others = content, None
    elif content:
        text, others = content[-1]["text"], [*content[:-1], {**content[-1], "text": None}]
    else:
        return None
    if not text.strip():
        return None
    rest = [*messages[:last], {**asked, "content": others}, *messages[last + 1 :]]
    try:
        said = orjson.dumps([rest, _numbers(text)], option=orjson.OPT_SORT_KEYS)
    except TypeError:  # nested too deep
        return None
    return Question(text, said)


def _is_text(content: Any) -> bool:
    """Whether it is a text, or parts that are texts, or nothing."""
    if type(content) is list:
        for part in content:
            if (
                type(part) is not dict
                or part.get("type") != "text"
                or type(part.get("text")) is not str
            ):
                return False
        return True
    return content is None or type(content) is str
