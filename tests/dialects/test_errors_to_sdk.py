"""Errors as the official SDKs understand them: by class, code and message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx2
import openai
import orjson
import pytest

from sidecar.call import deadline_exceeded
from sidecar.dialects import ANTHROPIC, ENDPOINTS, OPENAI
from sidecar.errors import CallError, Phase, Rejected, Retry, UpstreamError

CHUNK = (
    b'data: {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", '
    b'"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": null}]}\n\n'
)
START = (
    b"event: message_start\n"
    b'data: {"type": "message_start", "message": {"id": "m", "type": "message", '
    b'"role": "assistant", "model": "m", "content": [], "stop_reason": null, '
    b'"stop_sequence": null, "usage": {"input_tokens": 1, "output_tokens": 1}}}\n\n'
)
CREATED = (
    b"event: response.output_text.delta\n"
    b'data: {"type": "response.output_text.delta", "delta": "a", "item_id": "i", '
    b'"output_index": 0, "content_index": 0, "sequence_number": 1, "logprobs": []}\n\n'
)


def answering(status: int, body: bytes, media_type: str) -> httpx2.Client:
    """An HTTP client that gets this answer, whatever it asks."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        headers = {"content-type": media_type, "request-id": "req"}
        return httpx2.Response(status, content=body, headers=headers)

    return httpx2.Client(transport=httpx2.MockTransport(answer))


@contextmanager
def openai_client(status: int, body: bytes, kind: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        api_key="k",
        base_url="http://sidecar/v1",
        max_retries=0,
        http_client=answering(status, body, kind),
    ) as client:
        yield client


@contextmanager
def anthropic_client(status: int, body: bytes, kind: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        api_key="k",
        base_url="http://sidecar",
        max_retries=0,
        http_client=answering(status, body, kind),
    ) as client:
        yield client


MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


def chat(client: openai.OpenAI, stream: bool = False) -> Any:
    return client.chat.completions.create(model="m", messages=MESSAGES, stream=stream)


def message(client: anthropic.Anthropic, stream: bool = False) -> Any:
    return client.messages.create(model="m", messages=MESSAGES, max_tokens=9, stream=stream)


ERRORS: list[tuple[CallError, type[Exception], str, type[Exception], str]] = [
    (
        Rejected(400, "invalid_timeout", "no number of seconds"),
        openai.BadRequestError,
        "invalid_request_error",
        anthropic.BadRequestError,
        "invalid_request_error",
    ),
    (
        deadline_exceeded(),
        openai.InternalServerError,
        "api_error",
        anthropic.DeadlineExceededError,
        "timeout_error",
    ),
    (
        Rejected(400, "invalid_json", "not JSON"),
        openai.BadRequestError,
        "invalid_request_error",
        anthropic.BadRequestError,
        "invalid_request_error",
    ),
    (
        Rejected(401, "invalid_api_key", "unknown key"),
        openai.AuthenticationError,
        "authentication_error",
        anthropic.AuthenticationError,
        "authentication_error",
    ),
    (
        Rejected(403, "upstream_not_allowed", "not for you"),
        openai.PermissionDeniedError,
        "permission_error",
        anthropic.PermissionDeniedError,
        "permission_error",
    ),
    (
        Rejected(404, "model_not_found", "no such model"),
        openai.NotFoundError,
        "invalid_request_error",
        anthropic.NotFoundError,
        "not_found_error",
    ),
    (
        Rejected(413, "body_too_large", "too large"),
        openai.APIStatusError,
        "invalid_request_error",
        anthropic.APIStatusError,
        "request_too_large",
    ),
    (
        Rejected(429, "rate_limited", "slow down"),
        openai.RateLimitError,
        "rate_limit_error",
        anthropic.RateLimitError,
        "rate_limit_error",
    ),
    (
        CallError(500, "internal_error", "it failed"),
        openai.InternalServerError,
        "api_error",
        anthropic.InternalServerError,
        "api_error",
    ),
    (
        UpstreamError(Phase.CONNECT, Retry.SAME, "connect_failed", "no route", status=502),
        openai.InternalServerError,
        "api_error",
        anthropic.InternalServerError,
        "api_error",
    ),
    (
        Rejected(503, "shutting_down", "shutting down"),
        openai.InternalServerError,
        "api_error",
        anthropic.APIStatusError,
        "overloaded_error",
    ),
    (
        UpstreamError(Phase.SEND, Retry.SAME, "upstream_timeout", "too slow", status=504),
        openai.InternalServerError,
        "api_error",
        anthropic.APIStatusError,
        "timeout_error",
    ),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: str(case[0].status))
def test_openai_sdk_raises_the_class_of_the_status(case: Any) -> None:
    error, expected, kind, _, _ = case
    body = OPENAI.error_body(error, "call_1")
    with (
        openai_client(error.status, body, "application/json") as client,
        pytest.raises(expected) as raised,
    ):
        chat(client)
    got: Any = raised.value
    assert (got.status_code, got.code, got.type) == (error.status, error.code, kind)
    assert got.body["message"] == error.message
    assert got.param is None


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: str(case[0].status))
def test_anthropic_sdk_raises_the_class_of_the_status(case: Any) -> None:
    error, _, _, expected, kind = case
    body = ANTHROPIC.error_body(error, "call_1")
    with (
        anthropic_client(error.status, body, "application/json") as client,
        pytest.raises(expected) as raised,
    ):
        message(client)
    got: Any = raised.value
    assert got.status_code == error.status
    assert got.body == {
        "type": "error",
        "error": {"type": kind, "message": error.message, "code": error.code},
        "request_id": "call_1",
    }


BROKEN = UpstreamError(Phase.BODY, Retry.NO, "upstream_closed", "the upstream broke off")


def test_openai_sdk_raises_after_the_chunks_of_a_stream_that_broke_off() -> None:
    event = OPENAI.error_event(BROKEN, "call_1", ENDPOINTS["/v1/chat/completions"][1])
    seen: list[Any] = []
    with openai_client(200, CHUNK + event, "text/event-stream") as client:
        stream = chat(client, stream=True)
        with pytest.raises(openai.APIError) as raised:
            seen.extend(stream)
    assert raised.value.message == BROKEN.message
    assert (raised.value.code, raised.value.type) == ("upstream_closed", "api_error")


def test_openai_sdk_raises_in_a_stream_of_responses() -> None:
    event = OPENAI.error_event(BROKEN, "call_1", ENDPOINTS["/v1/responses"][1])
    assert event.startswith(b"event: error\n")
    with openai_client(200, CREATED + event, "text/event-stream") as client:
        stream = client.responses.create(model="m", input="hi", stream=True)
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert raised.value.message == BROKEN.message
    assert raised.value.code == "upstream_closed"


def test_anthropic_sdk_raises_after_the_events_of_a_stream_that_broke_off() -> None:
    event = ANTHROPIC.error_event(BROKEN, "call_1", ENDPOINTS["/v1/messages"][1])
    with anthropic_client(200, START + event, "text/event-stream") as client:
        stream = message(client, stream=True)
        with pytest.raises(anthropic.APIStatusError) as raised:
            list(stream)
    body: Any = raised.value.body
    assert body["error"] == {
        "type": "api_error",
        "message": BROKEN.message,
        "code": "upstream_closed",
    }


@pytest.mark.parametrize(
    "event",
    [
        lambda error: OPENAI.error_event(error, "c", ENDPOINTS["/v1/chat/completions"][1]),
        lambda error: OPENAI.error_event(error, "c", ENDPOINTS["/v1/responses"][1]),
        lambda error: ANTHROPIC.error_event(error, "c", ENDPOINTS["/v1/messages"][1]),
    ],
)
def test_error_event_is_one_event_whatever_the_message(
    event: Callable[[CallError], bytes],
) -> None:
    data = event(CallError(500, "internal_error", "line\n\nend\r\ndata: x"))
    assert data.endswith(b"\n\n")
    assert data.count(b"\n\n") == 1
    payload = data.partition(b"data: ")[2]
    assert orjson.loads(payload)["error"]["message"] == "line\n\nend\r\ndata: x"


def test_models_lists_are_read_by_the_sdks() -> None:
    names = ["gpt-4o", "org/model"]
    with openai_client(200, OPENAI.models_body(names), "application/json") as client:
        assert [each.id for each in client.models.list()] == names
    with openai_client(200, OPENAI.model_body("gpt-4o"), "application/json") as client:
        assert client.models.retrieve("gpt-4o").id == "gpt-4o"
    with anthropic_client(200, ANTHROPIC.models_body(names), "application/json") as other:
        assert [each.id for each in other.models.list()] == names
    with anthropic_client(200, ANTHROPIC.models_body([]), "application/json") as other:
        assert list(other.models.list()) == []
    with anthropic_client(200, ANTHROPIC.model_body("claude-x"), "application/json") as other:
        assert other.models.retrieve("claude-x").id == "claude-x"
