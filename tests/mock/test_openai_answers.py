"""The mock provider against OpenAI's official SDK."""

import base64
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from sidecar.mock import MockProvider

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "integer", "minimum": 2},
                "where": {"$ref": "#/$defs/Point"},
                "tags": {"type": "array", "items": {"type": ["string", "null"]}},
                "note": {"anyOf": [{"type": "null"}, {"type": "string"}]},
            },
            "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "number"}}}},
        },
    },
}
ARGUMENTS = {
    "city": "mock",
    "unit": "C",
    "days": 2,
    "where": {"x": 1.5},
    "tags": ["mock"],
    "note": None,
}
HELLO: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]


@pytest.fixture
async def client(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        api_key="k", base_url=f"http://{address}/v1", max_retries=0
    ) as client:
        yield client


async def test_chat_answers_with_usage(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="m", messages=HELLO)
    text = reply.choices[0].message.content
    assert text is not None
    assert '"hello there"' in text
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, len(text.split()))
    assert reply._request_id == "req_000000000000000000000001"


async def test_only_forty_characters_of_the_user_come_back(client: openai.AsyncOpenAI) -> None:
    said: Any = [{"role": "user", "content": [{"type": "text", "text": "0123456789" * 9}]}]
    reply = await client.chat.completions.create(model="m", messages=said)
    assert f'"{"0123456789" * 4}"' in (reply.choices[0].message.content or "")


async def test_streamed_chat_says_the_same_as_the_plain_one(client: openai.AsyncOpenAI) -> None:
    plain = await client.chat.completions.create(model="m", messages=HELLO)
    stream = await client.chat.completions.create(
        model="m", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_usage_event_comes_only_when_asked_for(session: aiohttp.ClientSession) -> None:
    request = {"model": "m", "messages": HELLO, "stream": True}
    async with session.post("/v1/chat/completions", json=request) as reply:
        text = await reply.text()
    assert "usage" not in text
    assert text.endswith("data: [DONE]\n\n")


async def test_limit_on_output_tokens_cuts_the_answer(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="m", messages=HELLO, max_completion_tokens=3)
    assert reply.choices[0].message.content == "The mock provider"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3


async def test_first_tool_is_called_with_arguments_that_fit(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="m", messages=HELLO, tools=[TOOL])
    assert reply.choices[0].finish_reason == "tool_calls"
    calls = reply.choices[0].message.tool_calls or []
    assert [call.type for call in calls] == ["function"]
    assert calls[0].type == "function"
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments) == ARGUMENTS


async def test_tool_call_is_streamed_over_several_chunks(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="m", messages=HELLO, tools=[TOOL]) as stream:
        pieces = [event.arguments_delta async for event in stream if event.type.endswith(".delta")]
        final = await stream.get_final_completion()
    assert len(pieces) > 3
    call = (final.choices[0].message.tool_calls or [])[0]
    assert json.loads(call.function.arguments) == ARGUMENTS


@pytest.mark.parametrize("choice", ["none", {"type": "function", "function": {"name": "other"}}])
async def test_tool_choice_is_obeyed(client: openai.AsyncOpenAI, choice: Any) -> None:
    reply = await client.chat.completions.create(
        model="m", messages=HELLO, tools=[TOOL], tool_choice=choice
    )
    assert reply.choices[0].message.tool_calls is None


async def test_after_a_tools_result_the_answer_is_text(client: openai.AsyncOpenAI) -> None:
    function = {"name": "weather", "arguments": "{}"}
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    reply = await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content


async def test_completions_plain_and_streamed(client: openai.AsyncOpenAI) -> None:
    plain = await client.completions.create(model="m", prompt="one two")
    stream = await client.completions.create(
        model="m", prompt="one two", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == plain.choices[0].text
    assert chunks[-1].usage == plain.usage
    assert plain.usage is not None
    assert plain.usage.prompt_tokens == 2


async def test_embeddings_are_equal_for_equal_text_in_either_encoding(
    client: openai.AsyncOpenAI, session: aiohttp.ClientSession
) -> None:
    through_sdk = await client.embeddings.create(model="e", input=["a b", "c", "a b"])
    request = {"model": "e", "input": ["a b"], "dimensions": 3}
    async with session.post("/v1/embeddings", json=request) as reply:
        short = (await reply.json())["data"][0]["embedding"]
    request["encoding_format"] = "base64"
    async with session.post("/v1/embeddings", json=request) as reply:
        packed = (await reply.json())["data"][0]["embedding"]
    first, second, third = (item.embedding for item in through_sdk.data)
    assert first == third != second
    assert sum(value * value for value in first) == pytest.approx(1)
    assert list(struct.unpack("<3f", base64.b64decode(packed))) == pytest.approx(short)
    assert through_sdk.usage.prompt_tokens == 5


@pytest.mark.parametrize(("given", "tokens", "count"), [([1, 2, 3], 3, 1), ([[1, 2], [3]], 3, 2)])
async def test_embeddings_take_tokens(
    client: openai.AsyncOpenAI, given: Any, tokens: int, count: int
) -> None:
    reply = await client.embeddings.create(model="e", input=given)
    assert (reply.usage.prompt_tokens, len(reply.data)) == (tokens, count)


async def test_responses_plain(client: openai.AsyncOpenAI) -> None:
    reply = await client.responses.create(model="m", input="hello there", instructions="be kind")
    assert '"hello there"' in reply.output_text
    assert reply.status == "completed"
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (
        4,
        len(reply.output_text.split()),
    )


async def test_responses_stream_has_the_events_in_order(client: openai.AsyncOpenAI) -> None:
    said: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    stream = await client.responses.create(
        model="m", input=said, stream=True, extra_headers={"x-mock-events": "2"}
    )
    events = [event async for event in stream]
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "The mock"
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 2


async def test_responses_stream_that_is_cut_by_its_limit_ends_incomplete(
    client: openai.AsyncOpenAI,
) -> None:
    stream = await client.responses.create(model="m", input="x", max_output_tokens=2, stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert "mock" in [model.id for model in (await client.models.list()).data]


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, openai.AuthenticationError, "invalid_api_key"),
        (404, openai.NotFoundError, "model_not_found"),
        (418, openai.APIStatusError, None),
        (429, openai.RateLimitError, "rate_limit_exceeded"),
        (503, openai.InternalServerError, None),
    ],
)
async def test_statuses_become_the_sdks_errors(
    client: openai.AsyncOpenAI, status: int, kind: type[openai.APIStatusError], code: str | None
) -> None:
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(
            model="m", messages=HELLO, extra_headers={"x-mock-status": str(status)}
        )
    assert (caught.value.status_code, caught.value.code) == (status, code)


async def test_error_code_type_and_retry_after_can_be_chosen(client: openai.AsyncOpenAI) -> None:
    headers = {
        "x-mock-status": "429",
        "x-mock-error-type": "insufficient_quota",
        "x-mock-error-code": "credit_balance_exhausted",
        "x-mock-retry-after": "2",
    }
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model="m", messages=HELLO, extra_headers=headers)
    assert (caught.value.type, caught.value.code) == (
        "insufficient_quota",
        "credit_balance_exhausted",
    )
    assert caught.value.response.headers["retry-after"] == "2"


async def test_error_event_in_a_stream_raises_in_the_sdk(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="m", messages=HELLO, stream=True, extra_headers={"x-mock-error-event": "2"}
    )
    seen: list[Any] = []
    with pytest.raises(openai.APIError, match="The server had an error"):
        seen.extend([seen.append(chunk) async for chunk in stream])
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", b"{", None),
        ("/v1/chat/completions", b"[]", None),
        ("/v1/chat/completions", b"", None),
        ("/v1/chat/completions", b'{"messages":[{"role":"user"}]}', "model"),
        ("/v1/chat/completions", b'{"model":"m"}', "messages"),
        ("/v1/chat/completions", b'{"model":"m","messages":[]}', "messages"),
        ("/v1/chat/completions", b'{"model":"m","messages":[1]}', "messages"),
        ("/v1/completions", b'{"model":"m"}', "prompt"),
        ("/v1/embeddings", b'{"model":"m","input":[]}', "input"),
        ("/v1/embeddings", b'{"model":"m","input":"a","dimensions":99999}', "dimensions"),
        ("/v1/responses", b'{"model":"m"}', "input"),
    ],
)
async def test_wrong_request_gets_400_naming_the_parameter(
    session: aiohttp.ClientSession, path: str, body: bytes, param: str | None
) -> None:
    async with session.post(path, data=body) as reply:
        error = (await reply.json())["error"]
    assert reply.status == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_usage_wrong_and_none(client: openai.AsyncOpenAI, provider: MockProvider) -> None:
    wrong = await client.chat.completions.create(
        model="m", messages=HELLO, extra_headers={"x-mock-usage": "wrong"}
    )
    none = await client.responses.create(
        model="m", input="x", extra_headers={"x-mock-usage": "none"}
    )
    assert wrong.usage is not None
    assert wrong.usage.prompt_tokens == 47
    assert none.usage is None
    assert provider.books.of("m").input_tokens == 5


async def test_model_names_do_not_disturb_the_events(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model='m"\0', messages=HELLO, stream=True, extra_headers={"x-mock-text": "a%0Ab"}
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {'m"\0'}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a\nb"
