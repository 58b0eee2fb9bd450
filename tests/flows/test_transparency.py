"""What no filter changes passes byte for byte: bodies, events, fields, paths, statuses."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.flow import (
    CHAT,
    MESSAGES,
    Answer,
    Flow,
    Start,
    chat_body,
    chat_request,
    request,
)
from tests.support.upstream import RawConnection, RawUpstream

NO_TAPS = "chains: {default: {call: [request_id, access_log]}}\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
STREAM = (
    ": a comment\n\n"
    'data: {"choices":[{"index":0,"delta":{"content":"gr\u00fc\u00dfe \U0001f600"}}],"x_new":1}\n\n'
    "event: never.heard.of\nid: 7\nretry: 10\ndata: line one\ndata: line two\ndata\n\n"
    'data:{"no":"space"}\r\n\r\n'
    "event: ping\n\n"
    "unknown: field\n\n"
    'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"extra":{}}}\n\n'
    "data: [DONE]\n\n"
    ": after the end\n\n"
).encode()


USAGE_EVENT = (
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"extra":{}}}\n\n'
)
ASKS_FOR_USAGE = request(
    "POST", CHAT, chat_body(stream=True, stream_options={"include_usage": True})
)
"""Its caller wants the event with usage: nothing is taken out of the stream."""


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


def config(raw: RawUpstream, more: str = "") -> str:
    return f"upstreams: {{up-openai: {{base_url: '{raw.base_url}/v1'}}}}\n{more}"


def chunked(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def answered(
    flow: Flow, raw: RawUpstream, data: bytes, answer: bytes, *, is_head: bool = False
) -> tuple[Answer, bytes]:
    """The client's answer, and the request as the upstream got it."""
    client = await flow.connect()
    client.send(data)
    connection: RawConnection = await raw.accept()
    received = await connection.read_request()
    connection.write(answer)
    got = await client.answer(is_head=is_head)
    client.leave()
    connection.close()
    return got, received


# Streams


@pytest.mark.parametrize("chains", ["", NO_TAPS], ids=["tapped", "untapped"])
async def test_a_stream_is_the_same_however_it_is_cut(
    start: Start, raw: RawUpstream, chains: str
) -> None:
    flow = await start(config(raw, chains))
    cuts = [[STREAM], [STREAM[at : at + 1] for at in range(len(STREAM))]]
    cuts += [[STREAM[:at], STREAM[at:]] for at in range(1, len(STREAM), 7)]
    for pieces in cuts:
        got, _ = await answered(flow, raw, ASKS_FOR_USAGE, STREAM_HEAD + chunked(pieces))
        assert got.is_whole
        assert got.body == STREAM
    lines = await flow.logged(len(cuts))
    if not chains:
        assert {line["output_tokens"] for line in lines} == {4}


async def test_a_stream_is_the_same_however_the_network_cuts_it(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    wire = STREAM_HEAD + chunked([STREAM])
    chance = random.Random(7)
    for _ in range(20):
        client = await flow.connect()
        client.send(ASKS_FOR_USAGE)
        connection = await raw.accept()
        await connection.read_request()
        at = 0
        while at < len(wire):
            size = chance.randint(1, 60)
            connection.write(wire[at : at + size])
            at += size
            await flow.call(request("GET", "/v1/models"))  # a few turns of the loop
        assert (await client.answer()).body == STREAM
        connection.close()


@pytest.mark.parametrize("model", ["gpt", "claude"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
async def test_an_answer_is_the_same_in_writes_of_any_size(
    flow: Flow, model: str, size: int
) -> None:
    for stream in (False, True):
        plain = await flow.call(chat_request(model, stream=stream))
        cut = await flow.call(chat_request(model, stream=stream, x_mock_split=str(size)))
        assert cut.is_whole
        assert cut.body == plain.body


async def test_events_are_passed_on_as_they_come(start: Start, raw: RawUpstream) -> None:
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(chat_request(stream=True))
    connection = await raw.accept()
    await connection.read_request()
    connection.write(STREAM_HEAD)
    for number in range(5):
        event = b"data: %d\n\n" % number
        connection.write(b"%x\r\n%b\r\n" % (len(event), event))
        assert (await client.until(event)).endswith(event)
    connection.write(b"0\r\n\r\n")
    assert await client.until(b"0\r\n\r\n") == b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "fields",
    [
        b"content-type: audio/mpeg\r\n",
        b"content-type: application/x-ndjson\r\n",
        b"content-type: text/event-stream\r\ncontent-encoding: gzip\r\n",
        b"content-type: text/event-stream\r\ncontent-encoding: br\r\n",
        b"",
    ],
)
async def test_answers_in_which_nothing_can_be_looked_for_are_passed_on_as_they_come(
    start: Start, raw: RawUpstream, fields: bytes
) -> None:
    """Speech is heard, and what was compressed all the same is read, while it is made."""
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(chat_request(stream=True))
    connection = await raw.accept()
    await connection.read_request()
    connection.write(b"HTTP/1.1 200 OK\r\n" + fields + b"content-length: 10\r\n\r\n")
    answer = b""
    for number in range(10):
        connection.write(b"%d" % number)
        answer += await client.until(b"%d" % number)
    assert answer.endswith(b"0123456789")
    connection.close()


async def test_trailers_go_to_a_client_that_takes_them_only(flow: Flow) -> None:
    with_te = await flow.call(chat_request(stream=True, x_mock_trailer="1", te="trailers"))
    without = await flow.call(chat_request(stream=True, x_mock_trailer="1"))
    assert with_te.trailers == [("x-mock-trailer", "done")]
    assert without.trailers == []
    assert with_te.is_whole
    assert without.is_whole


async def test_early_hints_are_not_taken_for_the_answer(flow: Flow) -> None:
    answer = await flow.call(chat_request(x_mock_continue="1"))
    assert answer.status == 200
    assert answer.json["object"] == "chat.completion"


@pytest.mark.parametrize("framing", ["close", "length", "chunked"])
@pytest.mark.parametrize("stream", [False, True])
async def test_every_framing_of_an_upstream_is_understood(
    flow: Flow, framing: str, stream: bool
) -> None:
    answer = await flow.call(chat_request(stream=stream, x_mock_body=framing))
    plain = await flow.call(chat_request(stream=stream))
    assert answer.is_whole
    assert answer.body == plain.body


# Streams whose usage only the sidecar asked for


def is_between_events(data: bytes) -> bool:
    return data.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))


@pytest.mark.parametrize("border", [b"\n\n", b"\r\n\r\n", b"\r\r"])
async def test_a_stream_lacks_the_event_that_nobody_asked_for_and_nothing_else_however_it_is_cut(
    start: Start, raw: RawUpstream, border: bytes
) -> None:
    flow = await start(config(raw))
    stream = STREAM.replace(b"\r\n\r\n", b"\n\n").replace(b"\n\n", border)
    usage = USAGE_EVENT.replace(b"\n\n", border)
    assert stream.count(usage) == 1
    cuts = [[stream], [stream[at : at + 1] for at in range(len(stream))]]
    cuts += [[stream[:at], stream[at:]] for at in range(1, len(stream), 7)]
    for pieces in cuts:
        got, received = await answered(
            flow, raw, chat_request(stream=True), STREAM_HEAD + chunked(pieces)
        )
        assert got.is_whole
        assert got.body == stream.replace(usage, b"")
        assert all(map(is_between_events, got.pieces))
        assert b'"stream_options":{"include_usage":true}' in received
    lines = await flow.logged(len(cuts))
    assert {line["output_tokens"] for line in lines} == {4}


async def test_an_event_is_never_passed_in_half_however_the_network_cuts_it(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    wire = STREAM_HEAD + chunked([STREAM[:200], STREAM[200:]])
    chance = random.Random(11)
    for _ in range(20):
        client = await flow.connect()
        client.send(chat_request(stream=True))
        connection = await raw.accept()
        await connection.read_request()
        at = 0
        while at < len(wire):
            size = chance.randint(1, 60)
            connection.write(wire[at : at + size])
            at += size
            await flow.call(request("GET", "/v1/models"))  # a few turns of the loop
        got = await client.answer()
        assert got.body == STREAM.replace(USAGE_EVENT, b"")
        assert all(map(is_between_events, got.pieces))
        connection.close()


@pytest.mark.parametrize(
    "last",
    [b"data: [DONE]", b"data: [DONE]\n", b'data: {"choices":[{"index":0}]}', b"data: \xc3", b":"],
)
@pytest.mark.parametrize("is_apart", [False, True])
async def test_an_event_that_a_stream_ends_in_is_not_lost(
    start: Start, raw: RawUpstream, last: bytes, is_apart: bool
) -> None:
    """Some providers leave out the blank line behind the last one."""
    flow = await start(config(raw))
    head = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
    pieces = [head, last] if is_apart else [head + last]
    got, _ = await answered(flow, raw, chat_request(stream=True), STREAM_HEAD + chunked(pieces))
    assert (got.body, got.is_whole) == (head + last, True)


async def test_an_event_that_is_whole_is_passed_on_though_the_next_has_begun(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(chat_request(stream=True))
    connection = await raw.accept()
    await connection.read_request()
    connection.write(STREAM_HEAD)
    events = [b'data: {"choices":[{"index":%d}]}\n\n' % number for number in range(5)]
    wire = b"".join(events)
    at = 0
    for event in events:
        end = wire.index(event) + len(event) + 6  # with the beginning of the next
        piece = wire[at:end]
        connection.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        at = end
        assert (await client.until(event + b"\r\n")).endswith(b"%x\r\n%b\r\n" % (len(event), event))
    connection.close()


# The request


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_request_body_arrives_as_the_very_bytes(flow: Flow, path: str) -> None:
    model = "claude" if path == MESSAGES else "gpt"
    body = (
        b'\n {"model" :  "%b", "max_tokens":9,\t"messages":[{"role":"user","content":"\\u00e4'
        b' \xc3\xa4 \\/"}], "n":1.0, "big":12345678901234567890, "new_field": {"a":[null]}, "a":1,'
        b' "a":2 } '
    ) % model.encode()
    answer = await flow.call(request("POST", path, body))
    assert answer.status == 200
    assert flow.provider.books.requests[0].body == body


async def test_a_chunked_request_body_arrives_as_the_same_bytes(flow: Flow) -> None:
    body = chat_body()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    answer = await flow.call(head + chunked([body[at : at + 9] for at in range(0, len(body), 9)]))
    assert answer.status == 200
    assert flow.provider.books.requests[0].body == body


async def test_only_the_model_changes_when_its_target_has_another_name(start: Start) -> None:
    flow = await start("models: {gpt: [{upstream: up-openai, model: gpt-real}]}")
    sent: Any = {
        "temperature": 0.1,
        "new_field": {"a": [None, 1.5]},
        "messages": [{"role": "user"}],
    }
    body = json.dumps({"model": "gpt", **sent}).encode()
    answer = await flow.call(request("POST", CHAT, body))
    assert answer.status == 200
    received = json.loads(flow.provider.books.requests[0].body)
    assert received == {"model": "gpt-real", **sent}
    assert list(received) == ["model", *sent]
    (line,) = await flow.logged()
    assert line["model"] == "gpt"


async def test_fields_of_the_client_arrive_as_they_were_sent(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    fields = {
        "X-Stainless-Lang": "python",
        "openai-beta": "a",
        "OpenAI-Organization": "org",
        "user-agent": "tests \xe4",
        "idempotency-key": "1",
        "x-double": "one\r\nx-double: two",
    }
    data = request("POST", CHAT, chat_body(), fields)
    _, received = await answered(flow, raw, data, b"HTTP/1.1 204 No Content\r\n\r\n")
    for line in (
        b"\r\nx-stainless-lang: python\r\n",
        b"\r\nopenai-beta: a\r\n",
        b"\r\nopenai-organization: org\r\n",
        b"\r\nuser-agent: tests \xe4\r\n",
        b"\r\nx-double: one\r\nx-double: two\r\n",
    ):
        assert line in received
    assert received.endswith(chat_body())


async def test_hop_by_hop_fields_are_not_passed_on(start: Start, raw: RawUpstream) -> None:
    flow = await start(config(raw))
    fields = {
        "connection": "keep-alive, X-Named",
        "x-named": "1",
        "keep-alive": "timeout=5",
        "te": "trailers",
        "proxy-authorization": "Basic canary",
        "proxy-connection": "keep-alive",
    }
    answer = (
        b"HTTP/1.1 200 OK\r\nconnection: X-Inner, close\r\nx-inner: 1\r\nkeep-alive: timeout=9\r\n"
        b"proxy-authenticate: Basic\r\nx-outer: 1\r\ncontent-length: 2\r\n\r\n{}"
    )
    got, received = await answered(flow, raw, request("POST", CHAT, chat_body(), fields), answer)
    head = received.partition(b"\r\n\r\n")[0].lower()
    for name in (b"x-named", b"keep-alive", b"\r\nte:", b"proxy-", b"canary", b"connection"):
        assert name not in head
    names = [name for name, _ in got.headers]
    assert "x-outer" in names
    assert not {"x-inner", "keep-alive", "proxy-authenticate", "connection"} & set(names)


async def test_fields_of_the_answer_arrive_as_they_were_sent(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    answer = (
        b"HTTP/1.1 418 Teapot\r\nX-RateLimit-Remaining: 9\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n"
        b"retry-after: 7\r\nx-odd: \xe4\xf6\r\ncontent-type: text/plain\r\n"
        b"content-length: 2\r\n\r\nno"
    )
    got, _ = await answered(flow, raw, chat_request(), answer)
    assert (got.status, got.body) == (418, b"no")
    for field in (
        ("x-ratelimit-remaining", "9"),
        ("set-cookie", "a=1"),
        ("set-cookie", "b=2"),
        ("retry-after", "7"),
        ("x-odd", "\xe4\xf6"),
    ):
        assert field in got.headers


# Compression


async def test_a_compressed_answer_is_untouched_when_no_filter_looks_at_it(start: Start) -> None:
    flow = await start(NO_TAPS)
    for stream in (False, True):
        plain = await flow.call(chat_request(stream=stream))
        packed = await flow.call(
            chat_request(stream=stream, x_mock_encoding="gzip", accept_encoding="gzip, br")
        )
        assert packed.header("content-encoding") == "gzip"
        assert gzip.decompress(packed.body) == plain.body
        received = flow.provider.books.requests[-1]
        assert received.header_values("accept-encoding") == ["gzip, br"]


async def test_a_plain_answer_is_asked_for_when_a_filter_looks_at_it(flow: Flow) -> None:
    answer = await flow.call(chat_request(x_mock_encoding="gzip", accept_encoding="gzip, br"))
    assert answer.header("content-encoding") is None
    received = flow.provider.books.requests[-1]
    assert received.header_values("accept-encoding") == ["identity"]


async def test_an_answer_that_is_compressed_all_the_same_passes_and_is_counted(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    packed = gzip.compress(STREAM)
    head = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    pieces = [packed[at : at + 5] for at in range(0, len(packed), 5)]
    got, _ = await answered(flow, raw, chat_request(stream=True), head + chunked(pieces))
    assert got.body == packed
    assert got.header("content-encoding") == "gzip"
    (line,) = await flow.logged()
    assert line["output_tokens"] == 4


# Paths


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_any_path_and_method_of_an_upstream_is_reached_by_its_name(
    flow: Flow, method: str
) -> None:
    path = "/up-openai/files/a%20b;c=1/org%2Fname"
    answer = await flow.call(request(method, f"{path}?limit=2&after=%C3%A4&x=a/../b"))
    assert answer.json["method"] == method
    assert answer.json["path"] == "/v1/files/a%20b;c=1/org%2Fname"
    assert answer.json["query"] == "limit=2&after=%C3%A4&x=a/../b"


async def test_the_path_of_an_anthropic_upstream_is_its_own(flow: Flow) -> None:
    answer = await flow.call(request("GET", "/up-anthropic/v1/models?limit=1"))
    assert flow.provider.books.requests[0].path == "/v1/models"
    assert answer.status == 200


async def test_an_unknown_path_below_v1_is_routed_by_the_model_in_its_body(flow: Flow) -> None:
    answer = await flow.call(request("POST", "/v1/moderations", chat_body()))
    assert answer.json["path"] == "/v1/moderations"
    (line,) = await flow.logged()
    assert (line["model"], line["upstream"]) == ("gpt", "up-openai")


async def test_a_query_of_a_known_path_is_passed_on(flow: Flow) -> None:
    answer = await flow.call(request("POST", f"{CHAT}?api-version=2026-01-01", chat_body()))
    assert answer.status == 200
    assert flow.provider.books.requests[0].query == "api-version=2026-01-01"


@pytest.mark.parametrize(
    ("head", "length"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\netag: x\r\n\r\n", "12345"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\netag: x\r\n\r\n", None),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 9\r\netag: x\r\n\r\n", "9"),
    ],
)
async def test_head_has_the_fields_and_no_body(
    start: Start, raw: RawUpstream, head: bytes, length: str | None
) -> None:
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(request("HEAD", "/up-openai/files/1"))
    connection = await raw.accept()
    await connection.read_request()
    connection.write(head)
    answer = await client.answer(is_head=True)
    assert answer.header("content-length") == length
    assert answer.header("etag") == "x"
    assert (await client.call(request("GET", "/v1/models"))).status == 200
    connection.close()


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_an_answer_without_a_body_leaves_the_connection_usable(
    start: Start, raw: RawUpstream, status: bytes
) -> None:
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(request("GET", "/up-openai/files/1", b"", {"if-none-match": "x"}))
    connection = await raw.accept()
    assert b"if-none-match: x" in await connection.read_request()
    connection.write(b"HTTP/1.1 %b\r\netag: x\r\n\r\n" % status)
    answer = await client.answer()
    assert (answer.status, answer.header("etag")) == (int(status[:3]), "x")
    assert answer.header("content-length") is None
    assert answer.header("transfer-encoding") is None
    assert (await client.call(request("GET", "/v1/models"))).status == 200
    connection.close()


async def test_an_empty_answer_is_an_empty_answer(start: Start, raw: RawUpstream) -> None:
    flow = await start(config(raw))
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 0\r\n\r\n"
    got, _ = await answered(flow, raw, chat_request(stream=True), answer)
    assert (got.status, got.body, got.is_whole) == (200, b"", True)


async def test_a_large_answer_arrives_whole(start: Start, raw: RawUpstream) -> None:
    flow = await start(config(raw))
    data = random.Random(1).randbytes(5_000_000)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ncontent-length: %d\r\n\r\n" % len(data)
    got, _ = await answered(flow, raw, request("GET", "/up-openai/audio"), head + data)
    assert got.body == data
    assert got.header("content-length") == str(len(data))


async def test_trailers_never_carry_framing_or_hop_by_hop_fields(
    start: Start, raw: RawUpstream
) -> None:
    """RFC 9110, 6.5.1: a trailer must not say how the message is framed."""
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(chat_request(stream=True, te="trailers"))
    connection = await raw.accept()
    await connection.read_request()
    trailers = b"x-checksum: 1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n"
    connection.write(STREAM_HEAD + b"3\r\n: \n\r\n0\r\n" + trailers + b"\r\n")
    answer = await client.answer()
    names = {name for name, _ in answer.trailers}
    assert names <= {"x-checksum"}
    connection.close()


async def test_head_of_our_own_answers_has_no_body(flow: Flow) -> None:
    client = await flow.connect()
    for path, status in (("/v1/models", 200), ("/nowhere", 404), (CHAT, 405)):
        answer = await client.call(request("HEAD", path), is_head=True)
        assert answer.status == status
        assert int(answer.header("content-length") or 0) > 0
    assert (await client.call(chat_request())).status == 200


async def test_a_call_waits_for_a_free_connection_and_goes_on(start: Start) -> None:
    flow = await start("upstreams: {up-openai: {pool: {max_connections: 1}}}")
    clients = [await flow.connect() for _ in range(5)]
    for client in clients:
        client.send(chat_request(stream=True, x_mock_first_delay_ms="5"))
    for client in clients:
        answer = await client.answer()
        assert (answer.status, answer.is_whole) == (200, True)
    assert {line["outcome"] for line in await flow.logged(5)} == {"completed"}


async def test_a_call_that_finds_no_free_connection_in_time_gets_504(start: Start) -> None:
    flow = await start(
        "upstreams: {up-openai: {pool: {max_connections: 1}, timeouts: {connect_s: 0.05}}}"
    )
    first = await flow.connect()
    first.send(chat_request(x_mock_hang="head"))
    await flow.provider.wait_for(lambda: flow.provider.open_requests == 1)
    answer = await flow.call(chat_request())
    assert (answer.status, answer.error["code"]) == (504, "upstream_pool_timeout")
    first.leave()


async def test_a_field_that_is_no_utf_8_passes_on_any_path(flow: Flow) -> None:
    answer = await flow.call(request("GET", "/up-openai/files", b"", {"x-odd": "\xe4"}))
    assert answer.status == 200
    (received,) = flow.provider.books.requests
    assert (b"x-odd", b"\xe4") in received.raw_headers
