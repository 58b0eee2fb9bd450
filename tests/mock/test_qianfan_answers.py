"""The mock provider as Qianfan v1: models in paths, sums in frames, errors with status 200."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson
import pytest

from sidecar.mock import MockProvider, Script, Settings
from sidecar.mock.qianfan import PREFIX, answer, has_path

CHAT = f"{PREFIX}chat/completions_pro"
COMPLETIONS = f"{PREFIX}completions/sqlcoder_7b"
EMBEDDINGS = f"{PREFIX}embeddings/embedding-v1"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello there"}]}
STREAM = HELLO | {"stream": True}
WORDS = 13  # of the default answer


async def post(
    session: aiohttp.ClientSession, path: str, data: Any, headers: dict[str, str] | None = None
) -> tuple[aiohttp.ClientResponse, bytes]:
    async with session.post(path, json=data, headers=headers) as reply:
        return reply, await reply.read()


def frames_of(stream: bytes) -> list[Any]:
    frames = stream.decode().split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: {") for frame in frames)
    return [orjson.loads(frame.removeprefix("data: ")) for frame in frames]


async def test_plain_answer_has_result_and_usage(
    session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    reply, data = await post(session, CHAT, HELLO | {"system": "be kind"})
    found = orjson.loads(data)
    assert reply.content_type == "application/json"
    assert found["object"] == "chat.completion"
    assert '"hello there"' in found["result"]
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 13, "total_tokens": 17}
    assert provider.books.of("completions_pro").output_tokens == WORDS


async def test_stream_says_the_same_and_ends_without_a_mark(
    session: aiohttp.ClientSession,
) -> None:
    _, plain = await post(session, CHAT, HELLO)
    reply, stream = await post(session, CHAT, STREAM)
    frames = frames_of(stream)
    assert reply.content_type == "text/event-stream"
    assert "".join(frame["result"] for frame in frames) == orjson.loads(plain)["result"]
    assert [frame["is_end"] for frame in frames] == [False] * WORDS + [True]
    assert [frame["sentence_id"] for frame in frames] == list(range(WORDS + 1))
    sums = [frame["usage"]["completion_tokens"] for frame in frames]
    assert sums == [*range(1, WORDS + 1), WORDS]


async def test_limit_cuts_the_answer(session: aiohttp.ClientSession) -> None:
    asked = {"prompt": "hello there", "max_output_tokens": 2}
    _, data = await post(session, COMPLETIONS, asked)
    found = orjson.loads(data)
    assert (found["object"], found["is_truncated"]) == ("completion", True)
    assert found["usage"]["completion_tokens"] == 2
    _, stream = await post(session, COMPLETIONS, asked | {"stream": True})
    assert [frame["is_truncated"] for frame in frames_of(stream)] == [False, False, True]


async def test_embeddings(session: aiohttp.ClientSession) -> None:
    _, data = await post(session, EMBEDDINGS, {"input": ["one two", "three"]})
    found = orjson.loads(data)
    assert [each["index"] for each in found["data"]] == [0, 1]
    assert found["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


@pytest.mark.parametrize("data", [HELLO, STREAM])
async def test_equal_requests_get_equal_bytes_of_one_model(
    session: aiohttp.ClientSession, data: Any
) -> None:
    first, second = [await post(session, CHAT, data) for _ in range(2)]
    _, other = await post(session, f"{PREFIX}chat/eb-instant", data)
    assert first[1] == second[1] != other


@pytest.mark.parametrize(
    ("status", "code"), [(400, 336003), (401, 110), (429, 18), (500, 336000), (503, 336100)]
)
@pytest.mark.parametrize("data", [HELLO, STREAM])
async def test_error_comes_with_status_200_as_plain_json(
    session: aiohttp.ClientSession, provider: MockProvider, data: Any, status: int, code: int
) -> None:
    reply, found = await post(session, CHAT, data, {"x-mock-status": str(status)})
    error = orjson.loads(found)
    assert (reply.status, reply.content_type) == (200, "application/json")
    assert error["error_code"] == code
    assert error["id"] == reply.headers["x-bce-request-id"]
    book = provider.books.of("completions_pro")
    assert (book.calls, book.failed_calls, book.completed_calls) == (1, 1, 0)
    assert (book.input_tokens, book.output_tokens) == (0, 0)
    assert provider.books.requests[0].answer_began_at is None


@pytest.mark.parametrize(("told", "code"), [("17", 17), ("strange", "strange")])
async def test_error_code_is_the_one_asked_for(
    session: aiohttp.ClientSession, told: str, code: object
) -> None:
    headers = {"x-mock-status": "429", "x-mock-error-code": told}
    _, data = await post(session, CHAT, HELLO, headers)
    assert orjson.loads(data)["error_code"] == code


async def test_misspelt_setting_is_no_error_that_could_be_meant(
    session: aiohttp.ClientSession,
) -> None:
    reply, data = await post(session, CHAT, HELLO, {"x-mock-stauts": "429"})
    assert reply.status == 400
    assert "unknown setting" in orjson.loads(data)["error_msg"]


async def test_error_event_ends_the_stream(
    session: aiohttp.ClientSession, provider: MockProvider
) -> None:
    _, stream = await post(session, CHAT, STREAM, {"x-mock-error-event": "2"})
    frames = frames_of(stream)
    assert [frame.get("error_code") for frame in frames] == [None, None, 336000]
    book = provider.books.of("completions_pro")
    assert (book.failed_calls, book.output_tokens, book.told_output_tokens) == (1, 2, 2)


@pytest.mark.parametrize(
    ("path", "data"),
    [(CHAT, {}), (CHAT, []), (COMPLETIONS, {"prompt": ""}), (EMBEDDINGS, {"input": "a"})],
)
async def test_wrong_request_gets_an_error(
    session: aiohttp.ClientSession, path: str, data: Any
) -> None:
    reply, found = await post(session, path, data)
    assert (reply.status, orjson.loads(found)["error_code"]) == (200, 336003)


async def test_usage_wrong_and_none(session: aiohttp.ClientSession) -> None:
    _, data = await post(session, CHAT, HELLO, {"x-mock-usage": "wrong"})
    assert orjson.loads(data)["usage"]["prompt_tokens"] == 27
    _, stream = await post(session, CHAT, STREAM, {"x-mock-usage": "none"})
    assert b'"usage"' not in stream
    _, data = await post(session, EMBEDDINGS, {"input": ["a"]}, {"x-mock-usage": "none"})
    assert b'"usage"' not in data


async def test_script_fits_calls_by_the_model_in_the_path() -> None:
    provider = MockProvider(script=Script.parse("- {match: {model: eb-*}, status: 429}"))
    address = await provider.start()
    try:
        async with aiohttp.ClientSession(f"http://{address}") as session:
            _, refused = await post(session, f"{PREFIX}chat/eb-instant", HELLO)
            _, answered = await post(session, CHAT, HELLO)
    finally:
        await provider.stop()
    assert orjson.loads(refused)["error_code"] == 18
    assert "error_code" not in orjson.loads(answered)
    assert provider.books.of("eb-instant").failed_calls == 1


@pytest.mark.parametrize("rest", ["chat", "chat/", "chat/a/b", "text2image/a", ""])
def test_other_paths_are_not_answered(rest: str) -> None:
    assert not has_path(PREFIX + rest)


def test_stream_that_would_fill_the_memory_is_refused() -> None:
    refused = answer(CHAT, orjson.dumps(STREAM), Settings(events=1_000_000))
    assert refused.is_refusal
    assert not answer(CHAT, orjson.dumps(HELLO), Settings(events=1_000_000)).is_refusal
