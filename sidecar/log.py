"""Log lines: our own log as JSON on stderr, and lines of filters written off the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import orjson

FLUSH_AFTER_S = 0.05
MAX_WAITING_BYTES = 8 * 1024 * 1024

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: the event's name and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
        }
        for name, value in vars(record).items():
            if name not in _STANDARD:
                line[name] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def set_up(level: str) -> None:
    """Send the `sidecar` and `asyncio` loggers to stderr as JSON. Called once, by the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("sidecar").setLevel(level.upper())
    logging.getLogger("filters").setLevel(level.upper())


class Countable(Protocol):
    def inc(self, amount: float = 1.0) -> None: ...


class LineWriter:
    """Writes JSON lines to a file descriptor from a thread.

    `write` never blocks: lines are gathered for `FLUSH_AFTER_S` and handed over as one block; when
    the reader does not keep up, lines past `MAX_WAITING_BYTES` are dropped and counted.
    """

    def __init__(self, descriptor: int, dropped: Countable, *, owns: bool = False) -> None:
        self._descriptor = descriptor
        self._owns = owns
        self._dropped = dropped
        self._lines: list[bytes] = []
        self._waiting_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._blocks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @classmethod
    def to(cls, where: str, dropped: Countable) -> LineWriter | None:
        """A writer to `stdout`, `stderr` or a file's end; None for `off`. Raises OSError."""
        if where == "off":
            return None
        if where == "stdout":
            return cls(1, dropped)
        if where == "stderr":
            return cls(2, dropped)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return cls(os.open(where, flags, 0o640), dropped, owns=True)

    def write(self, fields: Mapping[str, Any]) -> None:
        line = orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
        if self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
            self._dropped.inc()
            return
        self._waiting_bytes += len(line)
        self._lines.append(line)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(FLUSH_AFTER_S, self._flush)

    def _flush(self) -> None:
        self._timer = None
        if not self._lines:
            return
        block = b"".join(self._lines)
        self._lines.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log lines", daemon=True)
            self._thread.start()
        self._blocks.put(block)

    def _run(self) -> None:
        while (block := self._blocks.get()) is not None:
            rest = memoryview(block)
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:
                self._dropped.inc(bytes(rest).count(b"\n"))
            self._waiting_bytes -= len(block)

    def close(self, *, timeout_s: float = 2.0) -> None:
        """Write what is waiting, as far as the reader takes it within `timeout_s`."""
        if self._timer is not None:
            self._timer.cancel()
        self._flush()
        if self._thread is not None:
            self._blocks.put(None)
            self._thread.join(timeout_s)
        if self._owns:
            os.close(self._descriptor)
