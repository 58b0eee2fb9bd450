"""Names, addresses and unix sockets."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from sidecar.call import Timeouts
from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.transport.connect import Resolver
from tests.support.attempts import OpenUpstream, make_attempt, until, whole
from tests.support.upstream import RawUpstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Names:
    """A name server: addresses per name, and how often each was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: dict[str, list[tuple[str, int]]] = {}
        self.asked: list[str] = []
        self.gate: asyncio.Event | None = None
        loop_class = type(asyncio.get_running_loop())
        names = self

        original = loop_class.getaddrinfo

        async def getaddrinfo(loop: Any, host: str, port: int, **kwargs: Any) -> list[Any]:
            if not host.endswith(".test"):  # the loop itself asks for numeric addresses
                return await original(loop, host, port, **kwargs)
            names.asked.append(host)
            if names.gate is not None:
                await names.gate.wait()
            found = names.addresses.get(host)
            if not found:
                raise socket.gaierror(socket.EAI_NONAME, "unknown name")
            return [info(*each) for each in found]

        monkeypatch.setattr(loop_class, "getaddrinfo", getaddrinfo)


def info(address: str, port: int) -> Any:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    where: Any = (address, port, 0, 0) if ":" in address else (address, port)
    return (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", where)


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


# Looking names up


async def test_address_is_remembered_for_its_time(names: Names) -> None:
    names.addresses["a.test"] = [("127.0.0.1", 1)]
    resolver = Resolver(ttl_s=60.0)
    for _ in range(3):
        assert await resolver.resolve("a.test", 1) == [info("127.0.0.1", 1)]
    assert names.asked == ["a.test"]


async def test_name_is_looked_up_again_after_its_time(names: Names) -> None:
    names.addresses["a.test"] = [("127.0.0.1", 1)]
    resolver = Resolver(ttl_s=0.0)
    await resolver.resolve("a.test", 1)
    names.addresses["a.test"] = [("127.0.0.2", 1)]
    assert await resolver.resolve("a.test", 1) == [info("127.0.0.2", 1)]


async def test_one_look_up_serves_all_who_ask_meanwhile(names: Names) -> None:
    names.addresses["a.test"] = [("127.0.0.1", 1)]
    names.gate = asyncio.Event()
    resolver = Resolver(ttl_s=60.0)
    asking = [asyncio.create_task(resolver.resolve("a.test", 1)) for _ in range(10)]
    await until(lambda: names.asked != [])
    asking[0].cancel()  # whoever asked first may leave
    names.gate.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert answers[1:] == [[info("127.0.0.1", 1)]] * 9
    assert names.asked == ["a.test"]


async def test_old_address_is_used_when_a_new_look_up_fails(names: Names) -> None:
    names.addresses["a.test"] = [("127.0.0.1", 1)]
    resolver = Resolver(ttl_s=0.0)
    await resolver.resolve("a.test", 1)
    del names.addresses["a.test"]
    assert await resolver.resolve("a.test", 1) == [info("127.0.0.1", 1)]
    assert names.asked == ["a.test", "a.test"]


async def test_old_address_is_used_when_a_new_look_up_hangs(
    names: Names, raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    """A name server that is away does not say so: it is silent for longer than `connect_s`."""
    names.addresses["a.test"] = [("127.0.0.1", raw.port)]
    upstream = open_upstream("http://a.test", proxy="none", pool={"dns_ttl_s": 0.001})
    gate = asyncio.Event()
    for _ in range(2):
        task = asyncio.create_task(upstream.send(make_attempt(upstream, "GET")))
        connection = await raw.accept()
        await connection.read_request()
        connection.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")
        assert await whole(await task) == b"ok"
        names.gate = gate
    gate.set()


async def test_unknown_name(names: Names, open_upstream: OpenUpstream) -> None:
    upstream = open_upstream("http://nowhere.test", proxy="none")
    with pytest.raises(UpstreamError) as caught:
        await upstream.send(make_attempt(upstream))
    error = caught.value
    assert (error.phase, error.retry, error.status) == (Phase.RESOLVE, Retry.SAME, 502)
    assert "nowhere" not in error.message


async def test_name_that_no_name_server_can_be_asked(open_upstream: OpenUpstream) -> None:
    upstream = open_upstream(f"http://{'a' * 64}.test", proxy="none")
    with pytest.raises(UpstreamError) as caught:
        await upstream.send(make_attempt(upstream))
    assert caught.value.phase is Phase.RESOLVE


# Connecting


async def test_refused_connection(open_upstream: OpenUpstream) -> None:
    async with RawUpstream() as gone:
        url = gone.base_url
    upstream = open_upstream(url, proxy="none")
    with pytest.raises(UpstreamError) as caught:
        await upstream.send(make_attempt(upstream))
    error = caught.value
    assert (error.phase, error.retry, error.status) == (Phase.CONNECT, Retry.SAME, 502)
    assert error.code == "upstream_unreachable"
    assert "127.0.0.1" not in error.message


async def test_second_address_is_tried_when_the_first_refuses(
    names: Names, raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    async with RawUpstream() as gone:
        refusing_port = gone.port
    names.addresses["a.test"] = [("::1", refusing_port), ("127.0.0.1", raw.port)]
    upstream = open_upstream("http://a.test", proxy="none")
    task = asyncio.create_task(upstream.send(make_attempt(upstream, "GET")))
    connection = await raw.accept()
    assert b"\r\nhost: a.test\r\n" in await connection.read_request()
    connection.write(OK)
    assert await whole(await task) == b"ok"


async def test_second_address_is_tried_soon_when_the_first_is_silent(
    names: Names, raw: RawUpstream, open_upstream: OpenUpstream
) -> None:
    async with RawUpstream(host="::1", backlog=0) as full:
        fillers = [socket.socket(socket.AF_INET6) for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("::1", full.port))
        try:
            names.addresses["a.test"] = [("::1", full.port), ("127.0.0.1", raw.port)]
            upstream = open_upstream("http://a.test", proxy="none")
            loop = asyncio.get_running_loop()
            began = loop.time()
            task = asyncio.create_task(upstream.send(make_attempt(upstream, "GET")))
            connection = await raw.accept()
            assert loop.time() - began < 0.6
            await connection.read_request()
            connection.write(OK)
            assert await whole(await task) == b"ok"
        finally:
            for filler in fillers:
                filler.close()


async def test_numeric_ipv6_address(open_upstream: OpenUpstream) -> None:
    async with RawUpstream(host="::1") as six:
        upstream = open_upstream(f"http://[::1]:{six.port}", proxy="none")
        task = asyncio.create_task(upstream.send(make_attempt(upstream, "GET")))
        connection = await six.accept()
        assert b"\r\nhost: [::1]:%d\r\n" % six.port in await connection.read_request()
        connection.write(OK)
        assert await whole(await task) == b"ok"


# Unix sockets


@pytest.mark.parametrize("prefix", ["", ":/prefix/v1"])
async def test_unix_socket(tmp_path: Path, open_upstream: OpenUpstream, prefix: str) -> None:
    path = tmp_path / "s.sock"
    async with RawUpstream(unix_path=path) as raw:
        upstream = open_upstream(f"unix:{path}{prefix}")
        assert upstream.base_path == prefix.removeprefix(":")
        attempt = make_attempt(upstream, path=upstream.base_path + "/chat", body=b"hello")
        task = asyncio.create_task(upstream.send(attempt))
        connection = await raw.accept()
        expected = f"POST {upstream.base_path}/chat HTTP/1.1\r\nhost: localhost\r\n"
        assert (await connection.read_request()).startswith(expected.encode())
        connection.write(OK)
        assert await whole(await task) == b"ok"


async def test_unix_socket_that_is_not_there(tmp_path: Path, open_upstream: OpenUpstream) -> None:
    upstream = open_upstream(f"unix:{tmp_path}/none.sock")
    with pytest.raises(UpstreamError) as caught:
        await upstream.send(make_attempt(upstream, timeouts=Timeouts(connect_s=1.0)))
    assert caught.value.phase is Phase.CONNECT
    assert str(tmp_path) not in caught.value.message
