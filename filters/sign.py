"""Credentials of the upstream, put on every attempt."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Literal
from urllib.parse import quote, unquote_plus

from pydantic import ValidationInfo, field_validator

from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    FilterConfig,
    Kit,
    Reply,
    Secret,
    field,
    sendable_name,
    sendable_value,
)


class SignSettings(FilterConfig):
    """`upstreams.NAME.sign`."""

    scheme: Literal["bearer", "header", "query"]
    """`bearer`: `Authorization: Bearer KEY`; `header`: the key in header `name`; `query`: the key
    in query parameter `name`."""
    key: Secret
    """`env:NAME` or `file:PATH`."""
    name: str = "x-api-key"
    """Header or query parameter of the schemes `header` and `query`."""

    @field_validator("name")
    @classmethod
    def _is_sendable(cls, name: str, info: ValidationInfo) -> str:
        return sendable_name(name) if info.data.get("scheme") == "header" else name

    @field_validator("key")
    @classmethod
    def _can_be_sent(cls, key: Secret) -> Secret:
        sendable_value(key.reveal())
        return key


class Sign(AttemptFilter):
    """Authenticates us at the upstream with its own key; the client's never gets that far.

    Place it last, so that it signs the request as it goes on the wire. An upstream without a
    `sign` section gets no credentials.
    """

    UpstreamConfig = SignSettings
    must_be_last = True

    def __init__(self, config: FilterConfig, kit: Kit) -> None:
        super().__init__(config, kit)
        self._headers: dict[str, dict[bytes, bytes]] = {}
        self._queries: dict[str, tuple[str, str]] = {}
        for upstream, settings in kit.upstreams.items():
            key = settings.key.reveal()
            if settings.scheme == "bearer":
                self._headers[upstream] = dict([field("authorization", f"Bearer {key}")])
            elif settings.scheme == "header":
                self._headers[upstream] = dict([field(settings.name, key)])
            else:
                self._queries[upstream] = (settings.name, quote(key, safe=""))

    def handle(self, attempt: Attempt, call_next: AttemptNext) -> Awaitable[Reply]:
        name = attempt.upstream.name
        header = self._headers.get(name)
        if header is not None:
            attempt.headers.put(header)
        else:
            query = self._queries.get(name)
            if query is not None:
                attempt.path = with_parameter(attempt.path, *query)
        return call_next(attempt)


def with_parameter(path: str, name: str, quoted_value: str) -> str:
    """`path` with this query parameter in place of any of its name; the others keep their bytes."""
    path, _, query = path.partition("?")
    others = [
        each for each in query.split("&") if each and unquote_plus(each.partition("=")[0]) != name
    ]
    ours = f"{quote(name, safe='')}={quoted_value}"
    return f"{path}?{'&'.join([*others, ours])}"
