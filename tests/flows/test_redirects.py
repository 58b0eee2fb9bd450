"""A redirect is an answer like any other: the client may follow it, the sidecar never does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.flow import PROVIDER_KEY, Flow, RawClient, Start, chat_request
from tests.support.upstream import RawConnection, RawUpstream

BODY = b'{"moved": true}'


@pytest.fixture
async def upstream() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as upstream:
        yield upstream


@pytest.fixture
async def elsewhere() -> AsyncIterator[RawUpstream]:
    """Where every redirect points."""
    async with RawUpstream() as elsewhere:
        yield elsewhere


async def start_before(upstream: RawUpstream, start: Start) -> Flow:
    return await start(
        "upstreams:\n"
        f"  up-openai: {{base_url: '{upstream.base_url}/v1', proxy: none, "
        "sign: {scheme: bearer, key: env:PROVIDER_KEY}}\n"
    )


def redirect(status: int, location: str) -> bytes:
    head = f"HTTP/1.1 {status} Elsewhere\r\nlocation: {location}\r\ncontent-length: {len(BODY)}\r\n"
    return head.encode() + b"x-upstream: yes\r\n\r\n" + BODY


async def asked(
    flow: Flow, upstream: RawUpstream, request: bytes
) -> tuple[RawClient, RawConnection]:
    """A client whose signed request is at the upstream."""
    client = await flow.connect()
    client.send(request)
    connection = await upstream.accept()
    assert f"\r\nauthorization: Bearer {PROVIDER_KEY}\r\n".encode() in (
        await connection.read_request()
    )
    return client, connection


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_to_another_origin_goes_to_the_client_as_it_is(
    start: Start, upstream: RawUpstream, elsewhere: RawUpstream, status: int, is_stream: bool
) -> None:
    flow = await start_before(upstream, start)
    location = f"{elsewhere.base_url}/v1/chat/completions?a=1"
    client, connection = await asked(flow, upstream, chat_request(stream=is_stream))
    connection.write(redirect(status, location))
    answer = await client.answer()
    assert (answer.status, answer.header("location"), answer.body) == (status, location, BODY)
    assert answer.header("x-upstream") == "yes"
    assert PROVIDER_KEY not in repr(answer)
    assert not elsewhere.has_waiting()
    assert not upstream.has_waiting()


@pytest.mark.parametrize(
    "location", ["/v1/elsewhere", "//169.254.169.254/latest", "http://[::1]:1/", "unix:/run/x.sock"]
)
async def test_no_form_of_a_location_is_followed(
    start: Start, upstream: RawUpstream, location: str
) -> None:
    flow = await start_before(upstream, start)
    client, connection = await asked(flow, upstream, chat_request())
    connection.write(redirect(307, location))
    assert (await client.answer()).header("location") == location
    # The connection is free again, and the next call is the next request on it.
    client.send(chat_request())
    assert (await connection.read_request()).startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    connection.write(redirect(308, location))
    assert (await client.answer()).status == 308
    assert upstream.accepted == 1
    assert not upstream.has_waiting()


async def test_a_redirect_of_an_upload_ends_it_and_is_not_followed(
    start: Start, upstream: RawUpstream, elsewhere: RawUpstream
) -> None:
    flow = await start_before(upstream, start)
    location = f"{elsewhere.base_url}/files"
    client = await flow.connect()
    client.send(
        b"POST /up-openai/files HTTP/1.1\r\nhost: sidecar\r\ncontent-type: audio/wav\r\n"
        b"content-length: 4\r\n\r\nRIFF"
    )
    connection = await upstream.accept()
    await connection.read_request()
    connection.write(redirect(307, location))
    answer = await client.answer()
    assert (answer.status, answer.header("location")) == (307, location)
    assert PROVIDER_KEY not in repr(answer)
    assert not elsewhere.has_waiting()


async def test_the_sdk_learns_of_the_redirect_and_reaches_nobody_by_the_sidecar(
    start: Start, upstream: RawUpstream, elsewhere: RawUpstream
) -> None:
    """An SDK that follows goes there itself, with the key that it has: not the provider's."""
    flow = await start_before(upstream, start)
    async with flow.openai(key="clients-own-key") as sdk:
        task = asyncio.create_task(
            sdk.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
        )
        connection = await upstream.accept()
        await connection.read_request()
        connection.write(redirect(307, f"{elsewhere.base_url}/v1/chat/completions"))
        follower = await elsewhere.accept()
        request = await follower.read_request()
        assert PROVIDER_KEY.encode() not in request
        follower.write(b"HTTP/1.1 400 No\r\ncontent-length: 2\r\n\r\n{}")
        with pytest.raises(Exception, match="400"):
            await task
