"""Through an HTTP proxy with CONNECT: from the settings, or from the environment as curl does."""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode

import pytest
import trustme

from sidecar.config.secret import Secret
from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.transport.connect import Proxy
from sidecar.transport.upstream import LiveUpstream
from tests.support.attempts import OpenUpstream, make_attempt, until, whole
from tests.support.proxy import ConnectProxy
from tests.support.upstream import RawUpstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
BASIC = "Basic " + b64encode(b"user:pass word").decode()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture(scope="module")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


async def call_through(upstream: LiveUpstream, raw: RawUpstream) -> None:
    task = asyncio.create_task(upstream.send(make_attempt(upstream, body=b"hello")))
    connection = await raw.accept()
    request = await connection.read_request()
    assert request.startswith(b"POST /v1/answers HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % raw.port)
    assert b"proxy" not in request.lower()
    connection.write(OK)
    assert await whole(await task) == b"ok"


async def test_http_upstream_is_tunnelled_when_its_settings_name_a_proxy(
    raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    async with ConnectProxy() as proxy:
        upstream = open_upstream(raw.base_url, proxy=proxy.url)
        await call_through(upstream, raw)
        where = b"127.0.0.1:%d" % raw.port
        assert proxy.heads == [b"CONNECT %b HTTP/1.1\r\nhost: %b\r\n\r\n" % (where, where)]


@pytest.mark.parametrize("is_proxy_secure", [False, True])
async def test_https_upstream_is_tunnelled_through_the_environment_s_proxy(
    is_proxy_secure: bool,
    server_tls: ssl.SSLContext,
    ca_file: str,
    open_upstream: OpenUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)  # the proxy's certificate: the system's trust
    proxy_tls = server_tls if is_proxy_secure else None
    async with ConnectProxy(tls=proxy_tls) as proxy, RawUpstream(tls=server_tls) as raw:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        upstream = open_upstream(raw.base_url, tls={"ca_file": ca_file})
        await call_through(upstream, raw)
        assert len(proxy.heads) == 1


async def test_password_of_a_proxy_is_sent_to_it(
    raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    async with ConnectProxy(authorization=BASIC) as proxy:
        url = f"http://user:pass%20word@{proxy.address}"
        await call_through(open_upstream(raw.base_url, proxy=Secret(url, "env:PROXY")), raw)


async def test_refused_tunnel_fails_the_call_and_tells_no_password(
    raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    async with ConnectProxy(authorization=BASIC) as proxy:
        url = f"http://user:hunter2@{proxy.address}"
        upstream = open_upstream(raw.base_url, proxy=Secret(url, "env:PROXY"))
        with pytest.raises(UpstreamError) as caught:
            await upstream.send(make_attempt(upstream))
        error = caught.value
        assert (error.phase, error.retry, error.status) == (Phase.CONNECT, Retry.SAME, 502)
        assert error.code == "upstream_proxy_refused"
        assert "407" in error.message
        for text in (str(error), repr(error), repr(error.__cause__), repr(upstream)):
            assert "hunter2" not in text
            assert proxy.address not in text
        await until(lambda: repr(upstream.pool).startswith("<Pool open=0 idle=0 connecting=0"))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 20_000,
    ],
)
async def test_proxy_that_answers_nonsense_fails_the_call(
    raw: RawUpstream, open_upstream: OpenUpstream, answer: bytes
) -> None:
    async with ConnectProxy(answer=answer) as proxy:
        upstream = open_upstream(raw.base_url, proxy=proxy.url)
        with pytest.raises(UpstreamError) as caught:
            await upstream.send(make_attempt(upstream))
        assert caught.value.phase is Phase.CONNECT
        assert not raw.has_waiting()


async def test_proxy_that_is_away(raw: RawUpstream, open_upstream: OpenUpstream) -> None:
    async with ConnectProxy() as proxy:
        url = proxy.url
    upstream = open_upstream(raw.base_url, proxy=url)
    with pytest.raises(UpstreamError) as caught:
        await upstream.send(make_attempt(upstream))
    assert caught.value.phase is Phase.CONNECT


@pytest.mark.parametrize("settings", ["none", "exempt", "http upstream"])
async def test_environment_s_proxy_is_not_used(
    settings: str,
    server_tls: ssl.SSLContext,
    ca_file: str,
    open_upstream: OpenUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tls = None if settings == "http upstream" else server_tls
    async with ConnectProxy() as proxy, RawUpstream(tls=tls) as raw:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        if settings == "exempt":
            monkeypatch.setenv("NO_PROXY", "example.test,127.0.0.1")
        upstream = open_upstream(
            raw.base_url,
            proxy="none" if settings == "none" else "env",
            tls={"ca_file": ca_file},
        )
        await call_through(upstream, raw)
        assert proxy.heads == []


async def test_certificate_behind_the_tunnel_is_verified(
    server_tls: ssl.SSLContext, open_upstream: OpenUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ConnectProxy() as proxy, RawUpstream(tls=server_tls) as raw:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        upstream = open_upstream(raw.base_url)
        task = asyncio.create_task(upstream.send(make_attempt(upstream)))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await raw.accept()
        with pytest.raises(UpstreamError) as caught:
            await task
        assert (caught.value.phase, caught.value.retry) == (Phase.TLS, Retry.ELSEWHERE)


@pytest.mark.parametrize(
    "url",
    [
        "socks5://user:hunter2@127.0.0.1:1080",
        "http://user:hunter2@",
        "http://user:hunter2@127.0.0.1:99999",
        "http://user:hunter2@127.0.0.1/path",
    ],
)
def test_proxy_url_that_cannot_be_used_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValueError, match="proxy") as caught:
        Proxy.parse(url)
    assert "hunter2" not in str(caught.value)
