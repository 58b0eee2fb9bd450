"""The admin port: health, metrics, effective configuration. Never the data port."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

import orjson
from aiohttp import web

from sidecar.listen import remove_stale_socket, shown_address
from sidecar.metrics import FamilySnapshot, exposition

State = Callable[[], Awaitable[str]]
"""`ready`, or why not: `starting`, `draining`."""

MAX_COMMAND_BYTES = 64 * 1024

STOP_S = 0.5
"""At the end, a scrape that is under way may take so long."""


class NoPanel(Exception):
    """Nothing is shown under that name."""


class Panels(Protocol):
    """What filters show to operators, and let them change."""

    async def show(self) -> list[dict[str, Any]]:
        """For each process that serves: what is shown, by the panel's name."""
        ...

    async def act(self, name: str, command: dict[str, Any]) -> list[Any]:
        """Each process's answer. Raises `NoPanel`, and ValueError for a wrong command."""
        ...


class Admin:
    """An aiohttp application on its own address.

    GET `/livez` (the event loop turns), `/readyz` (calls are served; says nothing about upstreams),
    `/metrics` (Prometheus text or OpenMetrics), `/metrics.json` (the same as data, for adding up),
    `/config` (as loaded, secrets as `***`), `/state` and `/state/{name}` (what filters show).
    POST a command, a JSON object, to `/state/{name}`.
    """

    def __init__(
        self,
        *,
        state: State,
        metrics: Callable[[], Awaitable[list[FamilySnapshot]]],
        config: Callable[[], Awaitable[dict[str, Any]]],
        panels: Panels,
    ) -> None:
        self._panels = panels
        self._state = state
        self._metrics = metrics
        self._config = config
        app = web.Application(client_max_size=MAX_COMMAND_BYTES)
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._exposition)
        app.router.add_get("/metrics.json", self._data)
        app.router.add_get("/config", self._configuration)
        app.router.add_get("/state", self._show_all)
        app.router.add_get("/state/{name}", self._show)
        app.router.add_post("/state/{name}", self._act)
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=STOP_S
        )
        self._unix_path: Path | None = None

    async def start(self, address: str) -> None:
        """Listen on `host:port` or `unix:/path`. Raises OSError."""
        await self._runner.setup()
        site: web.BaseSite
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            remove_stale_socket(path)
            self._unix_path = path
            site = web.UnixSite(self._runner, str(path))
        else:
            host, _, port = address.rpartition(":")
            site = web.TCPSite(self._runner, host.strip("[]"), int(port))
        await site.start()

    @property
    def address(self) -> str | None:
        """Where it really listens, with the port the system chose for port 0; None: nowhere."""
        if self._unix_path is not None:
            return f"unix:{self._unix_path}"
        return shown_address(self._runner.addresses[0]) if self._runner.addresses else None

    async def stop(self) -> None:
        """Close the port and remove its socket file. Idempotent, works after half a start."""
        await self._runner.cleanup()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
            self._unix_path = None

    async def _livez(self, request: web.Request) -> web.Response:
        return _json({"status": "alive"})

    async def _readyz(self, request: web.Request) -> web.Response:
        state = await self._state()
        return _json({"status": state}, status=200 if state == "ready" else 503)

    async def _exposition(self, request: web.Request) -> web.Response:
        # Tens of milliseconds with many series: not on the loop.
        body, content_type = await asyncio.to_thread(
            exposition, await self._metrics(), request.headers.get("accept", "")
        )
        return web.Response(body=body, headers={"content-type": content_type})

    async def _data(self, request: web.Request) -> web.Response:
        return _json(await self._metrics())

    async def _configuration(self, request: web.Request) -> web.Response:
        return _json(await self._config(), indent=True)

    async def _show_all(self, request: web.Request) -> web.Response:
        return _json({"workers": await self._panels.show()}, indent=True)

    async def _show(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        shown = [each[name] for each in await self._panels.show() if name in each]
        if not shown:
            return _no_panel(name)
        return _json({"workers": shown}, indent=True)

    async def _act(self, request: web.Request) -> web.Response:
        # A browser asks before it sends JSON to another origin, and we allow none.
        if "origin" in request.headers or request.content_type != "application/json":
            text = "send a JSON object as application/json, and not from a web page"
            return _json({"error": text}, status=415)
        if not _is_of_this_machine(request):
            text = "commands are taken from this machine only: exec into the container"
            return _json({"error": text}, status=403)
        try:
            command = orjson.loads(await request.read())
        except orjson.JSONDecodeError:
            command = None
        if not isinstance(command, dict):
            return _json({"error": "the command must be a JSON object"}, status=400)
        name = request.match_info["name"]
        try:
            answers = await self._panels.act(name, command)
        except NoPanel:
            return _no_panel(name)
        except ValueError as error:
            return _json({"error": str(error)}, status=400)
        return _json({"workers": answers}, indent=True)


def _is_of_this_machine(request: web.Request) -> bool:
    """Whether it came over loopback or a unix socket: probes and scrapes come from elsewhere."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    if not isinstance(peer, tuple):
        return True
    address = ip_address(peer[0].partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _no_panel(name: str) -> web.Response:
    text = f'no filter of this configuration shows "{name[:100]}": GET /state lists what there is'
    return _json({"error": text}, status=404)


def _json(value: Any, *, status: int = 200, indent: bool = False) -> web.Response:
    option = orjson.OPT_INDENT_2 if indent else 0
    return web.Response(
        body=orjson.dumps(value, option=option, default=str),
        status=status,
        content_type="application/json",
        headers={"cache-control": "no-store"},
    )
