"""Heads that are malformed, too large, too slow, or in another protocol."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.support.flow import CHAT, Flow, RawClient, Start, chat_body, chat_request, request

BODY = chat_body()
LENGTH = b"content-length: %d\r\n" % len(BODY)


def chat_with(lines: bytes) -> bytes:
    """A chat request with these header lines, ends included, and nothing else."""
    return b"POST %b HTTP/1.1\r\n%b\r\n%b" % (CHAT.encode(), lines, BODY)


async def refused(flow: Flow, data: bytes, *statuses: int) -> RawClient:
    client = await flow.connect()
    answer = await client.call(data)
    assert answer.status in (statuses or (400,))
    assert answer.error["code"]
    assert await client.is_closed()
    assert not flow.provider.books.requests
    return client


@pytest.mark.parametrize(
    "lines",
    [
        b"host: x\r\nx-a: 1\r\n folded\r\n" + LENGTH,
        b"host: x\r\nx-a: 1\r\n\tfolded\r\n" + LENGTH,
        b"host: x\n" + LENGTH,
        b"host: x\r\nx-a: 1\rx-b: 2\r\n" + LENGTH,
        b"host: x\r\nx-a: a\x00b\r\n" + LENGTH,
        b"host: x\r\nx-a\x00: b\r\n" + LENGTH,
        b"host: x\r\nx-a : b\r\n" + LENGTH,
        b"host: x\r\nx a: b\r\n" + LENGTH,
        b"host: x\r\n: b\r\n" + LENGTH,
        b"host: x\r\nno-colon\r\n" + LENGTH,
        b"host: x\r\nx-\xc3\xa4: b\r\n" + LENGTH,
        b"host: x\r\nx(a): b\r\n" + LENGTH,
        b"host: x\r\nx-a: a\x7fb\r\n" + LENGTH,
        b"host: x\r\nx-a: a\x08b\r\n" + LENGTH,
        b" host: x\r\n" + LENGTH,
    ],
    ids=[
        "folded with a space",
        "folded with a tab",
        "bare LF",
        "bare CR",
        "NUL in a value",
        "NUL in a name",
        "space before the colon",
        "space in a name",
        "empty name",
        "no colon",
        "name that is not ASCII",
        "parenthesis in a name",
        "DEL in a value",
        "control character in a value",
        "space before the first name",
    ],
)
async def test_a_malformed_field_is_refused(flow: Flow, lines: bytes) -> None:
    await refused(flow, chat_with(lines))


@pytest.mark.parametrize(
    "line",
    [
        b" POST /v1/chat/completions HTTP/1.1",
        b"POST /v1/chat completions HTTP/1.1",
        b"POST /v1/chat/completions HTTP/1.1 x",
        b"POST /v1/chat/completions HTTP/3.0",
        b"POST /v1/chat/completions HTTP/1.10",
        b"POST /v1/chat/completions http/1.1",
        b"POST /v1/chat/completions",
        b"PO\x00ST /v1/chat/completions HTTP/1.1",
        b"POST /v1/chat\x00/completions HTTP/1.1",
        b"POST /v1/chat\t/completions HTTP/1.1",
        b"P(ST /v1/chat/completions HTTP/1.1",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /v1/models",
    ],
)
async def test_a_malformed_request_line_is_refused(flow: Flow, line: bytes) -> None:
    await refused(flow, line + b"\r\nhost: x\r\n" + LENGTH + b"\r\n" + BODY)


async def test_http_2_is_refused_by_its_preface(flow: Flow) -> None:
    await refused(flow, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")


async def test_http_0_9_is_refused(flow: Flow) -> None:
    await refused(flow, b"GET /v1/models\r\n\r\n")


async def test_a_malformed_request_gets_an_envelope_with_a_stable_code(flow: Flow) -> None:
    answer = await flow.call(b"nonsense\r\n\r\n")
    assert answer.error["code"] == answer.header("x-sidecar-error") == "bad_request"
    assert answer.error["type"] == "invalid_request_error"


# Host


async def test_a_request_without_host_is_refused(flow: Flow) -> None:
    """RFC 9112, 3.2: a server must answer 400."""
    await refused(flow, chat_with(LENGTH))


@pytest.mark.parametrize("second", [b"x", b"y"])
async def test_two_hosts_are_refused(flow: Flow, second: bytes) -> None:
    await refused(flow, chat_with(b"host: x\r\nhost: " + second + b"\r\n" + LENGTH))


async def test_http_1_0_needs_no_host(flow: Flow) -> None:
    client = await flow.connect()
    answer = await client.call(b"GET /v1/models HTTP/1.0\r\n\r\n")
    assert answer.status == 200
    assert await client.is_closed()


# Size


async def test_a_head_larger_than_max_head_bytes_gets_431(start: Start) -> None:
    flow = await start("http: {max_head_bytes: 4096}")
    many = {f"x-{number}": "v" * 500 for number in range(9)}
    answer = await flow.call(request("POST", CHAT, BODY, many))
    assert (answer.status, answer.error["code"]) == (431, "head_too_large")
    assert not flow.provider.books.requests


async def test_the_names_of_fields_count_for_max_head_bytes_too(start: Start) -> None:
    flow = await start("http: {max_head_bytes: 4096}")
    many = {f"x-{number}-{'n' * 500}": "v" for number in range(9)}
    answer = await flow.call(request("POST", CHAT, BODY, many))
    assert answer.status == 431
    assert not flow.provider.books.requests


@pytest.mark.parametrize("where", ["value", "name", "path", "query"])
async def test_one_line_that_is_too_long_gets_431(flow: Flow, where: str) -> None:
    long = "a" * 40_000
    path = {"path": f"/{long}", "query": f"{CHAT}?q={long}"}.get(where, CHAT)
    fields = {"value": {"x-long": long}, "name": {long: "v"}}.get(where, {})
    client = await flow.connect()
    answer = await client.call(request("POST", path, BODY, fields))
    assert (answer.status, answer.error["code"]) == (431, "head_too_large")
    assert not flow.provider.books.requests


async def test_a_head_that_never_ends_is_cut_at_its_limit(flow: Flow) -> None:
    client = await flow.connect()
    client.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-endless: ")
    for _ in range(40):
        client.send(b"a" * 4096)
        await asyncio.sleep(0)
    data = await client.rest()  # a reset may have overtaken the answer, since we still sent
    assert not data or data.startswith(b"HTTP/1.1 431 ")


async def test_too_many_fields_are_refused(flow: Flow) -> None:
    many = {f"x-{number}": "v" for number in range(300)}
    await refused(flow, request("POST", CHAT, BODY, many), 400, 431)


# Slowness


async def test_a_head_that_comes_too_slowly_is_closed(start: Start) -> None:
    flow = await start("http: {keepalive_s: 0.3, body_silence_s: 0.3}")
    client = await flow.connect()
    began = time.monotonic()
    client.send(b"GET /v1/models HTTP/1.1\r\n")
    dripping = asyncio.create_task(_drip(client))
    await client.is_closed()
    dripping.cancel()
    assert time.monotonic() - began < 2
    assert not flow.provider.books.requests


async def _drip(client: RawClient) -> None:
    while True:
        client.send(b"x-a: 1\r\n")
        await asyncio.sleep(0.05)


async def test_a_slow_second_head_is_closed_as_well(start: Start) -> None:
    flow = await start("http: {keepalive_s: 0.3, body_silence_s: 0.3}")
    client = await flow.connect()
    assert (await client.call(request("GET", "/v1/models"))).status == 200
    client.send(b"GET /v1/models HTTP/1.1\r\n")
    dripping = asyncio.create_task(_drip(client))
    assert await client.is_closed()
    dripping.cancel()


async def test_a_slow_head_is_closed_by_body_silence_s_though_idle_ones_are_kept(
    start: Start,
) -> None:
    flow = await start("http: {keepalive_s: 60, body_silence_s: 0.2}")
    client = await flow.connect()
    client.send(b"GET /v1/models HTTP/1.1\r\n")
    await client.is_closed()


async def test_an_idle_connection_is_closed_after_keepalive_s(start: Start) -> None:
    flow = await start("http: {keepalive_s: 0.2}")
    fresh, used = await flow.connect(), await flow.connect()
    assert (await used.call(request("GET", "/v1/models"))).status == 200
    assert await used.is_closed()
    assert await fresh.is_closed()


# Other protocols and odd clients


async def test_an_upgrade_is_declined_and_what_follows_is_no_call(flow: Flow) -> None:
    client = await flow.connect()
    fields = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "x" * 24}
    client.send(request("GET", "/v1/models", b"", fields) + chat_request())
    answer = await client.answer()
    assert answer.status == 200
    assert await client.is_closed()
    assert not flow.provider.books.requests


async def test_an_upgrade_of_a_chat_call_is_declined_and_the_call_answered(flow: Flow) -> None:
    client = await flow.connect()
    fields = {"connection": "upgrade, http2-settings", "upgrade": "h2c", "http2-settings": "AAMA"}
    answer = await client.call(request("POST", CHAT, BODY, fields))
    assert answer.status == 200
    received = flow.provider.books.requests[0]
    assert received.body == BODY
    assert received.header("upgrade") is None
    assert received.header("http2-settings") is None


async def test_a_client_that_shuts_its_side_is_one_that_left(flow: Flow) -> None:
    client = await flow.connect()
    client.send(chat_request(x_mock_hang="head"))
    await flow.provider.wait_for(lambda: flow.provider.open_requests == 1)
    client.half_close()
    assert await client.is_closed()
    await flow.provider.wait_for(lambda: flow.provider.open_requests == 0)
    (line,) = await flow.logged()
    assert line["outcome"] == "client_gone"


async def test_a_connection_that_says_nothing_and_leaves_costs_nothing(flow: Flow) -> None:
    for _ in range(20):
        (await flow.connect()).leave()
    for data in (b"\r\n", b"G", b"GET /v1/models HTTP/1.1\r\nhost"):
        client = await flow.connect()
        client.send(data)
        client.leave()
    assert (await flow.call(chat_request())).status == 200
