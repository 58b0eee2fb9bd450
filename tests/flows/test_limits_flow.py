"""Limits over real sockets: what the official SDKs are told, and what gets to the provider."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.support.flow import (
    CHAT,
    HELLO,
    Flow,
    Start,
    chat_body,
    chat_request,
    request,
    running,
    until,
)
from tests.support.upstream import RawConnection, RawUpstream
from tests.support.valkey import Valkey


def chain(*call: str, attempt: str = "sign", **filters: str) -> str:
    """A configuration with these filters, their settings as YAML flow."""
    settings = "".join(f"  {name}: {{{values}}}\n" for name, values in filters.items())
    chains = f"chains: {{default: {{call: [{', '.join(call)}], attempt: [{attempt}]}}}}\n"
    return (f"filters:\n{settings}" if settings else "") + chains


def asked(flow: Flow) -> int:
    """How many requests the provider got."""
    return len(flow.provider.books.requests)


async def chat(flow: Flow, *, retries: int = 0, messages: Any = HELLO, **more: Any) -> Any:
    async with flow.openai() as client:
        return await client.with_options(max_retries=retries).chat.completions.create(
            model="gpt", messages=messages, **more
        )


async def message(flow: Flow, **more: Any) -> Any:
    async with flow.anthropic() as client:
        return await client.messages.create(model="claude", max_tokens=9, messages=HELLO, **more)


def metric(flow: Flow, name: str, **labels: str) -> float:
    """The sum of a metric over everything but these labels."""
    total = 0.0
    for family in flow.server.metrics.snapshot():
        if family["name"] == name:
            for values, value in family["samples"]:
                if labels.items() <= dict(zip(family["labels"], values, strict=True)).items():
                    total += value
    return total


# rate_limit


async def test_sdks_raise_their_rate_limit_error_with_everything_they_know(start: Start) -> None:
    flow = await start(chain("rate_limit", rate_limit="requests_per_minute: 2, per: [model]"))
    for _ in range(2):
        await chat(flow)
        await message(flow)
    with pytest.raises(openai.RateLimitError) as of_openai:
        await chat(flow)
    assert of_openai.value.code == "rate_limited"
    assert "model gpt: 2 requests a minute" in str(of_openai.value)
    assert of_openai.value.response.headers["x-ratelimit-limit-requests"] == "2"
    with pytest.raises(anthropic.RateLimitError) as of_anthropic:
        await message(flow)
    assert "model claude: 2 requests a minute" in str(of_anthropic.value)
    headers = of_anthropic.value.response.headers
    assert headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert 1 <= int(headers["retry-after"]) <= 61
    assert asked(flow) == 4


async def test_an_sdk_that_waits_as_long_as_it_was_told_succeeds(start: Start) -> None:
    flow = await start(chain("rate_limit", rate_limit="requests_per_second: 1"))
    await chat(flow)
    await chat(flow, retries=1)
    assert asked(flow) == 2


async def test_a_flood_never_gets_more_through_than_the_limit(start: Start) -> None:
    flow = await start(chain("rate_limit", rate_limit="requests_per_minute: 20"))
    clients = [await flow.connect() for _ in range(10)]

    async def flood(client: Any) -> list[int]:
        return [(await client.call(chat_request())).status for _ in range(10)]

    found = [status for each in await asyncio.gather(*map(flood, clients)) for status in each]
    assert (found.count(200), found.count(429)) == (20, 80)
    assert asked(flow) == 20
    assert metric(flow, "llm_sidecar_limited", rule="requests_per_minute") == 80


async def test_a_stream_holds_its_slot_until_its_client_leaves(start: Start) -> None:
    flow = await start(chain("rate_limit", rate_limit="concurrency: 1"))
    client = await flow.connect()
    client.send(chat_request(stream=True, x_mock_hang="events:1"))
    await client.until(b"data: ")
    refused = await flow.call(chat_request())
    assert (refused.status, refused.error["code"]) == (429, "concurrency_limited")
    client.leave()
    await flow.quiet()
    assert (await flow.call(chat_request())).status == 200


# token_budget


def with_budget(limit: int, token_counter: str = "") -> str:
    budget = f"tokens_per_minute: {limit}"
    return chain("token_budget", "token_counter", token_budget=budget, token_counter=token_counter)


def settled(flow: Flow, source: str) -> float:
    return metric(flow, "llm_sidecar_budget_tokens", source=source)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_settled_is_what_the_provider_served(start: Start, stream: bool) -> None:
    flow = await start(with_budget(1_000_000))
    more: dict[str, Any] = {}
    if stream:
        more = {"stream": True, "stream_options": {"include_usage": True}}
    for tokens in (5, 11):
        async with flow.openai() as client:
            answer: Any = await client.chat.completions.create(
                model="gpt", messages=HELLO, max_tokens=tokens, **more
            )
            if stream:
                assert [each async for each in answer]
        async with flow.anthropic() as asker:
            answer = await asker.messages.create(
                model="claude", max_tokens=9, messages=HELLO, stream=stream
            )
            if stream:
                assert [each async for each in answer]
    await flow.quiet()
    served = [each.told for each in flow.provider.books.requests]
    assert settled(flow, "reported") == sum(
        each.input_tokens + each.output_tokens for each in served if each is not None
    )
    assert settled(flow, "estimated") == 0
    assert metric(flow, "llm_sidecar_budget_reservations") == 4
    assert metric(flow, "llm_sidecar_budget_settlements", source="reported") == 4


async def test_parallel_streams_cannot_overrun_a_budget(start: Start) -> None:
    flow = await start(with_budget(1000))
    body = chat_body(stream=True, max_tokens=400)
    data = request("POST", CHAT, body, {"x-mock-hang": "events:1"})
    clients = [await flow.connect() for _ in range(5)]
    for client in clients:
        client.send(data)
    statuses = [(await client.head()).status for client in clients]
    assert sorted(statuses) == [200, 200, 429, 429, 429]
    assert asked(flow) == 2
    for client in clients:
        client.leave()
    await flow.quiet()
    assert metric(flow, "llm_sidecar_budget_settlements") == 2


async def test_an_sdk_does_not_repeat_a_request_that_is_too_large(start: Start) -> None:
    flow = await start(with_budget(10))
    long = [{"role": "user", "content": "hello there, " * 20}]
    with pytest.raises(openai.RateLimitError) as caught:
        await chat(flow, retries=3, messages=long)
    assert caught.value.code == "token_budget_too_small"
    assert metric(flow, "llm_sidecar_limited") == 1
    assert asked(flow) == 0


# Several processes


@pytest.fixture
async def two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[str], Awaitable[list[Flow]]]]:
    """Starts two sidecars that share one store, which is not taken for dead on a busy machine."""
    monkeypatch.setattr("filters.stores.redis.ANSWER_S", 20.0)
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(Valkey())

        async def start_two(snippet: str) -> list[Flow]:
            flows = []
            for name in ("one", "other"):
                (tmp_path / name).mkdir()
                shared = f"store: '{valkey.url}'\n{snippet}"
                flows.append(await stack.enter_async_context(running(tmp_path / name, shared)))
            return flows

        yield start_two


Two = Callable[[str], Awaitable[list[Flow]]]


async def test_two_sidecars_share_a_limit(two: Two) -> None:
    flows = await two(chain("rate_limit", rate_limit="requests_per_minute: 10"))
    answers = await asyncio.gather(
        *[flow.call(chat_request()) for _ in range(10) for flow in flows]
    )
    assert sorted(answer.status for answer in answers) == [200] * 10 + [429] * 10
    assert sum(map(asked, flows)) == 10


async def left_half_way(one: Flow, other: Flow) -> bytes:
    """A stream of `one` took nearly all of the budget and its client left: a call as large."""
    client = await one.connect()
    body = chat_body(stream=True, max_tokens=900, stream_options={"include_usage": True})
    client.send(request("POST", CHAT, body, {"x-mock-hang": "events:2"}))
    await client.until(b"\n\n")
    data = request("POST", CHAT, chat_body(max_tokens=900))
    assert (await other.call(data)).status == 429
    client.leave()
    await one.quiet()
    return data


async def test_two_sidecars_share_a_budget_and_what_was_not_used_comes_back(two: Two) -> None:
    one, other = await two(with_budget(1000))
    data = await left_half_way(one, other)
    taken = int(settled(one, "estimated"))
    assert 0 < taken < 100  # what came of it was counted
    answer = await other.call(data)
    assert answer.status == 200
    used = answer.json["usage"]["total_tokens"]
    await other.quiet()
    room = 1000 - taken - used
    assert (await other.call(request("POST", CHAT, chat_body(max_tokens=room + 50)))).status == 429
    assert (await other.call(request("POST", CHAT, chat_body(max_tokens=room - 50)))).status == 200


async def test_two_sidecars_keep_what_nobody_knows_the_use_of(two: Two) -> None:
    one, other = await two(with_budget(1000, "count_missing: false"))
    refused = await other.call(await left_half_way(one, other))
    assert refused.status == 429
    assert (await other.call(request("POST", CHAT, chat_body(max_tokens=10)))).status == 200
    room = refused.header("x-ratelimit-remaining-tokens")
    assert 0 < int(room or 0) < 100


async def test_two_sidecars_share_the_slots_of_an_upstream(two: Two) -> None:
    limits = "upstreams: {up-openai: {upstream_limits: {concurrency: 1}}}\n"
    one, other = await two(limits + chain(attempt="upstream_limits, sign"))
    client = await one.connect()
    client.send(chat_request(stream=True, x_mock_hang="events:1"))
    await client.head()
    refused = await other.call(chat_request())
    assert (refused.status, refused.error["code"]) == (429, "upstream_limit_reached")
    client.leave()
    await one.quiet()
    async with asyncio.timeout(5.0):
        while (await other.call(chat_request())).status != 200:
            pass  # the slot comes back by the store, which nobody waits for


@pytest.mark.parametrize(
    ("when_down", "statuses"),
    [("open", [200, 200, 200]), ("closed", [503, 503, 503]), ("local_share", [200, 200, 429])],
)
async def test_a_store_that_is_away_is_answered_as_configured(
    start: Start, when_down: str, statuses: list[int]
) -> None:
    settings = f"requests_per_minute: 2, when_store_is_down: {when_down}"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        store = f"store: redis://127.0.0.1:{nobody.getsockname()[1]}\n"
        flow = await start(store + chain("rate_limit", rate_limit=settings))
        assert [(await flow.call(chat_request())).status for _ in range(3)] == statuses


# upstream_limits


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


def before(raw: RawUpstream) -> str:
    where = f"base_url: '{raw.base_url}/v1', upstream_limits: {{}}"
    return f"upstreams: {{up-openai: {{{where}}}}}\n{chain(attempt='upstream_limits, sign')}"


async def answer(connection: RawConnection, reset: str) -> None:
    """Answer one request, and say that nothing remains until then."""
    await connection.read_request()
    connection.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n"
        b"x-ratelimit-limit-requests: 60\r\nx-ratelimit-remaining-requests: 0\r\n"
        b"x-ratelimit-reset-requests: " + reset.encode() + b"\r\n\r\n{}"
    )


async def test_an_upstream_that_asks_for_a_moment_gets_it(start: Start, raw: RawUpstream) -> None:
    flow = await start(before(raw))
    client = await flow.connect()
    loop = asyncio.get_running_loop()
    client.send(chat_request())
    connection = await raw.accept()
    began_at = loop.time()
    await answer(connection, "250ms")
    assert (await client.answer()).status == 200
    client.send(chat_request())
    await answer(connection, "1m0s")
    assert loop.time() - began_at >= 0.25
    assert (await client.answer()).status == 200
    refused = await client.call(chat_request())
    assert (refused.status, refused.error["code"]) == (429, "upstream_limit_reached")
    assert 58 <= int(refused.header("retry-after") or 0) <= 60


async def test_a_client_that_leaves_while_it_waits_is_not_sent(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(before(raw))
    first = await flow.connect()
    first.send(chat_request())
    connection = await raw.accept()
    await answer(connection, "900ms")
    assert (await first.answer()).status == 200
    second = await flow.connect()
    second.send(chat_request())
    await until(lambda: flow.server.snapshot.open_calls)
    second.leave()
    await flow.quiet()
    assert raw.accepted == 1
    assert not raw.has_waiting()
