"""The Qianfan v1 dialect: Baidu's wenxinworkshop, which ERNIE speaks.

The model stands in the path, and errors come with status 200. v2 of the same platform speaks
OpenAI's dialect. Source: Baidu AI Cloud, WENXINWORKSHOP, "API list" and "Error codes"; what is read
of streams and errors as of the official SDK, qianfan 0.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import orjson

from sidecar.call import ChatView, Usage
from sidecar.dialects.endpoint import Endpoint
from sidecar.dialects.fields import chat_view, count, limit_fields, usage_object
from sidecar.errors import CallError
from sidecar.sse import Event, encode

PREFIX = "/rpc/2.0/ai_custom/v1/wenxinworkshop"

ERROR_CODES = {
    401: 14,  # authentication failed; 110 and 111 would make the SDK ask Baidu for a new token
    402: 17,  # the day's quota is used up, or the account is in arrears
    403: 6,  # no permission
    404: 336005,  # no such model
    405: 336101,  # wrong method
    429: 18,  # too many requests
    502: 2,  # service unavailable
    503: 336100,  # too busy
    504: 2,
}

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~-]*").fullmatch
"""A name that is the same on whichever side of a decoder or a parser of paths."""


class Qianfan:
    """`base_url` ends before `/rpc`; with the whole of `PREFIX` the same is meant."""

    name = "qianfan"
    stream_mark = b'"stream"'
    endpoints = tuple(
        Endpoint(kind, f"{PREFIX}/{kind}/{{model}}", model_in_path=True)
        for kind in ("chat", "completions", "embeddings")
    )

    def endpoint_at(self, path: str) -> Endpoint | None:
        """The endpoint of a path that names a model; None when it is none."""
        head, _, model = path.rpartition("/")
        return _BY_HEAD.get(head) if _MODEL(model) else None

    def view(self, body: Mapping[str, Any], model: str | None = None) -> ChatView:
        messages = body.get("messages")
        if messages is None:
            messages = body.get("prompt", ())
        if isinstance(messages, str):
            messages = ({"role": "user", "content": messages},)
        max_tokens = body.get("max_output_tokens")
        return chat_view(self.name, body, messages, max_tokens, model=model)

    def asks_stream(self, headers: Mapping[str, str], body: Mapping[str, Any]) -> bool:
        return body.get("stream") is True

    def upstream_path(self, base_path: str, path: str, model: str | None = None) -> str:
        if model is not None:
            path = f"{path.rpartition('/')[0]}/{quote(model, safe=':')}"
        return base_path.removesuffix(PREFIX) + path

    def error_body(self, error: CallError, call_id: str) -> bytes:
        """With our own word in `code`, which their SDK does not read."""
        return orjson.dumps(_error_fields(error, call_id))

    def error_event(self, error: CallError, call_id: str, endpoint: Endpoint) -> bytes:
        return encode(orjson.dumps(_error_fields(error, call_id)))

    def usage(self, event: Event, before: Usage | None) -> Usage | None:
        """Every frame has the sums so far."""
        if b'"usage"' not in event.raw:
            return before
        usage = usage_object(event)
        if not usage:
            return before
        told = Usage(count(usage, "prompt_tokens"), count(usage, "completion_tokens"))
        return told if told.input or told.output else before

    def error_in(self, event: Event) -> tuple[str, str] | None:
        """In a frame, in a whole answer, or in a bare line of JSON between two frames."""
        if b'"error_code"' not in event.raw:
            return None
        body = event.json() if event.data else _bare_object(event.raw)
        code = body.get("error_code") if isinstance(body, dict) else None
        return (str(code), str(body.get("error_msg", ""))) if code else None

    def limit_headers(
        self, kind: str, limit: int, remaining: int, reset_s: float, wall: float
    ) -> dict[str, str]:
        return limit_fields(kind, limit, remaining, reset_s)

    def models_body(self, names: Iterable[str]) -> bytes:
        """As v2 has it: v1 tells its models to nobody but the console."""
        return orjson.dumps({"object": "list", "data": [_model_fields(name) for name in names]})

    def model_body(self, name: str) -> bytes:
        return orjson.dumps(_model_fields(name))


_BY_HEAD = {endpoint.path.rpartition("/")[0]: endpoint for endpoint in Qianfan.endpoints}


def _bare_object(raw: bytes) -> Any:
    for line in raw.split(b"\n"):
        if line[:1] == b"{":
            try:
                return orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
    return None


def _model_fields(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "owned_by": "sidecar"}


def _error_fields(error: CallError, call_id: str) -> dict[str, Any]:
    code = ERROR_CODES.get(error.status)
    if code is None:
        code = 336003 if error.status < 500 else 336000  # wrong parameter, internal error
    return {"error_code": code, "error_msg": error.message, "id": call_id, "code": error.code}


QIANFAN = Qianfan()
