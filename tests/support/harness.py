"""Runs one filter, or a chain of them, without sockets.

    Run (edge and client) ─► call filters ─► Dispatch ─► attempt filters ─► FakeUpstream

Dispatch, chain, calls, bodies, metrics, tasks and resources are the real ones. The upstream
answers by a script, the client is a list of bytes, and time is a clock turned by hand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
from multidict import CIMultiDict

from sidecar.call import Attempt, Call, End, Outcome, Target, Timeouts, completed, end_of
from sidecar.chain import link_attempt, link_call
from sidecar.dialects import ENDPOINTS, OPENAI, Dialect, find_endpoint
from sidecar.dialects.endpoint import MODELS, PASS_THROUGH
from sidecar.dispatch import Dispatch, send
from sidecar.errors import CallError, FetchFailed, Phase, Rejected, Retry, UpstreamError
from sidecar.filter import (
    AttemptFilter,
    CallFilter,
    Fetched,
    Filter,
    FilterConfig,
    Kit,
    KitResources,
    StoreAddress,
)
from sidecar.headers import Headers
from sidecar.metrics import Metrics
from sidecar.reply import Body, Reply
from sidecar.resources import Resources
from sidecar.tasks import Tasks
from sidecar.team import Models, Patterns, Team

MODEL = "gpt-4o-mini"
MEMORY = StoreAddress()
PATIENCE_S = 5.0
"""Only a test that fails waits so long."""
TEAM = Team("tests", "normal", Patterns(["*"]), frozenset({"fake"}))


@dataclass(eq=False)
class FakeTimer:
    """What `FakeClock.call_later` gives."""

    due: float
    callback: Callable[[], object]
    timers: list[FakeTimer]

    def cancel(self) -> None:
        if self in self.timers:
            self.timers.remove(self)


class FakeClock:
    """A `sidecar.clock.Clock` that stands still until somebody turns it."""

    def __init__(self, *, monotonic: float = 1_000.0, wall: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []
        self._timers: list[FakeTimer] = []

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    async def sleep(self, delay_s: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sleeper = (self._monotonic + delay_s, waiter)
        self._sleepers.append(sleeper)
        try:
            await waiter
        finally:
            self._sleepers.remove(sleeper)

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> FakeTimer:
        timer = FakeTimer(self._monotonic + delay_s, callback, self._timers)
        self._timers.append(timer)
        return timer

    def turn(self, seconds: float) -> None:
        """Let `seconds` pass; call and wake who waited until then, in the order of their times."""
        self._monotonic += seconds
        self._wall += seconds
        for timer in sorted(self._timers, key=lambda each: each.due):
            if timer.due <= self._monotonic and timer in self._timers:
                timer.cancel()
                timer.callback()
        for due, waiter in sorted(self._sleepers, key=lambda each: each[0]):
            if due <= self._monotonic and not waiter.done():
                waiter.set_result(None)


class ScriptedSource:
    """Feeds a body as the test says; `asked` keeps what the body asked of its source."""

    def __init__(
        self,
        *,
        media_type: str = "text/event-stream",
        encoding: str = "",
        length: int | None = None,
    ) -> None:
        self.asked: list[str] = []
        self.is_paused = False
        self.body = Body(self, media_type=media_type, encoding=encoding, length=length)

    def pause(self) -> None:
        self.asked.append("pause")
        self.is_paused = True

    def resume(self) -> None:
        self.asked.append("resume")
        self.is_paused = False

    def abort(self) -> None:
        self.asked.append("abort")

    @property
    def is_aborted(self) -> bool:
        return "abort" in self.asked

    def feed(self, *pieces: bytes) -> None:
        for data in pieces:
            self.body.feed(data)

    def finish(self, data: bytes = b"") -> None:
        self.body.finish(data)

    def fail(self, error: CallError | None = None) -> None:
        self.body.fail(error or broken())


def broken(phase: Phase = Phase.BODY) -> UpstreamError:
    return UpstreamError(phase, Retry.SAME, "upstream_closed", "the upstream closed the connection")


@dataclass(frozen=True)
class Sent:
    """One attempt as it reached the upstream."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Answer = Callable[[Attempt], Awaitable[Reply]]


class FakeUpstream:
    """An upstream whose `answer` is a script; `sent` holds what it was asked."""

    def __init__(self, name: str = "fake", dialect: Dialect = OPENAI) -> None:
        self.name = name
        self.dialect = dialect
        self.host = f"{name}.test"
        self.scheme = "https"
        self.base_path = "/v1" if dialect is OPENAI else ""
        self.extra_headers: dict[str, str] = {}
        self.passes_client_key = False
        self.timeouts = Timeouts()
        self.sent: list[Sent] = []
        self.asked = asyncio.Event()
        """An attempt has come."""
        self.source = ScriptedSource()
        self.answer: Answer = self.whole(b'{"ok": true}')

    async def send(self, attempt: Attempt) -> Reply:
        headers = dict(attempt.headers.items())
        self.sent.append(Sent(attempt.method, attempt.path, headers, attempt.body))
        self.asked.set()
        return await self.answer(attempt)

    # Scripts

    def whole(
        self, data: bytes, *, status: int = 200, media_type: str = "application/json"
    ) -> Answer:
        """The whole answer at once."""

        async def answer(attempt: Attempt) -> Reply:
            return Reply.of(status, data, media_type=media_type)

        return answer

    def stream(
        self,
        first: bytes,
        *,
        status: int = 200,
        media_type: str = "text/event-stream",
        encoding: str = "",
    ) -> Answer:
        """The head and `first`; the test feeds the rest to `source`."""

        async def answer(attempt: Attempt) -> Reply:
            self.source = ScriptedSource(media_type=media_type, encoding=encoding)
            self.source.feed(first)
            headers = Headers({"content-type": media_type})
            if encoding:
                headers["content-encoding"] = encoding
            return Reply(status, headers, self.source.body)

        return answer

    def failing(self, error: CallError | None = None) -> Answer:
        """No answer but `error`, caused as a transport's errors are."""

        async def answer(attempt: Attempt) -> Reply:
            try:
                raise ConnectionRefusedError
            except OSError as cause:
                raise error or broken(Phase.CONNECT) from cause

        return answer

    def silent(self) -> Answer:
        """No answer at all."""

        async def answer(attempt: Attempt) -> Reply:
            await asyncio.get_running_loop().create_future()
            raise AssertionError("nobody ends this wait but a cancellation")

        return answer


class FakeFetcher:
    """A `sidecar.filter.Fetch` that answers by a script; `asked` holds what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answer: Callable[[], Awaitable[Fetched]] = self.failing

    async def __call__(
        self, upstream: str, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> Fetched:
        self.asked.append((method, url, dict(headers), body))
        return await self.answer()

    def answering(self, status: int, body: bytes, date: str = "") -> None:
        async def answer() -> Fetched:
            return Fetched(status, body, date)

        self.answer = answer

    async def failing(self) -> Fetched:
        raise FetchFailed("no answer in time")


class Client:
    """What reached the client; the `Sink` of a body that flows."""

    def __init__(self, run: Run) -> None:
        self._run: Run | None = run
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.is_complete = False
        self.error: CallError | None = None

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)

    def write(self, data: bytes) -> None:
        assert data
        self.pieces.append(data)
        if self._run is not None:
            self._run.call.bytes_out += len(data)

    def finish(self) -> None:
        self.is_complete = True
        self._end(completed(self.status))

    def fail(self, error: CallError) -> None:
        self.error = error
        is_theirs = isinstance(error, UpstreamError)
        outcome = Outcome.UPSTREAM_FAILED if is_theirs else Outcome.ABORTED
        self._end(End(outcome, self.status, error))

    def leave(self) -> None:
        """Let go of the run: it holds us."""
        self._run = None

    def _end(self, end: End) -> None:
        if self._run is not None:
            self._run.end(end)


@dataclass(frozen=True)
class Use:
    """One filter with its settings, and its sections of upstreams by their name."""

    filter_class: type[Filter]
    settings: Mapping[str, Any] = field(default_factory=dict)
    upstreams: Mapping[str, FilterConfig] = field(default_factory=dict)


class Run:
    """One call on its way: does what the edge does, and what a client may do."""

    def __init__(self, harness: Harness, call: Call) -> None:
        loop = asyncio.get_running_loop()
        self.call = call
        self.client = Client(self)
        self._harness = harness
        self._body: Body | None = None
        self._begun: asyncio.Future[None] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()
        self._task = loop.create_task(self._serve(), name="run")

    async def begun(self) -> None:
        """Return once the answer has begun, or there is none."""
        await self._begun

    async def ended(self) -> End:
        """Return the call's end, its task being over."""
        await self._task
        assert self.call.end is not None
        return self.call.end

    def client_leaves(self) -> None:
        call, body = self.call, self._body
        call.cancelled_as = call.cancelled_as or Outcome.CLIENT_GONE
        if body is not None:
            body.abort(Outcome.CLIENT_GONE)
            self.end(End(Outcome.CLIENT_GONE, call.status))
        self._task.cancel()

    def abort(self, error: CallError | None = None) -> None:
        """What a shutdown does to a running call."""
        call, body = self.call, self._body
        error = error or Rejected(503, "shutting_down", "the sidecar is shutting down")
        call.cancelled_as = Outcome.ABORTED
        call.refusal = error
        if body is None:
            self._task.cancel()
            return
        body.abort(Outcome.ABORTED, error)
        self.client.error = error
        self.end(End(Outcome.ABORTED, call.status, error))

    def end(self, end: End) -> None:
        self.client.leave()
        if not self._over.done():
            self._over.set_result(None)
        self.call.finish(end)

    async def _serve(self) -> None:
        call = self.call
        try:
            run = self._harness.run_call if call.refusal is None else self._harness.refuse_call
            self._answer(await run(call))
            await self._over
        except asyncio.CancelledError:
            if call.cancelled_as is Outcome.ABORTED:
                error = call.refusal or Rejected(503, "shutting_down", "shutting down")
                self._answer_error(error, End(Outcome.ABORTED, error.status, error))
            else:
                self.end(End(Outcome.CLIENT_GONE, call.status))
        except CallError as error:
            self._answer_error(error, end_of(error, call))
        except Exception as error:
            failure = CallError(500, "internal_error", "the sidecar failed; its log says why")
            self._answer_error(failure, end_of(error, call))
        finally:
            self._body = None
            if not self._begun.done():
                self._begun.set_result(None)

    def _answer(self, reply: Reply) -> None:
        call, client, body = self.call, self.client, reply.body
        call.status = client.status = reply.status
        call.replied_at = self._harness.clock.monotonic()
        if call.reply_headers is not None:
            reply.headers.put(call.reply_headers)
        client.headers = dict(reply.headers.items())
        if body.is_whole:
            data = body.take()
            if data:
                client.write(data)
            client.finish()
        else:
            self._body = body
            body.attach(client)
        self._begun.set_result(None)

    def _answer_error(self, error: CallError, end: End) -> None:
        call, client = self.call, self.client
        call.status = client.status = error.status
        call.replied_at = call.replied_at or self._harness.clock.monotonic()
        headers = Headers({"content-type": "application/json", "x-sidecar-error": error.code})
        if call.reply_headers is not None:
            headers.put(call.reply_headers)
        headers.update(error.headers)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(max(1, ceil(error.retry_after_s)))
        client.headers = dict(headers.items())
        client.error = error
        client.write(call.dialect.error_body(error, call.id))
        self.end(end)


class Harness:
    """A chain of filters on fake ground. Use as an async context: starts and stops the filters."""

    def __init__(
        self,
        *filters: type[Filter] | Use,
        upstream: FakeUpstream | None = None,
        team: Team = TEAM,
        store: StoreAddress = MEMORY,
        workers: int = 1,
        max_connections: int = 100,
        data_dir: Path | None = None,
        models: Mapping[str, tuple[Target, ...]] | None = None,
    ) -> None:
        self.max_connections = max_connections
        self.data_dir = data_dir
        self.store = store
        self.workers = workers
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.tasks = Tasks()
        self.resources = Resources()
        self.lines: list[dict[str, Any]] = []
        """Lines of the access log."""
        self.fetcher = FakeFetcher()
        self.upstream = upstream or FakeUpstream()
        self.team = team
        target = Target(self.upstream)
        self.models = Models({MODEL: (target,), **(models or {})})
        self.filters = [self._make(each) for each in filters]
        self._started: list[Filter] = []
        self._count = 0
        calls = [each for each in self.filters if isinstance(each, CallFilter)]
        attempts = [each for each in self.filters if isinstance(each, AttemptFilter)]
        dispatch = Dispatch(
            models=self.models,
            taps_events=any(each.taps_events for each in self.filters),
            reads_beginnings=any(each.reads_beginnings for each in self.filters),
            now=self.clock.monotonic,
        )
        dispatch.attempt_chain = link_attempt(attempts, send)
        self.run_call = link_call(calls, dispatch)
        self.refuse_call = link_call([each for each in calls if each.sees_refused], _refuse)

    def _make(self, use: type[Filter] | Use) -> Filter:
        if not isinstance(use, Use):
            use = Use(use)
        kit = Kit(
            clock=self.clock,
            metrics=self.metrics,
            tasks=self.tasks,
            log=logging.getLogger(use.filter_class.__module__),
            access_log=lambda line: self.lines.append(dict(line)),
            team=self.team.name,
            upstreams=use.upstreams,
            origins={name: ("https", f"{name}.test") for name in use.upstreams},
            places={self.upstream.name: f"https://{self.upstream.name}.test"},
            fetch=self.fetcher,
            store=self.store,
            data_dir=self.data_dir,
            find_model=self._find_model,
            workers=self.workers,
            max_connections=self.max_connections,
            resources=KitResources(self.resources, 1),
        )
        return use.filter_class(use.filter_class.Config.model_validate(dict(use.settings)), kit)

    def _find_model(self, name: str) -> tuple[Target, ...] | None:
        found = self.models.find(name)
        return found and tuple(Target(each.upstream, each.model or name) for each in found[1])

    async def __aenter__(self) -> Self:
        for each in self.filters:
            self._started.append(each)
            await each.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._started:
            await self._started.pop().stop()
        await self.tasks.stop(timeout_s=PATIENCE_S)
        await self.resources.close()

    # Calls

    def call(
        self,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        method: str = "POST",
        path: str = "/v1/chat/completions",
        query: str = "",
        headers: Iterable[tuple[str, str]] = (),
        refusal: CallError | None = None,
    ) -> Call:
        """A call as the edge hands it to the chain; `refusal` as it hands it to observers only."""
        if body is None:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        fields = list(headers)
        dialect, endpoint = (
            ENDPOINTS.get(path) or find_endpoint(path) or (self.upstream.dialect, PASS_THROUGH)
        )
        if path == "/v1/models" or path.startswith("/v1/models/"):
            endpoint = MODELS
        self._count += 1
        call = Call(
            call_id=f"call_{self._count}",
            method=method,
            path=path,
            query=query,
            headers=CIMultiDict(fields),
            raw_headers=tuple(
                (k.encode(), v.encode("utf-8", "surrogateescape")) for k, v in fields
            ),
            team=self.team,
            dialect=dialect,
            endpoint=endpoint,
            received_at=self.clock.monotonic(),
            tasks=self.tasks,
        )
        call.body = body if isinstance(body, bytes) else orjson.dumps(body)
        call.bytes_in = len(call.body)
        call.refusal = refusal
        if endpoint is PASS_THROUGH:
            call.targets = (Target(self.upstream),)
        elif endpoint is not MODELS and refusal is None:
            call.model = path.rpartition("/")[2] if endpoint.model_in_path else call.json["model"]
            call.label = call.model or ""
            call.targets = (Target(self.upstream),)
        return call

    def start(self, call: Call | None = None) -> Run:
        """Begin to serve a call; by default a plain one."""
        return Run(self, call if call is not None else self.call())

    async def run(self, call: Call | None = None) -> Run:
        """Serve a call whose answer needs no further script, to its end."""
        run = self.start(call)
        await run.ended()
        return run

    async def settled(self) -> None:
        """Return once no background task runs any more; TimeoutError when one does not end."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.tasks):  # noqa: ASYNC110 - nobody tells when the last one is over
                await asyncio.sleep(0)

    def value(self, name: str, **labels: str) -> Any:
        """A metric's value for exactly these labels; 0 when it has none. Histograms: the count."""
        for family in self.metrics.snapshot():
            if family["name"] == name:
                for values, value in family["samples"]:
                    if dict(zip(family["labels"], values, strict=True)) == labels:
                        return sum(value[:-1]) if isinstance(value, list) else value
        return 0


async def _refuse(call: Call) -> Reply:
    raise call.refusal or Rejected(500, "internal_error", "refused without a reason")
