"""Qianfan v1: recorded frames as a whole answer, and the other way round."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.restream import stream_of, whole_of
from filters.algo.restream.events import PIECE_CHARS, read
from sidecar.api import Usage
from sidecar.mock import qianfan as mock
from sidecar.mock.script import Settings

CHAT = ("qianfan", "chat")
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
BASE = {"id": "as-1", "object": "chat.completion", "created": 1}


def frame(number: int, result: str, *, is_end: bool = False, **fields: Any) -> dict[str, Any]:
    place = {"sentence_id": number, "is_end": is_end}
    said = {"is_truncated": False, "result": result, "need_clear_history": False}
    return {**BASE, **place, **said, **fields}


def frames(*values: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % orjson.dumps(value) for value in values)


LAST = frame(1, "lo", is_end=True, usage=USAGE)


def test_results_are_joined_and_the_last_usage_counts() -> None:
    early = {**USAGE, "completion_tokens": 1}
    found = whole_of(*CHAT, frames(frame(0, "Hel", usage=early), LAST))
    assert found is not None
    said = {"is_truncated": False, "result": "Hello", "need_clear_history": False}
    assert orjson.loads(found) == {**BASE, **said, "usage": USAGE}


def test_usage_that_was_counted_elsewhere_is_put_in() -> None:
    found = whole_of(*CHAT, frames(frame(0, "a", is_end=True)), Usage(3, 5))
    assert found is not None
    assert orjson.loads(found)["usage"] == USAGE


REFUSED = {
    "nothing": b"",
    "no end": frames(frame(0, "a")),
    "something after the end": frames(LAST, frame(2, "a")),
    "an error": frames(frame(0, "a"), {"error_code": 18, "error_msg": "no"}),
    "a bare line of an error": frames(frame(0, "a")) + b'{"error_code":18,"error_msg":"no"}',
    "an unknown field": frames(frame(0, "a", search_info={}), LAST),
    "a call of a function": frames(frame(0, "", is_end=True, function_call={"name": "f"})),
    "another id": frames(frame(0, "a", id="as-2"), LAST),
}


@pytest.mark.parametrize("why", REFUSED)
def test_frames_that_may_say_more_or_less_are_no_whole_answer(why: str) -> None:
    assert whole_of(*CHAT, REFUSED[why]) is None


@given(st.text(st.characters(codec="utf-8"), max_size=900))
def test_an_answer_streamed_and_put_together_again_is_the_same(text: str) -> None:
    said = {"is_truncated": False, "result": text, "need_clear_history": False}
    value = {**BASE, **said, "finish_reason": "normal", "usage": USAGE}
    data = stream_of(*CHAT, orjson.dumps(value), include_usage=False)
    assert data is not None
    values = [event.json() for event in read(data)]
    assert [each["is_end"] for each in values] == [False] * (len(values) - 1) + [True]
    assert [each["sentence_id"] for each in values] == [*range(len(values))]
    assert max(len(each["result"]) for each in values) <= PIECE_CHARS
    found = whole_of(*CHAT, data)
    assert found is not None
    assert orjson.loads(found) == value


def test_what_a_provider_streams_is_what_it_answers_whole() -> None:
    path = "/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/ernie-speed"
    request = {"messages": [{"role": "user", "content": "one two three"}]}
    asked = orjson.dumps({**request, "stream": True})
    streamed = b"".join(mock.answer(path, asked, Settings()).events)
    answered = orjson.loads(mock.answer(path, orjson.dumps(request), Settings()).body)
    found = whole_of(*CHAT, streamed)
    assert found is not None
    assert {**orjson.loads(found), "id": ""} == {**answered, "id": ""}
