"""Calls that wait for the same answer, and the one upstream call that they share.

    member ◄─┐
    member ◄─┼── Flight ◄── the rest of the chain, on a call of its own ◄── upstream
    member ◄─┘

The upstream call is nobody's: it goes on until the last member has left. One member at a time pays
for it, the first at first; when it leaves before the end, the next one takes its place. Whoever
joins late gets what has come so far, then the rest as it comes. A member that reads slowly has its
part kept for it, up to a bound, and then is cut off: it never holds up the others.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from enum import Enum
from typing import Any, Protocol

from filters.algo.cache_key import refusal_key
from filters.algo.include_usage import MARK
from filters.stores.answers import is_kept
from sidecar.api import (
    CACHED,
    COMPLETED,
    LOST_USAGE,
    SIDE_CALLS,
    USAGE,
    Body,
    Call,
    CallError,
    CallNext,
    End,
    Event,
    Headers,
    Key,
    Kit,
    Outcome,
    Rejected,
    Reply,
    UpstreamError,
    end_of,
)

log = logging.getLogger(__name__)

DEADLINE = "deadline_exceeded"

SLACK_BYTES = 1024 * 1024
"""So much more than the longest recording may be kept for a member that reads slowly."""


OF_ATTEMPTS: tuple[Key[Any], ...] = (LOST_USAGE, SIDE_CALLS)
"""What whoever pays has to pay for besides the answer."""


class Recorded:
    """An answer as it comes."""

    __slots__ = ("encoding", "headers", "media_type", "pieces", "status", "times")

    def __init__(self, status: int, headers: Headers, media_type: str, encoding: str) -> None:
        self.status = status
        self.headers = headers
        self.media_type = media_type
        self.encoding = encoding
        self.pieces: list[bytes] = []
        self.times: list[float] = []
        """When each piece came, where that was asked for."""


class Room:
    """Bytes that all flights together may keep of answers that are still coming."""

    __slots__ = ("left",)

    def __init__(self, max_bytes: int) -> None:
        self.left = max_bytes


class State(Enum):
    WAITING = "waiting"  # nothing of an answer is here
    FLOWING = "flowing"  # its bytes are coming
    OVER = "over"  # all of it came, or it broke off, or nobody wants it


class Member:
    """One call of a flight, and the source of its body."""

    __slots__ = (
        "_backlog",
        "_backlog_bytes",
        "_body",
        "_end",
        "_is_paused",
        "begun",
        "call",
        "flight",
        "joined_at",
        "trailers",
    )

    def __init__(self, flight: Flight, call: Call, now: float) -> None:
        self.flight: Flight | None = flight
        self.call = call
        self.joined_at = now
        self.begun: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        self._body: Body | None = None
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._is_paused = False
        self.trailers: list[tuple[bytes, bytes]] = []
        self._end: CallError | bool = False  # True: all of it came; an error: it broke off

    def begin(self, reply: Reply | None) -> None:
        """Let whoever waits go on: with its reply, or, with None, by asking again."""
        if not self.begun.done():
            self.begun.set_result(reply)

    def refuse(self, error: BaseException) -> None:
        if not self.begun.done():
            self.begun.set_exception(error)
            self.begun.exception()  # so that nobody complains when its call is cancelled just now

    def open_body(self, recorded: Recorded, length: int | None) -> Body:
        self._body = body = Body(
            self, media_type=recorded.media_type, encoding=recorded.encoding, length=length
        )
        if recorded.pieces:
            self.feed(b"".join(recorded.pieces))
        return body

    # The flight feeds

    def feed(self, data: bytes) -> None:
        body = self._body
        if body is None:
            return
        if not self._is_paused and not self._backlog:
            body.feed(data)
            return
        self._backlog.append(data)
        self._backlog_bytes += len(data)
        if self.flight is not None and self._backlog_bytes > self.flight.max_backlog_bytes:
            self.flight.cut_off(self)

    def finish(self, error: CallError | None = None) -> None:
        """Nothing more comes; what is kept is still to be taken."""
        self._end = error or True
        if not self._backlog:
            self._close()

    def fail(self, error: CallError) -> None:
        """End now, whatever is kept."""
        self._backlog.clear()
        self._end = error
        self._close()

    def _close(self) -> None:
        body, self._body = self._body, None
        if body is None:
            return
        if isinstance(self._end, CallError):
            body.fail(self._end)
        else:
            body.trailers = self.trailers
            body.finish()

    # Source of its body

    def pause(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            if self.flight is not None:
                self.flight.paused(1)

    def resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            if self.flight is not None:
                self.flight.paused(-1)
        body, backlog = self._body, self._backlog
        while backlog and body is not None and not self._is_paused:
            data = backlog.popleft()
            self._backlog_bytes -= len(data)
            body.feed(data)
        if not backlog and self._end is not False:
            self._close()

    def abort(self) -> None:
        """Its body was given up: its client left, or a filter does not want it."""
        self._body = None
        self.leave()

    async def reply(self) -> Reply | None:
        """The member's own; None: ask again. Raises what the upstream call failed with. Cancelled,
        it leaves."""
        try:
            return await self.begun
        except BaseException:
            self.leave()  # before those outside look at what the call owes
            raise

    def leave(self) -> None:
        """It takes no more part; with the last one the upstream call ends. Idempotent."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        shared = flight.call
        flight.mark(self)
        is_over = shared.end is not None and shared.end.outcome is COMPLETED
        if is_over and flight.payer is self and USAGE in shared:
            self.call[USAGE] = shared[USAGE]  # its report may still be among what was kept
        self._backlog.clear()
        flight.left(self, self._is_paused)

    def ended(self, end: End) -> None:
        """A debt of its call."""
        self.leave()
        self.begun.cancel()

    def __repr__(self) -> str:
        return f"<Member {self.call.id} kept={self._backlog_bytes}>"


class Owner(Protocol):
    """Whose flights they are."""

    def landed(self, flight: Flight, recorded: Recorded) -> None:
        """All of the answer came."""
        ...

    def closed(self, flight: Flight) -> None:
        """Nobody can join any more. Called at least once."""
        ...


class Flight:
    """One upstream call and its members."""

    def __init__(
        self,
        call: Call,
        kit: Kit,
        owner: Owner,
        *,
        key: str,
        begun_after: int,
        room: Room,
        max_bytes: int,
        keeps_times: bool,
    ) -> None:
        self.key = key
        self.begun_after = begun_after
        """So many purges."""
        self.is_stream = call.is_stream
        self.call = call.fork()
        self.payer: Member | None = None
        self.members: dict[Member, None] = {}  # in the order in which they came
        self.max_backlog_bytes = max_bytes + SLACK_BYTES
        self.state = State.WAITING
        self._kit = kit
        self._now = kit.clock.monotonic
        self._room = room
        self._max_bytes = max_bytes
        self._keeps_times = keeps_times
        self._owner = owner  # not its methods: closures over us would be cycles
        self._recorded: Recorded | None = None
        self._size = 0
        self._length: int | None = None
        self._body: Body | None = None
        self._paused = 0  # members that take nothing for now
        self._is_recording = True
        self._is_paid = False
        self._task: asyncio.Task[None] | None = None

    def start(self, call_next: CallNext) -> None:
        """Ask, once the first member is there."""
        self._task = self._kit.tasks.start(self._run(call_next), name="flight")

    def join(self, call: Call) -> Member:
        """Another call for the same answer; it must be `ended` with its call."""
        if self.members:
            self.call.extend_deadline(call.deadline_at)
        member = Member(self, call, self._now())
        self.members[member] = None
        if self.payer is None:
            self.payer = member
        if self.state is State.FLOWING:
            member.begin(self._reply_for(member))
        return member

    # The upstream call

    async def _run(self, call_next: CallNext) -> None:
        try:
            reply = await call_next(self.call)
            self._came(reply)
        except BaseException as error:
            self._failed(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._task = None  # it holds the error, that this frame, and that us

    def _came(self, reply: Reply) -> None:
        call, body = self.call, reply.body
        call.status = reply.status
        if self.state is State.OVER:  # everybody left in this very turn
            reply.discard()
            call.finish(End(Outcome.CLIENT_GONE, reply.status))
            return
        if reply.status == 200:
            body.tap_events(self._read_usage, containing=MARK)
        whole = body.take() if body.is_whole else None
        self._recorded = recorded = Recorded(
            reply.status, reply.headers.copy(), body.media_type, body.encoding
        )
        if reply.status >= 400 and not self._keeps_its_own():
            reply.discard()
            call.finish(End(Outcome.DISCARDED, reply.status))
            return
        if whole is not None:
            recorded.pieces.append(whole)
            self._came_whole(recorded, whole)
        else:
            self._flows(body)

    def _keeps_its_own(self) -> bool:
        """A refusal is of the very request that was refused: others ask for themselves. Whether
        anybody is left."""
        self._owner.closed(self)
        refused = refusal_key("", self.call)
        for member in tuple(self.members):
            if refusal_key("", member.call) != refused:
                member.flight = None
                del self.members[member]
                member.begin(None)
        if not self.members:
            self._over()
            return False
        if self.payer not in self.members:  # the first one has left, and it was another's request
            self.payer = next(iter(self.members))
        return True

    def _failed(self, error: BaseException) -> None:
        end = end_of(error, self.call)
        members = self._over()
        if not isinstance(error, Exception):
            error = CallError(503, "shutting_down", "the sidecar is shutting down")
        is_deadline = isinstance(error, Rejected) and error.code == DEADLINE
        for member in members:
            if member.begun.done():  # it cannot raise it any more, nor say what it was
                log.error("flight_failed", exc_info=error)
                failure = CallError(500, "internal_error", "the sidecar failed; its log says why")
                member.fail(failure)
                continue
            self._tell(member)
            member.flight = None
            if is_deadline and member.call.time_left(self._now()) > 0:
                member.begin(None)
            else:
                member.refuse(error)
        self.call.finish(end)
        self.call.close_bodies()

    def _came_whole(self, recorded: Recorded, data: bytes) -> None:
        members = self._over()
        self.call.finish(End(Outcome.COMPLETED, recorded.status))
        usage = self.call.get(USAGE)
        for member in members:
            self._tell(member)
            self.mark(member)
            if usage is not None:
                member.call[USAGE] = usage
            member.flight = None
            body = Body.of(data, media_type=recorded.media_type)
            body.encoding = recorded.encoding
            member.begin(Reply(recorded.status, self._headers_for(member, recorded), body))
        self._land()

    def _headers_for(self, member: Member, recorded: Recorded) -> Headers:
        """What is true of whoever was answered is not said to those who share it."""
        if member is self.payer:
            return recorded.headers.copy()
        return Headers.of_raw([each for each in recorded.headers.raw() if is_kept(each[0])])

    def _land(self) -> None:
        recorded = self._recorded
        if not self._is_recording or recorded is None:
            return
        try:
            self._owner.landed(self, recorded)
        except Exception:  # those who wait must not notice
            log.exception("answer_not_kept")

    def _flows(self, body: Body) -> None:
        self.state = State.FLOWING
        self._body, self._length = body, body.length
        if body.length is not None and body.length > self._max_bytes:
            self._stop_recording()
        for member in self.members:
            member.begin(self._reply_for(member))
        body.attach(self)

    def _reply_for(self, member: Member) -> Reply:
        recorded = self._recorded
        assert recorded is not None
        self._tell(member)
        body = member.open_body(recorded, self._length)
        return Reply(recorded.status, self._headers_for(member, recorded), body)

    def _read_usage(self, event: Event) -> None:
        """For those inside, whose call this is; outside, each member's is read."""
        usage = self.call.dialect.usage(event, self.call.get(USAGE))
        if usage is not None:
            self.call[USAGE] = usage

    # Sink of its body

    def write(self, data: bytes) -> None:
        if self._is_recording:
            size = len(data)
            if self._size + size > self._max_bytes or size > self._room.left:
                self._stop_recording()
            else:
                self._size += size
                self._room.left -= size
                recorded = self._recorded
                assert recorded is not None
                recorded.pieces.append(data)
                if self._keeps_times:
                    recorded.times.append(self._now())
        members = self.members
        for member in tuple(members):
            member.feed(data)

    def finish(self) -> None:
        trailers = self._body.trailers if self._body is not None else []
        members = self._over()
        self.call.finish(End(Outcome.COMPLETED, self.call.status))
        for member in members:
            self.mark(member)  # before those outside look at a whole answer
            member.trailers = trailers
            member.finish()
        self._land()

    def fail(self, error: CallError) -> None:
        is_theirs = isinstance(error, UpstreamError)
        outcome = Outcome.UPSTREAM_FAILED if is_theirs else Outcome.ABORTED
        members = self._over()
        self.call.finish(End(outcome, self.call.status, error))
        for member in members:
            member.finish(error)

    # Members come and go

    def mark(self, member: Member) -> None:
        """Say on its call that it was given another one's answer, unless it pays. Of a refusal
        there is nothing to be paid."""
        if member is not self.payer and self.call.status < 400:
            member.call[CACHED] = "join"

    def paused(self, by: int) -> None:
        """One member more takes nothing, or one less: read on while anybody takes it."""
        self._paused += by
        body = self._body
        if body is not None:
            if self._paused >= len(self.members):
                body.pause()
            elif by < 0:
                body.resume()

    def cut_off(self, member: Member) -> None:
        """It holds more than may be kept for it."""
        message = "the answer was read too slowly beside others that share it"
        member.leave()
        member.fail(CallError(503, "slow_reader", message))

    def left(self, member: Member, was_paused: bool) -> None:
        """`member` has gone: another one pays, or there is nobody left to go on for."""
        if self.state is State.OVER:
            return
        members = self.members
        members.pop(member, None)
        if members:
            if member is self.payer:
                self.payer = next(iter(members))
                self.mark(member)
                if self._is_paid:
                    _pass_on(member.call, self.payer.call)
            self.paused(-1 if was_paused else 0)
            return
        self._pay(member.call)
        is_waiting, body = self.state is State.WAITING, self._body
        self._over()
        self.call.cancelled_as = Outcome.CLIENT_GONE
        if is_waiting:
            if self._task is not None:
                self._task.cancel()
        elif body is not None:
            body.abort(Outcome.CLIENT_GONE)
            self.call.finish(End(Outcome.CLIENT_GONE, self.call.status))

    def _tell(self, member: Member) -> None:
        """Leave on a member's call what is known of the shared one."""
        call, shared = member.call, self.call
        # Of a cache behind this one, which has it: what is said of that goes before our "miss".
        is_hit = member is self.payer and CACHED in shared
        if shared.reply_headers is not None:
            for name, value in shared.reply_headers.items():
                if is_hit or call.reply_headers is None or name not in call.reply_headers:
                    call.put_reply_field(name, value)
        call.target = shared.target
        if member is self.payer:
            self._pay(call)
        else:
            call.upstream_wait_s += self._now() - member.joined_at

    def _pay(self, call: Call) -> None:
        """What was asked for is this call's."""
        if self._is_paid:
            return
        self._is_paid = True
        shared = self.call
        call.attempts = shared.attempts
        call.target = shared.target
        call.held_s += shared.held_s
        call.upstream_wait_s += shared.upstream_wait_s
        for key in OF_ATTEMPTS:
            if key in shared:
                call[key] = shared[key]
        if CACHED in shared:
            call[CACHED] = shared[CACHED]
        if CACHED in shared and USAGE in shared:  # another cache behind us had it
            call[USAGE] = shared[USAGE]

    def _stop_recording(self) -> None:
        """It is too long to be kept: from here on it only passes, and nobody can join."""
        self._is_recording = False
        recorded = self._recorded
        if recorded is not None:
            recorded.pieces.clear()
            recorded.times.clear()
        self._give_room_back()
        self._owner.closed(self)

    def _over(self) -> list[Member]:
        """Nobody can join any more; who is there."""
        self.state = State.OVER
        self._give_room_back()
        self._owner.closed(self)
        self._body = None
        members, self.members = self.members, {}
        return list(members)

    def _give_room_back(self) -> None:
        self._room.left += self._size
        self._size = 0

    def __repr__(self) -> str:
        return f"<Flight {self.call.id} {self.state.name} members={len(self.members)}>"


def _pass_on(call: Call, other: Call) -> None:
    """The other one pays."""
    other.attempts, call.attempts = call.attempts, 0
    for key in OF_ATTEMPTS:
        fact = call.pop(key)
        if fact is not None:
            other[key] = fact
