"""Small answers from configured addresses, off the path of calls: tokens for credentials.

aiohttp's client, since a fetch every half hour need not be fast. URLs, bodies and its exceptions
may hold secrets, so none of them leaves this module.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from sidecar.addresses import is_forbidden, literal, permitted
from sidecar.errors import FetchFailed
from sidecar.filter import Fetched
from sidecar.transport.upstream import environment_proxy

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024


class Fetcher:
    """Fetches one answer at a time over connections that are not kept. A `sidecar.filter.Fetch`."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __call__(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> Fetched:
        scheme, host, port = _origin(url)
        # aiohttp asks its resolver for names alone.
        if (address := literal(host)) is not None and is_forbidden(address):
            raise FetchFailed("the address may not be connected to")
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._open().request(
                    method,
                    URL(url, encoded=True),  # as it was signed
                    headers=headers,
                    data=body or None,
                    allow_redirects=False,
                    proxy=environment_proxy(scheme, host, port),
                ) as response,
            ):
                data = await _read(response)
                return Fetched(response.status, data, response.headers.get("date", ""))
        except TimeoutError:
            raise FetchFailed("no answer in time") from None
        # Their messages and tracebacks hold URLs: the kind alone is told.
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise FetchFailed(f"no answer: {type(error).__name__}") from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=GuardedResolver(), force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"user-agent": "llm-sidecar"},
            )
        return self._session

    async def close(self) -> None:
        """Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


async def _read(response: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise ValueError("too large")
        pieces.append(piece)
    return b"".join(pieces)


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return (
        parts.scheme,
        parts.hostname or "",
        parts.port or (443 if parts.scheme == "https" else 80),
    )


class GuardedResolver(AbstractResolver):
    """The system's resolver, without addresses that no upstream may have."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        found = permitted(list(infos), ())
        if not found:
            raise OSError("no address that may be connected to")
        return [
            ResolveResult(
                hostname=host,
                host=str(info[4][0]),
                port=port,
                family=info[0],
                proto=info[2],
                flags=socket.AI_NUMERICHOST,
            )
            for info in found
        ]

    async def close(self) -> None:
        pass
