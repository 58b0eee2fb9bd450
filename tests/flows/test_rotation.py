"""Keys of upstreams that change while the sidecar runs: mounted files, swapped as kubelet does."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sidecar import reload
from sidecar.reload import Reloader
from tests.support.canary import Canaries
from tests.support.flow import CHAT, Flow, Start, chat_body, request, until
from tests.support.proxy import ConnectProxy
from tests.support.upstream import RawConnection, RawUpstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Mounted:
    """A folder as a mounted Secret: its files are links into `..data`, a link that is swapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._now: dict[str, str] = {}
        self._version = 0
        folder.mkdir()

    def publish(self, **files: str) -> None:
        """Swap in a version in which `files` are as given, and the others as they were."""
        self._now |= files
        self._version += 1
        before = self.folder / f"..{self._version - 1}"
        after = self.folder / f"..{self._version}"
        after.mkdir()
        for name, text in self._now.items():
            (after / name).write_text(text)
        (self.folder / "..data_tmp").symlink_to(after.name)
        os.rename(self.folder / "..data_tmp", self.folder / "..data")
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        if before.is_dir():
            for each in before.iterdir():
                each.unlink()
            before.rmdir()


@pytest.fixture
def mounted(tmp_path: Path) -> Mounted:
    return Mounted(tmp_path / "mounted")


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[Any]]:
    """The log's records of one event."""
    return lambda name: [vars(each) for each in caplog.records if each.getMessage() == name]


class Rotating:
    """A sidecar whose reloader is asked by hand, or watches."""

    def __init__(self, flow: Flow, config: Path) -> None:
        self.flow = flow
        self.reloader = Reloader(config, flow.server, {})

    async def key(self, **fields: str) -> str:
        """The key that a call is made with; `fields` are headers, with `_` for `-`."""
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        answer = await self.flow.call(request("POST", CHAT, chat_body(), headers))
        assert answer.status == int(headers.get("x-mock-status", 200))
        return self.last_key

    @property
    def last_key(self) -> str:
        header = self.flow.provider.books.requests[-1].header("authorization") or ""
        return header.removeprefix("Bearer ")

    def reloads(self) -> dict[str, float]:
        """How many there were, by result."""
        for family in self.flow.server.metrics.snapshot():
            if family["name"] == "llm_sidecar_reloads":
                return {labels[0]: value for labels, value in family["samples"]}
        return {}

    def has_reloaded(self, times: int) -> bool:
        return self.reloads()["ok"] == times


@pytest.fixture
def rotating(start: Start, tmp_path: Path) -> Callable[..., Any]:
    async def start_one(sign: str, more: str = "") -> Rotating:
        flow = await start(f"upstreams: {{up-openai: {{sign: {sign}{more}}}}}")
        return Rotating(flow, tmp_path / "config.yaml")

    return start_one


ONE = "{scheme: bearer, key: file:mounted/key}"


# One key


async def test_a_call_after_the_reload_is_signed_with_the_new_key(
    mounted: Mounted, rotating: Callable[..., Any]
) -> None:
    mounted.publish(key="old-secret-key")
    sidecar = await rotating(ONE)
    snapshot, address = sidecar.flow.server.snapshot, sidecar.flow.server.address
    assert await sidecar.key() == "old-secret-key"
    mounted.publish(key="new-secret-key\n")
    assert await sidecar.key() == "old-secret-key"  # nobody has looked yet
    assert await sidecar.reloader.reload_if_changed()
    assert await sidecar.key() == "new-secret-key"
    assert sidecar.flow.server.snapshot is not snapshot
    assert sidecar.flow.server.address == address
    assert sidecar.reloads() == {"ok": 1, "failed": 0}


async def test_every_swap_of_the_mounted_link_is_noticed_without_a_signal(
    mounted: Mounted, rotating: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "WATCH_AFTER_S", 0.0)
    monkeypatch.setattr(reload, "GATHER_MS", 50)
    monkeypatch.setattr(reload, "STEP_MS", 10)
    mounted.publish(key="secret-key-1")
    sidecar = await rotating(ONE)
    sidecar.reloader.start()
    try:
        for version in (2, 3):
            mounted.publish(key=f"secret-key-{version}")
            await until(partial(sidecar.has_reloaded, version - 1))
            assert await sidecar.key() == f"secret-key-{version}"
    finally:
        await sidecar.reloader.stop()


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


async def key_at(connection: RawConnection) -> str:
    head = (await connection.read_request()).decode()
    (line,) = [each for each in head.split("\r\n") if each.startswith("authorization: ")]
    return line.removeprefix("authorization: Bearer ")


async def test_a_call_in_flight_ends_on_the_key_it_began_with(
    mounted: Mounted, rotating: Callable[..., Any], raw: RawUpstream
) -> None:
    mounted.publish(key="old-secret-key")
    sidecar = await rotating(ONE, f", base_url: '{raw.base_url}/v1'")
    flow = sidecar.flow
    waiting, streaming = await flow.connect(), await flow.connect()
    waiting.send(request("POST", CHAT, chat_body()))
    first = await raw.accept()
    streaming.send(request("POST", CHAT, chat_body()))
    second = await raw.accept()
    assert [await key_at(first), await key_at(second)] == ["old-secret-key"] * 2
    second.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
    await streaming.until(b"half")
    old = flow.server.snapshot
    mounted.publish(key="new-secret-key")
    assert await sidecar.reloader.reload_if_changed()
    third = asyncio.ensure_future(flow.call(request("POST", CHAT, chat_body())))
    connection = await raw.accept()
    assert await key_at(connection) == "new-secret-key"
    connection.write(OK)
    assert (await third).body == b"ok"
    assert old.open_calls == 2
    first.write(OK)
    assert (await waiting.answer()).body == b"ok"
    second.write(b" done")
    assert await streaming.until(b" done") == b" done"
    await until(lambda: old.open_calls == 0)
    assert raw.accepted == 3


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        (" new-secret-key", "has white space around the secret"),
        ("new-secret-key\n\n", "has white space around the secret"),
        ("short", "has less than 8 characters"),
        ("new-secret\nx-injected: 1", "has a line end"),
    ],
)
async def test_a_new_key_that_cannot_be_one_keeps_the_old_one_live_and_is_reported_once(
    mounted: Mounted,
    rotating: Callable[..., Any],
    events: Callable[[str], list[Any]],
    content: str,
    why: str,
) -> None:
    mounted.publish(key="old-secret-key")
    sidecar = await rotating(ONE)
    sidecar.flow.may_log_errors = True
    mounted.publish(key=content)
    for _ in range(3):
        assert not await sidecar.reloader.reload_if_changed()
        assert await sidecar.key() == "old-secret-key"
    (failed,) = events("reload_failed")
    (problem,) = failed["problems"]
    assert ": upstreams.up-openai.sign.key: " in problem
    assert why in problem
    assert "secret-key" not in f"{failed}"
    assert sidecar.reloads() == {"ok": 0, "failed": 1}
    mounted.publish(key="good-secret-key")
    assert await sidecar.reloader.reload_if_changed()
    assert await sidecar.key() == "good-secret-key"


async def test_a_key_that_has_gone_keeps_the_old_one_live_until_it_is_back(
    mounted: Mounted, rotating: Callable[..., Any], events: Callable[[str], list[Any]]
) -> None:
    mounted.publish(key="old-secret-key")
    sidecar = await rotating(ONE)
    sidecar.flow.may_log_errors = True
    (mounted.folder / "key").unlink()
    assert not await sidecar.reloader.reload_if_changed()
    assert await sidecar.key() == "old-secret-key"
    (failed,) = events("reload_failed")
    assert "there is no file " in failed["problems"][0]
    mounted.publish(key="new-secret-key")
    assert await sidecar.reloader.reload_if_changed()
    assert await sidecar.key() == "new-secret-key"


async def test_neither_the_old_nor_the_new_key_is_told_to_anybody(
    mounted: Mounted,
    rotating: Callable[..., Any],
    canaries: Canaries,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    mounted.publish(key=canaries.make("old"))
    sidecar = await rotating(ONE)
    assert await sidecar.key() == canaries["old"]
    mounted.publish(key=canaries.make("new"))
    assert await sidecar.reloader.reload_if_changed()
    assert await sidecar.key(x_mock_status="401") == canaries["new"]
    sinks = {
        "log": repr([vars(each) for each in caplog.records]),
        "access log": json.dumps(await sidecar.flow.logged(2)),
        "metrics": repr(sidecar.flow.server.metrics.snapshot()),
        "configuration": repr(await sidecar.flow.server.effective_config()),
        "resources": repr(list(sidecar.flow.server._resources._made)),
    }
    assert canaries.leaks(sinks) == []


# Several keys


POOL = "{scheme: bearer, pool: [file:mounted/a, file:mounted/b, file:mounted/c]}"


async def test_keys_of_a_pool_that_stay_keep_what_the_provider_thinks_of_them(
    mounted: Mounted, rotating: Callable[..., Any], events: Callable[[str], list[Any]]
) -> None:
    mounted.publish(a="secret-key-a", b="secret-key-b", c="secret-key-c")
    sidecar = await rotating(POOL)
    assert await sidecar.key(x_mock_status="401") == "secret-key-a"  # set aside for ten minutes
    assert await sidecar.key(x_mock_status="429", x_mock_retry_after="60") == "secret-key-b"
    assert [await sidecar.key() for _ in range(2)] == ["secret-key-c"] * 2
    mounted.publish(c="secret-key-new")
    assert await sidecar.reloader.reload_if_changed()
    assert [await sidecar.key() for _ in range(3)] == ["secret-key-new"] * 3
    (refused,) = events("key_refused")
    assert refused["key"] == "file:mounted/a"


async def test_a_key_that_replaces_a_refused_one_is_used_at_once(
    mounted: Mounted, rotating: Callable[..., Any]
) -> None:
    mounted.publish(a="secret-key-a", b="secret-key-b", c="secret-key-c")
    sidecar = await rotating(POOL)
    assert await sidecar.key(x_mock_status="403") == "secret-key-a"
    mounted.publish(a="secret-key-new")
    assert await sidecar.reloader.reload_if_changed()
    used = {await sidecar.key() for _ in range(3)}
    assert used == {"secret-key-new", "secret-key-b", "secret-key-c"}


async def test_keys_that_change_places_keep_their_own_state(
    mounted: Mounted, rotating: Callable[..., Any]
) -> None:
    mounted.publish(a="secret-key-a", b="secret-key-b", c="secret-key-c")
    sidecar = await rotating(POOL)
    assert await sidecar.key(x_mock_status="401") == "secret-key-a"
    mounted.publish(a="secret-key-b", b="secret-key-a")
    assert await sidecar.reloader.reload_if_changed()
    assert {await sidecar.key() for _ in range(4)} == {"secret-key-b", "secret-key-c"}


async def test_a_pool_in_which_a_key_comes_twice_keeps_the_old_ones_live(
    mounted: Mounted, rotating: Callable[..., Any], events: Callable[[str], list[Any]]
) -> None:
    mounted.publish(a="secret-key-a", b="secret-key-b", c="secret-key-c")
    sidecar = await rotating(POOL)
    sidecar.flow.may_log_errors = True
    mounted.publish(c="secret-key-a")
    assert not await sidecar.reloader.reload_if_changed()
    assert [await sidecar.key() for _ in range(3)] == [f"secret-key-{each}" for each in "abc"]
    (failed,) = events("reload_failed")
    assert "entries 1 and 3 are the same key" in failed["problems"][0]
    assert "secret-key" not in f"{failed}"


async def test_state_of_keys_that_have_gone_is_let_go_of(
    mounted: Mounted, rotating: Callable[..., Any]
) -> None:
    mounted.publish(a="secret-key-a", b="secret-key-b", c="secret-key-c")
    sidecar = await rotating(POOL)
    resources = sidecar.flow.server._resources
    before = len(resources)
    for version in range(3):
        mounted.publish(c=f"secret-key-{version}")
        assert await sidecar.reloader.reload_if_changed()
        await until(lambda: len(resources) == before)


# What keys were turned into


async def test_a_token_of_the_old_credentials_is_not_used_with_the_new_ones(
    mounted: Mounted, rotating: Callable[..., Any], raw: RawUpstream
) -> None:
    async def give(token: str) -> bytes:
        """Answer the next exchange; what was asked."""
        connection = await raw.accept()
        asked = await connection.read_request()
        body = b'{"access_token": "%b", "expires_in": 86400}' % token.encode()
        head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        connection.write(head + body)
        return asked

    mounted.publish(id="application-1", secret="old-secret-key")
    secrets = "client_id: file:mounted/id, client_secret: file:mounted/secret"
    sidecar = await rotating(f"{{scheme: baidu-oauth, token_url: '{raw.base_url}', {secrets}}}")
    for secret, token in (("old-secret-key", "token-1"), ("new-secret-key", "token-2")):
        mounted.publish(secret=secret)
        await sidecar.reloader.reload_if_changed()
        call = asyncio.ensure_future(sidecar.key())
        assert f"client_secret={secret}".encode() in await give(token)
        await call
        await sidecar.key()  # by the same token
        received = list(sidecar.flow.provider.books.requests)[-2:]
        assert [each.query for each in received] == [f"access_token={token}"] * 2
    assert raw.accepted == 2


async def test_a_new_password_of_a_proxy_is_used_for_new_connections(
    mounted: Mounted, rotating: Callable[..., Any], raw: RawUpstream
) -> None:
    async with ConnectProxy() as proxy:
        url = f"http://user:{{}}@{proxy.address}"
        mounted.publish(proxy=url.format("old-password"), key="a-secret-key")
        more = f", base_url: '{raw.base_url}/v1', proxy: file:mounted/proxy"
        sidecar = await rotating(ONE, more)
        for password in ("old-password", "new-password"):
            mounted.publish(proxy=url.format(password))
            await sidecar.reloader.reload_if_changed()
            call = asyncio.ensure_future(sidecar.flow.call(request("POST", CHAT, chat_body())))
            connection = await raw.accept()
            assert await key_at(connection) == "a-secret-key"
            connection.write(OK)
            assert (await call).status == 200
            credentials = b64encode(f"user:{password}".encode())
            assert b"\r\nproxy-authorization: Basic %b\r\n" % credentials in proxy.heads[-1]
        assert len(proxy.heads) == 2
        await sidecar.flow.server.stop()
