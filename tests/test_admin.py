"""The admin port: health, figures, the effective configuration."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from sidecar import admin as admin_module
from sidecar.admin import MAX_COMMAND_BYTES, Admin, NoPanel
from sidecar.config import bind, load_config
from sidecar.listen import remove_stale_socket, why_not
from sidecar.metrics import FamilySnapshot, Metrics
from sidecar.server import Server
from tests.support.process import write_config


class FakePanels:
    """Two processes that show a circuit, one of which shows a queue, too."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, dict[str, Any]]] = []

    async def show(self) -> list[dict[str, Any]]:
        return [{"circuits": ["closed"], "queue": {"waiting": 0}}, {"circuits": ["open"]}]

    async def act(self, name: str, command: dict[str, Any]) -> list[Any]:
        if name != "circuits":
            raise NoPanel
        if command.get("state") not in ("open", "closed"):
            raise ValueError('"state" must be "open" or "closed"')
        self.commands.append((name, command))
        return [command["state"], command["state"]]


class Served:
    """What an admin port is given to tell."""

    def __init__(self) -> None:
        self.state = "ready"
        self.metrics = Metrics()
        self.panels = FakePanels()
        self.admin = Admin(
            state=self.get_state,
            metrics=self.get_metrics,
            config=self.get_config,
            panels=self.panels,
        )

    async def get_state(self) -> str:
        return self.state

    async def get_metrics(self) -> list[FamilySnapshot]:
        return self.metrics.snapshot()

    async def get_config(self) -> dict[str, Any]:
        return {"config": {"path": Path("/etc")}}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    await served.admin.start("127.0.0.1:0")
    yield served
    await served.admin.stop()


@pytest.fixture
async def session(served: Served) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url=f"http://{served.admin.address}") as session:
        yield session


@pytest.mark.parametrize(
    ("state", "status"), [("ready", 200), ("starting", 503), ("draining", 503)]
)
async def test_readyz_says_whether_calls_are_served_and_why_not(
    served: Served, session: aiohttp.ClientSession, state: str, status: int
) -> None:
    served.state = state
    async with session.get("/readyz") as answer:
        assert (answer.status, await answer.json()) == (status, {"status": state})
    async with session.get("/livez") as answer:
        assert (answer.status, await answer.json()) == (200, {"status": "alive"})


async def test_metrics_are_prometheus_text_or_openmetrics_as_the_scraper_asks(
    served: Served, session: aiohttp.ClientSession
) -> None:
    served.metrics.counter("calls", "Calls.", ("model",)).child("gpt").inc(3)
    async with session.get("/metrics") as answer:
        assert answer.content_type == "text/plain"
        (family,) = text_string_to_metric_families(await answer.text())
        assert [(each.name, each.value) for each in family.samples] == [("calls_total", 3)]
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    async with session.get("/metrics", headers={"accept": accept}) as answer:
        assert answer.content_type == "application/openmetrics-text"
        (family,) = parse_openmetrics(await answer.text())  # type: ignore[no-untyped-call]
        assert (family.type, family.samples[0].value) == ("counter", 3)


async def test_figures_as_data_are_what_another_process_adds_up(
    served: Served, session: aiohttp.ClientSession
) -> None:
    served.metrics.counter("calls", "Calls.", ("model",)).child("gpt").inc(3)
    async with session.get("/metrics.json") as answer:
        (family,) = await answer.json()
    assert (family["kind"], family["samples"]) == ("counter", [[["gpt"], 3.0]])


async def test_the_loop_turns_while_a_scrape_is_written(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def exposition(snapshot: object, accept: str) -> tuple[bytes, str]:
        begun.set()
        assert may_end.wait(20)
        return b"# EOF\n", "text/plain"

    monkeypatch.setattr(admin_module, "exposition", exposition)
    scrape = asyncio.ensure_future(session.get("/metrics"))
    assert await asyncio.to_thread(begun.wait, 20)
    async with session.get("/livez") as answer:  # answered although the encoder still runs
        assert answer.status == 200
    assert not scrape.done()
    may_end.set()
    async with await scrape as answer:
        assert await answer.read() == b"# EOF\n"


async def test_an_unknown_path_is_404_and_another_method_405(
    session: aiohttp.ClientSession,
) -> None:
    for path in ("/", "/v1/chat/completions", "/metrics/x"):
        async with session.get(path) as answer:
            assert answer.status == 404
    async with session.post("/config") as answer:
        assert answer.status == 405


async def test_answers_are_not_cached(session: aiohttp.ClientSession) -> None:
    for path in ("/livez", "/readyz", "/config"):
        async with session.get(path) as answer:
            assert answer.headers["cache-control"] == "no-store"


# State


async def test_state_shows_what_filters_show_in_each_process(
    session: aiohttp.ClientSession,
) -> None:
    async with session.get("/state") as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert answer.headers["cache-control"] == "no-store"
        assert await answer.json() == {
            "workers": [{"circuits": ["closed"], "queue": {"waiting": 0}}, {"circuits": ["open"]}]
        }
    async with session.get("/state/circuits") as answer:
        assert await answer.json() == {"workers": [["closed"], ["open"]]}
    async with session.get("/state/queue") as answer:
        assert await answer.json() == {"workers": [{"waiting": 0}]}


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_state_that_nobody_shows_is_404_and_says_where_to_look(
    served: Served, session: aiohttp.ClientSession, method: str
) -> None:
    command = {"state": "open"} if method == "POST" else None
    async with session.request(method, "/state/circuit%2Fs", json=command) as answer:
        assert answer.status == 404
        assert await answer.json() == {
            "error": 'no filter of this configuration shows "circuit/s": '
            "GET /state lists what there is"
        }
    async with session.get("/state/" + "x" * 5_000) as answer:
        assert answer.status == 404
        assert len(await answer.text()) < 300
    assert served.panels.commands == []


async def test_command_is_done_and_every_processs_answer_shown(
    served: Served, session: aiohttp.ClientSession
) -> None:
    command = {"state": "open", "for_s": 1.5, "model": "é"}
    async with session.post("/state/circuits", json=command) as answer:
        assert (answer.status, await answer.json()) == (200, {"workers": ["open", "open"]})
    headers = {"content-type": "application/json; charset=utf-8"}
    body = b'{"state": "closed"}'
    async with session.post("/state/circuits", data=body, headers=headers) as answer:
        assert answer.status == 200
    assert served.panels.commands == [("circuits", command), ("circuits", {"state": "closed"})]


async def test_wrong_command_is_400_with_what_the_filter_says(
    session: aiohttp.ClientSession,
) -> None:
    async with session.post("/state/circuits", json={"state": "ajar"}) as answer:
        assert answer.status == 400
        assert await answer.json() == {"error": '"state" must be "open" or "closed"'}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"open"', b"1", b"\xff", b"{}x"])
async def test_command_that_is_no_json_object_is_400(
    served: Served, session: aiohttp.ClientSession, body: bytes
) -> None:
    headers = {"content-type": "application/json"}
    async with session.post("/state/circuits", data=body, headers=headers) as answer:
        assert answer.status == 400
        assert await answer.json() == {"error": "the command must be a JSON object"}
    assert served.panels.commands == []


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},  # what a page may send anywhere without being asked
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json", "origin": "http://127.0.0.1:9090"},
        {"content-type": "application/json", "origin": "null"},
    ],
)
async def test_command_that_a_web_page_may_have_sent_is_refused(
    served: Served, session: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    body = b'{"state": "open"}'
    async with session.post("/state/circuits", data=body, headers=headers) as answer:
        assert answer.status == 415
        assert "application/json" in (await answer.json())["error"]
        assert "access-control-allow-origin" not in answer.headers
    asks = {"origin": "http://page", "access-control-request-method": "POST"}
    async with session.options("/state/circuits", headers=asks) as answer:
        assert answer.status == 405
        assert "access-control-allow-origin" not in answer.headers
    assert served.panels.commands == []


async def test_command_that_is_too_large_is_413(
    served: Served, session: aiohttp.ClientSession
) -> None:
    for size, status in ((MAX_COMMAND_BYTES, 200), (MAX_COMMAND_BYTES + 1, 413)):
        frame = len('{"state": "open", "x": ""}')
        body = ('{"state": "open", "x": "' + "x" * (size - frame) + '"}').encode()
        assert len(body) == size
        headers = {"content-type": "application/json"}
        async with session.post("/state/circuits", data=body, headers=headers) as answer:
            assert answer.status == status
    assert len(served.panels.commands) == 1


SWITCH = """
from sidecar.api import CallFilter


class Panel:
    def __init__(self):
        self.is_on = False

    async def show(self):
        return {"on": self.is_on}

    async def act(self, command):
        if not isinstance(command.get("on"), bool):
            raise ValueError('say {"on": true}')
        self.is_on = command["on"]
        return await self.show()


class Switch(CallFilter):
    def __init__(self, config, kit):
        super().__init__(config, kit)
        self.panel = kit.panel("switch", Panel)

    def handle(self, call, call_next):
        return call_next(call)
"""


async def test_panel_of_a_filter_is_shown_obeys_survives_a_reload_and_leaves_with_its_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "switching.py").write_text(SWITCH)
    monkeypatch.delitem(sys.modules, "switching", raising=False)
    without = "log: {access: 'off'}\nchains: {default: {call: [], attempt: []}}\n"
    config = write_config(tmp_path, without.replace("[]", "['switching:Switch']", 1))
    server = Server(bind(load_config(config)))
    await server.start()
    try:
        async with aiohttp.ClientSession(f"http://{server.admin_address}") as session:

            async def shown() -> Any:
                async with session.get("/state") as answer:
                    assert answer.status == 200
                    return (await answer.json())["workers"]

            assert await shown() == [{"switch": {"on": False}}]
            with caplog.at_level("INFO", "sidecar.server"):
                async with session.post("/state/switch", json={"on": True}) as answer:
                    assert (answer.status, await answer.json()) == (
                        200,
                        {"workers": [{"on": True}]},
                    )
                async with session.post("/state/switch", json={"on": 1}) as answer:
                    assert answer.status == 400
            (record,) = [each for each in caplog.records if each.message == "state_changed"]
            assert (vars(record)["panel"], vars(record)["command"]) == ("switch", {"on": True})

            await server.reload(bind(load_config(config)))
            assert await shown() == [{"switch": {"on": True}}]
            await server.reload(bind(load_config(write_config(tmp_path, without))))
            assert await shown() == [{}]
            async with session.post("/state/switch", json={"on": True}) as answer:
                assert answer.status == 404
    finally:
        await server.stop()


async def test_config_shows_the_store_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_URL", "redis://user:canary-value@store:6379/1")
    config = write_config(tmp_path, "log: {access: 'off'}\nstore: env:STORE_URL\n")
    server = Server(bind(load_config(config)))
    await server.start()
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{server.admin_address}/config") as answer,
        ):
            shown = await answer.text()
    finally:
        await server.stop()
    assert "canary-value" not in shown
    assert '"url": "env:STORE_URL"' in shown


async def test_config_shows_references_and_no_secret_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_KEY", "canary-value-1")
    (tmp_path / "team_key").write_text("canary-value-2")
    (tmp_path / "a.yaml").write_text("team: a\nkeys: [file:team_key]\n")
    config = write_config(tmp_path, "teams: a.yaml\nlog: {access: 'off'}\n")
    text = config.read_text().replace(
        "dialect: openai,", "dialect: openai, sign: {scheme: bearer, key: env:CANARY_KEY},", 1
    )
    config.write_text(text)
    server = Server(bind(load_config(config)))
    await server.start()
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{server.admin_address}/config") as answer,
        ):
            shown = await answer.text()
    finally:
        await server.stop()
    assert "canary-value" not in shown
    assert "env:CANARY_KEY" in shown
    assert "file:" in shown


async def test_admin_none_opens_no_port(tmp_path: Path) -> None:
    config = write_config(tmp_path, "log: {access: 'off'}\n")
    config.write_text(config.read_text().replace("admin: 127.0.0.1:0", "admin: null"))
    server = Server(bind(load_config(config)))
    await server.start()
    assert server.state == "ready"
    assert server.admin_address is None
    await server.stop()


async def test_a_unix_socket_is_served_and_its_file_removed_at_the_end(tmp_path: Path) -> None:
    path, served = tmp_path / "admin.sock", Served()
    await served.admin.start(f"unix:{path}")
    assert served.admin.address == f"unix:{path}"
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
        session.get("http://admin/livez") as answer,
    ):
        assert answer.status == 200
    await served.admin.stop()
    await served.admin.stop()  # idempotent
    assert not path.exists()


async def test_a_file_that_is_no_socket_is_kept(tmp_path: Path) -> None:
    path, served = tmp_path / "precious", Served()
    path.write_text("data")
    with pytest.raises(OSError, match="is no socket"):
        await served.admin.start(f"unix:{path}")
    await served.admin.stop()
    assert path.read_text() == "data"


async def test_a_port_in_use_raises_os_error() -> None:
    served = Served()
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="address") as caught,
    ):
        await served.admin.start(f"127.0.0.1:{taken.getsockname()[1]}")
    assert why_not(caught.value) == "Address already in use"
    await served.admin.stop()


def test_a_socket_file_nobody_listens_on_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    remove_stale_socket(path)  # nothing there: nothing to do
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(OSError, match="in use by another process"):
            remove_stale_socket(path)
    assert path.is_socket()
    remove_stale_socket(path)
    assert not path.exists()


def test_reasons_are_short() -> None:
    assert why_not(FileNotFoundError(2, "could not bind: no such file")) == (
        "No such file or directory"
    )
    assert why_not(socket.gaierror(-2, "Name or service not known")) == "Name or service not known"
    assert why_not(OSError("/x is in use by another process")) == "/x is in use by another process"


@pytest.mark.parametrize(
    ("peer", "is_near"),
    [
        (("127.0.0.1", 40000), True),
        (("::1", 40000, 0, 0), True),
        (("::ffff:127.0.0.1", 40000, 0, 0), True),
        ("", True),  # a unix socket
        (("10.0.0.7", 40000), False),
        (("fe80::1%eth0", 40000, 0, 2), False),
    ],
)
async def test_commands_are_taken_from_this_machine_only(
    served: Served,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    peer: Any,
    is_near: bool,
) -> None:
    def extra_info(self: Any, name: str, default: Any = None) -> Any:
        return peer if name == "peername" else default

    monkeypatch.setattr(
        "sidecar.admin.web.Request.transport",
        SimpleNamespace(get_extra_info=partial(extra_info, 0)),
    )
    answer = await session.post("/state/circuits", json={"force": "open"})
    assert (answer.status != 403) is is_near
    if not is_near:
        assert "this machine" in (await answer.json())["error"]
