"""One process that serves: listeners, admin port, reload, signals, drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import stat
from pathlib import Path
from typing import Any

from aiohttp import http_parser

from sidecar.admin import Admin
from sidecar.clock import SystemClock
from sidecar.config import Bound, redacted
from sidecar.edge import Edge, EdgeProtocol, EdgeServer
from sidecar.errors import CallError, SidecarError
from sidecar.log import LineWriter
from sidecar.metrics import FamilySnapshot, Metrics
from sidecar.resources import Resources
from sidecar.snapshot import Shared, Snapshot
from sidecar.tasks import Tasks

log = logging.getLogger(__name__)

BACKLOG = 4096
FLUSH_S = 2.0
"""After aborted calls wrote their error, clients may take so long to read it."""

EXIT_STOPPED = 0  # asked to stop; every call had ended
EXIT_NOT_STARTED = 1  # a port in use, a filter that did not start
EXIT_CONFIG = 2  # the configuration does not load
EXIT_ABORTED_CALLS = 3  # asked to stop; calls still ran after `drain_s` and were aborted
EXIT_AT_ONCE = 130  # a second signal


class NotStarted(SidecarError):
    """The process cannot serve; the message says why and what to do."""


class Server:
    """Serves one configuration file until told to stop."""

    def __init__(self, bound: Bound, *, share_port: bool = False) -> None:
        self.config = bound.config
        self.metrics = Metrics()
        self.snapshot: Snapshot
        self.state = "starting"
        self._bound = bound
        self._share_port = share_port
        self._generation = 0
        self._listener: asyncio.Server | None = None
        self._server: EdgeServer | None = None
        self._edge: Edge | None = None
        self._admin: Admin | None = None
        self._resources = Resources()
        self._tasks = Tasks()
        self._lines: LineWriter | None = None
        self._unix_path: Path | None = None
        self._stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def start(self) -> None:
        """Be ready, or raise `NotStarted` and leave nothing open."""
        require_extensions()
        try:
            await self._start()
        except (OSError, TimeoutError) as error:
            await self.stop()
            raise NotStarted(str(error) or type(error).__name__) from error
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        dropped = self.metrics.counter(
            "llm_sidecar_dropped_log_lines", "Log lines dropped because nobody read them."
        )
        self._lines = LineWriter.to(self.config.log.access, dropped.child())
        self._shared = Shared(
            resources=self._resources,
            metrics=self.metrics,
            tasks=self._tasks,
            clock=SystemClock(),
            access_log=self._lines.write if self._lines is not None else _nowhere,
        )
        self.snapshot = await self._new_snapshot(self._bound)
        self._edge = Edge(self.snapshot)
        self._server = EdgeServer(self._edge, self.config.http)
        self._listener = await self._listen(self.config.listen, self._server)
        if self.config.admin is not None:
            self._admin = Admin(
                state=self._get_state, metrics=self._get_metrics, config=self.effective_config
            )
            await self._admin.start(self.config.admin)
        self.state = "ready"
        # Everything made so far lives as long as the process: collections need not look at it.
        asyncio.get_running_loop().call_later(0.2, _freeze)

    async def _new_snapshot(self, bound: Bound) -> Snapshot:
        self._generation += 1
        snapshot = Snapshot(bound, self._shared, self._generation)
        await snapshot.start()
        return snapshot

    async def _listen(self, address: str, server: EdgeServer) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            _remove_stale_socket(path)
            self._unix_path = path
            return await loop.create_unix_server(server, str(path), backlog=BACKLOG)
        host, _, port = address.rpartition(":")
        return await loop.create_server(
            server, host.strip("[]"), int(port), backlog=BACKLOG, reuse_port=self._share_port
        )

    @property
    def address(self) -> str:
        """Where it really listens, with the port the system chose for port 0."""
        if self._unix_path is not None or self._listener is None:
            return self.config.listen
        host, port = self._listener.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def admin_address(self) -> str | None:
        if self._admin is None or not self._admin.addresses:
            return self.config.admin
        where = self._admin.addresses[0]
        if isinstance(where, str):
            return f"unix:{where}"
        return f"[{where[0]}]:{where[1]}" if ":" in where[0] else f"{where[0]}:{where[1]}"

    # For the admin port

    async def _get_state(self) -> str:
        return self.state

    async def _get_metrics(self) -> list[FamilySnapshot]:
        return self.metrics.snapshot()

    def effective_config(self) -> dict[str, Any]:
        bound = self.snapshot.bound
        return redacted(bound.config, [policy.team for policy in bound.policies])

    # Reload

    async def reload(self, bound: Bound) -> None:
        """Serve new calls by `bound`; running ones end on what they began with.

        Raises what building or starting it raised; the running configuration stays live then.
        """
        new = await self._new_snapshot(bound)
        old, self.snapshot = self.snapshot, new
        if self._edge is not None:
            self._edge.serving = new
        self._tasks.start(old.retire(), name="retire snapshot")

    # The end

    def ask_to_stop(self) -> None:
        """First: drain and stop. Again: stop at once."""
        if self._stop_asked.is_set():
            self._stop_now.set()
        self._stop_asked.set()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the process's exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask_to_stop)
        try:
            await self._stop_asked.wait()
            return await self.drain()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def drain(self) -> int:
        """Stop accepting, let calls end for `drain_s`, abort the rest, close everything."""
        log.info("draining", extra={"open_calls": self.open_calls, "drain_s": self.config.drain_s})
        self.state = "draining"
        self._stop_listening()
        code = EXIT_STOPPED
        stop_now = asyncio.ensure_future(self._stop_now.wait())
        try:
            await self._wait_for_calls(self.config.drain_s, stop_now)
            if self.open_calls:
                code = EXIT_AT_ONCE if self._stop_now.is_set() else EXIT_ABORTED_CALLS
                log.warning("calls_aborted", extra={"open_calls": self.open_calls})
                self._abort_calls()
                await self._wait_for_calls(FLUSH_S, stop_now if not stop_now.done() else None)
            elif self._stop_now.is_set():
                code = EXIT_AT_ONCE
        finally:
            stop_now.cancel()
        await self.stop()
        return code

    @property
    def open_calls(self) -> int:
        return sum(1 for each in self._connections() if each.call is not None)

    def _connections(self) -> list[EdgeProtocol]:
        if self._server is None:
            return []
        return [each for each in self._server.connections if isinstance(each, EdgeProtocol)]

    def _stop_listening(self) -> None:
        if self._edge is not None:
            self._edge.is_closing = True
        if self._listener is not None:
            self._listener.close()
        for connection in self._connections():
            if connection.call is None:
                connection.force_close()

    async def _wait_for_calls(
        self, timeout_s: float, stop_now: asyncio.Future[Any] | None
    ) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while self.open_calls and (left := until - loop.time()) > 0:
            calling = [each for each in self._connections() if not each.is_idle]
            running = {each.running for each in calling if each.running is not None}
            also = {stop_now} if stop_now is not None else set()
            done, _ = await asyncio.wait(
                running | also, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            if stop_now is not None and stop_now in done:
                return

    def _abort_calls(self) -> None:
        error = CallError(503, "shutting_down", "the sidecar is shutting down", retry_after_s=1.0)
        for connection in self._connections():
            connection.abort_call(error)

    async def stop(self) -> None:
        """Close everything that is open; idempotent, works after half a start."""
        self.state = "draining"
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._server is not None:
            await self._server.shutdown(0.1)
            self._server = None
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
            self._unix_path = None
        await self._tasks.stop(timeout_s=FLUSH_S)
        if hasattr(self, "snapshot"):
            await self.snapshot.stop()
        await self._resources.close()
        if self._admin is not None:
            await self._admin.stop()
            self._admin = None
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def require_extensions() -> None:
    """Refuse to serve with aiohttp's pure-Python parser: ten times slower, and less strict."""
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise NotStarted(
            "aiohttp was installed without its C extensions: install its binary wheel and unset "
            "AIOHTTP_NO_EXTENSIONS"
        )


def _remove_stale_socket(path: Path) -> None:
    """Remove a socket file that nobody listens on; anything else stays and raises OSError."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(f"{path} exists and is no socket: remove it or choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            os.unlink(path)
            return
    raise OSError(f"{path} is in use by another process")


def _freeze() -> None:
    gc.collect()
    gc.freeze()


def _nowhere(fields: Any) -> None:
    pass
