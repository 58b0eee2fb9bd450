"""Hot reload: a changed file, or SIGHUP, becomes a new snapshot; a wrong one changes nothing."""

from __future__ import annotations

import asyncio
import glob
import hashlib
import logging
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidecar.config import Bound, Config, bind, load_config, override
from sidecar.errors import ConfigError
from sidecar.server import Server

log = logging.getLogger(__name__)

WATCH_AFTER_S = 0.5
LOOK_AGAIN_S = 10.0
"""Files are compared that often though no change was reported: some file systems report none, and
neither does a symlink's target in another folder, or a secret that was missing."""
GATHER_MS = 400
STEP_MS = 200
"""Its thread wakes that often; each time costs an idle process a little."""
NEEDS_RESTART = (
    *("listen", "admin", "workers", "log"),
    *("http.keepalive_s", "http.max_head_bytes", "http.body_silence_s"),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """The files of a configuration and what they held."""

    files: frozenset[Path]
    teams: Path | None
    """The pattern of its team files."""
    digest: str

    @classmethod
    def now(cls, bound: Bound, path: Path) -> Seen:
        files = frozenset(bound.files)
        pattern = bound.config.teams
        teams = Path(glob.escape(str(path.parent))) / pattern if pattern is not None else None
        return cls(files, teams, digest(files | matching(teams)))

    def now_again(self) -> Seen:
        """The same files as they are now."""
        return replace(self, digest=digest(self.files | matching(self.teams)))

    @property
    def is_still_true(self) -> bool:
        return self.now_again().digest == self.digest


class Reloader:
    """Watches the directories of everything that was read.

    Directories, not files: a mounted ConfigMap changes by a renamed symlink beside them, and a
    watched file is lost at the first such change.
    """

    def __init__(self, path: Path, server: Server, overrides: Mapping[str, Any]) -> None:
        self._path = path
        self._server = server
        self._overrides = dict(overrides)
        self._seen = Seen.now(server.snapshot.bound, path)
        self._failure = ""
        """Why the files as they are do not become live; empty when they are."""
        self._asked = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        results = server.metrics.counter("llm_sidecar_reloads", "Reloads.", ("result",))
        self._ok, self._failed = results.child("ok"), results.child("failed")

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._asked.set)
        self._tasks = [
            loop.create_task(self._on_signal(), name="reload on SIGHUP"),
            loop.create_task(self._watch(), name="reload on change"),
        ]

    async def stop(self) -> None:
        """Look no more; a reload that is under way is given up. Idempotent."""
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _on_signal(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._failure = ""  # who asks gets an answer, although it may be the same
            await self.reload()

    async def _watch(self) -> None:
        await asyncio.sleep(WATCH_AFTER_S)  # after the start, which must be quick
        while True:
            try:
                await self._watch_folders()
            except Exception as error:  # no inotify left, a folder that has gone
                log.warning("watch_failed", extra={"reason": str(error)})
                await asyncio.sleep(LOOK_AGAIN_S)
                await self.reload_if_changed()

    async def _watch_folders(self) -> None:
        """Reload on changes, until other folders than now are to be watched."""
        watchfiles = await asyncio.to_thread(__import__, "watchfiles")
        folders = self._folders()
        changes = watchfiles.awatch(
            *folders,
            watch_filter=None,
            recursive=False,
            debounce=GATHER_MS,
            step=STEP_MS,
            rust_timeout=int(LOOK_AGAIN_S * 1000),
            yield_on_timeout=True,
        )
        try:
            while self._folders() == folders:
                told = asyncio.ensure_future(anext(changes))
                try:
                    await asyncio.sleep(0)  # it watches now; look at what changed before it did
                    await self.reload_if_changed()
                    await told
                finally:
                    told.cancel()
                    await asyncio.wait((told,))
        finally:
            await changes.aclose()

    def _folders(self) -> list[str]:
        return sorted({str(file.parent) for file in (*self._seen.files, self._path)})

    async def reload_if_changed(self) -> bool:
        """Reload when a file's content is another; whether a new configuration is live now."""
        if not self._failure and await asyncio.to_thread(lambda: self._seen.is_still_true):
            return False
        return await self.reload()

    async def reload(self) -> bool:
        """Load, check, build and swap. On any failure the running configuration stays.

        The same failure of unchanged files is reported and counted once.
        """
        async with self._one_at_a_time:
            if self._server.state != "ready":
                return False
            try:
                # In a thread: many files take long, and calls are running.
                bound, seen = await asyncio.to_thread(self._load)
                await self._server.reload(bound)
            except Exception as error:
                self._report_failure(error)
                return False
            self._seen, self._failure = seen, ""
        self._ok.inc()
        for warning in bound.warnings:
            log.warning("config_warning", extra={"problem": warning})
        restart = needs_restart(self._server.config, bound.config)
        log.info("reloaded", extra={"needs_restart": restart} if restart else {})
        return True

    def _load(self) -> tuple[Bound, Seen]:
        """The configuration as it is now. Raises ConfigError."""
        before = self._seen.now_again()
        bound = bind(override(load_config(self._path), self._overrides))
        seen = Seen.now(bound, self._path)
        if not before.is_still_true:  # written while we read: whatever was read, look again
            seen = replace(seen, digest="")
        return bound, seen

    def _report_failure(self, error: Exception) -> None:
        failure = f"{type(error).__name__}: {error}"
        if failure == self._failure:
            return
        self._failure = failure
        self._failed.inc()
        if isinstance(error, ConfigError):
            problems = [str(each) for each in error.problems]
            log.error("reload_failed", extra={"problems": problems})
        else:
            log.error("reload_failed", exc_info=error)


def needs_restart(running: Config, new: Config) -> list[str]:
    """The settings that differ and are read at the start only."""
    return [name for name in NEEDS_RESTART if _get(running, name) != _get(new, name)]


def _get(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def matching(pattern: Path | None) -> frozenset[Path]:
    """The files that match a path or glob."""
    return frozenset() if pattern is None else frozenset(map(Path, glob.glob(str(pattern))))


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
