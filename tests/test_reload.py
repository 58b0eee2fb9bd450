"""Hot reload: what changes, what goes on, and what a mistake does (nothing)."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from sidecar import reload
from sidecar.api import Call, CallFilter, CallNext, Reply
from sidecar.config import bind, load_config
from sidecar.reload import Reloader, digest, needs_restart
from sidecar.server import Server
from tests.support.process import HeldUpstream, becomes, serving, write_config

QUIET = "log: {access: 'off'}\n"
MODELS = "models: {gpt: [openai], claude: [anthropic]}"
OTHER_MODELS = "models: {other: [openai], claude: [anthropic]}"


class Live:
    """A server in this process, and the reloader that looks at its files."""

    def __init__(self, server: Server, reloader: Reloader, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.reloader = reloader
        self.session = session

    async def status(self, model: str = "gpt", key: str = "any") -> int:
        answer = await self.call(model, key=key)
        await answer.read()
        return answer.status

    async def call(
        self, model: str = "gpt", *, stream: bool = False, key: str = "any"
    ) -> aiohttp.ClientResponse:
        return await self.session.post(
            f"http://{self.server.address}/v1/chat/completions",
            json={"model": model, "stream": stream, "messages": [{"role": "user", "content": "x"}]},
            headers={"authorization": f"Bearer {key}"},
        )

    def reloads(self, result: str) -> float:
        (family,) = [
            each for each in self.server.metrics.snapshot() if each["name"] == "llm_sidecar_reloads"
        ]
        return {labels[0]: value for labels, value in family["samples"]}[result]  # type: ignore[no-any-return]


@asynccontextmanager
async def live(config: Path) -> AsyncIterator[Live]:
    server = Server(bind(load_config(config)))
    await server.start()
    reloader = Reloader(config, server, {})
    try:
        async with aiohttp.ClientSession() as session:
            yield Live(server, reloader, session)
    finally:
        await server.stop()


@pytest.fixture
async def upstream() -> AsyncIterator[HeldUpstream]:
    async with HeldUpstream() as upstream:
        yield upstream


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sidecar.reload")
    return caplog


def told(events: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was said of reloads; filters may say something of calls meanwhile."""
    return [record for record in events.records if record.name == "sidecar.reload"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch begins at once and gathers for a moment only."""
    monkeypatch.setattr(reload, "WATCH_AFTER_S", 0.0)
    monkeypatch.setattr(reload, "GATHER_MS", 100)
    monkeypatch.setattr(reload, "STEP_MS", 20)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# What becomes live


async def test_a_changed_model_is_live_for_new_calls_while_a_running_stream_goes_on(
    tmp_path: Path, upstream: HeldUpstream
) -> None:
    config = write_config(tmp_path, QUIET, upstream=upstream.address)
    async with live(config) as sidecar:
        stream = await sidecar.call("gpt", stream=True)
        assert await stream.content.readuntil(b"\n\n") == HeldUpstream.FIRST
        change(config, MODELS, OTHER_MODELS)
        assert await sidecar.reloader.reload_if_changed()
        assert await sidecar.status("other") == 200
        assert await sidecar.status("gpt") == 404
        upstream.release()
        assert await stream.read() == HeldUpstream.REST
        assert sidecar.reloads("ok") == 1


async def test_files_that_did_not_change_are_not_loaded_again(tmp_path: Path) -> None:
    config = write_config(tmp_path, QUIET)
    async with live(config) as sidecar:
        snapshot = sidecar.server.snapshot
        config.write_text(config.read_text())
        (tmp_path / "unrelated.txt").write_text("noise")
        assert not await sidecar.reloader.reload_if_changed()
        assert sidecar.server.snapshot is snapshot


async def test_a_team_file_that_comes_or_goes_is_live(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"key_{name}").write_text(f"secret-{name}")
    (tmp_path / "teams").mkdir()
    team_a, team_b = tmp_path / "teams/a.yaml", tmp_path / "teams/b.yaml"
    team_a.write_text("team: a\nkeys: [file:../key_a]\n")
    config = write_config(tmp_path, QUIET + "teams: teams/*.yaml\n")
    async with live(config) as sidecar:
        assert await sidecar.status(key="secret-b") == 401
        team_b.write_text("team: b\nkeys: [file:../key_b]\n")
        assert await sidecar.reloader.reload_if_changed()
        assert await sidecar.status(key="secret-b") == 200
        team_a.unlink()
        assert await sidecar.reloader.reload_if_changed()
        assert await sidecar.status(key="secret-a") == 401
        assert await sidecar.status(key="secret-b") == 200


async def test_a_changed_secret_file_is_live(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("old-secret")
    (tmp_path / "a.yaml").write_text("team: a\nkeys: [file:key]\n")
    async with live(write_config(tmp_path, QUIET + "teams: a.yaml\n")) as sidecar:
        secret.write_text("new-secret")
        assert await sidecar.reloader.reload_if_changed()
        assert await sidecar.status(key="old-secret") == 401
        assert await sidecar.status(key="new-secret") == 200


# What stays


async def test_connections_survive_a_reload_that_does_not_concern_them(
    tmp_path: Path, upstream: HeldUpstream
) -> None:
    config = write_config(tmp_path, QUIET, upstream=upstream.address)
    async with live(config) as sidecar:
        assert await sidecar.status() == 200
        pool = sidecar.server.snapshot.upstreams["openai"].pool
        change(config, MODELS, OTHER_MODELS)
        assert await sidecar.reloader.reload()
        assert sidecar.server.snapshot.upstreams["openai"].pool is pool
        assert await sidecar.status("other") == 200
        assert upstream.connections == 1


async def test_connections_to_an_upstream_that_changed_close_once_their_last_call_has_ended(
    tmp_path: Path, upstream: HeldUpstream
) -> None:
    config = write_config(tmp_path, QUIET, upstream=upstream.address)
    async with live(config) as sidecar:
        stream = await sidecar.call("gpt", stream=True)
        await stream.content.readuntil(b"\n\n")
        assert upstream.open_connections == 1
        change(config, "dialect: openai,", "dialect: openai, pool: {max_connections: 7},")
        assert await sidecar.reloader.reload()
        assert upstream.open_connections == 1
        upstream.release()
        assert await stream.read() == HeldUpstream.REST

        async def is_closed() -> bool:
            return upstream.open_connections == 0

        await becomes(is_closed)


class Counting(CallFilter):
    """Keeps the models that were asked for in a resource, and counts its stops."""

    seen: list[list[str]] = []
    stopped = 0

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        models = self.kit.resources.get("counting", list[str])
        models.append(call.model or "")
        self.seen.append(models)
        return await call_next(call)

    async def stop(self) -> None:
        type(self).stopped += 1


async def test_state_of_a_filter_survives_and_the_old_filter_stops_when_its_calls_have_ended(
    tmp_path: Path, upstream: HeldUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counting, "stopped", 0)
    monkeypatch.setattr(Counting, "seen", [])
    chain = f"chains: {{default: {{call: ['{__name__}:Counting']}}}}\n"
    config = write_config(tmp_path, QUIET + chain, upstream=upstream.address)
    async with live(config) as sidecar:
        stream = await sidecar.call("gpt", stream=True)
        change(config, MODELS, OTHER_MODELS)
        assert await sidecar.reloader.reload()
        assert await sidecar.status("other") == 200
        assert Counting.seen[0] is Counting.seen[1]
        assert Counting.seen[0] == ["gpt", "other"]
        assert Counting.stopped == 0
        upstream.release()
        await stream.read()

        async def has_stopped() -> bool:
            return Counting.stopped == 1

        await becomes(has_stopped)


# What a mistake does


async def test_a_broken_file_changes_nothing_and_is_reported_once_with_its_place(
    tmp_path: Path, events: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path, QUIET)
    good = config.read_text()
    async with live(config) as sidecar:
        snapshot = sidecar.server.snapshot
        change(config, MODELS, "models: {gpt: [opanai]}")
        assert not await sidecar.reloader.reload_if_changed()
        assert not await sidecar.reloader.reload_if_changed()  # looked at, and not told again
        assert sidecar.server.snapshot is snapshot
        assert await sidecar.status() == 200
        assert (sidecar.reloads("failed"), sidecar.reloads("ok")) == (1, 0)
        (record,) = told(events)
        assert record.getMessage() == "reload_failed"
        (problem,) = vars(record)["problems"]
        assert problem.startswith(f"{config}:6:")

        config.write_text(good.replace(MODELS, OTHER_MODELS))
        assert await sidecar.reloader.reload_if_changed()
        assert await sidecar.status("other") == 200


async def test_a_filter_that_does_not_start_keeps_the_running_configuration(
    tmp_path: Path, events: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: CallFilter) -> None:
        raise ValueError("no flux")

    monkeypatch.setattr(Counting, "start", fail)
    config = write_config(tmp_path, QUIET)
    async with live(config) as sidecar:
        assert await sidecar.status() == 200  # some are made by the first call
        resources = len(sidecar.server._resources)
        config.write_text(
            config.read_text() + f"chains: {{default: {{call: ['{__name__}:Counting']}}}}\n"
        )
        assert not await sidecar.reloader.reload()
        assert await sidecar.status() == 200
        assert sidecar.reloads("failed") == 1
        assert len(sidecar.server._resources) == resources
        (record,) = told(events)
        assert record.exc_info is not None


async def test_nothing_is_reloaded_while_draining(tmp_path: Path) -> None:
    config = write_config(tmp_path, QUIET)
    async with live(config) as sidecar:
        change(config, MODELS, OTHER_MODELS)
        await sidecar.server.drain()
        assert not await sidecar.reloader.reload()


async def test_a_setting_that_needs_a_restart_is_named(
    tmp_path: Path, events: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path, QUIET)
    async with live(config) as sidecar:
        change(config, "listen: 127.0.0.1:0", "listen: 127.0.0.1:1\nhttp: {keepalive_s: 5.0}")
        assert await sidecar.reloader.reload()
        assert await sidecar.status() == 200  # still where it was
        (record,) = told(events)
        assert record.getMessage() == "reloaded"
        assert vars(record)["needs_restart"] == ["listen", "http.keepalive_s"]


def test_a_setting_that_is_live_needs_no_restart(tmp_path: Path) -> None:
    before = load_config(write_config(tmp_path)).config
    after = load_config(write_config(tmp_path, "drain_s: 3.5\nhttp: {max_body_bytes: 10}\n")).config
    assert needs_restart(before, after) == []


async def test_drain_s_is_taken_from_the_live_configuration(
    tmp_path: Path, upstream: HeldUpstream
) -> None:
    config = write_config(tmp_path, QUIET + "drain_s: 1000\n", upstream=upstream.address)
    async with live(config) as sidecar:
        stream = await sidecar.call(stream=True)
        change(config, "drain_s: 1000", "drain_s: 0")
        assert await sidecar.reloader.reload()
        assert await sidecar.server.drain() == 3
        stream.close()


# How a change is noticed


async def test_a_mounted_configmap_is_seen_whenever_its_link_is_swapped(
    tmp_path: Path, quick: None
) -> None:
    def publish(version: str, text: str) -> None:
        folder = tmp_path / version
        folder.mkdir()
        (folder / "config.yaml").write_text(text)
        (tmp_path / "..data_tmp").symlink_to(version)
        os.rename(tmp_path / "..data_tmp", tmp_path / "..data")

    text = write_config(tmp_path, QUIET).read_text()
    config = tmp_path / "config.yaml"
    config.unlink()
    publish("..1", text)
    config.symlink_to("..data/config.yaml")
    async with live(config) as sidecar:
        sidecar.reloader.start()
        try:
            for version, model in (("..2", "second"), ("..3", "third")):
                publish(version, text.replace("gpt: [openai]", f"{model}: [openai]"))

                async def is_live(model: str = model) -> bool:
                    return await sidecar.status(model) == 200

                await becomes(is_live)
            assert sidecar.reloads("ok") == 2
        finally:
            await sidecar.reloader.stop()


async def test_new_team_files_in_another_folder_are_noticed(tmp_path: Path, quick: None) -> None:
    def write_team(name: str) -> None:
        (tmp_path / f"key_{name}").write_text(f"secret-{name}")
        (tmp_path / f"teams/{name}.yaml").write_text(f"team: {name}\nkeys: [file:../key_{name}]\n")

    (tmp_path / "teams").mkdir()
    write_team("a")
    async with live(write_config(tmp_path, QUIET + "teams: teams/*.yaml\n")) as sidecar:
        sidecar.reloader.start()
        try:
            for name in "bc":  # the first may be seen by the look at the start, not the second
                write_team(name)

                async def is_live(key: str = f"secret-{name}") -> bool:
                    return await sidecar.status(key=key) == 200

                await becomes(is_live)
        finally:
            await sidecar.reloader.stop()


async def test_a_change_that_nobody_reports_is_seen_at_the_next_look(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "LOOK_AGAIN_S", 0.1)
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").mkdir()
    real = write_config(tmp_path / "real", QUIET)
    config = tmp_path / "linked/config.yaml"
    config.symlink_to(real)  # its folder hears nothing of what happens to the real file
    async with live(config) as sidecar:
        sidecar.reloader.start()
        try:
            assert await sidecar.status() == 200
            change(real, MODELS, OTHER_MODELS)

            async def is_live() -> bool:
                return await sidecar.status("other") == 200

            await becomes(is_live)
        finally:
            await sidecar.reloader.stop()


async def test_a_watch_that_cannot_begin_is_logged_and_files_are_looked_at_all_the_same(
    tmp_path: Path,
    quick: None,
    events: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reload, "LOOK_AGAIN_S", 0.05)
    config = write_config(tmp_path, QUIET)
    async with live(config) as sidecar:
        monkeypatch.setattr(sidecar.reloader, "_folders", lambda: [str(tmp_path / "gone")])
        sidecar.reloader.start()
        try:
            change(config, MODELS, OTHER_MODELS)

            async def is_live() -> bool:
                return await sidecar.status("other") == 200

            await becomes(is_live)
        finally:
            await sidecar.reloader.stop()
    assert "watch_failed" in {record.getMessage() for record in events.records}


async def test_sighup_reloads_a_process_and_reports_a_mistake_each_time(tmp_path: Path) -> None:
    config = write_config(tmp_path, QUIET)
    good = config.read_text()
    async with serving(config) as sidecar, aiohttp.ClientSession() as session:
        change(config, MODELS, "models: {gpt: [opanai]}")
        for count in (1, 2):
            sidecar.tell(signal.SIGHUP)
            failed = await sidecar.event("reload_failed", count)
            assert failed["problems"][0].startswith(f"{config}:6:")
        config.write_text(good.replace(MODELS, OTHER_MODELS))
        sidecar.tell(signal.SIGHUP)
        await sidecar.event("reloaded")
        async with session.get(f"{sidecar.admin_url}/config") as answer:
            assert "other" in (await answer.json())["config"]["models"]
        assert await sidecar.end() == 0
        assert not sidecar.errors


def test_a_digest_tells_contents_names_and_absence_apart(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    missing = digest([a, b])
    b.write_text("1")
    both = digest([b, a])
    assert both == digest([a, b, a])
    a.write_text("2")
    assert len({missing, both, digest([a, b]), digest([a])}) == 4
