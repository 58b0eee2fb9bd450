"""What a client gets when its upstream fails: an envelope before the head, a broken body after."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from filters.token_counter import MAX_JSON_BYTES
from tests.support.flow import CHAT, PROVIDER_KEY, Answer, Flow, Start, chat_request, request
from tests.support.upstream import RawConnection, RawUpstream

BOTH = ["gpt", "claude"]
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = b'data: {"choices":[]}\n\n'
AS_IT_CAME = "filters: {token_counter: {ask_for_usage: false}}\n"
"""No usage is taken out of streams, so their bytes pass however they are cut."""


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


def config(where: str, **timeouts: float) -> str:
    sign = "sign: {scheme: bearer, key: 'env:PROVIDER_KEY'}"
    lines = "".join(
        f"  {name}: {{base_url: '{where}{path}', {sign}, timeouts: {timeouts}}}\n"
        for name, path in (("up-openai", "/v1"), ("up-anthropic", ""))
    )
    return "upstreams:\n" + lines


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def error_of(answer: Answer, model: str) -> Any:
    """The envelope as that dialect's SDK reads it."""
    body = answer.json
    if model == "claude":
        assert body["type"] == "error"
        assert body["request_id"]
    return body["error"]


def shows_nothing(answer: Answer, *secrets: str) -> None:
    seen = repr(answer)
    for secret in (PROVIDER_KEY, "Traceback", ".py", "unix:", "127.0.0.1", *secrets):
        assert secret not in seen


async def begun(raw: RawUpstream, data: bytes) -> RawConnection:
    """The next request's connection, with `data` written as the beginning of its answer."""
    connection = await raw.accept()
    await connection.read_request()
    connection.write(data)
    return connection


# Before the head


@pytest.mark.parametrize("model", BOTH)
async def test_an_upstream_that_nobody_serves_gives_502(start: Start, model: str) -> None:
    async with RawUpstream() as raw:
        closed_port = raw.base_url
    flow = await start(config(closed_port))
    answer = await flow.call(chat_request(model))
    assert answer.status == 502
    assert answer.header("x-sidecar-error") == "upstream_unreachable"
    error = error_of(answer, model)
    assert (error["code"], error["type"]) == ("upstream_unreachable", "api_error")
    shows_nothing(answer, closed_port.rpartition(":")[2])
    (line,) = await flow.logged()
    assert (line["outcome"], line["error"]) == ("upstream_failed", "upstream_unreachable")


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\ncontent-"])
async def test_an_upstream_that_closes_before_or_in_its_head_gives_502(
    start: Start, raw: RawUpstream, model: str, beginning: bytes
) -> None:
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(chat_request(model, stream=True))
    (await begun(raw, beginning)).close()
    answer = await client.answer()
    assert (answer.status, answer.header("x-sidecar-error")) == (502, "upstream_closed")
    assert error_of(answer, model)["code"] == "upstream_closed"
    shows_nothing(answer, str(raw.port))
    assert (await client.call(request("GET", "/v1/models"))).status == 200


@pytest.mark.parametrize("model", BOTH)
async def test_an_answer_that_is_no_http_gives_502(
    start: Start, raw: RawUpstream, model: str
) -> None:
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(chat_request(model))
    await begun(raw, b"SSH-2.0-secret banner\r\n\r\n")
    answer = await client.answer()
    assert answer.status == 502
    assert error_of(answer, model)["code"] == "upstream_protocol_error"
    shows_nothing(answer, "banner")


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstream_that_does_not_answer_in_time_gives_504(
    start: Start, raw: RawUpstream, model: str, stream: bool
) -> None:
    flow = await start(config(raw.base_url, first_byte_s=0.05))
    client = await flow.connect()
    client.send(chat_request(model, stream=stream))
    connection = await begun(raw, b"")
    answer = await client.answer()
    assert (answer.status, answer.header("x-sidecar-error")) == (504, "upstream_timeout")
    kinds = {"gpt": "api_error", "claude": "timeout_error"}
    assert error_of(answer, model)["type"] == kinds[model]
    shows_nothing(answer, str(raw.port))
    await connection.closed()


async def test_an_upstream_that_takes_no_connection_gives_504(start: Start) -> None:
    async with RawUpstream(backlog=0) as full:
        flow = await start(config(full.base_url, connect_s=0.05, first_byte_s=0.05))
        answers = [await flow.call(chat_request()) for _ in range(4)]
    assert {answer.status for answer in answers} == {504}
    assert answers[-1].header("x-sidecar-error") == "upstream_connect_timeout"


# Streams


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("cut", [EVENT, EVENT[:9], EVENT[:-1]], ids=["whole", "half", "no end"])
async def test_a_stream_that_dies_ends_with_an_error_event_and_not_cleanly(
    start: Start, raw: RawUpstream, model: str, cut: bytes
) -> None:
    flow = await start(config(raw.base_url) + AS_IT_CAME)
    client = await flow.connect()
    client.send(chat_request(model, stream=True))
    connection = await begun(raw, STREAM_HEAD + chunk(EVENT) + chunk(cut))
    await client.until(b"\r\n\r\n")
    connection.close()
    data = await client.rest()
    assert not data.endswith(b"0\r\n\r\n")
    pieces = unchunked(data)
    assert pieces.startswith(EVENT + cut)
    event = pieces[len(EVENT + cut) :].removeprefix(b"\n\n" if cut != EVENT else b"")
    name, found, _ = event.partition(b"data: ")
    assert found
    assert name == (b"event: error\n" if model == "claude" else b"")
    assert event.endswith(b"}\n\n")
    body = json.loads(event[len(name) + len(found) :])
    assert body["error"]["code"] == "upstream_closed"
    (line,) = await flow.logged()
    assert (line["outcome"], line["status"]) == ("upstream_failed", 200)


@pytest.mark.parametrize("at", [0, 1, 9, len(EVENT) - 1, len(EVENT)])
@pytest.mark.parametrize("is_apart", [False, True])
async def test_of_a_stream_that_dies_every_whole_event_and_no_half_one_is_passed_on(
    start: Start, raw: RawUpstream, at: int, is_apart: bool
) -> None:
    """While an event has only begun, it may be the one with usage that nobody asked for."""
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(chat_request(stream=True))
    cut, whole = EVENT[:at], EVENT * (2 if at == len(EVENT) else 1)
    pieces = [EVENT, cut] if is_apart and cut else [EVENT + cut]
    (await begun(raw, STREAM_HEAD + b"".join(map(chunk, pieces)))).close()
    answer = await client.answer()
    assert (answer.status, answer.is_whole) == (200, False)
    assert answer.body.startswith(whole + b"data: {")
    event = answer.body.removeprefix(whole)
    assert event.endswith(b"}\n\n")
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "upstream_closed"
    (line,) = await flow.logged()
    assert (line["outcome"], line["status"]) == ("upstream_failed", 200)


async def test_a_stream_that_dies_in_its_first_event_is_no_empty_one(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(chat_request(stream=True))
    (await begun(raw, STREAM_HEAD + chunk(EVENT[:9]))).close()
    answer = await client.answer()
    assert (answer.status, answer.is_whole) == (200, False)
    assert json.loads(answer.body.removeprefix(b"data: "))["error"]["code"] == "upstream_closed"


def unchunked(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        assert data[length : length + 2] == b"\r\n"
        body, data = body + data[:length], data[length + 2 :]
    return body


@pytest.mark.parametrize("model", BOTH)
async def test_a_stream_that_falls_silent_ends_with_an_error_event(
    start: Start, raw: RawUpstream, model: str
) -> None:
    flow = await start(config(raw.base_url, silence_s=0.05))
    client = await flow.connect()
    client.send(chat_request(model, stream=True))
    connection = await begun(raw, STREAM_HEAD + chunk(EVENT))
    answer = await client.answer()
    assert (answer.status, answer.is_whole) == (200, False)
    assert b'"code":"upstream_timeout"' in answer.body
    await connection.closed()


async def test_responses_get_the_error_event_of_their_own_protocol(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(request("POST", "/v1/responses", b'{"model":"gpt","input":"x","stream":true}'))
    (await begun(raw, STREAM_HEAD + chunk(EVENT))).close()
    answer = await client.answer()
    event = answer.body.removeprefix(EVENT)
    assert event.startswith(b"event: error\ndata: ")
    assert json.loads(event.partition(b"data: ")[2])["type"] == "error"


async def test_a_chunk_that_is_no_http_breaks_the_stream_off(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(chat_request(stream=True))
    await begun(raw, STREAM_HEAD + chunk(EVENT) + b"nonsense\r\n")
    answer = await client.answer()
    assert answer.body.startswith(EVENT)
    assert b'"code":"upstream_protocol_error"' in answer.body
    assert not answer.is_whole


@pytest.mark.parametrize("model", BOTH)
async def test_the_provider_dying_mid_event_is_never_a_clean_end(flow: Flow, model: str) -> None:
    answer = await flow.call(
        chat_request(model, stream=True, x_mock_die="events:4", x_mock_split="7")
    )
    assert not answer.is_whole
    assert b'"code":"upstream_closed"' in answer.body


# Plain answers


async def test_a_body_shorter_than_its_length_is_cut_short_and_closed(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(chat_request())
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n"
    (await begun(raw, head + b'{"half":')).close()
    answer = await client.answer()
    assert answer.header("content-length") == "50"
    assert (answer.body, answer.is_whole) == (b'{"half":', False)
    (line,) = await flow.logged()
    assert (line["outcome"], line["error"]) == ("upstream_failed", "upstream_closed")


async def test_a_chunked_body_that_breaks_off_is_not_ended(start: Start, raw: RawUpstream) -> None:
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(chat_request())
    head = STREAM_HEAD.replace(b"text/event-stream", b"application/json")
    (await begun(raw, head + chunk(b'{"half":'))).close()
    answer = await client.answer()
    assert (answer.body, answer.is_whole) == (b'{"half":', False)


async def test_a_compressed_stream_that_breaks_off_gets_no_plain_event(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw.base_url) + "chains: {default: {call: [access_log]}}\n")
    client = await flow.connect()
    client.send(chat_request(stream=True, accept_encoding="gzip"))
    head = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    (await begun(raw, head + chunk(b"\x1f\x8b\x08half"))).close()
    answer = await client.answer()
    assert (answer.body, answer.is_whole) == (b"\x1f\x8b\x08half", False)


async def test_an_http_1_0_client_can_tell_a_broken_body_from_a_whole_one(
    start: Start, raw: RawUpstream
) -> None:
    """Its body ends with the connection, so a broken one must end with a reset."""
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(request("POST", "/v1/chat/completions", b'{"model":"gpt"}', version="1.0"))
    head = STREAM_HEAD.replace(b"text/event-stream", b"audio/mpeg")
    connection = await begun(raw, head + chunk(b"ID3 half"))
    await client.until(b"half")
    connection.close()
    with pytest.raises(ConnectionResetError):
        await client.reader.read()


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize("size", [9, 2 * MAX_JSON_BYTES], ids=["before its head", "after its head"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_json_answer_that_breaks_off_cannot_be_taken_for_a_whole_one(
    start: Start, raw: RawUpstream, version: str, size: int, is_chunked: bool
) -> None:
    """Its beginning is waited for. What came of it is sound JSON here, so only the framing tells;
    without one, a reset."""
    flow = await start(config(raw.base_url))
    client = await flow.connect()
    client.send(request("POST", CHAT, b'{"model":"gpt"}', version=version))
    data = b'{"a":"%b"}' % (b"x" * (size - 8))
    framing = b"content-length: %d\r\n\r\n%b" % (size + 1, data)
    if is_chunked:
        framing = b"transfer-encoding: chunked\r\n\r\n" + chunk(data)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    connection = await begun(raw, head + framing)
    if size > MAX_JSON_BYTES:
        begins = await client.until(b'{"a":')
        assert begins.startswith(b"HTTP/1.1 200 ")
    connection.close()
    if is_chunked and version == "1.0":
        with pytest.raises(ConnectionResetError):
            await client.reader.read()
    elif size > MAX_JSON_BYTES:
        rest = await client.rest()
        if is_chunked:
            assert not rest.endswith(b"0\r\n\r\n")
        else:
            assert len(b'{"a":' + rest) == size  # one byte less than its head says
    else:
        answer = await client.answer()
        assert (answer.status, answer.body, answer.is_whole) == (200, data, False)
    (line,) = await flow.logged()
    assert (line["outcome"], line["error"]) == ("upstream_failed", "upstream_closed")


# A bug of ours


async def test_a_failing_filter_gives_500_without_its_traceback(start: Start) -> None:
    chains = "chains: {default: {call: [access_log, 'flow_filters:Fails']}}"
    flow = await start(chains)
    flow.may_log_errors = True
    for model in BOTH:
        answer = await flow.call(chat_request(model))
        assert (answer.status, answer.header("x-sidecar-error")) == (500, "internal_error")
        assert error_of(answer, model)["code"] == "internal_error"
        shows_nothing(answer, "secret detail", "RuntimeError")
    assert "secret detail" in "".join(flow.errors)
    assert [line["outcome"] for line in await flow.logged(2)] == ["aborted"] * 2


async def test_no_log_line_holds_a_key(start: Start, tmp_path: Path) -> None:
    flow = await start(config("http://127.0.0.1:1"))
    await flow.call(chat_request(authorization="Bearer client-canary"))
    await flow.logged()
    told = flow.log_path.read_text() + "".join(record.getMessage() for record in flow.records)
    assert "canary" not in told
