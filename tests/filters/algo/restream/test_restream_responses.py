"""OpenAI responses: a recorded stream as a whole answer, and the other way round."""

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
from tests.support.sdk_parsers import response_events, response_from_stream, response_from_whole

RESPONSES = ("openai", "responses")
USAGE = {
    "input_tokens": 3,
    "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 8,
}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1_760_000_000,
    "completed_at": 1_760_000_009,
    "status": "completed",
    "model": "gpt-5",
    "output": [],
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": USAGE,
}


def text_part(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], **fields}


def message(*parts: Any) -> dict[str, Any]:
    base = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
    return {**base, "content": list(parts)}


def response(*output: Any, **fields: Any) -> dict[str, Any]:
    return {**RESPONSE, "output": list(output), **fields}


def stream(value: Any) -> bytes | None:
    return stream_of(*RESPONSES, orjson.dumps(value), include_usage=False)


def named(value: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), orjson.dumps(value))


def events(*values: Any) -> bytes:
    return b"".join(map(named, values))


def kinds(data: bytes) -> list[str]:
    return [event.name.decode().removeprefix("response.") for event in read(data)]


END = {"type": "response.completed", "response": response(message(text_part("Hi")))}
DELTA = {"type": "response.output_text.delta", "delta": "Hi"}


def test_the_whole_answer_stands_in_the_last_event() -> None:
    found = whole_of(*RESPONSES, events(DELTA, END))
    assert found is not None
    assert orjson.loads(found) == END["response"]
    assert whole_of(*RESPONSES, events(DELTA, END) + b"data: [DONE]\n\n") == found
    unnamed = events(DELTA, END).replace(b"event: response.output_text.delta\n", b"")
    assert whole_of(*RESPONSES, unnamed) == found


def test_an_answer_that_was_cut_at_its_limit_is_whole_too() -> None:
    value = response(status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    found = whole_of(*RESPONSES, events({"type": "response.incomplete", "response": value}))
    assert found is not None
    assert orjson.loads(found) == value


def test_usage_that_was_counted_elsewhere_is_put_in_only_where_none_is_reported() -> None:
    silent = {**END, "response": response(usage=None)}
    counted = Usage(3, 5, cached=1, reasoning=2)
    found = whole_of(*RESPONSES, events(silent), counted)
    assert found is not None
    assert orjson.loads(found)["usage"] == USAGE
    assert whole_of(*RESPONSES, events(END), Usage(1, 1)) == whole_of(*RESPONSES, events(END))


REFUSED = {
    "no end": events(DELTA),
    "a failure": events({"type": "response.failed", "response": response(status="failed")}),
    "another status": events({**END, "response": response(status="in_progress")}),
    "an error inside": events({**END, "response": response(error={"code": "server_error"})}),
    "no output": events({**END, "response": response(output=None)}),
    "an error": events({"type": "error", "code": "x", "message": "no"}, END),
    "an unknown event": events({"type": "response.new.delta"}, END),
    "audio": events({"type": "response.audio.delta", "delta": "AAAA"}, END),
    "something after the end": events(END, DELTA),
    "broken JSON": events(END).replace(b'"output"', b"output"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_stream_that_may_say_more_or_less_is_no_whole_answer(why: str) -> None:
    assert whole_of(*RESPONSES, REFUSED[why]) is None


def test_the_events_of_a_message_come_in_their_order() -> None:
    data = stream(response(message(text_part("word " * 50), {"type": "refusal", "refusal": "No"})))
    assert data is not None
    assert kinds(data) == [
        *("created", "in_progress", "output_item.added"),
        *("content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done"),
        *("content_part.added", "refusal.delta", "refusal.done", "content_part.done"),
        *("output_item.done", "completed"),
    ]
    values = [event.json() for event in read(data)]
    assert [value["sequence_number"] for value in values] == [*range(len(values))]
    assert values[0]["response"]["status"] == "in_progress"
    assert values[0]["response"]["usage"] is values[0]["response"]["completed_at"] is None
    assert values[2]["item"] == {**message(), "status": "in_progress"}


def test_reasoning_and_calls_of_tools_grow_piece_by_piece() -> None:
    call = {
        *(("id", "fc_1"), ("type", "function_call"), ("call_id", "call_1"), ("name", "f")),
        *(("arguments", '{"a":1}'), ("status", "completed")),
    }
    custom = {
        *(("id", "ctc_1"), ("type", "custom_tool_call"), ("call_id", "call_2"), ("name", "g")),
        ("input", "abc"),
    }
    reasoning = {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "First"}],
        "content": [{"type": "reasoning_text", "text": "Hm"}],
        "encrypted_content": "AAAA",
    }
    data = stream(response(reasoning, dict(call), dict(custom)))
    assert data is not None
    assert kinds(data)[2:-1] == [
        "output_item.added",
        *("reasoning_summary_part.added", "reasoning_summary_text.delta"),
        *("reasoning_summary_text.done", "reasoning_summary_part.done"),
        *("content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "output_item.added"),
        *("custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done"),
    ]


UNSTREAMABLE = {
    "an item of another kind": response({"id": "ws_1", "type": "web_search_call"}),
    "a part of another kind": response(message({"type": "output_audio", "data": "AAAA"})),
    "an item without an id": response({"type": "function_call", "arguments": "{}"}),
    "an error": response(error={"code": "server_error", "message": "no"}),
    "a failure": response(status="failed"),
    "one in the background": response(status="queued"),
}


@pytest.mark.parametrize("why", UNSTREAMABLE)
def test_an_answer_that_has_no_words_in_a_stream_is_none(why: str) -> None:
    assert stream(UNSTREAMABLE[why]) is None


# Both, against the SDK

TEXT = st.text(st.characters(codec="utf-8"), max_size=500)
TOKEN = st.fixed_dictionaries(
    {
        "token": TEXT,
        "bytes": st.just([1]),
        "logprob": st.just(-0.5),
        "top_logprobs": st.just([{"token": "a", "bytes": [97], "logprob": -1.5}]),
    }
)
ANNOTATION = st.fixed_dictionaries(
    {
        "type": st.just("url_citation"),
        "url": st.just("http://example.org"),
        "title": TEXT,
        "start_index": st.just(0),
        "end_index": st.just(1),
    }
)
PART = st.builds(
    lambda text, annotations, logprobs: text_part(text, annotations=annotations, logprobs=logprobs),
    TEXT,
    st.lists(ANNOTATION, max_size=2),
    st.lists(TOKEN, max_size=2),
) | st.builds(lambda text: {"type": "refusal", "refusal": text}, TEXT)
ITEM = (
    st.builds(lambda parts: message(*parts), st.lists(PART, max_size=3))
    | st.builds(
        lambda text: {"type": "function_call", "call_id": "c", "name": "f", "arguments": text},
        TEXT,
    )
    | st.builds(
        lambda text: {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": text}, TEXT
    )
    | st.builds(
        lambda texts: {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": text} for text in texts],
        },
        st.lists(TEXT, max_size=2),
    )
)
ITEMS = st.lists(ITEM, max_size=4).map(
    lambda items: [{**item, "id": f"item_{index}"} for index, item in enumerate(items)]
)


@given(ITEMS)
@settings(deadline=None, max_examples=50)
def test_the_sdk_puts_our_stream_together_to_what_it_reads_from_the_answer(items: Any) -> None:
    items = [
        {**item, "call_id": f"call_{index}"} if "call_id" in item else item
        for index, item in enumerate(items)
    ]
    answer = orjson.dumps(response(*items))
    data = stream(response(*items))
    assert data is not None
    assert whole_of(*RESPONSES, data) == answer
    assert response_from_stream(data) == response_from_whole(answer)


@given(st.lists(PART, min_size=1, max_size=3))
@settings(deadline=None, max_examples=25)
def test_every_event_is_what_the_sdk_has_a_type_for(parts: Any) -> None:
    data = stream(response(message(*parts)))
    assert data is not None
    found = response_events(data)
    assert [event.type for event in found] == [event.json()["type"] for event in read(data)]
    for event in found:
        type(event).model_validate(event.model_dump(warnings=False, exclude_unset=True))
    texts = "".join(event.delta for event in found if event.type == "response.output_text.delta")
    assert texts == "".join(part.get("text", "") for part in parts)


def test_pieces_are_of_moderate_size() -> None:
    data = stream(response(message(text_part("数" * 900))))
    assert data is not None
    deltas = [value["delta"] for event in read(data) if "delta" in (value := event.json())]
    assert len(deltas) == 5
    assert max(map(len, deltas)) == PIECE_CHARS


@pytest.mark.parametrize("limit", [{}, {"max_output_tokens": 2}])
def test_what_a_provider_streams_is_what_it_answers_whole(limit: dict[str, int]) -> None:
    path, request = "/v1/responses", {"model": "m", "input": "one two three", **limit}
    asked = orjson.dumps({**request, "stream": True})
    streamed = b"".join(mock.answer(path, asked, Settings()).events)
    answered = mock.answer(path, orjson.dumps(request), Settings()).body
    found = whole_of(*RESPONSES, streamed)
    assert found is not None
    assert _without_ids(orjson.loads(found)) == _without_ids(orjson.loads(answered))


def _without_ids(value: Any) -> Any:
    """The mock makes ids of the request, which is another one."""
    return {**value, "id": "", "output": [{**item, "id": ""} for item in value["output"]]}
