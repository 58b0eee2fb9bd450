"""Requests whose end two parsers could see in different places: at most one call comes of them."""

from __future__ import annotations

import pytest

from tests.support.flow import CHAT, Flow, RawClient, chat_body, chat_request

BODY = chat_body()
SECOND = chat_request()
"""What a smuggler would like to be taken for a request of its own."""


def chat(fields: bytes, rest: bytes) -> bytes:
    """A chat request with exactly these header lines, each without its end, and these bytes."""
    lines = b"".join(line + b"\r\n" for line in fields.split(b"\n"))
    head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % CHAT.encode()
    return head + lines + b"\r\n" + rest


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


async def refused(flow: Flow, data: bytes, status: int = 400) -> RawClient:
    """`data` gets one answer with `status`, then the connection is closed; no call came of it."""
    client = await flow.connect()
    answer = await client.call(data)
    assert answer.status == status
    assert answer.error["message"]
    assert answer.header("connection") == "close"
    assert await client.is_closed()
    assert not flow.provider.books.requests
    return client


LENGTH = b"content-length: %d" % len(BODY)


@pytest.mark.parametrize(
    "fields",
    [
        LENGTH + b"\ntransfer-encoding: chunked",
        b"transfer-encoding: chunked\n" + LENGTH,
        b"content-length: 0\ntransfer-encoding: chunked",
        LENGTH + b"\ntransfer-encoding: identity",
    ],
)
async def test_length_and_transfer_encoding_together_are_refused(flow: Flow, fields: bytes) -> None:
    await refused(flow, chat(fields, chunked(BODY) + SECOND))


@pytest.mark.parametrize(
    "fields",
    [
        LENGTH + b"\n" + LENGTH,
        LENGTH + b"\ncontent-length: 5",
        b"content-length: 5\n" + LENGTH,
        b"content-length: %d, %d" % (len(BODY), len(BODY)),
        b"content-length: %d, 5" % len(BODY),
    ],
)
async def test_two_lengths_are_refused_even_when_they_agree(flow: Flow, fields: bytes) -> None:
    await refused(flow, chat(fields, BODY + SECOND))


@pytest.mark.parametrize(
    "value", [b"+99", b"-1", b"0x63", b"9 9", b"99abc", b"", b"1e2", b"99.0", b"9" * 30]
)
async def test_a_length_that_is_no_plain_number_is_refused(flow: Flow, value: bytes) -> None:
    await refused(flow, chat(b"content-length: " + value, BODY + SECOND))


@pytest.mark.parametrize(
    "value",
    [
        b"chunked, chunked",
        b"xchunked",
        b"chunkedx",
        b"chunked, identity",
        b"identity",
        b"gzip",
        b"chunked;q=1",
        b"\x0bchunked",
        b'"chunked"',
    ],
)
async def test_a_transfer_encoding_other_than_chunked_is_refused(flow: Flow, value: bytes) -> None:
    await refused(flow, chat(b"transfer-encoding: " + value, chunked(BODY) + SECOND))


@pytest.mark.parametrize(
    "fields",
    [
        b"transfer-encoding: chunked\ntransfer-encoding: chunked",
        b"transfer-encoding: chunked\ntransfer-encoding: identity",
        b"transfer-encoding: identity\ntransfer-encoding: chunked",
        b"transfer-encoding : chunked",
        b" transfer-encoding: chunked",
        b"transfer-encoding:\n chunked",
        b"transfer_encoding: chunked\ntransfer-encoding\x00: chunked",
    ],
)
async def test_a_transfer_encoding_that_is_written_oddly_is_refused(
    flow: Flow, fields: bytes
) -> None:
    await refused(flow, chat(fields, chunked(BODY) + SECOND))


@pytest.mark.parametrize("value", [b"CHUNKED", b"  chunked  ", b"\tchunked"])
async def test_case_and_space_around_chunked_mean_nothing(flow: Flow, value: bytes) -> None:
    client = await flow.connect()
    answer = await client.call(chat(b"Transfer-Encoding: " + value, chunked(BODY)))
    assert answer.status == 200
    assert flow.provider.books.requests[0].body == BODY


@pytest.mark.parametrize(
    "rest",
    [
        b"fffffffffffffffff\r\n",
        b"-1\r\n",
        b"0x10\r\n",
        b" 10\r\n",
        b"\r\n",
        b"g\r\n",
        b"1\r\nab\r\n",
        b"1\nab\n",
        b"+1\r\na\r\n",
        b"1_0\r\n",
    ],
)
async def test_a_wrong_chunk_size_is_refused_and_the_connection_closed(
    flow: Flow, rest: bytes
) -> None:
    client = await flow.connect()
    answer = await client.call(chat(b"transfer-encoding: chunked", rest + chunked(BODY) + SECOND))
    assert answer.status == 400
    assert await client.is_closed()
    assert not flow.provider.books.requests


async def test_a_chunk_size_that_is_wrong_later_is_refused_too(flow: Flow) -> None:
    client = await flow.connect()
    client.send(chat(b"transfer-encoding: chunked", b"%x\r\n%b\r\n" % (len(BODY), BODY)))
    client.send(b"zz\r\n" + SECOND)
    assert (await client.answer()).status == 400
    assert await client.is_closed()
    assert not flow.provider.books.requests


async def test_chunk_extensions_and_trailers_of_a_request_are_dropped(flow: Flow) -> None:
    client = await flow.connect()
    rest = b"%x;name=value\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n" % (len(BODY), BODY)
    first = await client.call(chat(b"transfer-encoding: chunked\ntrailer: x-trailer", rest))
    second = await client.call(SECOND)
    assert (first.status, second.status) == (200, 200)
    received = flow.provider.books.requests[0]
    assert received.body == BODY
    assert received.header("x-trailer") is None
    assert received.header("trailer") is None
    assert received.header_values("content-length") == [str(len(BODY))]


async def test_a_framing_field_in_the_trailers_is_refused(flow: Flow) -> None:
    rest = b"%x\r\n%b\r\n0\r\ncontent-length: 5\r\n\r\n" % (len(BODY), BODY)
    await refused(flow, chat(b"transfer-encoding: chunked", rest + SECOND))


async def test_a_request_inside_a_body_stays_a_body(flow: Flow) -> None:
    inner = chat_body(note=SECOND.decode())
    client = await flow.connect()
    answer = await client.call(chat(b"content-length: %d" % len(inner), inner))
    assert answer.status == 200
    assert len(flow.provider.books.requests) == 1


async def test_garbage_after_an_answered_request_is_refused(flow: Flow) -> None:
    client = await flow.connect()
    assert (await client.call(chat(LENGTH, BODY))).status == 200
    assert (await client.call(b"\x00\xffgarbage\r\n\r\n" + SECOND)).status == 400
    assert await client.is_closed()
    assert len(flow.provider.books.requests) == 1


async def test_garbage_in_one_read_with_a_request_gets_no_second_call(flow: Flow) -> None:
    client = await flow.connect()
    client.send(chat(LENGTH, BODY + b"\x00\xffgarbage\r\n\r\n" + SECOND))
    assert b"HTTP/1.1 400 " in await client.rest()
    await flow.quiet()
    assert len(flow.provider.books.requests) <= 1


async def test_a_body_shorter_than_its_length_is_never_completed_by_the_next_request(
    flow: Flow,
) -> None:
    client = await flow.connect()
    client.send(chat(b"content-length: %d" % (len(BODY) + len(SECOND)), BODY + SECOND))
    answer = await client.answer()
    assert (answer.status, answer.error["code"]) == (400, "invalid_json")
    assert not flow.provider.books.requests


async def test_a_get_with_a_body_does_not_leave_its_body_to_the_next_request(flow: Flow) -> None:
    client = await flow.connect()
    head = b"GET /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(SECOND)
    assert (await client.call(head + SECOND)).status == 200
    assert (await client.call(SECOND)).status == 200
    assert len(flow.provider.books.requests) == 1


async def test_garbage_while_a_call_runs_does_not_spoil_its_answer(flow: Flow) -> None:
    client = await flow.connect()
    client.send(chat_request(stream=True, x_mock_first_delay_ms="20", x_mock_delay_ms="2"))
    await flow.provider.wait_for(lambda: flow.provider.open_requests == 1)
    client.send(b"\x00\xffgarbage\r\n\r\n" + SECOND)
    answer = await client.answer()
    assert (answer.status, answer.is_whole) == (200, True)
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert (await client.answer()).status == 400
    assert await client.is_closed()
    assert len(flow.provider.books.requests) == 1
