"""The mock provider as DashScope: bodies, frames, sums and errors as its API reference has them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import aiohttp
import orjson
import pytest

from sidecar.mock import MockProvider, Settings
from sidecar.mock.dashscope import (
    EMBEDDING_PATH,
    MULTIMODAL_PATH,
    TEXT_PATH,
    answer,
    asks_stream,
)

SAID = {"messages": [{"role": "user", "content": "hello there"}]}
SSE = {"X-DashScope-SSE": "enable"}
WORDS = 13  # of the default answer


def body(given: Any = SAID, model: str = "qwen-max", **parameters: Any) -> dict[str, Any]:
    return {"model": model, "input": given, "parameters": parameters}


def frames_of(stream: bytes) -> list[Any]:
    """The frames' data; each must have its number, its name and its status."""
    found = []
    for number, frame in enumerate(stream.decode().split("\n\n")[:-1], 1):
        head = f"id:{number}\nevent:result\n:HTTP_STATUS/200\ndata:"
        assert frame.startswith(head)
        found.append(orjson.loads(frame.removeprefix(head)))
    return found


async def post(
    session: aiohttp.ClientSession, path: str, data: Any, headers: dict[str, str] | None = None
) -> tuple[aiohttp.ClientResponse, bytes]:
    async with session.post(path, json=data, headers=headers) as reply:
        return reply, await reply.read()


@pytest.mark.parametrize("given", [SAID, {"prompt": "hello there"}])
async def test_plain_answer_has_text_and_usage(session: aiohttp.ClientSession, given: Any) -> None:
    reply, data = await post(session, TEXT_PATH, body(given))
    found = orjson.loads(data)
    assert reply.status == 200
    assert reply.content_type == "application/json"
    assert '"hello there"' in found["output"]["text"]
    assert found["output"]["finish_reason"] == "stop"
    assert found["usage"]["input_tokens"] == 2
    assert found["usage"]["output_tokens"] == len(found["output"]["text"].split()) == WORDS
    assert found["usage"]["total_tokens"] == 2 + WORDS
    assert found["request_id"]


async def test_stream_repeats_the_text_so_far_unless_increments_are_asked_for(
    session: aiohttp.ClientSession,
) -> None:
    _, plain = await post(session, TEXT_PATH, body())
    text = orjson.loads(plain)["output"]["text"]
    reply, stream = await post(session, TEXT_PATH, body(), SSE)
    assert reply.content_type == "text/event-stream"
    frames = frames_of(stream)
    texts = [frame["output"]["text"] for frame in frames]
    assert texts[-1] == text
    assert all(late.startswith(early) for early, late in pairwise(texts))
    _, stream = await post(session, TEXT_PATH, body(incremental_output=True), SSE)
    pieces = frames_of(stream)
    assert "".join(frame["output"]["text"] for frame in pieces) == text
    for each in (frames, pieces):
        reasons = [frame["output"]["finish_reason"] for frame in each]
        assert reasons == ["null"] * WORDS + ["stop"]
        sums = [frame["usage"]["output_tokens"] for frame in each]
        assert sums == [*range(1, WORDS + 1), WORDS]


async def test_message_format_and_multimodal_answers_have_choices(
    session: aiohttp.ClientSession,
) -> None:
    asked = body(result_format="message", incremental_output=True)
    _, stream = await post(session, TEXT_PATH, asked, SSE)
    choices = [frame["output"]["choices"][0] for frame in frames_of(stream)]
    assert {choice["message"]["role"] for choice in choices} == {"assistant"}
    text = "".join(choice["message"]["content"] for choice in choices)
    parts = [{"image": "https://example.com/a.png"}, {"text": "hello there"}]
    given = {"messages": [{"role": "user", "content": parts}]}
    _, data = await post(session, MULTIMODAL_PATH, body(given, model="qwen-vl-max"))
    found = orjson.loads(data)
    (choice,) = found["output"]["choices"]
    assert choice["message"]["content"] == [{"text": text}]
    assert found["usage"]["input_tokens"] == 2


async def test_limit_cuts_the_answer(session: aiohttp.ClientSession) -> None:
    _, data = await post(session, TEXT_PATH, body(max_tokens=3))
    found = orjson.loads(data)
    assert found["output"]["finish_reason"] == "length"
    assert found["usage"]["output_tokens"] == 3


async def test_embeddings_tell_a_total_alone(session: aiohttp.ClientSession) -> None:
    asked = body({"texts": ["one two", "three"]}, model="text-embedding-v4", dimension=16)
    _, data = await post(session, EMBEDDING_PATH, asked)
    found = orjson.loads(data)
    assert found["usage"] == {"total_tokens": 3}
    embeddings = found["output"]["embeddings"]
    assert [each["text_index"] for each in embeddings] == [0, 1]
    for each in embeddings:
        assert len(each["embedding"]) == 16
        assert sum(value * value for value in each["embedding"]) == pytest.approx(1)


@pytest.mark.parametrize("path", [TEXT_PATH, MULTIMODAL_PATH])
@pytest.mark.parametrize("headers", [{}, SSE])
async def test_equal_requests_get_equal_bytes(
    session: aiohttp.ClientSession, path: str, headers: dict[str, str]
) -> None:
    first, second = [await post(session, path, body(), headers) for _ in range(2)]
    assert first[1] == second[1]
    assert first[0].headers["x-request-id"] != second[0].headers["x-request-id"]


@pytest.mark.parametrize(
    ("header", "accept", "is_stream"),
    [
        ("enable", "", True),
        ("", "text/event-stream", True),
        ("disable", "*/*", False),
        ("", "", False),
    ],
)
def test_headers_ask_for_a_stream(header: str, accept: str, is_stream: bool) -> None:
    assert asks_stream(header, accept) is is_stream


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "InvalidParameter"),
        (401, "InvalidApiKey"),
        (429, "Throttling.RateQuota"),
        (500, "InternalError"),
        (502, "InternalError"),
        (503, "ServiceUnavailable"),
    ],
)
async def test_errors_have_the_real_envelope(
    session: aiohttp.ClientSession, provider: MockProvider, status: int, code: str
) -> None:
    reply, data = await post(session, TEXT_PATH, body(), {"x-mock-status": str(status), **SSE})
    error = orjson.loads(data)
    assert reply.status == status
    assert error["code"] == code
    assert error["request_id"] == reply.headers["x-request-id"]
    assert provider.books.of("qwen-max").failed_calls == 1


async def test_error_code_is_the_one_asked_for(session: aiohttp.ClientSession) -> None:
    headers = {"x-mock-status": "400", "x-mock-error-code": "Arrearage"}
    _, data = await post(session, TEXT_PATH, body(), headers)
    assert orjson.loads(data)["code"] == "Arrearage"


async def test_error_event_ends_the_stream(
    session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    _, stream = await post(session, TEXT_PATH, body(), {**SSE, "x-mock-error-event": "2"})
    *frames, last, rest = stream.decode().split("\n\n")
    assert len(frames) == 2
    assert last.startswith("event:error\n:HTTP_STATUS/500\ndata:{")
    assert rest == ""
    book = provider.books.of("qwen-max")
    assert (book.failed_calls, book.output_tokens, book.told_output_tokens) == (1, 2, 2)


@pytest.mark.parametrize(
    ("path", "data"),
    [
        (TEXT_PATH, {"input": SAID}),
        (TEXT_PATH, {"model": "m"}),
        (TEXT_PATH, {"model": "m", "input": {}}),
        (MULTIMODAL_PATH, {"model": "m", "input": {"prompt": "hi"}}),
        (EMBEDDING_PATH, {"model": "m", "input": {"texts": []}}),
        (EMBEDDING_PATH, body({"texts": "a"}, dimension=100_000)),
        (TEXT_PATH, []),
    ],
)
async def test_wrong_request_gets_400(session: aiohttp.ClientSession, path: str, data: Any) -> None:
    reply, found = await post(session, path, data)
    assert reply.status == 400
    assert orjson.loads(found)["code"] == "InvalidParameter"


async def test_usage_wrong_and_none(session: aiohttp.ClientSession) -> None:
    _, stream = await post(session, TEXT_PATH, body(), {**SSE, "x-mock-usage": "wrong"})
    last = frames_of(stream)[-1]["usage"]
    assert (last["input_tokens"], last["output_tokens"]) == (27, WORDS * 10 + 7)
    _, stream = await post(session, TEXT_PATH, body(), {**SSE, "x-mock-usage": "none"})
    assert b'"usage"' not in stream
    for usage in ("none", "wrong"):
        asked = body({"texts": ["a"]}, model="e")
        _, data = await post(session, EMBEDDING_PATH, asked, {"x-mock-usage": usage})
        expected = None if usage == "none" else {"total_tokens": 17}
        assert orjson.loads(data).get("usage") == expected


async def test_books_know_what_a_cut_stream_had_told(
    session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    with pytest.raises(aiohttp.ClientPayloadError):
        await post(session, TEXT_PATH, body(), {**SSE, "x-mock-die": "events:4"})
    book = provider.books.of("qwen-max")
    assert (book.aborted_streams, book.input_tokens, book.output_tokens) == (1, 2, 4)
    assert (book.told_input_tokens, book.told_output_tokens) == (2, 4)


def test_stream_that_would_fill_the_memory_is_refused() -> None:
    asked = orjson.dumps(body())
    refused = answer(TEXT_PATH, asked, Settings(events=1_000_000), is_stream=True)
    assert refused.status == 400
    made = answer(TEXT_PATH, asked, Settings(events=1_000_000), is_stream=False)
    assert made.status == 200


async def test_text_and_number_of_events_are_settable(session: aiohttp.ClientSession) -> None:
    headers = {"x-mock-text": "Good%20day", "x-mock-events": "2"}
    _, data = await post(session, TEXT_PATH, body(), headers)
    assert orjson.loads(data)["output"]["text"] == "Good day"
