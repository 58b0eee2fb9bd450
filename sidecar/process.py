"""The processes behind `sidecar run`: one that serves, or several and one that watches over them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import click

from sidecar.admin import Admin
from sidecar.config import Bound, Config, redacted
from sidecar.metrics import FamilySnapshot, merge
from sidecar.reload import Reloader
from sidecar.server import EXIT_AT_ONCE, EXIT_NOT_STARTED, NotStarted, Server

log = logging.getLogger(__name__)

RESTART_AFTER_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
WORKER_START_S = 30.0
WORKER_ANSWER_S = 5.0


async def serve(path: Path, bound: Bound, overrides: Mapping[str, Any], worker: int | None) -> int:
    """Serve in this process until told to stop; the exit code."""
    server = Server(bound, share_port=worker is not None)
    try:
        await server.start()
    except NotStarted as error:
        click.echo(f"sidecar could not start: {error}", err=True)
        return EXIT_NOT_STARTED
    reloader = Reloader(path, server, overrides)
    reloader.start()
    if worker is None:
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
        where = f"--unix-socket {address.removeprefix('unix:')} http://localhost"
    else:
        where = f"http://{address}"
    for name, model in config.models.items():
        upstream = config.upstreams.get(model.targets[0].upstream)
        if upstream is None or "*" in name:
            continue
        is_openai = upstream.dialect == "openai"
        endpoint = "/v1/chat/completions" if is_openai else "/v1/messages"
        version = "" if is_openai else " -H 'anthropic-version: 2023-06-01'"
        body: dict[str, Any] = {"model": name, "stream": True}
        if not is_openai:
            body["max_tokens"] = 100
        body["messages"] = [{"role": "user", "content": "Hello"}]
        key = "YOUR_TEAM_KEY" if config.teams and not config.team else "any"
        lines.append(
            f"try: curl -N {where}{endpoint} -H 'authorization: Bearer {key}'{version} "
            f"-H 'content-type: application/json' -d '{json.dumps(body, separators=(',', ':'))}'"
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
        self.starts = 0

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    async def ask(self, path: str) -> tuple[int, Any]:
        """Status and JSON of its admin socket; (0, None) when it does not answer."""
        try:
            async with aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self.socket_path),
                timeout=aiohttp.ClientTimeout(total=WORKER_ANSWER_S),
            ) as session:
                async with session.get(f"http://worker{path}") as answer:
                    return answer.status, await answer.json()
        except (OSError, aiohttp.ClientError, TimeoutError):
            return 0, None


class Supervisor:
    """Starts the workers, restarts those that die, adds up their figures, passes signals on."""

    def __init__(self, path: Path, bound: Bound, overrides: Mapping[str, Any]) -> None:
        self.bound = bound
        self._path = path
        self._overrides = overrides
        self._directory = tempfile.mkdtemp(prefix="sidecar-workers-")
        self._workers = [
            Worker(number, str(Path(self._directory) / f"{number}.sock"))
            for number in range(bound.config.workers)
        ]
        self._retired: list[FamilySnapshot] = []  # figures of workers that are gone
        self._is_stopping = False
        self._signals = 0
        self._codes: list[int] = []

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._pass_on, signal.SIGHUP)
        admin: Admin | None = None
        watchers = []
        try:
            for worker in self._workers:
                await self._launch(worker)
                watchers.append(asyncio.ensure_future(self._watch(worker)))
            if not await self._all_ready():
                self._stop()
                await asyncio.gather(*watchers)
                return next((code for code in self._codes if code), EXIT_NOT_STARTED)
            config = self.bound.config
            if config.admin is not None:
                admin = Admin(state=self._state, metrics=self.metrics, config=self._config)
                await admin.start(config.admin)
            click.echo(banner(config, config.listen, config.admin))
            await asyncio.gather(*watchers)
        except OSError as error:
            click.echo(f"sidecar could not start: {error}", err=True)
            self._stop()
            await asyncio.gather(*watchers)
            return EXIT_NOT_STARTED
        finally:
            if admin is not None:
                await admin.stop()
            shutil.rmtree(self._directory, ignore_errors=True)
        return EXIT_AT_ONCE if self._signals > 1 else max(self._codes, default=0)

    async def _launch(self, worker: Worker) -> None:
        worker.starts += 1
        arguments = ["--config", str(self._path), "--worker", str(worker.number)]
        arguments += ["--worker-admin", f"unix:{worker.socket_path}"]
        if "listen" in self._overrides:
            arguments += ["--listen", self._overrides["listen"]]
        worker.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sidecar", "run", *arguments),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,  # a terminal's SIGINT comes to us; we pass it on, once
        )

    async def _watch(self, worker: Worker) -> None:
        while True:
            process = worker.process
            if process is None:
                return
            code = await process.wait()
            self._retired = merge([self._retired, _without_gauges(worker.figures)])
            worker.figures = []
            if self._is_stopping:
                self._codes.append(code if code >= 0 else EXIT_AT_ONCE)
                return
            delay_s = RESTART_AFTER_S[min(worker.starts, len(RESTART_AFTER_S)) - 1]
            log.error(
                "worker_died",
                extra={"worker": worker.number, "code": code, "restart_in_s": delay_s},
            )
            await asyncio.sleep(delay_s)
            if self._is_stopping:
                return
            await self._launch(worker)

    async def _all_ready(self) -> bool:
        until = asyncio.get_running_loop().time() + WORKER_START_S
        for worker in self._workers:
            while (await worker.ask("/readyz"))[0] != 200:
                if not worker.is_running or asyncio.get_running_loop().time() > until:
                    return False
                await asyncio.sleep(0.02)
        return True

    def _stop(self) -> None:
        self._is_stopping = True
        self._signals += 1
        self._pass_on(signal.SIGTERM)

    def _pass_on(self, number: int) -> None:
        for worker in self._workers:
            worker.signal(number)

    async def _state(self) -> str:
        if self._is_stopping:
            return "draining"
        answers = await asyncio.gather(*(worker.ask("/readyz") for worker in self._workers))
        return "ready" if all(status == 200 for status, _ in answers) else "starting"

    async def metrics(self) -> list[FamilySnapshot]:
        """The sum over all workers, those that died included."""
        answers = await asyncio.gather(*(worker.ask("/metrics.json") for worker in self._workers))
        for worker, (status, figures) in zip(self._workers, answers, strict=True):
            if status == 200:
                worker.figures = figures
        return merge([self._retired, *(worker.figures for worker in self._workers)])

    def _config(self) -> dict[str, Any]:
        return redacted(self.bound.config, [policy.team for policy in self.bound.policies])


async def supervise(path: Path, bound: Bound, overrides: Mapping[str, Any]) -> int:
    """Run several workers on one port; the exit code."""
    return await Supervisor(path, bound, overrides).run()


def _without_gauges(figures: list[FamilySnapshot]) -> list[FamilySnapshot]:
    return [family for family in figures if family["kind"] != "gauge"]
