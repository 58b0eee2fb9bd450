"""Requests, byte for byte: framing, uploads under back-pressure, and what is refused."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.call import Timeouts
from sidecar.errors import CallError, Phase, Rejected, UpstreamError
from sidecar.transport.upstream import LiveUpstream
from tests.support.attempts import Begin, ScriptedUpload, attached, make_attempt, until, whole
from tests.support.upstream import RawUpstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def test_request_is_written_as_the_attempt_says(begin: Begin, raw: RawUpstream) -> None:
    exchange = await begin(
        method="POST",
        path="/v1/a%20b?c=d",
        headers=[("x-one", "1"), ("x-two", "caf\u00e9"), ("x-two", "again")],
        body=b'{"a":1}',
    )
    assert exchange.request == (
        b"POST /v1/a%%20b?c=d HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nx-one: 1\r\n"
        b"x-two: caf\xc3\xa9\r\nx-two: again\r\ncontent-length: 7\r\n\r\n"
        b'{"a":1}' % raw.port
    )


async def test_bytes_of_a_header_that_are_not_utf_8_go_out_as_they_came_in(begin: Begin) -> None:
    value = b"\xff\xe9".decode("utf-8", "surrogateescape")
    exchange = await begin(headers=[("x-raw", value)])
    assert b"x-raw: \xff\xe9\r\n" in exchange.request


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
async def test_empty_body_of_a_writing_method_is_announced_as_empty(
    begin: Begin, method: str
) -> None:
    exchange = await begin(method=method)
    assert exchange.request.endswith(b"\r\ncontent-length: 0\r\n\r\n")


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
async def test_empty_body_of_a_reading_method_is_not_announced(begin: Begin, method: str) -> None:
    exchange = await begin(method=method)
    assert b"content-length" not in exchange.request
    assert b"transfer-encoding" not in exchange.request


async def test_large_body_is_sent_byte_for_byte(begin: Begin) -> None:
    body = bytes(range(256)) * 16 * 1024  # 4 MiB
    exchange = await begin(body=body)
    assert exchange.request.endswith(b"content-length: 4194304\r\n\r\n" + body)
    exchange.connection.write(OK)
    assert await whole(await exchange.reply) == b"ok"


LINE_ENDS = ["\r", "\n", "\r\n", "\0", "\r\nx-injected: 1", "\r\n\r\nGET / "]


@pytest.mark.parametrize("bad", [*LINE_ENDS, " ", " HTTP/1.1"])
async def test_path_that_could_end_its_line_is_refused(
    upstream: LiveUpstream, raw: RawUpstream, bad: str
) -> None:
    with pytest.raises(Rejected) as caught:
        await upstream.send(make_attempt(upstream, path=f"/a{bad}b"))
    assert caught.value.status == 400
    assert not raw.has_waiting()


@pytest.mark.parametrize("bad", LINE_ENDS)
@pytest.mark.parametrize("place", ["value", "name"])
async def test_field_that_could_end_its_line_never_gets_into_an_attempt(
    upstream: LiveUpstream, bad: str, place: str
) -> None:
    attempt = make_attempt(upstream)
    name = f"x{bad}y" if place == "name" else "x"
    value = f"v{bad}w" if place == "value" else "v"
    with pytest.raises(ValueError, match="header"):
        attempt.headers.add(name, value)
    with pytest.raises(ValueError, match="header"):
        attempt.headers[name] = value
    with pytest.raises(ValueError, match="header"):
        attempt.headers.update({name: value})
    assert len(attempt.headers) == 0


# Uploads


async def test_upload_is_sent_chunked_as_it_comes(begin: Begin, upstream: LiveUpstream) -> None:
    upload = ScriptedUpload(b"first", b"second!", b"")
    exchange = await begin(upload=upload)
    head, _, body = exchange.request.partition(b"\r\n\r\n")
    assert b"\r\ntransfer-encoding: chunked" in head
    assert b"content-length" not in head
    assert body == b"5\r\nfirst\r\n7\r\nsecond!\r\n0\r\n\r\n"
    exchange.connection.write(OK)
    assert await whole(await exchange.reply) == b"ok"
    again = await begin(on=exchange.connection)
    again.connection.write(OK)
    assert await whole(await again.reply) == b"ok"


async def test_upload_stops_while_the_upstream_does_not_read(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    piece = b"x" * 64 * 1024
    upload = ScriptedUpload(*[piece] * 400)  # 25 MiB: more than any socket buffer takes
    task = asyncio.create_task(upstream.send(make_attempt(upstream, upload=upload)))
    sock = await raw.accept_socket()  # nobody reads from it
    try:
        taken = -1
        while taken != upload.taken:  # it stands still: the kernel is full
            taken = upload.taken
            await asyncio.sleep(0.05)
        assert 0 < taken < 16 * 1024 * 1024
        (connection,) = upstream.pool._open
        assert connection.transport is not None
        assert connection.transport.get_write_buffer_size() <= 64 * 1024 + len(piece) + 16
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        sock.close()


async def test_upload_goes_on_when_the_upstream_reads_again(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    pieces = [bytes([number]) * 256 * 1024 for number in range(40)]
    upload = ScriptedUpload(*pieces, b"")
    task = asyncio.create_task(upstream.send(make_attempt(upstream, upload=upload)))
    connection = await raw.accept()  # reads 128 KiB and then waits for the test
    await until(lambda: upload.taken > 0)
    request = await connection.read_request()
    sent = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    assert request.partition(b"\r\n\r\n")[2] == sent + b"0\r\n\r\n"
    connection.write(OK)
    assert await whole(await task) == b"ok"


async def test_early_answer_ends_the_upload_and_the_connection(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    upload = ScriptedUpload(b"first")
    task = asyncio.create_task(upstream.send(make_attempt(upstream, upload=upload)))
    connection = await raw.accept()
    await connection.read_until(b"first\r\n")
    connection.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
    reply = await task
    assert reply.status == 413
    assert await whole(reply) == b"no"
    await connection.closed()
    upload.give(b"second")
    await until(lambda: upstream.pool.in_use == 0)
    assert upload.taken == len(b"first")


async def test_upload_that_breaks_off_closes_the_connection_and_says_why(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    upload = ScriptedUpload(b"first", ConnectionResetError("gone"))
    task = asyncio.create_task(upstream.send(make_attempt(upstream, upload=upload)))
    connection = await raw.accept()
    with pytest.raises(CallError) as caught:
        await task
    assert not isinstance(caught.value, UpstreamError)
    assert (caught.value.status, caught.value.code) == (400, "request_body_broken")
    await connection.closed()


async def test_upload_that_is_refused_ends_with_that_refusal(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    refusal = Rejected(413, "request_too_large", "too large")
    upload = ScriptedUpload(b"first", refusal)
    task = asyncio.create_task(upstream.send(make_attempt(upstream, upload=upload)))
    connection = await raw.accept()
    with pytest.raises(Rejected) as caught:
        await task
    assert caught.value is refusal
    await connection.closed()


async def test_upload_ends_when_the_upstream_dies(raw: RawUpstream, upstream: LiveUpstream) -> None:
    upload = ScriptedUpload(b"first")
    task = asyncio.create_task(upstream.send(make_attempt(upstream, upload=upload)))
    connection = await raw.accept()
    await connection.read_until(b"first\r\n")
    connection.close()
    with pytest.raises(UpstreamError) as caught:
        await task
    assert caught.value.phase is Phase.SEND
    upload.give(b"second")
    await until(lambda: upstream.pool.in_use == 0)
    assert upload.taken == len(b"first")


async def test_wait_for_the_first_byte_counts_from_the_end_of_the_upload(
    raw: RawUpstream, upstream: LiveUpstream
) -> None:
    upload = ScriptedUpload(b"first")
    timeouts = Timeouts(first_byte_s=0.4)
    attempt = make_attempt(upstream, upload=upload, timeouts=timeouts)
    task = asyncio.create_task(upstream.send(attempt))
    connection = await raw.accept()
    await connection.read_until(b"first\r\n")
    loop = asyncio.get_running_loop()
    loop.call_later(0.25, upload.give, b"")
    await connection.read_until(b"0\r\n\r\n")
    loop.call_later(0.25, connection.write, OK)  # 0.5 s after the last piece, 0.25 s after the end
    sink = attached((await task).body)
    await sink.over()
    assert sink.data == b"ok"
