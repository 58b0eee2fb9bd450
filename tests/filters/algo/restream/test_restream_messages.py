"""Anthropic messages: a recorded stream as a whole answer, and the other way round."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.algo.restream import stream_of, whole_of
from filters.algo.restream.events import PIECE_CHARS, read
from sidecar.api import Usage
from sidecar.mock import anthropic as mock
from sidecar.mock.script import Settings
from tests.support.sdk_parsers import message_from_stream, message_from_whole

MESSAGES = ("anthropic", "messages")
USAGE = {
    "input_tokens": 9,
    "cache_creation_input_tokens": 2,
    "cache_read_input_tokens": 3,
    "cache_creation": {"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 0},
    "output_tokens": 40,
    "service_tier": "standard",
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {**USAGE, "output_tokens": 1},
}


def events(*values: Any) -> bytes:
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (value["type"].encode(), orjson.dumps(value))
        for value in values
    )


def block(index: int, start: Any, *deltas: Any) -> list[Any]:
    place = {"index": index}
    return [
        {"type": "content_block_start", **place, "content_block": start},
        *({"type": "content_block_delta", **place, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", **place},
    ]


def text(piece: str) -> Any:
    return {"type": "text_delta", "text": piece}


def partial(piece: str) -> Any:
    return {"type": "input_json_delta", "partial_json": piece}


START = {"type": "message_start", "message": MESSAGE}
PING = {"type": "ping"}
END = {
    "type": "message_delta",
    "delta": {"stop_reason": "end_turn", "stop_sequence": None},
    "usage": {"output_tokens": 40},
}
STOP = {"type": "message_stop"}
TEXT_START = {"type": "text", "text": ""}
TOOL_START = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
HELLO = block(0, TEXT_START, text("Hel"), text("lo"))


def whole(*values: Any, usage: Usage | None = None) -> Any:
    found = whole_of(*MESSAGES, events(*values), usage)
    return found and orjson.loads(found)


def content(*blocks: list[Any]) -> Any:
    found = whole(START, *(event for each in blocks for event in each), END, STOP)
    return found and found["content"]


# A stream as a whole answer


def test_text_and_usage_are_put_together() -> None:
    assert whole(PING, START, PING, *HELLO, END, STOP) == {
        **MESSAGE,
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "usage": USAGE,
    }


def test_the_end_of_a_stream_tells_the_last_figures_and_why_it_stopped() -> None:
    delta = {"stop_reason": "stop_sequence", "stop_sequence": "END", "stop_details": None}
    figures = {"input_tokens": 90, "cache_read_input_tokens": None, "output_tokens": 7}
    found = whole(
        START, *HELLO, END, {"type": "message_delta", "delta": delta, "usage": figures}, STOP
    )
    assert found["stop_reason"] == "stop_sequence"
    assert found["stop_sequence"] == "END"
    assert found["usage"] == {**USAGE, "input_tokens": 90, "output_tokens": 7}


def test_thinking_has_its_signature() -> None:
    start = {"type": "thinking", "thinking": "", "signature": ""}
    deltas = [
        {"type": "thinking_delta", "thinking": "Let me "},
        {"type": "thinking_delta", "thinking": "think."},
        {"type": "signature_delta", "signature": "c2ln"},
    ]
    hidden = {"type": "redacted_thinking", "data": "AAAA"}
    assert content(block(0, start, *deltas), block(1, hidden)) == [
        {"type": "thinking", "thinking": "Let me think.", "signature": "c2ln"},
        hidden,
    ]


def test_the_input_of_a_tool_is_parsed_and_empty_without_arguments() -> None:
    pieces = [partial(""), partial('{"a": [1'), partial(', 2.5], "b": "\\u6570"}')]
    assert content(
        block(0, TOOL_START, *pieces), block(1, TOOL_START, partial("")), block(2, TOOL_START)
    ) == [
        {**TOOL_START, "input": {"a": [1, 2.5], "b": "数"}},
        TOOL_START,
        TOOL_START,
    ]


def test_citations_are_collected() -> None:
    cited = {"type": "char_location", "cited_text": "a", "document_index": 0}
    delta = {"type": "citations_delta", "citation": cited}
    start = {**TEXT_START, "citations": []}
    assert content(block(0, start, text("a"), delta, delta)) == [
        {"type": "text", "text": "a", "citations": [cited, cited]}
    ]


def test_server_tools_and_their_results_are_as_they_began() -> None:
    search = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}
    result = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}
    assert content(block(0, search, partial('{"query":"a"}')), block(1, result)) == [
        {**search, "input": {"query": "a"}},
        result,
    ]


def test_usage_that_was_counted_elsewhere_is_put_in_only_where_none_is_reported() -> None:
    silent = {**START, "message": {**MESSAGE, "usage": None}}
    end = {**END, "usage": None}
    counted = Usage(input=14, output=40, cached=3, cache_write=2)
    assert whole(silent, *HELLO, end, STOP, usage=counted)["usage"] == {
        "input_tokens": 9,
        "cache_creation_input_tokens": 2,
        "cache_read_input_tokens": 3,
        "output_tokens": 40,
    }
    assert whole(START, *HELLO, END, STOP, usage=Usage(1, 1))["usage"] == USAGE


TOOL = block(0, TOOL_START)
REFUSED = {
    "no start": [*HELLO, END, STOP],
    "no end": [START, *HELLO, STOP],
    "no stop": [START, *HELLO, END],
    "something after the stop": [START, *HELLO, END, STOP, PING],
    "a block that did not end": [START, *HELLO[:-1], END, STOP],
    "a delta outside of its block": [START, *HELLO, HELLO[1], END, STOP],
    "a block is missing": [START, *block(1, TEXT_START), END, STOP],
    "two blocks at once": [START, HELLO[0], *block(1, TEXT_START), HELLO[-1], END, STOP],
    "an error": [START, *HELLO, {"type": "error", "error": {"type": "overloaded_error"}}],
    "an unknown event": [START, {"type": "new"}, *HELLO, END, STOP],
    "an unknown block": [START, *block(0, {"type": "new"}), END, STOP],
    "an unknown delta": [START, *block(0, TEXT_START, {"type": "new_delta"}), END, STOP],
    "an unknown field of a delta": [
        *(START, *block(0, TEXT_START, {**text("a"), "new": 1}), END, STOP)
    ],
    "a delta of another block": [START, *block(0, TEXT_START, partial("{}")), END, STOP],
    "input that broke off": [START, *block(0, TOOL_START, partial('{"a"')), END, STOP],
    "input that is no object": [START, *block(0, TOOL_START, partial("[1]")), END, STOP],
    "input that would be rounded": [
        *(START, *block(0, TOOL_START, partial('{"a": 99999999999999999999}')), END, STOP)
    ],
    "input that says a name twice": [
        *(START, *block(0, TOOL_START, partial('{"a": 1, "a": 2}')), END, STOP)
    ],
    "an unknown end": [START, *HELLO, {**END, "context_management": {}}, STOP],
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_stream_that_may_say_more_or_less_is_no_whole_answer(why: str) -> None:
    assert whole(START, *HELLO, END, STOP) is not None
    assert whole(*REFUSED[why]) is None


# A whole answer as a stream


def message(*blocks: Any, **fields: Any) -> dict[str, Any]:
    base = {**MESSAGE, "content": list(blocks), "stop_reason": "end_turn", "usage": USAGE}
    return {**base, **fields}


def stream(value: Any) -> bytes | None:
    return stream_of(*MESSAGES, orjson.dumps(value), include_usage=False)


def test_events_come_in_their_order_and_report_the_usage() -> None:
    data = stream(message({"type": "text", "text": "word " * 50}))
    assert data is not None
    values = [event.json() for event in read(data)]
    assert [value["type"] for value in values] == [
        *("message_start", "content_block_start"),
        *("content_block_delta", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert [event.name.decode() for event in read(data)] == [value["type"] for value in values]
    assert values[0]["message"] == MESSAGE
    assert values[-2]["usage"]["output_tokens"] == 40
    assert max(len(value["delta"]["text"]) for value in values[2:4]) <= PIECE_CHARS


UNSTREAMABLE = {
    "an unknown block": message({"type": "new"}),
    "no stop reason": message(stop_reason=None),
    "no usage": message(usage=None),
    "an error": {"type": "error", "error": {"type": "overloaded_error", "message": "no"}},
    "input that is no object": message({**TOOL_START, "input": [1]}),
    "context management": message(context_management={"applied_edits": []}),
}


@pytest.mark.parametrize("why", UNSTREAMABLE)
def test_an_answer_that_has_no_words_in_a_stream_is_none(why: str) -> None:
    assert stream(UNSTREAMABLE[why]) is None


# Both, against the SDK

TEXT = st.text(st.characters(codec="utf-8"), max_size=500)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=5,
)
CITATION = st.fixed_dictionaries(
    {
        "type": st.just("char_location"),
        "cited_text": TEXT,
        "document_index": st.just(0),
        "document_title": st.none(),
        "start_char_index": st.just(0),
        "end_char_index": st.just(1),
    }
)
BLOCK = (
    st.fixed_dictionaries(
        {"type": st.just("text"), "text": TEXT},
        optional={"citations": st.none() | st.lists(CITATION, max_size=2)},
    )
    | st.fixed_dictionaries(
        {"type": st.just("thinking"), "thinking": TEXT, "signature": st.text("abc=", max_size=9)}
    )
    | st.fixed_dictionaries({"type": st.just("redacted_thinking"), "data": st.just("AAAA")})
    | st.fixed_dictionaries(
        {
            "type": st.sampled_from(["tool_use", "server_tool_use"]),
            "id": st.just("toolu_1"),
            "name": st.just("web_search"),
            "input": st.dictionaries(TEXT, JSON, max_size=3),
        }
    )
)
END_FIELDS = st.fixed_dictionaries(
    {"stop_reason": st.sampled_from(["end_turn", "tool_use", "max_tokens"])},
    optional={
        "stop_details": st.none(),
        "container": st.none()
        | st.just({"id": "container_1", "expires_at": "2030-01-01T00:00:00Z"}),
    },
)
FIGURES = st.fixed_dictionaries(
    {},
    optional={
        "server_tool_use": st.none() | st.just({"web_search_requests": 1, "web_fetch_requests": 0}),
        "output_tokens_details": st.just({"thinking_tokens": 3}),
        "cache_read_input_tokens": st.none(),
    },
)
ANSWERS = st.builds(
    lambda blocks, end, figures: message(*blocks, **end, usage={**USAGE, **figures}),
    st.lists(BLOCK, max_size=4),
    END_FIELDS,
    FIGURES,
)


@given(ANSWERS)
@settings(deadline=None)
def test_an_answer_streamed_and_put_together_again_is_the_same(value: dict[str, Any]) -> None:
    data = stream(value)
    assert data is not None
    found = whole_of(*MESSAGES, data)
    assert found is not None
    assert orjson.loads(found) == value


@given(ANSWERS)
@settings(deadline=None, max_examples=50)
def test_the_sdk_puts_our_stream_together_to_what_it_reads_from_the_answer(
    value: dict[str, Any],
) -> None:
    data = stream(value)
    assert data is not None
    from_stream = message_from_stream(data)
    from_whole = message_from_whole(orjson.dumps(value))
    for found in (from_stream, from_whole):  # none, or an empty list of them: the SDK has both
        for each in found["content"]:
            if not each.get("citations"):
                each.pop("citations", None)
    assert from_stream == from_whole


REQUESTS: dict[str, Any] = {
    "text": {"max_tokens": 100},
    "a limit": {"max_tokens": 2},
    "a tool": {
        "max_tokens": 100,
        "tools": [{"name": "f", "input_schema": {"properties": {"city": {"type": "string"}}}}],
    },
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_a_provider_streams_is_what_it_answers_whole(name: str) -> None:
    words = [{"role": "user", "content": "one two three"}]
    request = {"model": "m", "messages": words, **REQUESTS[name]}
    path = "/v1/messages"
    asked = orjson.dumps({**request, "stream": True})
    streamed = b"".join(mock.answer(path, asked, Settings()).events)
    answered = mock.answer(path, orjson.dumps(request), Settings()).body
    found = whole_of(*MESSAGES, streamed)
    assert found is not None
    assert _without_ids(orjson.loads(found)) == _without_ids(orjson.loads(answered))
    assert message_from_stream(streamed) == message_from_whole(found)


def _without_ids(value: Any) -> Any:
    """The mock makes ids of the request, which is another one."""
    return {**value, "id": "", "content": [{**each, "id": ""} for each in value["content"]]}
