"""From an upstream's address to an open connection: DNS, happy eyeballs, proxy, TLS.

Foreign errors end here: whatever sockets, the resolver or TLS raise becomes an `UpstreamError`.
Which addresses may be connected to is `sidecar.addresses`' business.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from aiohappyeyeballs import AddrInfoType, start_connection

from sidecar.addresses import Network, is_forbidden, literal, permitted
from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.transport.connection import Connection, Owner

log = logging.getLogger(__name__)

HAPPY_EYEBALLS_DELAY_S = 0.25  # RFC 8305, section 5
MAX_TUNNEL_HEAD_BYTES = 16 * 1024

STALE_PATIENCE_S = 0.5
"""Who has an old address waits that long for a new one: a name server that is away is silent for
longer than any `connect_s`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an upstream is: fixed by configuration, never by a request."""

    scheme: str  # "http" or "https"
    host: str
    port: int
    unix_path: str | None = None


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that tunnels with CONNECT."""

    origin: Origin
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> Proxy:
        """`http[s]://[user:password@]host[:port]`; raises ValueError, which never shows the URL."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError("not a proxy URL") from None
        if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/"):
            raise ValueError("a proxy is written http://[user:password@]host:port")
        authorization = None
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = "Basic " + base64.b64encode(user.encode()).decode()
        default = 443 if parts.scheme == "https" else 80
        return cls(Origin(parts.scheme, host, port or default), authorization)


class Resolver:
    """Names to addresses, remembered for `ttl_s`. One look-up a name at a time.

    When a new look-up fails, or takes longer than `STALE_PATIENCE_S`, the old answer is used on.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._known: dict[tuple[str, int], tuple[float, list[AddrInfoType]]] = {}
        self._running: dict[tuple[str, int], asyncio.Task[list[AddrInfoType]]] = {}

    async def resolve(self, host: str, port: int) -> list[AddrInfoType]:
        key = (host, port)
        known = self._known.get(key)
        loop = asyncio.get_running_loop()
        if known is not None and loop.time() < known[0]:
            return known[1]
        running = self._running.get(key)
        if running is None:
            running = loop.create_task(self._look_up(key), name=f"resolve {host}")
            self._running[key] = running
            running.add_done_callback(lambda task: self._looked_up(key, task))
        if known is None:
            return await asyncio.shield(running)
        try:
            async with asyncio.timeout(STALE_PATIENCE_S):
                return await asyncio.shield(running)
        except OSError:  # which TimeoutError is too
            return known[1]

    def _looked_up(self, key: tuple[str, int], task: asyncio.Task[list[AddrInfoType]]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, though whoever asked may have left

    async def _look_up(self, key: tuple[str, int]) -> list[AddrInfoType]:
        host, port = key
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
        self._known[key] = (loop.time() + self._ttl_s, list(infos))
        return list(infos)


class Connector:
    """Opens connections to one origin, and to no address that is refused and not in `allowed`."""

    def __init__(
        self,
        origin: Origin,
        *,
        resolver: Resolver,
        tls: Callable[[], ssl.SSLContext],
        server_name: str | None = None,
        proxy: Proxy | None = None,
        allowed: Sequence[Network] = (),
    ) -> None:
        self._origin = origin
        self._resolver = resolver
        self._tls = tls  # made at the first connection: loading a CA bundle takes 20 ms
        self._server_name = server_name or origin.host
        self._proxy = proxy
        self._allowed = tuple(allowed)
        self._proxy_tls: ssl.SSLContext | None = None  # as late as the other, and for https:// only

    async def connect(self, owner: Owner) -> Connection:
        """An open connection, TLS included. Raises `UpstreamError`; the caller limits the time."""
        loop = asyncio.get_running_loop()
        origin = self._origin
        connection = Connection(loop, owner)
        context = self._tls() if origin.scheme == "https" else None
        try:
            if origin.unix_path is not None:
                await loop.create_unix_connection(lambda: connection, origin.unix_path)
                return connection
            if self._proxy is not None:
                await self._connect_through(self._proxy, connection, context)
                return connection
            sock = await self._open_socket(origin)
            await self._start(sock, connection, context, self._server_name)
        except ssl.SSLError as error:
            raise _tls_failed() from error
        except OSError as error:
            raise _connect_failed() from error
        return connection

    async def _open_socket(self, origin: Origin) -> socket.socket:
        try:
            infos = await self._addresses(origin)
        except (OSError, UnicodeError) as error:  # a name that IDNA cannot write is UnicodeError
            message = "the upstream's name could not be resolved"
            raise UpstreamError(
                Phase.RESOLVE, Retry.SAME, "upstream_unresolved", message
            ) from error
        # Here and not in the resolver, so that nothing comes between the check and the use.
        good = permitted(infos, self._allowed)
        if not good:
            raise _refused(origin.host, [str(info[4][0]) for info in infos])
        return await start_connection(
            good,
            happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S,
            interleave=1,
            loop=asyncio.get_running_loop(),
        )

    async def _addresses(self, origin: Origin) -> list[AddrInfoType]:
        try:
            address = ipaddress.ip_address(origin.host)
        except ValueError:
            return await self._resolver.resolve(origin.host, origin.port)
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        where: Any = (origin.host, origin.port)
        if address.version == 6:
            where = (origin.host, origin.port, 0, 0)
        return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", where)]

    async def _start(
        self,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        context: ssl.SSLContext | None,
        server_name: str,
    ) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.create_connection(
                lambda: protocol,
                sock=sock,
                ssl=context,
                server_hostname=server_name if context is not None else None,
            )
        except BaseException:
            sock.close()
            raise
        return transport

    async def _connect_through(
        self, proxy: Proxy, connection: Connection, context: ssl.SSLContext | None
    ) -> None:
        # The proxy looks the name up: only an address that stands there itself can be judged.
        address = literal(self._origin.host)
        if address is not None and is_forbidden(address, self._allowed):
            raise _refused(self._origin.host, [address])
        loop = asyncio.get_running_loop()
        tunnel = _Tunnel(loop)
        if proxy.origin.scheme == "https" and self._proxy_tls is None:
            self._proxy_tls = ssl.create_default_context()
        sock = await self._open_socket(proxy.origin)
        transport = await self._start(sock, tunnel, self._proxy_tls, proxy.origin.host)
        try:
            host = f"[{self._origin.host}]" if ":" in self._origin.host else self._origin.host
            where = f"{host}:{self._origin.port}"
            lines = [f"CONNECT {where} HTTP/1.1", f"host: {where}"]
            if proxy.authorization is not None:
                lines.append(f"proxy-authorization: {proxy.authorization}")
            transport.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
            await tunnel.established()
            if context is None:
                transport.pause_reading()
                transport.set_protocol(connection)
                connection.connection_made(transport)
                transport.resume_reading()
                return
            secured = await loop.start_tls(
                transport, connection, context, server_hostname=self._server_name
            )
            if secured is None:
                raise ConnectionResetError("the proxy closed the tunnel")
            connection.connection_made(secured)
        except BaseException:
            transport.abort()
            raise


class _Tunnel(asyncio.Protocol):
    """Reads a proxy's answer to CONNECT, and not a byte more."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._head = b""
        self._status: asyncio.Future[int] = loop.create_future()

    async def established(self) -> None:
        status = await self._status
        if not 200 <= status < 300:
            message = f"the proxy refused the tunnel with status {status}"
            raise UpstreamError(Phase.CONNECT, Retry.SAME, "upstream_proxy_refused", message)

    def data_received(self, data: bytes) -> None:
        if self._status.done():
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            if len(self._head) > MAX_TUNNEL_HEAD_BYTES:
                self._fail(ConnectionError("the proxy's answer is too long"))
            return
        status_line = self._head.split(b"\r\n", 1)[0].split(b" ")
        if len(status_line) < 2 or not status_line[0].startswith(b"HTTP/1."):
            self._fail(ConnectionError("the proxy's answer is not HTTP/1.1"))
        elif not status_line[1].isdigit():
            self._fail(ConnectionError("the proxy's answer has no status"))
        elif status_line[1].startswith(b"2") and len(self._head) > end + 4:
            # The far side of a tunnel never speaks first: not HTTP, not TLS.
            self._fail(ConnectionError("the proxy sent bytes before the tunnel was used"))
        else:
            self._status.set_result(int(status_line[1]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionResetError("the proxy closed the connection"))

    def _fail(self, error: Exception) -> None:
        if not self._status.done():
            self._status.set_exception(error)


def _refused(host: str, addresses: list[str]) -> UpstreamError:
    """The client learns that it was refused; our log, what."""
    log.warning("address_refused", extra={"host": host, "addresses": addresses})
    message = "the upstream has an address that no call may go to"
    return UpstreamError(Phase.RESOLVE, Retry.ELSEWHERE, "upstream_address_forbidden", message)


def _connect_failed() -> UpstreamError:
    message = "the upstream could not be reached"
    return UpstreamError(Phase.CONNECT, Retry.SAME, "upstream_unreachable", message)


def _tls_failed() -> UpstreamError:
    message = "the TLS handshake with the upstream failed"
    return UpstreamError(Phase.TLS, Retry.ELSEWHERE, "upstream_tls_failed", message)
