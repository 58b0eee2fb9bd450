"""What the protocols of LLM providers mean: paths, errors, usage. One file a dialect.

A dialect is pure: it reads and builds bytes and never does I/O. Translating one into another is a
filter's work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from sidecar.call import ChatView, Usage
from sidecar.dialects import dashscope, qianfan
from sidecar.dialects.anthropic import ANTHROPIC
from sidecar.dialects.dashscope import DASHSCOPE
from sidecar.dialects.endpoint import OTHER, Endpoint
from sidecar.dialects.openai import OPENAI
from sidecar.dialects.qianfan import QIANFAN
from sidecar.errors import CallError
from sidecar.sse import Event

LimitKind = Literal["requests", "tokens"]


class Dialect(Protocol):
    """What the core and filters ask of a dialect."""

    @property
    def name(self) -> str: ...
    @property
    def endpoints(self) -> tuple[Endpoint, ...]: ...
    @property
    def stream_mark(self) -> bytes:
        """In every body that asks for a stream: one without it need not be parsed to know."""
        ...

    def view(self, body: Mapping[str, Any], model: str | None = None) -> ChatView:
        """The request body as the typed view; raises `Rejected` (400) when fields are missing.

        `model` is the one that the request is known to ask for; None: the body names it.
        """
        ...

    def asks_stream(self, headers: Mapping[str, str], body: Mapping[str, Any]) -> bool:
        """Whether a request with these headers, found by names in lower case, and this JSON body
        asks for a stream of events."""
        ...

    def upstream_path(self, base_path: str, path: str, model: str | None = None) -> str:
        """The path on the wire for the client's `path` at a `base_url` with `base_path`.

        `model`: to be named in place of the one in the path, where the path names one.
        """
        ...

    def error_body(self, error: CallError, call_id: str) -> bytes:
        """An error as the JSON that the dialect's SDK expects."""
        ...

    def error_event(self, error: CallError, call_id: str, endpoint: Endpoint) -> bytes:
        """An error as the last event of a stream; SDKs raise on it."""
        ...

    def usage(self, event: Event, before: Usage | None) -> Usage | None:
        """Usage after `event`: a new value when the event reports any, else `before`."""
        ...

    def error_in(self, event: Event) -> tuple[str, str] | None:
        """Code and message when `event`, inside a 200, is an error."""
        ...

    def limit_headers(
        self, kind: LimitKind, limit: int, remaining: int, reset_s: float, wall: float
    ) -> dict[str, str]:
        """What tells an SDK of a limit: of which calls or tokens are `remaining`, and in how many
        seconds there is room for the same again, seen from `wall` (Unix seconds)."""
        ...

    def models_body(self, names: Iterable[str]) -> bytes:
        """The answer of `/v1/models`."""
        ...

    def model_body(self, name: str) -> bytes:
        """The answer of `/v1/models/{name}`."""
        ...


DIALECTS: dict[str, Dialect] = {
    OPENAI.name: OPENAI,
    ANTHROPIC.name: ANTHROPIC,
    DASHSCOPE.name: DASHSCOPE,
    QIANFAN.name: QIANFAN,
}

ENDPOINTS: dict[str, tuple[Dialect, Endpoint]] = {
    endpoint.path: (dialect, endpoint)
    for dialect in DIALECTS.values()
    for endpoint in dialect.endpoints
    if not endpoint.model_in_path
}
"""Known paths of the data port, but for those that name a model. `/v1/models` belongs to several:
the edge looks at the headers."""


def find_endpoint(path: str) -> tuple[Dialect, Endpoint] | None:
    """Whose path it is that is not in `ENDPOINTS`, and what is served there: `OTHER` when nothing
    is. None when it is no dialect's own."""
    if path.startswith(f"{qianfan.PREFIX}/"):
        return QIANFAN, QIANFAN.endpoint_at(path) or OTHER
    if path.startswith(f"{dashscope.PREFIX}/"):
        return DASHSCOPE, OTHER
    return None


__all__ = [
    "ANTHROPIC",
    "DASHSCOPE",
    "DIALECTS",
    "ENDPOINTS",
    "OPENAI",
    "QIANFAN",
    "Dialect",
    "Endpoint",
    "find_endpoint",
]
