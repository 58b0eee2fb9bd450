"""Qianfan v1: models in paths, frames wherever they are cut, and errors inside a 200."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from sidecar.call import ChatView, Usage
from sidecar.dialects import QIANFAN, find_endpoint
from sidecar.dialects.endpoint import OTHER
from sidecar.errors import CallError
from sidecar.reply import Body
from sidecar.sse import Decoder, Event, JsonEvent, encode

USER = {"role": "user", "content": "hi"}
PREFIX = "/rpc/2.0/ai_custom/v1/wenxinworkshop"
CHAT = f"{PREFIX}/chat/completions_pro"


def frame(number: int, text: str, tokens_out: int, *, is_end: bool = False) -> bytes:
    data = {
        "id": "as-1",
        "object": "chat.completion",
        "sentence_id": number,
        "is_end": is_end,
        "result": text,
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": tokens_out,
            "total_tokens": 4 + tokens_out,
        },
    }
    return encode(orjson.dumps(data))


STREAM = frame(0, "你好", 2) + frame(1, '"usage"', 3) + frame(2, "", 3, is_end=True)


def event(data: Any) -> Event:
    (found,) = Decoder().feed(encode(data if isinstance(data, bytes) else orjson.dumps(data)))
    return found


def seen_in(pieces: list[bytes]) -> tuple[Usage | None, list[tuple[str, str]]]:
    """Usage and errors that taps on the body that these pieces are see."""
    usages: list[Usage | None] = [None]
    errors: list[tuple[str, str]] = []
    body = Body(media_type="text/event-stream")
    body.tap_events(lambda event: usages.append(QIANFAN.usage(event, usages[-1])))
    body.tap_events(lambda event: errors.extend(filter(None, [QIANFAN.error_in(event)])))
    for piece in pieces:
        body.feed(piece)
    body.finish()
    assert body.take() == b"".join(pieces)
    return usages[-1], errors


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_usage_is_the_last_frames_wherever_the_stream_is_cut(line_end: bytes) -> None:
    stream = STREAM.replace(b"\n", line_end)
    expected: tuple[Usage, list[Any]] = (Usage(4, 3), [])
    for at in range(1, len(stream)):
        assert seen_in([stream[:at], stream[at:]]) == expected
    assert seen_in([stream[at : at + 1] for at in range(len(stream))]) == expected


BUSY = b'{"error_code":18,"error_msg":"Open api qps request limit reached","id":"as-1"}'
TOLD = ("18", "Open api qps request limit reached")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
@pytest.mark.parametrize("start", [b"", b"data: ", b"data:"])
def test_error_midway_is_found_wherever_it_is_cut_in_a_frame_or_bare(
    start: bytes, end: bytes
) -> None:
    stream = frame(0, "你好", 2) + start + BUSY + end
    for at in range(1, len(stream)):
        assert seen_in([stream[:at], stream[at:]]) == (Usage(4, 2), [TOLD])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"error_code": 336100, "error_msg": "busy"}, ("336100", "busy")),
        ({"error_code": "110", "error_msg": "token"}, ("110", "token")),
        ({"error_code": 2}, ("2", "")),
        ({"error_code": 0, "result": "x"}, None),
        ({"error_code": None, "result": "x"}, None),
        ({"result": '"error_code": 18'}, None),
        ([{"error_code": 18}], None),
        (b'{"error_code": 18', None),
    ],
)
def test_error_inside_a_200(data: Any, expected: tuple[str, str] | None) -> None:
    assert QIANFAN.error_in(event(data)) == expected
    raw = data if isinstance(data, bytes) else orjson.dumps(data)
    assert QIANFAN.error_in(JsonEvent(raw)) == expected
    if not isinstance(data, bytes):
        pretty = orjson.dumps(data, option=orjson.OPT_INDENT_2)
        assert QIANFAN.error_in(JsonEvent(pretty)) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}, Usage(3, 4)),
        ({"data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}}, Usage(3, 0)),
        ({"usage": {}}, None),
        ({"usage": {"prompt_tokens": 0, "completion_tokens": None, "total_tokens": 7}}, None),
        ({"usage": {"prompt_tokens": 2**64 - 1, "completion_tokens": "4"}}, None),
        ({"usage": None}, None),
        ({"result": '"usage": {"prompt_tokens": 9}'}, None),
        (b"oops", None),
    ],
)
def test_usage_shapes(data: Any, expected: Usage | None) -> None:
    before = Usage(1, 1)
    assert QIANFAN.usage(event(data), before) == (expected or before)


def as_sdk_reads(stream: bytes) -> list[Any]:
    """What the SDK makes of a stream: empty lines are skipped, all others begin with `data: `."""
    lines = [line for line in stream.decode().splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [orjson.loads(line.removeprefix("data: ")) for line in lines]


def test_our_errors_are_the_sdks_errors() -> None:
    error = CallError(429, "rate_limited", "too many calls")
    expected = {
        "error_code": 18,
        "error_msg": "too many calls",
        "id": "call_1",
        "code": "rate_limited",
    }
    assert orjson.loads(QIANFAN.error_body(error, "call_1")) == expected
    *_, last = as_sdk_reads(STREAM + QIANFAN.error_event(error, "call_1", QIANFAN.endpoints[0]))
    assert last == expected


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((400, 336003), (401, 14), (402, 17), (403, 6), (404, 336005), (405, 336101)),
        *((413, 336003), (500, 336000), (502, 2), (503, 336100), (504, 2)),
    ],
)
def test_error_code_says_the_status_in_the_providers_numbers(status: int, code: int) -> None:
    body = orjson.loads(QIANFAN.error_body(CallError(status, "why", "m"), "c"))
    assert (body["error_code"], body["code"]) == (code, "why")


@pytest.mark.parametrize("status", range(400, 600))
def test_no_error_of_ours_makes_the_sdk_fetch_a_new_token(status: int) -> None:
    body = orjson.loads(QIANFAN.error_body(CallError(status, "why", "m"), "c"))
    assert body["error_code"] not in (110, 111)


# Models in paths


@pytest.mark.parametrize("kind", ["chat", "completions", "embeddings"])
@pytest.mark.parametrize("model", ["completions", "ernie-4.0-8k", "bge_large_zh", "x:1", "a~b"])
def test_path_names_the_model(kind: str, model: str) -> None:
    path = f"{PREFIX}/{kind}/{model}"
    found = find_endpoint(path)
    assert found is not None
    dialect, endpoint = found
    assert (dialect, endpoint.name, endpoint.model_in_path) == (QIANFAN, kind, True)
    assert endpoint.path == f"{PREFIX}/{kind}/{{model}}"


@pytest.mark.parametrize(
    "rest",
    [
        *("chat", "chat/", "chat/a/b", "chat/a%2Fb", "chat/a;b", "chat/a%3Bb", "chat/a b"),
        *("chat/..", "chat/模型", "text2image/sd_xl", "chat/-a", "chat/a\n"),
    ],
)
def test_path_that_another_parser_may_read_otherwise_names_no_model(rest: str) -> None:
    assert find_endpoint(f"{PREFIX}/{rest}") == (QIANFAN, OTHER)


@pytest.mark.parametrize("base_path", ["", PREFIX])
def test_target_has_its_own_name_in_the_path(base_path: str) -> None:
    assert QIANFAN.upstream_path(base_path, CHAT) == CHAT
    assert QIANFAN.upstream_path(base_path, CHAT, "eb-instant") == f"{PREFIX}/chat/eb-instant"
    assert QIANFAN.upstream_path(f"/gw{base_path}", CHAT) == f"/gw{CHAT}"
    assert QIANFAN.upstream_path("", CHAT, "a/../b ?") == f"{PREFIX}/chat/a%2F..%2Fb%20%3F"


# Requests


@pytest.mark.parametrize(
    ("body", "messages", "is_stream", "max_tokens"),
    [
        (
            {"messages": [USER], "stream": True, "max_output_tokens": 5, "system": "s"},
            (USER,),
            True,
            5,
        ),
        ({"prompt": "hi"}, (USER,), False, None),
        ({"input": ["a"]}, (), False, None),
    ],
)
def test_view(
    body: dict[str, Any], messages: tuple[Any, ...], is_stream: bool, max_tokens: int | None
) -> None:
    view = QIANFAN.view(body, "eb-instant")
    assert view == ChatView("qianfan", "eb-instant", messages, is_stream, max_tokens)
    assert QIANFAN.asks_stream({}, body) is is_stream
    assert QIANFAN.stream_mark in orjson.dumps({"stream": True})


def test_models_are_listed() -> None:
    data = orjson.loads(QIANFAN.models_body(["a", "b"]))["data"]
    assert [each["id"] for each in data] == ["a", "b"]
    assert orjson.loads(QIANFAN.model_body("a"))["id"] == "a"
