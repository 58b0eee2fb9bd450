"""The mock provider as a server: framing, scripted trouble, books, stop. Raw sockets see it all."""

import asyncio
import hashlib
import io
import os
import stat
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import orjson
import pytest

from sidecar.mock import MockProvider, Received, Script

CHAT = "/v1/chat/completions"
PLAIN = b'{"model":"m","messages":[{"role":"user","content":"hello there"}]}'
STREAM = b'{"model":"m","messages":[{"role":"user","content":"hello there"}],"stream":true}'
WITH_USAGE = STREAM[:-1] + b',"stream_options":{"include_usage":true}}'
RESPONSES = b'{"model":"m","input":"hello there","stream":true}'
COMPLETION = b'{"model":"m","prompt":"hello there"}'
EMBEDDING = b'{"model":"m","input":"hello there"}'
MESSAGES = STREAM[:-1] + b',"max_tokens":99}'
ROLE_EVENT, WORDS, ENDING_EVENTS = 1, 13, 2  # of the default answer; the last is [DONE]


class Wire:
    """A client's end of a raw connection: says bytes, and sees the very bytes that come back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, body: bytes, *lines: str, path: str = CHAT) -> None:
        head = [f"POST {path} HTTP/1.1", "host: mock", f"content-length: {len(body)}", *lines]
        self.writer.write("\r\n".join([*head, "", ""]).encode() + body)

    async def until(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(end), 5)

    async def head(self) -> bytes:
        return (await self.until(b"\r\n\r\n")).lower()

    async def rest(self) -> bytes:
        """All that comes until the other side closes."""
        return await asyncio.wait_for(self.reader.read(), 5)

    async def chunk(self) -> bytes:
        size = int(await self.until(b"\r\n"), 16)
        return (await asyncio.wait_for(self.reader.readexactly(size + 2), 5))[:-2]

    async def chunks(self) -> list[bytes]:
        """The chunks of a body, up to and with the last, empty one."""
        made = [await self.chunk()]
        while made[-1]:
            made.append(await self.chunk())
        return made[:-1]


@pytest.fixture
async def wire(address: str) -> AsyncIterator[Wire]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    yield Wire(reader, writer)
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        pass


# Framing...


async def test_connection_serves_one_request_after_another(wire: Wire) -> None:
    for _ in range(3):
        wire.post(PLAIN)
        head = await wire.head()
        assert head.startswith(b"http/1.1 200 ok\r\n")
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        assert orjson.loads(await wire.reader.readexactly(length))["object"] == "chat.completion"
        wire.post(STREAM)
        assert b"transfer-encoding: chunked" in await wire.head()
        assert (await wire.chunks())[-1] == b"data: [DONE]\n\n"


async def test_each_event_is_a_chunk_of_its_own(wire: Wire) -> None:
    wire.post(STREAM)
    await wire.head()
    chunks = await wire.chunks()
    assert len(chunks) == ROLE_EVENT + WORDS + ENDING_EVENTS
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)


async def test_request_ids_grow_and_equal_requests_get_equal_bodies(
    session: aiohttp.ClientSession,
) -> None:
    seen = []
    for _ in range(2):
        async with session.post(CHAT, data=PLAIN) as reply:
            seen.append((reply.headers["x-request-id"], await reply.read()))
    (first_id, first), (second_id, second) = seen
    assert first_id < second_id
    assert first == second


@pytest.mark.parametrize("body", ["close", "length", "chunked"])
@pytest.mark.parametrize("request_body", [PLAIN, STREAM])
async def test_body_is_framed_as_asked(wire: Wire, body: str, request_body: bytes) -> None:
    wire.post(request_body, f"x-mock-body: {body}", "connection: close")
    head, rest = await wire.head(), await wire.rest()
    assert (b"content-length: " in head) == (body == "length")
    assert (b"transfer-encoding: chunked" in head) == (body == "chunked")
    assert b"connection: close" in head
    assert rest.endswith(b"\r\n0\r\n\r\n") == (body == "chunked")


async def test_close_delimited_body_closes_the_connection(wire: Wire) -> None:
    wire.post(PLAIN, "x-mock-body: close")
    assert b"connection: close" in await wire.head()
    assert orjson.loads(await wire.rest())["model"] == "m"


async def test_http10_gets_no_chunks(wire: Wire) -> None:
    wire.send(b"POST %b HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(STREAM)))
    wire.send(STREAM)
    assert b"chunked" not in await wire.head()
    assert (await wire.rest()).endswith(b"\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("request_body", [PLAIN, STREAM])
async def test_trailer_follows_the_last_chunk(wire: Wire, request_body: bytes) -> None:
    wire.post(request_body, "x-mock-trailer: 1", "connection: close")
    assert b"trailer: x-mock-trailer\r\n" in await wire.head()
    assert (await wire.rest()).endswith(b"\r\n0\r\nx-mock-trailer: done\r\n\r\n")


async def test_early_hints_come_before_the_head(wire: Wire) -> None:
    wire.post(PLAIN, "x-mock-continue: 1")
    assert (await wire.head()).startswith(b"http/1.1 103 early hints\r\n")
    assert (await wire.head()).startswith(b"http/1.1 200 ok\r\n")


async def test_expect_continue_is_answered_before_the_body_is_sent(wire: Wire) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: m\r\nexpect: 100-continue\r\ncontent-length: "
    wire.send(f"{head}{len(PLAIN)}\r\n\r\n".encode())
    assert await wire.head() == b"http/1.1 100 continue\r\n\r\n"
    wire.send(PLAIN)
    assert (await wire.head()).startswith(b"http/1.1 200 ok\r\n")


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_split_cuts_the_stream_anywhere_and_changes_nothing(wire: Wire, size: int) -> None:
    wire.post(STREAM)
    await wire.head()
    whole = b"".join(await wire.chunks())
    wire.post(STREAM, f"x-mock-split: {size}")
    await wire.head()
    pieces = await wire.chunks()
    assert {len(piece) for piece in pieces[:-1]} == {size}
    assert b"".join(pieces) == whole


async def test_gzip_only_for_clients_that_take_it(wire: Wire) -> None:
    wire.post(PLAIN, "x-mock-encoding: gzip", "accept-encoding: br, gzip;q=0")
    head = await wire.head()
    assert b"content-encoding" not in head
    await wire.reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
    wire.post(PLAIN, "x-mock-encoding: gzip", "accept-encoding: gzip", "connection: close")
    assert b"content-encoding: gzip\r\nvary: accept-encoding\r\n" in await wire.head()
    assert orjson.loads(zlib.decompress(await wire.rest(), wbits=31))["model"] == "m"


async def test_each_event_of_a_gzip_stream_can_be_read_at_once(wire: Wire) -> None:
    wire.post(STREAM, "x-mock-encoding: gzip", "accept-encoding: gzip")
    await wire.head()
    inflate = zlib.decompressobj(wbits=31)
    events = [inflate.decompress(chunk) for chunk in await wire.chunks()]
    assert all(event.startswith(b"data: ") and event.endswith(b"\n\n") for event in events)
    assert inflate.eof


async def test_number_and_size_of_events(wire: Wire) -> None:
    wire.post(STREAM, "x-mock-events: 100", "x-mock-event-bytes: 300")
    await wire.head()
    chunks = await wire.chunks()
    assert len(chunks) == ROLE_EVENT + 100 + ENDING_EVENTS
    assert {len(chunk) for chunk in chunks[1:101]} <= set(range(298, 303))


async def test_no_content_events_at_all(wire: Wire) -> None:
    wire.post(STREAM, "x-mock-events: 0")
    await wire.head()
    assert len(await wire.chunks()) == ROLE_EVENT + ENDING_EVENTS


@pytest.mark.parametrize("status", [201, 204, 304, 302, 529, 599])
async def test_any_status_leaves_the_connection_usable(
    session: aiohttp.ClientSession, status: int
) -> None:
    headers = {"x-mock-status": str(status)}
    async with session.post(CHAT, data=PLAIN, headers=headers, allow_redirects=False) as reply:
        body = await reply.read()
    assert reply.status == status
    assert bool(body) == (status not in (204, 304))
    async with session.get("/next") as reply:
        assert reply.status == 200


# Any other path...


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "POST"])
async def test_unknown_path_tells_the_request_back(
    session: aiohttp.ClientSession, method: str
) -> None:
    async with session.request(method, "/a/b?c=%20d&c", data=b"\0\xff") as reply:
        told = await reply.json()
    assert reply.status == 200
    assert (told["method"], told["path"], told["query"]) == (method, "/a/b", "c=%20d&c")
    assert told["body_sha256"] == hashlib.sha256(b"\0\xff").hexdigest()
    assert told["body_bytes"] == 2


async def test_head_request_gets_the_length_and_no_body(wire: Wire) -> None:
    wire.send(b"HEAD /a HTTP/1.1\r\nhost: m\r\n\r\nGET /b HTTP/1.1\r\nhost: m\r\n\r\n")
    assert b"content-length: " in await wire.head()
    assert (await wire.head()).startswith(b"http/1.1 200 ok\r\n")


async def test_headers_are_told_back_as_they_came(wire: Wire) -> None:
    wire.send(b"GET /a HTTP/1.1\r\nHost: m\r\nX-Two: 1\r\nx-two: 2\r\n\r\n")
    head = await wire.head()
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    told = orjson.loads(await wire.reader.readexactly(length))
    assert told["headers"] == [["Host", "m"], ["X-Two", "1"], ["x-two", "2"]]


async def test_large_body_is_hashed_whole_and_kept_in_part(
    session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    body = bytes(5 * 1024 * 1024)
    async with session.post("/upload", data=io.BytesIO(body)) as reply:
        told = await reply.json()
    assert told["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert provider.books.requests[0].body_bytes == len(body)
    assert len(provider.books.requests[0].body) == 4 * 1024 * 1024


async def test_compressed_request_body_is_kept_as_it_came(
    session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    packed = zlib.compress(b"x")
    async with session.post("/a", data=packed, headers={"content-encoding": "deflate"}) as reply:
        assert (await reply.json())["body_bytes"] == len(packed)
    assert provider.books.requests[0].body == packed


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/other"])
async def test_bad_setting_is_a_clear_400(session: aiohttp.ClientSession, path: str) -> None:
    async with session.post(path, data=PLAIN, headers={"x-mock-split": "no"}) as reply:
        error = (await reply.json())["error"]
    assert reply.status == 400
    assert error["message"] == "x-mock-split: 'no' is not a whole number"


# Trouble...


@pytest.mark.parametrize("request_body", [PLAIN, STREAM])
async def test_die_before_the_head_sends_nothing(wire: Wire, request_body: bytes) -> None:
    wire.post(request_body, "x-mock-die: head")
    assert await wire.rest() == b""


async def test_die_after_events_sends_just_those_and_no_end(
    wire: Wire, provider: MockProvider
) -> None:
    wire.post(STREAM, "x-mock-die: events:3")
    await wire.head()
    rest = await wire.rest()
    assert rest.count(b"data: ") == 3
    assert not rest.endswith(b"0\r\n\r\n")
    book = provider.books.of("m")
    assert (book.events, book.output_tokens, book.aborted_streams) == (3, 2, 1)
    assert not provider.books.requests[0].client_gone


async def test_die_in_the_middle_of_a_plain_body(wire: Wire, provider: MockProvider) -> None:
    wire.post(PLAIN, "x-mock-die: events:1")
    head, rest = await wire.head(), await wire.rest()
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    assert len(rest) == length // 2
    assert provider.books.of("m").aborted_calls == 1
    assert provider.books.of("m").output_tokens == 0


async def test_hang_before_the_head_until_the_client_leaves(
    wire: Wire, provider: MockProvider
) -> None:
    wire.post(PLAIN, "x-mock-hang: head")
    await provider.wait_for(lambda: provider.books.requests)
    received = provider.books.requests[0]
    assert (provider.open_requests, received.status) == (1, None)
    loop = asyncio.get_running_loop()
    left_at = loop.time()
    wire.writer.close()
    await provider.wait_for(lambda: received.client_gone and provider.open_requests == 0)
    assert received.client_gone_at is not None
    assert received.client_gone_at - left_at < 0.5
    assert provider.books.of("m").aborted_calls == 1


async def test_hang_after_events_until_the_client_leaves(
    wire: Wire, provider: MockProvider
) -> None:
    wire.post(STREAM, "x-mock-hang: events:3")
    await provider.wait_for(lambda: provider.books.total.events == 3)
    await wire.head()
    assert [await wire.chunk() for _ in range(3)]
    assert provider.open_requests == 1
    wire.writer.transport.abort()
    await provider.wait_for(lambda: provider.books.requests[0].client_gone)
    assert provider.books.of("m").output_tokens == 2


async def test_stop_point_beyond_the_stream_is_never_reached(wire: Wire) -> None:
    wire.post(STREAM, "x-mock-die: events:1000")
    await wire.head()
    assert (await wire.chunks())[-1] == b"data: [DONE]\n\n"


async def test_client_that_leaves_mid_stream_is_noticed_and_booked(
    wire: Wire, provider: MockProvider
) -> None:
    wire.post(STREAM, "x-mock-events: 1000", "x-mock-delay-ms: 2")
    await wire.head()
    seen = [await wire.chunk() for _ in range(5)]
    wire.writer.close()
    await provider.wait_for(lambda: provider.open_requests == 0)
    received, book = provider.books.requests[0], provider.books.of("m")
    assert received.client_gone
    assert len(seen) <= received.events_sent < 1000
    assert book.output_tokens == received.output_tokens_sent == received.events_sent - 1
    assert (book.input_tokens, book.aborted_streams, book.completed_calls) == (2, 1, 0)


async def test_client_that_does_not_read_holds_the_stream_back(
    wire: Wire, provider: MockProvider
) -> None:
    wire.post(STREAM, "x-mock-events: 2000", "x-mock-event-bytes: 100000")
    await wire.head()
    # 200 MB wanted; the sockets' buffers and the stream reader's take a small part of it.
    await provider.wait_for(lambda: provider.books.total.events > 10)
    wire.writer.transport.abort()
    await provider.wait_for(lambda: provider.open_requests == 0)
    assert provider.books.requests[0].client_gone
    assert provider.books.total.events < 1000


async def test_client_that_leaves_while_sending_is_listed_with_what_came(
    wire: Wire, provider: MockProvider
) -> None:
    wire.send(f"POST {CHAT} HTTP/1.1\r\nhost: m\r\ncontent-length: 100\r\n\r\nhalf".encode())
    await provider.wait_for(lambda: provider.arriving and provider.arriving[0].body_bytes == 4)
    assert not provider.books.requests
    wire.writer.close()
    await provider.wait_for(lambda: provider.open_requests == 0)
    assert provider.arriving == []
    assert provider.books.requests[0].body == b"half"
    assert provider.books.requests[0].client_gone


async def test_body_that_is_too_large_for_a_call_is_refused(
    wire: Wire, provider: MockProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.mock.provider._MAX_API_BODY_BYTES", len(PLAIN) - 1)
    wire.post(PLAIN)
    assert (await wire.rest()).startswith(b"HTTP/1.1 413 ")
    assert provider.books.requests[0].status == 413
    assert provider.books.total.calls == 0


async def test_error_event_ends_a_stream_cleanly_and_is_a_failure(
    wire: Wire, provider: MockProvider
) -> None:
    wire.post(STREAM, "x-mock-error-event: 2")
    await wire.head()
    *good, bad = await wire.chunks()
    assert len(good) == 2
    assert bad.startswith(b'data: {"error":{')
    book = provider.books.of("m")
    assert (book.failed_calls, book.completed_calls, book.output_tokens) == (1, 0, 1)


async def test_delays_come_before_the_head_and_before_each_event(
    wire: Wire, provider: MockProvider
) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    wire.post(STREAM, "x-mock-first-delay-ms: 40", "x-mock-delay-ms: 10", "x-mock-events: 2")
    await wire.head()
    head_at = loop.time()
    await wire.chunks()
    assert head_at - begun >= 0.039
    assert loop.time() - head_at >= 0.045  # five events; timers may fire a bit early


# Script, books, waiting...


async def test_script_decides_where_headers_do_not() -> None:
    script = Script.parse("[{match: {model: m, nth: 2}, status: 429, retry_after: 1}]")
    provider = MockProvider(script=script)
    address = await provider.start()
    async with aiohttp.ClientSession(base_url=f"http://{address}") as session:
        statuses = []
        for headers in ({}, {"x-mock-status": "503"}, {}):
            async with session.post(CHAT, data=PLAIN, headers=headers) as reply:
                statuses.append((reply.status, reply.headers.get("retry-after")))
    assert statuses == [(200, None), (503, "1"), (200, None)]
    await provider.stop()


async def test_books_sum_what_was_sent_per_model(
    session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    for body, headers in (
        (PLAIN, {}),
        (STREAM, {"x-mock-usage": "wrong"}),
        (PLAIN, {"x-mock-status": "500"}),
        (PLAIN.replace(b'"m"', b'"n"'), {"x-mock-text": "one"}),
    ):
        async with session.post(CHAT, data=body, headers=headers) as reply:
            await reply.read()
    m, n = provider.books.of("m"), provider.books.of("n")
    assert (m.calls, m.completed_calls, m.failed_calls) == (3, 2, 1)
    assert (m.input_tokens, m.output_tokens, m.events) == (4, 2 * WORDS, 16)
    assert (n.input_tokens, n.output_tokens) == (2, 1)
    assert provider.books.total.calls == 4


@pytest.mark.parametrize(
    ("path", "request_body", "headers", "told"),
    [
        (CHAT, PLAIN, (), (2, WORDS)),
        (CHAT, PLAIN, ("x-mock-usage: wrong",), (27, WORDS * 10 + 7)),
        (CHAT, PLAIN, ("x-mock-usage: none",), (0, 0)),
        (CHAT, PLAIN, ("x-mock-die: events:1",), (0, 0)),
        (CHAT, STREAM, (), (0, 0)),  # it did not ask for usage
        (CHAT, WITH_USAGE, (), (2, WORDS)),
        (CHAT, WITH_USAGE, ("x-mock-die: events:16",), (2, WORDS)),  # all but [DONE]
        (CHAT, WITH_USAGE, ("x-mock-die: events:15",), (0, 0)),
        ("/v1/responses", RESPONSES, (), (2, WORDS)),
        ("/v1/responses", RESPONSES, ("x-mock-error-event: 20",), (0, 0)),
        ("/v1/completions", COMPLETION, (), (2, WORDS)),
        ("/v1/embeddings", EMBEDDING, (), (2, 0)),
        ("/v1/messages", MESSAGES, (), (2, WORDS)),
        ("/v1/messages", MESSAGES, ("x-mock-die: events:5",), (2, 1)),  # what it began with
        ("/v1/messages", MESSAGES, ("x-mock-status: 529",), (0, 0)),
        ("/v1/messages", MESSAGES, ("x-mock-error-event: 0",), (0, 0)),
    ],
)
async def test_books_sum_the_usage_that_clients_were_told(
    wire: Wire,
    provider: MockProvider,
    path: str,
    request_body: bytes,
    headers: tuple[str, ...],
    told: tuple[int, int],
) -> None:
    wire.post(request_body, *headers, "connection: close", path=path)
    await wire.rest()
    await provider.wait_for(lambda: not provider.open_requests)
    book = provider.books.of("m")
    assert (book.told_input_tokens, book.told_output_tokens) == told


@pytest.mark.parametrize(
    ("headers", "began"),
    [
        ((), True),
        (("x-mock-die: events:1",), True),
        (("x-mock-die: head",), False),
        (("x-mock-status: 500",), False),
        (("x-mock-error-event: 0",), False),
        (("x-mock-error-event: 1",), True),
    ],
)
async def test_each_request_is_told_at_its_end_and_whether_a_good_answer_had_begun(
    headers: tuple[str, ...], began: bool
) -> None:
    done: list[Received] = []
    provider = MockProvider(on_done=done.append, keep_requests=0)
    host, _, port = (await provider.start()).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    Wire(reader, writer).post(STREAM, *headers, "connection: close")
    await Wire(reader, writer).rest()
    await provider.wait_for(lambda: done)
    writer.close()
    await provider.stop()
    (received,) = done
    assert received.finished_at is not None
    assert (received.answer_began_at is not None) is began
    if began:
        assert received.model == "m"
        assert received.arrived_at <= (received.answer_began_at or 0.0) <= received.finished_at


async def test_script_with_shares_is_drawn_by_the_providers_seed() -> None:
    async def statuses(seed: int) -> list[int]:
        script = Script.parse("[{share: 0.5, status: 500}]")
        provider = MockProvider(script=script, seed=seed)
        address = await provider.start()
        async with aiohttp.ClientSession(base_url=f"http://{address}") as session:
            seen = [(await session.post(CHAT, data=PLAIN)).status for _ in range(24)]
        await provider.stop()
        return seen

    first = await statuses(1)
    assert set(first) == {200, 500}
    assert first == await statuses(1) != await statuses(2)


async def test_books_list_the_request_as_it_came(wire: Wire, provider: MockProvider) -> None:
    wire.post(PLAIN, "X-Some: 1", path=CHAT + "?a=b")
    await wire.head()
    received = provider.books.requests[0]
    assert (received.method, received.path, received.query) == ("POST", CHAT, "a=b")
    assert ("X-Some", "1") in received.headers
    assert received.header("x-some") == "1"
    assert received.header_values("x-none") == []
    assert received.body == PLAIN
    assert received.is_answered


async def test_books_forget_the_oldest_requests() -> None:
    provider = MockProvider(keep_requests=2)
    address = await provider.start()
    async with aiohttp.ClientSession(base_url=f"http://{address}") as session:
        for path in ("/1", "/2", "/3"):
            async with session.get(path) as reply:
                await reply.read()
    assert [received.path for received in provider.books.requests] == ["/2", "/3"]
    await provider.stop()


async def test_credentials_are_not_in_the_repr(wire: Wire, provider: MockProvider) -> None:
    wire.post(PLAIN, "authorization: Bearer sk-secret")
    await wire.head()
    assert "sk-secret" not in repr(provider.books)


async def test_waiting_sees_a_state_that_lasts_for_one_event_only(
    session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    waiting = asyncio.create_task(provider.wait_for(lambda: provider.books.total.events == 7))
    await asyncio.sleep(0)
    async with session.post(CHAT, data=STREAM) as reply:
        await reply.read()
    await waiting


async def test_waiting_in_vain_times_out_and_says_the_state(provider: MockProvider) -> None:
    with pytest.raises(TimeoutError, match="<MockProvider stopped open=0"):
        await provider.wait_for(lambda: False, timeout_s=0.01)


async def test_predicate_that_raises_while_waiting_raises_there(
    session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    wanted: Callable[[], object] = lambda: provider.books.requests and 1 / 0  # noqa: E731
    waiting = asyncio.create_task(provider.wait_for(wanted))
    await asyncio.sleep(0)
    async with session.get("/") as reply:
        assert reply.status == 200
    with pytest.raises(ZeroDivisionError):
        await waiting


# Start and stop...


async def test_unix_socket_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "mock.sock"
    provider = MockProvider()
    assert await provider.start(unix_path=str(path)) == f"unix:{path}"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    connector = aiohttp.UnixConnector(str(path))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post(f"http://mock{CHAT}", data=PLAIN) as reply,
    ):
        assert reply.status == 200
    await provider.stop()
    assert not path.exists()


async def test_stop_closes_open_streams_and_idle_connections_at_once(
    wire: Wire, session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    async with session.get("/idle-afterwards") as reply:
        await reply.read()
    wire.post(STREAM, "x-mock-hang: events:1")
    await wire.head()
    await wire.chunk()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await provider.stop()
    assert loop.time() - begun < 0.5
    assert await wire.rest() == b""
    assert provider.open_requests == 0
    assert not provider.books.requests[-1].client_gone
    assert provider.books.of("m").aborted_streams == 1


async def test_stop_can_be_called_at_any_time(tmp_path: Path) -> None:
    provider = MockProvider()
    await provider.stop()
    with pytest.raises(FileNotFoundError):
        await provider.start(unix_path=str(tmp_path / "absent" / "mock.sock"))
    await provider.stop()
    address = await provider.start(port=0)
    with pytest.raises(RuntimeError):
        await provider.start()
    await provider.stop()
    await provider.stop()
    assert await provider.start(port=int(address.rpartition(":")[2])) == address
    await provider.stop()


async def test_start_takes_a_host_or_a_path_not_both(provider: MockProvider) -> None:
    with pytest.raises(ValueError, match="not both"):
        await provider.start(host="127.0.0.1", unix_path="x")
