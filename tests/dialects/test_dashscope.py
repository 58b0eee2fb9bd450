"""DashScope's own protocol: requests, frames wherever they are cut, errors for its SDK."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from multidict import CIMultiDict

from sidecar.call import ChatView, Usage
from sidecar.dialects import DASHSCOPE, ENDPOINTS, find_endpoint
from sidecar.dialects.endpoint import OTHER
from sidecar.errors import CallError, Rejected
from sidecar.reply import Body
from sidecar.sse import Decoder, Event, JsonEvent

USER = {"role": "user", "content": "hi"}
GENERATION = "/api/v1/services/aigc/text-generation/generation"
BUSY = CallError(429, "rate_limited", "too many calls")


def frame(number: int, text: str, reason: str, **usage: Any) -> bytes:
    """One frame as the provider writes it: no spaces after colons, the status as a comment."""
    data = orjson.dumps(
        {"output": {"text": text, "finish_reason": reason}, "usage": usage, "request_id": "r"}
    )
    return b"id:%d\nevent:result\n:HTTP_STATUS/200\ndata:%b\n\n" % (number, data)


STREAM = b"".join(
    [
        frame(1, "你", "null", input_tokens=8, output_tokens=1, total_tokens=9),
        frame(2, '你好 "usage"', "null", input_tokens=8, output_tokens=3, total_tokens=11),
        frame(
            3,
            '你好 "usage":{"output_tokens":99}',
            "stop",
            input_tokens=8,
            output_tokens=5,
            total_tokens=13,
            prompt_tokens_details={"cached_tokens": 4},
            output_tokens_details={"reasoning_tokens": 2},
        ),
    ]
)
WHOLE = Usage(8, 5, cached=4, reasoning=2)


def event(data: Any, head: bytes = b"event:result\n") -> Event:
    text = data if isinstance(data, bytes) else orjson.dumps(data)
    (found,) = Decoder().feed(b"id:1\n" + head + b"data:" + text + b"\n\n")
    return found


def usage_of(pieces: list[bytes]) -> Usage | None:
    """What a tap on the body that these pieces are sees."""
    seen: list[Usage | None] = [None]
    body = Body(media_type="text/event-stream")
    body.tap_events(
        lambda event: seen.append(DASHSCOPE.usage(event, seen[-1])), containing=b'"usage"'
    )
    for piece in pieces:
        body.feed(piece)
    body.finish()
    assert body.take() == b"".join(pieces)
    return seen[-1]


def every_cut(stream: bytes) -> Iterator[list[bytes]]:
    for at in range(len(stream) + 1):
        yield [piece for piece in (stream[:at], stream[at:]) if piece]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_usage_is_the_last_frames_wherever_the_stream_is_cut(line_end: bytes) -> None:
    stream = STREAM.replace(b"\n", line_end)
    for pieces in every_cut(stream):
        assert usage_of(pieces) == WHOLE
    assert usage_of([stream[at : at + 1] for at in range(len(stream))]) == WHOLE


def test_stream_that_broke_off_has_what_its_last_whole_frame_said() -> None:
    frames = STREAM.split(b"\n\n")
    assert usage_of([frames[0] + b"\n\n", frames[1] + b"\n\n", b'id:3\ndata:{"outp']) == Usage(8, 3)


SHAPES: dict[str, tuple[Any, Usage | None]] = {
    "whole answer": (
        {"output": {"text": "x"}, "usage": {"input_tokens": 3, "output_tokens": 4}},
        Usage(3, 4),
    ),
    "older models": (
        {"usage": {"input_tokens": 9, "output_tokens": 1, "cached_tokens": 5}},
        Usage(9, 1, cached=5),
    ),
    "explicit cache": (
        {
            "usage": {
                "input_tokens": 30,
                "output_tokens": 1,
                "prompt_tokens_details": {
                    "cached_tokens": 5,
                    "cache_creation_input_tokens": 20,
                    "cache_creation": {
                        "ephemeral_5m_input_tokens": 12,
                        "ephemeral_1h_input_tokens": 8,
                    },
                },
            }
        },
        Usage(30, 1, cached=5, cache_write=20, cache_write_1h=8),
    ),
    "embeddings": ({"output": {"embeddings": []}, "usage": {"total_tokens": 7}}, Usage(7, 0)),
    "details are null": (
        {"usage": {"input_tokens": 1, "output_tokens": 2, "prompt_tokens_details": None}},
        Usage(1, 2),
    ),
    "usage is empty": ({"output": {}, "usage": {}}, None),
    "usage is null": ({"output": {}, "usage": None}, None),
    "usage is a list": ({"usage": [1]}, None),
    "counts of a wrong type": ({"usage": {"input_tokens": "1", "output_tokens": -2}}, None),
    "counts of nothing": ({"usage": {"input_tokens": 0, "output_tokens": 0}}, None),
    "more than anybody counts": ({"usage": {"total_tokens": 2**64 - 1}}, None),
    "in the text": ({"output": {"text": '"usage": {"input_tokens": 9}'}}, None),
    "task": ({"output": {"task_id": "t", "task_status": "PENDING"}, "request_id": "r"}, None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_usage_shapes(shape: str) -> None:
    data, expected = SHAPES[shape]
    assert DASHSCOPE.usage(event(data), None) == expected
    for option in (0, orjson.OPT_INDENT_2):
        assert DASHSCOPE.usage(JsonEvent(orjson.dumps(data, option=option)), None) == expected
    before = Usage(1, 2)
    if expected is None:
        assert DASHSCOPE.usage(event(data), before) is before


ERROR = {"code": "Throttling", "message": "slower", "request_id": "r"}


@pytest.mark.parametrize(
    ("data", "head", "expected"),
    [
        (ERROR, b"event:error\n:HTTP_STATUS/429\n", ("Throttling", "slower")),
        (ERROR, b"event: error\n", ("Throttling", "slower")),
        (ERROR, b"event:error:HTTP_STATUS/429\n", ("Throttling", "slower")),
        (ERROR, b"event:result\n", ("Throttling", "slower")),
        (ERROR, b"", ("Throttling", "slower")),
        ({"message": "m"}, b"event:error\n", ("error", "m")),
        ({"code": None, "message": None}, b"event:error\n", ("error", "")),
        (b"oops", b"event:error\n", ("error", "")),
        ({"output": {"text": "error"}, "code": "", "message": ""}, b"event:result\n", None),
        ({"output": {"text": "an error"}}, b"event:result\n", None),
        ({"output": {"text": '"code": "x"'}}, b"event:result\n", None),
        ({"code": 200, "output": None}, b"event:result\n", None),
        ([{"code": "x"}], b"event:result\n", None),
        (b"error", b"event:result\n", None),
    ],
)
def test_error_inside_a_200(data: Any, head: bytes, expected: tuple[str, str] | None) -> None:
    assert DASHSCOPE.error_in(event(data, head)) == expected


def test_error_is_found_in_a_whole_answer_too() -> None:
    assert DASHSCOPE.error_in(JsonEvent(orjson.dumps(ERROR))) == ("Throttling", "slower")
    assert DASHSCOPE.error_in(JsonEvent(b'{"output":{"text":"code"},"usage":{}}')) is None


class Unread(Event):
    """Fails the test when somebody parses it."""

    __slots__ = ()

    def json(self) -> Any:
        raise AssertionError("parsed")


def test_plain_frames_are_not_parsed_in_search_of_an_error() -> None:
    (plain,) = Decoder().feed(frame(1, "hello", "null", input_tokens=1, output_tokens=1))
    assert DASHSCOPE.error_in(Unread(plain.raw)) is None


# As the official SDK reads them


def as_sdk_reads(stream: bytes) -> list[tuple[bool, int, Any]]:
    """(is it an error, status, data) of each frame, by the SDK's rules: names before colons, no
    space is skipped before `error`, a `status` line, 400 without one."""
    found, is_error, status = [], False, 400
    for line in stream.decode().splitlines():
        if line.startswith("event:"):
            is_error = is_error or line == "event:error"
        elif line.startswith("status:"):
            status = int(line.removeprefix("status:"))
        elif line.startswith("data:"):
            found.append((is_error, status, orjson.loads(line.removeprefix("data:"))))
    return found


def test_our_errors_are_the_sdks_errors() -> None:
    expected = {
        "code": "Throttling.rate_limited",
        "message": "too many calls",
        "request_id": "call_1",
    }
    assert orjson.loads(DASHSCOPE.error_body(BUSY, "call_1")) == expected
    stream = STREAM + DASHSCOPE.error_event(BUSY, "call_1", ENDPOINTS[GENERATION][1])
    *frames, last = as_sdk_reads(stream)
    assert [is_error for is_error, *_ in frames] == [False] * 3
    assert last == (True, 429, expected)


def test_our_error_event_is_one_to_us() -> None:
    (found,) = Decoder().feed(DASHSCOPE.error_event(BUSY, "c", ENDPOINTS[GENERATION][1]))
    assert DASHSCOPE.error_in(found) == ("Throttling.rate_limited", "too many calls")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "InvalidParameter"),
        (401, "InvalidApiKey"),
        (402, "Arrearage"),
        (403, "AccessDenied"),
        (404, "ModelNotFound"),
        (413, "InvalidParameter"),
        (500, "InternalError"),
        (502, "InternalError"),
        (503, "ServiceUnavailable"),
        (504, "RequestTimeOut"),
    ],
)
def test_code_says_the_status_in_the_providers_words(status: int, kind: str) -> None:
    body = orjson.loads(DASHSCOPE.error_body(CallError(status, "why", "m"), "c"))
    assert body["code"] == f"{kind}.why"


# Requests


@pytest.mark.parametrize(
    ("headers", "is_stream"),
    [
        ({}, False),
        ({"X-DashScope-SSE": "enable"}, True),
        ({"X-DashScope-SSE": "Enable "}, True),
        ({"X-DashScope-SSE": "disable"}, False),
        ({"Accept": "text/event-stream"}, True),
        ({"Accept": "application/json; charset=utf-8"}, False),
        ({"Accept": "*/*"}, False),
    ],
)
def test_stream_is_asked_for_by_a_header(headers: dict[str, str], is_stream: bool) -> None:
    assert DASHSCOPE.asks_stream(CIMultiDict(headers), {"stream": True}) is is_stream
    assert DASHSCOPE.stream_mark in b"{}"  # whatever the body says


@pytest.mark.parametrize(
    ("body", "messages", "max_tokens"),
    [
        ({"input": {"messages": [USER]}, "parameters": {"max_tokens": 5}}, (USER,), 5),
        ({"input": {"prompt": "hi"}, "parameters": {}}, (USER,), None),
        ({"input": {"texts": ["a", "b"]}}, (), None),
        ({"input": {}, "parameters": None}, (), None),
    ],
)
def test_view(body: dict[str, Any], messages: tuple[Any, ...], max_tokens: int | None) -> None:
    view = DASHSCOPE.view({"model": "qwen-max", **body})
    assert view == ChatView("dashscope", "qwen-max", messages, False, max_tokens)


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m"},
        {"model": "m", "input": "hi"},
        {"model": "m", "input": {"messages": 1}},
        {"input": {"messages": []}},
    ],
)
def test_request_that_is_none_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as raised:
        DASHSCOPE.view(body)
    assert raised.value.status == 400


@pytest.mark.parametrize("base_path", ["", "/api/v1"])
def test_base_url_may_end_before_the_version_or_behind_it(base_path: str) -> None:
    assert DASHSCOPE.upstream_path(base_path, GENERATION) == GENERATION
    assert DASHSCOPE.upstream_path(f"/gateway{base_path}", GENERATION) == f"/gateway{GENERATION}"


def test_other_paths_of_the_protocol_are_its_own_and_not_served() -> None:
    assert find_endpoint("/api/v1/tasks/abc") == (DASHSCOPE, OTHER)
    assert find_endpoint("/api/v2/x") is None


def test_models_are_listed_as_the_sdk_wants_them() -> None:
    output = orjson.loads(DASHSCOPE.models_body(["a", "b"]))["output"]
    assert [each["model"] for each in output["models"]] == ["a", "b"]
    assert output["total"] == 2
    assert orjson.loads(DASHSCOPE.model_body("a"))["output"]["model"] == "a"
