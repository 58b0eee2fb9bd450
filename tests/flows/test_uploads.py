"""Request bodies: JSON is held up to a limit, anything else streams through unheld."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from sidecar.config.schema import HttpSettings
from sidecar.edge import BoundedUpload
from tests.support.flow import CHAT, Flow, Start, chat_body, chat_request, request, until
from tests.support.upstream import RawUpstream

JSON = {"content-type": "application/json"}
RECEIVE_BYTES = 128 * 1024
IN_FLIGHT_BYTES = 1024 * 1024
"""aiohttp reads up to 256 KiB at once, and pauses after that."""


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


def config(raw: RawUpstream, more: str = "") -> str:
    return f"upstreams: {{up-openai: {{base_url: '{raw.base_url}/v1'}}}}\n{more}"


def upload_head(size: int | None = None, path: str = "/up-openai/audio") -> bytes:
    """The head of an upload of `size` bytes, or of a chunked one."""
    framing = "transfer-encoding: chunked" if size is None else f"content-length: {size}"
    fields = f"host: x\r\ncontent-type: audio/wav\r\n{framing}"
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode()


# Streaming through


async def test_an_upload_arrives_while_it_is_still_being_sent(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(upload_head(8) + b"one!")
    connection = await raw.accept()
    head = await connection.read_head()
    assert b"\r\ntransfer-encoding: chunked\r\n" in head
    assert b"content-length" not in head
    assert await connection.read_until(b"4\r\none!\r\n")
    client.send(b"two!")
    assert await connection.read_until(b"4\r\ntwo!\r\n0\r\n\r\n")
    connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    assert (await client.answer()).body == b"ok"
    connection.close()


async def test_a_large_upload_is_not_held_while_the_upstream_does_not_read(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    client = await flow.connect()
    total = 20 * 1024 * 1024
    client.send(upload_head(total))
    connection = await raw.accept(receive_bytes=RECEIVE_BYTES)
    assert connection._transport is not None
    connection._transport.pause_reading()
    data = random.Random(1).randbytes(total)
    client.send(data)
    left, still = -1, 0
    while still < 50:  # until nothing moves any more
        await asyncio.sleep(0)
        now = client.writer.transport.get_write_buffer_size()
        left, still = now, still + 1 if now == left else 0
    # The rest of what has left the client is in the kernel, which takes up to 6 MB a socket.
    (held,) = flow.upstream().pool._open
    assert held.transport is not None
    assert held.transport.get_write_buffer_size() <= IN_FLIGHT_BYTES
    assert left > 0

    connection._transport.resume_reading()
    digest, size = hashlib.sha256(), 0
    await connection.read_head()
    while count := int(await connection.read_until(b"\r\n"), 16):
        piece = (await connection.read_exactly(count + 2))[:-2]
        digest.update(piece)
        size += len(piece)
    assert (size, digest.digest()) == (total, hashlib.sha256(data).digest())
    connection.write(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert (await client.answer()).status == 204
    connection.close()


@pytest.mark.parametrize("size", [0, 1, 1000, 3_000_000])
async def test_an_upload_of_any_size_arrives_as_the_same_bytes(flow: Flow, size: int) -> None:
    data = random.Random(2).randbytes(size)
    answer = await flow.call(upload_head(size) + data)
    assert answer.json["body_bytes"] == size
    assert answer.json["body_sha256"] == hashlib.sha256(data).hexdigest()
    (line,) = await flow.logged()
    assert line["bytes_in"] == size


async def test_a_chunked_upload_arrives_as_the_same_bytes(flow: Flow) -> None:
    data = random.Random(3).randbytes(100_000)
    pieces = [data[at : at + 999] for at in range(0, len(data), 999)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    answer = await flow.call(upload_head() + chunks + b"0\r\n\r\n")
    assert answer.json["body_sha256"] == hashlib.sha256(data).hexdigest()


async def test_an_early_answer_ends_the_upload_and_is_readable(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(upload_head(5_000_000) + b"x" * 100_000)
    connection = await raw.accept()
    await connection.read_head()
    connection.write(b"HTTP/1.1 401 No\r\ncontent-length: 2\r\n\r\nno")
    client.send(b"x" * 100_000)
    answer = await client.answer()
    assert (answer.status, answer.body) == (401, b"no")
    assert answer.header("connection") == "close"
    await connection.closed()
    assert await client.is_closed()


# Too large


@pytest.mark.parametrize("expect", [{}, {"expect": "100-continue"}])
async def test_json_that_is_announced_too_large_is_refused_before_it_is_sent(
    start: Start, expect: dict[str, str]
) -> None:
    flow = await start("http: {max_body_bytes: 1000}")
    client = await flow.connect()
    client.send(request("POST", CHAT, b"", {"content-length": "1001", **JSON, **expect}))
    answers = [await client.answer()]
    if answers[0].status == 100:
        answers.append(await client.answer())
    assert [each.status for each in answers] == [413]
    assert answers[0].error["code"] == "body_too_large"
    assert not flow.provider.books.requests


@pytest.mark.parametrize("path", [CHAT, "/up-openai/x"])
async def test_json_that_turns_out_too_large_is_refused(start: Start, path: str) -> None:
    flow = await start("http: {max_body_bytes: 1000}")
    body = chat_body(filler="f" * 1000)
    whole = await flow.call(request("POST", path, body))
    client = await flow.connect()
    client.send(upload_head(path=path).replace(b"audio/wav", b"application/json"))
    for at in range(0, len(body), 300):
        piece = body[at : at + 300]
        client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
    chunked = await client.answer()
    for answer in (whole, chunked):
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert not flow.provider.books.requests


async def test_an_upload_that_turns_out_too_large_is_refused(start: Start) -> None:
    flow = await start("http: {max_upload_bytes: 1000}")
    client = await flow.connect()
    client.send(upload_head() + b"%x\r\n%b\r\n" % (900, b"x" * 900))
    client.send(b"%x\r\n%b\r\n" % (900, b"x" * 900))
    answer = await client.answer()
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


async def test_an_upload_that_is_announced_too_large_reaches_no_upstream(start: Start) -> None:
    flow = await start("http: {max_upload_bytes: 1000}")
    client = await flow.connect()
    client.send(upload_head(1001) + b"x")
    answer = await client.answer()
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    await flow.quiet()
    assert not flow.provider.books.requests


@pytest.mark.parametrize("in_one_write", [True, False])
async def test_the_limit_of_an_upload_does_not_depend_on_how_it_comes(
    start: Start, in_one_write: bool
) -> None:
    flow = await start("http: {max_body_bytes: 1000, max_upload_bytes: 5000}")
    client = await flow.connect()
    if in_one_write:
        client.send(upload_head(2000) + b"x" * 2000)
    else:
        client.send(upload_head(2000))
        await until(lambda: flow.server.snapshot.open_calls == 1)
        client.send(b"x" * 2000)
    assert (await client.answer()).status == 200


# Slow and broken


@pytest.mark.parametrize("head", [upload_head(100), request("POST", CHAT)[:-2]])
async def test_a_body_that_stops_coming_gets_408(start: Start, head: bytes) -> None:
    flow = await start("http: {body_silence_s: 0.1}")
    client = await flow.connect()
    if b"audio" not in head:
        head = head.replace(b"content-length: 0", b"content-length: 100") + b"\r\n"
    client.send(head + b"{")
    answer = await client.answer()
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    assert await client.is_closed()
    (line,) = await flow.logged()
    assert (line["status"], line["outcome"]) == (408, "rejected")


async def test_a_slow_body_that_keeps_coming_is_no_silence(start: Start) -> None:
    flow = await start("http: {body_silence_s: 0.5}")
    client = await flow.connect()
    data = chat_request()
    client.send(data[:-6])
    for at in range(6, 0, -1):
        await asyncio.sleep(0.1)  # 0.6 s in all, which is more than the allowed silence
        client.send(data[len(data) - at : len(data) - at + 1])
    assert (await client.answer()).status == 200


async def test_an_upload_that_is_malformed_midway_never_looks_whole_to_the_upstream(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(config(raw))
    client = await flow.connect()
    client.send(upload_head() + b"4\r\nhalf\r\n")
    connection = await raw.accept()
    await connection.read_until(b"half\r\n")
    client.send(b"zz\r\n")
    answer = await client.answer()
    assert answer.status == 400
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await connection.read_until(b"0\r\n\r\n")
    assert await client.is_closed()


# Expect


async def test_a_client_that_asks_first_is_told_to_continue(flow: Flow) -> None:
    client = await flow.connect()
    body = chat_body()
    data = request("POST", CHAT, body, {"expect": "100-continue"})
    client.send(data[: -len(body)])
    assert (await client.answer()).status == 100
    client.send(body)
    assert (await client.answer()).status == 200
    assert flow.provider.books.requests[0].header("expect") is None


async def test_a_refused_call_is_not_told_to_continue(start: Start) -> None:
    flow = await start(
        "teams: teams/*.yaml", files={"teams/a.yaml": f"team: a\nkeys: [{'sha256:' + '0' * 64}]"}
    )
    client = await flow.connect()
    body = chat_body()
    client.send(request("POST", CHAT, body, {"expect": "100-continue"})[: -len(body)])
    answer = await client.answer()
    assert answer.status == 401
    assert answer.header("connection") == "close"


@pytest.mark.parametrize("with_body", [True, False])
async def test_an_expectation_we_do_not_know_gets_417(flow: Flow, with_body: bool) -> None:
    body = chat_body()
    data = request("POST", CHAT, body, {"expect": "the-unexpected"})
    answer = await flow.call(data if with_body else data[: -len(body)])
    assert (answer.status, answer.error["code"]) == (417, "expectation_failed")
    assert not flow.provider.books.requests


async def test_a_compressed_json_body_is_refused_in_plain_words(flow: Flow) -> None:
    answer = await flow.call(request("POST", CHAT, b"\x1f\x8b\x08", {"content-encoding": "gzip"}))
    assert (answer.status, answer.error["code"]) == (415, "unsupported_encoding")


# Held after all


class Payload:
    """A request body that comes piece by piece, as the test says."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()

    async def readany(self) -> bytes:
        return await self.pieces.get()


async def test_upload_whose_holding_was_given_up_half_way_is_whole_the_next_time() -> None:
    payload = Payload()
    call = SimpleNamespace(headers={}, bytes_in=0)
    upload = BoundedUpload(payload, call, 1000, HttpSettings())  # type: ignore[arg-type]
    payload.pieces.put_nowait(b"one,")
    first = asyncio.ensure_future(upload.hold())
    await until(lambda: call.bytes_in == 4)
    first.cancel()
    await asyncio.wait((first,))
    together = [asyncio.ensure_future(upload.hold()) for _ in range(2)]
    for piece in (b"two", b"", b""):
        payload.pieces.put_nowait(piece)
    assert await asyncio.gather(*together) == [b"one,two"] * 2
