"""Log lines: our own log as JSON on stderr, and lines of filters; both written by a thread."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import select
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import orjson

FLUSH_AFTER_S = 0.05
MAX_WAITING_BYTES = 8 * 1024 * 1024

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class BlockWriter:
    """Writes blocks of lines to a file descriptor from a thread, so that no caller ever waits.

    At most `MAX_WAITING_BYTES` wait for a slow reader. Each counter here has one writing thread:
    `+=` is not atomic.
    """

    def __init__(self, descriptor: int, *, owns: bool = False) -> None:
        self.lost_lines = 0
        """Lines that could not be written."""
        self._descriptor = descriptor
        self._owns = owns
        self._put_bytes = 0
        self._done_bytes = 0
        self._blocks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def waiting_bytes(self) -> int:
        return self._put_bytes - self._done_bytes

    def put(self, block: bytes) -> bool:
        """Hand over whole lines; False when they are refused, because too much waits."""
        if self._is_closed or self.waiting_bytes + len(block) > MAX_WAITING_BYTES:
            return False
        self._put_bytes += len(block)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log lines", daemon=True)
            self._thread.start()
        self._blocks.put(block)
        return True

    def _run(self) -> None:
        while (block := self._blocks.get()) is not None:
            rest = memoryview(block)
            try:
                while rest:
                    rest = rest[self._write(rest) :]
            except OSError:
                self.lost_lines += bytes(rest).count(b"\n")
            self._done_bytes += len(block)

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # whoever started us made the pipe non-blocking
            ready = select.poll()
            ready.register(self._descriptor, select.POLLOUT)
            ready.poll()
            return 0

    def close(self, *, timeout_s: float) -> None:
        """Write what waits, as far as the reader takes it within `timeout_s`. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._thread is not None:
            self._blocks.put(None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():  # it still holds the descriptor: leave it open
                return
        if self._owns:
            os.close(self._descriptor)


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
        return json_line(line).decode().rstrip("\n")


class JsonHandler(logging.Handler):
    """Our own log. Logging never blocks: not even while nobody reads stderr."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._writer = BlockWriter(descriptor)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.put(self.format(record).encode() + b"\n")
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Called at the interpreter's exit, through `logging.shutdown`."""
        self._writer.close(timeout_s=1.0)
        super().close()


def set_up(level: str) -> None:
    """Send all loggers to stderr as JSON, ours from `level` up. Called once, by the process."""
    root = logging.getLogger()
    root.handlers[:] = [JsonHandler(2)]
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
        self._writer = BlockWriter(descriptor, owns=owns)
        self._dropped = dropped
        self._counted_lost_lines = 0
        self._lines: list[bytes] = []
        self._line_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    @classmethod
    def to(cls, where: str, dropped: Countable) -> LineWriter | None:
        """A writer to `stdout`, `stderr` or a file's end; None for `off`. Raises OSError.

        A named pipe must have a reader by now.
        """
        if where == "off":
            return None
        if where == "stdout":
            return cls(1, dropped)
        if where == "stderr":
            return cls(2, dropped)
        # Non-blocking: opening a pipe that nobody reads would wait for ever.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        return cls(os.open(where, flags, 0o640), dropped, owns=True)

    def write(self, fields: Mapping[str, Any]) -> None:
        """Write `fields` as one line, soon. On the event loop."""
        line = json_line(fields)
        waiting_bytes = self._line_bytes + self._writer.waiting_bytes
        if self._is_closed or waiting_bytes + len(line) > MAX_WAITING_BYTES:
            self._dropped.inc()
            return
        self._line_bytes += len(line)
        self._lines.append(line)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(FLUSH_AFTER_S, self._flush)

    def _flush(self) -> None:
        self._timer = None
        lines, self._lines, self._line_bytes = self._lines, [], 0
        if lines and not self._writer.put(b"".join(lines)):
            self._dropped.inc(len(lines))
        self._count_lost()

    def _count_lost(self) -> None:
        """Counted here, on the loop: a counter belongs to one thread."""
        lost = self._writer.lost_lines
        if lost != self._counted_lost_lines:
            self._dropped.inc(lost - self._counted_lost_lines)
            self._counted_lost_lines = lost

    def close(self, *, timeout_s: float = 2.0) -> None:
        """Write what is waiting, as far as the reader takes it within `timeout_s`. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._flush()
        self._writer.close(timeout_s=timeout_s)
        self._count_lost()


def json_line(fields: Mapping[str, Any]) -> bytes:
    """`fields` as one line of JSON, whatever they hold: a log line must not fail."""
    try:
        return orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a lone surrogate, an integer past 64 bits, a key that is no string
        return json.dumps(fields, default=str, skipkeys=True).encode() + b"\n"
