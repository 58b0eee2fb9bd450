"""One call, from the request in to the last byte out: identify, receive, run, answer, end.

aiohttp's low-level server parses the request and keeps the connection; we write the answer's bytes
ourselves, past its response classes (they cost a fifth of a call, measured).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import socket
import struct
from http import HTTPStatus
from math import ceil
from time import monotonic
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http import HttpVersion10, HttpVersion11
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from multidict import MultiMapping

from sidecar.call import (
    Call,
    End,
    Outcome,
    Target,
    completed,
    end_of,
    key_of,
    may_name_two_models,
    refuse_second_model,
)
from sidecar.config.schema import HttpSettings
from sidecar.dialects import ANTHROPIC, ENDPOINTS, OPENAI, Dialect, Endpoint, find_endpoint
from sidecar.dialects.endpoint import MODELS, OTHER, PASS_THROUGH
from sidecar.errors import CallError, Rejected, UpstreamError
from sidecar.headers import Headers, lines
from sidecar.metrics import Counter
from sidecar.reply import Body, Reply
from sidecar.tasks import Tasks
from sidecar.team import Callers, Models, Policy
from sidecar.transport.upstream import LiveUpstream

log = logging.getLogger(__name__)

STATUS_LINES = {
    **{code: f"HTTP/1.1 {code} \r\n".encode() for code in range(100, 1000)},
    **{
        status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
        for status in HTTPStatus
    },
}
BODILESS = frozenset({204, 304})
CONTINUE = "100-continue"
LINGER_S = 1.0
_CLIMBS = re.compile(
    r"(?:^|[/\\]|%2f|%5c)\.{1,2}(?:[/\\;]|%2f|%5c|$)|%2e|//|\\", re.IGNORECASE
).search
"""Dot segments in any spelling, empty segments, backslashes: ways past a path's prefix."""


class Serving(Protocol):
    """What the edge needs of the live configuration."""

    callers: Callers
    models: Models
    upstreams: dict[str, LiveUpstream]
    http: HttpSettings
    tasks: Tasks
    dropped_taps: Counter

    def lease(self) -> None: ...
    def release(self) -> None: ...


class EdgeProtocol(RequestHandler):
    """A client's connection. Tells the running call when the client leaves, or reads too slowly.

    Parsing, limits, pipelining and keep-alive are aiohttp's. `start` is ours: aiohttp's makes a
    task, a writer and a response for each request, which costs more than the rest of a call
    (docs/adr/0003-edge-on-aiohttp.md); ours runs all calls of a connection in its one task.
    """

    __slots__ = (
        "_edge",
        "_head_s",
        "_head_timer",
        "_max_head_bytes",
        "call",
        "may_have_long_heads",
        "payload",
        "writer",
    )

    def __init__(
        self, manager: EdgeServer, edge: Edge, http: HttpSettings, **settings: Any
    ) -> None:
        super().__init__(manager, **settings)
        self._edge = edge
        self._head_s = http.body_silence_s  # for a head to be whole, from its first byte
        self._max_head_bytes = http.max_head_bytes
        self.may_have_long_heads = False
        self._head_timer: asyncio.TimerHandle | None = None
        self.call: Call | None = None
        self.payload: Any = None  # the running call's body, aiohttp's StreamReader
        self.writer: ClientWriter | None = None

    async def start(self) -> None:
        loop = self._loop
        handle = self._edge.handle
        messages = self._messages
        try:
            while not self._force_close:
                if not messages:
                    waiter = self._waiter = loop.create_future()
                    try:
                        await waiter
                    finally:
                        self._waiter = None
                message, payload = messages.popleft()
                self._parser.message_consumed()  # type: ignore[union-attr]
                if self._buffer_paused and len(messages) <= self._msg_queue_resume_size:
                    self._resume_reading_if_drained()
                if self._head_timer is not None:
                    self._head_timer.cancel()
                    self._head_timer = None
                if isinstance(message, _ErrInfo):
                    self._refuse_malformed(message.exc)
                    break
                if message.version != HttpVersion11 and message.version != HttpVersion10:
                    self._refuse_malformed(BadHttpMessage("not HTTP/1.1 or HTTP/1.0"))
                    break
                self._request_in_progress = True
                self.payload = payload
                may_continue = await handle(self, message, payload)
                self._request_in_progress = False
                if not payload.is_eof():
                    await self._linger(payload)
                    break
                if not may_continue or self._close or self._force_close:
                    break
                if self._paused:  # the client reads slowly: it gets no further answer until it did
                    await self._drain_helper()
                self._next_keepalive_close_time = loop.time() + self._keepalive_timeout
                if self._keepalive_handle is None:
                    self._keepalive_handle = loop.call_at(
                        self._next_keepalive_close_time, self._process_keepalive
                    )
        except ConnectionError:
            pass  # the client left while its answer was still being written
        except Exception:
            log.exception("connection_failed")
        finally:
            self._request_in_progress = False
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None or len(data) > self._max_head_bytes:
            self.may_have_long_heads = True  # a head that came in one small read is not long
        super().data_received(data)
        if self.call is None:
            if not self._messages and self._head_timer is None and data:
                # A head has begun and is not here: it must not take for ever.
                self._head_timer = self._loop.call_later(self._head_s, self.force_close)
        elif self._messages and isinstance(self._messages[-1][0], _ErrInfo):
            # Malformed within the running call's body: aiohttp tells whoever comes next, not it.
            payload = self.payload
            if payload is not None and not payload.is_eof():
                payload.set_exception(web.RequestPayloadError("malformed"))

    async def _linger(self, payload: Any) -> None:
        """Read on for a moment: a client that still sends would lose our answer to a reset."""
        try:
            async with asyncio.timeout(LINGER_S):
                while not payload.is_eof():
                    await payload.readany()
        except (TimeoutError, web.RequestPayloadError):
            pass

    def _refuse_malformed(self, reason: BaseException) -> None:
        """Answer a request that could not be parsed."""
        log.info("bad_request", extra={"reason": type(reason).__name__})
        if isinstance(reason, LineTooLong):
            error = Rejected(431, "head_too_large", "the request's head is too large")
        else:
            error = Rejected(400, "bad_request", "the request is not valid HTTP/1.1")
        if self.transport is not None:
            data = OPENAI.error_body(error, "")
            fields = {"content-type": "application/json", "x-sidecar-error": error.code}
            head = reply_head(error.status, Headers(fields), len(data), closing=True)
            self.transport.write(head + data)

    def connection_lost(self, exc: BaseException | None) -> None:
        call, writer = self.call, self.writer
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if call is not None and call.cancelled_as is None:
            call.cancelled_as = Outcome.CLIENT_GONE
        if writer is not None:
            writer.client_gone()
        super().connection_lost(exc)  # cancels the task that runs the call

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.writer is not None:
            self.writer.body.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.writer is not None:
            self.writer.body.resume()

    def resume_reading(self, resume_parser: bool = True) -> None:
        # aiohttp calls this twice for every body; there is something to do only after a pause.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way, nor one about to be."""
        return self.call is None and not self._messages

    def abort_call(self, error: CallError) -> None:
        """End the running call with `error`: an error event on a stream, a status otherwise."""
        call, writer, task = self.call, self.writer, self._task_handler
        if call is None or call.cancelled_as is not None:
            return
        call.cancelled_as = Outcome.ABORTED
        call.refusal = error
        if writer is not None and not writer.is_waiting:
            writer.abort(error)
        elif task is not None:
            task.cancel()

    @property
    def running(self) -> asyncio.Task[None] | None:
        """The task that ends when the connection has served its last call."""
        return self._task_handler


class EdgeServer(web.Server):
    """aiohttp's low-level server with our protocol."""

    def __init__(self, edge: Edge, settings: HttpSettings) -> None:
        super().__init__(_no_handler, handler_cancellation=True)
        field = min(settings.max_head_bytes, 64 * 1024)
        self._edge = edge
        self._http = settings
        self._settings = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": settings.keepalive_s,
            "max_field_size": field,
            "max_line_size": field,
            "max_headers": 128,
        }

    def __call__(self) -> RequestHandler:
        return EdgeProtocol(self, self._edge, self._http, loop=self._loop, **self._settings)


async def _no_handler(request: Any) -> Any:
    """`EdgeProtocol.start` calls the edge itself."""
    raise NotImplementedError


class Edge:
    """Runs calls on the configuration that is live when they arrive."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.is_closing = False
        self._loop = asyncio.get_running_loop()
        # Ids: 12 random characters of this process and a count; unique, and cheap to make.
        self._id_prefix = f"call_{os.urandom(6).hex()}"
        self._id_count = itertools.count(1)

    async def handle(self, protocol: EdgeProtocol, message: Any, payload: Any) -> bool:
        """Serve one request; whether the connection may serve another.

        Returns when the answer is handed over, or broken off. Cancelled when the client leaves.
        """
        serving = self.serving
        call, policy = self._begin(serving, message, protocol.may_have_long_heads)
        serving.lease()
        protocol.call = call
        # After an upgrade we declined, aiohttp's parser waits for another protocol.
        keep_alive = not (message.should_close or message.upgrade)
        has_run = False
        try:
            if call.refusal is None:
                if payload.is_eof():
                    self._take_body(serving, call, payload)
                else:
                    await self._receive(serving, call, payload, protocol)
            has_run = True
            if call.refusal is not None:
                reply = await policy.refuse(call)
            elif serving.http.heartbeat_s and call.is_stream:
                call.is_kept_alive = True
                reply = await self._run_with_heartbeat(serving, policy, call, protocol)
            else:
                reply = await policy.run(call)
            if self.is_closing or not payload.is_eof():
                keep_alive = False  # not read to its end: what follows is not a request
            writer = self._answer(serving, call, protocol, reply, keep_alive, message)
            if writer is None:
                return keep_alive
            try:
                await writer.done
            finally:
                protocol.writer = None
            return keep_alive and not (writer.must_close or self.is_closing)
        except asyncio.CancelledError:
            if call.cancelled_as is not Outcome.ABORTED or protocol.transport is None:
                call.cancelled_as = call.cancelled_as or Outcome.CLIENT_GONE
                if not has_run:  # the client left within its body: observers see that too
                    call.refusal = Rejected(499, "client_gone", "the client left")
                    try:
                        await policy.refuse(call)
                    except CallError:
                        pass
                call.finish(End(call.cancelled_as, call.status))
                raise
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()  # by `abort_call`; the connection ends after this answer
            error = call.refusal or CallError(503, "shutting_down", "the sidecar is shutting down")
            end = End(Outcome.ABORTED, error.status, error)
            self._answer_error(call, protocol, error, end)
            return False
        except CallError as error:
            keep_alive = keep_alive and payload.is_eof() and not self.is_closing
            end = end_of(error, call)
            is_old = message.version.minor == 0
            self._answer_error(call, protocol, error, end, keep_alive=keep_alive, is_old=is_old)
            return keep_alive
        except Exception as error:
            log.exception("call_failed", extra={"call": call.id})
            failure = CallError(500, "internal_error", "the sidecar failed; its log says why")
            self._answer_error(call, protocol, failure, end_of(error, call))
            return False
        finally:
            protocol.call = None
            call.close_bodies()
            serving.release()

    # Who and where

    def _begin(self, serving: Serving, message: Any, is_long: bool) -> tuple[Call, Policy]:
        """The call and its policy. What is wrong with either stands in `call.refusal`."""
        headers = message.headers
        path, _, query = message.path.partition("?")
        refusal: CallError | None = None
        policy = serving.callers.identify(headers)
        if policy is None:
            policy = serving.callers.unknown
            text = "this API key is not known here"
            if not key_of(headers):
                text = "no API key was sent: send `Authorization: Bearer KEY` or `x-api-key: KEY`"
            refusal = Rejected(401, "invalid_api_key", text)
        if path[:1] != "/":
            path = _path_of_absolute(path)
        upstream = None
        known = ENDPOINTS.get(path)
        if known is not None:
            dialect, endpoint = known
        else:
            dialect, endpoint, upstream = self._route(serving, path, headers)
        call = Call(
            call_id=f"{self._id_prefix}{next(self._id_count):08x}",
            method=message.method,
            path=path,
            query=query,
            headers=headers,
            raw_headers=message.raw_headers,
            team=policy.team,
            dialect=dialect,
            endpoint=endpoint,
            received_at=monotonic(),
            tasks=serving.tasks,
        )
        if (
            "origin" in headers
            and serving.callers.are_keyless
            and headers["origin"] not in serving.http.allowed_origins
        ):
            text = "pages of this origin may not call: list it in http.allowed_origins"
            refusal = Rejected(403, "origin_not_allowed", text)
        if known is None or refusal is not None or query or message.method != "POST" or is_long:
            call.refusal = refusal or self._refusal(call, upstream, serving)
        if upstream is not None and call.refusal is None:
            call.targets = (Target(upstream),)
        return call, policy

    def _route(
        self, serving: Serving, path: str, headers: Any
    ) -> tuple[Dialect, Endpoint, LiveUpstream | None]:
        first = path[1:].partition("/")[0]
        upstream = serving.upstreams.get(first)
        if upstream is not None:
            return upstream.dialect, PASS_THROUGH, upstream
        if (found := find_endpoint(path)) is not None:
            return *found, None
        dialect = ANTHROPIC if "anthropic-version" in headers else OPENAI
        if path == "/v1/models" or path.startswith("/v1/models/"):
            return dialect, MODELS, None
        return dialect, OTHER, None

    def _refusal(
        self, call: Call, upstream: LiveUpstream | None, serving: Serving
    ) -> CallError | None:
        """Why this request must not go on, judged by its head alone."""
        path, endpoint = call.path, call.endpoint
        if head_bytes(call.headers) + len(path) + len(call.query) > serving.http.max_head_bytes:
            return Rejected(431, "head_too_large", "the request's head is too large")
        if call.method in ("CONNECT", "TRACE"):
            return Rejected(405, "method_not_allowed", f"{call.method} is not served here")
        target = f"{path}?{call.query}"
        if not (target.isascii() and target.isprintable()) or " " in target or "#" in target:
            return Rejected(400, "invalid_path", "the path must be percent-encoded ASCII")
        if _CLIMBS(path):
            text = "the path holds dot segments, encoded dots, empty segments or backslashes"
            return Rejected(400, "invalid_path", text)
        if upstream is not None:
            if upstream.name not in call.team.upstreams:
                text = f'team "{call.team.name}" may not call "{upstream.name}" directly'
                return Rejected(403, "upstream_not_allowed", text)
        elif endpoint is MODELS:
            if call.method not in ("GET", "HEAD"):
                return Rejected(405, "method_not_allowed", "use GET", headers={"allow": "GET"})
        elif endpoint is OTHER:
            if not path.startswith("/v1/") or call.method != "POST":
                text = "nothing is served at this path; other paths of a provider are reached by "
                return Rejected(404, "not_found", text + "/{upstream}/…")
        elif call.method != "POST":
            return Rejected(405, "method_not_allowed", "use POST", headers={"allow": "POST"})
        return None

    # The request body

    def _take_body(self, serving: Serving, call: Call, payload: Any) -> None:
        """The body came with the head: it is all here."""
        if payload is EMPTY_PAYLOAD:
            body = b""
        else:
            pieces = payload._buffer  # nearly always one, and then not worth five calls
            body = pieces[0] if len(pieces) == 1 else payload.read_nowait(-1)
        call.body = body
        call.bytes_in = len(body)
        if call.headers.get("expect", CONTINUE).lower() != CONTINUE:
            call.refusal = _unknown_expectation()
        elif call.bytes_in > serving.http.max_body_bytes and call.bytes_in > (
            limit := _limit(call, serving.http)
        ):
            call.refusal = _too_large(limit)
        elif call.endpoint.has_model:
            try:
                if may_name_two_models(body):
                    refuse_second_model(body)
                self._find_targets(serving, call)
            except Rejected as refusal:
                call.refusal = refusal

    async def _receive(
        self, serving: Serving, call: Call, payload: Any, protocol: EdgeProtocol
    ) -> None:
        """Read the body, or leave it to stream; find the model's targets."""
        headers, limit = call.headers, _limit(call, serving.http)
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            call.refusal = _too_large(limit)
            return
        if "expect" in headers:
            if headers["expect"].lower() != CONTINUE:
                call.refusal = _unknown_expectation()
                return
            if protocol.transport is not None:
                protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        upload = BoundedUpload(payload, call, limit, serving.http)
        if not _is_held(call):
            call.body = None
            call.upload = upload
            return
        try:
            body = call.body = await upload.hold()
            if call.endpoint.has_model:
                if may_name_two_models(body):  # a large one takes long: not on the loop
                    await asyncio.to_thread(refuse_second_model, body)
                self._find_targets(serving, call)
        except Rejected as refusal:
            call.refusal = refusal

    def _find_targets(self, serving: Serving, call: Call) -> None:
        if "content-encoding" in call.headers:
            text = "a compressed request body cannot be routed by its model: send it plain"
            raise Rejected(415, "unsupported_encoding", text)
        model = call.json.get("model")
        if call.endpoint.model_in_path:
            model = call.path.rpartition("/")[2]
        elif not isinstance(model, str) or not model:
            raise Rejected(400, "model_required", 'the request body must name a "model"')
        call.model = model
        found = serving.models.find(model)
        if found is None or not (call.team.may_use_all or call.team.may_use(model)):
            call.label = "unknown"
            text = f'the model "{model[:100]}" does not exist here or is not for you'
            raise Rejected(404, "model_not_found", text)
        call.label, call.targets = found

    # The answer

    def _answer(
        self,
        serving: Serving,
        call: Call,
        protocol: EdgeProtocol,
        reply: Reply,
        keep_alive: bool,
        message: Any,
    ) -> ClientWriter | None:
        """Write a reply: the whole of it (None), or its beginning (who writes the rest)."""
        body, headers, status = reply.body, reply.headers, reply.status
        call.status = status
        if call.reply_headers is not None:
            headers.put(call.reply_headers)
        call.replied_at = monotonic()
        transport = protocol.transport
        if transport is None:
            body.abort(Outcome.CLIENT_GONE)
            call.finish(End(Outcome.CLIENT_GONE, status))
            return None
        writer = protocol.writer  # there already, when heartbeats had to begin before the answer
        if writer is None:
            is_old = message.version.minor == 0
            if call.method == "HEAD" or status in BODILESS:
                self._answer_bodiless(call, reply, transport, keep_alive, is_old)
                call.finish(completed(status))
                return None
            if body.is_whole:
                data = body.take()
                call.bytes_out = len(data)
                head = reply_head(status, headers, len(data), closing=not keep_alive, is_old=is_old)
                transport.write(head + data)
                if body.dropped_taps:
                    serving.dropped_taps.inc(body.dropped_taps)
                call.finish(completed(status))
                return None
            is_chunked = body.length is None and not is_old
            if body.is_stream:
                headers["x-accel-buffering"] = "no"
            must_close = body.length is None and is_old
            head = reply_head(
                status,
                headers,
                body.length,
                closing=must_close or not keep_alive,
                is_old=is_old,
                is_chunked=is_chunked,
            )
            writer = ClientWriter(serving, self._loop, transport, call, head, is_chunked=is_chunked)
            writer.must_close = must_close
            protocol.writer = writer
        writer.begin(body, status)
        if protocol.writing_paused:
            body.pause()
        return writer

    def _answer_bodiless(
        self,
        call: Call,
        reply: Reply,
        transport: asyncio.Transport,
        keep_alive: bool,
        is_old: bool,
    ) -> None:
        """An answer that has no body: to HEAD, 204, 304 (RFC 9112, 6.3)."""
        announced = reply.body.length if call.method == "HEAD" or reply.status == 304 else None
        if reply.body.is_whole:
            reply.body.take()
        else:
            reply.body.discard()
        head = reply_head(
            reply.status,
            reply.headers,
            announced,
            closing=not keep_alive,
            is_old=is_old,
        )
        transport.write(head)

    def _answer_error(
        self,
        call: Call,
        protocol: EdgeProtocol,
        error: CallError,
        end: End,
        *,
        keep_alive: bool = False,
        is_old: bool = False,
    ) -> None:
        """Write an error in the client's dialect, once and whole."""
        call.status = error.status
        call.replied_at = call.replied_at or monotonic()
        transport, writer = protocol.transport, protocol.writer
        if writer is not None:  # heartbeats went out: the status is spoken for
            protocol.writer = None
            writer.fail(error, end)
            return
        if transport is not None:
            data = call.dialect.error_body(error, call.id)
            headers = Headers({"content-type": "application/json"})
            headers["x-sidecar-error"] = error.code
            if call.reply_headers is not None:
                headers.put(call.reply_headers)
            headers.update(error.headers)
            if error.retry_after_s is not None:
                headers["retry-after"] = str(max(1, ceil(error.retry_after_s)))
            head = reply_head(
                error.status, headers, len(data), closing=not keep_alive, is_old=is_old
            )
            if call.method == "HEAD":
                data = b""
            call.bytes_out = len(data)
            transport.write(head + data)
        call.finish(end)

    async def _run_with_heartbeat(
        self, serving: Serving, policy: Policy, call: Call, protocol: EdgeProtocol
    ) -> Reply:
        """Run the chain; when it stays silent, begin the stream with heartbeats meanwhile."""
        running = asyncio.ensure_future(policy.run(call))
        try:
            await asyncio.wait((running,), timeout=serving.http.heartbeat_s)
            if not running.done() and protocol.transport is not None:
                headers = Headers({"content-type": "text/event-stream"})
                headers["cache-control"] = "no-cache"
                headers["x-accel-buffering"] = "no"
                if call.reply_headers is not None:
                    headers.put(call.reply_headers)
                head = reply_head(200, headers, None, closing=True, is_chunked=True)
                protocol.writer = ClientWriter(
                    serving, self._loop, protocol.transport, call, head, is_chunked=True
                )
                protocol.writer.must_close = True
                protocol.writer.begin_with_heartbeat()
            return await running
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.wait((running,))
            raise


class ClientWriter:
    """Writes one flowing body to the client's connection; the `Sink` of that body."""

    __slots__ = (
        "_call",
        "_head",
        "_heartbeat",
        "_heartbeat_s",
        "_is_chunked",
        "_is_stream",
        "_loop",
        "_seen_bytes",
        "_serving",
        "_status",
        "_tail",
        "_transport",
        "body",
        "done",
        "is_waiting",
        "must_close",
    )

    def __init__(
        self,
        serving: Serving,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        call: Call,
        head: bytes,
        *,
        is_chunked: bool,
    ) -> None:
        self._serving = serving
        self._loop = loop
        self._transport = transport
        self._call = call
        self._head: bytes | None = head
        self._is_chunked = is_chunked
        self._is_stream = False
        self._tail = b""  # the last bytes of a stream, to know whether an event is open
        self._status = 200
        self._heartbeat: asyncio.TimerHandle | None = None
        self._heartbeat_s = serving.http.heartbeat_s
        self._seen_bytes = -1
        self.body = Body()
        self.done: asyncio.Future[None] = loop.create_future()
        self.must_close = False
        self.is_waiting = False  # heartbeats have begun, the answer has not

    def begin(self, body: Body, status: int) -> None:
        """Let `body` flow to the client."""
        self.is_waiting = False
        if self._head is None and (status != 200 or not body.is_stream):
            # Heartbeats promised a stream, and this is none.
            body.discard()
            text = f"the upstream answered {status}"
            error = CallError(502 if status < 400 else status, "upstream_error", text)
            self.fail(error, End(Outcome.COMPLETED, status, error))
            return
        self.body = body
        self._status = status
        self._is_stream = body.is_stream and not body.encoding.replace("identity", "")
        if self._heartbeat_s and self._is_stream and self._is_chunked and self._heartbeat is None:
            self._heartbeat = self._loop.call_later(self._heartbeat_s, self._beat)
        body.attach(self)

    def begin_with_heartbeat(self) -> None:
        self.is_waiting = True
        self._is_stream = True
        self._tail = b"\n\n"
        self._beat()

    # Sink

    def write(self, data: bytes) -> None:
        self._call.bytes_out += len(data)
        if self._is_stream:
            self._tail = data[-4:] if len(data) >= 4 else (self._tail + data)[-4:]
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        head = self._head
        if head is not None:
            self._head = None
            data = head + data
        self._transport.write(data)

    def finish(self) -> None:
        data = self._head or b""
        self._head = None
        if self._is_chunked:
            data += _last_chunk(self.body, self._call)
        if data:
            self._transport.write(data)
        self._end(completed(self._status))

    def fail(self, error: CallError, end: End | None = None) -> None:
        """Tell the client that this is not the whole: an error event, and no clean end."""
        self.must_close = True
        if self._is_stream and self._is_chunked:
            event = self._call.dialect.error_event(error, self._call.id, self._call.endpoint)
            if self._tail and not self._tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")):
                event = b"\n\n" + event
            self.write(event)
        elif self._head is not None:
            self._transport.write(self._head)
        if self._is_chunked or self.body.length is not None:
            self._transport.close()
        else:  # the end of the connection would be the end of the body: only a reset tells
            _reset(self._transport)
        is_theirs = isinstance(error, UpstreamError)
        outcome = Outcome.UPSTREAM_FAILED if is_theirs else Outcome.ABORTED
        self._end(end or End(outcome, self._status, error))

    def abort(self, error: CallError) -> None:
        """We stop: shutdown."""
        self.body.abort(Outcome.ABORTED, error)
        self.fail(error, End(Outcome.ABORTED, self._status, error))

    def client_gone(self) -> None:
        """The client left: close the upstream in this very turn of the loop."""
        self.must_close = True
        self.body.abort(Outcome.CLIENT_GONE)
        self._end(End(Outcome.CLIENT_GONE, self._status))

    def _end(self, end: End) -> None:
        self.close()
        if self.body.dropped_taps:
            self._serving.dropped_taps.inc(self.body.dropped_taps)
        if not self.done.done():
            self.done.set_result(None)
        self._call.finish(end)

    def close(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None

    def _beat(self) -> None:
        """Runs every `heartbeat_s`, costs nothing per chunk: compares the bytes written."""
        self._heartbeat = self._loop.call_later(self._heartbeat_s, self._beat)
        is_silent = self._call.bytes_out == self._seen_bytes or self._seen_bytes < 0
        between_events = self._tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
        if is_silent and between_events and not self._transport.is_closing():
            self.write(b": keep-alive\n\n")
        self._seen_bytes = self._call.bytes_out


class BoundedUpload:
    """A request body as it comes in: bounded in size, and in time between two pieces."""

    __slots__ = ("_call", "_held", "_holding", "_http", "_limit", "_payload")

    def __init__(self, payload: Any, call: Call, limit: int, http: HttpSettings) -> None:
        self._payload = payload
        self._call = call
        self._limit = limit
        self._http = http
        self._held: list[bytes] = []
        self._holding: asyncio.Lock | None = None

    async def readany(self) -> bytes:
        """The next bytes, empty at the end. Raises `Rejected`: 408 after silence, 413, 400."""
        try:
            async with asyncio.timeout(self._http.body_silence_s):
                data: bytes = await self._payload.readany()
        except TimeoutError:
            text = "the request body did not come in time"
            raise Rejected(408, "request_timeout", text) from None
        except web.RequestPayloadError as error:
            raise Rejected(400, "request_body_broken", "the request body is malformed") from error
        self._call.bytes_in += len(data)
        if self._call.bytes_in > self._limit:
            raise _too_large(self._limit)
        return data

    async def hold(self) -> bytes:
        """All of it. Whoever asks again, after somebody gave up half-way, gets all of it too."""
        self._limit = limit = min(self._limit, self._http.max_body_bytes)
        announced = self._call.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        if self._holding is None:
            self._holding = asyncio.Lock()
        async with self._holding:
            while data := await self.readany():
                self._held.append(data)
        return b"".join(self._held)


def head_bytes(headers: MultiMapping[str]) -> int:
    """About the bytes that the fields take in a head."""
    return sum(map(len, headers.keys())) + sum(map(len, headers.values())) + 4 * len(headers)


def reply_head(
    status: int,
    headers: Headers,
    length: int | None,
    *,
    closing: bool,
    is_chunked: bool = False,
    is_old: bool = False,
) -> bytes:
    """An answer's head as bytes; `length` None and not chunked: the body ends with the connection,
    or there is none."""
    if is_chunked:
        framing = b"transfer-encoding: chunked\r\n"
    elif length is not None:
        framing = b"content-length: %d\r\n" % length
    else:
        framing = b""
    if closing:
        framing += b"connection: close\r\n"
    elif is_old:
        framing += b"connection: keep-alive\r\n"
    return b"%b%b%b\r\n" % (STATUS_LINES[status], lines(headers.raw()), framing)


def _last_chunk(body: Body, call: Call) -> bytes:
    """The end of a chunked body, with the trailers if the client takes them (RFC 9110, 6.5.1)."""
    if not body.trailers or "trailers" not in call.headers.get("te", "").lower():
        return b"0\r\n\r\n"
    return b"0\r\n%b\r\n" % lines(body.trailers)


def _path_of_absolute(target: str) -> str:
    """The path of an absolute-form target (RFC 9112, 3.2.2); its host means nothing to us."""
    _, separator, rest = target.partition("://")
    if not separator:
        return target
    return "/" + rest.partition("/")[2]


def _reset(transport: asyncio.Transport) -> None:
    """Close with a TCP reset, which no client takes for the end of a body."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _is_held(call: Call) -> bool:
    """Whether a body is read before anything else: JSON is, other bodies stream through."""
    return call.endpoint.has_model or "json" in call.headers.get("content-type", "")


def _limit(call: Call, http: HttpSettings) -> int:
    return http.max_body_bytes if _is_held(call) else http.max_upload_bytes


def _unknown_expectation() -> Rejected:
    return Rejected(417, "expectation_failed", "only 100-continue is known")


def _too_large(limit: int) -> Rejected:
    return Rejected(413, "body_too_large", f"the request body is larger than {limit} bytes")
