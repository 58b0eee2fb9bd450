"""The data port as a whole, in this process: a server, a scripted provider behind it, raw clients.

Client, sidecar and provider share the test's event loop, so that times between them can be
measured. What a test leaves running in the sidecar fails it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

import anthropic
import openai
import orjson
import pytest
import yaml

from sidecar.config import bind, load_config
from sidecar.edge import EdgeProtocol
from sidecar.mock import MockProvider
from sidecar.mock.script import Script
from sidecar.server import Server
from sidecar.transport.upstream import LiveUpstream

WITHIN_S = 5.0
"""Only a test that fails waits so long."""

PROVIDER_KEY = "sk-provider-canary"
"""What the upstreams' `sign` sections send; no client may ever see it."""

HELLO: Any = [{"role": "user", "content": "hello there"}]
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"

AS_IT_COMES = {
    "retry": {"max_attempts": 1},
    "circuit_breaker": {"failure_threshold": 1_000_000},
}
"""Settings with which an upstream's failure reaches the client at once, and each time."""

F = TypeVar("F")


def chat_body(model: str = "gpt", *, stream: bool = False, **more: Any) -> bytes:
    """A request body that both dialects accept."""
    body = {"model": model, "stream": stream, "max_tokens": 50, "messages": HELLO, **more}
    return orjson.dumps(body)


def request(
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    version: str = "1.1",
) -> bytes:
    """A whole request as bytes; JSON unless `headers` say otherwise."""
    fields = {"host": "sidecar", **(headers or {})}
    if body:
        fields.setdefault("content-type", "application/json")
    if body or method == "POST":
        fields.setdefault("content-length", str(len(body)))
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/{version}\r\n{lines}\r\n".encode("latin-1") + body


def chat_request(model: str = "gpt", *, stream: bool = False, **headers: str) -> bytes:
    """A chat call of the model's dialect; header names are written with `_`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    path = MESSAGES if model == "claude" else CHAT
    return request("POST", path, chat_body(model, stream=stream), named)


@dataclass
class Answer:
    """An answer as it came. `is_whole` is False when its body broke off."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    trailers: list[tuple[str, str]] = field(default_factory=list)
    is_whole: bool = True

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The envelope's inner object."""
        return self.json["error"]


class RawClient:
    """A client's connection: exact bytes out, answers in, nothing smoothed over."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        """Write; a connection that the sidecar has closed takes nothing more."""
        if not self.writer.is_closing():
            self.writer.write(data)

    async def call(self, data: bytes, *, is_head: bool = False) -> Answer:
        self.send(data)
        return await self.answer(is_head=is_head)

    async def head(self) -> Answer:
        """The head of the next answer; the body stays unread."""
        data = await self._within(self.reader.readuntil(b"\r\n\r\n"))
        status_line, *lines = data[:-4].decode("latin-1").split("\r\n")
        assert status_line.startswith("HTTP/1.1 "), status_line
        return Answer(int(status_line.split(" ")[1]), _fields(lines))

    async def answer(self, *, is_head: bool = False) -> Answer:
        """The next answer, 1xx included, as whole as it comes."""
        answer = await self.head()
        if is_head or answer.status in (204, 304) or answer.status < 200:
            return answer
        try:
            if answer.header("transfer-encoding") == "chunked":
                await self._read_chunks(answer)
            elif (length := answer.header("content-length")) is not None:
                answer.pieces.append(await self._within(self.reader.readexactly(int(length))))
            else:
                answer.pieces.append(await self.rest())
        except asyncio.IncompleteReadError as error:
            answer.pieces.append(error.partial)
            answer.is_whole = False
        answer.body = b"".join(answer.pieces)
        return answer

    async def _read_chunks(self, answer: Answer) -> None:
        while True:
            size = int(await self._within(self.reader.readuntil(b"\r\n")), 16)
            if not size:
                break
            piece = await self._within(self.reader.readexactly(size + 2))
            answer.pieces.append(piece[:-2])
        lines = []
        while (line := await self._within(self.reader.readuntil(b"\r\n"))) != b"\r\n":
            lines.append(line[:-2].decode("latin-1"))
        answer.trailers = _fields(lines)

    async def until(self, mark: bytes) -> bytes:
        """Everything up to and with `mark`."""
        return await self._within(self.reader.readuntil(mark))

    async def rest(self) -> bytes:
        """Everything until the sidecar closes; a reset counts as a close."""
        pieces = []
        try:
            while data := await self._within(self.reader.read(1 << 20)):
                pieces.append(data)
        except ConnectionError:
            pass
        return b"".join(pieces)

    async def is_closed(self) -> bool:
        """Wait for the close; whether nothing came before it."""
        return await self.rest() == b""

    async def _within(self, work: Awaitable[F]) -> F:
        async with asyncio.timeout(WITHIN_S):
            return await work

    def leave(self) -> None:
        """Close, as a client does that is not interested any more."""
        self.writer.close()

    def half_close(self) -> None:
        self.writer.write_eof()

    def reset(self) -> None:
        """Leave, and throw away what was not sent or read."""
        self.writer.transport.abort()

    def stop_reading(self) -> None:
        """Leave in the kernel what comes from now on."""
        self._transport.pause_reading()

    def read_on(self) -> None:
        self._transport.resume_reading()

    @property
    def _transport(self) -> asyncio.Transport:
        return cast(asyncio.Transport, self.writer.transport)


def _fields(lines: list[str]) -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in lines)
    return [(name.lower(), value.strip()) for name, _, value in pairs]


class Flow:
    """A running sidecar with its provider."""

    def __init__(self, server: Server, provider: MockProvider, log_path: Path) -> None:
        self.server = server
        self.provider = provider
        self.log_path = log_path
        self.records: list[logging.LogRecord] = []
        """What was logged, by us or by a library, from INFO up."""
        self.may_log_errors = False
        """Set by a test that provokes a traceback in our log."""
        self._clients: list[RawClient] = []

    @property
    def url(self) -> str:
        return f"http://{self.server.address}"

    @property
    def host(self) -> str:
        return self.server.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.server.address.rpartition(":")[2])

    def upstream(self, name: str = "up-openai") -> LiveUpstream:
        return self.server.snapshot.upstreams[name]

    def filter(self, kind: type[F]) -> F:
        """The first instance of a filter class in the live chains."""
        return next(each for each in self.server.snapshot._filters if isinstance(each, kind))

    @property
    def connections(self) -> list[EdgeProtocol]:
        """The clients' connections that are open."""
        return self.server._connections()

    # Clients

    async def connect(self, *, receive_bytes: int | None = None) -> RawClient:
        """A raw connection. `receive_bytes` sets the kernel's receive buffer."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=64 * 1024)
        client = RawClient(reader, writer)
        self._clients.append(client)
        return client

    async def call(self, data: bytes, *, is_head: bool = False) -> Answer:
        """One answer on a connection of its own."""
        client = await self.connect()
        try:
            return await client.call(data, is_head=is_head)
        finally:
            client.leave()

    def openai(self, key: str = "client-key") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0)

    def anthropic(self, key: str = "client-key") -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(api_key=key, base_url=self.url, max_retries=0)

    # What the sidecar knows

    async def logged(self, count: int = 1) -> list[dict[str, Any]]:
        """The access log once it has `count` lines."""
        await until(lambda: len(self.lines()) >= count)
        return self.lines()

    def lines(self) -> list[dict[str, Any]]:
        data = self.log_path.read_bytes() if self.log_path.exists() else b""
        return [json.loads(line) for line in data.splitlines(keepends=True) if line[-1:] == b"\n"]

    def running(self) -> dict[str, int]:
        """What is under way, by kind; empty when nothing is."""
        counts = {
            "calls": self.server.snapshot.open_calls,
            "tasks": len(self.server._tasks),
            "provider": self.provider.open_requests,
        }
        for name, upstream in self.server.snapshot.upstreams.items():
            counts[f"pool {name}"] = upstream.pool.in_use
        return {kind: count for kind, count in counts.items() if count}

    async def quiet(self) -> None:
        """Wait until nothing is under way."""
        give_up_at = asyncio.get_running_loop().time() + WITHIN_S
        while running := self.running():
            assert asyncio.get_running_loop().time() < give_up_at, f"left running: {running}"
            await asyncio.sleep(0.001)

    @property
    def errors(self) -> list[str]:
        """Errors and tracebacks in the log."""
        return [
            f"{record.name} {record.getMessage()} {record.exc_info}"
            for record in self.records
            if record.levelno >= logging.ERROR or record.exc_info
        ]


async def until(condition: Callable[[], object], *, within_s: float = WITHIN_S) -> None:
    """Look again and again until `condition` holds; for what tells nobody that it changed."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + within_s
    while not condition():
        assert loop.time() < give_up_at, "waited in vain"
        await asyncio.sleep(0.001)


class _Records(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.INFO)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


@asynccontextmanager
async def running(
    folder: Path,
    snippet: str = "",
    *,
    files: Mapping[str, str] | None = None,
    script: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[Flow]:
    """A sidecar on a free port, with a provider on a unix socket as `up-openai`, `up-anthropic`.

    Its default chain lets failures of an upstream pass as they come, unless `snippet` says more.

    `snippet` is YAML laid over the configuration, mapping by mapping; `files` are written beside
    it; `script` is the provider's. At the end nothing may be left and no error be in the log.
    """
    provider = MockProvider(script=Script.parse(script) if script is not None else None)
    address = await provider.start(unix_path=str(folder / "provider.sock"))
    log_path = folder / "access.log"
    config = {
        "listen": "127.0.0.1:0",
        "admin": None,
        "log": {"access": str(log_path)},
        "upstreams": {
            "up-openai": {"dialect": "openai", "base_url": f"{address}:/v1"},
            "up-anthropic": {"dialect": "anthropic", "base_url": address},
        },
        "models": {"gpt": ["up-openai"], "claude": ["up-anthropic"]},
    }
    over = yaml.safe_load(snippet) or {}
    if "chains" not in over:
        config["filters"] = AS_IT_COMES
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(_laid_over(config, over)))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    known = dict(os.environ) | {"PROVIDER_KEY": PROVIDER_KEY} | dict(environ or {})
    server = Server(bind(load_config(path, environ=known), environ=known))
    flow = Flow(server, provider, log_path)
    handler = _Records(flow.records)
    loggers = [logging.getLogger(), logging.getLogger("sidecar")]
    loggers[0].addHandler(handler)
    level = loggers[1].level
    loggers[1].setLevel(logging.INFO)
    try:
        # A collection of this whole test process would take a tenth of a second.
        with mock.patch("sidecar.server._freeze"):
            await server.start()
            try:
                yield flow
                for client in flow._clients:
                    client.leave()
                await flow.quiet()
                assert not server.open_calls
                assert flow.may_log_errors or not flow.errors, flow.errors
            finally:
                for client in flow._clients:
                    client.leave()
                await server.stop()
    finally:
        loggers[0].removeHandler(handler)
        loggers[1].setLevel(level)
        await provider.stop()


def _laid_over(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {name: _laid_over(base.get(name), value) for name, value in over.items()}


Start = Callable[..., Awaitable[Flow]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts sidecars as `running` does; they stop at the end of the test."""
    async with AsyncExitStack() as stack:

        async def start_one(snippet: str = "", **more: Any) -> Flow:
            return await stack.enter_async_context(running(tmp_path, snippet, **more))

        yield start_one


@pytest.fixture
async def flow(start: Start) -> Flow:
    """A sidecar with the default chain and no teams."""
    return await start()
