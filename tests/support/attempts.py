"""Attempts without an edge: real calls and attempts, a sink that keeps what it gets, an upload."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic

from multidict import CIMultiDict

from sidecar.call import Attempt, Call, Target, Timeouts, Upload
from sidecar.dialects.endpoint import PASS_THROUGH
from sidecar.errors import CallError
from sidecar.headers import Headers
from sidecar.reply import Body, Reply
from sidecar.tasks import Tasks
from sidecar.team import Patterns, Team
from sidecar.transport.upstream import LiveUpstream
from tests.support.upstream import RawConnection

EMPTY_POOL = "<Pool open=0 idle=0 connecting=0 waiting=0>"

TEAM = Team("tests", "normal", Patterns(["*"]), frozenset({"raw"}))


def make_call(upstream: LiveUpstream, method: str = "POST", path: str = "/v1/answers") -> Call:
    return Call(
        call_id="call-1",
        tasks=Tasks(),
        method=method,
        path=path,
        query="",
        headers=CIMultiDict(),
        raw_headers=(),
        team=TEAM,
        dialect=upstream.dialect,
        endpoint=PASS_THROUGH,
        received_at=monotonic(),
    )


def make_attempt(
    upstream: LiveUpstream,
    method: str = "POST",
    path: str = "/v1/answers",
    *,
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    upload: Upload | None = None,
    timeouts: Timeouts | None = None,
) -> Attempt:
    """The first attempt of a new call at `upstream`."""
    return Attempt(
        make_call(upstream, method, path),
        Target(upstream),
        number=1,
        path=path,
        headers=Headers(headers),
        body=body,
        upload=upload,
        timeouts=timeouts or upstream.timeouts,
        started_at=monotonic(),
    )


class Exchange:
    """One attempt under way, and the connection on which its request arrived."""

    def __init__(self, reply: asyncio.Task[Reply], connection: RawConnection, request: bytes):
        self.reply = reply
        self.connection = connection
        self.request = request


Begin = Callable[..., Awaitable[Exchange]]
OpenUpstream = Callable[..., LiveUpstream]


class ListSink:
    """Takes a body's pieces, and pauses it when told to."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.error: CallError | None = None
        self.is_finished = False
        self._changed = asyncio.Event()

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)

    def write(self, data: bytes) -> None:
        self.pieces.append(data)
        self._changed.set()

    def finish(self) -> None:
        assert not self.is_over
        self.is_finished = True
        self._changed.set()

    def fail(self, error: CallError) -> None:
        assert not self.is_over
        self.error = error
        self._changed.set()

    @property
    def is_over(self) -> bool:
        return self.is_finished or self.error is not None

    async def until(self, condition: Callable[[], bool], *, within_s: float = 5.0) -> None:
        """Wait for bytes or an end that make `condition` true."""
        async with asyncio.timeout(within_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def over(self) -> None:
        await self.until(lambda: self.is_over)


def attached(body: Body) -> ListSink:
    """A sink that takes `body` from here on."""
    sink = ListSink()
    body.attach(sink)
    return sink


async def whole(reply: Reply) -> bytes:
    """The body in full. Raises what it broke off with."""
    sink = attached(reply.body)
    await sink.over()
    if sink.error is not None:
        raise sink.error
    return sink.data


class ScriptedUpload:
    """A request body whose pieces the test hands out one by one; `b""` ends it."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self.taken = 0
        for piece in pieces:
            self.give(piece)

    def give(self, piece: bytes | Exception) -> None:
        self._pieces.put_nowait(piece)

    async def readany(self) -> bytes:
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        self.taken += len(piece)
        return piece


async def until(condition: Callable[[], bool], *, within_s: float = 5.0) -> None:
    """Let the loop turn until `condition` holds; for states that tell nobody."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + within_s
    while not condition():
        assert loop.time() < give_up_at, "waited in vain"
        await asyncio.sleep(0.001)
