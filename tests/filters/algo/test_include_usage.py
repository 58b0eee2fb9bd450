"""Usage is asked for with no other change, and exactly what that adds is taken away."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo import include_usage
from filters.algo.include_usage import UsageRemover, ask_for_usage
from tests.support.harness import MODEL, Harness

TEXT = b'data: {"choices":[{"delta":{"content":"\xc3\xa9 total_tokens\\" x"}}],"usage":null}'
FINISH = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}'
ALONE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
WITH_TEXT = b'data: {"choices":[{"delta":{"content":"x"}}],"usage":{"prompt_tokens":1}}'
FILTERED = b'data: {"choices":[],"prompt_filter_results":[{"prompt_index":0}]}'
COMMENT = b': keep-alive _tokens"'
DONE = b"data: [DONE]"


def removed(*pieces: bytes) -> bytes:
    remover = UsageRemover()
    return b"".join([*map(remover.feed, pieces), remover.finish()])


def joined(events: list[bytes], border: bytes) -> bytes:
    return b"".join(event + border for event in events)


@pytest.mark.parametrize("border", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_usage_alone_is_taken_out_wherever_it_is_cut(border: bytes) -> None:
    kept = [TEXT, COMMENT, FILTERED, FINISH, WITH_TEXT]
    data = joined([*kept, ALONE, DONE], border)
    expected = joined([*kept, DONE], border)
    for at in range(len(data) + 1):
        assert removed(data[:at], data[at:]) == expected
    assert removed(*(data[at : at + 1] for at in range(len(data)))) == expected


@given(
    st.lists(st.sampled_from([TEXT, FINISH, WITH_TEXT, FILTERED, COMMENT, DONE]), max_size=8),
    st.lists(st.integers(0, 2000), max_size=12),
)
def test_all_other_events_pass_as_they_came(events: list[bytes], cuts: list[int]) -> None:
    data = joined(events, b"\n\n")
    edges = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges) if a < b]
    assert removed(*pieces) == data


def test_whole_events_pass_at_once() -> None:
    remover = UsageRemover()
    assert remover.feed(TEXT.replace(b'_tokens"', b"x") + b"\n\n") != b""
    assert remover.feed(FINISH + b"\n\n") == FINISH + b"\n\n"


def test_usage_alone_as_the_last_event_without_a_blank_line_is_taken_out() -> None:
    assert removed(TEXT + b"\n\n" + ALONE + b"\n") == TEXT + b"\n\n"
    assert removed(TEXT + b"\n\n" + DONE) == TEXT + b"\n\n" + DONE


def test_event_that_never_ends_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(include_usage, "MAX_EVENT_BYTES", 100)
    remover = UsageRemover()
    passed = b"".join(remover.feed(b"data: " + b"x" * 50) for _ in range(10))
    assert len(passed) >= 400
    assert passed + remover.finish() == (b"data: " + b"x" * 50) * 10


async def asked(body: bytes | dict[str, Any]) -> tuple[bool, bytes, dict[str, Any]]:
    async with Harness() as harness:
        call = harness.call(body)
        done = ask_for_usage(call)
        assert call.body is not None
        assert orjson.loads(call.body) == call.json
        return done, call.body, call.json


async def test_all_other_fields_stay_the_bytes_that_they_are() -> None:
    body = b'{ "model" : "%b",\n "seed": 1e2, "messages":[]  }\n' % MODEL.encode()
    done, sent, _ = await asked(body)
    assert done
    end = b',"stream_options":{"include_usage":true}}'
    assert sent == body.rstrip()[:-1] + end


@pytest.mark.parametrize(
    "options", [{}, None, {"include_usage": False}, {"include_obfuscation": True}]
)
async def test_options_that_are_there_are_kept(options: dict[str, Any] | None) -> None:
    done, _, fields = await asked({"model": MODEL, "stream_options": options})
    assert done
    assert fields["stream_options"] == {**(options or {}), "include_usage": True}


@pytest.mark.parametrize("options", [{"include_usage": True}, "x", [1], 5])
async def test_caller_that_asks_itself_and_nonsense_are_left_alone(options: Any) -> None:
    body = orjson.dumps({"model": MODEL, "stream_options": options})
    assert await asked(body) == (False, body, orjson.loads(body))
