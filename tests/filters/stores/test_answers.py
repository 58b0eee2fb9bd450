"""What of an answer is kept, and in which forms a kept one is given again."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from filters.stores.answers import JSON, STREAM, entry_of, may_keep, replay
from sidecar.api import CACHED, USAGE, Call, Headers, Target, Usage
from tests.support.cached import entry
from tests.support.harness import MODEL, FakeUpstream, Harness

CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":'
    b'0,"delta":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
TROUBLE = b'data: {"error":{"message":"overloaded","code":"x"}}\n\n'
NOW = 1_700_000_000.0


def call(*, stream: bool = False) -> Call:
    body = {"model": MODEL, "messages": [], "stream": stream}
    made = Harness().call(body)
    made[USAGE] = Usage(3, 4)
    return made


@pytest.mark.parametrize(
    ("media_type", "data", "good"),
    [
        (JSON, b'{"choices":[]}', True),
        (JSON, b"[]", False),
        (JSON, b'{"cut', False),
        (JSON, b'{"error":{"message":"no","code":"x"}}', False),
        (STREAM, CHUNK + DONE, True),
        (STREAM, CHUNK, False),
        (STREAM, CHUNK + TROUBLE + DONE, False),
        (STREAM, CHUNK.replace(b"Hi", b"an error") + DONE, True),
        (STREAM, (CHUNK + TROUBLE + DONE).replace(b"\n", b"\r\n"), False),
        ("text/html", b"<html>", False),
    ],
)
def test_whole_answers_may_be_kept(media_type: str, data: bytes, good: bool) -> None:
    assert may_keep(call(), media_type, data) == good


def test_answer_of_another_cache_may_not() -> None:
    cached = call()
    cached[CACHED] = "hit"
    assert not may_keep(cached, JSON, b'{"choices":[]}')


def test_headers_of_the_moment_are_not_kept() -> None:
    headers = Headers(
        {"content-type": JSON, "x-own": "1", "set-cookie": "a", "date": "b", "age": "3"}
        | {"x-ratelimit-remaining-requests": "4", "x-sidecar-cache": "miss"}
    )
    made = entry_of(call(), "red", 200, headers, JSON, b"{}", now=NOW, ttl_s=60.0)
    assert made.headers == ((b"content-type", b"application/json"), (b"x-own", b"1"))
    assert (made.team, made.model, made.upstream) == ("red", MODEL, "fake")
    assert (made.created_at, made.expires_at, made.usage) == (NOW, NOW + 60.0, Usage(3, 4))


def test_answer_comes_again_as_it_came_and_marks_the_call() -> None:
    asked, harness = call(), Harness()
    reply = replay(asked, entry(created_at=NOW - 9), harness.clock)
    assert reply is not None
    assert reply.body.take() == b'{"ok": true}'
    assert dict(reply.headers.items())["age"] == "9"
    assert (asked[CACHED], asked[USAGE]) == ("hit", Usage(10, 20, cached=3))


@pytest.mark.parametrize("stream", [False, True])
def test_answer_comes_in_the_form_that_is_asked_for(stream: bool) -> None:
    whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": []}
    whole["choices"] = [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi"},
            "finish_reason": "stop",
        }
    ]
    kept: dict[str, Any] = (
        {"body": orjson.dumps(whole)}
        if stream
        else {"body": CHUNK + DONE, "media_type": STREAM, "headers": ()}
    )
    reply = replay(call(stream=stream), entry(**kept), Harness().clock)
    assert reply is not None
    data = reply.body.take()
    assert b'"Hi"' in data
    assert data.endswith(DONE) == stream
    expected = STREAM if stream else JSON
    assert (reply.body.media_type, dict(reply.headers.items())["content-type"]) == (
        expected,
        expected,
    )


def test_answer_without_that_form_is_none_and_leaves_the_call_as_it_is() -> None:
    asked = call(stream=True)
    assert replay(asked, entry(b'{"unheard": 1}'), Harness().clock) is None
    assert CACHED not in asked
    assert asked[USAGE] == Usage(3, 4)


def test_refusal_comes_again_whatever_form_is_asked_for() -> None:
    reply = replay(call(stream=True), entry(b'{"error": 1}', status=400), Harness().clock)
    assert reply is not None
    assert (reply.status, reply.body.take()) == (400, b'{"error": 1}')


def test_call_is_told_who_answered() -> None:
    asked = call()
    one, other = Target(FakeUpstream("one"), "m"), Target(FakeUpstream("other"), "m")
    asked.targets = (one, other)
    replay(asked, entry(upstream="other", upstream_model="m"), Harness().clock)
    assert asked.target is other
