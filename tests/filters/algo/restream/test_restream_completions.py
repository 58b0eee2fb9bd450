"""OpenAI completions: a recorded stream as a whole answer, and the other way round."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.algo.restream import stream_of, whole_of
from sidecar.api import Usage
from sidecar.mock import openai as mock
from sidecar.mock.script import Settings
from tests.support.sdk_parsers import completion_from_stream, completion_from_whole

COMPLETIONS = ("openai", "completions")
HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def chunk(text: str, **choice: Any) -> dict[str, Any]:
    return {**HEAD, "choices": [{"index": 0, "text": text, "finish_reason": None, **choice}]}


def events(*values: Any, done: bool = True) -> bytes:
    data = b"".join(b"data: %b\n\n" % orjson.dumps(value) for value in values)
    return data + b"data: [DONE]\n\n" * done


def test_texts_and_logprobs_are_joined() -> None:
    def logprobs(token: str, offset: int) -> Any:
        lists = {"tokens": [token], "token_logprobs": [-1.5], "text_offset": [offset]}
        return {**lists, "top_logprobs": None}

    found = whole_of(
        *COMPLETIONS,
        events(
            chunk("Hel", logprobs=logprobs("Hel", 0)),
            chunk("lo", logprobs=logprobs("lo", 3)),
            chunk("x", index=1, finish_reason="length"),
            chunk("", finish_reason="stop"),
            {**HEAD, "choices": [], "usage": USAGE},
        ),
    )
    assert found is not None
    joined = {
        "tokens": ["Hel", "lo"],
        "token_logprobs": [-1.5, -1.5],
        "text_offset": [0, 3],
        "top_logprobs": None,
    }
    assert orjson.loads(found) == {
        **HEAD,
        "choices": [
            {"index": 0, "text": "Hello", "finish_reason": "stop", "logprobs": joined},
            {"index": 1, "text": "x", "finish_reason": "length"},
        ],
        "usage": USAGE,
    }


REFUSED = {
    "no end": events(chunk("a", finish_reason="stop"), done=False),
    "no finish reason": events(chunk("a")),
    "two finish reasons": events(chunk("", finish_reason="a"), chunk("", finish_reason="b")),
    "an error": events(chunk("a", finish_reason="stop"), {"error": {"message": "no"}}),
    "an unknown field": events(chunk("a", finish_reason="stop", prompt_logprobs=[1])),
    "unknown logprobs": events(chunk("a", finish_reason="stop", logprobs={"new": []})),
    "no text": events({**HEAD, "choices": [{"index": 0, "finish_reason": "stop"}]}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_stream_that_may_say_more_or_less_is_no_whole_answer(why: str) -> None:
    assert whole_of(*COMPLETIONS, events(chunk("a", finish_reason="stop"))) is not None
    assert whole_of(*COMPLETIONS, REFUSED[why]) is None


def test_usage_that_was_counted_elsewhere_is_put_in() -> None:
    found = whole_of(*COMPLETIONS, events(chunk("a", finish_reason="stop")), Usage(1, 2))
    assert found is not None
    assert orjson.loads(found)["usage"].items() >= USAGE.items()


@st.composite
def completions(draw: st.DrawFn) -> dict[str, Any]:
    texts = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=500), min_size=1))
    choices = []
    for index, text in enumerate(texts):
        choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": "stop"}
        if draw(st.booleans()):
            tokens = {"tokens": [text], "token_logprobs": [-0.5], "text_offset": [0]}
            choice["logprobs"] = draw(st.sampled_from([None, tokens]))
        choices.append(choice)
    usage = {"usage": USAGE} if draw(st.booleans()) else {}
    return {**HEAD, "choices": choices, **usage}


@given(completions())
@settings(deadline=None, max_examples=50)
def test_an_answer_streamed_and_put_together_again_is_the_same(value: dict[str, Any]) -> None:
    answer = orjson.dumps(value)
    data = stream_of(*COMPLETIONS, answer, include_usage=True)
    assert data is not None
    found = whole_of(*COMPLETIONS, data)
    assert found is not None
    assert orjson.loads(found) == value
    assert completion_from_stream(data) == completion_from_whole(answer)


def test_usage_is_left_out_for_those_who_did_not_ask() -> None:
    answer = orjson.dumps({**chunk("a", finish_reason="stop"), "usage": USAGE})
    data = stream_of(*COMPLETIONS, answer, include_usage=False)
    assert data == events(chunk("a"), chunk("", finish_reason="stop"))


def test_what_a_provider_streams_is_what_it_answers_whole() -> None:
    path, request = "/v1/completions", {"model": "m", "prompt": "one two three"}
    asked = {**request, "stream": True, "stream_options": {"include_usage": True}}
    streamed = b"".join(mock.answer(path, orjson.dumps(asked), Settings()).events)
    answered = orjson.loads(mock.answer(path, orjson.dumps(request), Settings()).body)
    found = whole_of(*COMPLETIONS, streamed)
    assert found is not None
    assert {**orjson.loads(found), "id": ""} == {**answered, "id": ""}
