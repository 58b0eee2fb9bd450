"""The mock provider against Anthropic's official SDK."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anthropic
import pytest

from sidecar.mock import MockProvider

HELLO: Any = [{"role": "user", "content": "hello there"}]
TOOL: Any = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}


@pytest.fixture
async def client(address: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        api_key="k", base_url=f"http://{address}", max_retries=0
    ) as client:
        yield client


async def test_message_has_text_and_usage(client: anthropic.AsyncAnthropic) -> None:
    reply = await client.messages.create(model="c", max_tokens=99, messages=HELLO, system="be kind")
    block = reply.content[0]
    assert block.type == "text"
    assert '"hello there"' in block.text
    assert reply.stop_reason == "end_turn"
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (4, len(block.text.split()))
    assert reply._request_id == "req_000000000000000000000001"


async def test_stream_says_the_same_as_the_plain_message(client: anthropic.AsyncAnthropic) -> None:
    plain = await client.messages.create(model="c", max_tokens=99, messages=HELLO)
    async with client.messages.stream(model="c", max_tokens=99, messages=HELLO) as stream:
        final = await stream.get_final_message()
    block, plain_block = final.content[0], plain.content[0]
    assert block.type == plain_block.type == "text"
    assert block.text == plain_block.text
    assert final.usage.output_tokens == plain.usage.output_tokens
    assert final.stop_reason == "end_turn"


async def test_stream_has_the_events_in_order(session: aiohttp.ClientSession) -> None:
    request = {"model": "c", "max_tokens": 2, "messages": HELLO, "stream": True}
    async with session.post("/v1/messages", json=request) as reply:
        lines = (await reply.text()).splitlines()
    assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert '"stop_reason":"max_tokens"' in lines[-5]


async def test_tool_is_called_plain_and_streamed(client: anthropic.AsyncAnthropic) -> None:
    plain = await client.messages.create(model="c", max_tokens=9, messages=HELLO, tools=[TOOL])
    async with client.messages.stream(
        model="c", max_tokens=9, messages=HELLO, tools=[TOOL]
    ) as stream:
        streamed = await stream.get_final_message()
    for reply in (plain, streamed):
        block = reply.content[0]
        assert block.type == "tool_use"
        assert (block.name, block.input) == ("weather", {"city": "mock", "days": 1})
        assert reply.stop_reason == "tool_use"
    assert streamed.usage.output_tokens == plain.usage.output_tokens > 1


@pytest.mark.parametrize(
    ("messages", "choice"),
    [
        (HELLO, {"type": "none"}),
        (HELLO, {"type": "tool", "name": "other"}),
        (
            [
                *HELLO,
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "1", "content": "sunny"}],
                },
            ],
            {"type": "auto"},
        ),
    ],
)
async def test_answer_is_text_when_no_tool_is_to_be_called(
    client: anthropic.AsyncAnthropic, messages: Any, choice: Any
) -> None:
    reply = await client.messages.create(
        model="c", max_tokens=99, messages=messages, tools=[TOOL], tool_choice=choice
    )
    assert reply.content[0].type == "text"


async def test_tokens_are_counted(client: anthropic.AsyncAnthropic, provider: MockProvider) -> None:
    counted = await client.messages.count_tokens(model="c", messages=HELLO, system="be kind")
    assert counted.input_tokens == 4
    assert provider.books.of("c").input_tokens == 0


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, "rate_limit_error"),
        (500, "api_error"),
        (529, "overloaded_error"),
        (422, "invalid_request_error"),
        (502, "api_error"),
    ],
)
async def test_errors_have_the_real_envelope(
    client: anthropic.AsyncAnthropic, status: int, kind: str
) -> None:
    headers = {"x-mock-status": str(status), "x-mock-error-code": "ramp_limit_exceeded"}
    with pytest.raises(anthropic.APIStatusError) as caught:
        await client.messages.create(model="c", max_tokens=9, messages=HELLO, extra_headers=headers)
    body: Any = caught.value.body
    assert caught.value.status_code == status
    assert body["type"] == "error"
    assert body["error"]["type"] == kind
    assert body["error"]["details"] == {"error_code": "ramp_limit_exceeded"}
    assert body["request_id"] == caught.value.response.headers["request-id"]


async def test_error_event_in_a_stream_raises_in_the_sdk(client: anthropic.AsyncAnthropic) -> None:
    stream = await client.messages.create(
        model="c",
        max_tokens=99,
        messages=HELLO,
        stream=True,
        extra_headers={"x-mock-error-event": "4"},
    )
    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("extra", [{"x-mock-split": "7"}, {"x-mock-encoding": "gzip"}])
async def test_error_body_has_the_request_id_however_it_is_sent(
    session: aiohttp.ClientSession, extra: dict[str, str]
) -> None:
    headers = {"x-mock-status": "529", **extra}
    async with session.post("/v1/messages", data=b"{}", headers=headers) as reply:
        assert (await reply.json())["request_id"] == reply.headers["request-id"]


@pytest.mark.parametrize(
    "body", [b"{", b'{"model":"c"}', b'{"messages":[{"role":"user","content":"x"}]}']
)
async def test_wrong_request_gets_400(session: aiohttp.ClientSession, body: bytes) -> None:
    async with session.post("/v1/messages", data=body) as reply:
        answer = await reply.json()
    assert reply.status == 400
    assert answer["error"]["type"] == "invalid_request_error"


async def test_usage_wrong_and_none(client: anthropic.AsyncAnthropic) -> None:
    wrong = await client.messages.create(
        model="c", max_tokens=9, messages=HELLO, extra_headers={"x-mock-usage": "wrong"}
    )
    none = await client.messages.create(
        model="c", max_tokens=9, messages=HELLO, extra_headers={"x-mock-usage": "none"}
    )
    assert wrong.usage.input_tokens == 27
    assert "usage" not in none.to_dict()
