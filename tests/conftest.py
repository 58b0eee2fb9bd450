"""What every test gets: the product's event loop, and a failure for what it leaves behind."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvloop

CLEAN_WITHIN_S = 2.0


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Callable[[], Any]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> None:
    """Set up first, so looked at last: after the test's own fixtures have closed theirs."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("clean_loop")


@pytest.fixture
async def clean_loop() -> AsyncIterator[None]:
    """Fails the test when tasks still run or sockets are still open after it."""
    tasks_before, sockets_before = asyncio.all_tasks(), _open_sockets()
    yield
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + CLEAN_WITHIN_S
    while True:
        tasks = asyncio.all_tasks() - tasks_before - {asyncio.current_task()}
        sockets = _open_sockets() - sockets_before
        if not tasks and not sockets:
            return
        if loop.time() > give_up_at:
            pytest.fail(f"left behind: tasks {tasks or 'none'}, sockets {sockets or 'none'}")
        await asyncio.sleep(0.002)


def _open_sockets() -> set[str]:
    """Inodes of this process's sockets, but for the pair by which a loop hears of signals."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
            if not target.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as copy:
                if copy.family == socket.AF_UNIX and not copy.getsockname() and _peer(copy) == "":
                    continue
        except OSError:
            continue  # closed meanwhile, as the directory's own descriptor is
        found.add(target)
    return found


def _peer(sock: socket.socket) -> object:
    try:
        return sock.getpeername()
    except OSError:
        return None
