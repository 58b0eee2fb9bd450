"""The mock provider: an HTTP server that plays LLM providers, and does as it is told.

It runs on the caller's event loop, on a TCP port or a unix socket, so the data path of whoever
calls it is the real one. aiohttp parses the requests and keeps the connections; answers are built
by one module a dialect, framed by `wire`, and written here straight to the transport.
Which settings there are is told in `script`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import orjson
from aiohttp import web

from sidecar.mock import anthropic, dashscope, openai, qianfan
from sidecar.mock.books import Books, ModelBook, Received
from sidecar.mock.content import REQUEST_ID_MARK, Answer
from sidecar.mock.script import (
    Given,
    Script,
    ScriptRun,
    SettingError,
    Settings,
    merge,
    parse_headers,
    split_settings,
)
from sidecar.mock.wire import EARLY_HINTS, Delivery, Ending, allows_gzip, deliver

_MAX_API_BODY_BYTES = 64 * 1024 * 1024
_MAX_ECHOED_BODY_KEPT_BYTES = 4 * 1024 * 1024
_MAX_HEAD_LINE_BYTES = 64 * 1024
_STOP_TIMEOUT_S = 2.0
# Built answers are kept only while small, so that what is kept stays within some megabytes.
_MAX_KEPT_REQUEST_BYTES = 16 * 1024
_MAX_KEPT_STREAM_BYTES = 256 * 1024
_TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_DEFAULT_EVENT_BYTES = 256
_PATHS = openai.PATHS | anthropic.PATHS | dashscope.PATHS
"""Those that name no model; `qianfan.has_path` knows the others."""


class _Sent(web.StreamResponse):
    """Tells aiohttp that the answer is out already, and whether the connection lives on."""

    def __init__(self, *, is_kept: bool) -> None:
        super().__init__()
        self._is_kept = is_kept

    @property
    def keep_alive(self) -> bool:
        return self._is_kept

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


class _ClientLeftError(Exception):
    """The client closed the connection, found out while writing."""


@dataclass(slots=True, eq=False)
class _Waiter:
    predicate: Callable[[], object]
    woken: asyncio.Future[None]


class MockProvider:
    """Serves scripted answers until stopped; remembers what it got and gave in `books`.

    Settings come with each request (`x-mock-*` headers) or from the script; headers win.
    `keep_requests` is how many requests the books list; the sums are kept in any case. `seed`
    decides which calls get the rules that have a `share`. `on_done` is told each request once it
    is over, however it ended, for books of another kind than ours.
    """

    def __init__(
        self,
        *,
        script: Script | None = None,
        keep_requests: int = 1000,
        seed: int = 0,
        on_done: Callable[[Received], None] | None = None,
    ) -> None:
        self.books = Books(max_requests=keep_requests)
        self.arriving: list[Received] = []  # requests whose body is still coming
        self.open_requests = 0
        self._script = ScriptRun(script, seed) if script is not None and script.rules else None
        self._on_done = on_done
        self._waiters: list[_Waiter] = []
        self._request_count = 0
        self._is_stopping = False
        self._unix_path: Path | None = None
        self._listener: asyncio.Server | None = None
        self._server: web.Server | None = None
        self._kept = _Sent(is_kept=True)
        self._closed = _Sent(is_kept=False)

    def __repr__(self) -> str:
        total = self.books.total
        state = "stopped" if self._listener is None else "serving"
        return (
            f"<MockProvider {state} open={self.open_requests} requests={len(self.books.requests)}"
            f" calls={total.calls} completed={total.completed_calls} events={total.events}>"
        )

    async def start(
        self, *, host: str | None = None, port: int = 0, unix_path: str | None = None
    ) -> str:
        """Listens, and returns the address: "127.0.0.1:PORT" or "unix:/path".

        Without host and path: on a free port of 127.0.0.1. The socket file is for this user
        only. Raises OSError if it cannot listen, RuntimeError when it is listening already.
        """
        if self._listener is not None:
            raise RuntimeError("the mock provider is already started")
        if unix_path is not None and host is not None:
            raise ValueError("either a host or a unix path, not both")
        self._loop = asyncio.get_running_loop()
        self._is_stopping = False
        self._server = web.Server(
            self._serve,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            lingering_time=0,
            max_line_size=_MAX_HEAD_LINE_BYTES,
            max_field_size=_MAX_HEAD_LINE_BYTES,
        )
        if unix_path is not None:
            self._unix_path = Path(unix_path)
            self._listener = await self._loop.create_unix_server(
                self._server, unix_path, backlog=1024, start_serving=False
            )
            os.chmod(unix_path, 0o600)  # before anybody can connect
            await self._listener.start_serving()
            return f"unix:{unix_path}"
        self._listener = await self._loop.create_server(
            self._server, host or "127.0.0.1", port, backlog=1024
        )
        address, bound_port = self._listener.sockets[0].getsockname()[:2]
        return f"[{address}]:{bound_port}" if ":" in address else f"{address}:{bound_port}"

    async def stop(self) -> None:
        """Stops listening and closes every connection at once, answers under way included.

        Can be called again, and after a start that failed. The books stay.
        """
        self._is_stopping = True
        listener, self._listener = self._listener, None
        server, self._server = self._server, None
        unix_path, self._unix_path = self._unix_path, None
        if listener is not None:
            listener.close()
        if server is not None:
            for connection in server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
            # The handlers are being cancelled; this waits until they have gone.
            await server.shutdown(_STOP_TIMEOUT_S)
        if listener is not None:
            await listener.wait_closed()
            if unix_path is not None:
                with suppress(FileNotFoundError):
                    unix_path.unlink()

    @property
    def open_connections(self) -> int:
        """Connections from clients, idle ones included."""
        return len(self._server.connections) if self._server is not None else 0

    async def wait_for(self, predicate: Callable[[], object], timeout_s: float = 5.0) -> None:
        """Returns once the predicate is true; raises TimeoutError after `timeout_s`.

        Asked now and on each change: a request arrived, an event was sent, a client left, an
        answer ended. It is asked at the very change, so a state that lasts for one event only is
        seen too. What it raises is raised here.
        """
        if predicate():
            return
        waiter = _Waiter(predicate, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.woken
        except TimeoutError:
            raise TimeoutError(f"not within {timeout_s} s: {self!r}") from None
        finally:
            self._waiters.remove(waiter)

    def _changed(self) -> None:
        for waiter in self._waiters:
            if waiter.woken.done():
                continue
            try:
                if waiter.predicate():
                    waiter.woken.set_result(None)
            except Exception as error:
                waiter.woken.set_exception(error)

    # Answering one request...

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._is_stopping and request.transport is not None:
            # Accepted just before the listener closed, and so not among those that stop() saw.
            request.transport.abort()
            return self._closed
        self.open_requests += 1
        path, _, query = request.raw_path.partition("?")
        received = Received(
            method=request.method,
            path=path,
            query=query,
            raw_headers=request.raw_headers,
            arrived_at=self._loop.time(),
        )
        try:
            return await self._receive_and_answer(request, received)
        except (_ClientLeftError, ConnectionError):
            self._note_gone(received)
            return self._closed
        except asyncio.CancelledError:
            self._note_gone(received)
            raise
        finally:
            self.open_requests -= 1
            received.finished_at = self._loop.time()
            if self._on_done is not None:
                self._on_done(received)
            self._changed()

    def _note_gone(self, received: Received) -> None:
        if self._is_stopping:
            return  # the connection was closed by us
        received.client_gone = True
        received.client_gone_at = self._loop.time()

    async def _receive_and_answer(
        self, request: web.BaseRequest, received: Received
    ) -> web.StreamResponse:
        path, method = received.path, received.method
        is_api = method == "POST" and (path in _PATHS or qianfan.has_path(path))
        self.arriving.append(received)
        try:
            digest = None if is_api else hashlib.sha256()
            limit = _MAX_API_BODY_BYTES if is_api else _MAX_ECHOED_BODY_KEPT_BYTES
            await self._receive(request, received, digest.update if digest else None, limit)
        finally:
            self.arriving.remove(received)
            self.books.add(received)
            self._changed()
        if is_api and received.body_bytes > limit:
            _write(request, _TOO_LARGE)
            received.status = 413
            received.is_answered = True
            return self._closed

        headers = split_settings(received.raw_headers)
        try:
            scripted: Given = ()
            if self._script is not None:
                scripted = self._script.next(path, _model_of(path, received.body) if is_api else "")
            settings = merge(scripted, parse_headers(headers))
            refusal = None
        except SettingError as error:
            settings, refusal = Settings(), str(error)
        wants_gzip = settings.encoding is not None and allows_gzip(
            request.headers.get("Accept-Encoding", "")
        )
        is_http10 = request.version < (1, 1)
        if is_api and refusal is None:
            is_stream = path in dashscope.PATHS and dashscope.asks_stream(
                request.headers.get("X-DashScope-SSE", ""), request.headers.get("Accept", "")
            )
            is_kept = _is_kept(received.body, settings, repeats=is_stream)
            build = _build if is_kept else _build.__wrapped__
            delivery = build(path, received.body, settings, wants_gzip, is_http10, is_stream)
        else:
            delivery = deliver(
                replace(_error_answer(path, 400, Settings(), refusal), status=400)
                if refusal is not None
                else _other_answer(received, digest.hexdigest() if digest else "", settings),
                settings,
                allows_gzip=wants_gzip,
                is_head=method == "HEAD",
                is_http10=is_http10,
            )
        self._request_count += 1
        request_id = b"req_%024x" % self._request_count
        if delivery.has_request_id_mark:
            # Before the framing, which may compress the body or cut it in the midst of the id.
            body = delivery.answer.body.replace(REQUEST_ID_MARK, request_id)
            delivery = deliver(
                replace(delivery.answer, body=body),
                settings,
                allows_gzip=wants_gzip,
                is_head=method == "HEAD",
                is_http10=is_http10,
            )
        return await self._send(request, received, settings, delivery, request_id)

    async def _receive(
        self,
        request: web.BaseRequest,
        received: Received,
        update_digest: Callable[[bytes], None] | None,
        limit_bytes: int,
    ) -> None:
        """Reads the body into `received`: up to the limit, or to the end where it is hashed."""
        content = request.content
        if not content.is_eof():
            self._changed()
            if request.headers.get("Expect", "").lower() == "100-continue":
                _write(request, b"HTTP/1.1 100 Continue\r\n\r\n")
        chunks: list[bytes] = []
        kept_bytes = 0
        try:
            while chunk := await content.readany():
                received.body_bytes += len(chunk)
                if update_digest is not None:
                    update_digest(chunk)
                elif received.body_bytes > limit_bytes:
                    return
                if kept_bytes < limit_bytes:
                    chunks.append(chunk[: limit_bytes - kept_bytes])
                    kept_bytes += len(chunks[-1])
                if not content.is_eof():
                    self._changed()
        finally:
            received.body = b"".join(chunks)

    async def _send(
        self,
        request: web.BaseRequest,
        received: Received,
        settings: Settings,
        delivery: Delivery,
        request_id: bytes,
    ) -> web.StreamResponse:
        """Writes the answer and books what was really sent, however it ends."""
        received.model = delivery.answer.model
        book = self.books.of(received.model)
        book.calls += 1
        try:
            return await self._write_out(request, received, settings, delivery, request_id, book)
        finally:
            if received.status is not None and received.status < 300:
                book.input_tokens += delivery.answer.input_tokens
            book.output_tokens += received.output_tokens_sent
            if received.told is not None:
                book.told_input_tokens += received.told.input_tokens
                book.told_output_tokens += received.told.output_tokens
            if not received.is_answered:
                book.aborted_calls += 1
                book.aborted_streams += delivery.is_stream
            elif delivery.is_failure:
                book.failed_calls += 1
            else:
                book.completed_calls += 1

    async def _write_out(
        self,
        request: web.BaseRequest,
        received: Received,
        settings: Settings,
        delivery: Delivery,
        request_id: bytes,
        book: ModelBook,
    ) -> web.StreamResponse:
        if settings.first_delay_ms:
            await asyncio.sleep(settings.first_delay_ms / 1000)
        if settings.early_hints and delivery.head and request.version >= (1, 1):
            _write(request, EARLY_HINTS)
            await asyncio.sleep(0)
        must_close = delivery.must_close or not request.keep_alive

        # The head goes out with the first event, unless that one is to be late.
        pending = b""
        if delivery.head:
            end = b"\r\nconnection: close\r\n\r\n" if must_close else b"\r\n\r\n"
            pending = delivery.head + request_id + end
            if settings.delay_ms or not delivery.writes:
                _write(request, pending)
                received.status = delivery.answer.status
                pending = b""
                self._changed()

        is_stream, delay_s = delivery.is_stream, settings.delay_ms / 1000
        writer = request.writer
        events = delayed_at = 0
        pairs = zip(delivery.writes, delivery.events_done, strict=True)
        for count, (data, done) in enumerate(pairs, 1):
            if delay_s and (count == 1 or events > delayed_at):
                delayed_at = events
                await asyncio.sleep(delay_s)
            if pending:
                data, pending = pending + data, b""
                received.status = delivery.answer.status
            _write(request, data)
            if count == 1 and delivery.answer.status < 300 and delivery.good_events:
                received.answer_began_at = self._loop.time()
            received.output_tokens_sent = delivery.tokens_after(count)
            received.told = delivery.told_after(count)
            if is_stream:
                book.events += done - events
                received.events_sent = done
            events = done
            if count == len(delivery.writes):
                break
            if self._waiters:
                self._changed()
            await writer.drain()
            # Lets others run, and a client's leaving be noticed, between any two events.
            await asyncio.sleep(0)

        if delivery.ending is Ending.HANG:
            self._changed()
            await self._loop.create_future()  # until cancelled: the client left, or we stop
        await writer.drain()
        if delivery.ending is Ending.DIE:
            if (transport := request.transport) is not None:
                # close, not abort: the events that were to be sent still go out.
                transport.close()
            return self._closed
        received.is_answered = True
        return self._closed if must_close else self._kept


def _write(request: web.BaseRequest, data: bytes) -> None:
    transport = request.transport
    if transport is None or transport.is_closing():
        raise _ClientLeftError
    transport.write(data)


# Choosing the answer...


def _is_kept(body: bytes, settings: Settings, *, repeats: bool) -> bool:
    """`repeats`: each event may hold the text of all before it."""
    events = settings.events or 0
    stream_bytes = events * (settings.event_bytes or _DEFAULT_EVENT_BYTES)
    stream_bytes *= events if repeats else 1
    return len(body) <= _MAX_KEPT_REQUEST_BYTES and stream_bytes <= _MAX_KEPT_STREAM_BYTES


@lru_cache(maxsize=64)
def _build(
    path: str, body: bytes, settings: Settings, wants_gzip: bool, is_http10: bool, is_stream: bool
) -> Delivery:
    """The delivery for a POST on an API path: equal calls, as a benchmark's, are built once.

    `is_stream`: a header asks for a stream, of a dialect whose bodies do not.
    """
    if settings.status is not None and settings.status >= 300:
        # Before looking at the request: what was asked for is this status.
        answer = _error_answer(path, settings.status, settings, None, model=_model_of(path, body))
    elif path in dashscope.PATHS:
        answer = dashscope.answer(path, body, settings, is_stream=is_stream)
    elif path in anthropic.PATHS:
        answer = anthropic.answer(path, body, settings)
    elif path in openai.PATHS:
        answer = openai.answer(path, body, settings)
    else:
        answer = qianfan.answer(path, body, settings)
    return deliver(answer, settings, allows_gzip=wants_gzip, is_head=False, is_http10=is_http10)


def _error_answer(
    path: str, status: int, settings: Settings, message: str | None, *, model: str = ""
) -> Answer:
    if path in anthropic.PATHS:
        answer = anthropic.make_error(status, settings=settings, message=message)
    elif path in dashscope.PATHS:
        answer = dashscope.make_error(status, settings=settings, message=message)
    elif qianfan.has_path(path):
        answer = qianfan.make_error(status, settings=settings, message=message)
    else:
        answer = openai.make_error(status, settings=settings, message=message)
    return replace(answer, model=model)


def _other_answer(received: Received, body_sha256: str, settings: Settings) -> Answer:
    """What is answered outside the POST endpoints: the models, or the request told back."""
    if settings.status is not None and settings.status >= 300:
        return _error_answer(received.path, settings.status, settings, None)
    if received.path == openai.MODELS_PATH and received.method in ("GET", "HEAD"):
        return openai.models(settings)
    told = {
        "method": received.method,
        "path": received.path,
        "query": received.query,
        # A value that is no UTF-8 holds surrogates, which JSON cannot.
        "headers": [
            (name, value.encode(errors="replace").decode()) for name, value in received.headers
        ],
        "body_sha256": body_sha256,
        "body_bytes": received.body_bytes,
    }
    return Answer(
        settings.status or 200,
        (("content-type", "application/json"),),
        openai.REQUEST_ID_HEADER,
        body=orjson.dumps(told),
    )


def _model_of(path: str, body: bytes) -> str:
    """The model a request names, "" if none."""
    if qianfan.has_path(path):
        return qianfan.model_of(path)
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    model = data.get("model") if isinstance(data, dict) else None
    return model if isinstance(model, str) else ""
