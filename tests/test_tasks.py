"""Background tasks: kept, named, awaited."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from sidecar.tasks import Tasks


async def test_a_task_that_nobody_else_holds_is_not_collected() -> None:
    tasks, done = Tasks(), asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0)
        gc.collect()
        await asyncio.sleep(0)
        done.set()

    tasks.start(work(), name="work")
    await asyncio.wait_for(done.wait(), 5)
    await tasks.stop(timeout_s=1)
    assert len(tasks) == 0


async def test_a_failure_is_logged_once_with_the_task_s_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks = Tasks()

    async def fail() -> None:
        raise ValueError("no")

    tasks.start(fail(), name="settle")
    await tasks.stop(timeout_s=1)
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "task_failed")
    assert vars(record)["task"] == "settle"
    assert record.exc_info is not None


async def test_stop_lets_tasks_end_by_themselves() -> None:
    tasks, go = Tasks(), asyncio.Event()
    task = tasks.start(go.wait(), name="ends")
    asyncio.get_running_loop().call_soon(go.set)
    await tasks.stop(timeout_s=5)
    assert task.result() is True


async def test_stop_cancels_what_does_not_end_in_time_and_returns_when_it_has_ended() -> None:
    tasks, cleaned = Tasks(), []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    task = tasks.start(hang(), name="hangs")
    await asyncio.sleep(0)
    await tasks.stop(timeout_s=0)
    assert task.cancelled()
    assert cleaned == [True]


async def test_stop_without_tasks_returns_at_once() -> None:
    await Tasks().stop(timeout_s=1000)
