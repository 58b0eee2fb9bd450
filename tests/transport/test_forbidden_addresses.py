"""No connection to an address where no call may go: by name, in disguise, through a proxy."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import pytest

from sidecar import addresses
from sidecar.config.schema import UpstreamSettings
from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.transport.connect import Connector, Origin, Resolver
from sidecar.transport.pool import Pool
from sidecar.transport.upstream import LiveUpstream, pool_key
from tests.support.addresses import DISGUISES, METADATA, ODD_SPELLINGS
from tests.support.attempts import OpenUpstream, make_attempt, whole
from tests.support.proxy import ConnectProxy
from tests.support.upstream import RawUpstream

OK = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"

# At a connection


def info(address: str, port: int) -> Any:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    where: Any = (address, port, 0, 0) if ":" in address else (address, port)
    return (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", where)


class Net:
    """A name server for `.test`, and a record of whom the loop was told to connect to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, list[tuple[str, int]]] = {}
        self.connected: list[str] = []
        loop = asyncio.get_running_loop()
        resolve, connect = loop.getaddrinfo, loop.sock_connect

        async def getaddrinfo(host: Any, port: Any, **kwargs: Any) -> Any:
            if not host.endswith(".test"):
                return await resolve(host, port, **kwargs)
            return [info(*each) for each in self.answers[host]]

        async def sock_connect(sock: socket.socket, address: Any) -> None:
            self.connected.append(address[0])
            await connect(sock, address)

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(loop, "sock_connect", sock_connect)


@pytest.fixture
async def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    return Net(monkeypatch)


@pytest.fixture
def refused_loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address of this machine that is refused, so that there is somebody to be reached."""
    monkeypatch.setattr(addresses, "REFUSED", (ip_network("127.0.0.2"),))
    return "127.0.0.2"


async def refusal(upstream: LiveUpstream) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        await upstream.send(make_attempt(upstream, "GET"))
    assert caught.value.code == "upstream_address_forbidden"
    return caught.value


async def call(upstream: LiveUpstream, raw: RawUpstream) -> None:
    task = asyncio.create_task(upstream.send(make_attempt(upstream, "GET")))
    connection = await raw.accept()
    await connection.read_request()
    connection.write(OK)
    assert await whole(await task) == b"ok"


@pytest.mark.parametrize("address", [METADATA, "fe80::1", "fd00:ec2::254", *DISGUISES[:2]])
async def test_a_name_with_a_forbidden_address_is_not_connected_to(
    net: Net, open_upstream: OpenUpstream, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    net.answers["a.test"] = [(address, 80)]
    error = await refusal(open_upstream("http://a.test", proxy="none"))
    assert (error.phase, error.retry, error.status) == (Phase.RESOLVE, Retry.ELSEWHERE, 502)
    assert net.connected == []
    for text in (error.message, repr(error)):
        assert address not in text
        assert "a.test" not in text
    (record,) = [each for each in caplog.records if each.name == "sidecar.transport.connect"]
    assert (record.levelno, record.getMessage()) == (logging.WARNING, "address_refused")
    assert (record.__dict__["host"], record.__dict__["addresses"]) == ("a.test", [address])


@pytest.mark.parametrize("host", [METADATA, "[fe80::1%lo]", "[::ffff:a9fe:a9fe]", *ODD_SPELLINGS])
async def test_a_forbidden_address_in_place_of_a_name_is_not_connected_to(
    net: Net, open_upstream: OpenUpstream, host: str
) -> None:
    await refusal(open_upstream(f"http://{host}/latest", proxy="none"))
    assert net.connected == []


async def test_the_other_addresses_of_a_name_are_used(
    net: Net, raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    net.answers["a.test"] = [(METADATA, raw.port), ("fe80::1", raw.port), ("127.0.0.1", raw.port)]
    await call(open_upstream("http://a.test", proxy="none"), raw)
    assert net.connected == ["127.0.0.1"]


def pool_of_a_test(port: int, resolver: Resolver, *allowed: str) -> Pool:
    """Connections to `a.test`."""
    connector = Connector(
        Origin("http", "a.test", port),
        resolver=resolver,
        tls=ssl.create_default_context,
        allowed=[ip_network(each) for each in allowed],
    )
    return Pool(connector.connect, max_connections=2, idle_s=1.0)


async def opened(pool: Pool) -> str:
    """`open` for a connection that could be opened, else the error's code."""
    try:
        connection, _ = await pool.acquire(1.0)
    except UpstreamError as error:
        return error.code
    connection.abort()
    return "open"


async def test_a_name_that_changes_to_a_forbidden_address_is_refused_from_then_on(
    net: Net, raw: RawUpstream
) -> None:
    net.answers["a.test"] = [("127.0.0.1", raw.port)]
    pool = pool_of_a_test(raw.port, Resolver(ttl_s=0.0))
    assert await opened(pool) == "open"
    net.answers["a.test"] = [(METADATA, raw.port)]
    assert await opened(pool) == "upstream_address_forbidden"
    assert net.connected == ["127.0.0.1"]


async def test_a_remembered_address_is_judged_at_each_use(net: Net, refused_loopback: str) -> None:
    """One resolver may serve upstreams that allow different addresses."""
    async with RawUpstream(host=refused_loopback) as raw:
        net.answers["a.test"] = [(refused_loopback, raw.port)]
        resolver = Resolver(ttl_s=60.0)
        allowing = pool_of_a_test(raw.port, resolver, "127.0.0.0/29")
        refusing = pool_of_a_test(raw.port, resolver)
        for _ in range(2):
            assert await opened(allowing) == "open"
            assert await opened(refusing) == "upstream_address_forbidden"
        assert net.connected == [refused_loopback] * 2


@pytest.mark.parametrize("allowed", ["127.0.0.2", "127.0.0.0/30"])
async def test_an_allowed_address_is_connected_to(
    refused_loopback: str, open_upstream: OpenUpstream, allowed: str
) -> None:
    async with RawUpstream(host=refused_loopback) as raw:
        url = f"http://{refused_loopback}:{raw.port}"
        await refusal(open_upstream(url, proxy="none"))
        assert not raw.has_waiting()
        await call(open_upstream(url, proxy="none", allow_addresses=[allowed]), raw)


async def test_an_allowed_address_with_a_zone_is_connected_to(
    net: Net, open_upstream: OpenUpstream
) -> None:
    url = "http://[fe80::1%lo]:9"
    upstream = open_upstream(url, proxy="none", allow_addresses=["fe80::/64"])
    with pytest.raises(UpstreamError) as caught:  # loopback has no such address
        await upstream.send(make_attempt(upstream, "GET"))
    assert caught.value.code == "upstream_unreachable"
    assert net.connected == ["fe80::1%lo"]


def test_pools_are_not_shared_by_upstreams_that_allow_different_addresses() -> None:
    keys = {
        pool_key("a", UpstreamSettings(dialect="openai", base_url="http://a", allow_addresses=each))
        for each in ([], ["169.254.1.1"], ["169.254.0.0/16"])
    }
    assert len(keys) == 3


# Through a proxy


@pytest.mark.parametrize("host", [METADATA, f"{METADATA}.", "[fe80::1]", *ODD_SPELLINGS])
async def test_a_proxy_is_not_asked_for_a_forbidden_address(
    open_upstream: OpenUpstream, host: str
) -> None:
    async with ConnectProxy() as proxy:
        await refusal(open_upstream(f"http://{host}", proxy=proxy.url))
        assert proxy.heads == []


async def test_a_proxy_may_be_asked_for_an_allowed_address(
    refused_loopback: str, open_upstream: OpenUpstream
) -> None:
    async with ConnectProxy() as proxy, RawUpstream(host=refused_loopback) as raw:
        url = f"http://{refused_loopback}:{raw.port}"
        allowed = [refused_loopback]
        await call(open_upstream(url, proxy=proxy.url, allow_addresses=allowed), raw)


async def test_a_proxy_looks_names_up_itself(net: Net, open_upstream: OpenUpstream) -> None:
    async with ConnectProxy(refuse_with=403) as proxy:
        upstream = open_upstream("http://a.test", proxy=proxy.url)
        with pytest.raises(UpstreamError) as caught:
            await upstream.send(make_attempt(upstream, "GET"))
        assert caught.value.code == "upstream_proxy_refused"
        assert proxy.heads == [b"CONNECT a.test:80 HTTP/1.1\r\nhost: a.test:80\r\n\r\n"]


@pytest.mark.parametrize("proxy_host", [METADATA, "proxy.test", "2852039166"])
async def test_a_proxy_with_a_forbidden_address_is_not_connected_to(
    net: Net, raw: RawUpstream, open_upstream: OpenUpstream, proxy_host: str
) -> None:
    net.answers["proxy.test"] = [(METADATA, 3128)]
    await refusal(open_upstream(raw.base_url, proxy=f"http://{proxy_host}:3128"))
    assert net.connected == []


async def test_a_proxy_with_an_allowed_address_is_used(
    net: Net, raw: RawUpstream, refused_loopback: str, open_upstream: OpenUpstream
) -> None:
    async with RawUpstream(host=refused_loopback) as proxy:
        url = f"http://{refused_loopback}:{proxy.port}"
        upstream = open_upstream(raw.base_url, proxy=url, allow_addresses=[refused_loopback])
        task = asyncio.create_task(upstream.send(make_attempt(upstream, "GET")))
        connection = await proxy.accept()
        assert (await connection.read_head()).startswith(b"CONNECT 127.0.0.1:")
        connection.write(b"HTTP/1.1 200 OK\r\n\r\n")
        assert (await connection.read_head()).startswith(b"GET /v1/answers HTTP/1.1\r\n")
        connection.write(OK)
        assert await whole(await task) == b"ok"
