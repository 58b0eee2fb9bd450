"""One process that serves: listeners, admin port, reload, signals, drain."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import http_parser

from sidecar.admin import Admin, NoPanel
from sidecar.clock import SystemClock
from sidecar.config import Bound, redacted
from sidecar.edge import Edge, EdgeProtocol, EdgeServer
from sidecar.errors import CallError, SidecarError
from sidecar.filter import PANEL, Panel
from sidecar.listen import remove_stale_socket, shown_address, why_not
from sidecar.log import LineWriter
from sidecar.metrics import FamilySnapshot, Metrics
from sidecar.resources import Resources
from sidecar.snapshot import Shared, Snapshot
from sidecar.tasks import Tasks

log = logging.getLogger(__name__)

BACKLOG = 4096
FLUSH_S = 2.0
"""After aborted calls wrote their error, clients may take so long to read it."""
FLUSH_LOOK_S = 0.01

EXIT_STOPPED = 0  # asked to stop; every call had ended
EXIT_NOT_STARTED = 1  # a port in use, a filter that did not start
# 2: the configuration does not load, or the command was used wrongly (see cli.py)
EXIT_ABORTED_CALLS = 3  # asked to stop; calls still ran after `drain_s` and were aborted
EXIT_AT_ONCE = 130  # a second signal


class NotStarted(SidecarError):
    """The process cannot serve; the message says why and what to do."""


class ProcessPanels:
    """The panels of this process's filters."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    async def show(self) -> list[dict[str, Any]]:
        panels = self._resources.of_kind(PANEL)
        return [{name: await _shown(name, panel) for name, panel in panels.items()}]

    async def act(self, name: str, command: dict[str, Any]) -> list[Any]:
        panel: Panel | None = self._resources.of_kind(PANEL).get(name)
        if panel is None:
            raise NoPanel
        answer = await panel.act(command)
        log.info("state_changed", extra={"panel": name, "command": command})
        return [answer]


async def _shown(name: str, panel: Panel) -> Any:
    """What it shows; one that fails, such as for a store that is away, hides no other."""
    try:
        return await panel.show()
    except Exception:
        log.exception("state_not_shown", extra={"panel": name})
        return {"error": "could not be shown: the log says why"}


class Share(NamedTuple):
    """What one of several workers is told, instead of by the configuration."""

    number: int
    """From 0."""
    workers: int
    listen: str
    """The port that all share."""
    admin: str
    """Its own socket; the configured port is their parent's."""


class Server:
    """Serves one configuration file until told to stop; `share`: as one of several workers."""

    def __init__(self, bound: Bound, share: Share | None = None) -> None:
        self.config = bound.config
        self.metrics = Metrics()
        self.snapshot: Snapshot
        self.state = "starting"
        self._bound = bound
        self._share_port = share is not None
        self._listen_at = share.listen if share is not None else bound.config.listen
        self._admin_at = share.admin if share is not None else bound.config.admin
        self._workers = share.workers if share is not None else bound.config.workers
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
        except (OSError, SidecarError) as error:  # their messages say enough; TimeoutError's too
            await self.stop()
            raise NotStarted(str(error) or type(error).__name__) from error
        except Exception as error:
            log.exception("start_failed")
            await self.stop()
            raise NotStarted(f"{type(error).__name__}: {error}") from error
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
            workers=self._workers,
        )
        self.snapshot = await self._new_snapshot(self._bound)
        self._edge = Edge(self.snapshot)
        self._server = EdgeServer(self._edge, self.config.http)
        with _listening_on(self._listen_at):
            self._listener = await self._listen(self._listen_at, self._server)
        if self._admin_at is not None:
            self._admin = Admin(
                state=self._get_state,
                metrics=self._get_metrics,
                config=self.effective_config,
                panels=ProcessPanels(self._resources),
            )
            with _listening_on(self._admin_at):
                await self._admin.start(self._admin_at)
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
            remove_stale_socket(path)
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
            return self._listen_at
        return shown_address(self._listener.sockets[0].getsockname())

    @property
    def admin_address(self) -> str | None:
        return self._admin.address if self._admin is not None else None

    # For the admin port

    async def _get_state(self) -> str:
        return self.state

    async def _get_metrics(self) -> list[FamilySnapshot]:
        return self.metrics.snapshot()

    async def effective_config(self) -> dict[str, Any]:
        bound = self.snapshot.bound
        return redacted(bound.config, [policy.team for policy in bound.policies])

    # Reload

    async def reload(self, bound: Bound) -> None:
        """Serve new calls by `bound`; running ones end on what they began with.

        Raises what building or starting it raised; the running configuration stays live then.
        """
        new = await self._new_snapshot(bound)
        if self.state != "ready":  # asked to stop meanwhile
            await new.stop()
            return
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
        """Serve until `ask_to_stop`; the process's exit code."""
        await self._stop_asked.wait()
        return await self.drain()

    async def drain(self) -> int:
        """Stop accepting, let calls end for `drain_s`, abort the rest, close everything."""
        drain_s = self.snapshot.bound.config.drain_s
        log.info("draining", extra={"open_calls": self.open_calls, "drain_s": drain_s})
        self.state = "draining"
        self._stop_listening()
        code = EXIT_STOPPED
        await self._wait_for_calls(drain_s)
        if self.open_calls:
            code = EXIT_ABORTED_CALLS
            log.warning("calls_aborted", extra={"open_calls": self.open_calls})
            self._abort_calls()
            await self._flush()
        await self.stop()
        return EXIT_AT_ONCE if self._stop_now.is_set() else code

    @property
    def open_calls(self) -> int:
        """Calls under way whose client is still there."""
        calls = [each.call for each in self._connections()]
        return sum(1 for call in calls if call is not None and call.cancelled_as is None)

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
            if connection.is_idle:
                connection.force_close()  # the others close once their call has ended

    async def _wait_for_calls(self, timeout_s: float) -> None:
        """Return when all calls have ended, after `timeout_s`, or when told to stop at once."""
        calling = [each.running for each in self._connections() if each.call is not None]
        tasks = [task for task in calling if task is not None]
        if not tasks:
            return
        # One wait for all of them: waiting for each in turn would cost the square of their number.
        ended = asyncio.ensure_future(asyncio.wait(tasks))
        stop_now = asyncio.ensure_future(self._stop_now.wait())
        try:
            await asyncio.wait(
                (ended, stop_now), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ended.cancel()
            stop_now.cancel()

    async def _flush(self) -> None:
        """Give clients of aborted calls a moment to read the error, unless told to stop at once."""
        loop = asyncio.get_running_loop()
        until = loop.time() + FLUSH_S
        await asyncio.sleep(0)  # the aborted calls write
        # aiohttp tells nobody when the last connection has gone.
        while (  # noqa: ASYNC110
            self._connections() and loop.time() < until and not self._stop_now.is_set()
        ):
            await asyncio.sleep(FLUSH_LOOK_S)

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


@contextmanager
def _listening_on(address: str) -> Iterator[None]:
    """Give what fails inside the address that it failed on."""
    try:
        yield
    except OSError as error:
        raise NotStarted(f"could not listen on {address}: {why_not(error)}") from error


def require_extensions() -> None:
    """Refuse to serve with aiohttp's pure-Python parser: ten times slower, and less strict."""
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise NotStarted(
            "aiohttp was installed without its C extensions: install its binary wheel and unset "
            "AIOHTTP_NO_EXTENSIONS"
        )


def _freeze() -> None:
    gc.collect()
    gc.freeze()


def _nowhere(fields: Any) -> None:
    pass
