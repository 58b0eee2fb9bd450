"""The OpenAI dialect: chat completions, completions, embeddings, responses.

Source: OpenAI API reference; error and usage fields as of openai-python 3.54.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from sidecar.call import ChatView, Usage
from sidecar.dialects.endpoint import Endpoint
from sidecar.dialects.fields import (
    chat_view,
    count,
    limit_fields,
    usage_object,
    written_for_an_hour,
)
from sidecar.errors import CallError
from sidecar.sse import Event, encode

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class OpenAI:
    """`base_url` ends where the SDK's does: usually in `/v1`, which is also the default path."""

    name = "openai"
    stream_mark = b'"stream"'
    endpoints = (
        Endpoint("chat_completions", "/v1/chat/completions"),
        Endpoint("completions", "/v1/completions"),
        Endpoint("embeddings", "/v1/embeddings"),
        Endpoint("responses", "/v1/responses"),
    )

    def view(self, body: Mapping[str, Any], model: str | None = None) -> ChatView:
        messages = body.get("messages")
        if messages is None:
            messages = body.get("input", body.get("prompt", ()))
        if isinstance(messages, str):
            messages = ({"role": "user", "content": messages},)
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens")
        max_tokens = max_tokens or body.get("max_output_tokens")
        return chat_view(self.name, body, messages, max_tokens, model=model)

    def asks_stream(self, headers: Mapping[str, str], body: Mapping[str, Any]) -> bool:
        return body.get("stream") is True

    def upstream_path(self, base_path: str, path: str, model: str | None = None) -> str:
        return (base_path or "/v1") + path.removeprefix("/v1")

    def error_body(self, error: CallError, call_id: str) -> bytes:
        return orjson.dumps({"error": _error_fields(error)})

    def error_event(self, error: CallError, call_id: str, endpoint: Endpoint) -> bytes:
        fields = _error_fields(error)
        if endpoint.name == "responses":
            event = {**fields, "type": "error", "error": fields}
            return encode(orjson.dumps(event), "error")
        return encode(orjson.dumps({"error": fields}))

    def usage(self, event: Event, before: Usage | None) -> Usage | None:
        if b'"usage"' not in event.raw or (
            b'"usage":null' in event.raw and b'"usage":{' not in event.raw
        ):  # every event of a stream with `include_usage`: not worth parsing
            return before
        usage = usage_object(event, "response")
        if usage is None:
            return before
        if "prompt_tokens" in usage:
            tokens_in, tokens_out = count(usage, "prompt_tokens"), count(usage, "completion_tokens")
            details_in = usage.get("prompt_tokens_details")
            details_out = usage.get("completion_tokens_details")
        else:
            tokens_in, tokens_out = count(usage, "input_tokens"), count(usage, "output_tokens")
            details_in = usage.get("input_tokens_details")
            details_out = usage.get("output_tokens_details")
        if not (tokens_in or tokens_out):
            return before  # it says nothing
        cached = cache_write = reasoning = for_an_hour = 0
        if details_in:
            cached = count(details_in, "cached_tokens")
            cache_write = count(details_in, "cache_write_tokens")
            if not cache_write:  # Alibaba Cloud has it by Anthropic's name, inside the input, too
                cache_write = count(details_in, "cache_creation_input_tokens")
                for_an_hour = written_for_an_hour(details_in) if cache_write else 0
        if not cached:  # Moonshot, and DeepSeek before it spoke as OpenAI does
            cached = count(usage, "cached_tokens") or count(usage, "prompt_cache_hit_tokens")
        if details_out:
            reasoning = count(details_out, "reasoning_tokens")
            if reasoning and count(usage, "total_tokens") == tokens_in + tokens_out + reasoning:
                tokens_out += reasoning  # xAI counts it beside the rest
        return Usage(tokens_in, tokens_out, cached, cache_write, reasoning, for_an_hour)

    def error_in(self, event: Event) -> tuple[str, str] | None:
        if b'"error"' not in event.raw and event.name != b"error":
            return None
        body = event.json()
        if not isinstance(body, dict):
            return None
        error = body.get("error")
        if error is None and body.get("type") == "error":
            error = body
        if not error:
            return None
        if not isinstance(error, dict):
            return "error", str(error)
        return str(error.get("code") or error.get("type") or "error"), str(error.get("message", ""))

    def limit_headers(
        self, kind: str, limit: int, remaining: int, reset_s: float, wall: float
    ) -> dict[str, str]:
        return limit_fields(kind, limit, remaining, reset_s)

    def models_body(self, names: Iterable[str]) -> bytes:
        return orjson.dumps({"object": "list", "data": [_model_fields(name) for name in names]})

    def model_body(self, name: str) -> bytes:
        return orjson.dumps(_model_fields(name))


def _model_fields(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sidecar"}


def _error_fields(error: CallError) -> dict[str, Any]:
    kind = ERROR_TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    return {"message": error.message, "type": kind, "param": None, "code": error.code}


OPENAI = OpenAI()
