"""A real `sidecar` process for tests: started on free ports, waited for by what it prints, ended
by its own id; and an upstream that holds its stream until the test says go on."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE_S = 20.0
"""Only a test that fails waits so long."""


def write_config(folder: Path, extra: str = "", *, upstream: str = "mock:") -> Path:
    """A configuration on free ports, with `extra` YAML; upstreams `openai` and `anthropic`."""
    openai = upstream if upstream == "mock:" else f"http://{upstream}/v1"
    anthropic = upstream if upstream == "mock:" else f"http://{upstream}"
    path = folder / "config.yaml"
    path.write_text(
        "listen: 127.0.0.1:0\n"
        "admin: 127.0.0.1:0\n"
        "upstreams:\n"
        f'  openai: {{dialect: openai, base_url: "{openai}"}}\n'
        f'  anthropic: {{dialect: anthropic, base_url: "{anthropic}"}}\n'
        "models: {gpt: [openai], claude: [anthropic]}\n" + extra
    )
    return path


@dataclass
class SidecarProcess:
    """A running `sidecar`. `output` are the lines of its stdout, `log` the events of its stderr."""

    process: asyncio.subprocess.Process
    output: list[str] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Lines of stderr that are no JSON."""

    def __post_init__(self) -> None:
        self._changed = asyncio.Condition()
        self._open_streams = 2
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(self.process.stdout, self.output.append)),
            asyncio.create_task(self._read(self.process.stderr, self._take_error)),
        ]

    async def _read(self, stream: asyncio.StreamReader, take: Callable[[str], None]) -> None:
        while line := await stream.readline():
            take(line.decode().rstrip("\n"))
            async with self._changed:
                self._changed.notify_all()
        async with self._changed:
            self._open_streams -= 1
            self._changed.notify_all()

    def _take_error(self, line: str) -> None:
        try:
            self.log.append(json.loads(line))
        except ValueError:
            self.errors.append(line)

    async def until(self, predicate: Callable[[], object]) -> None:
        """Return once `predicate` is true; it is asked after each line."""
        async with self._changed, asyncio.timeout(PATIENCE_S):
            while not predicate():
                text = f"it ended first: {self.output} {self.log} {self.errors}"
                assert self._open_streams, text
                await self._changed.wait()

    async def event(self, name: str, count: int = 1) -> dict[str, Any]:
        """The `count`th log event of that name, once it is there."""
        await self.until(lambda: len(self.events(name)) >= count)
        return self.events(name)[count - 1]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [each for each in self.log if each["event"] == name]

    async def lines_with(self, text: str, count: int = 1) -> list[str]:
        """The lines of stdout that hold `text`, once there are `count`."""
        await self.until(lambda: sum(text in line for line in self.output) >= count)
        return [line for line in self.output if text in line]

    # What the banner says

    @property
    def address(self) -> str:
        return self.output[0].partition(" listens on ")[2].partition(", ")[0]

    @property
    def admin(self) -> str:
        return self.output[0].partition(", admin on ")[2]

    @property
    def curl(self) -> str:
        return next(line for line in self.output if line.startswith("try: ")).removeprefix("try: ")

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin}"

    # The end

    def tell(self, number: int) -> None:
        self.process.send_signal(number)

    async def wait(self) -> int:
        """Its exit code, once it has ended and all it printed was read."""
        async with asyncio.timeout(PATIENCE_S):
            code = await self.process.wait()
            await asyncio.gather(*self._readers)
        return code

    async def end(self, number: int = signal.SIGTERM) -> int:
        self.tell(number)
        return await self.wait()


@asynccontextmanager
async def started(*arguments: str, cwd: Path | None = None) -> AsyncIterator[SidecarProcess]:
    """`sidecar ARGUMENTS` as a process of its own, whatever becomes of it; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sidecar", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
        cwd=cwd,
    )
    sidecar = SidecarProcess(process)
    try:
        yield sidecar
    finally:
        if process.returncode is None:
            process.kill()
        await sidecar.wait()


@asynccontextmanager
async def serving(config: Path, *arguments: str) -> AsyncIterator[SidecarProcess]:
    """`sidecar run` that has said where it listens."""
    async with started("run", "--config", str(config), *arguments) as sidecar:
        await sidecar.lines_with("try: ")
        yield sidecar


@dataclass
class Finished:
    """What a process that ended by itself left."""

    code: int
    out: str
    err: str


async def finished(*arguments: str) -> Finished:
    """Run `sidecar ARGUMENTS` to its end."""
    async with started(*arguments) as sidecar:
        code = await sidecar.wait()
        errors = [json.dumps(event) for event in sidecar.log] + sidecar.errors
        return Finished(code, "\n".join(sidecar.output), "\n".join(errors))


class HeldUpstream:
    """Answers each request with the head and first event of a stream, and the rest on `release()`.

    With `hold_head` not even the head comes before. A request that asks for no stream gets JSON.
    """

    FIRST = b'data: {"choices":[{"index":0,"delta":{"content":"one"}}]}\n\n'
    REST = b'data: {"choices":[{"index":0,"delta":{"content":"two"}}]}\n\ndata: [DONE]\n\n'
    WHOLE = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"whole"}}]}'

    def __init__(self, *, hold_head: bool = False) -> None:
        self.hold_head = hold_head
        self.requests = 0
        self.connections = 0
        self._released = asyncio.Event()
        self._arrived = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> HeldUpstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    @property
    def address(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    @property
    def open_connections(self) -> int:
        return len(self._running)

    def release(self) -> None:
        self._released.set()

    async def has_got(self, count: int) -> None:
        """Return once `count` requests are here."""
        async with self._arrived, asyncio.timeout(PATIENCE_S):
            await self._arrived.wait_for(lambda: self.requests >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self.connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the sidecar left
        finally:
            self._running.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1]) if length else 0)
        async with self._arrived:
            self.requests += 1
            self._arrived.notify_all()
        if self.hold_head:
            await self._released.wait()
        if b'"stream":true' not in body.replace(b" ", b""):
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n" % len(self.WHOLE) + self.WHOLE
            )
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n" + _chunk(self.FIRST)
        )
        await self._released.wait()
        writer.write(_chunk(self.REST) + b"0\r\n\r\n")
        return True


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def becomes(ask: Callable[[], Awaitable[bool]]) -> None:
    """Return once `ask` says yes, for what tells nobody that it changed."""
    async with asyncio.timeout(PATIENCE_S):
        while not await ask():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
