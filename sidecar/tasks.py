"""Background tasks that are named, kept, and awaited at shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Tasks:
    """A set of running tasks. One that fails is logged once; none is collected while it runs."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task_failed", extra={"task": task.get_name()}, exc_info=error)

    def __len__(self) -> int:
        return len(self._running)

    async def stop(self, *, timeout_s: float) -> None:
        """Let the tasks end by themselves for `timeout_s`, then cancel what still runs."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=timeout_s)
        left = set(self._running)
        for task in left:
            task.cancel()
        if left:
            await asyncio.gather(*left, return_exceptions=True)
