"""The DashScope dialect: Alibaba Cloud Model Studio's own protocol, which Qwen speaks.

Source: Alibaba Cloud Model Studio, "DashScope API reference", "Context cache", "Error codes"; what
is read of streams and errors as of the official SDK, dashscope 2.0.
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
from sidecar.errors import CallError, Rejected
from sidecar.sse import Event

PREFIX = "/api/v1"
STREAM_HEADER = "x-dashscope-sse"

ERROR_KINDS = {
    401: "InvalidApiKey",
    402: "Arrearage",
    403: "AccessDenied",
    404: "ModelNotFound",
    408: "RequestTimeOut",
    429: "Throttling",
    503: "ServiceUnavailable",
    504: "RequestTimeOut",
}


class DashScope:
    """`base_url` ends before `/api/v1`; with it, as the SDK has it, the same is meant.

    A stream is asked for by a header, so a body alone does not say whether it is one.
    """

    name = "dashscope"
    stream_mark = b""
    endpoints = (
        Endpoint("generation", f"{PREFIX}/services/aigc/text-generation/generation"),
        Endpoint(
            "multimodal_generation", f"{PREFIX}/services/aigc/multimodal-generation/generation"
        ),
        Endpoint("embeddings", f"{PREFIX}/services/embeddings/text-embedding/text-embedding"),
    )

    def view(self, body: Mapping[str, Any], model: str | None = None) -> ChatView:
        """Its `is_stream` is False, whatever the headers ask for: see `asks_stream`."""
        given, parameters = body.get("input"), body.get("parameters")
        if not isinstance(given, dict):
            raise Rejected(400, "invalid_request", "`input` must be an object")
        messages = given.get("messages")
        if messages is None:
            prompt = given.get("prompt")
            messages = () if prompt is None else ({"role": "user", "content": prompt},)
        max_tokens = parameters.get("max_tokens") if isinstance(parameters, dict) else None
        return chat_view(self.name, body, messages, max_tokens, model=model, is_stream=False)

    def asks_stream(self, headers: Mapping[str, str], body: Mapping[str, Any]) -> bool:
        if headers.get(STREAM_HEADER, "").strip().lower() == "enable":
            return True
        return "text/event-stream" in headers.get("accept", "").lower()

    def upstream_path(self, base_path: str, path: str, model: str | None = None) -> str:
        return base_path.removesuffix(PREFIX) + path

    def error_body(self, error: CallError, call_id: str) -> bytes:
        """Its `code` is the provider's word for the status and ours, joined as theirs are:
        `Throttling.rate_limited`."""
        return orjson.dumps(_error_fields(error, call_id))

    def error_event(self, error: CallError, call_id: str, endpoint: Endpoint) -> bytes:
        """Written without spaces, and with the status twice: the SDK wants it so."""
        data = orjson.dumps(_error_fields(error, call_id))
        status = error.status
        return b"event:error\n:HTTP_STATUS/%d\nstatus:%d\ndata:%b\n\n" % (status, status, data)

    def usage(self, event: Event, before: Usage | None) -> Usage | None:
        """Every frame has the sums so far. Embeddings only tell a total, which is their input."""
        if b'"usage"' not in event.raw:
            return before
        usage = usage_object(event)
        if not usage:
            return before
        if "input_tokens" not in usage and "output_tokens" not in usage:
            total = count(usage, "total_tokens")
            return Usage(total) if total else before
        tokens_in, tokens_out = count(usage, "input_tokens"), count(usage, "output_tokens")
        if not (tokens_in or tokens_out):
            return before  # it says nothing
        details = usage.get("prompt_tokens_details")
        details_out = usage.get("output_tokens_details")
        cached = count(usage, "cached_tokens")  # where older models have it
        return Usage(
            input=tokens_in,
            output=tokens_out,
            cached=(count(details, "cached_tokens") or cached) if details else cached,
            cache_write=count(details, "cache_creation_input_tokens") if details else 0,
            reasoning=count(details_out, "reasoning_tokens") if details_out else 0,
            cache_write_1h=written_for_an_hour(details) if details else 0,
        )

    def error_in(self, event: Event) -> tuple[str, str] | None:
        """A frame of the name `error`, or whatever has a code in place of an output."""
        raw = event.raw
        if b'"code"' not in raw and b"error" not in raw:
            return None
        # Sometimes the status stands on the same line: `event:error:HTTP_STATUS/429`.
        is_named = event.name.partition(b":")[0] == b"error"
        body = event.json()
        if not isinstance(body, dict):
            return ("error", "") if is_named else None
        code = body.get("code")
        if is_named or (isinstance(code, str) and code and not body.get("output")):
            return str(code or "error"), str(body.get("message") or "")
        return None

    def limit_headers(
        self, kind: str, limit: int, remaining: int, reset_s: float, wall: float
    ) -> dict[str, str]:
        return limit_fields(kind, limit, remaining, reset_s)

    def models_body(self, names: Iterable[str]) -> bytes:
        models = [{"model": name, "name": name} for name in names]
        output = {"total": len(models), "page_no": 1, "page_size": len(models), "models": models}
        return orjson.dumps({"output": output})

    def model_body(self, name: str) -> bytes:
        return orjson.dumps({"output": {"model": name, "name": name}})


def _error_fields(error: CallError, call_id: str) -> dict[str, Any]:
    kind = ERROR_KINDS.get(error.status)
    if kind is None:
        kind = "InvalidParameter" if error.status < 500 else "InternalError"
    return {"code": f"{kind}.{error.code}", "message": error.message, "request_id": call_id}


DASHSCOPE = DashScope()
