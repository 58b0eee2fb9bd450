"""Requests damaged at random: the sidecar answers or closes, keeps serving, and logs no error."""

from __future__ import annotations

import asyncio
import random
import re
from itertools import pairwise

import pytest

from tests.support.flow import CHAT, Flow, RawClient, chat_body, chat_request, request

SEEDS = [
    chat_request(),
    chat_request("claude", stream=True),
    request("GET", "/v1/models"),
    request("GET", "/up-openai/files?limit=1"),
    request("HEAD", "/up-openai/files"),
    request("POST", "/up-openai/audio", b"RIFF" * 10, {"content-type": "audio/wav"}),
    (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ntrailer: x-t\r\n\r\n"
        f"{len(chat_body()):x}\r\n{chat_body().decode()}\r\n0\r\nx-t: 1\r\n\r\n"
    ).encode(),
    request("POST", CHAT, chat_body(), {"expect": "100-continue"}),
    request("POST", CHAT, chat_body(), version="1.0"),
    request("GET", "/v1/models", b"", {"connection": "upgrade", "upgrade": "websocket"}),
]
TOKENS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\x00",
    b" ",
    b":",
    b"\r\n\r\n",
    b"content-length: 5\r\n",
    b"transfer-encoding: chunked\r\n",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"HTTP/1.1",
    b"HTTP/0.9",
    b"/../",
    b"%2e%2e",
    b"\xff\xfe",
    b"host: y\r\n",
    b"connection: close\r\n",
    b"POST / HTTP/1.1\r\n",
    b"-1",
    b"{" * 50,
    b'"',
]
STATUS = re.compile(rb"(?:^|\r\n\r\n|[^\r\n])HTTP/1\.1 (\d{3}) ")


def damaged(chance: random.Random) -> bytes:
    """A request, or two, with up to four things wrong."""
    data = chance.choice(SEEDS)
    if chance.random() < 0.3:
        data += chance.choice(SEEDS)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(data))
        match chance.randint(0, 4):
            case 0:
                data = data[:at] + chance.choice(TOKENS) + data[at:]
            case 1:
                data = data[:at] + bytes([chance.randint(0, 255)]) + data[at + 1 :]
            case 2:
                data = data[:at] + data[at + chance.randint(1, 20) :]
            case 3:
                end = at + chance.randint(1, 40)
                data = data[:end] + data[at:end] + data[end:]
            case _:
                data = data[:at]
    return data


def pieces(data: bytes, chance: random.Random) -> list[bytes]:
    """One to three pieces of `data`."""
    cuts = sorted(chance.randint(0, len(data)) for _ in range(chance.randint(0, 2)))
    return [data[at:end] for at, end in pairwise((0, *cuts, len(data)))]


async def converse(flow: Flow, data: list[bytes]) -> bytes:
    """Send piece by piece, and return all that came before the close, or within a moment."""
    client: RawClient = await flow.connect()
    for piece in data:
        client.send(piece)
        await asyncio.sleep(0)
    # A whole request behind the damage: what is left of it may be an answer, a close or silence.
    try:
        async with asyncio.timeout(0.02):
            got = await client.rest()
    except TimeoutError:
        got = bytes(client.reader._buffer)  # type: ignore[attr-defined]
    client.leave()
    return got


@pytest.mark.parametrize("seed", range(4))
async def test_damaged_requests_are_answered_or_closed(flow: Flow, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        batch = [pieces(damaged(chance), chance) for _ in range(25)]
        answers = await asyncio.gather(*(converse(flow, data) for data in batch))
        for data, got in zip(batch, answers, strict=True):
            assert b"Traceback" not in got
            statuses = [int(status) for status in STATUS.findall(got)]
            assert 500 not in statuses, data
            if got:
                assert got.startswith(b"HTTP/1.1 "), data
    await flow.quiet()
    assert not flow.errors
    assert (await flow.call(chat_request())).status == 200


async def test_no_damage_makes_one_request_two(flow: Flow) -> None:
    """Every byte of a chat call, left out, doubled or broken: never more than one call."""
    data = chat_request()
    for number in range(0, len(data), 2):
        for changed in (
            data[:number] + data[number + 1 :],
            data[:number] + data[number : number + 1] * 2 + data[number + 1 :],
            data[:number] + b"\n" + data[number:],
        ):
            before = len(flow.provider.books.requests)
            client = await flow.connect()
            client.send(changed)
            client.half_close()
            await client.rest()
            client.leave()
            assert len(flow.provider.books.requests) - before <= 1
    await flow.quiet()
