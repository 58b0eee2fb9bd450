"""OpenAI's official SDK as the client: all of it works, every failure is an exception."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import openai
import pytest

from tests.support.flow import HELLO, Flow, Start
from tests.support.upstream import RawUpstream

T = TypeVar("T")

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = (
    b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"gpt",'
    b'"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n'
)


@pytest.fixture
async def client(flow: Flow) -> AsyncIterator[openai.AsyncOpenAI]:
    async with flow.openai() as client:
        yield client


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


async def in_thread(flow: Flow, work: Callable[[openai.OpenAI], T]) -> T:
    """What `work` returns with the sync client, which needs a thread beside the loop."""

    def run() -> T:
        with openai.OpenAI(api_key="k", base_url=f"{flow.url}/v1", max_retries=0) as client:
            return work(client)

    return await asyncio.to_thread(run)


# What works


async def test_chat_plain_and_streamed_say_the_same(client: openai.AsyncOpenAI) -> None:
    plain = await client.chat.completions.create(model="gpt", messages=HELLO)
    stream = await client.chat.completions.create(
        model="gpt", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage


async def test_the_sync_client_gets_the_same_as_the_async_one(
    flow: Flow, client: openai.AsyncOpenAI
) -> None:
    def talk(sync: openai.OpenAI) -> tuple[Any, str]:
        plain = sync.chat.completions.create(model="gpt", messages=HELLO)
        stream = sync.chat.completions.create(model="gpt", messages=HELLO, stream=True)
        pieces = [each.choices[0].delta.content or "" for each in stream]
        return plain, "".join(pieces)

    plain, text = await in_thread(flow, talk)
    expected = await client.chat.completions.create(model="gpt", messages=HELLO)
    assert plain == expected
    assert text == expected.choices[0].message.content


async def test_a_tool_call_makes_its_round_trip(client: openai.AsyncOpenAI) -> None:
    asked = await client.chat.completions.create(model="gpt", messages=HELLO, tools=[TOOL])
    message = asked.choices[0].message
    (call,) = message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"city": "mock"}
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    told: Any = [*HELLO, message.to_dict(), result]
    answer = await client.chat.completions.create(model="gpt", messages=told, tools=[TOOL])
    assert answer.choices[0].message.content


@pytest.mark.parametrize("split", ["", "5"])
async def test_a_streamed_tool_call_arrives_piece_by_piece(
    client: openai.AsyncOpenAI, split: str
) -> None:
    extra = {"x-mock-split": split} if split else {}
    async with client.chat.completions.stream(
        model="gpt", messages=HELLO, tools=[TOOL], extra_headers=extra
    ) as stream:
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "mock"}


async def test_embeddings_completions_and_responses_work(client: openai.AsyncOpenAI) -> None:
    vectors = await client.embeddings.create(model="gpt", input=["a", "b"])
    assert [each.index for each in vectors.data] == [0, 1]
    assert isinstance(vectors.data[0].embedding[0], float)
    old = await client.completions.create(model="gpt", prompt="hello")
    assert old.choices[0].text
    pieces = await client.completions.create(model="gpt", prompt="hello", stream=True)
    assert "".join([each.choices[0].text async for each in pieces]) == old.choices[0].text
    plain = await client.responses.create(model="gpt", input="hello")
    stream = await client.responses.create(model="gpt", input="hello", stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == plain.output_text


async def test_the_list_of_models_is_the_configured_one(client: openai.AsyncOpenAI) -> None:
    models = await client.models.list()
    assert sorted(each.id for each in models.data) == ["claude", "gpt"]
    assert (await client.models.retrieve("gpt")).id == "gpt"


async def test_an_upload_of_the_sdk_passes_through(flow: Flow) -> None:
    data = bytes(range(256)) * 4000
    async with openai.AsyncOpenAI(
        api_key="k", base_url=f"{flow.url}/up-openai", max_retries=0
    ) as client:
        got: Any = await client.files.with_raw_response.create(
            file=("a.bin", data), purpose="assistants"
        )
    told = json.loads(got.content)
    assert (told["method"], told["path"]) == ("POST", "/v1/files")
    assert told["body_bytes"] > len(data)


async def test_one_environment_variable_is_all_an_application_needs(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{flow.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    async with openai.AsyncOpenAI() as client:
        reply = await client.chat.completions.create(model="gpt", messages=HELLO)
    assert reply.choices[0].message.content


async def test_the_request_id_of_an_answer_is_the_one_in_our_log(
    flow: Flow, client: openai.AsyncOpenAI
) -> None:
    reply = await client.chat.completions.create(model="gpt", messages=HELLO)
    (line,) = await flow.logged()
    assert reply._request_id == line["id"]


# Errors of the provider


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (529, openai.InternalServerError),
    ],
)
async def test_an_error_of_the_provider_arrives_as_it_is(
    flow: Flow, client: openai.AsyncOpenAI, status: int, kind: type[openai.APIStatusError]
) -> None:
    extra = {
        "x-mock-status": str(status),
        "x-mock-error-code": "code_of_theirs",
        "x-mock-retry-after": "7",
    }
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(
                model="gpt", messages=HELLO, stream=stream, extra_headers=extra
            )
        assert caught.value.status_code == status
        assert caught.value.code == "code_of_theirs"
        assert caught.value.response.headers["retry-after"] == "7"
        assert "x-sidecar-error" not in caught.value.response.headers
        body: Any = caught.value.body
        assert body["message"] in str(caught.value)


async def test_the_sdk_retries_after_the_time_that_the_provider_asked_for(start: Start) -> None:
    flow = await start(script="- {match: {nth: 1}, status: 429, retry_after: 0.7}\n")
    async with openai.AsyncOpenAI(api_key="k", base_url=f"{flow.url}/v1", max_retries=1) as client:
        reply = await client.chat.completions.create(model="gpt", messages=HELLO)
    assert reply.choices[0].message.content
    first, second = flow.provider.books.requests
    assert first.status == 429
    assert second.arrived_at - first.arrived_at > 0.65  # by itself it waits for 0.5 s at most


async def test_an_error_event_inside_a_200_raises(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="gpt", messages=HELLO, stream=True, extra_headers={"x-mock-error-event": "3"}
    )
    with pytest.raises(openai.APIError, match="server had an error"):
        async for _ in stream:
            pass


# Errors of the sidecar


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="none", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.response.headers["x-sidecar-error"] == "model_not_found"
    assert "none" in caught.value.message


async def test_an_unknown_key_is_an_authentication_error(start: Start) -> None:
    flow = await start("teams: a.yaml", files={"a.yaml": f"team: a\nkeys: ['sha256:{'0' * 64}']"})
    async with flow.openai("wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model="gpt", messages=HELLO)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_bad_json_and_a_missing_model_are_bad_requests(
    flow: Flow, client: openai.AsyncOpenAI
) -> None:
    broken = b'{"model": "gpt",'
    answer = await client._client.post(f"{flow.url}/v1/chat/completions", content=broken)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="", messages=HELLO)
    assert caught.value.code == "model_required"


async def test_an_upstream_that_cannot_be_reached_is_an_internal_server_error(
    start: Start,
) -> None:
    flow = await start("upstreams: {up-openai: {base_url: 'unix:/nowhere.sock:/v1'}}")
    async with flow.openai() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="gpt", messages=HELLO)
    assert caught.value.status_code == 502
    assert caught.value.code == "upstream_unreachable"
    assert "nowhere" not in str(caught.value)


# Answers that break off


async def broken_stream(client: openai.AsyncOpenAI) -> list[str]:
    stream = await client.chat.completions.create(model="gpt", messages=HELLO, stream=True)
    return [each.choices[0].delta.content or "" async for each in stream]


@pytest.mark.parametrize("cut", [b"", EVENT[:30], EVENT[:-1], EVENT[:-2]])
async def test_a_stream_that_dies_raises_and_never_ends_quietly(
    start: Start, raw: RawUpstream, cut: bytes
) -> None:
    flow = await start(f"upstreams: {{up-openai: {{base_url: '{raw.base_url}/v1'}}}}")
    async with flow.openai() as client:
        reading = asyncio.create_task(broken_stream(client))
        connection = await raw.accept()
        await connection.read_request()
        for data in filter(None, (EVENT, cut)):
            connection.write(
                (STREAM_HEAD if data is EVENT else b"") + b"%x\r\n%b\r\n" % (len(data), data)
            )
        connection.close()
        # Half a JSON text is what the SDK stumbles over, before it sees our error event.
        with pytest.raises((openai.APIError, json.JSONDecodeError), match=r"upstream broke|line 1"):
            await reading


@pytest.mark.parametrize("split", ["1", "7", "1000"])
@pytest.mark.parametrize("events", ["events:1", "events:5"])
async def test_a_provider_that_dies_mid_stream_raises_in_both_clients(
    flow: Flow, client: openai.AsyncOpenAI, split: str, events: str
) -> None:
    extra = {"x-mock-die": events, "x-mock-split": split}

    def read(sync: openai.OpenAI) -> None:
        for _ in sync.chat.completions.create(
            model="gpt", messages=HELLO, stream=True, extra_headers=extra
        ):
            pass

    with pytest.raises(openai.APIError):
        await in_thread(flow, read)
    stream = await client.chat.completions.create(
        model="gpt", messages=HELLO, stream=True, extra_headers=extra
    )
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass


async def test_responses_that_die_raise(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(
        model="gpt", input="hello", stream=True, extra_headers={"x-mock-die": "events:5"}
    )
    seen = []

    async def read() -> None:
        async for event in stream:
            seen.append(event.type)

    with pytest.raises(openai.APIError):
        await read()
    assert "response.completed" not in seen


async def test_a_plain_answer_that_dies_raises(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIConnectionError):
        await client.chat.completions.create(
            model="gpt", messages=HELLO, extra_headers={"x-mock-die": "events:1"}
        )


async def test_a_provider_that_dies_before_its_answer_raises(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(
            model="gpt", messages=HELLO, stream=True, extra_headers={"x-mock-die": "head"}
        )
    assert caught.value.code == "upstream_closed"


async def test_a_client_that_breaks_off_a_stream_frees_its_upstream(
    flow: Flow, client: openai.AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(
        model="gpt", messages=HELLO, stream=True, extra_headers={"x-mock-hang": "events:3"}
    )
    await anext(aiter(stream))
    await stream.close()
    await flow.provider.wait_for(lambda: flow.provider.open_requests == 0)
    (line,) = await flow.logged()
    assert line["outcome"] == "client_gone"


async def test_a_timeout_of_the_sdk_frees_its_upstream(flow: Flow) -> None:
    """Of an SDK that does not tell of it: else the sidecar may be the first to say so."""
    headers = {"x-mock-hang": "head", "x-stainless-read-timeout": "60"}
    async with flow.openai() as client:
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.05).chat.completions.create(
                model="gpt", messages=HELLO, extra_headers=headers
            )
        await flow.provider.wait_for(lambda: flow.provider.open_requests == 0)
