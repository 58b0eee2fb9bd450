"""The admin port: health, metrics, effective configuration. Never the data port."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from sidecar.listen import remove_stale_socket, shown_address
from sidecar.metrics import FamilySnapshot, exposition

State = Callable[[], Awaitable[str]]
"""`ready`, or why not: `starting`, `draining`."""

STOP_S = 0.5
"""At the end, a scrape that is under way may take so long."""


class Admin:
    """An aiohttp application on its own address.

    GET `/livez` (the event loop turns), `/readyz` (calls are served; says nothing about upstreams),
    `/metrics` (Prometheus text or OpenMetrics), `/metrics.json` (the same as data, for adding up),
    `/config` (as loaded, secrets as `***`).
    """

    def __init__(
        self,
        *,
        state: State,
        metrics: Callable[[], Awaitable[list[FamilySnapshot]]],
        config: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        self._state = state
        self._metrics = metrics
        self._config = config
        app = web.Application()
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._exposition)
        app.router.add_get("/metrics.json", self._data)
        app.router.add_get("/config", self._configuration)
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


def _json(value: Any, *, status: int = 200, indent: bool = False) -> web.Response:
    option = orjson.OPT_INDENT_2 if indent else 0
    return web.Response(
        body=orjson.dumps(value, option=option, default=str),
        status=status,
        content_type="application/json",
        headers={"cache-control": "no-store"},
    )
