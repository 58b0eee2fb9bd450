"""Hot reload: a changed file, or SIGHUP, becomes a new snapshot; a wrong one changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sidecar.config import Config, bind, load_config, override
from sidecar.errors import ConfigError
from sidecar.server import Server

log = logging.getLogger(__name__)

WATCH_AFTER_S = 0.5
NEEDS_RESTART = ("listen", "admin", "workers", "log")


class Reloader:
    """Watches the directories of everything that was read.

    Directories, not files: a mounted ConfigMap changes by a renamed symlink beside them, and a
    watched file is lost at the first such change.
    """

    def __init__(self, path: Path, server: Server, overrides: Mapping[str, Any]) -> None:
        self._path = path
        self._server = server
        self._overrides = dict(overrides)
        self._digest = digest(server.snapshot.bound.files)
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        results = server.metrics.counter("llm_sidecar_reloads", "Reloads.", ("result",))
        self._ok, self._failed = results.child("ok"), results.child("failed")

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._asked.set)
        self._task = loop.create_task(self._run(), name="reload")

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        signalled = asyncio.ensure_future(self._on_signal())
        try:
            await asyncio.sleep(WATCH_AFTER_S)  # after the start, which must be quick
            watchfiles = await asyncio.to_thread(__import__, "watchfiles")
            while True:
                files = self._server.snapshot.bound.files
                folders = sorted({str(file.parent) for file in files} | {str(self._path.parent)})
                async for _ in watchfiles.awatch(*folders, recursive=False, step=50, debounce=400):
                    await self.reload_if_changed()
                    if self._server.snapshot.bound.files != files:
                        break
        finally:
            signalled.cancel()

    async def _on_signal(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self.reload()

    async def reload_if_changed(self) -> bool:
        """Reload when a file's content is another; whether the new configuration is live."""
        try:
            files = load_config(self._path).files
        except ConfigError:
            files = (self._path,)  # let reload() report it
        if digest((*files, *self._server.snapshot.bound.files)) == self._digest:
            return False
        return await self.reload()

    async def reload(self) -> bool:
        """Load, check, build and swap. On any failure the running configuration stays."""
        try:
            bound = bind(override(load_config(self._path), self._overrides))
            await self._server.reload(bound)
        except ConfigError as error:
            self._failed.inc()
            log.error("reload_failed", extra={"problems": [str(each) for each in error.problems]})
            return False
        except Exception:
            self._failed.inc()
            log.exception("reload_failed")
            return False
        self._digest = digest(bound.files)
        self._ok.inc()
        restart = needs_restart(self._server.config, bound.config)
        log.info("reloaded", extra={"needs_restart": restart} if restart else {})
        return True


def needs_restart(running: Config, new: Config) -> list[str]:
    """The settings that differ and are read at the start only."""
    return [name for name in NEEDS_RESTART if getattr(running, name) != getattr(new, name)]


def digest(files: Iterable[Path]) -> str:
    """One digest of the files' names and contents; a missing one counts as such."""
    total = hashlib.sha256()
    for file in sorted(set(files)):
        total.update(str(file).encode() + b"\0")
        try:
            total.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError:
            total.update(b"missing")
    return total.hexdigest()
