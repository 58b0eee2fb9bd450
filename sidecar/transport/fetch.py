"""Small answers from configured addresses, off the path of calls: tokens for credentials.

aiohttp's client, since a fetch every half hour need not be fast. URLs, bodies and its exceptions
may hold secrets, so none of them leaves this module.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from sidecar.addresses import Network, is_forbidden, literal, permitted
from sidecar.config.schema import UpstreamSettings
from sidecar.config.secret import Secret
from sidecar.errors import FetchFailed
from sidecar.filter import Fetched
from sidecar.transport.upstream import environment_proxy

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024


async def fetch(
    settings: UpstreamSettings, method: str, url: str, headers: Mapping[str, str], body: bytes
) -> Fetched:
    """The answer, on a connection of its own, by the upstream's proxy and to no address that it may
    not have. `tls.ca_file` is trusted beside the system's; nothing turns verification off.

    See `sidecar.filter.Fetch` for what it raises.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    allowed = [ip_network(each) for each in settings.allow_addresses]
    _refuse_forbidden(host, allowed)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        proxy = _proxy(settings, parts.scheme, host, port)
        if proxy is not None:
            _refuse_forbidden(urlsplit(proxy).hostname or "", allowed)
        # In a thread: it reads the system's certificates, which takes 20 ms.
        tls = await asyncio.to_thread(_tls_context, settings)
        async with (
            asyncio.timeout(TIMEOUT_S),
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=GuardedResolver(allowed), ssl=tls),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"user-agent": "llm-sidecar"},
            ) as session,
            session.request(
                method,
                URL(url, encoded=True),  # as it was signed
                headers=headers,
                data=body or None,
                allow_redirects=False,
                proxy=proxy,
            ) as response,
        ):
            data = await _read(response)
            return Fetched(response.status, data, response.headers.get("date", ""))
    except TimeoutError:
        raise FetchFailed("no answer in time") from None
    # Their messages and tracebacks hold URLs: the kind alone is told.
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise FetchFailed(_why(error)) from None


def _why(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the name could not be resolved, or to addresses that are refused"
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return "the TLS handshake failed: is the certificate trusted?"
    if isinstance(error, aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError):
        return "the proxy could not be reached, or refused"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "it could not be reached"
    return f"no answer that could be read ({type(error).__name__})"


def _refuse_forbidden(host: str, allowed: Sequence[Network]) -> None:
    """What `GuardedResolver` does for names; aiohttp does not ask it for addresses."""
    if (address := literal(host)) is not None and is_forbidden(address, allowed):
        raise FetchFailed(f"{address} may not be connected to: see allow_addresses")


def _proxy(settings: UpstreamSettings, scheme: str, host: str, port: int) -> str | None:
    if isinstance(settings.proxy, Secret):
        return settings.proxy.reveal()
    return environment_proxy(scheme, host, port) if settings.proxy == "env" else None


def _tls_context(settings: UpstreamSettings) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if settings.tls.ca_file is not None:
        context.load_verify_locations(settings.tls.ca_file)
    return context


async def _read(response: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise ValueError("too large")
        pieces.append(piece)
    return b"".join(pieces)


class GuardedResolver(AbstractResolver):
    """The system's resolver, without addresses that the upstream may not have."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        found = permitted(list(infos), self._allowed)
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
