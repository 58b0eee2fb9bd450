"""One configured upstream: writes an attempt to one of its connections and returns the reply."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Callable, Coroutine
from ipaddress import ip_network
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit
from urllib.request import (  # type: ignore[attr-defined]  # typeshed lacks the second
    getproxies_environment,
    proxy_bypass_environment,
)

from sidecar.call import REPEATABLE_METHODS, Attempt, Timeouts, within_deadline
from sidecar.config.schema import TlsSettings, UpstreamSettings
from sidecar.config.secret import Secret
from sidecar.dialects import DIALECTS, Dialect
from sidecar.errors import Phase, Rejected, Retry, UpstreamError
from sidecar.headers import Headers, lines
from sidecar.reply import Reply
from sidecar.sse import EventTooLarge
from sidecar.transport.connect import Connector, Origin, Proxy, Resolver
from sidecar.transport.connection import NoAnswer, Unsent
from sidecar.transport.pool import Pool


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
        self.extra_headers = dict(settings.headers)
        self.passes_client_key = settings.pass_client_key
        self._waits_for_event = settings.wait_for == "event"
        self.timeouts = Timeouts(**settings.timeouts.model_dump())
        default = 443 if origin.scheme == "https" else 80
        host = origin.host.partition("%")[0]  # a zone is this machine's business: RFC 6874, 1
        host = f"[{host}]" if ":" in host else host
        self.host = host if origin.port == default else f"{host}:{origin.port}"
        self._host_line = f"host: {self.host}\r\n".encode("latin-1")

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.pool!r}>"

    def send(self, attempt: Attempt) -> Coroutine[Any, Any, Reply]:
        """Write the attempt, and return its reply once the first byte of the body is here.

        A kept connection that turns out to be closed is replaced when nothing was sent on it, or
        when the request may be repeated. Raises `UpstreamError`, and `Rejected` (504) when the
        caller's deadline comes first. Cancelled, it closes the connection at once.
        """
        timeouts = attempt.timeouts
        left_s = attempt.call.time_left(monotonic())
        # A kept connection that closes without an answer, a fresh one, and the first event may
        # each take `first_byte_s`; an upload takes as long as the client.
        longest_s = timeouts.connect_s + 3 * timeouts.first_byte_s
        if left_s > (longest_s if attempt.upload is None else timeouts.total_s):
            return self._send(attempt)
        return self._send_within_deadline(attempt)

    async def _send_within_deadline(self, attempt: Attempt) -> Reply:
        async with within_deadline(attempt.call, monotonic()):
            reply = await self._send(attempt)
        return reply

    async def _send(self, attempt: Attempt) -> Reply:
        method, upload, timeouts = attempt.method, attempt.upload, attempt.timeouts
        body = attempt.body
        head = request_head(
            method,
            attempt.path,
            self._host_line,
            attempt.headers,
            attempt.content_length,
            is_chunked=upload is not None,
        )
        total_at = attempt.started_at + timeouts.total_s
        may_keep = True
        while True:
            connection = self.pool.take_idle() if may_keep else None
            is_kept = connection is not None
            if connection is None:
                within_s = min(timeouts.connect_s, total_at - monotonic())
                connection, is_kept = await self.pool.acquire(within_s)
            try:
                waiter = connection.begin(method, head, body, upload, timeouts, total_at)
            except Unsent:
                if is_kept:
                    continue
                message = "the upstream closed the connection at once"
                raise UpstreamError(Phase.CONNECT, Retry.SAME, "upstream_closed", message) from None
            try:
                reply = await waiter
            except NoAnswer:
                may_repeat = method in REPEATABLE_METHODS or "idempotency-key" in attempt.headers
                if not (is_kept and may_repeat and upload is None):
                    raise
                may_keep = False
                continue
            except asyncio.CancelledError:
                connection.give_up(waiter)
                raise
            attempt.first_byte_at = reply.first_byte_at
            if self._waits_for_event and reply.status == 200 and reply.body.is_stream:
                await self._refuse_error_event(attempt, reply)
            return reply

    async def _refuse_error_event(self, attempt: Attempt, reply: Reply) -> None:
        """Raise when the first event of a 200 is an error, so that another target may be tried."""
        try:
            async with asyncio.timeout(attempt.timeouts.first_byte_s):
                event = await reply.body.first_event()
        except EventTooLarge:
            return  # no error is that long
        except asyncio.CancelledError:
            reply.discard()
            raise
        except UpstreamError as error:  # nothing was passed on yet, so it may be tried again
            raise UpstreamError(
                Phase.FIRST_EVENT, Retry.SAME, error.code, error.message, status=error.status
            ) from error
        except TimeoutError as error:
            reply.discard()
            text = "the upstream sent no first event in time"
            raise UpstreamError(
                Phase.FIRST_EVENT, Retry.SAME, "upstream_timeout", text, status=504
            ) from error
        found = self.dialect.error_in(event) if event is not None else None
        if found is not None:
            reply.discard()
            code, message = found
            text = f"the upstream answered 200 and then an error ({code}): {message}"
            raise UpstreamError(
                *(Phase.FIRST_EVENT, Retry.SAME, "upstream_error_event", text[:500]),
                provider_code=code,
            )


def request_head(
    method: str,
    path: str,
    host_line: bytes,
    headers: Headers,
    content_length: int | None,
    *,
    is_chunked: bool = False,
) -> bytes:
    """A request's head as bytes.

    Raises `Rejected` (400) when the path could end the line; `Headers` sees to the fields.
    """
    if not (path.isascii() and path.isprintable()) or " " in path:
        raise Rejected(400, "invalid_path", "the path must be percent-encoded ASCII")
    if is_chunked:
        framing = b"transfer-encoding: chunked\r\n"
    elif content_length is not None:
        framing = b"content-length: %d\r\n" % content_length
    else:
        framing = b""
    return b"%b %b HTTP/1.1\r\n%b%b%b\r\n" % (
        method.encode(),
        path.encode(),
        host_line,
        lines(headers.raw()),
        framing,
    )


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
    if settings.proxy == "none" or origin.unix_path is not None:
        return None
    url = environment_proxy(origin.scheme, origin.host, origin.port)
    return None if url is None else Proxy.parse(url)


def environment_proxy(scheme: str, host: str, port: int) -> str | None:
    """The URL of the proxy that the environment names for this origin; none for plain HTTP."""
    proxies = getproxies_environment()
    url = proxies.get("https") if scheme == "https" else None
    if not url or proxy_bypass_environment(f"{host}:{port}", proxies):
        return None
    return url if "://" in url else f"http://{url}"


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
        allowed=[ip_network(each) for each in settings.allow_addresses],
    )
    return Pool(
        connector.connect,
        max_connections=settings.pool.max_connections,
        idle_s=settings.pool.idle_s,
    )


def pool_key(name: str, settings: UpstreamSettings) -> tuple[object, ...]:
    """Two snapshots share a pool when everything that makes a connection is the same, the contents
    of its certificates included."""
    proxy = settings.proxy
    shown = proxy.sha256() if isinstance(proxy, Secret) else proxy
    tls = settings.tls
    files = [
        hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for file in (tls.ca_file, tls.cert_file, tls.key_file)
        if file is not None
    ]
    allowed = tuple(settings.allow_addresses)
    return ("pool", name, settings.base_url, settings.pool, tls, tuple(files), shown, allowed)
