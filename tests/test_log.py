"""Log lines: whole, in order, never in the way of the event loop."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar import log
from sidecar.log import BlockWriter, JsonFormatter, JsonHandler, LineWriter
from sidecar.metrics import Counter


class Pipe:
    """A pipe that nobody reads unless told to."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)

    def read_lines(self, count: int) -> list[dict[str, Any]]:
        """The next `count` lines."""
        data = b""
        while data.count(b"\n") < count:
            data += os.read(self.reader, 1 << 16)
        return [json.loads(line) for line in data.splitlines()]

    def close(self) -> None:
        for descriptor in (self.reader, self.writer):
            try:
                os.close(descriptor)
            except OSError:
                pass


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


# Lines of filters


async def test_lines_come_out_whole_and_in_order(pipe: Pipe) -> None:
    dropped = Counter()
    writer = LineWriter(pipe.writer, dropped)
    for number in range(1000):
        writer.write({"event": "call", "number": number})
    lines = await asyncio.to_thread(pipe.read_lines, 1000)
    assert [line["number"] for line in lines] == list(range(1000))
    writer.close()
    assert dropped.value == 0


async def test_a_file_gets_lines_appended_and_a_close_writes_what_waits(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_text('{"old":1}\n')
    writer = LineWriter.to(str(path), Counter())
    assert writer is not None
    writer.write({"new": 2})
    writer.close()
    writer.close()  # idempotent
    assert path.read_text() == '{"old":1}\n{"new":2}\n'


async def test_off_writes_nowhere() -> None:
    assert LineWriter.to("off", Counter()) is None


async def test_a_named_pipe_that_nobody_reads_is_refused_and_not_waited_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "access.fifo"
    os.mkfifo(path)
    with pytest.raises(OSError, match="No such device"):
        LineWriter.to(str(path), Counter())


async def test_the_loop_turns_while_nobody_reads_and_lines_past_the_limit_are_counted(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "MAX_WAITING_BYTES", 20_000)
    dropped = Counter()
    writer = LineWriter(pipe.writer, dropped)
    line = {"text": "x" * 89}  # 101 bytes with the line end
    for _ in range(10):  # over several blocks, the first of which fills the pipe
        for _ in range(100):
            writer.write(line)
        await asyncio.sleep(log.FLUSH_AFTER_S / 10)  # a blocked loop would not come back
    assert 1000 - 20_000 // 101 - 4096 // 101 <= dropped.value + 1 <= 1000
    lines = await asyncio.to_thread(pipe.read_lines, 1000 - int(dropped.value))
    assert lines == [line] * (1000 - int(dropped.value))
    writer.write({"after": True})  # there is room again
    assert await asyncio.to_thread(pipe.read_lines, 1) == [{"after": True}]
    writer.close()


async def test_close_gives_a_stalled_reader_its_time_and_no_more(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer, Counter(), owns=True)
    writer.write({"text": "x" * 10_000})
    writer.close(timeout_s=0.05)
    os.fstat(pipe.writer)  # the stuck thread holds it: it must not be closed, and used for another
    writer.write({"late": True})
    assert len(await asyncio.to_thread(pipe.read_lines, 1)) == 1  # lets the thread end


async def test_a_line_written_after_the_end_is_counted_as_dropped(pipe: Pipe) -> None:
    dropped = Counter()
    writer = LineWriter(pipe.writer, dropped)
    writer.close()
    writer.write({"late": True})
    assert dropped.value == 1


async def test_lines_that_the_system_refuses_are_counted_as_dropped(pipe: Pipe) -> None:
    dropped = Counter()
    writer = LineWriter(pipe.writer, dropped)
    os.close(pipe.reader)
    writer.write({"number": 1})
    writer.write({"number": 2})
    writer.close()
    assert dropped.value == 2


async def test_a_pipe_that_was_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    dropped = Counter()
    writer = LineWriter(pipe.writer, dropped)
    line = {"text": "x" * 1000}
    for _ in range(50):
        writer.write(line)
    assert await asyncio.to_thread(pipe.read_lines, 50) == [line] * 50
    writer.close()
    assert dropped.value == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [("\ud800", "\ud800"), (2**70, 2**70), (Path("/a"), "/a")],
)
async def test_no_value_makes_a_line_fail(pipe: Pipe, value: object, shown: object) -> None:
    writer = LineWriter(pipe.writer, Counter())
    writer.write({"value": value})
    assert await asyncio.to_thread(pipe.read_lines, 1) == [{"value": shown}]
    writer.close()


# Our own log


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("sidecar.edge", logging.WARNING, "", 1, message, (), None)
    vars(made).update(extra)
    return made


def test_an_event_is_one_json_line_with_its_fields() -> None:
    line = JsonFormatter().format(record("calls_aborted", open_calls=3))
    shown = json.loads(line)
    assert "\n" not in line
    assert shown.pop("time") > 0
    assert shown == {
        "level": "warning",
        "event": "calls_aborted",
        "logger": "sidecar.edge",
        "open_calls": 3,
    }


def test_a_traceback_is_a_field_of_the_same_line() -> None:
    failed = record("call_failed")
    try:
        raise ValueError("canary")
    except ValueError:
        failed.exc_info = sys.exc_info()
    line = JsonFormatter().format(failed)
    assert "\n" not in line
    assert "ValueError: canary" in json.loads(line)["traceback"]


def test_logging_does_not_wait_for_a_reader_that_stalls(pipe: Pipe) -> None:
    handler = JsonHandler(pipe.writer)
    for number in range(500):  # far more than the pipe takes
        handler.emit(record("event", number=number))
    assert [line["number"] for line in pipe.read_lines(500)] == list(range(500))
    handler.close()


def test_the_levels_are_as_configured_and_foreign_loggers_speak_from_warning_up() -> None:
    loggers = [logging.getLogger(name) for name in ("", "sidecar", "filters")]
    before = [(each.level, list(each.handlers)) for each in loggers]
    try:
        log.set_up("debug")
        assert logging.getLogger("sidecar.edge").isEnabledFor(logging.DEBUG)
        assert logging.getLogger("filters.sign").isEnabledFor(logging.DEBUG)
        assert not logging.getLogger("aiohttp").isEnabledFor(logging.INFO)
        assert logging.getLogger("aiohttp").isEnabledFor(logging.WARNING)
        for handler in loggers[0].handlers:
            handler.close()
    finally:
        for each, (level, handlers) in zip(loggers, before, strict=True):
            each.setLevel(level)
            each.handlers[:] = handlers


def test_a_closed_writer_refuses_and_leaves_no_thread(pipe: Pipe) -> None:
    writer = BlockWriter(pipe.writer)
    assert writer.put(b"{}\n")
    writer.close(timeout_s=5)
    assert not writer.put(b"{}\n")
    assert os.read(pipe.reader, 100) == b"{}\n"
    assert "log lines" not in [thread.name for thread in threading.enumerate()]
