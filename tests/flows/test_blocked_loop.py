"""The event loop is never blocked, and nothing is lost, while many calls run at the same time."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator

import pytest

from tests.support.flow import CHAT, Flow, Start, chat_body, chat_request, request

BLOCKED_S = 0.1
LOOK_S = 0.01
UPSTREAMS = ("up-openai", "up-anthropic")


class LoopWatch:
    """A thread that asks the loop for a sign of life, over and over, and keeps the longest wait.

    Time in which this process did not run at all is not counted: waiting is measured by the CPU
    time that the process used meanwhile, since the machine is shared.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.longest_s = 0.0
        self._loop = loop
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            alive = threading.Event()
            asked_at, used_s = time.monotonic(), time.process_time()
            self._loop.call_soon_threadsafe(alive.set)
            while not alive.wait(1) and not self._stop.is_set():
                pass
            waited_s = min(time.monotonic() - asked_at, time.process_time() - used_s)
            self.longest_s = max(self.longest_s, waited_s)
            self._stop.wait(LOOK_S)


@pytest.fixture
async def loop_watch() -> AsyncIterator[LoopWatch]:
    """Fails the test when its loop was blocked for longer than `BLOCKED_S`."""
    gc.collect()
    gc.freeze()  # as the product does after its start: what the test runner holds is not looked at
    watch = LoopWatch(asyncio.get_running_loop())
    watch.start()
    yield watch
    gc.unfreeze()
    # Joined in a thread of its own: the watch may just be waiting for this loop.
    await asyncio.to_thread(watch.stop)
    assert watch.longest_s < BLOCKED_S


async def test_the_watch_sees_a_blocked_loop() -> None:
    watch = LoopWatch(asyncio.get_running_loop())
    watch.start()
    await asyncio.sleep(0.02)
    until = time.process_time() + 2 * BLOCKED_S
    while time.process_time() < until:
        pass
    await asyncio.to_thread(watch.stop)
    assert watch.longest_s > BLOCKED_S


async def test_a_mixed_load_never_blocks_the_loop(flow: Flow, loop_watch: LoopWatch) -> None:
    large = chat_body(filler="f" * 1_000_000)

    async def talk(number: int) -> None:
        client = await flow.connect()
        for turn in range(4):
            match (number + turn) % 6:
                case 0:
                    data, status = chat_request(stream=True, x_mock_events="100"), 200
                case 1:
                    data, status = chat_request("claude", stream=True, x_mock_split="50"), 200
                case 2:
                    data, status = chat_request(x_mock_status="500"), 500
                case 3:
                    data, status = chat_request("none"), 404
                case 4:
                    data, status = chat_request("claude"), 200
                case _:
                    small = number % 20
                    data, status = request("POST", CHAT, chat_body() if small else large), 200
            answer = await client.call(data)
            assert (answer.status, answer.is_whole) == (status, True)
        client.leave()

    await asyncio.gather(*(talk(number) for number in range(100)))
    await flow.quiet()
    assert len(await flow.logged(400)) == 400


async def test_three_hundred_streams_at_once_are_complete_to_the_byte(start: Start) -> None:
    pools = ", ".join(f"{name}: {{pool: {{max_connections: 400}}}}" for name in UPSTREAMS)
    flow = await start(f"upstreams: {{{pools}}}")
    slowly = {"x_mock_events": "10", "x_mock_delay_ms": "70"}
    data, expected = {}, {}
    for model in ("gpt", "claude"):
        data[model] = chat_request(model, stream=True, **slowly)
        expected[model] = (
            await flow.call(chat_request(model, stream=True, x_mock_events="10"))
        ).body
    most = 0

    async def stream(model: str) -> None:
        nonlocal most
        client = await flow.connect()
        client.send(data[model])
        answer = await client.head()
        assert answer.status == 200
        most = max(most, flow.server.open_calls)
        await client._read_chunks(answer)
        assert b"".join(answer.pieces) == expected[model]
        client.leave()

    await asyncio.gather(*(stream("gpt" if number % 2 else "claude") for number in range(300)))
    assert most > 250  # the first may be over before the last has begun
    lines = await flow.logged(302)
    assert {line["outcome"] for line in lines} == {"completed"}
