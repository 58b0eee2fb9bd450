"""Recorded and shared answers over real sockets, in every dialect: what clients and SDKs get."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from inspect import isawaitable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from tests.support.flow import (
    CHAT,
    HELLO,
    MESSAGES,
    Answer,
    Flow,
    RawClient,
    Start,
    request,
    until,
)
from tests.support.process import HeldUpstream, serving, write_config

CACHE, KEY = "x-sidecar-cache", "x-sidecar-cache-key"
TEXT = "/api/v1/services/aigc/text-generation/generation"
MULTIMODAL = "/api/v1/services/aigc/multimodal-generation/generation"
TEXT_EMBEDDING = "/api/v1/services/embeddings/text-embedding/text-embedding"
WENXIN = "/rpc/2.0/ai_custom/v1/wenxinworkshop"
SSE = {"x-dashscope-sse": "enable", "accept": "text/event-stream"}
MANY = 1000

ALL_DIALECTS = """
upstreams:
  qwen: {dialect: dashscope, base_url: "URL"}
  ernie: {dialect: qianfan, base_url: "URL"}
models:
  "qwen-*": [qwen]
  text-embedding-v4: [qwen]
  "*_pro": [ernie]
  bge_large_zh: [ernie]
"""
PARTS = [{"role": "user", "content": [{"text": "hello there"}]}]

STREAMED: dict[str, tuple[str, Any]] = {
    "chat": (CHAT, {"model": "gpt", "messages": HELLO}),
    "completions": ("/v1/completions", {"model": "gpt", "prompt": "hello there"}),
    "responses": ("/v1/responses", {"model": "gpt", "input": "hello there"}),
    "messages": (MESSAGES, {"model": "claude", "max_tokens": 50, "messages": HELLO}),
    "qwen": (TEXT, {"model": "qwen-max", "input": {"messages": HELLO}}),
    "qwen-vl": (MULTIMODAL, {"model": "qwen-vl-max", "input": {"messages": PARTS}}),
    "ernie": (f"{WENXIN}/chat/completions_pro", {"messages": HELLO}),
    "ernie-code": (f"{WENXIN}/completions/sqlcoder_pro", {"prompt": "hello there"}),
}
WHOLE_ONLY: dict[str, tuple[str, Any]] = {
    "embeddings": ("/v1/embeddings", {"model": "gpt", "input": "hello there"}),
    "qwen-embeddings": (
        *(TEXT_EMBEDDING, {"model": "text-embedding-v4", "input": {"texts": ["hello there"]}}),
    ),
    "ernie-embeddings": (f"{WENXIN}/embeddings/bge_large_zh", {"input": ["hello there"]}),
}
FORMS = [(name, stream) for name in STREAMED for stream in (True, False)]
FORMS += [(name, False) for name in WHOLE_ONLY]
LAST = {"chat": b"data: [DONE]\n\n", "messages": b'data: {"type":"message_stop"}\n\n'}


def ask(name: str, *, stream: bool = False, version: str = "1.1", **headers: str) -> bytes:
    """A request that means to have the same answer each time; header names are written with `_`."""
    path, fields = (STREAMED | WHOLE_ONLY)[name]
    more: dict[str, Any] = {"temperature": 0}
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    if name.startswith("qwen"):
        more = {"parameters": {"temperature": 0}}
        named |= SSE if stream else {}
    elif stream:
        more["stream"] = True
        if name in ("chat", "completions"):  # so that it goes on as it is
            more["stream_options"] = {"include_usage": True}
    return request("POST", path, orjson.dumps(fields | more), named, version=version)


@pytest.fixture
async def flow(start: Start, tmp_path: Path) -> Flow:
    """A sidecar whose upstreams speak all dialects."""
    return await start(ALL_DIALECTS.replace("URL", f"unix:{tmp_path}/provider.sock"))


async def told_directly(folder: Path, data: bytes) -> Answer:
    """What the provider says when it is asked without a sidecar."""
    reader, writer = await asyncio.open_unix_connection(str(folder / "provider.sock"))
    try:
        return await RawClient(reader, writer).call(data)
    finally:
        writer.close()
        await writer.wait_closed()


def asked(flow: Flow) -> int:
    """How many requests the provider got."""
    return len(flow.provider.books.requests)


# Replay


@pytest.mark.parametrize("split", ["", "7"])
@pytest.mark.parametrize(("name", "stream"), FORMS)
async def test_hit_has_the_very_bytes_that_the_provider_sent(
    flow: Flow, tmp_path: Path, name: str, stream: bool, split: str
) -> None:
    data = ask(name, stream=stream, **({"x_mock_split": split} if split else {}))
    direct = await told_directly(tmp_path, data)
    first, second, third = [await flow.call(data) for _ in range(3)]
    assert [each.header(CACHE) for each in (first, second, third)] == ["miss", "hit", "hit"]
    assert first.is_whole
    assert second.is_whole
    if "qwen" not in name:  # whose answers have an id of their own
        assert first.body == direct.body
    assert first.body == second.body == third.body
    assert len(first.body) == len(direct.body)
    for header in ("content-type", "openai-version", "x-dashscope-call-gateway"):
        assert second.header(header) == direct.header(header)
    assert asked(flow) == 2


@pytest.mark.parametrize("name", STREAMED)
async def test_hit_is_counted_with_the_usage_of_the_recorded_answer(flow: Flow, name: str) -> None:
    for stream in (True, True, False, False):
        await flow.call(ask(name, stream=stream))
    lines = await flow.logged(4)
    usages = {(line["input_tokens"], line["output_tokens"]) for line in lines}
    assert usages == {(2, 13)}
    assert [line.get("cached") for line in lines][1] == "hit"
    assert lines[1]["attempts"] == 0


async def test_each_answer_says_what_the_cache_did(flow: Flow) -> None:
    data = ask("chat")
    said = [(await flow.call(data)).header(CACHE) for _ in range(2)]
    for directive in ("no-store", "no-cache", "max-age=1000"):
        answer = await flow.call(ask("chat", cache_control=directive))
        said.append(answer.header(CACHE))
    other = request("POST", CHAT, orjson.dumps({"model": "gpt", "messages": HELLO}))
    said.append((await flow.call(other)).header(CACHE))
    assert said == ["miss", "hit", "bypass", "miss", "hit", "bypass"]
    assert (await flow.call(request("GET", "/v1/models"))).header(CACHE) is None


async def test_hit_needs_no_upstream(flow: Flow) -> None:
    first = {form: await flow.call(ask(form[0], stream=form[1])) for form in FORMS}
    await flow.provider.stop()
    for form, answer in first.items():
        again = await flow.call(ask(form[0], stream=form[1]))
        assert (again.header(CACHE), again.body) == ("hit", answer.body)
    assert (await flow.call(ask("chat", x_other="1"))).status == 502


# Connections


@pytest.mark.parametrize("stream", [False, True])
async def test_hit_for_an_http_1_0_client_ends_with_the_connection(
    flow: Flow, stream: bool
) -> None:
    first = await flow.call(ask("chat", stream=stream))
    client = await flow.connect()
    answer = await client.call(ask("chat", stream=stream, version="1.0"))
    assert answer.header("transfer-encoding") is None
    assert (answer.header(CACHE), answer.body) == ("hit", first.body)
    assert await client.is_closed()


@pytest.mark.parametrize("stream", [False, True])
async def test_hit_closes_the_connection_of_a_client_that_asks_for_it_and_no_other(
    flow: Flow, stream: bool
) -> None:
    first = await flow.call(ask("messages", stream=stream))
    client = await flow.connect()
    for _ in range(3):
        answer = await client.call(ask("messages", stream=stream))
        assert (answer.header(CACHE), answer.body) == ("hit", first.body)
        assert answer.header("connection") != "close"
    answer = await client.call(ask("messages", stream=stream, connection="close"))
    assert (answer.header(CACHE), answer.body) == ("hit", first.body)
    assert answer.header("connection") == "close"
    assert await client.is_closed()


async def test_head_request_gets_no_recorded_body(flow: Flow) -> None:
    data = ask("chat")
    await flow.call(data)
    client = await flow.connect()
    answer = await client.call(data.replace(b"POST ", b"HEAD ", 1), is_head=True)
    assert (answer.status, answer.body) == (405, b"")
    assert answer.header(CACHE) is None
    assert (await client.call(data)).header(CACHE) == "hit"  # nothing came between


# Identical calls under way


@pytest.mark.parametrize("name", ["chat", "messages"])
@pytest.mark.parametrize("stream", [False, True])
async def test_thousand_identical_calls_make_one_upstream_call_and_a_thousand_answers(
    flow: Flow, tmp_path: Path, name: str, stream: bool
) -> None:
    data = ask(name, stream=stream, x_mock_delay_ms="20")
    clients = await asyncio.gather(*(flow.connect() for _ in range(MANY)))
    for client in clients:
        client.send(data)
    answers = await asyncio.gather(*(client.answer() for client in clients))
    for client in clients:
        client.leave()
    said = Counter(answer.header(CACHE) for answer in answers)
    assert said["miss"] == 1
    assert said["join"] > 0
    assert said["join"] + said["hit"] == MANY - 1
    assert asked(flow) == 1
    direct = await told_directly(tmp_path, data)
    assert {answer.body for answer in answers} == {direct.body}
    assert all(answer.is_whole and answer.status == 200 for answer in answers)
    line = (await flow.logged(MANY))[0]
    book = flow.provider.books.of("gpt" if name == "chat" else "claude")
    assert 2 * line["input_tokens"] == book.told_input_tokens  # one was asked directly


@pytest.mark.parametrize("name", ["chat", "messages"])
async def test_leader_that_leaves_in_mid_stream_does_not_cut_the_others(
    flow: Flow, tmp_path: Path, name: str
) -> None:
    data = ask(name, stream=True, x_mock_delay_ms="30")
    leader = await flow.connect()
    followers = [await flow.connect() for _ in range(20)]
    leader.send(data)
    await leader.until(b"\n\n")
    for client in followers:
        client.send(data)
    heads = [await client.head() for client in followers]
    assert {head.header(CACHE) for head in heads} == {"join"}
    leader.reset()
    bodies = [await client.until(b"0\r\n\r\n") for client in followers]
    direct = await told_directly(tmp_path, data)
    assert all(body.endswith(LAST[name] + b"\r\n0\r\n\r\n") for body in bodies)
    assert {unframed(body) for body in bodies} == {direct.body}
    assert asked(flow) == 2
    lines = await flow.logged(21)
    assert Counter(line.get("cached") for line in lines) == {"join": 20, None: 1}
    assert sum(line["attempts"] for line in lines) == 1
    assert (await flow.call(data)).header(CACHE) == "hit"


def unframed(body: bytes) -> bytes:
    """A chunked body without its framing; no event here has a line of hexadecimal digits."""
    pieces = []
    while body:
        size, _, body = body.partition(b"\r\n")
        pieces.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(pieces)


async def test_upstream_is_let_go_when_the_last_one_leaves(flow: Flow) -> None:
    data = ask("chat", stream=True, x_mock_hang="events:3")
    clients = [await flow.connect() for _ in range(5)]
    for client in clients:
        client.send(data)
    for client in clients:
        await client.head()
    for client in clients[:-1]:
        client.reset()
    await flow.logged(4)
    assert flow.provider.open_requests == 1
    clients[-1].reset()
    await until(lambda: not flow.provider.open_requests)
    (received,) = flow.provider.books.requests
    assert received.client_gone
    lines = await flow.logged(5)
    assert Counter(line.get("cached") for line in lines) == {"join": 4, None: 1}


async def test_follower_that_does_not_read_does_not_hold_the_others_up(flow: Flow) -> None:
    data = ask("chat", stream=True, x_mock_events="3000", x_mock_event_bytes="1000")
    slow = await flow.connect(receive_bytes=4096)
    slow.send(data)
    await slow.head()
    slow.stop_reading()
    fast = await flow.connect()
    answer = await fast.call(data)
    assert answer.is_whole
    assert answer.body.endswith(LAST["chat"])
    assert asked(flow) == 1
    slow.leave()


# SDKs

Said = tuple[str | None, Any]
"""What the cache did, and what an SDK made of the answer."""

FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
CHAT_CALL = {"model": "gpt", "messages": HELLO, "temperature": 0}
MESSAGES_CALL = {
    "model": "claude",
    "max_tokens": 50,
    "messages": HELLO,
    "extra_body": {"temperature": 0},  # the SDK has no parameter for it any more
}
ASKED: dict[str, Mapping[str, Any]] = {
    "chat": CHAT_CALL,
    "chat-tools": CHAT_CALL | {"tools": [{"type": "function", "function": FUNCTION}]},
    "responses": {"model": "gpt", "input": "hello there", "temperature": 0},
    "messages": MESSAGES_CALL,
    "messages-tools": MESSAGES_CALL
    | {"tools": [{"name": "weather", "input_schema": {"type": "object"}}]},
    "messages-cut": MESSAGES_CALL | {"max_tokens": 3},
}
HELPERS_OWN = {"parsed", "parsed_output", "parsed_arguments"}
"""Fields that the SDKs' stream helpers add."""


@dataclass(frozen=True)
class Sdk:
    """One question, asked through an official SDK in every form."""

    create: Callable[..., Awaitable[Any]]
    stream: Callable[..., Any]
    final_name: str
    asked: Mapping[str, Any]
    options: Mapping[str, Any]
    """Of streams."""

    async def whole(self) -> Said:
        raw = await self.create(**self.asked)
        return raw.headers.get(CACHE), plain(await _parsed(raw))

    async def events(self) -> Said:
        raw = await self.create(**self.asked, **self.options, stream=True)
        return raw.headers.get(CACHE), [plain(each) async for each in await _parsed(raw)]

    async def final(self) -> Any:
        """Of a stream, put together by the SDK."""
        async with self.stream(**self.asked, **self.options) as stream:
            return plain(await getattr(stream, self.final_name)())


async def _parsed(raw: Any) -> Any:
    """One SDK parses at once, the other one when awaited."""
    parsed = raw.parse()
    return await parsed if isawaitable(parsed) else parsed


def plain(parsed: Any) -> Any:
    """What an SDK made of an answer, as data, without what its stream helpers add."""
    return _plain(parsed.model_dump(exclude_none=True))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    added = HELPERS_OWN | ({"index"} if "function" in value else set())
    return {key: _plain(each) for key, each in value.items() if key not in added}


@pytest.fixture(params=ASKED)
async def sdk(request: pytest.FixtureRequest, flow: Flow) -> AsyncIterator[Sdk]:
    name = request.param
    asked = ASKED[name]
    async with flow.openai() as one, flow.anthropic() as other:
        chat, responses, messages = one.chat.completions, one.responses, other.messages
        raw: Any
        if name.startswith("chat"):
            usage = {"stream_options": {"include_usage": True}}
            raw = chat.with_raw_response.create
            yield Sdk(raw, chat.stream, "get_final_completion", asked, usage)
        elif name == "responses":
            raw = responses.with_raw_response.create
            yield Sdk(raw, responses.stream, "get_final_response", asked, {})
        else:
            raw = messages.with_raw_response.create
            yield Sdk(raw, messages.stream, "get_final_message", asked, {})


async def test_sdk_makes_the_same_objects_of_a_recorded_whole_answer(flow: Flow, sdk: Sdk) -> None:
    first, second = await sdk.whole(), await sdk.whole()
    assert (first[0], second[0]) == ("miss", "hit")
    assert first[1] == second[1]
    word, events = await sdk.events()
    assert word == "hit"
    assert len(events) > 2
    assert await sdk.final() == first[1]
    assert asked(flow) == 1


async def test_sdk_makes_the_same_objects_of_a_recorded_stream(flow: Flow, sdk: Sdk) -> None:
    first, second = await sdk.events(), await sdk.events()
    assert (first[0], second[0]) == ("miss", "hit")
    assert first[1] == second[1]
    assert await sdk.whole() == ("hit", await sdk.final())
    assert asked(flow) == 1


async def test_embeddings_of_the_sdk_are_hits(flow: Flow) -> None:
    async with flow.openai() as client:
        found = [
            await client.embeddings.create(model="gpt", input=["hello there"]) for _ in range(2)
        ]
    assert found[0] == found[1]
    assert asked(flow) == 1


# What a hit does not take


async def test_hits_count_in_no_budget_of_tokens_or_money(start: Start) -> None:
    flow = await start(
        """
filters:
  token_budget: {tokens_per_minute: 100}
  budget: {tokens_per_day: 100, usd_per_day: 0.1}
  cost: {prices: {gpt: {input: 1000, output: 1000}}}
"""
    )

    def question(number: int) -> bytes:
        body = {"model": "gpt", "messages": HELLO, "temperature": 0, "max_tokens": 50}
        return request("POST", CHAT, orjson.dumps(body), {"x-question": str(number)})

    first = await flow.call(question(1))
    assert Decimal(first.header("x-sidecar-cost") or "0") == Decimal("0.015")
    for _ in range(30):
        answer = await flow.call(question(1))
        assert (answer.status, answer.header(CACHE)) == (200, "hit")
        assert answer.header("x-sidecar-cost") == "0"
        assert answer.body == first.body
    # Each takes 15 tokens, and needs room for more than 50: the fourth has not.
    others = [await flow.call(question(number)) for number in (2, 3, 4)]
    assert [answer.status for answer in others] in ([200, 200, 402], [200, 200, 429])
    assert asked(flow) == 3


# Purging, with several workers


class Crew:
    """Workers behind one port, each with a memory of its own, and connections to them by chance."""

    def __init__(self, client: aiohttp.ClientSession, url: str, upstream: HeldUpstream) -> None:
        self._client = client
        self._url = url
        self._upstream = upstream

    async def until_all_have_asked(self, number: int) -> dict[str, str]:
        """Ask until the upstream was asked `number` times in all; the last answer's headers."""
        for _ in range(400):
            async with self._client.post(
                self._url + CHAT,
                json={"model": "gpt", "temperature": 0, "messages": HELLO},
                headers={"connection": "close"},
            ) as answer:
                assert await answer.read() == HeldUpstream.WHOLE
                if self._upstream.requests == number:
                    return dict(answer.headers)
        raise AssertionError("a worker was never asked")

    async def purge(self, admin_url: str, what: Any) -> list[Any]:
        async with self._client.post(f"{admin_url}/state/cache", json={"purge": what}) as answer:
            assert answer.status == 200, await answer.text()
            told = await answer.json()
            return [each["purged"] for each in told["workers"]]


async def test_purge_reaches_the_memory_of_every_worker(tmp_path: Path) -> None:
    async with HeldUpstream() as upstream:
        upstream.release()
        config = write_config(
            tmp_path, "workers: 2\nlog: {access: 'off'}\n", upstream=upstream.address
        )
        async with serving(config) as sidecar, aiohttp.ClientSession() as client:
            crew = Crew(client, sidecar.url, upstream)
            headers = await crew.until_all_have_asked(2)
            assert headers[CACHE] == "miss"
            for number, (what, purged) in enumerate(
                [
                    ({"model": "other"}, 0),
                    ({"key": "0" * 40}, 0),
                    ({"key": headers[KEY]}, 1),
                    ({"model": "gpt"}, 1),
                    ({"team": "default"}, 1),
                    ("all", 1),
                ]
            ):
                assert await crew.purge(sidecar.admin_url, what) == [purged, purged], what
                if purged:
                    await crew.until_all_have_asked(2 * number)
            async with client.post(f"{sidecar.admin_url}/state/cache", json={"purge": 1}) as answer:
                assert answer.status == 400
