"""OpenAI chat: a recorded stream as a whole answer, and the other way round."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.algo.restream import stream_of, whole_of
from filters.algo.restream.events import PIECE_CHARS, read
from sidecar.api import Usage
from sidecar.mock import openai as mock
from sidecar.mock.script import Settings
from tests.support.sdk_parsers import chat_from_stream, chat_from_whole

CHAT = ("openai", "chat_completions")
HEAD = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1_760_000_000,
    "model": "gpt-4o",
    "service_tier": "default",
    "system_fingerprint": "fp_1",
}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 12,
    "total_tokens": 21,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 3},
}


def chunk(delta: Any = None, **choice: Any) -> dict[str, Any]:
    fields = {"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": None, **choice}
    return {**HEAD, "choices": [fields]}


def events(*values: Any, done: bool = True) -> bytes:
    data = b"".join(b"data: %b\n\n" % orjson.dumps(value) for value in values)
    return data + b"data: [DONE]\n\n" * done


STOP = chunk(finish_reason="stop")


def whole(*values: Any, usage: Usage | None = None) -> Any:
    found = whole_of(*CHAT, events(*values), usage)
    return found and orjson.loads(found)


def message_of(*deltas: Any) -> Any:
    found = whole(*map(chunk, deltas), STOP)
    return found and found["choices"][0]["message"]


# A stream as a whole answer


def test_text_refusal_and_reasoning_are_joined() -> None:
    message = message_of(
        {"role": "assistant", "content": "", "refusal": None},
        {"reasoning_content": "Let me "},
        {"reasoning_content": "think."},
        {"content": "Hel"},
        {"content": "lo"},
        {"refusal": "No"},
        {"refusal": "."},
    )
    assert message == {
        "role": "assistant",
        "content": "Hello",
        "refusal": "No.",
        "reasoning_content": "Let me think.",
    }


def test_parallel_tool_calls_come_in_fragments() -> None:
    def call(index: int, **fields: Any) -> Any:
        return {"tool_calls": [{"index": index, **fields}]}

    message = message_of(
        {"role": "assistant", "content": None},
        call(0, id="call_a", type="function", function={"name": "f", "arguments": ""}),
        call(1, id="call_b", type="function", function={"name": "g", "arguments": "{"}),
        call(0, function={"arguments": '{"x"'}),
        call(1, function={"arguments": "}"}),
        call(0, function={"arguments": ":1}"}),
    )
    assert message == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
            {"id": "call_b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_several_choices_and_their_logprobs_stay_apart() -> None:
    def token(text: str) -> Any:
        return {"token": text, "logprob": -0.25, "bytes": [*text.encode()], "top_logprobs": []}

    found = whole(
        chunk({"role": "assistant", "content": "a"}, logprobs={"content": [token("a")]}),
        chunk({"role": "assistant", "content": "x"}, index=1),
        chunk({"content": "b"}, logprobs={"content": [token("b")], "refusal": None}),
        chunk({"content": "y"}, index=1),
        chunk(index=1, finish_reason="length"),
        STOP,
    )
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ab"},
            "logprobs": {"content": [token("a"), token("b")], "refusal": None},
            "finish_reason": "stop",
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": "xy"},
            "logprobs": None,
            "finish_reason": "length",
        },
    ]


def test_the_head_and_the_last_usage_are_kept() -> None:
    early = {**USAGE, "completion_tokens": 1}
    found = whole(
        {**chunk({"content": "a"}), "usage": early, "obfuscation": "xyzzy"},
        {**STOP, "service_tier": None, "usage": None},
        {**HEAD, "choices": [], "usage": USAGE},
    )
    assert found == {
        **HEAD,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }


def test_usage_that_was_counted_elsewhere_is_put_in_only_where_none_is_reported() -> None:
    counted = Usage(input=9, output=12, cached=4, reasoning=3)
    assert whole(chunk({"content": "a"}), STOP, usage=counted)["usage"] == USAGE
    reported = {**HEAD, "choices": [], "usage": {**USAGE, "total_tokens": 99}}
    assert whole(chunk({"content": "a"}), STOP, reported, usage=counted)["usage"] == (
        {**USAGE, "total_tokens": 99}
    )
    assert "usage" not in whole(chunk({"content": "a"}), STOP)


REFUSED = {
    "no end": events(chunk({"content": "a"}), STOP, done=False),
    "no finish reason": events(chunk({"content": "a"})),
    "one choice of two unfinished": events(chunk({"content": "a"}, index=1), STOP),
    "a choice is missing": events(chunk({"content": "a"}, index=1, finish_reason="stop")),
    "something after the end": events(STOP) + events(STOP, done=False),
    "an error event": events(chunk({"content": "a"}), {"error": {"message": "overloaded"}}),
    "an error event beside": events({**STOP, "error": {"message": "overloaded"}}),
    "audio": events(chunk({"audio": {"id": "a", "data": "AAAA"}}), STOP),
    "an unknown delta": events(chunk({"images": [1]}), STOP),
    "an unknown field of a choice": events(chunk({"content": "a"}, seen=True), STOP),
    "an unknown field of the head": events({**STOP, "prompt_filter_results": [{}]}),
    "another id": events(chunk({"content": "a"}), {**STOP, "id": "chatcmpl-2"}),
    "another object": events({**STOP, "object": "chat.completion"}),
    "two finish reasons": events(chunk(finish_reason="length"), STOP),
    "text that is none": events(chunk({"content": [{"type": "text"}]}), STOP),
    "another role": events(chunk({"role": "user"}), STOP),
    "annotations that are no list": events(chunk({"annotations": "a"}), STOP),
    "a named event": events(STOP).replace(b"data: {", b"event: new\ndata: {"),
    "broken JSON": events(STOP).replace(b'"index"', b"index"),
    "a call without an index": events(chunk({"tool_calls": [{"id": "a"}]}), STOP),
    "a call without a name": events(chunk({"tool_calls": [{"index": 0, "id": "a"}]}), STOP),
    "a call of two ids": events(
        chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f"}}]}),
        chunk({"tool_calls": [{"index": 0, "id": "b"}]}),
        STOP,
    ),
    "a name in fragments": events(
        chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "get_"}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"name": "time"}}]}),
        STOP,
    ),
    "a call of a new type": events(
        chunk({"tool_calls": [{"index": 0, "id": "a", "type": "custom", "custom": {}}]}), STOP
    ),
    "a number that is rounded": events(STOP).replace(b"1760000000", b"9" * 20),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_stream_that_may_say_more_or_less_is_no_whole_answer(why: str) -> None:
    assert whole_of(*CHAT, events(chunk({"content": "a"}), STOP)) is not None
    assert whole_of(*CHAT, REFUSED[why]) is None


def test_fields_that_are_null_say_nothing() -> None:
    assert whole(
        {**chunk({"content": "a", "audio": None}, stop_reason=None), "prompt_logprobs": None}, STOP
    ) == whole(chunk({"content": "a"}), STOP)


# A whole answer as a stream


def answer(message: Any = None, **fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Hello.", "refusal": None, **(message or {})}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    base = {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}
    return {**base, **fields}


def stream(value: Any, include_usage: bool = True) -> bytes | None:
    return stream_of(*CHAT, orjson.dumps(value), include_usage=include_usage)


def test_a_text_comes_in_several_events_of_moderate_size() -> None:
    data = stream(answer({"content": "word " * 200}))
    assert data is not None
    pieces = [
        value["choices"][0]["delta"]["content"]
        for event in read(data)
        if (value := event.json()) and value["choices"] and "content" in str(value)
        if "content" in value["choices"][0]["delta"]
    ]
    assert "".join(pieces) == "word " * 200
    assert len(pieces) == 1 + 5
    assert max(map(len, pieces)) <= PIECE_CHARS


def test_it_begins_with_the_role_and_ends_with_done() -> None:
    data = stream(answer(), include_usage=False)
    assert data == events(
        chunk({"role": "assistant", "content": "", "refusal": None}),
        chunk({"content": "Hello."}),
        STOP,
    )


def test_usage_is_an_event_of_its_own_for_those_who_asked() -> None:
    with_usage, without = stream(answer()), stream(answer(), include_usage=False)
    assert with_usage is not None
    assert without is not None
    *others, last = [event.json() for event in read(with_usage)[:-1]]
    assert last == {**HEAD, "choices": [], "usage": USAGE}
    assert all(value["usage"] is None for value in others)
    assert b"usage" not in without


def test_a_number_that_some_providers_give_each_call_is_its_place() -> None:
    def calls(*indexes: int) -> Any:
        function = {"name": "f", "arguments": "{}"}
        return [
            {"index": index, "id": f"c{index}", "type": "function", "function": function}
            for index in indexes
        ]

    data = stream(answer({"content": None, "tool_calls": calls(0, 1)}))
    assert data is not None
    found = chat_from_stream(data)["choices"][0]["message"]["tool_calls"]
    assert [call["id"] for call in found] == ["c0", "c1"]
    assert stream(answer({"content": None, "tool_calls": calls(1, 0)})) is None


UNSTREAMABLE = {
    "audio": answer({"audio": {"id": "a"}}),
    "parts": answer({"content": [{"type": "text", "text": "a"}]}),
    "an unknown field of the message": answer({"reasoning_details": [{}]}),
    "an unknown field": answer(citations=["http://example.org"]),
    "another role": answer({"role": "user"}),
    "no choices": answer(choices=[]),
    "no finish reason": answer(
        choices=[{"index": 0, "message": {"role": "assistant"}, "finish_reason": None}]
    ),
    "choices out of order": answer(
        choices=[
            {"index": 1, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
        ]
    ),
    "a custom tool": answer({"tool_calls": [{"id": "a", "type": "custom", "custom": {}}]}),
    "another object": answer(object="chat.completion.chunk"),
}


@pytest.mark.parametrize("why", UNSTREAMABLE)
def test_an_answer_that_has_no_words_in_a_stream_is_none(why: str) -> None:
    assert stream(UNSTREAMABLE[why]) is None


def test_a_number_that_would_be_rounded_is_refused() -> None:
    data = orjson.dumps(answer()).replace(b"1760000000", b"99999999999999999999")
    assert stream_of(*CHAT, data, include_usage=True) is None


# Both, against the SDK

TEXT = st.text(st.characters(codec="utf-8"), max_size=60) | st.builds(
    lambda word, times: word * times,
    st.sampled_from(["word ", "数据", "no-break-here", "🙂 \n", '"\\', "\u2028"]),
    st.integers(1, 150),
)
MAYBE = st.none() | TEXT
NAMES = st.text("abcdefgh_", min_size=1, max_size=8)
CALL = st.fixed_dictionaries(
    {
        "id": NAMES,
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": NAMES, "arguments": TEXT}),
    }
)
ANNOTATION = st.fixed_dictionaries(
    {
        "type": st.just("url_citation"),
        "url_citation": st.fixed_dictionaries(
            {"start_index": st.integers(0, 9), "end_index": st.integers(0, 9), "url": NAMES}
        ),
    }
)
TOKEN = st.fixed_dictionaries(
    {
        "token": TEXT,
        "logprob": st.floats(-100, 0),
        "bytes": st.none() | st.lists(st.integers(0, 255), max_size=3),
        "top_logprobs": st.just([]),
    }
)
LOGPROBS = st.fixed_dictionaries(
    {
        "content": st.none() | st.lists(TOKEN, max_size=3),
        "refusal": st.none() | st.lists(TOKEN, max_size=2),
    }
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": MAYBE},
    optional={
        "refusal": MAYBE,
        "reasoning_content": MAYBE,
        "reasoning": MAYBE,
        "annotations": st.lists(ANNOTATION, max_size=2),
        "tool_calls": st.lists(CALL, max_size=3),
        "function_call": st.fixed_dictionaries({"name": NAMES, "arguments": TEXT}),
    },
)


@st.composite
def completions(draw: st.DrawFn) -> dict[str, Any]:
    choices = []
    for index in range(draw(st.integers(1, 3))):
        choice = {"index": index, "message": draw(MESSAGE)}
        if draw(st.booleans()):
            choice["logprobs"] = draw(st.none() | LOGPROBS)
        reasons = ["stop", "length", "tool_calls", "content_filter"]
        choices.append({**choice, "finish_reason": draw(st.sampled_from(reasons))})
    value = {**HEAD, "object": "chat.completion", "choices": choices}
    if draw(st.booleans()):
        value["usage"] = USAGE
    if draw(st.booleans()):
        del value["service_tier"]
        value["system_fingerprint"] = None
    return value


@given(completions())
@settings(deadline=None)
def test_an_answer_streamed_and_put_together_again_is_the_same(value: dict[str, Any]) -> None:
    data = stream(value)
    assert data is not None
    found = whole_of(*CHAT, data)
    assert found is not None
    assert orjson.loads(found) == value


@given(completions())
@settings(deadline=None, max_examples=50)
def test_the_sdk_puts_our_stream_together_to_what_it_reads_from_the_answer(
    value: dict[str, Any],
) -> None:
    data = stream(value)
    assert data is not None
    assert chat_from_stream(data) == chat_from_whole(orjson.dumps(value))


REQUESTS = {
    "text": {"messages": [{"role": "user", "content": "one two three"}]},
    "a limit": {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 2},
    "a tool": {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                },
            }
        ],
    },
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_a_provider_streams_is_what_it_answers_whole(name: str) -> None:
    request = {"model": "m", **REQUESTS[name]}
    path = "/v1/chat/completions"
    asked = {**request, "stream": True, "stream_options": {"include_usage": True}}
    streamed = b"".join(mock.answer(path, orjson.dumps(asked), Settings()).events)
    answered = orjson.loads(mock.answer(path, orjson.dumps(request), Settings()).body)
    found = whole_of(*CHAT, streamed)
    assert found is not None
    value = orjson.loads(found)
    assert _without_ids(value) == _without_ids(answered)
    assert chat_from_stream(streamed) == chat_from_whole(found)


def _without_ids(value: Any) -> Any:
    """The mock makes ids of the request, which is another one."""
    for call in value["choices"][0]["message"].get("tool_calls", ()):
        del call["id"]
    return {**value, "id": ""}
