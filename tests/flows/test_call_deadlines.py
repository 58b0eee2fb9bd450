"""A caller that says how long it waits is told in time, and its upstream is let go."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from tests.support.flow import Answer, Flow, Start, chat_request, request, until
from tests.support.upstream import RawUpstream

BOTH = ["gpt", "claude"]
KINDS = {"gpt": "api_error", "claude": "timeout_error"}
DEADLINE_S = 0.3
SOON_S = 2.0
"""Far below any timeout of the upstream."""
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    async with RawUpstream() as raw:
        yield raw


def is_told(answer: Answer, model: str) -> None:
    """A clear error in the dialect of the client."""
    assert (answer.status, answer.header("x-sidecar-error")) == (504, "deadline_exceeded")
    error = answer.error
    assert (error["code"], error["type"]) == ("deadline_exceeded", KINDS[model])
    assert "deadline" in error["message"]
    if model == "claude":
        assert answer.json["type"] == "error"
        assert answer.json["request_id"]


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_whose_deadline_passes_gets_504_and_its_upstream_is_closed(
    flow: Flow, model: str, stream: bool
) -> None:
    began = time.monotonic()
    data = chat_request(model, stream=stream, x_mock_hang="head", x_request_timeout=str(DEADLINE_S))
    answer = await flow.call(data)
    assert DEADLINE_S - 0.01 <= time.monotonic() - began < SOON_S
    is_told(answer, model)
    await until(lambda: flow.provider.open_requests == 0, within_s=SOON_S)
    (line,) = await flow.logged()
    assert (line["status"], line["outcome"], line["error"]) == (
        504,
        "rejected",
        "deadline_exceeded",
    )
    assert line["attempts"] == 1


@pytest.mark.parametrize("model", BOTH)
async def test_what_the_sdk_says_of_its_patience_is_a_deadline_too(flow: Flow, model: str) -> None:
    for words in ({"x_stainless_read_timeout": "0.1"}, {"x_stainless_timeout": "0.1"}):
        data = chat_request(model, stream=False, x_mock_hang="head", **words)
        is_told(await flow.call(data), model)


@pytest.mark.parametrize("model", BOTH)
async def test_a_deadline_that_is_far_away_changes_nothing(flow: Flow, model: str) -> None:
    plain = await flow.call(chat_request(model))
    bounded = await flow.call(chat_request(model, x_request_timeout="60"))
    assert (plain.status, bounded.status) == (200, 200)
    assert plain.json.keys() == bounded.json.keys()


@pytest.mark.parametrize("model", BOTH)
async def test_a_stream_that_has_begun_may_go_on_past_the_deadline(
    start: Start, raw: RawUpstream, model: str
) -> None:
    sections = "".join(
        f"  {name}: {{base_url: '{raw.base_url}{path}'}}\n"
        for name, path in (("up-openai", "/v1"), ("up-anthropic", ""))
    )
    flow = await start(f"upstreams:\n{sections}")
    client = await flow.connect()
    began = time.monotonic()
    client.send(chat_request(model, stream=True, x_request_timeout="0.2"))
    connection = await raw.accept()
    await connection.read_request()
    connection.write(STREAM_HEAD + b"b\r\ndata: one\n\n\r\n")
    await client.until(b"data: one\n\n\r\n")
    await until(lambda: time.monotonic() - began > 0.25)
    connection.write(b"b\r\ndata: two\n\n\r\n0\r\n\r\n")
    assert (await client.until(b"0\r\n\r\n")).endswith(b"data: two\n\n\r\n0\r\n\r\n")
    connection.close()


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("text", ["soon", "0", "-1", "30s", "1e3"])
async def test_a_malformed_deadline_is_400_in_the_dialect_and_nobody_is_asked(
    flow: Flow, model: str, text: str
) -> None:
    answer = await flow.call(chat_request(model, x_request_timeout=text))
    assert (answer.status, answer.header("x-sidecar-error")) == (400, "invalid_timeout")
    error = answer.error
    assert (error["code"], error["type"]) == ("invalid_timeout", "invalid_request_error")
    assert "X-Request-Timeout" in error["message"]
    (line,) = await flow.logged()
    assert (line["attempts"], line["outcome"]) == (0, "rejected")


async def test_what_an_sdk_says_that_is_no_timeout_is_ignored(flow: Flow) -> None:
    answer = await flow.call(chat_request(x_stainless_timeout="NOT_GIVEN"))
    assert answer.status == 200


async def test_a_deadline_bounds_paths_that_are_passed_through_as_well(
    start: Start, raw: RawUpstream
) -> None:
    flow = await start(f"upstreams: {{up-openai: {{base_url: '{raw.base_url}/v1'}}}}")
    client = await flow.connect()
    client.send(request("GET", "/up-openai/files", headers={"x-request-timeout": "0.1"}))
    connection = await raw.accept()
    await connection.read_request()
    is_told(await client.answer(), "gpt")
    await connection.closed()


async def test_models_that_the_sidecar_lists_itself_need_no_deadline(flow: Flow) -> None:
    answer = await flow.call(
        request("GET", "/v1/models", headers={"x-request-timeout": "0.000000001"})
    )
    assert answer.status == 200
