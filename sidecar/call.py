"""A call and its attempts: what is known of them, and what is owed when they end.

call      one client request, from first byte in to last byte out
attempt   one try of a call against one upstream
debt      something owed at the end of either: a slot to free, a circuit to feed, a row to write
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar, overload

import orjson
from multidict import MultiMapping

from sidecar.errors import CallError, Phase, Rejected, Retry, UpstreamError, forget_frames
from sidecar.headers import Headers, field
from sidecar.tasks import Tasks

if TYPE_CHECKING:
    from sidecar.dialects import Dialect, Endpoint
    from sidecar.reply import Body
    from sidecar.team import Team

log = logging.getLogger(__name__)

T = TypeVar("T")
D = TypeVar("D")

SETTLE_TIMEOUT_S = 10.0

TIMEOUT_HEADER = "x-request-timeout"
LONGEST_TIMEOUT_S = 3600.0
"""Nobody holds a place in a queue for longer, whatever it says."""
SDK_TIMEOUT_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
"""How long the official SDKs of OpenAI and Anthropic wait for the first byte, in seconds."""
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?").fullmatch

CLIENT_KEYS = frozenset({b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key"})
"""Headers with a client's credentials; they are for us."""

REPEATABLE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
"""Idempotent ones (RFC 9110, 9.2.2): what they ask for may be asked for again, answered or not."""
BODILESS_METHODS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS", "TRACE"})
"""A request by these says nothing of its body when it has none."""


class Outcome(StrEnum):
    """How a call or an attempt was over."""

    COMPLETED = "completed"  # the answer was passed on in full, whatever its status
    UPSTREAM_FAILED = "upstream_failed"  # no answer, or one that broke off
    CLIENT_GONE = "client_gone"  # the client left first
    REJECTED = "rejected"  # refused by us, before an upstream was asked
    DISCARDED = "discarded"  # an answer, or a try, that a filter did not want any more
    ABORTED = "aborted"  # stopped by us: shutdown, or a mistake of our own


COMPLETED = Outcome.COMPLETED
"""By this name it is had in a tenth of the time: an enum of Python 3.11 calls a function."""


class End:
    """The end of a call or an attempt; `status` is the HTTP status seen, 0 when there was none."""

    __slots__ = ("error", "outcome", "status")

    def __init__(self, outcome: Outcome, status: int = 0, error: BaseException | None = None):
        self.outcome = outcome
        self.status = status
        self.error = error

    @property
    def upstream_fault(self) -> bool:
        """Whether the upstream is to blame; the only place where that is decided.

        A client that left is not an upstream failure. An answer that broke off midway is, though
        its status was 200; a complete answer is one from status 500 up. An attempt that we held
        back ourselves says nothing of the upstream.
        """
        if self.outcome is Outcome.UPSTREAM_FAILED:
            error = self.error
            if isinstance(error, UpstreamError) and error.phase.is_ours:
                return False
            return self.status != 429  # it only asks us to wait
        return self.outcome is COMPLETED and self.status >= 500

    def __repr__(self) -> str:
        error = f" {self.error!r}" if self.error is not None else ""
        return f"<End {self.outcome.name} {self.status}{error}>"


_COMPLETED = {status: End(Outcome.COMPLETED, status) for status in range(200, 600)}


def completed(status: int) -> End:
    """The end of a call or attempt whose answer was passed on in full."""
    return _COMPLETED.get(status) or End(Outcome.COMPLETED, status)


def end_of(error: BaseException, call: Call) -> End:
    """The end that `error` means for a scope of `call`."""
    if isinstance(error, UpstreamError):
        return End(Outcome.UPSTREAM_FAILED, error.status, error)
    if isinstance(error, Rejected):
        return End(Outcome.REJECTED, error.status, error)
    if isinstance(error, asyncio.CancelledError):
        return End(call.cancelled_as or Outcome.DISCARDED, 0)
    return End(Outcome.ABORTED, 500, error)


class Key(Generic[T]):
    """The name of a shared fact of type T. A key equals only itself."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<Key {self.name}>"


class Scope:
    """What calls and attempts share: facts under typed keys, and debts.

    Every debt is paid exactly once, on every kind of end. One that is registered after the end is
    paid at once.
    """

    __slots__ = ("_facts", "_on_end", "_on_settle", "_tasks", "end")

    def __init__(self, tasks: Tasks) -> None:
        self.end: End | None = None
        self._tasks = tasks
        # Made when somebody needs them: two scopes a call, and most of these stay empty.
        self._facts: dict[Key[Any], Any] | None = None
        self._on_end: list[Callable[[End], None]] | None = None
        self._on_settle: list[Callable[[End], Awaitable[None]]] | None = None

    # Facts

    def __getitem__(self, key: Key[T]) -> T:
        if self._facts is None:
            raise KeyError(key)
        return self._facts[key]  # type: ignore[no-any-return]

    def __setitem__(self, key: Key[T], value: T) -> None:
        if self._facts is None:
            self._facts = {}
        self._facts[key] = value

    def __contains__(self, key: Key[Any]) -> bool:
        return self._facts is not None and key in self._facts

    @overload
    def get(self, key: Key[T]) -> T | None: ...
    @overload
    def get(self, key: Key[T], default: D) -> T | D: ...
    def get(self, key: Key[Any], default: Any = None) -> Any:
        return default if self._facts is None else self._facts.get(key, default)

    def pop(self, key: Key[T]) -> T | None:
        """Take a fact off; None when there is none."""
        return None if self._facts is None else self._facts.pop(key, None)

    # Debts

    def on_end(self, debt: Callable[[End], None]) -> None:
        """Owe `debt`: sync and short, run at once at the end, newest first."""
        if self.end is not None:
            _pay(debt, self.end)
        elif self._on_end is None:
            self._on_end = [debt]
        else:
            self._on_end.append(debt)

    def on_settle(self, debt: Callable[[End], Awaitable[None]]) -> None:
        """Owe `debt` that needs I/O: run after the end, in a tracked task with a time limit.

        It never delays the client's next request. After the end this raises RuntimeError: nobody
        would run it.
        """
        if self.end is not None:
            raise RuntimeError("on_settle after the end: register debts before call_next")
        if self._on_settle is None:
            self._on_settle = []
        self._on_settle.append(debt)

    def finish(self, end: End) -> None:
        """Pay all debts, once; a second call does nothing. For the core only."""
        if self.end is not None:
            return
        self.end = end
        debts = self._on_end
        if debts is not None:
            while debts:  # `_pay`, by hand: ten of them a call
                debt = debts.pop()
                try:
                    debt(end)
                except Exception:
                    log.exception("debt_failed", extra={"outcome": end.outcome})
        if self._on_settle is not None:
            settles, self._on_settle = self._on_settle, None
            self._tasks.start(_settle(settles, end), name="settle")


def _pay(debt: Callable[[End], None], end: End) -> None:
    try:
        debt(end)
    except Exception:
        log.exception("debt_failed", extra={"outcome": end.outcome})


async def _settle(debts: list[Callable[[End], Awaitable[None]]], end: End) -> None:
    while debts:
        debt = debts.pop()
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                await debt(end)
        except Exception:
            log.exception("settle_failed", extra={"outcome": end.outcome})


class Upload(Protocol):
    """A request body that streams through: read once, never held, never sent again."""

    async def readany(self) -> bytes:
        """The next bytes; empty at the end of the body."""
        ...

    async def hold(self) -> bytes:
        """All of it. Raises `Rejected` (413) when it is more than a body that is held may be."""
        ...


@dataclass(frozen=True, slots=True)
class Timeouts:
    """What an attempt may wait for, in seconds."""

    connect_s: float = 5.0  # name, pool, TCP, proxy and TLS together
    first_byte_s: float = 120.0  # request written until the first byte of the body
    silence_s: float = 60.0  # between two reads of a body
    total_s: float = 3600.0  # the whole attempt


class Upstream(Protocol):
    """One configured upstream, as filters see it."""

    @property
    def name(self) -> str: ...
    @property
    def dialect(self) -> Dialect: ...
    @property
    def host(self) -> str:
        """The `Host` header of its requests: name and, unless it is the default, port."""
        ...

    @property
    def scheme(self) -> str: ...
    @property
    def timeouts(self) -> Timeouts: ...
    @property
    def passes_client_key(self) -> bool:
        """Whether its requests carry the caller's own key."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """Where an attempt may go: an upstream, and the model's name there (None: the caller's)."""

    upstream: Upstream
    model: str | None = None


class Call(Scope):
    """One client request.

    `headers`, `path` and `query` are the client's own, as they came; `body` is the whole request
    body, or None when it streams through as `upload`. Times are of
    `time.monotonic`, in seconds.
    """

    __slots__ = (
        "_deadline_at",
        "_json",
        "_waited_until",
        "_waiting",
        "_waiting_since",
        "attempts",
        "bodies",
        "body",
        "bytes_in",
        "bytes_out",
        "cancelled_as",
        "dialect",
        "endpoint",
        "headers",
        "held_s",
        "id",
        "is_kept_alive",
        "label",
        "method",
        "model",
        "path",
        "query",
        "raw_headers",
        "received_at",
        "refusal",
        "replied_at",
        "reply_headers",
        "status",
        "target",
        "targets",
        "team",
        "upload",
        "upstream_headers",
        "upstream_wait_s",
    )

    def __init__(
        self,
        *,
        call_id: str,
        method: str,
        path: str,
        query: str,
        headers: MultiMapping[str],
        raw_headers: Sequence[tuple[bytes, bytes]],
        team: Team,
        dialect: Dialect,
        endpoint: Endpoint,
        received_at: float,
        tasks: Tasks,
    ) -> None:
        self.end = None
        self._tasks = tasks
        self._facts = self._on_end = self._on_settle = None
        self.id = call_id
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.raw_headers = raw_headers
        self.body: bytes | None = b""
        self.upload: Upload | None = None
        self.team = team
        self.dialect = dialect
        self.endpoint = endpoint
        self.model: str | None = None  # as the caller named it
        self.label = ""  # the same from a closed set, for metrics and logs
        self.targets: tuple[Target, ...] = ()
        self.target: Target | None = None  # the one that a filter has chosen
        self.upstream_headers: dict[bytes, bytes] | None = None  # put on the head of every attempt
        self.reply_headers: dict[bytes, bytes] | None = None  # put on the answer's, errors included
        self.attempts: int = 0
        self.bodies: list[Body] = []  # of replies that upstreams gave, for `close_bodies`
        self.refusal: CallError | None = None
        self.received_at = received_at
        self.replied_at = 0.0  # the first byte of the answer was ready for the client
        self.upstream_wait_s = 0.0  # waited for upstreams until then; hedged attempts count once
        self.held_s = 0.0  # waited on purpose: in a queue, or before another attempt
        self._waiting = 0
        self._waiting_since = 0.0
        self._waited_until = 0.0
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.cancelled_as: Outcome | None = None  # why our task was cancelled, if it was
        self._json: Any = None
        self.is_kept_alive = False  # by heartbeats, before the first byte as well
        self._deadline_at = 0.0  # not looked at yet

    @property
    def current_target(self) -> Target | None:
        """Where the next attempt goes, or the last one went: the chosen target, else the first."""
        target = self.target
        if target is None and self.targets:
            return self.targets[0]
        return target

    @property
    def deadline_at(self) -> float | None:
        """Until when the caller waits for the first byte; None when it did not say.

        From `X-Request-Timeout` (seconds), else from what its SDK says of itself; that one begins
        to wait once its body is sent, and anew with each heartbeat, so it says nothing while an
        upload streams, or of a stream with heartbeats. Raises `Rejected` (400) for a header of the
        first name that is no number of seconds.
        """
        if self._deadline_at == 0.0:
            is_said = self.upload is None and not self.is_kept_alive
            names = SDK_TIMEOUT_HEADERS if is_said else ()
            timeout_s = _timeout_s(self.headers, names)
            self._deadline_at = inf if timeout_s is None else self.received_at + timeout_s
        return None if self._deadline_at == inf else self._deadline_at

    def extend_deadline(self, until: float | None) -> None:
        """Somebody else waits for this call as well, until then."""
        own = self.deadline_at
        if own is not None:
            self._deadline_at = inf if until is None else max(own, until)

    def time_left(self, now: float) -> float:
        """Seconds from `now` until the caller stops waiting; infinity when it did not say."""
        deadline_at = self.deadline_at
        return inf if deadline_at is None else deadline_at - now

    @property
    def key_id(self) -> str:
        """16 hex digits that stand for the key which the caller sent; empty when it sent none."""
        key = key_of(self.headers)
        return _short_digest(key) if key else ""

    def wait_begins(self, now: float) -> None:
        """An attempt begins to wait for its upstream. For the core only."""
        if not self._waiting:
            self._waiting_since = now
        self._waiting += 1

    def wait_ends(self, now: float) -> None:
        """It does not wait any more, or did not from `now` on. For the core only."""
        self._waiting -= 1
        if now > self._waited_until:  # the other one's wait may end earlier and be told later
            self._waited_until = now
        if not self._waiting:
            self.upstream_wait_s += self._waited_until - self._waiting_since

    def set_upstream_header(self, name: str, value: str) -> None:
        """Send this header with every attempt. ValueError when it could end the line."""
        self.put_upstream_field(*field(name, value))

    def set_reply_header(self, name: str, value: str) -> None:
        """Send this header with any answer. ValueError when it could end the line."""
        self.put_reply_field(*field(name, value))

    def put_upstream_field(self, name: bytes, value: bytes) -> None:
        """`set_upstream_header` for a field that `field` has checked."""
        if self.upstream_headers is None:
            self.upstream_headers = {name: value}
        else:
            self.upstream_headers[name] = value

    def put_reply_field(self, name: bytes, value: bytes) -> None:
        """`set_reply_header` for a field that `field` has checked."""
        if self.reply_headers is None:
            self.reply_headers = {name: value}
        else:
            self.reply_headers[name] = value

    @property
    def json(self) -> dict[str, Any]:
        """The request body as a JSON object, parsed at most once.

        Raises `Rejected` (400) when it is not one. Do not change it in place: use `replace_json`.
        """
        if self._json is None:
            body = self.body
            if body is None:
                raise Rejected(400, "body_not_json", "this request's body streams through unread")
            self._json = parse_object(body)
        return self._json  # type: ignore[no-any-return]

    def replace_json(self, value: dict[str, Any], *, body: bytes | None = None) -> None:
        """Send `value` to the upstream instead of the bytes that came in; as `body`, when the
        caller has it in bytes."""
        self._json = value
        self.body = orjson.dumps(value) if body is None else body

    async def hold_body(self) -> bytes:
        """The whole request body, read now if it streams; every later attempt has it, too."""
        if self.upload is not None:
            self.body = await self.upload.hold()
            self.upload = None
        return self.body or b""

    @property
    def is_stream(self) -> bool:
        """Whether the caller asked for a stream of events."""
        if not self.body or self.dialect.stream_mark not in self.body:
            return False
        try:
            return self.dialect.asks_stream(self.headers, self.json)
        except Rejected:  # not a JSON object: whatever it is, it asks for no stream
            return False

    def fork(
        self,
        *,
        call_id: str | None = None,
        path: str | None = None,
        endpoint: Endpoint | None = None,
        body: bytes | None = None,
        model: str | None = None,
        targets: tuple[Target, ...] | None = None,
    ) -> Call:
        """A call of its own with the same request, but for what is given: for work that its client
        must not end, or that is another one's.

        It begins with the same facts, unless its body is another one, and has its own debts and
        bodies. Whoever forks it runs it and must `finish` it.
        """
        fork = Call(
            call_id=call_id or self.id,
            method=self.method,
            path=path or self.path,
            query=self.query,
            headers=self.headers,
            raw_headers=self.raw_headers,
            team=self.team,
            dialect=self.dialect,
            endpoint=endpoint or self.endpoint,
            received_at=self.received_at,
            tasks=self._tasks,
        )
        if self._facts is not None and body is None:  # they may be of the body
            fork._facts = dict(self._facts)
        fork.body = self.body if body is None else body
        fork.model = model or self.model
        fork.label = self.label
        fork.targets = self.targets if targets is None else targets
        fork.target = self.target if targets is None else None
        if self.upstream_headers is not None:
            fork.upstream_headers = dict(self.upstream_headers)
        fork.bytes_in = self.bytes_in
        fork.is_kept_alive = self.is_kept_alive
        if body is None:
            fork._json = self._json
        return fork

    @property
    def chat(self) -> ChatView:
        """The request as its dialect's typed view; raises `Rejected` (400) when it is none."""
        return self.dialect.view(self.json, self.model)

    def close_bodies(self) -> None:
        """Abort what an upstream still sends though the call is over: a filter may have been
        cancelled, or have failed, with the reply in its hands. For the core only."""
        bodies = self.bodies
        while bodies:
            bodies.pop().abort(self.cancelled_as or Outcome.DISCARDED)

    def finish(self, end: End) -> None:
        """Pay all debts, once, and let go of the frames that an error holds: they hold us."""
        super().finish(end)
        forget_frames(end.error)

    def __repr__(self) -> str:
        return (
            f"<Call {self.id} {self.method} {self.path} team={self.team.name} model={self.model}>"
        )


def deadline_exceeded() -> Rejected:
    """The caller's own deadline has passed: no fault of an upstream that may be as fast as ever."""
    message = "the deadline of the call passed before an upstream answered"
    return Rejected(504, "deadline_exceeded", message)


def no_key_room(wait_s: float) -> UpstreamError:
    """What `attempt.key_gate` has said of every key that could be used."""
    message = "no key for the upstream has room within its limits"
    return UpstreamError(
        Phase.ADMIT,
        Retry.ELSEWHERE,
        "upstream_limit_reached",
        message,
        status=429,
        retry_after_s=wait_s,
    )


@asynccontextmanager
async def within_deadline(call: Call, now: float) -> AsyncIterator[None]:
    """What is awaited inside ends at the caller's deadline, seen from `now`: `Rejected` (504)."""
    left_s = call.time_left(now)
    if left_s == inf:
        yield
        return
    if left_s <= 0:  # before a timer would ring, something could go out
        raise deadline_exceeded()
    try:
        async with asyncio.timeout(left_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():  # somebody's own timeout inside
            raise
        raise deadline_exceeded() from None


def _timeout_s(headers: MultiMapping[str], sdk_names: Sequence[str]) -> float | None:
    """How long the caller waits for the first byte, as it says."""
    text = headers.get(TIMEOUT_HEADER)
    if text is not None:
        if not _SECONDS(text.strip()) or not float(text):
            message = "X-Request-Timeout must be a number of seconds above 0, such as 30 or 2.5"
            raise Rejected(400, "invalid_timeout", message)
        return min(float(text), LONGEST_TIMEOUT_S)
    for name in sdk_names:
        text = headers.get(name)
        if text is not None and _SECONDS(text):
            return float(text) or None
    return None


def key_of(headers: Mapping[str, str]) -> str:
    """The key that a caller sent, as Bearer, `x-api-key` or `api-key`; empty when there is none."""
    key = headers.get("authorization", "")
    if key[:7].lower() == "bearer ":
        return key[7:].strip()
    return headers.get("x-api-key") or headers.get("api-key") or ""


@lru_cache(maxsize=256)
def _short_digest(key: str) -> str:
    return digest(key)[:16]


def digest(key: str) -> str:
    """Hex SHA-256, under which a team's key is known."""
    return sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse_object(body: bytes) -> dict[str, Any]:
    """`body` as a JSON object; raises `Rejected` (400) with the place of the mistake."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = f"the request body is not valid JSON: {error}"
        raise Rejected(400, "invalid_json", message) from None
    if not isinstance(value, dict):
        raise Rejected(400, "invalid_json", "the request body must be a JSON object")
    return value


def may_name_two_models(body: bytes) -> bool:
    """Whether the name stands more than once in `body`, anywhere, or may stand escaped."""
    return body.count(b'"model"') > 1 or b"\\u006" in body


def refuse_second_model(body: bytes) -> None:
    """Raise `Rejected` (400) when `body` names its model twice.

    RFC 8259, 4: which of two equal names counts is up to the reader. The upstream could take
    another model than the one we have looked at, so there must be no choice. Slow: ask
    `may_name_two_models` first.
    """
    names: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        names[:] = [name for name, _ in pairs]  # the outermost object comes last

    try:
        json.loads(body, object_pairs_hook=note)
    except (ValueError, RecursionError):
        return  # no JSON: whoever parses it next says so
    if names.count("model") > 1:
        raise Rejected(400, "duplicate_model", 'the request body names "model" twice')


@dataclass(frozen=True, slots=True)
class ChatView:
    """What every dialect's request has in common."""

    dialect: str
    model: str
    messages: tuple[Mapping[str, Any], ...]  # as the dialect writes them
    is_stream: bool
    max_tokens: int | None


class Usage(NamedTuple):
    """Tokens of one call.

    `input` and `output` are totals; the other fields say how much of them was of a special kind.
    Source of the fields: each provider's `usage`, normalised by its dialect.
    """

    input: int = 0
    output: int = 0
    cached: int = 0  # of input: read from the provider's prompt cache
    cache_write: int = 0  # of input: written to it
    reasoning: int = 0  # of output
    cache_write_1h: int = 0  # of cache_write: to be kept for an hour
    is_estimated: bool = False  # counted here, as the provider did not say


USAGE: Key[Usage] = Key("usage")
"""Tokens as the provider reported them so far, the last report of a stream; at the end, where it
reported none or the answer was cut, as they were counted here. Of a cached call: the answer's."""

REPORTED: Key[Usage] = Key("reported")
"""What the provider did report, where `USAGE` is counted here."""

LOST_USAGE: Key[Usage] = Key("lost_usage")
"""Tokens of attempts that were given up though their upstream had them already: an estimate."""

CACHED: Key[str] = Key("cached")
"""How the call was answered without asking an upstream: `hit`, or `join` of another one's answer.
It costs nothing. Absent for every other call."""


class Cost(NamedTuple):
    """Money."""

    amount: Decimal
    currency: str
    """ISO 4217."""


COST: Key[Cost] = Key("cost")
"""What the call cost; absent when nobody knows, which is not zero."""


class SideCall(NamedTuple):
    """A further call that was made for this one: for the embedding of its prompt, say."""

    target: Target
    endpoint: str
    usage: Usage
    model: str = ""
    """The public name under which it was asked for; empty: there is none."""


SIDE_CALLS: Key[list[SideCall]] = Key("side_calls")

KeyGate = Callable[[str], float | Awaitable[float]]
"""Asked by whoever chooses one of an upstream's keys, with its digest, before it is used: seconds
until it may be, at once or awaited. 0.0: now, and it is taken. An empty digest: none of ours."""


class Attempt(Scope):
    """One try of a call against one upstream, with its own copy of head and body.

    `headers` are the upstream request's end-to-end headers, free to change; framing and hop-by-hop
    headers are added when it is written. `path` is the path and query on the wire.
    """

    __slots__ = (
        "body",
        "call",
        "first_byte_at",
        "headers",
        "key_gate",
        "method",
        "number",
        "path",
        "started_at",
        "status",
        "target",
        "timeouts",
        "upload",
        "upstream",
    )

    def __init__(
        self,
        call: Call,
        target: Target,
        *,
        number: int,
        path: str,
        headers: Headers,
        body: bytes,
        upload: Upload | None,
        timeouts: Timeouts,
        started_at: float,
    ) -> None:
        self.end = None
        self._tasks = call._tasks
        self._facts = self._on_end = self._on_settle = None
        self.call = call
        self.target = target
        self.upstream = target.upstream
        self.number = number
        self.method = call.method
        self.path = path
        self.headers = headers
        self.body = body
        self.upload = upload
        self.timeouts = timeouts
        self.started_at = started_at
        self.first_byte_at = 0.0
        self.status = 0
        # Set by a filter that limits the upstream's keys; whoever asks it takes it off.
        self.key_gate: KeyGate | None = None

    @property
    def content_length(self) -> int | None:
        """What is announced of the body; None when it streams, or there is nothing to say."""
        if self.upload is not None or (not self.body and self.method in BODILESS_METHODS):
            return None
        return len(self.body)

    async def hold_body(self) -> bytes:
        """The whole body, read now if it streams. Raises `Rejected` (413) when it is too large."""
        if self.upload is not None:
            self.call.wait_ends(self.started_at)  # the client's time is not the upstream's
            try:
                self.body = await self.call.hold_body()
                self.upload = None
            finally:
                self.started_at = monotonic()
                self.call.wait_begins(self.started_at)
        return self.body

    def body_ended(self, body: Body, outcome: Outcome, error: CallError | None) -> None:
        """The reply's body is over, and so is the attempt. For the core only."""
        if outcome is COMPLETED:
            self.finish(completed(self.status))
        else:
            self.finish(End(outcome, self.status, error))

    def __repr__(self) -> str:
        return f"<Attempt {self.number} of {self.call.id} at {self.upstream.name}>"
