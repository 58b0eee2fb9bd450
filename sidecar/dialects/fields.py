"""Reading and writing fields that dialects have in common."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from sidecar.call import ChatView
from sidecar.errors import Rejected
from sidecar.sse import Event

MOST_TOKENS = 10**9
"""Of one answer. Whoever reports more has not counted, and sums must not be spoilt by it."""


def model_of(body: Mapping[str, Any]) -> str:
    """The body's model; raises `Rejected` (400) when there is none."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise Rejected(400, "model_required", 'the request body must name a "model"')
    return model


def chat_view(
    dialect: str,
    body: Mapping[str, Any],
    messages: Any,
    max_tokens: Any,
    *,
    model: str | None = None,
    is_stream: bool | None = None,
) -> ChatView:
    """The typed view of a request; raises `Rejected` (400) when `messages` is no list.

    `model` and `is_stream` are for dialects that do not say them in the body as OpenAI does.
    """
    if not isinstance(messages, list | tuple):
        raise Rejected(400, "invalid_request", "`messages` must be a list")
    return ChatView(
        dialect=dialect,
        model=model or model_of(body),
        messages=tuple(item for item in messages if isinstance(item, dict)),
        is_stream=body.get("stream") is True if is_stream is None else is_stream,
        max_tokens=max_tokens if isinstance(max_tokens, int) else None,
    )


def usage_object(event: Event, inner: str = "") -> dict[str, Any] | None:
    """The event's `usage`, of its own or of the object in its field `inner`."""
    usage = event.last_field(b"usage")  # the usual place, without parsing the answer before it
    if type(usage) is dict:
        return usage
    body = event.json()
    if not isinstance(body, dict):
        return None
    usage = body.get("usage")
    if usage is None and isinstance(body.get(inner), dict):
        usage = body[inner].get("usage")
    return usage if isinstance(usage, dict) else None


def count(fields: Any, name: str) -> int:
    """A token count from a `usage` object; 0 when it is missing or none."""
    value: Any = fields.get(name) if type(fields) is dict else None
    return int(value) if is_count(value) else 0


def is_count(value: Any) -> bool:
    """Whether it can be a number of tokens."""
    return (type(value) is int or type(value) is float) and 0 <= value <= MOST_TOKENS


def written_for_an_hour(fields: Any) -> int:
    """Of the tokens written to a prompt cache, those to be kept for an hour: `cache_creation`, as
    Anthropic and Alibaba Cloud have it in the object that counts such tokens."""
    creation = fields.get("cache_creation") if type(fields) is dict else None
    return count(creation, "ephemeral_1h_input_tokens") if creation else 0


def limit_fields(kind: str, limit: int, remaining: int, reset_s: float) -> dict[str, str]:
    """A limit as OpenAI's headers tell it, which others have taken over."""
    return {
        f"x-ratelimit-limit-{kind}": str(limit),
        f"x-ratelimit-remaining-{kind}": str(remaining),
        f"x-ratelimit-reset-{kind}": f"{ceil(reset_s * 1000)}ms",  # a duration as Go writes it
    }
