"""The callers: an open loop of numbered calls, each judged by what came back for it.

Raw protocols, as in `bench`: callers, providers and sidecars share two cores here, and what the
callers take, the others do not have. A call starts at a time fixed beforehand, whatever became of
those before it, and nobody here tries again. A few leave, before the first byte or in mid-stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from time import monotonic
from typing import cast

import orjson

from bench.wire import MessageReader
from drill.plan import KINDS, LEAVING_SHARE, MAX_TOKENS, STREAMS, TEAMS, Kind, Plan, team_key
from drill.providers import NUMBER_HEADER

GRACE_S = 1.0
"""A call may end so long after its deadline."""

SHORTEST_SLEEP_S = 0.002
"""Calls that are due within so long start together."""

LEAVES_WITHIN_S = 1.0
"""Who leaves before the first byte does so within this time."""

LEAVES_WITHIN_PIECES = 9
"""Who leaves in mid-stream has had at most so many, which is nearly all: the usage comes late."""

SLOW_HEAD = b"\r\nx-mock-first-delay-ms: 2000"
"""Keeps an answer from those who will leave before it."""

SLOW_EVENTS = b"\r\nx-mock-delay-ms: 100"
"""Before each event: who leaves after one is gone before the provider tells more, so that what it
told is what the sidecar heard."""

Address = tuple[str, int]


class Ending(StrEnum):
    """What a caller got."""

    FULL = "answered in full"
    ERROR = "a clear error"  # an envelope of its dialect, whole
    BROKEN = "broken off, and said so"  # an error event in a stream, a JSON body that is not whole
    UNCLEAR = "neither an answer nor a clear error"
    LOST = "connection lost before the head"
    HUNG = "nothing in time"
    LEFT = "left"  # the caller, before all was there


@dataclass(slots=True)
class CallRecord:
    """One call. Times are those of `time.monotonic`."""

    number: int
    kind: Kind
    team: str
    due_at: float
    sent_at: float = 0.0
    first_byte_at: float = 0.0
    done_at: float = 0.0
    status: int = 0
    ending: Ending = Ending.HUNG
    code: str = ""  # of the error
    retry_after: str = ""  # as the head says it
    leaves_after_s: float | None = None  # unless a byte came; None: stays
    leaves_after_pieces: int | None = None  # of what came; None: stays

    @property
    def left_early(self) -> bool:
        """Whether the caller left before the first byte; the sidecar may not have seen the call."""
        return self.ending is Ending.LEFT and not self.first_byte_at

    @property
    def is_refused(self) -> bool:
        """Whether a limit of calls at once refused it."""
        return self.code == "concurrency_limited"


class Connection(asyncio.Protocol):
    """One connection to a sidecar, with at most one call open."""

    def __init__(self, callers: Callers, idle: list[Connection]) -> None:
        self._callers = callers
        self._idle = idle
        self._transport: asyncio.Transport | None = None
        self._reader = MessageReader()
        self._pieces: list[bytes] = []
        self.call: CallRecord | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._callers.connections.add(self)

    def send(self, call: CallRecord, request: bytes) -> None:
        """Send a call's request; the connection is idle."""
        assert self._transport is not None
        self.call = call
        call.sent_at = monotonic()
        self._transport.write(request)
        if call.leaves_after_s is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(call.leaves_after_s, self._leave_without_answer, call)

    def data_received(self, data: bytes) -> None:
        call = self.call
        if call is None:
            self.close()  # nothing is due: an answer too much would spoil the next call's
            self._callers.stray_bytes += len(data)
            return
        if not call.first_byte_at:
            call.first_byte_at = monotonic()
        self._pieces.append(data)
        if self._reader.feed(data):
            self._end(is_whole=True)
            if b"\r\nconnection: close" not in self._reader.head:
                self._idle.append(self)
        elif call.leaves_after_pieces is not None and len(self._pieces) >= call.leaves_after_pieces:
            self._leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self._callers.connections.discard(self)
        if self in self._idle:
            self._idle.remove(self)
        if self.call is not None:
            self._end(is_whole=False)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _leave_without_answer(self, call: CallRecord) -> None:
        if self.call is call and not call.first_byte_at:
            self._leave()

    def _leave(self) -> None:
        call, self.call = self.call, None
        assert call is not None
        call.done_at, call.ending = monotonic(), Ending.LEFT
        self.close()
        self._callers.ended(call)

    def _end(self, *, is_whole: bool) -> None:
        call, self.call = self.call, None
        assert call is not None
        call.done_at = monotonic()
        judge(call, b"".join(self._pieces), is_whole=is_whole)
        self._pieces.clear()
        self._callers.ended(call)


class Callers:
    """All calls of a drill, over as many connections as it takes, in turn to each sidecar."""

    def __init__(self, plan: Plan, addresses: Sequence[Address]) -> None:
        self._plan = plan
        self._addresses = addresses
        self._idle: list[list[Connection]] = [[] for _ in addresses]
        self._opening: set[asyncio.Task[None]] = set()
        self._open_calls = 0
        self._all_ended = asyncio.Event()
        self.connections: set[Connection] = set()
        self.calls: list[CallRecord] = []
        self.stray_bytes = 0
        self._requests = {
            (kind, team): _request_around_number(kind, team, plan.deadline_s)
            for kind in KINDS
            for team in TEAMS
        }

    async def run(self) -> None:
        """Make every call at its time, and wait until each has ended or ought to have."""
        plan, chance = self._plan, Random(self._plan.seed)
        began, due_s = monotonic(), 0.0
        due: deque[CallRecord] = deque()
        while (due_s := due_s + chance.expovariate(plan.rate)) < plan.seconds:
            due.append(_draw(chance, len(due), began + due_s))
        self.calls = list(due)
        while due:
            wait_s = due[0].due_at - monotonic()
            if wait_s > 0:
                await asyncio.sleep(max(wait_s, SHORTEST_SLEEP_S))
            now = monotonic()
            while due and due[0].due_at <= now:
                self._start(due.popleft())
        try:
            async with asyncio.timeout(plan.deadline_s + GRACE_S):
                while self._open_calls:
                    self._all_ended.clear()
                    await self._all_ended.wait()
        except TimeoutError:
            pass  # those that are left have hung, and are counted as such
        await self.close()

    async def close(self) -> None:
        """Leave; calls that are still open stay HUNG."""
        for task in self._opening:
            task.cancel()
        for connection in [*self.connections]:
            connection.call = None
            connection.close()
        await asyncio.gather(*self._opening, return_exceptions=True)

    def ended(self, call: CallRecord) -> None:
        self._open_calls -= 1
        if not self._open_calls:
            self._all_ended.set()

    def _start(self, call: CallRecord) -> None:
        self._open_calls += 1
        index = call.number % len(self._addresses)
        before, after = self._requests[call.kind, call.team]
        slow = b""
        if call.leaves_after_s is not None:
            slow = SLOW_HEAD
        elif call.leaves_after_pieces is not None:
            slow = SLOW_EVENTS
        request = b"%b%d%b%b" % (before, call.number, slow, after)
        idle = self._idle[index]
        if idle:
            idle.pop().send(call, request)  # the most recently used one: few stay busy
            return
        task = asyncio.get_running_loop().create_task(self._open(index, call, request))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, index: int, call: CallRecord, request: bytes) -> None:
        loop, address = asyncio.get_running_loop(), self._addresses[index]
        call.sent_at = monotonic()
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(self, self._idle[index]), *address
            )
        except OSError:
            call.ending, call.done_at = Ending.LOST, monotonic()
            self.ended(call)
            return
        connection.send(call, request)


def _draw(chance: Random, number: int, due_at: float) -> CallRecord:
    """The next call. Who will leave in mid-stream asks for a stream: a JSON body has no middle."""
    draw = chance.random()
    leaves_early = draw < LEAVING_SHARE / 2
    leaves_midway = not leaves_early and draw < LEAVING_SHARE
    kinds = STREAMS if leaves_midway else KINDS
    (kind,) = chance.choices(kinds, [kind.share for kind in kinds])
    call = CallRecord(number, kind, chance.choice([*TEAMS]), due_at)
    if leaves_early:
        # Half of them in a sixty-fourth of the time: it is then that limits are asked.
        call.leaves_after_s = LEAVES_WITHIN_S * chance.random() ** 6
    elif leaves_midway:
        call.leaves_after_pieces = chance.randint(1, LEAVES_WITHIN_PIECES)
    return call


def _request_around_number(kind: Kind, team: str, deadline_s: float) -> tuple[bytes, bytes]:
    """A request in two parts, between which the call's number goes."""
    body: dict[str, object] = {
        "model": kind.model,
        "stream": kind.is_stream,
        "max_tokens": MAX_TOKENS,
        "messages": [{"role": "user", "content": " ".join(["word"] * kind.words)}],
    }
    path, key = "/v1/messages", f"x-api-key: {team_key(team)}"
    if kind.dialect == "openai":
        path, key = "/v1/chat/completions", f"authorization: Bearer {team_key(team)}"
        if kind.is_stream:
            body["stream_options"] = {"include_usage": True}
    data = orjson.dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: drill\r\n{key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\nx-request-timeout: {deadline_s:g}\r\n{NUMBER_HEADER}: "
    )
    return head.encode(), b"\r\n\r\n" + data


# Judging an answer...


def judge(call: CallRecord, data: bytes, *, is_whole: bool) -> None:
    """Say of a call what its caller got; `data` is all that came, head and framing included."""
    head, has_head, rest = data.partition(b"\r\n\r\n")
    if not has_head:
        call.ending = Ending.LOST
        return
    call.status = int(head[9:12])
    lower = head.lower()
    _, _, after_name = lower.partition(b"\r\nretry-after:")
    call.retry_after = after_name.partition(b"\r\n")[0].strip().decode()
    body = _unchunked(rest) if b"\r\ntransfer-encoding: chunked" in lower else rest
    if b"\r\ncontent-type: text/event-stream" in lower:
        call.ending, call.code = _judge_stream(call.kind, body, is_whole=is_whole)
    elif not is_whole:
        # Nothing can be said within a JSON body: that it is not whole says it.
        call.ending = Ending.BROKEN if call.status == 200 else Ending.UNCLEAR
    else:
        call.ending, call.code = _judge_json(call.kind, call.status, body)


def _judge_json(kind: Kind, status: int, body: bytes) -> tuple[Ending, str]:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return Ending.UNCLEAR, ""
    if status == 200:
        has_answer = bool(data.get("choices" if kind.dialect == "openai" else "content"))
        return (Ending.FULL if has_answer and data.get("usage") else Ending.UNCLEAR), ""
    return (Ending.ERROR, code) if (code := _error_code(kind, data)) else (Ending.UNCLEAR, "")


def _judge_stream(kind: Kind, body: bytes, *, is_whole: bool) -> tuple[Ending, str]:
    last = b"data: [DONE]\n\n" if kind.dialect == "openai" else b'data: {"type":"message_stop"}\n\n'
    if is_whole and body.endswith(last):
        return Ending.FULL, ""
    event = body.removesuffix(b"\n\n").rpartition(b"\n\n")[2]
    _, has_data, text = event.rpartition(b"data: ")
    if not (has_data and body.endswith(b"\n\n")):
        return Ending.UNCLEAR, ""
    if kind.dialect == "anthropic" and not event.startswith(b"event: error\n"):
        return Ending.UNCLEAR, ""
    try:
        code = _error_code(kind, orjson.loads(text))
    except orjson.JSONDecodeError:
        code = ""
    return (Ending.BROKEN, code) if code else (Ending.UNCLEAR, "")


def _error_code(kind: Kind, data: object) -> str:
    """The code (or type) of an error in the envelope that the dialect's SDK expects; else ""."""
    if not isinstance(data, dict) or not isinstance(error := data.get("error"), dict):
        return ""
    if kind.dialect == "anthropic" and data.get("type") != "error":
        return ""
    if not error.get("type") or not error.get("message"):
        return ""
    return str(error.get("code") or error["type"])


def _unchunked(data: bytes) -> bytes:
    """A chunked body without its framing, as far as it came."""
    parts: list[bytes] = []
    position = 0
    while True:
        end = data.find(b"\r\n", position)
        if end < 0 or not (size := int(data[position:end], 16)):
            return b"".join(parts)
        parts.append(data[end + 2 : end + 2 + size])
        position = end + 2 + size + 2
