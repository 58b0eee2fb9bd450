"""One configured upstream: writes an attempt to one of its connections and returns the reply."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment

from multidict import CIMultiDict

from sidecar.call import Attempt, Timeouts
from sidecar.config.schema import TlsSettings, UpstreamSettings
from sidecar.config.secret import Secret
from sidecar.dialects import DIALECTS, Dialect
from sidecar.errors import Phase, Rejected, Retry, UpstreamError
from sidecar.reply import Reply
from sidecar.transport.connect import Connector, Origin, Proxy, Resolver
from sidecar.transport.connection import NoAnswer, Unsent
from sidecar.transport.pool import Pool

REPLAYABLE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
"""Idempotent methods (RFC 9110, 9.2.2): sent again when a kept connection closed without answer."""


class LiveUpstream:
    """An upstream with its connections. Immutable but for the pool."""

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        *,
        origin: Origin,
        base_path: str,
        pool: Pool,
    ) -> None:
        self.name = name
        self.settings = settings
        self.dialect: Dialect = DIALECTS[settings.dialect]
        self.origin = origin
        self.scheme = origin.scheme
        self.base_path = base_path
        self.pool = pool
        self.extra_headers = tuple(settings.headers.items())
        self.waits_for_event = settings.wait_for == "event"
        self.timeouts = Timeouts(**settings.timeouts.model_dump())
        default = 443 if origin.scheme == "https" else 80
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        self.host = host if origin.port == default else f"{host}:{origin.port}"

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.pool!r}>"

    async def send(self, attempt: Attempt) -> Reply:
        """Write the attempt, and return its reply once the first byte of the body is here.

        A kept connection that turns out to be closed is replaced when nothing was sent on it, or
        when the request may be repeated. Raises `UpstreamError`.
        """
        method = attempt.method
        head = request_head(
            method,
            attempt.path,
            self.host,
            attempt.headers,
            None if attempt.upload is not None else len(attempt.body),
        )
        timeouts = attempt.timeouts
        total_at = attempt.started_at + timeouts.total_s
        fresh = False
        while True:
            connection = None if fresh else self.pool.take_idle()
            is_reused = connection is not None
            if connection is None:
                connection, is_reused = await self.pool.acquire(timeouts.connect_s)
            try:
                return await connection.exchange(
                    method, head, attempt.body, attempt.upload, timeouts, total_at
                )
            except Unsent:
                if not is_reused:
                    message = "the upstream closed the connection at once"
                    raise UpstreamError(
                        Phase.CONNECT, Retry.SAME, "upstream_closed", message
                    ) from None
            except NoAnswer:
                may_repeat = method in REPLAYABLE or "idempotency-key" in attempt.headers
                if not (is_reused and may_repeat and attempt.upload is None):
                    raise
                fresh = True


def request_head(
    method: str, path: str, host: str, headers: CIMultiDict[str], body_bytes: int | None
) -> bytes:
    """A request's head as bytes; `body_bytes` None: the body is chunked.

    Raises `Rejected` (400) when a field holds a line end or NUL, whoever put it there.
    """
    lines = [f"{method} {path} HTTP/1.1\r\nhost: {host}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    count = len(headers) + 3
    if body_bytes is None:
        lines.append("transfer-encoding: chunked\r\n\r\n")
        count += 1
    elif body_bytes or method not in ("GET", "HEAD", "DELETE", "OPTIONS", "TRACE"):
        lines.append(f"content-length: {body_bytes}\r\n\r\n")
        count += 1
    else:
        lines.append("\r\n")
    text = "".join(lines)
    if text.count("\n") != count or text.count("\r") != count or "\0" in text:
        raise Rejected(400, "invalid_header", "a header field holds a line end or a NUL")
    return text.encode("utf-8", "surrogateescape")


def parse_base_url(base_url: str) -> tuple[Origin, str]:
    """Origin and base path (without a final slash) of a checked `base_url`."""
    if base_url.startswith("unix:"):
        path, _, base_path = base_url.removeprefix("unix:").partition(":")
        return Origin("http", "localhost", 80, unix_path=path), base_path.rstrip("/")
    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return Origin(parts.scheme, parts.hostname or "", port), parts.path.rstrip("/")


def proxy_for(settings: UpstreamSettings, origin: Origin) -> Proxy | None:
    """The proxy to go through. Environment: HTTPS_PROXY and NO_PROXY, as curl reads them."""
    if isinstance(settings.proxy, Secret):
        return Proxy.parse(settings.proxy.reveal())
    if settings.proxy == "none" or origin.unix_path is not None or origin.scheme != "https":
        return None
    proxies = getproxies_environment()
    url = proxies.get("https")
    if not url or proxy_bypass_environment(f"{origin.host}:{origin.port}", proxies):
        return None
    return Proxy.parse(url if "://" in url else f"http://{url}")


def tls_context(settings: TlsSettings) -> Callable[[], ssl.SSLContext]:
    """A factory that makes the context once. Raises OSError or ssl.SSLError for unusable files."""
    made: list[ssl.SSLContext] = []

    def make() -> ssl.SSLContext:
        if not made:
            context = ssl.create_default_context(cafile=settings.ca_file)
            context.set_alpn_protocols(["http/1.1"])
            if settings.cert_file is not None:
                context.load_cert_chain(settings.cert_file, settings.key_file)
            if settings.insecure_skip_verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            made.append(context)
        return made[0]

    if settings.ca_file or settings.cert_file:
        make()  # a wrong file must show at load, not at the first call
    return make


def open_pool(settings: UpstreamSettings, origin: Origin) -> Pool:
    connector = Connector(
        origin,
        resolver=Resolver(settings.pool.dns_ttl_s),
        tls=tls_context(settings.tls),
        server_name=settings.tls.server_name,
        proxy=proxy_for(settings, origin),
    )
    return Pool(
        connector.connect,
        max_connections=settings.pool.max_connections,
        idle_s=settings.pool.idle_s,
    )


def pool_key(name: str, settings: UpstreamSettings) -> tuple[object, ...]:
    """Two snapshots share a pool when everything that makes a connection is the same."""
    proxy = settings.proxy
    shown = proxy.sha256() if isinstance(proxy, Secret) else (proxy, os.environ.get("HTTPS_PROXY"))
    return ("pool", name, settings.base_url, settings.pool, settings.tls, shown)
