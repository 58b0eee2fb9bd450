"""The Anthropic dialect: messages.

Source: Anthropic API reference (Errors, Streaming messages); fields as of anthropic-python 2.12.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from math import ceil
from typing import Any

import orjson

from sidecar.call import ChatView, Usage
from sidecar.dialects.endpoint import Endpoint
from sidecar.dialects.fields import chat_view, count, is_count, usage_object, written_for_an_hour
from sidecar.errors import CallError
from sidecar.sse import Event, encode

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}

COUNTS = (
    *("input_tokens", "output_tokens"),
    *("cache_read_input_tokens", "cache_creation_input_tokens"),
)


class Anthropic:
    """`base_url` ends where the SDK's does: before `/v1`."""

    name = "anthropic"
    stream_mark = b'"stream"'
    endpoints = (
        Endpoint("messages", "/v1/messages"),
        Endpoint("count_tokens", "/v1/messages/count_tokens"),
    )

    def view(self, body: Mapping[str, Any], model: str | None = None) -> ChatView:
        messages, max_tokens = body.get("messages"), body.get("max_tokens")
        return chat_view(self.name, body, messages, max_tokens, model=model)

    def asks_stream(self, headers: Mapping[str, str], body: Mapping[str, Any]) -> bool:
        return body.get("stream") is True

    def upstream_path(self, base_path: str, path: str, model: str | None = None) -> str:
        return base_path + path

    def error_body(self, error: CallError, call_id: str) -> bytes:
        return orjson.dumps(_error_fields(error, call_id))

    def error_event(self, error: CallError, call_id: str, endpoint: Endpoint) -> bytes:
        return encode(orjson.dumps(_error_fields(error, call_id)), "error")

    def usage(self, event: Event, before: Usage | None) -> Usage | None:
        """`message_delta` is cumulative and may leave out what `message_start` said."""
        if b'"usage"' not in event.raw:
            return before
        usage = usage_object(event, "message")
        if usage is None or not any(is_count(usage.get(name)) for name in COUNTS):
            return before
        old = before or Usage()
        cached = _later(usage, "cache_read_input_tokens", old.cached)
        cache_write = _later(usage, "cache_creation_input_tokens", old.cache_write)
        plain = _later(usage, "input_tokens", old.input - old.cached - old.cache_write)
        thinking = usage.get("output_tokens_details")
        creation = usage.get("cache_creation")
        for_an_hour = written_for_an_hour(usage) if creation else old.cache_write_1h
        tokens_in = plain + cached + cache_write
        tokens_out = _later(usage, "output_tokens", old.output)
        if not (tokens_in or tokens_out):
            return before  # it says nothing
        return Usage(
            input=tokens_in,
            output=tokens_out,
            cached=cached,
            cache_write=cache_write,
            reasoning=count(thinking, "thinking_tokens") or old.reasoning,
            cache_write_1h=min(for_an_hour, cache_write),
        )

    def error_in(self, event: Event) -> tuple[str, str] | None:
        if b'"error"' not in event.raw and event.name != b"error":
            return None
        body = event.json()
        if not isinstance(body, dict) or body.get("type") != "error":
            return None
        error = body.get("error")
        if not isinstance(error, dict):
            return "error", ""
        return str(error.get("type") or "error"), str(error.get("message", ""))

    def limit_headers(
        self, kind: str, limit: int, remaining: int, reset_s: float, wall: float
    ) -> dict[str, str]:
        at = datetime.fromtimestamp(ceil(wall + reset_s), UTC)
        return {
            f"anthropic-ratelimit-{kind}-limit": str(limit),
            f"anthropic-ratelimit-{kind}-remaining": str(remaining),
            f"anthropic-ratelimit-{kind}-reset": at.strftime("%Y-%m-%dT%H:%M:%SZ"),  # RFC 3339
        }

    def models_body(self, names: Iterable[str]) -> bytes:
        data = [_model_fields(name) for name in names]
        ends = {
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
        return orjson.dumps({"data": data, "has_more": False, **ends})

    def model_body(self, name: str) -> bytes:
        return orjson.dumps(_model_fields(name))


def _later(usage: dict[str, Any], name: str, before: int) -> int:
    return count(usage, name) if is_count(usage.get(name)) else before


def _model_fields(name: str) -> dict[str, Any]:
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
    }


def _error_fields(error: CallError, call_id: str) -> dict[str, Any]:
    kind = ERROR_TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    fields = {"type": kind, "message": error.message, "code": error.code}
    return {"type": "error", "error": fields, "request_id": call_id}


ANTHROPIC = Anthropic()
