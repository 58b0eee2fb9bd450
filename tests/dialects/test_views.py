"""What requests have in common, what errors inside a 200 look like, and paths on the wire."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from sidecar.call import ChatView
from sidecar.dialects import ANTHROPIC, DIALECTS, ENDPOINTS, OPENAI, Dialect, find_endpoint
from sidecar.errors import Rejected
from sidecar.sse import Decoder, Event, encode

USER = {"role": "user", "content": "hi"}


def event(data: Any, name: str | None = None) -> Event:
    (found,) = Decoder().feed(encode(data if isinstance(data, bytes) else orjson.dumps(data), name))
    return found


@pytest.mark.parametrize(
    ("body", "messages", "is_stream", "max_tokens"),
    [
        ({"messages": [USER], "stream": True, "max_tokens": 5}, (USER,), True, 5),
        (
            {"messages": [USER], "max_completion_tokens": 7, "max_tokens": 5},
            (USER,),
            False,
            7,
        ),
        ({"input": "hi", "max_output_tokens": 9}, (USER,), False, 9),
        ({"input": [USER, {"type": "item"}]}, (USER, {"type": "item"}), False, None),
        ({"prompt": "hi"}, (USER,), False, None),
        ({"prompt": ["a", "b"]}, (), False, None),
        ({"messages": []}, (), False, None),
        ({}, (), False, None),
        ({"messages": [USER], "stream": "yes", "max_tokens": "9"}, (USER,), False, None),
    ],
)
def test_openai_view(
    body: dict[str, Any], messages: tuple[Any, ...], is_stream: bool, max_tokens: int | None
) -> None:
    view = OPENAI.view({"model": "m", **body})
    assert view == ChatView("openai", "m", messages, is_stream, max_tokens)


def test_anthropic_view() -> None:
    body = {"model": "m", "messages": [USER], "max_tokens": 5, "stream": True}
    assert ANTHROPIC.view(body) == ChatView("anthropic", "m", (USER,), True, 5)


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (OPENAI, {"model": "m", "messages": 1}),
        (OPENAI, {"model": "m", "messages": {"role": "user"}}),
        (OPENAI, {"messages": []}),
        (OPENAI, {"model": "", "messages": []}),
        (OPENAI, {"model": 5, "messages": []}),
        (ANTHROPIC, {"model": "m"}),
        (ANTHROPIC, {"model": "m", "messages": "hi"}),
        (ANTHROPIC, {"messages": []}),
    ],
)
def test_request_that_is_none_is_refused(dialect: Dialect, body: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as raised:
        dialect.view(body)
    assert raised.value.status == 400


ERRORS: list[tuple[Dialect, Any, str | None, tuple[str, str] | None]] = [
    (OPENAI, {"error": {"code": "x", "message": "m"}}, None, ("x", "m")),
    (OPENAI, {"error": {"type": "t", "message": "m", "code": None}}, None, ("t", "m")),
    (OPENAI, {"error": {"message": "m"}}, None, ("error", "m")),
    (OPENAI, {"error": {"code": 429}}, None, ("429", "")),
    (OPENAI, {"error": "too busy"}, None, ("error", "too busy")),
    (OPENAI, {"type": "error", "code": "x", "message": "m"}, "error", ("x", "m")),
    (OPENAI, {"error": None, "choices": []}, None, None),
    (OPENAI, {"choices": [{"delta": {"content": '"error"'}}]}, None, None),
    (OPENAI, [{"error": "x"}], None, None),
    (OPENAI, b"[DONE]", None, None),
    (OPENAI, b"oops", "error", None),
    (
        ANTHROPIC,
        {"type": "error", "error": {"type": "overloaded_error", "message": "m"}},
        "error",
        ("overloaded_error", "m"),
    ),
    (ANTHROPIC, {"type": "error", "error": "x"}, "error", ("error", "")),
    (ANTHROPIC, {"type": "error"}, "error", ("error", "")),
    (ANTHROPIC, {"type": "error", "error": {}}, "error", ("error", "")),
    (ANTHROPIC, {"type": "ping"}, "ping", None),
    (ANTHROPIC, {"type": "content_block_delta", "error": 1}, None, None),
    (ANTHROPIC, b"oops", "error", None),
]


@pytest.mark.parametrize(("dialect", "data", "name", "expected"), ERRORS)
def test_error_inside_a_200(
    dialect: Dialect, data: Any, name: str | None, expected: tuple[str, str] | None
) -> None:
    assert dialect.error_in(event(data, name)) == expected


@pytest.mark.parametrize(
    ("dialect", "base_path", "path", "wire"),
    [
        (OPENAI, "/v1", "/v1/chat/completions", "/v1/chat/completions"),
        (OPENAI, "", "/v1/chat/completions", "/v1/chat/completions"),
        (OPENAI, "/api/paas/v4", "/v1/chat/completions", "/api/paas/v4/chat/completions"),
        (ANTHROPIC, "", "/v1/messages", "/v1/messages"),
        (ANTHROPIC, "/anthropic", "/v1/messages", "/anthropic/v1/messages"),
    ],
)
def test_path_stands_behind_that_of_the_base_url(
    dialect: Dialect, base_path: str, path: str, wire: str
) -> None:
    assert dialect.upstream_path(base_path, path) == wire


def test_every_endpoint_is_found_by_its_path() -> None:
    for name, dialect in DIALECTS.items():
        assert dialect.name == name
        for endpoint in dialect.endpoints:
            path = endpoint.path.replace("{model}", "m")
            assert (ENDPOINTS.get(path) or find_endpoint(path)) == (dialect, endpoint)
            assert endpoint.has_model
        names = [endpoint.name for endpoint in dialect.endpoints]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("dialect", [OPENAI, ANTHROPIC], ids=lambda each: each.name)
def test_body_says_whether_it_asks_for_a_stream(dialect: Dialect) -> None:
    headers = {"accept": "text/event-stream"}
    assert dialect.asks_stream({}, {"stream": True})
    for stream in (False, None, 1, "true"):
        assert not dialect.asks_stream(headers, {"stream": stream})
    assert dialect.stream_mark in orjson.dumps({"stream": True})
    assert not dialect.asks_stream(headers, {})


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda each: each.name)
def test_view_takes_the_model_that_is_known_from_elsewhere(dialect: Dialect) -> None:
    body = {"messages": [USER], "input": {"messages": [USER]}}
    assert dialect.view(body, "m") == ChatView(dialect.name, "m", (USER,), False, None)


def test_codes_of_refused_requests_are_stable() -> None:
    """Programs match on these words: a change is a break."""
    seen = set()
    for dialect, body in ((OPENAI, {"messages": []}), (ANTHROPIC, {"model": "m"})):
        with pytest.raises(Rejected) as raised:
            dialect.view(body)
        seen.add(raised.value.code)
    assert seen == {"model_required", "invalid_request"}
