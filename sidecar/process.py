"""The processes behind `sidecar run`: one that serves, or several and one that keeps them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import click

from sidecar.admin import Admin, NoPanel
from sidecar.config import Bound, Config, redacted
from sidecar.listen import shown_address, why_not
from sidecar.metrics import FamilySnapshot, merge
from sidecar.reload import Reloader
from sidecar.server import (
    EXIT_ABORTED_CALLS,
    EXIT_AT_ONCE,
    EXIT_NOT_STARTED,
    EXIT_STOPPED,
    NotStarted,
    Server,
    Share,
)
from sidecar.team import is_pattern

log = logging.getLogger(__name__)

RESTART_AFTER_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""A worker that died starts again after these pauses, one after the other."""
HEALTHY_AFTER_S = 60.0
"""One that lived so long begins again with the first pause."""
WORKER_START_S = 30.0
WORKER_ANSWER_S = 5.0


async def serve(
    path: Path, bound: Bound, overrides: Mapping[str, Any], share: Share | None = None
) -> int:
    """Serve in this process until told to stop; the exit code."""
    if share is None or share.number == 0:  # one process tells it
        for warning in bound.warnings:
            log.warning("config_warning", extra={"problem": warning})
    server = Server(bound, share)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.ask_to_stop)
    try:
        await server.start()
    except NotStarted as error:
        click.echo(f"sidecar could not start: {error}", err=True)
        return EXIT_NOT_STARTED
    reloader = Reloader(path, server, overrides)
    reloader.start()
    if share is None:
        click.echo(banner(bound.config, server.address, server.admin_address))
    else:
        _stop_with_parent(server)
    try:
        return await server.run()
    finally:
        await reloader.stop()


def banner(config: Config, address: str, admin: str | None) -> str:
    """What a person reads after the start: where it listens, and a line to try."""
    lines = [f"sidecar listens on {address}" + (f", admin on {admin}" if admin else "")]
    if address.startswith("unix:"):
        where = f"--unix-socket {shlex.quote(address.removeprefix('unix:'))} http://localhost"
    else:
        where = f"http://{address}"
    for name, model in config.models.items():
        upstream = config.upstreams.get(model.targets[0].upstream)
        if upstream is None or upstream.dialect not in ("openai", "anthropic") or is_pattern(name):
            continue
        is_openai = upstream.dialect == "openai"
        endpoint = "/v1/chat/completions" if is_openai else "/v1/messages"
        version = "" if is_openai else " -H 'anthropic-version: 2023-06-01'"
        body: dict[str, Any] = {"model": name, "stream": True}
        if not is_openai:
            body["max_tokens"] = 100
        body["messages"] = [{"role": "user", "content": "Hello"}]
        key = "YOUR_TEAM_KEY" if config.teams and not config.team else "any"
        data = shlex.quote(json.dumps(body, separators=(",", ":")))
        lines.append(
            f"try: curl -N {where}{endpoint} -H 'authorization: Bearer {key}'{version} "
            f"-H 'content-type: application/json' -d {data}"
        )
        break
    return "\n".join(lines)


def _stop_with_parent(server: Server) -> None:
    """A worker's standard input is a pipe from its parent: its end is the parent's end."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        if not os.read(0, 64):
            loop.remove_reader(0)
            server.ask_to_stop()

    loop.add_reader(0, readable)


class Worker:
    """One serving process."""

    def __init__(self, number: int, socket_path: str) -> None:
        self.number = number
        self.socket_path = socket_path
        self.process: asyncio.subprocess.Process | None = None
        self.figures: list[FamilySnapshot] = []
        """What it last told of itself."""

    def __repr__(self) -> str:
        return f"<Worker {self.number} {'running' if self.is_running else 'dead'}>"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    async def ask(self, path: str, command: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of its admin socket; (0, None) when it does not answer."""
        method = "GET" if command is None else "POST"
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(self.socket_path),
                    timeout=aiohttp.ClientTimeout(total=WORKER_ANSWER_S),
                ) as session,
                session.request(method, f"http://worker{path}", json=command) as answer,
            ):
                return answer.status, await answer.json()
        except (OSError, aiohttp.ClientError, TimeoutError):
            return 0, None

    async def refresh(self) -> None:
        """Ask for its figures; what a process said that died meanwhile does not count any more."""
        asked = self.process
        status, figures = await self.ask("/metrics.json")
        if status == 200 and self.process is asked and self.is_running:
            self.figures = figures


class Supervisor:
    """Starts the workers, restarts those that die, adds up their figures, passes signals on."""

    def __init__(
        self, path: Path, bound: Bound, overrides: Mapping[str, Any] | None = None
    ) -> None:
        self.bound = bound
        self._path = path
        self._overrides = dict(overrides or {})
        self._directory = tempfile.mkdtemp(prefix="sidecar-workers-")
        self._workers = [
            Worker(number, str(Path(self._directory) / f"{number}.sock"))
            for number in range(bound.config.workers)
        ]
        self._address = bound.config.listen
        self._retired: list[FamilySnapshot] = []  # figures of workers that are gone
        self._stop_asked = asyncio.Event()
        self._signals = 0
        self._codes: list[int] = []

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit code, as of a single process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._pass_on, signal.SIGHUP)
        config = self.bound.config
        admin: Admin | None = None
        watchers: list[asyncio.Task[None]] = []
        try:
            with closing(reserve_port(config.listen)) as held:
                self._address = shown_address(held.getsockname())
                if config.admin is not None:
                    admin = Admin(
                        state=self._state, metrics=self.metrics, config=self._config, panels=self
                    )
                    await _open_admin(admin, config.admin)
                watchers += [loop.create_task(self._keep(worker)) for worker in self._workers]
                if await self._all_ready():
                    where = admin.address if admin is not None else None
                    click.echo(banner(config, self._address, where))
                elif not self._stop_asked.is_set():
                    raise NotStarted("a worker did not become ready; its lines say why")
                await asyncio.gather(*watchers)
        except NotStarted as error:
            click.echo(f"sidecar could not start: {error}", err=True)
            self._stop_workers()
            await asyncio.gather(*watchers)
            return EXIT_NOT_STARTED
        finally:
            if admin is not None:
                await admin.stop()
            shutil.rmtree(self._directory, ignore_errors=True)
        return EXIT_AT_ONCE if self._signals > 1 else max(self._codes, default=EXIT_STOPPED)

    async def _keep(self, worker: Worker) -> None:
        """Keep one worker running until told to stop."""
        loop = asyncio.get_running_loop()
        deaths = 0
        while not self._stop_asked.is_set():
            started_at = loop.time()
            process = worker.process = await self._launch(worker)
            if self._stop_asked.is_set():  # nobody told this one
                worker.signal(signal.SIGTERM)
            code = await process.wait()
            self._retired = merge([self._retired, _without_gauges(worker.figures)])
            worker.figures = []
            if self._stop_asked.is_set():
                if code == -signal.SIGTERM:  # it was still starting, and had no calls
                    code = EXIT_STOPPED
                self._codes.append(code if code >= 0 else EXIT_ABORTED_CALLS)
                return
            deaths = 1 if loop.time() - started_at > HEALTHY_AFTER_S else deaths + 1
            pause_s = RESTART_AFTER_S[min(deaths, len(RESTART_AFTER_S)) - 1]
            log.error(
                "worker_died",
                extra={"worker": worker.number, "code": code, "restart_in_s": pause_s},
            )
            try:
                await asyncio.wait_for(self._stop_asked.wait(), pause_s)
            except TimeoutError:
                pass

    async def _launch(self, worker: Worker) -> asyncio.subprocess.Process:
        # The options are ours as they were given; what is not the user's word stands in `share`,
        # so a worker shows the configuration as it is, and tells what of it needs a restart.
        options = [
            text
            for name, value in self._overrides.items()
            for text in (f"--{name}", "none" if value is None else str(value))
        ]
        socket_address = f"unix:{worker.socket_path}"
        share = Share(worker.number, len(self._workers), self._address, socket_address)
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sidecar", "run", "--config", str(self._path), *options),
            *("--share", *map(str, share)),
            stdin=asyncio.subprocess.PIPE,  # its end tells the worker that we are gone
            start_new_session=True,  # a terminal's SIGINT comes to us; we pass it on, once
        )

    async def _all_ready(self) -> bool:
        """Whether all became ready, before one died and in time."""
        loop = asyncio.get_running_loop()
        until = loop.time() + WORKER_START_S
        for worker in self._workers:
            while (await worker.ask("/readyz"))[0] != 200:
                has_died = worker.process is not None and not worker.is_running
                if has_died or self._stop_asked.is_set() or loop.time() > until:
                    return False
                await asyncio.sleep(0.02)
        return True

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop_workers()

    def _stop_workers(self) -> None:
        self._stop_asked.set()
        self._pass_on(signal.SIGTERM)

    def _pass_on(self, number: int) -> None:
        for worker in self._workers:
            worker.signal(number)

    async def _state(self) -> str:
        if self._stop_asked.is_set():
            return "draining"
        answers = await asyncio.gather(*(worker.ask("/readyz") for worker in self._workers))
        return "ready" if all(status == 200 for status, _ in answers) else "starting"

    async def metrics(self) -> list[FamilySnapshot]:
        """The sum over all workers, those that died included as far as they were heard."""
        await asyncio.gather(*(worker.refresh() for worker in self._workers))
        return merge([self._retired, *(worker.figures for worker in self._workers)])

    async def _config(self) -> dict[str, Any]:
        """What the first worker that answers serves by; each reloads by itself."""
        for worker in self._workers:
            status, config = await worker.ask("/config")
            if status == 200:
                return dict(config)
        return redacted(self.bound.config, [policy.team for policy in self.bound.policies])

    # What the workers' filters show

    async def show(self) -> list[dict[str, Any]]:
        """Of each worker that answers."""
        answers = await asyncio.gather(*(worker.ask("/state") for worker in self._workers))
        return [shown for status, told in answers if status == 200 for shown in told["workers"]]

    async def act(self, name: str, command: dict[str, Any]) -> list[Any]:
        """Tell every worker; one that refuses speaks for all, they are alike."""
        path = f"/state/{quote(name, safe='')}"
        asked = [worker.ask(path, command) for worker in self._workers]
        answers = await asyncio.gather(*asked)
        for status, told in answers:
            if status == 404:
                raise NoPanel
            if status == 400:
                raise ValueError(told["error"])
        done = [each for status, told in answers if status == 200 for each in told["workers"]]
        if len(done) < len(self._workers):
            missing = len(self._workers) - len(done)
            raise ValueError(f"{missing} of {len(self._workers)} workers did not answer: try again")
        return done


async def supervise(path: Path, bound: Bound, overrides: Mapping[str, Any]) -> int:
    """Run several workers on one port; the exit code."""
    return await Supervisor(path, bound, overrides).run()


def reserve_port(address: str) -> socket.socket:
    """A socket that keeps `host:port` for our workers and takes no connection itself.

    Port 0 becomes a free one, the same for all workers. Raises `NotStarted` when somebody listens
    there: SO_REUSEPORT alone would let two of our kind share the port unnoticed.
    """
    if address.startswith("unix:"):
        raise NotStarted(f"several workers share a TCP port, and not {address}: set workers to 1")
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, name = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(name)
            name = probe.getsockname()
        held = socket.socket(family, kind, protocol)
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(name)
    except OSError as error:
        raise NotStarted(f"could not listen on {address}: {why_not(error)}") from error
    return held


async def _open_admin(admin: Admin, address: str) -> None:
    try:
        await admin.start(address)
    except OSError as error:
        raise NotStarted(f"could not listen on {address}: {why_not(error)}") from error


def _without_gauges(figures: list[FamilySnapshot]) -> list[FamilySnapshot]:
    return [family for family in figures if family["kind"] != "gauge"]
