"""What the protocols of LLM providers mean: paths, errors, usage. One file a dialect.

A dialect is pure: it reads and builds bytes and never does I/O. Translating one into another is a
filter's work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from sidecar.call import ChatView, Usage
from sidecar.dialects.anthropic import ANTHROPIC
from sidecar.dialects.endpoint import Endpoint
from sidecar.dialects.openai import OPENAI
from sidecar.errors import CallError
from sidecar.sse import Event

LimitKind = Literal["requests", "tokens"]


class Dialect(Protocol):
    """What the core and filters ask of a dialect."""

    @property
    def name(self) -> str: ...
    @property
    def endpoints(self) -> tuple[Endpoint, ...]: ...

    def view(self, body: Mapping[str, Any]) -> ChatView:
        """The request body as the typed view; raises `Rejected` (400) when fields are missing."""
        ...

    def upstream_path(self, base_path: str, path: str) -> str:
        """The path on the wire for the client's `path` at a `base_url` with `base_path`."""
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


DIALECTS: dict[str, Dialect] = {OPENAI.name: OPENAI, ANTHROPIC.name: ANTHROPIC}

ENDPOINTS: dict[str, tuple[Dialect, Endpoint]] = {
    **{endpoint.path: (OPENAI, endpoint) for endpoint in OPENAI.endpoints},
    **{endpoint.path: (ANTHROPIC, endpoint) for endpoint in ANTHROPIC.endpoints},
}
"""Known paths of the data port. `/v1/models` belongs to both: the edge looks at the headers."""

__all__ = ["ANTHROPIC", "DIALECTS", "ENDPOINTS", "OPENAI", "Dialect", "Endpoint"]
