"""Credentials of the upstream, put on every attempt."""

from __future__ import annotations

from typing import Literal
from urllib.parse import quote

from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    FilterConfig,
    Kit,
    Reply,
    Secret,
    field,
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
        self._queries: dict[str, str] = {}
        for upstream, settings in kit.upstreams.items():
            key = settings.key.reveal()
            if settings.scheme == "bearer":
                self._headers[upstream] = dict([field("authorization", f"Bearer {key}")])
            elif settings.scheme == "header":
                self._headers[upstream] = dict([field(settings.name, key)])
            else:
                self._queries[upstream] = f"{quote(settings.name, safe='')}={quote(key, safe='')}"

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        name = attempt.upstream.name
        header = self._headers.get(name)
        if header is not None:
            attempt.headers.put(header)
        else:
            query = self._queries.get(name)
            if query is not None:
                mark = "&" if "?" in attempt.path else "?"
                attempt.path = f"{attempt.path}{mark}{query}"
        return await call_next(attempt)
