"""The life of a serving process: start, drain, abort, end; with real signals and sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sidecar.config import Bound, bind, load_config
from sidecar.filter import PANEL
from sidecar.resources import Resources
from sidecar.server import NotStarted, ProcessPanels, Server
from tests.support.process import (
    HeldUpstream,
    SidecarProcess,
    finished,
    serving,
    started,
    write_config,
)

OPENAI = ("/v1/chat/completions", "gpt")
ANTHROPIC = ("/v1/messages", "claude")
LONG = "drain_s: 15\n"
SHORT = "drain_s: 0.2\n"


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def upstream() -> AsyncIterator[HeldUpstream]:
    async with HeldUpstream() as upstream:
        yield upstream


@pytest.fixture
async def silent() -> AsyncIterator[HeldUpstream]:
    """Does not even begin an answer before `release`."""
    async with HeldUpstream(hold_head=True) as upstream:
        yield upstream


def body(model: str, *, stream: bool) -> dict[str, Any]:
    message = {"role": "user", "content": "Hi"}
    return {"model": model, "stream": stream, "max_tokens": 9, "messages": [message]}


async def stream(
    session: aiohttp.ClientSession, sidecar: SidecarProcess, at: tuple[str, str] = OPENAI
) -> aiohttp.ClientResponse:
    """A stream whose first event is here."""
    path, model = at
    answer = await session.post(sidecar.url + path, json=body(model, stream=True))
    assert answer.status == 200
    assert await answer.content.readuntil(b"\n\n") == HeldUpstream.FIRST
    return answer


async def raw_call(sidecar: SidecarProcess) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A call for JSON, written to a connection of its own that would be kept alive."""
    host, _, port = sidecar.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body("gpt", stream=False)).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(data) + data
    )
    return reader, writer


async def test_a_state_that_cannot_be_shown_hides_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Works:
        async def show(self) -> Any:
            return {"open": 1}

    class Fails:
        async def show(self) -> Any:
            raise LookupError("canary")

    resources = Resources()
    resources.get((PANEL, "fails"), Fails)
    resources.get((PANEL, "works"), Works)
    (shown,) = await ProcessPanels(resources).show()
    assert shown["works"] == {"open": 1}
    assert list(shown["fails"]) == ["error"]
    assert "canary" not in shown["fails"]["error"]
    (record,) = caplog.records
    assert (record.message, vars(record)["panel"]) == ("state_not_shown", "fails")


async def test_filters_are_told_how_many_processes_there_are_and_not_how_many_there_should_be(
    tmp_path: Path,
) -> None:
    """A reload starts no worker, so it must not change each one's part of a limit."""
    config = write_config(tmp_path, "log: {access: 'off'}\n")
    server = Server(bind(load_config(config)))
    await server.start()
    try:
        config.write_text(config.read_text() + "workers: 4\n")
        await server.reload(bind(load_config(config)))
        assert server.snapshot.bound.config.workers == 4
        assert {each.kit.workers for each in server.snapshot._filters} == {1}
    finally:
        await server.stop()


# Draining


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_running_stream_ends_completely_after_the_signal_and_the_exit_code_is_0(
    tmp_path: Path, session: aiohttp.ClientSession, upstream: HeldUpstream, number: int
) -> None:
    async with serving(write_config(tmp_path, LONG, upstream=upstream.address)) as sidecar:
        async with session.get(f"{sidecar.admin_url}/readyz") as ready:
            assert (ready.status, await ready.json()) == (200, {"status": "ready"})
        answer = await stream(session, sidecar)
        sidecar.tell(number)
        await sidecar.event("draining")

        async with session.get(f"{sidecar.admin_url}/readyz") as ready:
            assert (ready.status, await ready.json()) == (503, {"status": "draining"})
        async with session.get(f"{sidecar.admin_url}/livez") as alive:
            assert alive.status == 200
        host, _, port = sidecar.address.rpartition(":")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, int(port))

        upstream.release()
        assert await answer.read() == HeldUpstream.REST
        assert await sidecar.wait() == 0
        assert not sidecar.errors


async def test_an_idle_connection_is_closed_at_once_when_draining(
    tmp_path: Path, session: aiohttp.ClientSession, upstream: HeldUpstream
) -> None:
    async with serving(write_config(tmp_path, LONG, upstream=upstream.address)) as sidecar:
        answer = await stream(session, sidecar)  # keeps the process draining
        reader, writer = await raw_call(sidecar)
        await reader.readuntil(HeldUpstream.WHOLE)
        sidecar.tell(signal.SIGTERM)
        assert await reader.read() == b""
        writer.close()
        upstream.release()
        await answer.read()
        assert await sidecar.wait() == 0


async def test_a_connection_is_closed_after_the_answer_that_came_while_draining(
    tmp_path: Path, silent: HeldUpstream
) -> None:
    async with serving(write_config(tmp_path, LONG, upstream=silent.address)) as sidecar:
        reader, writer = await raw_call(sidecar)
        await silent.has_got(1)
        sidecar.tell(signal.SIGTERM)
        await sidecar.event("draining")
        silent.release()
        answer = await reader.read()  # to the end of the connection
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nconnection: close\r\n" in answer
        assert answer.endswith(HeldUpstream.WHOLE)
        writer.close()
        assert await sidecar.wait() == 0


@pytest.mark.parametrize("at", [OPENAI, ANTHROPIC])
async def test_a_stream_longer_than_drain_s_gets_an_error_event_of_its_dialect_and_no_clean_end(
    tmp_path: Path,
    session: aiohttp.ClientSession,
    upstream: HeldUpstream,
    at: tuple[str, str],
) -> None:
    async with serving(write_config(tmp_path, SHORT, upstream=upstream.address)) as sidecar:
        answer = await stream(session, sidecar, at)
        sidecar.tell(signal.SIGTERM)
        event = await answer.content.readuntil(b"\n\n")
        data = json.loads(event.partition(b"data: ")[2])
        assert "shutting down" in data["error"]["message"]
        if at is OPENAI:
            assert data["error"]["code"] == "shutting_down"
        else:
            assert event.startswith(b"event: error\n")
            assert data["type"] == "error"
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
        assert await sidecar.wait() == 3
        assert (await sidecar.event("calls_aborted"))["open_calls"] == 1
        (line,) = await sidecar.lines_with('"event":"call"')
        assert json.loads(line)["outcome"] == "aborted"


async def test_a_call_still_without_its_first_byte_after_drain_s_gets_503_in_its_dialect(
    tmp_path: Path, session: aiohttp.ClientSession, silent: HeldUpstream
) -> None:
    async with serving(write_config(tmp_path, SHORT, upstream=silent.address)) as sidecar:
        url = sidecar.url + OPENAI[0]
        call = asyncio.ensure_future(session.post(url, json=body("gpt", stream=True)))
        await silent.has_got(1)
        sidecar.tell(signal.SIGINT)
        async with await call as answer:
            assert answer.status == 503
            assert answer.headers["connection"] == "close"
            assert int(answer.headers["retry-after"]) >= 1
            assert (await answer.json())["error"]["code"] == "shutting_down"
        assert await sidecar.wait() == 3


async def test_a_second_signal_ends_at_once_with_130_although_streams_hang(
    tmp_path: Path, session: aiohttp.ClientSession, upstream: HeldUpstream
) -> None:
    async with serving(write_config(tmp_path, LONG, upstream=upstream.address)) as sidecar:
        answer = await stream(session, sidecar)
        sidecar.tell(signal.SIGTERM)
        await sidecar.event("draining")
        assert await sidecar.end(signal.SIGINT) == 130
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


async def test_a_client_that_leaves_while_draining_is_not_waited_for(
    tmp_path: Path, session: aiohttp.ClientSession, upstream: HeldUpstream
) -> None:
    async with serving(write_config(tmp_path, LONG, upstream=upstream.address)) as sidecar:
        answer = await stream(session, sidecar)
        sidecar.tell(signal.SIGTERM)
        await sidecar.event("draining")
        answer.close()
        assert await sidecar.wait() == 0


async def test_it_does_not_start_without_the_c_extensions_of_aiohttp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOHTTP_NO_EXTENSIONS", "1")  # as an installation from source may be
    ended = await finished("run", "--config", str(write_config(tmp_path)))
    assert ended.code == 1
    assert "without its C extensions" in ended.err
    assert "Traceback" not in ended.err


async def test_a_signal_during_the_start_ends_it_cleanly(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "slow_start.py").write_text(
        "import asyncio, sys\n"
        "from sidecar.api import CallFilter\n"
        "class Slow(CallFilter):\n"
        "    async def start(self):\n"
        "        print('starting', file=sys.stdout, flush=True)\n"
        "        await asyncio.sleep(0.2)\n"
    )
    config.write_text(config.read_text() + "chains: {default: {call: ['slow_start:Slow']}}\n")
    async with started("run", "--config", str(config), cwd=tmp_path) as sidecar:
        await sidecar.lines_with("starting")
        assert await sidecar.end() == 0
        assert not sidecar.errors


# Unix sockets


async def test_a_stale_socket_file_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "llm.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    async with serving(write_config(tmp_path), "--listen", f"unix:{path}") as sidecar:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
            answer = await session.post(
                "http://localhost" + OPENAI[0], json=body("gpt", stream=False)
            )
            assert answer.status == 200
            await answer.read()
        assert await sidecar.end() == 0
    assert not path.exists()


async def test_a_socket_file_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "llm.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        config = str(write_config(tmp_path))
        result = await finished("run", "--config", config, "--listen", f"unix:{path}")
        assert path.is_socket()
    assert result.code == 1
    assert f"{path} is in use by another process" in result.err
    assert "Traceback" not in result.err


async def test_a_regular_file_in_the_place_of_the_socket_is_refused_and_kept(
    tmp_path: Path,
) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    server = Server(load(write_config(tmp_path, f"log: {{access: '{tmp_path}/access'}}\n"), path))
    with pytest.raises(NotStarted, match="precious exists and is no socket"):
        await server.start()
    assert path.read_text() == "data"


# Starting


def load(config: Path, listen: Path | None = None) -> Bound:
    if listen is not None:
        text = config.read_text().replace("listen: 127.0.0.1:0", f"listen: unix:{listen}", 1)
        config.write_text(text)
    return bind(load_config(config))


async def test_a_server_that_failed_to_start_leaves_nothing_open(tmp_path: Path) -> None:
    config = write_config(tmp_path, "log: {access: 'off'}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        admin = f"127.0.0.1:{taken.getsockname()[1]}"
        config.write_text(config.read_text().replace("admin: 127.0.0.1:0", f"admin: {admin}"))
        server = Server(load(config))
        with pytest.raises(NotStarted, match=f"could not listen on {admin}: Address already"):
            await server.start()
    await server.stop()  # once more: harmless


async def test_an_access_log_that_cannot_be_opened_is_a_clear_reason_not_to_start(
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path, f"log: {{access: '{tmp_path}/none/access.log'}}\n")
    result = await finished("run", "--config", str(config))
    assert result.code == 1
    assert result.err.startswith("sidecar could not start: ")
    assert "none/access.log" in result.err
    assert "Traceback" not in result.err


async def test_a_filter_that_does_not_start_exits_1_with_its_traceback_in_our_log(
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path)
    (tmp_path / "no_start.py").write_text(
        "from sidecar.api import CallFilter\n"
        "class Fails(CallFilter):\n"
        "    async def start(self):\n"
        "        raise ValueError('the flux is low')\n"
    )
    config.write_text(config.read_text() + "chains: {default: {call: ['no_start:Fails']}}\n")
    async with started("run", "--config", str(config), cwd=tmp_path) as sidecar:
        assert await sidecar.wait() == 1
        assert sidecar.errors == ["sidecar could not start: ValueError: the flux is low"]
        assert "no_start.py" in sidecar.events("start_failed")[0]["traceback"]


async def test_an_unexpected_error_in_a_call_shows_its_traceback_in_our_log_only(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    config = write_config(tmp_path)
    (tmp_path / "bad_filter.py").write_text(
        "from sidecar.api import CallFilter\n"
        "class Bad(CallFilter):\n"
        "    async def handle(self, call, call_next):\n"
        "        raise RuntimeError('canary in the coal mine')\n"
    )
    config.write_text(config.read_text() + "chains: {default: {call: ['bad_filter:Bad']}}\n")
    async with started("run", "--config", str(config), cwd=tmp_path) as sidecar:
        await sidecar.lines_with("try: ")
        url = sidecar.url + OPENAI[0]
        async with session.post(url, json=body("gpt", stream=True)) as answer:
            assert answer.status == 500
            text = await answer.text()
        assert "canary" not in text
        assert "Traceback" not in text
        failed = await sidecar.event("call_failed")
        assert "canary in the coal mine" in failed["traceback"]
        assert await sidecar.end() == 0
