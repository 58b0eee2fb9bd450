"""Comments that keep a silent stream alive, when they are switched on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest

from tests.support.flow import HELLO, Flow, RawClient, Start, chat_request, request, until
from tests.support.upstream import RawConnection, RawUpstream

BEAT = b": keep-alive\n\n"
BEAT_CHUNK = b"e\r\n: keep-alive\n\n\r\n"
EVENT = b'data: {"choices":[]}\n\n'
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
BOTH = ["gpt", "claude"]
AS_IT_CAME = "filters: {token_counter: {ask_for_usage: false}}\n"
"""No usage is taken out of streams, so their bytes pass however they are cut."""


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


def config(raw: RawUpstream, heartbeat_s: float = 0.03, **timeouts: float) -> str:
    sections = "".join(
        f"  {name}: {{base_url: '{raw.base_url}{path}', timeouts: {timeouts}}}\n"
        for name, path in (("up-openai", "/v1"), ("up-anthropic", ""))
    )
    return f"http: {{heartbeat_s: {heartbeat_s}}}\nupstreams:\n{sections}"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def begun(flow: Flow, raw: RawUpstream, data: bytes) -> tuple[RawClient, RawConnection]:
    client = await flow.connect()
    client.send(data)
    connection = await raw.accept()
    await connection.read_request()
    return client, connection


async def test_there_are_none_unless_they_are_switched_on(start: Start, raw: RawUpstream) -> None:
    flow = await start(config(raw, 0.0))
    client, connection = await begun(flow, raw, chat_request(stream=True))
    connection.write(STREAM_HEAD + chunk(EVENT))
    await client.until(EVENT)
    (edge,) = flow.connections
    assert edge.writer is not None
    assert edge.writer._heartbeat is None
    connection.write(chunk(EVENT) + b"0\r\n\r\n")
    assert await client.until(b"\r\n0\r\n\r\n") == b"\r\n" + chunk(EVENT) + b"0\r\n\r\n"
    connection.close()


@pytest.mark.parametrize("model", BOTH)
async def test_they_come_before_the_first_byte(start: Start, raw: RawUpstream, model: str) -> None:
    flow = await start(config(raw))
    client, connection = await begun(flow, raw, chat_request(model, stream=True))
    head = await client.head()
    assert head.status == 200
    assert head.header("content-type") == "text/event-stream"
    assert head.header("x-accel-buffering") == "no"
    for _ in range(3):
        assert await client.until(BEAT_CHUNK) == BEAT_CHUNK
    connection.write(STREAM_HEAD + chunk(EVENT) + b"0\r\n\r\n")
    rest = await client.rest()
    assert rest.replace(BEAT_CHUNK, b"") == chunk(EVENT) + b"0\r\n\r\n"
    connection.close()
    (line,) = await flow.logged()
    assert (line["outcome"], line["status"]) == ("completed", 200)


async def test_they_come_between_events_only(start: Start, raw: RawUpstream) -> None:
    flow = await start(config(raw) + AS_IT_CAME)
    client, connection = await begun(flow, raw, chat_request(stream=True))
    connection.write(STREAM_HEAD + chunk(EVENT))
    await client.until(EVENT + b"\r\n")
    assert await client.until(BEAT_CHUNK) == BEAT_CHUNK
    connection.write(chunk(EVENT[:9]))
    await client.until(chunk(EVENT[:9]))
    (edge,) = flow.connections
    writer = edge.writer
    assert writer is not None
    beats = {writer._heartbeat}

    def has_beaten_again() -> bool:
        beats.add(writer._heartbeat)
        return len(beats) > 3

    await until(has_beaten_again)  # the timer goes on, and writes nothing inside an event
    connection.write(chunk(EVENT[9:]) + b"0\r\n\r\n")
    rest = await client.until(b"\r\n0\r\n\r\n")
    assert rest.startswith(chunk(EVENT[9:]))
    connection.close()


async def test_they_go_on_while_an_event_is_held_until_it_is_whole(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    client, connection = await begun(flow, raw, chat_request(stream=True))
    connection.write(STREAM_HEAD + chunk(EVENT) + chunk(EVENT[:9]))
    await client.until(EVENT + b"\r\n")
    for _ in range(3):
        assert await client.until(BEAT_CHUNK) == BEAT_CHUNK
    connection.write(chunk(EVENT[9:]) + b"0\r\n\r\n")
    rest = await client.until(b"\r\n0\r\n\r\n")
    assert rest.replace(BEAT_CHUNK, b"") == chunk(EVENT) + b"0\r\n\r\n"
    connection.close()


@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n", b"\r\r"])
async def test_every_line_end_of_the_protocol_is_known(
    start: Start, raw: RawUpstream, ending: bytes
) -> None:
    flow = await start(config(raw))
    client, connection = await begun(flow, raw, chat_request(stream=True))
    event = b"data: 1" + ending
    connection.write(STREAM_HEAD + b"".join(chunk(event[at : at + 1]) for at in range(len(event))))
    assert (await client.until(BEAT_CHUNK)).endswith(BEAT_CHUNK)
    connection.write(b"0\r\n\r\n")
    connection.close()


async def test_a_plain_call_gets_none(start: Start, raw: RawUpstream) -> None:
    flow = await start(config(raw, first_byte_s=0.15))
    client, connection = await begun(flow, raw, chat_request())
    answer = await client.answer()
    assert answer.status == 504
    assert b"keep-alive" not in answer.body
    await connection.closed()


@pytest.mark.parametrize("model", BOTH)
async def test_a_failure_after_one_is_an_error_event_and_no_clean_end(
    start: Start, raw: RawUpstream, model: str
) -> None:
    flow = await start(config(raw))
    client, connection = await begun(flow, raw, chat_request(model, stream=True))
    await client.until(BEAT_CHUNK)
    connection.close()
    data = await client.rest()
    assert b'"code":"upstream_closed"' in data
    assert (b"event: error\n" in data) == (model == "claude")
    assert not data.endswith(b"0\r\n\r\n")
    (line,) = await flow.logged()
    assert (line["outcome"], line["error"]) == ("upstream_failed", "upstream_closed")


@pytest.mark.parametrize("model", BOTH)
async def test_an_error_status_after_one_is_an_error_event(
    start: Start, raw: RawUpstream, model: str
) -> None:
    flow = await start(config(raw))
    client, connection = await begun(flow, raw, chat_request(model, stream=True))
    await client.until(BEAT_CHUNK)
    body = b'{"error":{"message":"slow down"}}'
    connection.write(
        b"HTTP/1.1 429 No\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    data = await client.rest()
    assert b'"code":"upstream_error"' in data
    assert b"429" in data
    assert not data.endswith(b"0\r\n\r\n")
    connection.close()


async def test_a_refused_call_gets_its_status_without_any(start: Start) -> None:
    flow = await start("http: {heartbeat_s: 0.03}")
    answer = await flow.call(chat_request("nobody-knows", stream=True))
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


async def test_a_client_that_leaves_during_them_ends_its_upstream(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    client, connection = await begun(flow, raw, chat_request(stream=True))
    await client.until(BEAT_CHUNK)
    client.leave()
    await connection.closed()
    (line,) = await flow.logged()
    assert line["outcome"] == "client_gone"


async def test_sdks_do_not_notice_them(start: Start) -> None:
    flow = await start("http: {heartbeat_s: 0.02}")
    slow = {"x-mock-first-delay-ms": "60", "x-mock-delay-ms": "45", "x-mock-events": "3"}
    async with flow.openai() as client:
        stream = await client.chat.completions.create(
            model="gpt", messages=HELLO, stream=True, extra_headers=slow
        )
        text = [each.choices[0].delta.content async for each in stream]
    assert len([piece for piece in text if piece]) == 3
    async with flow.anthropic() as other:
        events = await other.messages.create(
            model="claude", max_tokens=9, messages=HELLO, stream=True, extra_headers=slow
        )
        kinds = [each.type async for each in events]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_delta") == 3


async def test_a_failure_after_one_raises_in_the_sdk(start: Start) -> None:
    flow = await start("http: {heartbeat_s: 0.02}")
    slow = {"x-mock-first-delay-ms": "60", "x-mock-status": "429"}
    async with flow.openai() as client:
        stream = await client.chat.completions.create(
            model="gpt", messages=HELLO, stream=True, extra_headers=slow
        )
        with pytest.raises(openai.APIError, match="429"):
            async for _ in stream:
                pass


async def test_a_body_passed_through_that_is_no_json_is_not_looked_into(start: Start) -> None:
    flow = await start("http: {heartbeat_s: 5}")
    body = b'not json, but it says "stream"'
    answer = await flow.call(
        request("POST", "/up-openai/notes", body, {"content-type": "text/plain"})
    )
    assert answer.status == 200


async def test_a_stream_is_never_buffered_by_a_proxy_before_us(flow: Flow) -> None:
    stream = await flow.call(chat_request(stream=True))
    plain = await flow.call(chat_request())
    assert stream.header("x-accel-buffering") == "no"
    assert plain.header("x-accel-buffering") is None
