"""Connections to one upstream, kept for the next call.

The one used last is used first (LIFO), so that under falling load the others grow old and go.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Awaitable, Callable

from sidecar.errors import Phase, Retry, UpstreamError
from sidecar.transport.connection import Connection
from sidecar.transport.deadlines import Deadlines

DOUBT_AFTER_S = 1.0
"""An idle connection older than this is asked whether the far side has closed it."""


class Pool:
    """At most `max_connections` open; a caller that finds none free waits for one, in order."""

    def __init__(
        self,
        connect: Callable[[Pool], Awaitable[Connection]],
        *,
        max_connections: int,
        idle_s: float,
    ) -> None:
        self._connect = connect
        self._max = max_connections
        self._idle_s = idle_s
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._connecting = 0
        self._waiters: deque[asyncio.Future[Connection | None]] = deque()
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self.deadlines = Deadlines(self._loop)

    @property
    def in_use(self) -> int:
        return len(self._open) - len(self._idle)

    def __repr__(self) -> str:
        return (
            f"<Pool open={len(self._open)} idle={len(self._idle)} connecting={self._connecting} "
            f"waiting={len(self._waiters)}>"
        )

    async def acquire(self, timeout_s: float) -> tuple[Connection, bool]:
        """A connection when none was idle, and whether it has served before.

        Raises `UpstreamError`.
        """
        phase = Phase.CONNECT
        has_waited = False
        try:
            async with asyncio.timeout(timeout_s):
                while not self._take_place():
                    phase = Phase.POOL
                    connection = await self._wait(is_first=has_waited)
                    if connection is None:
                        break
                    if connection.is_open:
                        return connection, True
                    has_waited = True  # it closed while it was handed over: no fault of ours
                phase = Phase.CONNECT
                return await self._open_one(), False
        except TimeoutError as error:
            code = "upstream_pool_timeout" if phase is Phase.POOL else "upstream_connect_timeout"
            message = (
                "no connection to the upstream became free in time"
                if phase is Phase.POOL
                else "the upstream did not accept a connection in time"
            )
            retry = Retry.ELSEWHERE if phase is Phase.POOL else Retry.SAME
            raise UpstreamError(phase, retry, code, message, status=504) from error

    def take_idle(self) -> Connection | None:
        """A connection that is free now, if there is one."""
        while self._idle:
            connection = self._idle.pop()
            idle_for_s = self._loop.time() - connection.idle_since
            if idle_for_s < DOUBT_AFTER_S or not self._is_stale(connection):
                return connection
            self._drop(connection)
        return None

    def _drop(self, connection: Connection) -> None:
        self._open.discard(connection)
        connection.abort()

    def _is_stale(self, connection: Connection) -> bool:
        """Whether the socket is readable though nothing is due: the far side closed it."""
        transport = connection.transport
        sock = transport.get_extra_info("socket") if transport is not None else None
        if sock is None:
            return True
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    # Places: one for each connection that is open or being opened

    @property
    def _is_full(self) -> bool:
        return len(self._open) + self._connecting >= self._max

    def _take_place(self) -> bool:
        """Take a place for `_open_one`, if there is one or an idle connection can make room."""
        if self._is_full and self._idle:  # only when a fresh one is wanted
            self._drop(self._idle.pop(0))
        if self._is_full:
            return False
        self._connecting += 1
        return True

    def _offer_places(self) -> None:
        """Give free places to those who wait: taken in their name, so that nobody overtakes."""
        while self._waiters and not self._is_full:
            if self._wake_one(None):
                self._connecting += 1

    async def _wait(self, *, is_first: bool) -> Connection | None:
        """Wait for a connection, or (None) for a place that is ours already."""
        waiter: asyncio.Future[Connection | None] = self._loop.create_future()
        if is_first:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                try:
                    self._waiters.remove(waiter)
                except ValueError:
                    pass  # passed over in the turn that cancelled it
            else:
                self._give_back(waiter.result())
            raise

    def _give_back(self, connection: Connection | None) -> None:
        if connection is None:
            self._connecting -= 1
            self._offer_places()
        elif connection.is_open:
            self.released(connection)

    async def _open_one(self) -> Connection:
        """Open a connection in a place that was taken."""
        connection = None
        try:
            connection = await self._connect(self)
            if connection.is_open:  # else it is closed again, and `closed` was told before
                self._open.add(connection)
            return connection
        finally:
            self._connecting -= 1
            self._offer_places()

    def _wake_one(self, connection: Connection | None) -> bool:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False

    # Owner of the connections

    def released(self, connection: Connection) -> None:
        if self._is_closed:
            connection.abort()
            return
        if self._waiters and self._wake_one(connection):
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._idle_s, self._sweep)

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._offer_places()

    def _sweep(self) -> None:
        """Close what was idle for too long; runs only while something is idle."""
        self._sweeper = None
        now = self._loop.time()
        old = [each for each in self._idle if now - each.idle_since >= self._idle_s - 0.001]
        for connection in old:
            self._idle.remove(connection)
            self._drop(connection)
        if self._idle:
            oldest = min(each.idle_since for each in self._idle)
            self._sweeper = self._loop.call_later(oldest + self._idle_s - now, self._sweep)

    def close(self) -> None:
        """Close idle connections now and the others when their exchange is over."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()
