"""What a start prints, and several workers on one port."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.admin import NoPanel
from sidecar.config import Bound, Config, bind, load_config
from sidecar.process import Supervisor, Worker, banner, reserve_port
from sidecar.server import NotStarted
from tests.support.process import (
    PATIENCE_S,
    HeldUpstream,
    SidecarProcess,
    becomes,
    finished,
    serving,
    write_config,
)

CALL = {"model": "gpt", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Every request on a connection of its own, so that the system chooses a worker each time."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


# The banner


async def bash(line: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", line),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(PATIENCE_S):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_the_curl_line_it_prints_streams_an_answer(tmp_path: Path) -> None:
    async with serving(write_config(tmp_path)) as sidecar:
        answer = await bash(sidecar.curl)
        assert answer.startswith("data: {")
        assert answer.endswith("data: [DONE]\n\n")
        assert await sidecar.end() == 0
        (line,) = [line for line in sidecar.output if line.startswith("{")]  # one for the call
        logged = json.loads(line)
        assert (logged["event"], logged["model"], logged["status"]) == ("call", "gpt", 200)


async def test_the_curl_line_works_for_a_unix_socket_and_the_other_dialect(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("gpt: [openai], claude", "it's"))
    async with serving(config, "--listen", f"unix:{folder}/llm.sock") as sidecar:
        answer = await bash(sidecar.curl)
        assert answer.startswith("event: message_start\n")
        assert "event: message_stop\n" in answer


def test_the_banner_asks_for_a_team_key_where_teams_have_keys(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("team: a\nkeys: ['sha256:" + "0" * 64 + "']\n")
    config = bind(load_config(write_config(tmp_path, "teams: a.yaml\n"))).config
    assert "Bearer YOUR_TEAM_KEY" in banner(config, "127.0.0.1:1", None)
    assert banner(config, "127.0.0.1:1", None).startswith("sidecar listens on 127.0.0.1:1\n")


# Workers


async def figures(session: aiohttp.ClientSession, sidecar: SidecarProcess) -> dict[str, float]:
    """The sum of each metric over its labels."""
    async with session.get(f"{sidecar.admin_url}/metrics") as answer:
        text = await answer.text()
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


async def is_ready(session: aiohttp.ClientSession, sidecar: SidecarProcess) -> bool:
    async with session.get(f"{sidecar.admin_url}/readyz") as answer:
        return answer.status == 200


async def call(session: aiohttp.ClientSession, sidecar: SidecarProcess, count: int) -> None:
    async def one() -> None:
        async with session.post(f"{sidecar.url}/v1/chat/completions", json=CALL) as answer:
            assert answer.status == 200
            await answer.read()

    await asyncio.gather(*(one() for _ in range(count)))


def workers_of(sidecar: SidecarProcess) -> list[int]:
    """The ids of its child processes."""
    pid = sidecar.process.pid
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def open_connections(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    links = (os.readlink(f"/proc/{pid}/fd/{each}") for each in os.listdir(f"/proc/{pid}/fd"))
    return {link for link in links if link.startswith("socket:")}


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def test_two_workers_share_a_port_add_up_their_figures_and_replace_one_that_died(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    async with serving(write_config(tmp_path), "--workers", "2") as sidecar:
        first, second = workers_of(sidecar)
        await call(session, sidecar, 40)
        totals = await figures(session, sidecar)
        assert totals["llm_api_requests_total"] == 40
        assert totals["llm_api_request_latency_seconds_count"] == 40
        async with session.get(f"{sidecar.admin_url}/config") as answer:
            assert "upstreams" in (await answer.json())["config"]

        os.kill(first, signal.SIGKILL)
        died = await sidecar.event("worker_died")
        assert died["code"] == -signal.SIGKILL
        await call(session, sidecar, 10)  # by the one that is left
        assert (await figures(session, sidecar))["llm_api_requests_total"] == 50
        await becomes(lambda: is_ready(session, sidecar))
        assert len(workers_of(sidecar)) == 2
        assert first not in workers_of(sidecar)
        await call(session, sidecar, 40)
        assert (await figures(session, sidecar))["llm_api_requests_total"] == 90

        assert await sidecar.end() == 0
        assert not sidecar.errors
        assert has_ended(second)


async def test_workers_show_the_file_as_it_is_and_tell_what_needs_a_restart(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    config = write_config(tmp_path, "workers: 2\nlog: {access: 'off'}\n")
    async with serving(config) as sidecar:
        before = sidecar.address

        async def shown() -> tuple[Any, ...]:
            async with session.get(f"{sidecar.admin_url}/config") as answer:
                told = (await answer.json())["config"]
            return told["listen"], told["admin"], told["workers"]

        assert await shown() == ("127.0.0.1:0", "127.0.0.1:0", 2)
        text = config.read_text()
        text = text.replace("listen: 127.0.0.1:0", "listen: 127.0.0.1:1")
        text = text.replace("admin: 127.0.0.1:0", "admin: null").replace("workers: 2", "workers: 3")
        config.write_text(text)
        sidecar.tell(signal.SIGHUP)
        for count in (1, 2):
            reloaded = await sidecar.event("reloaded", count)
            assert reloaded["needs_restart"] == ["listen", "admin", "workers"]
        assert await shown() == ("127.0.0.1:1", None, 3)
        await call(session, sidecar, 4)  # still where it was
        assert sidecar.address == before
        assert await sidecar.end() == 0


async def test_options_hold_for_workers_and_through_their_reloads(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    config = write_config(tmp_path, "workers: 3\nlog: {access: 'off'}\n")
    options = ("--listen", "localhost:0", "--workers", "2")
    async with serving(config, *options) as sidecar:
        text = config.read_text().replace("workers: 3", "workers: 4\ndrain_s: 3.5")
        config.write_text(text.replace("listen: 127.0.0.1:0", "listen: 127.0.0.1:1"))
        sidecar.tell(signal.SIGHUP)
        for count in (1, 2):
            assert "needs_restart" not in await sidecar.event("reloaded", count)
        async with session.get(f"{sidecar.admin_url}/config") as answer:
            told = (await answer.json())["config"]
        assert [told[name] for name in ("listen", "workers", "drain_s")] == ["localhost:0", 2, 3.5]
        assert await sidecar.end() == 0


async def test_calls_over_many_connections_reach_both_workers(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    async with HeldUpstream(hold_head=True) as upstream:
        config = write_config(tmp_path, upstream=upstream.address)
        async with serving(config, "--workers", "2") as sidecar:
            idle = {pid: len(open_connections(pid)) for pid in workers_of(sidecar)}
            calls = asyncio.ensure_future(call(session, sidecar, 30))
            await upstream.has_got(30)
            busy = {pid: len(open_connections(pid)) for pid in workers_of(sidecar)}
            assert all(busy[pid] > idle[pid] for pid in idle)
            sidecar.tell(signal.SIGTERM)  # all of them drain
            await sidecar.event("draining", 2)
            async with session.get(f"{sidecar.admin_url}/readyz") as answer:
                assert (answer.status, await answer.json()) == (503, {"status": "draining"})
            upstream.release()
            await calls
            assert await sidecar.wait() == 0


async def test_workers_end_by_themselves_when_their_parent_is_killed(tmp_path: Path) -> None:
    async with serving(write_config(tmp_path), "--workers", "2") as sidecar:
        workers = workers_of(sidecar)
        sidecar.process.kill()

        async def all_ended() -> bool:
            return all(has_ended(pid) for pid in workers)

        await becomes(all_ended)


async def test_a_second_signal_ends_all_workers_at_once_with_130(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    async with HeldUpstream() as upstream:
        config = write_config(tmp_path, upstream=upstream.address)
        async with serving(config, "--workers", "2") as sidecar:
            answer = await session.post(
                f"{sidecar.url}/v1/chat/completions", json={**CALL, "stream": True}
            )
            await answer.content.readuntil(b"\n\n")
            sidecar.tell(signal.SIGINT)
            await sidecar.event("draining", 2)
            assert await sidecar.end(signal.SIGINT) == 130
            answer.close()


async def test_workers_on_a_port_in_use_exit_1_with_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as another sidecar's
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = str(write_config(tmp_path))
        result = await finished("run", "--config", config, "--workers", "2", "--listen", address)
    assert result.code == 1
    assert result.err == (
        f"sidecar could not start: could not listen on {address}: Address already in use"
    )


async def test_workers_that_cannot_start_end_the_start(tmp_path: Path) -> None:
    config = write_config(tmp_path, f"log: {{access: '{tmp_path}/none/access.log'}}\n")
    result = await finished("run", "--config", str(config), "--workers", "2")
    assert result.code == 1
    assert "none/access.log" in result.err
    assert "a worker did not become ready" in result.err
    assert "Traceback" not in result.err


def test_several_workers_on_a_unix_socket_are_refused() -> None:
    with pytest.raises(NotStarted, match="set workers to 1"):
        reserve_port("unix:/run/llm.sock")


def test_a_reserved_port_is_free_for_listeners_that_share_it() -> None:
    with reserve_port("127.0.0.1:0") as held, socket.socket() as worker:
        worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        worker.bind(held.getsockname())
        worker.listen()
        with socket.create_connection(worker.getsockname()) as client:
            connection, _ = worker.accept()
            connection.close()
            assert client.recv(1) == b""


# What filters of workers show

SWITCH = """
import os

from sidecar.api import CallFilter


class Panel:
    def __init__(self, workers):
        self.workers = workers
        self.is_on = False

    async def show(self):
        return {"pid": os.getpid(), "workers": self.workers, "on": self.is_on}

    async def act(self, command):
        if not isinstance(command.get("on"), bool):
            raise ValueError('say {"on": true}')
        self.is_on = command["on"]
        return await self.show()


class Switch(CallFilter):
    def __init__(self, config, kit):
        super().__init__(config, kit)
        kit.panel("switch", lambda: Panel(kit.workers))

    def handle(self, call, call_next):
        return call_next(call)
"""


async def test_state_of_all_workers_is_shown_and_all_are_told(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    (tmp_path / "switching.py").write_text(SWITCH)
    chains = "chains: {default: {call: ['switching:Switch'], attempt: []}}\n"
    async with serving(write_config(tmp_path, chains), "--workers", "2") as sidecar:
        state = f"{sidecar.admin_url}/state"

        async def shown() -> list[Any]:
            async with session.get(f"{state}/switch") as answer:
                assert answer.status == 200
                workers: list[Any] = (await answer.json())["workers"]
                return workers

        pids = sorted(workers_of(sidecar))
        before = sorted(await shown(), key=lambda each: each["pid"])
        assert before == [{"pid": pid, "workers": 2, "on": False} for pid in pids]
        async with session.get(state) as answer:
            assert [list(each) for each in (await answer.json())["workers"]] == [["switch"]] * 2

        async with session.post(f"{state}/switch", json={"on": True}) as answer:
            assert answer.status == 200
            told = (await answer.json())["workers"]
        assert sorted(each["pid"] for each in told) == pids
        assert all(each["on"] for each in await shown())
        await sidecar.event("state_changed", 2)

        async with session.post(f"{state}/switch", json={"on": 1}) as answer:
            assert (answer.status, await answer.json()) == (400, {"error": 'say {"on": true}'})
        async with session.post(f"{state}/other", json={"on": True}) as answer:
            assert answer.status == 404
        headers = {"origin": "http://page"}
        async with session.post(f"{state}/switch", json={"on": False}, headers=headers) as answer:
            assert answer.status == 415

        os.kill(pids[0], signal.SIGKILL)
        await sidecar.event("worker_died")
        assert [each["pid"] for each in await shown()] == [pids[1]]
        async with session.post(f"{state}/switch", json={"on": False}) as answer:
            assert answer.status == 400
            error = (await answer.json())["error"]
            assert error == "1 of 2 workers did not answer: try again"
        assert await sidecar.end() == 0


def told(*answers: tuple[int, Any]) -> tuple[Supervisor, list[tuple[str, Any]]]:
    """A supervisor whose workers answer so, and what they are asked."""
    config = Config.model_validate({"upstreams": {"a": {"dialect": "openai", "base_url": "mock:"}}})
    bound = Bound(
        config=config.model_copy(update={"workers": len(answers)}),
        teams=(),
        policies=(),
        upstream_sections={},
        files=(),
        warnings=[],
        notes=[],
    )
    supervisor = Supervisor(Path("config.yaml"), bound)
    asked: list[tuple[str, Any]] = []

    def answering(status: int, data: Any) -> Any:
        async def ask(path: str, command: Any = None) -> tuple[int, Any]:
            asked.append((path, command))
            return status, data

        return ask

    for worker, answer in zip(supervisor._workers, answers, strict=True):
        worker.ask = answering(*answer)  # type: ignore[method-assign]
    return supervisor, asked


async def test_a_worker_that_does_not_answer_is_an_error_of_the_command() -> None:
    ok = (200, {"workers": ["done"]})
    for silent in ((0, None), (500, None), (503, {"error": "no"})):
        supervisor, asked = told(ok, silent, ok)
        with pytest.raises(ValueError, match="1 of 3 workers did not answer: try again"):
            await supervisor.act("switch", {"on": True})
        assert asked == [("/state/switch", {"on": True})] * 3


async def test_a_worker_that_refuses_a_command_speaks_for_all() -> None:
    supervisor, _ = told((400, {"error": "say on"}), (0, None))
    with pytest.raises(ValueError, match="say on"):
        await supervisor.act("switch", {})
    supervisor, _ = told((404, {"error": "none"}), (404, {"error": "none"}))
    with pytest.raises(NoPanel):
        await supervisor.act("switch", {})


async def test_a_panels_name_cannot_leave_its_path() -> None:
    supervisor, asked = told((200, {"workers": [1]}))
    assert await supervisor.act("a/../b?c#d", {}) == [1]
    assert asked == [("/state/a%2F..%2Fb%3Fc%23d", {})]


async def test_state_is_that_of_the_workers_that_answer() -> None:
    supervisor, asked = told((200, {"workers": [{"a": 1}]}), (0, None), (200, {"workers": [{}]}))
    assert await supervisor.show() == [{"a": 1}, {}]
    assert asked == [("/state", None)] * 3


# Figures of workers that die while they are asked


def counted(value: float) -> list[Any]:
    return [
        {
            "kind": "counter",
            "name": "calls",
            "help": "",
            "labels": [],
            "bounds": [],
            "samples": [[[], value]],
        }
    ]


class FakeProcess:
    returncode: int | None = None


async def test_figures_of_a_worker_that_died_while_it_was_asked_are_not_counted_twice() -> None:
    worker = Worker(0, "/nowhere.sock")
    worker.process = FakeProcess()  # type: ignore[assignment]
    worker.figures = counted(5)

    async def ask(path: str, command: Any = None) -> tuple[int, Any]:
        worker.process = FakeProcess()  # type: ignore[assignment]
        worker.figures = []  # retired by who watches it
        return 200, counted(6)

    worker.ask = ask  # type: ignore[method-assign]
    await worker.refresh()
    assert worker.figures == []


async def test_a_worker_that_does_not_answer_keeps_its_last_figures(tmp_path: Path) -> None:
    bound = bind(load_config(write_config(tmp_path, "workers: 2\n")))
    supervisor = Supervisor(tmp_path / "config.yaml", bound)
    first, second = supervisor._workers
    first.figures, second.figures = counted(2), counted(3)
    (family,) = await supervisor.metrics()
    assert family["samples"] == [([], 5)]


async def test_readiness_means_that_every_worker_is_ready(tmp_path: Path) -> None:
    bound = bind(load_config(write_config(tmp_path, "workers: 2\n")))
    supervisor = Supervisor(tmp_path / "config.yaml", bound)
    answers = [200, 0]

    def answering(number: int) -> Any:
        async def ask(path: str) -> tuple[int, Any]:
            return answers[number], None

        return ask

    for number, worker in enumerate(supervisor._workers):
        worker.ask = answering(number)  # type: ignore[method-assign]
    assert await supervisor._state() == "starting"
    answers[1] = 200
    assert await supervisor._state() == "ready"


@pytest.mark.parametrize(
    ("level", "events"), [("info", ["told", "warned"]), ("warning", ["warned"])]
)
async def test_level_of_the_log_is_that_of_local_filters_too(
    tmp_path: Path, level: str, events: list[str]
) -> None:
    (tmp_path / "telling.py").write_text(
        "from sidecar.api import CallFilter\n\n\n"
        "class Telling(CallFilter):\n"
        "    async def start(self):\n"
        "        self.kit.log.info('told')\n"
        "        self.kit.log.warning('warned')\n"
    )
    (tmp_path / "config.yaml").write_text(
        "listen: 127.0.0.1:0\nadmin: null\n"
        f"log: {{level: {level}}}\n"
        'upstreams: {mock: {dialect: openai, base_url: "mock:"}}\n'
        "models: {m: [mock]}\n"
        'chains: {default: {call: ["telling:Telling"], attempt: []}}\n'
    )
    async with serving(tmp_path / "config.yaml") as sidecar:
        await sidecar.event("warned")
        told = [each["event"] for each in sidecar.log if each["event"] in ("told", "warned")]
        assert told == events
        assert await sidecar.end() == 0
