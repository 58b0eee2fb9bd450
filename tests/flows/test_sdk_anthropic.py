"""Anthropic's official SDK as the client: all of it works, every failure is an exception."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import anthropic
import pytest

from tests.support.flow import HELLO, Flow, Start
from tests.support.upstream import RawUpstream

T = TypeVar("T")

TOOL: Any = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = (
    b"event: content_block_start\ndata: "
    b'{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
)


@pytest.fixture
async def client(flow: Flow) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with flow.anthropic() as client:
        yield client


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


async def in_thread(flow: Flow, work: Callable[[anthropic.Anthropic], T]) -> T:
    """What `work` returns with the sync client, which needs a thread beside the loop."""

    def run() -> T:
        with anthropic.Anthropic(api_key="k", base_url=flow.url, max_retries=0) as client:
            return work(client)

    return await asyncio.to_thread(run)


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "claude", "max_tokens": 50, "messages": HELLO, **more}


# What works


async def test_messages_plain_and_streamed_say_the_same(client: anthropic.AsyncAnthropic) -> None:
    plain = await client.messages.create(**asked())
    async with client.messages.stream(**asked()) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert plain.content[0].type == "text"
    assert text == plain.content[0].text
    assert final.usage.output_tokens == plain.usage.output_tokens


async def test_the_sync_client_gets_the_same_as_the_async_one(
    flow: Flow, client: anthropic.AsyncAnthropic
) -> None:
    def talk(sync: anthropic.Anthropic) -> tuple[Any, str]:
        with sync.messages.stream(**asked()) as stream:
            text = "".join(stream.text_stream)
        return sync.messages.create(**asked()), text

    plain, text = await in_thread(flow, talk)
    assert plain == await client.messages.create(**asked())
    assert text == plain.content[0].text


@pytest.mark.parametrize("extra", [{}, {"x-mock-split": "5"}])
async def test_a_tool_call_makes_its_round_trip(
    client: anthropic.AsyncAnthropic, extra: dict[str, str]
) -> None:
    plain = await client.messages.create(**asked(tools=[TOOL]), extra_headers=extra)
    async with client.messages.stream(**asked(tools=[TOOL]), extra_headers=extra) as stream:
        streamed = await stream.get_final_message()
    for message in (plain, streamed):
        assert message.stop_reason == "tool_use"
        block: Any = message.content[0]
        assert (block.type, block.input) == ("tool_use", {"city": "mock"})
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    told = [
        *HELLO,
        {"role": "assistant", "content": [block.to_dict()]},
        {"role": "user", "content": [result]},
    ]
    answer = await client.messages.create(**asked(tools=[TOOL]) | {"messages": told})
    assert answer.content[0].type == "text"


async def test_tokens_are_counted(client: anthropic.AsyncAnthropic) -> None:
    counted = await client.messages.count_tokens(model="claude", messages=HELLO)
    assert counted.input_tokens == 2


async def test_the_list_of_models_is_the_configured_one(client: anthropic.AsyncAnthropic) -> None:
    models = await client.models.list()
    assert sorted(each.id for each in models.data) == ["claude", "gpt"]
    assert (await client.models.retrieve("claude")).id == "claude"


async def test_one_environment_variable_is_all_an_application_needs(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", flow.url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "unused")
    async with anthropic.AsyncAnthropic() as client:
        message = await client.messages.create(**asked())
    assert message.content


# Errors of the provider


@pytest.mark.parametrize(
    ("status", "kind", "word"),
    [
        (400, anthropic.BadRequestError, "invalid_request_error"),
        (401, anthropic.AuthenticationError, "authentication_error"),
        (403, anthropic.PermissionDeniedError, "permission_error"),
        (404, anthropic.NotFoundError, "not_found_error"),
        (429, anthropic.RateLimitError, "rate_limit_error"),
        (500, anthropic.InternalServerError, "api_error"),
        (529, anthropic.InternalServerError, "overloaded_error"),
    ],
)
async def test_an_error_of_the_provider_arrives_as_it_is(
    client: anthropic.AsyncAnthropic,
    status: int,
    kind: type[anthropic.APIStatusError],
    word: str,
) -> None:
    extra = {"x-mock-status": str(status), "x-mock-retry-after": "7"}
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            await client.messages.create(**asked(stream=stream), extra_headers=extra)
        assert caught.value.status_code == status
        assert caught.value.response.headers["retry-after"] == "7"
        body: Any = caught.value.body
        assert body["error"]["type"] == word
        assert body["error"]["message"] in str(caught.value)


async def test_the_sdk_retries_after_the_time_that_the_provider_asked_for(start: Start) -> None:
    flow = await start(script="- {match: {nth: 1}, status: 529, retry_after: 0.7}\n")
    async with anthropic.AsyncAnthropic(api_key="k", base_url=flow.url, max_retries=1) as client:
        assert (await client.messages.create(**asked())).content
    first, second = flow.provider.books.requests
    assert second.arrived_at - first.arrived_at > 0.65  # by itself it waits for 0.5 s at most


async def test_an_error_event_inside_a_200_raises(client: anthropic.AsyncAnthropic) -> None:
    stream = await client.messages.create(
        **asked(stream=True), extra_headers={"x-mock-error-event": "4"}
    )
    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        async for _ in stream:
            pass


# Errors of the sidecar


async def test_an_unknown_model_is_not_found(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        await client.messages.create(**asked() | {"model": "none"})
    body: Any = caught.value.body
    assert body["error"]["type"] == "not_found_error"
    assert body["error"]["code"] == "model_not_found"
    assert caught.value.response.headers["x-sidecar-error"] == "model_not_found"


async def test_an_unknown_key_is_an_authentication_error(start: Start) -> None:
    flow = await start("teams: a.yaml", files={"a.yaml": f"team: a\nkeys: ['sha256:{'0' * 64}']"})
    async with flow.anthropic("wrong") as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await client.messages.create(**asked())
        body: Any = caught.value.body
        assert body["error"]["code"] == "invalid_api_key"
        with pytest.raises(anthropic.AuthenticationError):
            await client.models.list()


async def test_bad_json_is_a_bad_request(flow: Flow, client: anthropic.AsyncAnthropic) -> None:
    answer = await client._client.post(f"{flow.url}/v1/messages", content=b'{"model": "claude",')
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["code"] == "invalid_json"


# Answers that break off


@pytest.mark.parametrize("cut", [b"", EVENT[:30], EVENT[:60], EVENT[:-1]])
async def test_a_stream_that_dies_raises_and_never_ends_quietly(
    start: Start, raw: RawUpstream, cut: bytes
) -> None:
    flow = await start(f"upstreams: {{up-anthropic: {{base_url: '{raw.base_url}'}}}}")

    async def read(client: anthropic.AsyncAnthropic) -> list[str]:
        stream = await client.messages.create(**asked(stream=True))
        return [event.type async for event in stream]

    async with flow.anthropic() as client:
        reading = asyncio.create_task(read(client))
        connection = await raw.accept()
        await connection.read_request()
        connection.write(STREAM_HEAD)
        for data in filter(None, (EVENT, cut)):
            connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        connection.close()
        # Half a JSON text is what the SDK stumbles over, before it sees our error event.
        with pytest.raises((anthropic.APIError, json.JSONDecodeError)):
            await reading


@pytest.mark.parametrize("split", ["1", "7", "1000"])
async def test_a_provider_that_dies_mid_stream_raises_in_both_clients(
    flow: Flow, client: anthropic.AsyncAnthropic, split: str
) -> None:
    extra = {"x-mock-die": "events:5", "x-mock-split": split}

    def read(sync: anthropic.Anthropic) -> None:
        for _ in sync.messages.create(**asked(stream=True), extra_headers=extra):
            pass

    with pytest.raises(anthropic.APIError):
        await in_thread(flow, read)
    stream = await client.messages.create(**asked(stream=True), extra_headers=extra)
    with pytest.raises(anthropic.APIError):
        async for _ in stream:
            pass


async def test_a_plain_answer_that_dies_raises(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.APIConnectionError):
        await client.messages.create(**asked(), extra_headers={"x-mock-die": "events:1"})


async def test_a_provider_that_dies_before_its_answer_raises(
    client: anthropic.AsyncAnthropic,
) -> None:
    with pytest.raises(anthropic.InternalServerError) as caught:
        await client.messages.create(**asked(stream=True), extra_headers={"x-mock-die": "head"})
    assert caught.value.status_code == 502


async def test_a_client_that_breaks_off_a_stream_frees_its_upstream(
    flow: Flow, client: anthropic.AsyncAnthropic
) -> None:
    stream = await client.messages.create(
        **asked(stream=True), extra_headers={"x-mock-hang": "events:3"}
    )
    await anext(aiter(stream))
    await stream.close()
    await flow.provider.wait_for(lambda: flow.provider.open_requests == 0)
    (line,) = await flow.logged()
    assert line["outcome"] == "client_gone"
