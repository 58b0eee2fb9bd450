"""Answers of configured addresses: small, without redirects, and silent about what failed."""

from __future__ import annotations

import asyncio
import socket
import ssl
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trustme

from sidecar import addresses
from sidecar.config.schema import TlsSettings, UpstreamSettings
from sidecar.config.secret import Secret
from sidecar.errors import FetchFailed
from sidecar.filter import Fetched
from sidecar.transport import fetch as fetch_module
from sidecar.transport.fetch import MAX_ANSWER_BYTES, fetch
from tests.support.upstream import RawUpstream

SECRET = "sk-canary-of-a-url"


def settings(**more: Any) -> UpstreamSettings:
    return UpstreamSettings(dialect="openai", base_url="https://a.test", **more)


async def asking(
    method: str, url: str, headers: dict[str, str], body: bytes, **more: Any
) -> Fetched:
    return await fetch(settings(**more), method, url, headers, body)


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


async def test_request_goes_out_as_told_and_the_answer_comes_back() -> None:
    async with RawUpstream() as upstream:
        asked = asyncio.ensure_future(
            asking("POST", f"{upstream.base_url}/t?a=%2F&a=", {"x-a": "1"}, b"{}")
        )
        connection = await upstream.accept()
        request = await connection.read_request()
        connection.write(answer(b'{"error": 1}', "400 Bad Request", "date: today\r\n"))
        assert await asked == (400, b'{"error": 1}', "today")
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /t?a=%2F&a= HTTP/1.1\r\n")
    assert b"x-a: 1" in head
    assert b"authorization" not in head.lower()
    assert b"cookie" not in head.lower()
    assert body == b"{}"


async def test_path_and_query_go_out_as_they_are_written() -> None:
    async with RawUpstream() as upstream:
        target = "/%E6%B5%8B~/%7e?Version=1&Action=%41&x=a%20b&y=c+d&z="
        asked = asyncio.ensure_future(asking("GET", upstream.base_url + target, {}, b""))
        connection = await upstream.accept()
        request = await connection.read_request()
        connection.write(answer(b""))
        await asked
    assert request.split(b" ")[1].decode() == target


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_an_answer_and_is_not_followed(status: int) -> None:
    async with RawUpstream() as upstream, RawUpstream() as other:
        asked = asyncio.ensure_future(asking("GET", upstream.base_url, {"a": SECRET}, b""))
        connection = await upstream.accept()
        await connection.read_request()
        connection.write(answer(b"", f"{status} Elsewhere", f"location: {other.base_url}/\r\n"))
        assert (await asked).status == status
        assert not other.has_waiting()


async def test_cookie_of_an_answer_is_not_kept() -> None:
    async with RawUpstream() as upstream:
        for _ in range(2):
            asked = asyncio.ensure_future(asking("GET", upstream.base_url, {}, b""))
            connection = await upstream.accept()
            assert b"cookie" not in (await connection.read_request()).lower()
            connection.write(answer(b"", headers="set-cookie: a=b\r\n"))
            await asked


async def test_answer_that_is_too_large_fails() -> None:
    async with RawUpstream() as upstream:
        asked = asyncio.ensure_future(asking("GET", upstream.base_url, {}, b""))
        connection = await upstream.accept()
        await connection.read_request()
        connection.write(answer(b"x" * (MAX_ANSWER_BYTES + 1)))
        with pytest.raises(FetchFailed):
            await asked


async def test_silent_server_fails_within_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawUpstream() as upstream:
        with (
            mock.patch.object(fetch_module, "TIMEOUT_S", 0.05),
            pytest.raises(FetchFailed, match="time"),
        ):
            await asking("GET", upstream.base_url, {}, b"")


async def test_failures_tell_neither_address_nor_secret() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url in (
        f"http://127.0.0.1:{port}/?client_secret={SECRET}",
        f"http://name.invalid/?client_secret={SECRET}",
        f"nonsense://{SECRET}",
    ):
        with pytest.raises(FetchFailed) as raised:
            await asking("GET", url, {}, b"")
        assert SECRET not in f"{raised.value!r} {raised.value.__cause__!r}"
        assert raised.value.__cause__ is None


@pytest.mark.parametrize("host", ["169.254.169.254", "2852039166", "[fe80::1]", "100.100.100.200"])
async def test_metadata_addresses_are_never_asked(host: str) -> None:
    with pytest.raises(FetchFailed, match="may not"):
        await asking("GET", f"http://{host}/", {}, b"")


async def test_name_that_resolves_to_a_metadata_address_is_refused() -> None:
    loop = asyncio.get_running_loop()

    async def resolve(host: str, port: int, **more: object) -> list[object]:
        assert host == "token.test"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", port))]

    with mock.patch.object(loop, "getaddrinfo", resolve), pytest.raises(FetchFailed):
        await asking("GET", "http://token.test/", {}, b"")


async def test_certificate_that_nobody_vouches_for_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with RawUpstream(tls=context) as upstream:
        asked = asyncio.ensure_future(asking("GET", upstream.base_url, {}, b""))
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await upstream.accept()
        with pytest.raises(FetchFailed, match="TLS handshake"):
            await asked


async def test_environment_proxy_carries_what_goes_out_by_https(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with RawUpstream() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.base_url)
        asked = asyncio.ensure_future(asking("GET", "https://token.test/", {}, b""))
        connection = await proxy.accept()
        assert (await connection.read_head()).startswith(b"CONNECT token.test:443 HTTP/1.1\r\n")
        connection.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
        with pytest.raises(FetchFailed):
            await asked


async def test_proxy_of_the_upstream_carries_it_and_none_keeps_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with RawUpstream() as proxy, RawUpstream() as environment:
        monkeypatch.setenv("HTTPS_PROXY", environment.base_url)
        url = proxy.base_url.replace("://", "://user:pass@")
        asked = asyncio.ensure_future(
            asking("GET", "https://token.test/", {}, b"", proxy=Secret(url))
        )
        connection = await proxy.accept()
        head = await connection.read_head()
        assert head.startswith(b"CONNECT token.test:443 ")
        assert b"proxy-authorization: basic dxnlcjpwyxnz" in head.lower()
        connection.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
        with pytest.raises(FetchFailed) as raised:
            await asked
        assert "pass" not in str(raised.value)
        with pytest.raises(FetchFailed):
            await asking("GET", "https://127.0.0.1:1/", {}, b"", proxy="none")
        assert not environment.has_waiting()


async def test_ca_of_the_upstream_vouches_for_it_too(tmp_path: Path) -> None:
    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = TlsSettings(ca_file=str(tmp_path / "ca.pem"), insecure_skip_verify=True)
    async with RawUpstream(tls=context) as upstream:
        asked = asyncio.ensure_future(asking("GET", upstream.base_url, {}, b"", tls=tls))
        connection = await upstream.accept()
        await connection.read_request()
        connection.write(answer(b"ok"))
        assert (await asked).body == b"ok"


async def test_skipping_verification_is_for_the_upstream_alone() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    tls = TlsSettings(insecure_skip_verify=True)
    async with RawUpstream(tls=context) as upstream:
        asked = asyncio.ensure_future(asking("GET", upstream.base_url, {}, b"", tls=tls))
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await upstream.accept()
        with pytest.raises(FetchFailed, match="TLS handshake"):
            await asked


async def test_address_that_the_upstream_may_have_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "REFUSED", (ip_network("127.0.0.0/8"),))
    async with RawUpstream() as upstream:
        for host in ("127.0.0.1", "localhost"):
            url = f"http://{host}:{upstream.port}/"
            with pytest.raises(FetchFailed):
                await asking("GET", url, {}, b"")
            assert not upstream.has_waiting()
            asked = asyncio.ensure_future(
                asking("GET", url, {}, b"", allow_addresses=["127.0.0.1"])
            )
            connection = await upstream.accept()
            await connection.read_request()
            connection.write(answer(b"ok"))
            assert (await asked).body == b"ok"


async def test_proxy_with_a_forbidden_address_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "REFUSED", (ip_network("127.0.0.0/8"),))
    async with RawUpstream() as proxy:
        with pytest.raises(FetchFailed, match="allow_addresses"):
            await asking("GET", "https://token.test/", {}, b"", proxy=Secret(proxy.base_url))
        assert not proxy.has_waiting()
