"""One call, from the request in to the last byte out: identify, receive, run, answer, end.

aiohttp's low-level server parses the request and keeps the connection; we write the answer's bytes
ourselves, past its response classes (they cost a fifth of a call, measured).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from time import monotonic
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler
from multidict import CIMultiDict

from sidecar.call import Call, End, Outcome, Target, end_of
from sidecar.config.schema import HttpSettings
from sidecar.dialects import ANTHROPIC, ENDPOINTS, OPENAI, Dialect, Endpoint
from sidecar.dialects.endpoint import MODELS, OTHER, PASS_THROUGH
from sidecar.errors import CallError, Rejected
from sidecar.reply import Body, Reply
from sidecar.tasks import Tasks
from sidecar.team import Callers, Models
from sidecar.transport.upstream import LiveUpstream

log = logging.getLogger(__name__)

STATUS_LINES = {
    **{code: f"HTTP/1.1 {code} \r\n" for code in range(100, 1000)},
    **{status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus},
}
NEVER_PATHS = ("/../", "/./", "%2e", "%2E", "\\", "//")


class Serving(Protocol):
    """What the edge needs of the live configuration."""

    callers: Callers
    models: Models
    upstreams: dict[str, LiveUpstream]
    http: HttpSettings
    tasks: Tasks

    def lease(self) -> None: ...
    def release(self) -> None: ...


class Incoming:
    """A parsed request, as much of aiohttp's `BaseRequest` as its protocol uses."""

    __slots__ = ("_task", "message", "payload", "protocol", "writer")

    def __init__(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> None:
        self.message = message
        self.payload = payload
        self.protocol = protocol
        self.writer = writer
        self._task = task

    def _finish(self) -> None:
        pass

    def _cancel(self, error: BaseException) -> None:
        self.payload.set_exception(error)

    @property
    def remote(self) -> str | None:
        return None


class Written:
    """What aiohttp's protocol is told: the answer is written already."""

    __slots__ = ("keep_alive",)

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, request: Incoming) -> None:
        return None

    async def write_eof(self, chunk: bytes = b"") -> None:
        return None


KEEP = Written(keep_alive=True)
CLOSE = Written(keep_alive=False)


class EdgeProtocol(RequestHandler):
    """A client's connection. Tells the running call when the client leaves, or reads too slowly."""

    __slots__ = ("call", "task", "writer")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.call: Call | None = None
        self.task: asyncio.Task[Any] | None = None
        self.writer: ClientWriter | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        call, writer = self.call, self.writer
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

    def abort_call(self, error: CallError) -> None:
        """End the running call with `error`: an error event on a stream, a status otherwise."""
        call, writer = self.call, self.writer
        if call is None or call.cancelled_as is not None:
            return
        call.cancelled_as = Outcome.ABORTED
        call.refusal = error
        if writer is not None:
            writer.abort(error)
        elif self.task is not None:
            self.task.cancel()

    def handle_error(
        self,
        request: Any,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> Any:
        """Answer a request that could not be parsed (called by aiohttp)."""
        if status == 500:
            log.error("edge_failed", exc_info=exc)
            error = CallError(500, "internal_error", "the sidecar failed; its log says why")
        elif isinstance(exc, LineTooLong):
            error = Rejected(431, "head_too_large", "the request's head is too large")
        else:
            log.info("bad_request", extra={"reason": type(exc).__name__})
            error = Rejected(400, "bad_request", "the request is not valid HTTP/1.1")
        transport = self.transport
        if transport is not None:
            data = OPENAI.error_body(error, "")
            headers = CIMultiDict({"content-type": "application/json"})
            transport.write(reply_head(error.status, headers, len(data), closing=True) + data)
        return CLOSE


class EdgeServer(web.Server):
    """aiohttp's low-level server with our protocol."""

    def __init__(self, handler: Callable[[Any], Awaitable[Any]], settings: HttpSettings) -> None:
        field = min(settings.max_head_bytes, 64 * 1024)
        self._protocol_settings = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": settings.keepalive_s,
            "lingering_time": 1.0,
            "max_field_size": field,
            "max_line_size": field,
            "tcp_keepalive": True,
        }
        super().__init__(
            handler,  # type: ignore[arg-type]
            request_factory=Incoming,  # type: ignore[arg-type]
            handler_cancellation=True,
        )

    def __call__(self) -> RequestHandler:
        return EdgeProtocol(self, loop=self._loop, **self._protocol_settings)


class Edge:
    """Runs calls on the configuration that is live when they arrive."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.is_closing = False
        self._loop = asyncio.get_running_loop()
        # Ids: 12 random characters of this process and a count; unique, and cheap to make.
        self._id_prefix = f"call_{os.urandom(6).hex()}"
        self._id_count = itertools.count(1)

    async def handle(self, incoming: Incoming) -> Written:
        """Serve one request and return when its answer is written, or broken off."""
        serving = self.serving
        protocol = incoming.protocol
        serving.lease()
        call, policy = self._begin(serving, incoming)
        protocol.call = call
        protocol.task = asyncio.current_task()
        keep_alive = not incoming.message.should_close and not self.is_closing
        try:
            error: CallError
            try:
                if call.refusal is None:
                    await self._receive(serving, call, incoming)
                if call.refusal is not None:
                    reply = await policy.refuse(call)
                elif serving.http.heartbeat_s and call.is_stream:
                    reply = await self._run_with_heartbeat(serving, policy, call, protocol)
                else:
                    reply = await policy.run(call)
            except asyncio.CancelledError:
                if call.cancelled_as is not Outcome.ABORTED or protocol.transport is None:
                    call.cancelled_as = call.cancelled_as or Outcome.CLIENT_GONE
                    call.finish(End(call.cancelled_as), serving.tasks)
                    raise
                error = call.refusal or _shutting_down()
                return self._answer_error(serving, call, protocol, error, End(Outcome.ABORTED))
            except CallError as caught:
                call_end = end_of(caught, call)
                return self._answer_error(
                    serving, call, protocol, caught, call_end, keep_alive, incoming
                )
            except Exception as caught:
                log.exception("call_failed", extra={"call": call.id})
                error = CallError(500, "internal_error", "the sidecar failed; its log says why")
                return self._answer_error(
                    serving, call, protocol, error, end_of(caught, call), keep_alive, incoming
                )
            return await self._answer(serving, call, protocol, reply, keep_alive, incoming)
        finally:
            protocol.call = None
            protocol.task = None
            serving.release()

    # Who and where

    def _begin(self, serving: Serving, incoming: Incoming) -> tuple[Call, Any]:
        """The call and its policy. What is wrong with either stands in `call.refusal`."""
        message = incoming.message
        headers = message.headers
        path, _, query = message.path.partition("?")
        refusal: CallError | None = None
        policy = serving.callers.identify(_client_key(headers))
        if policy is None:
            policy = serving.callers.unknown
            refusal = Rejected(401, "invalid_api_key", "this API key is not known here")
        if not path.startswith("/"):
            path = _path_of_absolute(path)
        dialect, endpoint, upstream = self._route(serving, path, headers)
        call = Call(
            call_id=f"{self._id_prefix}{next(self._id_count):08x}",
            method=message.method,
            path=path,
            query=query,
            headers=headers,
            team=policy.team,
            dialect=dialect,
            endpoint=endpoint,
            received_at=monotonic(),
        )
        call.refusal = refusal or self._refusal(call, message, upstream, serving)
        if upstream is not None and call.refusal is None:
            call.targets = (Target(upstream),)
        return call, policy

    def _route(
        self, serving: Serving, path: str, headers: Any
    ) -> tuple[Dialect, Endpoint, LiveUpstream | None]:
        known = ENDPOINTS.get(path)
        if known is not None:
            return known[0], known[1], None
        first = path[1:].partition("/")[0]
        upstream = serving.upstreams.get(first)
        if upstream is not None:
            return upstream.dialect, PASS_THROUGH, upstream
        dialect = ANTHROPIC if "anthropic-version" in headers else OPENAI
        if path == "/v1/models" or path.startswith("/v1/models/"):
            return dialect, MODELS, None
        return dialect, OTHER, None

    def _refusal(
        self, call: Call, message: Any, upstream: LiveUpstream | None, serving: Serving
    ) -> CallError | None:
        """Why this request must not go on, judged by its head alone."""
        path, endpoint = call.path, call.endpoint
        head_bytes = sum([len(name) + len(value) + 4 for name, value in message.raw_headers])
        if head_bytes + len(message.path) > serving.http.max_head_bytes:
            return Rejected(431, "head_too_large", "the request's head is too large")
        if call.method in ("CONNECT", "TRACE"):
            return Rejected(405, "method_not_allowed", f"{call.method} is not served here")
        if not (path.isascii() and path.isprintable() and call.query.isprintable()):
            return Rejected(400, "invalid_path", "the path must be percent-encoded ASCII")
        if upstream is not None:
            tail = path[len(upstream.name) + 1 :] + "/"
            if any(bad in tail for bad in NEVER_PATHS):
                message_text = "the path holds dot segments, encoded dots or empty segments"
                return Rejected(400, "invalid_path", message_text)
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

    async def _receive(self, serving: Serving, call: Call, incoming: Incoming) -> None:
        """Read the body, or leave it to stream; find the model's targets."""
        headers, payload, http = call.headers, incoming.payload, serving.http
        if "expect" in headers:
            if headers["expect"].lower() != "100-continue":
                call.refusal = Rejected(417, "expectation_failed", "only 100-continue is known")
                return
            if not payload.is_eof() and incoming.protocol.transport is not None:
                incoming.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        is_json = "json" in headers.get("content-type", "")
        if not call.endpoint.has_model and not is_json and not payload.is_eof():
            call.body = None
            call.upload = BoundedUpload(payload, call, http)
            return
        try:
            if payload.is_eof():
                call.body = payload.read_nowait(-1)
                call.bytes_in = len(call.body)
                if call.bytes_in > http.max_body_bytes:
                    raise _too_large(http.max_body_bytes)
            else:
                call.body = await self._read(call, payload, http)
            if call.endpoint.has_model:
                self._find_targets(serving, call)
        except Rejected as refusal:
            call.refusal = refusal

    async def _read(self, call: Call, payload: Any, http: HttpSettings) -> bytes:
        announced = call.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > http.max_body_bytes:
            raise _too_large(http.max_body_bytes)
        upload = BoundedUpload(payload, call, http, limit=http.max_body_bytes)
        pieces = []
        while data := await upload.readany():
            pieces.append(data)
        return b"".join(pieces)

    def _find_targets(self, serving: Serving, call: Call) -> None:
        if "content-encoding" in call.headers:
            text = "a compressed request body cannot be routed by its model: send it plain"
            raise Rejected(415, "unsupported_encoding", text)
        model = call.json.get("model")
        if not isinstance(model, str) or not model:
            raise Rejected(400, "model_required", 'the request body must name a "model"')
        call.model = model
        found = serving.models.find(model)
        if found is None or not call.team.may_use(model):
            call.label = "unknown"
            text = f'the model "{model[:100]}" does not exist here or is not for you'
            raise Rejected(404, "model_not_found", text)
        call.label, call.targets = found

    # The answer

    async def _answer(
        self,
        serving: Serving,
        call: Call,
        protocol: EdgeProtocol,
        reply: Reply,
        keep_alive: bool,
        incoming: Incoming,
    ) -> Written:
        """Write a reply and return when its last byte is handed over, or it broke off."""
        body, headers = reply.body, reply.headers
        call.status = reply.status
        if call.reply_headers:
            headers.update(call.reply_headers)
        if not call.replied_at:
            call.replied_at = monotonic()
        transport = protocol.transport
        if transport is None:
            body.abort(Outcome.CLIENT_GONE)
            call.finish(End(Outcome.CLIENT_GONE, reply.status), serving.tasks)
            return CLOSE
        if not incoming.payload.is_eof():
            keep_alive = False  # the request was not read to its end: what follows is not a request
        writer = protocol.writer  # there already, when heartbeats had to begin before the answer
        is_silent = call.method == "HEAD" or reply.status in (204, 304)
        if writer is None and (body.is_whole or is_silent):
            length = headers.get("content-length") if is_silent else None
            try:
                data = body.take() if body.is_whole else b""
            except Exception:
                log.exception("map_failed", extra={"call": call.id})
                error = CallError(500, "internal_error", "a filter failed on the answer")
                end = End(Outcome.ABORTED, 500, error)
                return self._answer_error(serving, call, protocol, error, end, keep_alive, incoming)
            if is_silent:
                body.discard()
                data = b""
            head = reply_head(
                reply.status,
                headers,
                len(data) if length is None else int(length),
                closing=not keep_alive,
                is_old=incoming.message.version.minor == 0,
                has_length=not is_silent or length is not None,
            )
            call.bytes_out = len(data)
            transport.write(head + data)
            call.finish(End(Outcome.COMPLETED, reply.status), serving.tasks)
            if protocol.writing_paused:
                await protocol._drain_helper()
            return KEEP if keep_alive else CLOSE

        if writer is None:
            is_old = incoming.message.version.minor == 0
            is_chunked = body.length is None and not is_old
            if body.length is None and is_old:
                keep_alive = False
            if body.is_stream:
                headers["x-accel-buffering"] = "no"
            head = reply_head(
                reply.status,
                headers,
                body.length,
                closing=not keep_alive,
                is_old=is_old,
                is_chunked=is_chunked,
            )
            writer = ClientWriter(serving, self._loop, protocol, call, head, is_chunked=is_chunked)
            protocol.writer = writer
        try:
            writer.begin(body, reply.status)
            await writer.done
        finally:
            protocol.writer = None
            writer.close()
        if writer.is_broken:
            return CLOSE
        if protocol.writing_paused:
            await protocol._drain_helper()
        return KEEP if keep_alive and not writer.must_close else CLOSE

    def _answer_error(
        self,
        serving: Serving,
        call: Call,
        protocol: EdgeProtocol,
        error: CallError,
        end: End,
        keep_alive: bool = False,
        incoming: Incoming | None = None,
    ) -> Written:
        """Write an error in the client's dialect, once and whole."""
        call.status = error.status
        if not call.replied_at:
            call.replied_at = monotonic()
        if incoming is None or not incoming.payload.is_eof():
            keep_alive = False
        transport = protocol.transport
        writer = protocol.writer
        if writer is not None:  # heartbeats went out: the status is spoken for
            protocol.writer = None
            writer.fail(error, end)
            return CLOSE
        if transport is not None:
            data = call.dialect.error_body(error, call.id)
            headers = CIMultiDict({"content-type": "application/json"})
            headers["x-sidecar-error"] = error.code
            headers.update(call.reply_headers)
            headers.update(error.headers)
            if error.retry_after_s is not None:
                headers["retry-after"] = str(max(1, round(error.retry_after_s + 0.499)))
            head = reply_head(error.status, headers, len(data), closing=not keep_alive)
            if call.method == "HEAD":
                data = b""
            call.bytes_out = len(data)
            transport.write(head + data)
        call.finish(end, serving.tasks)
        return KEEP if keep_alive else CLOSE

    async def _run_with_heartbeat(
        self, serving: Serving, policy: Any, call: Call, protocol: EdgeProtocol
    ) -> Reply:
        """Run the chain; when it stays silent, begin the stream with heartbeats meanwhile."""
        running = asyncio.ensure_future(policy.run(call))
        try:
            await asyncio.wait((running,), timeout=serving.http.heartbeat_s)
            if not running.done() and protocol.transport is not None:
                headers = CIMultiDict({"content-type": "text/event-stream"})
                headers["cache-control"] = "no-cache"
                headers["x-accel-buffering"] = "no"
                headers.update(call.reply_headers)
                head = reply_head(200, headers, None, closing=True, is_chunked=True)
                protocol.writer = ClientWriter(
                    serving, self._loop, protocol, call, head, is_chunked=True
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
        "is_broken",
        "must_close",
    )

    def __init__(
        self,
        serving: Serving,
        loop: asyncio.AbstractEventLoop,
        protocol: EdgeProtocol,
        call: Call,
        head: bytes,
        *,
        is_chunked: bool,
    ) -> None:
        self._serving = serving
        self._loop = loop
        self._transport: asyncio.Transport = protocol.transport  # type: ignore[assignment]
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
        self.is_broken = False
        self.must_close = False

    def begin(self, body: Body, status: int) -> None:
        """Let `body` flow to the client."""
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
        if self._transport.get_write_buffer_size() > 64 * 1024:
            body.pause()

    def begin_with_heartbeat(self) -> None:
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
        self._end(End(Outcome.COMPLETED, self._status))

    def fail(self, error: CallError, end: End | None = None) -> None:
        """Tell the client that this is not the whole: an error event, and no clean end."""
        self.is_broken = True
        if self._is_stream and self._is_chunked:
            event = self._call.dialect.error_event(error, self._call.id, self._call.endpoint)
            if self._tail and not self._tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")):
                event = b"\n\n" + event
            self.write(event)
        elif self._head is not None:
            self._transport.write(self._head)
        self._transport.close()
        self._end(end or End(Outcome.UPSTREAM_FAILED, self._status, error))

    def abort(self, error: CallError) -> None:
        """We stop: shutdown."""
        self.body.abort(Outcome.ABORTED, error)
        self.fail(error, End(Outcome.ABORTED, self._status, error))

    def client_gone(self) -> None:
        """The client left: close the upstream in this very turn of the loop."""
        self.is_broken = True
        self.body.abort(Outcome.CLIENT_GONE)
        self._end(End(Outcome.CLIENT_GONE, self._status))

    def _end(self, end: End) -> None:
        self.close()
        if not self.done.done():
            self.done.set_result(None)
        self._call.finish(end, self._serving.tasks)

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

    __slots__ = ("_call", "_limit", "_payload", "_silence_s")

    def __init__(
        self, payload: Any, call: Call, http: HttpSettings, *, limit: int | None = None
    ) -> None:
        self._payload = payload
        self._call = call
        self._limit = limit or http.max_upload_bytes
        self._silence_s = http.body_silence_s

    async def readany(self) -> bytes:
        """The next bytes, empty at the end. Raises `Rejected`: 408 after silence, 413, 400."""
        try:
            async with asyncio.timeout(self._silence_s):
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


def reply_head(
    status: int,
    headers: CIMultiDict[str],
    length: int | None,
    *,
    closing: bool,
    is_chunked: bool = False,
    is_old: bool = False,
    has_length: bool = True,
) -> bytes:
    """An answer's head as bytes. Raises ValueError when a field holds a line end or NUL."""
    if "content-length" in headers:
        headers.popall("content-length")
    lines = [STATUS_LINES[status]]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    if is_chunked:
        lines.append("transfer-encoding: chunked\r\n")
    elif length is not None and has_length:
        lines.append(f"content-length: {length}\r\n")
    if closing:
        lines.append("connection: close\r\n\r\n")
    elif is_old:
        lines.append("connection: keep-alive\r\n\r\n")
    else:
        lines.append("\r\n")
    text = "".join(lines)
    if text.count("\n") != len(lines) + (closing or is_old) or "\0" in text:
        raise ValueError("a header field of the answer holds a line end or a NUL")
    return text.encode("utf-8", "surrogateescape")


def _last_chunk(body: Body, call: Call) -> bytes:
    """The end of a chunked body, with the trailers if the client takes them (RFC 9110, 6.5.1)."""
    if not body.trailers or "trailers" not in call.headers.get("te", "").lower():
        return b"0\r\n\r\n"
    fields = "".join([f"{name}: {value}\r\n" for name, value in body.trailers])
    return f"0\r\n{fields}\r\n".encode("utf-8", "surrogateescape")


def _client_key(headers: Any) -> str:
    """What the client sends as its key: Bearer, `x-api-key` or `api-key`."""
    authorization: str = headers.get("authorization", "")
    if authorization[:7].lower() == "bearer ":
        return authorization[7:].strip()
    return str(headers.get("x-api-key") or headers.get("api-key") or "")


def _path_of_absolute(target: str) -> str:
    """The path of an absolute-form target (RFC 9112, 3.2.2); its host means nothing to us."""
    _, separator, rest = target.partition("://")
    if not separator:
        return target
    return "/" + rest.partition("/")[2]


def _too_large(limit: int) -> Rejected:
    return Rejected(413, "body_too_large", f"the request body is larger than {limit} bytes")


def _shutting_down() -> CallError:
    return CallError(503, "shutting_down", "the sidecar is shutting down", retry_after_s=1.0)
