"""The clients: a closed loop, an open loop with scheduled arrivals, and fleets of open streams.

Raw protocols on uvloop. Where time matters the loop spins instead of sleeping (its timers count
whole milliseconds): the core is ours and nothing else runs in this process. What is measured with
these, and how often, is `figures`.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import cast

from bench import wire
from bench.upstream import Upstream, UpstreamConnection

CONNECTS_AT_ONCE = 100
RUN_LIMIT_S = 60.0
SILENCE_LIMIT_S = 5.0

Address = tuple[str, int]


class RunFailed(Exception):
    """A run did not deliver what a figure needs; the message says what happened."""


class Client(asyncio.Protocol):
    """One keep-alive client connection with at most one call open."""

    def __init__(
        self, on_done: Callable[["Client"], None], on_lost: Callable[["Client"], None]
    ) -> None:
        self._on_done = on_done
        self._on_lost = on_lost
        self._transport: asyncio.Transport
        self.reader = wire.MessageReader()
        self.is_busy = False
        self.scheduled_at = 0.0
        self.first_byte_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes) -> None:
        self.is_busy = True
        self.first_byte_at = 0.0
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self.first_byte_at:
            self.first_byte_at = perf_counter()
        if self.reader.feed(data):
            self.is_busy = False
            self._on_done(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(self)

    def close(self) -> None:
        self._transport.close()


def spin(work: Callable[[float], bool]) -> asyncio.Future[None]:
    """Calls `work(now)` in every turn of the loop, without sleep, until it returns False."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def turn() -> None:
        if done.done():
            return
        try:
            goes_on = work(perf_counter())
        except Exception as error:
            done.set_exception(error)
            return
        if goes_on:
            loop.call_soon(turn)
        else:
            done.set_result(None)

    loop.call_soon(turn)
    return done


async def until(is_true: Callable[[], bool], limit_s: float) -> bool:
    """Looks every few milliseconds whether `is_true`, outside of anything timed."""
    deadline = perf_counter() + limit_s
    while True:
        if is_true():
            return True
        if perf_counter() > deadline:
            return False
        await asyncio.sleep(0.003)


@dataclass
class LoopResult:
    """What a loop of calls saw; times in seconds."""

    calls: int = 0
    failed: int = 0
    wall_s: float = 0.0
    first_byte_s: list[float] = field(default_factory=list)


async def _connect(
    address: Address,
    count: int,
    on_done: Callable[[Client], None],
    on_lost: Callable[[Client], None],
) -> list[Client]:
    loop = asyncio.get_running_loop()
    pairs = [
        await loop.create_connection(lambda: Client(on_done, on_lost), *address)
        for _ in range(count)
    ]
    return [client for _, client in pairs]


async def closed_loop(
    address: Address,
    requests: wire.RequestMaker,
    *,
    connections: int,
    calls: int | None = None,
    seconds: float | None = None,
    look: Callable[[wire.MessageReader], None] | None = None,
) -> LoopResult:
    """`connections` clients, each with its next call as soon as its last was answered.

    Ends after `calls` calls, or after `seconds`. A reply that is not 200 counts as failed. `look`
    sees every reply, whose head can still be read then.

    Raises RunFailed when a connection is lost or nothing more arrives.
    """
    result = LoopResult()
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    is_over = False
    sent = 0

    def next_call(client: Client) -> None:
        nonlocal sent
        if is_over or (calls is not None and sent >= calls):
            return
        sent += 1
        client.send(requests.make())

    def on_done(client: Client) -> None:
        result.calls += 1
        if client.reader.status != b"200":
            result.failed += 1
        if look is not None:
            look(client.reader)
        if result.calls == calls:
            finished.set_result(None)
        else:
            next_call(client)

    def on_lost(client: Client) -> None:
        if not is_over and not finished.done():
            finished.set_exception(RunFailed("the proxy closed a keep-alive connection"))

    clients = await _connect(address, connections, on_done, on_lost)
    started = perf_counter()
    for client in clients:
        next_call(client)
    try:
        if seconds is not None:
            done, _ = await asyncio.wait([finished], timeout=seconds)
            if done:
                finished.result()
        else:
            await asyncio.wait_for(finished, RUN_LIMIT_S)
        result.wall_s = perf_counter() - started
    except TimeoutError:
        raise RunFailed(
            f"{result.calls} of {calls} calls answered in {RUN_LIMIT_S:.0f} s"
        ) from None
    finally:
        is_over = True
        await _drain_and_close(clients)
    return result


async def _drain_and_close(clients: list[Client]) -> None:
    """Lets open calls end (briefly), so that no proxy logs or pays for clients that left."""
    await until(lambda: not any(client.is_busy for client in clients), limit_s=2.0)
    for client in clients:
        client.close()


async def open_loop(
    address: Address,
    requests: wire.RequestMaker,
    *,
    calls_per_s: float,
    seconds: float,
    connections: int = 64,
) -> LoopResult:
    """Calls that start at random times fixed beforehand, the same ones for every proxy.

    Arrivals are exponential with a mean of `calls_per_s`. The time to first byte counts from the
    scheduled moment, so a proxy that falls behind cannot hide it; a call that finds no free
    connection waits and its clock runs.
    """
    chance = random.Random(20240229)
    due: deque[float] = deque()
    at = 0.0
    while at < seconds:
        at += chance.expovariate(calls_per_s)
        due.append(at)
    total = len(due)
    result = LoopResult()
    idle: deque[Client] = deque()
    waiting: deque[float] = deque()
    is_over = False
    lost = 0

    def start(client: Client, scheduled_at: float) -> None:
        client.scheduled_at = scheduled_at
        client.send(requests.make())

    def on_done(client: Client) -> None:
        result.calls += 1
        if client.reader.status != b"200":
            result.failed += 1
        result.first_byte_s.append(client.first_byte_at - client.scheduled_at)
        if waiting:
            start(client, waiting.popleft())
        else:
            idle.append(client)

    def on_lost(client: Client) -> None:
        nonlocal lost
        lost += 1

    clients = await _connect(address, connections, on_done, on_lost)
    idle.extend(clients)
    began = perf_counter()

    def work(now: float) -> bool:
        if lost and not is_over:
            raise RunFailed("the proxy closed a keep-alive connection")
        elapsed = now - began
        while due and due[0] <= elapsed:
            scheduled_at = began + due.popleft()
            if idle:
                # The most recently used: a pool keeps few connections warm, not all of them.
                start(idle.pop(), scheduled_at)
            else:
                waiting.append(scheduled_at)
        if elapsed > seconds + RUN_LIMIT_S:
            raise RunFailed(f"{result.calls} of {total} calls answered")
        return result.calls < total

    try:
        await spin(work)
        result.wall_s = perf_counter() - began
    finally:
        is_over = True
        await _drain_and_close(clients)
    return result


class StreamClient(asyncio.Protocol):
    """A client connection that carries one stream and reports its bytes to its fleet."""

    __slots__ = ("_fleet", "_number", "_seen_bytes", "_transport", "is_complete", "reader")

    def __init__(self, fleet: "StreamFleet", number: int) -> None:
        self._fleet = fleet
        self._number = number
        self._seen_bytes = 0
        self.reader = wire.MessageReader()
        self.is_complete = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._fleet.requests.make_numbered(self._number))

    def data_received(self, data: bytes) -> None:
        fleet = self._fleet
        fleet.reads += 1
        if self.reader.feed(data):
            self.is_complete = True
            fleet.complete += 1
        body_bytes = self.reader.body_bytes
        if not self._seen_bytes and self.reader.status != b"200":
            fleet.lost += 1
        fleet.note_bytes(body_bytes - self._seen_bytes)
        self._seen_bytes = body_bytes

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_complete and not self._fleet.is_closing:
            self._fleet.lost += 1

    def close(self) -> None:
        self._transport.close()


class StreamFleet:
    """`size` streams through one proxy, both ends in hand."""

    def __init__(self, address: Address, upstream: Upstream, size: int) -> None:
        self._address = address
        self._upstream = upstream
        self._size = size
        self._target_bytes = 0
        self._reached = asyncio.Event()
        self.requests = wire.RequestMaker(b"stream", is_stream=True)
        self.clients: list[StreamClient] = []
        self.far_ends: list[UpstreamConnection] = []
        self.received_bytes = 0
        self.reads = 0
        self.complete = 0
        self.lost = 0
        self.is_closing = False

    def note_bytes(self, count: int) -> None:
        self.received_bytes += count
        if self.received_bytes >= self._target_bytes:
            self._reached.set()

    async def open(self) -> None:
        """Opens all streams and waits until each has delivered its first event."""
        loop = asyncio.get_running_loop()
        self._upstream.streams.clear()
        for first in range(0, self._size, CONNECTS_AT_ONCE):
            numbers = range(first, min(first + CONNECTS_AT_ONCE, self._size))
            pairs = await asyncio.gather(
                *(
                    loop.create_connection(partial(StreamClient, self, n), *self._address)
                    for n in numbers
                )
            )
            self.clients += [client for _, client in pairs]
            if not await self.wait_for_bytes(len(self.clients) * wire.EVENT_BYTES):
                break
        self.far_ends = list(self._upstream.streams.values())
        if self.lost or len(self.far_ends) < self._size:
            raise RunFailed(f"only {len(self.far_ends)} of {self._size} streams opened")

    async def wait_for_bytes(self, total: int) -> bool:
        """Waits until the fleet has received `total` body bytes; False after a long silence."""
        self._target_bytes = total
        while self.received_bytes < total:
            before = self.received_bytes
            self._reached.clear()
            try:
                await asyncio.wait_for(self._reached.wait(), SILENCE_LIMIT_S)
            except TimeoutError:
                if self.received_bytes == before:
                    return False
        return True

    async def send_paced(self, events_each: int, events_per_s: float) -> bool:
        """Sends events one by one at an even rate, in turn over all streams.

        Each is a write of its own, and each stream rests a whole turn between two of its events.
        Returns whether all of them arrived.
        """
        total = events_each * self._size
        far_ends, size = self.far_ends, self._size
        expected = self.received_bytes + total * wire.EVENT_BYTES
        began = perf_counter()
        sent = 0

        def work(now: float) -> bool:
            nonlocal sent
            due = min(total, int((now - began) * events_per_s))
            while sent < due:
                far_ends[sent % size].send_event()
                sent += 1
            return sent < total

        await spin(work)
        return await self.wait_for_bytes(expected)

    async def send_at_full_speed(self, events_each: int) -> bool:
        """Sends events as fast as this process can, in turn over all streams."""
        expected = self.received_bytes + events_each * self._size * wire.EVENT_BYTES
        for _ in range(events_each):
            for number, far_end in enumerate(self.far_ends):
                far_end.send_event()
                if number % 64 == 63:
                    await asyncio.sleep(0)
        return await self.wait_for_bytes(expected)

    async def finish(self) -> bool:
        """Ends all streams properly; returns whether every client saw the last byte."""
        tail_bytes = len(wire.LAST_EVENTS) + len(wire.DONE_EVENT)
        expected = self.received_bytes + self._size * tail_bytes
        for number, far_end in enumerate(self.far_ends):
            far_end.finish()
            if number % 64 == 63:
                await asyncio.sleep(0)
        has_all = await self.wait_for_bytes(expected)
        # The last body byte may come in a read before the one with the end of the chunks.
        return await until(lambda: self.complete == self._size, SILENCE_LIMIT_S) and has_all

    async def close(self) -> None:
        """Closes the clients and waits a moment until the far ends have noticed."""
        self.is_closing = True
        for client in self.clients:
            client.close()
        if self.complete < self._size:
            await until(lambda: all(far.closed_at for far in self.far_ends), SILENCE_LIMIT_S)
        self._upstream.streams.clear()


async def leave_midstream(address: Address, upstream: Upstream, *, times: int) -> list[float]:
    """Opens a stream, closes the client, and times how long the upstream's end stays open.

    Returns seconds, from the client's close to the upstream's end of file, one for each stream; a
    stream whose upstream is still open after a second counts as that second.
    """
    delays: list[float] = []
    loop = asyncio.get_running_loop()
    for _ in range(times):
        fleet = StreamFleet(address, upstream, 1)
        await fleet.open()
        fleet.is_closing = True
        far_end = fleet.far_ends[0]
        closed: asyncio.Future[None] = loop.create_future()
        far_end.on_closed = lambda closed=closed: closed.done() or closed.set_result(None)
        left_at = perf_counter()
        fleet.clients[0].close()
        try:
            await asyncio.wait_for(closed, 1.0)
        except TimeoutError:
            far_end.abort()
            delays.append(1.0)
        else:
            delays.append(far_end.closed_at - left_at)
    return delays
