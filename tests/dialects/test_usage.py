"""Usage wherever a provider reports it: in every shape, and missing where it is missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
import pytest

from sidecar.call import Usage
from sidecar.dialects import ANTHROPIC, DASHSCOPE, OPENAI, QIANFAN, Dialect
from sidecar.dialects.fields import MOST_TOKENS
from sidecar.sse import Decoder, Event, JsonEvent, encode


def event(data: Any, name: str | None = None) -> Event:
    (found,) = Decoder().feed(encode(data if isinstance(data, bytes) else orjson.dumps(data), name))
    return found


def last_usage(dialect: Dialect, events: Iterable[Event]) -> Usage | None:
    usage = None
    for each in events:
        usage = dialect.usage(each, usage)
    return usage


CHAT = {
    "prompt_tokens": 100,
    "completion_tokens": 40,
    "total_tokens": 140,
    "prompt_tokens_details": {"cached_tokens": 64, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 30, "accepted_prediction_tokens": 0},
}
RESPONSES = {
    "input_tokens": 100,
    "input_tokens_details": {"cached_tokens": 64},
    "output_tokens": 40,
    "output_tokens_details": {"reasoning_tokens": 30},
    "total_tokens": 140,
}
FULL = Usage(input=100, output=40, cached=64, reasoning=30)

OPENAI_SHAPES: dict[str, tuple[Any, Usage | None]] = {
    "chat": ({"object": "chat.completion", "choices": [], "usage": CHAT}, FULL),
    "last chunk": ({"object": "chat.completion.chunk", "choices": [], "usage": CHAT}, FULL),
    "completions": (
        {"object": "text_completion", "usage": {"prompt_tokens": 5, "completion_tokens": 7}},
        Usage(5, 7),
    ),
    "embeddings": (
        {"object": "list", "data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}},
        Usage(8, 0),
    ),
    "responses": ({"object": "response", "usage": RESPONSES}, FULL),
    "response.completed": (
        {"type": "response.completed", "response": {"id": "r", "usage": RESPONSES}},
        FULL,
    ),
    "response.created": (
        {"type": "response.created", "response": {"id": "r", "usage": None}},
        None,
    ),
    "no details": ({"usage": {"prompt_tokens": 1, "completion_tokens": 2}}, Usage(1, 2)),
    "details are null": (
        {
            "usage": {
                "prompt_tokens": 1,
                "completion_tokens": 2,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            }
        },
        Usage(1, 2),
    ),
    "cache writes": (
        {"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cache_write_tokens": 4}}},
        Usage(9, 0, cache_write=4),
    ),
    "cache writes as Alibaba Cloud has them": (
        {
            "usage": {
                "prompt_tokens": 9,
                "prompt_tokens_details": {
                    "cached_tokens": 2,
                    "cache_creation_input_tokens": 4,
                    "cache_creation": {"ephemeral_1h_input_tokens": 3},
                },
            }
        },
        Usage(9, 0, cached=2, cache_write=4, cache_write_1h=3),
    ),
    "cached tokens beside details that do not have them": (
        {
            "usage": {
                "prompt_tokens": 9,
                "cached_tokens": 7,
                "prompt_tokens_details": {"audio_tokens": 0},
            }
        },
        Usage(9, 0, cached=7),
    ),
    "usage is null": ({"choices": [{"delta": {"content": "a"}}], "usage": None}, None),
    "usage is empty": ({"usage": {}}, None),
    "usage is a list": ({"usage": [1]}, None),
    "counts of a wrong type": (
        {"usage": {"prompt_tokens": "1", "completion_tokens": None}},
        None,
    ),
    "counts of null": ({"usage": {"prompt_tokens": None, "completion_tokens": None}}, None),
    "counts of nothing": ({"usage": {"prompt_tokens": 0, "completion_tokens": 0}}, None),
    "a total alone": ({"usage": {"total_tokens": 9}}, None),
    "more than anybody counts": (
        {"usage": {"prompt_tokens": 10**9 + 1, "completion_tokens": 2**64 - 1}},
        None,
    ),
    "a number without end": (
        {"usage": {"prompt_tokens": 1e30, "completion_tokens": 5}},
        Usage(0, 5),
    ),
    "the most that counts": ({"usage": {"prompt_tokens": 10**9}}, Usage(10**9, 0)),
    "negative counts": ({"usage": {"prompt_tokens": -1, "completion_tokens": 2}}, Usage(0, 2)),
    "a list": ([{"usage": {"prompt_tokens": 1}}], None),
    "in the text": ({"choices": [{"delta": {"content": '"usage": {"prompt_tokens": 9}'}}]}, None),
    "done": (b"[DONE]", None),
    "no json": (b'{"usage": {', None),
}


@pytest.mark.parametrize("shape", OPENAI_SHAPES)
def test_openai_usage(shape: str) -> None:
    data, expected = OPENAI_SHAPES[shape]
    assert OPENAI.usage(event(data), None) == expected
    if not isinstance(data, bytes):
        for option in (0, orjson.OPT_INDENT_2):
            whole = JsonEvent(orjson.dumps(data, option=option))
            assert OPENAI.usage(whole, None) == expected


def chunk(usage: Any) -> Event:
    return event({"object": "chat.completion.chunk", "choices": [{"delta": {}}], "usage": usage})


def test_openai_null_usage_of_later_chunks_forgets_nothing() -> None:
    assert last_usage(OPENAI, [chunk(None), chunk(CHAT), chunk(None), event(b"[DONE]")]) == FULL


def test_usage_that_grows_with_every_chunk_counts_once() -> None:
    """vLLM's `continuous_usage_stats`: each chunk has the total so far."""
    events = [chunk({"prompt_tokens": 10, "completion_tokens": n}) for n in range(1, 6)]
    assert last_usage(OPENAI, events) == Usage(10, 5)


def test_stream_without_usage_has_none() -> None:
    assert last_usage(OPENAI, [event({"choices": []}), event(b"[DONE]")]) is None


@pytest.mark.parametrize(
    "pretty", [b'"usage" : {"prompt_tokens": 3}', b'"usage":\t{"prompt_tokens":3}']
)
def test_usage_is_found_whatever_the_spaces(pretty: bytes) -> None:
    assert OPENAI.usage(event(b"{" + pretty + b"}"), None) == Usage(3, 0)


def test_usage_is_found_when_data_lines_break_after_the_name() -> None:
    (broken,) = Decoder().feed(b'data: {"usage":\ndata: {"prompt_tokens": 3}}\n\n')
    assert OPENAI.usage(broken, None) == Usage(3, 0)
    (broken,) = Decoder().feed(
        b'data: {"type": "message_delta", "usage":\ndata: {"output_tokens": 3}}\n\n'
    )
    assert ANTHROPIC.usage(broken, None) == Usage(0, 3)


# Anthropic


def start(**usage: Any) -> Event:
    message = {"id": "m", "type": "message", "content": [], "usage": usage}
    return event({"type": "message_start", "message": message}, "message_start")


def delta(**usage: Any) -> Event:
    data = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
    return event(data, "message_delta")


TEXT = event(
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "usage"}},
    "content_block_delta",
)


def test_anthropic_delta_is_cumulative_and_keeps_what_it_leaves_out() -> None:
    events = [
        start(
            input_tokens=10,
            cache_read_input_tokens=100,
            cache_creation_input_tokens=20,
            output_tokens=1,
        ),
        TEXT,
        delta(output_tokens=15),
        delta(output_tokens=30),
    ]
    assert last_usage(ANTHROPIC, events) == Usage(input=130, output=30, cached=100, cache_write=20)


def test_anthropic_delta_may_correct_what_the_start_said() -> None:
    events = [
        start(input_tokens=10, cache_read_input_tokens=100, output_tokens=1),
        delta(input_tokens=12, cache_read_input_tokens=90, output_tokens=5),
    ]
    assert last_usage(ANTHROPIC, events) == Usage(input=102, output=5, cached=90)
    events.append(delta(cache_read_input_tokens=None, input_tokens=None, output_tokens=6))
    assert last_usage(ANTHROPIC, events) == Usage(input=102, output=6, cached=90)


def test_anthropic_delta_alone_counts() -> None:
    assert last_usage(ANTHROPIC, [delta(output_tokens=5)]) == Usage(0, 5)


def test_anthropic_stream_that_broke_off_has_what_it_said_until_then() -> None:
    assert last_usage(ANTHROPIC, [start(input_tokens=10, output_tokens=2), TEXT]) == Usage(10, 2)


def test_anthropic_thinking_is_part_of_the_output() -> None:
    events = [delta(output_tokens=50, output_tokens_details={"thinking_tokens": 40})]
    assert last_usage(ANTHROPIC, events) == Usage(0, 50, reasoning=40)


def test_anthropic_tokens_written_for_an_hour_are_told_apart() -> None:
    creation = {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 30}
    first = start(input_tokens=1, cache_creation_input_tokens=50, cache_creation=creation)
    expected = Usage(51, 0, cache_write=50, cache_write_1h=30)
    assert last_usage(ANTHROPIC, [first]) == expected
    assert last_usage(ANTHROPIC, [first, delta(output_tokens=2)]) == expected._replace(output=2)
    again = delta(cache_creation_input_tokens=10, cache_creation={"ephemeral_1h_input_tokens": 10})
    assert last_usage(ANTHROPIC, [first, again]) == Usage(11, 0, cache_write=10, cache_write_1h=10)


@pytest.mark.parametrize("creation", [None, {}, [], 5, {"ephemeral_5m_input_tokens": 7}])
def test_anthropic_tokens_are_not_written_for_an_hour_unless_it_says_so(creation: Any) -> None:
    found = last_usage(ANTHROPIC, [start(cache_creation_input_tokens=7, cache_creation=creation)])
    assert found == Usage(7, 0, cache_write=7)


def test_anthropic_whole_message() -> None:
    body = {
        "type": "message",
        "content": [{"type": "text", "text": "hi"}],
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 5,
            "cache_read_input_tokens": 3,
            "output_tokens": 7,
            "service_tier": "standard",
        },
    }
    for option in (0, orjson.OPT_INDENT_2):
        whole = JsonEvent(orjson.dumps(body, option=option))
        assert ANTHROPIC.usage(whole, None) == Usage(18, 7, cached=3, cache_write=5)


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b'{"type": "ping"}',
        b'{"usage": null}',
        b'{"usage": 1}',
        b'[{"usage": {}}]',
        b'{"usage": {',
        b'{"text": "\\"usage\\": {\\"output_tokens\\": 9}"}',
    ],
)
def test_anthropic_event_without_usage_changes_nothing(data: bytes) -> None:
    before = Usage(1, 2)
    assert ANTHROPIC.usage(event(data), before) is before


# What is none

NAMES: dict[str, tuple[Dialect, str, str]] = {
    "openai": (OPENAI, "prompt_tokens", "completion_tokens"),
    "responses": (OPENAI, "input_tokens", "output_tokens"),
    "anthropic": (ANTHROPIC, "input_tokens", "output_tokens"),
    "dashscope": (DASHSCOPE, "input_tokens", "output_tokens"),
    "qianfan": (QIANFAN, "prompt_tokens", "completion_tokens"),
}
NO_COUNTS: list[Any] = [
    0,
    0.0,
    -1,
    None,
    True,
    "12",
    [12],
    {},
    1e30,
    MOST_TOKENS + 1,
    2**63,
    2**64 - 1,
]


@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_usage_in_which_no_count_can_be_read_is_none(which: str, value: Any) -> None:
    dialect, name_in, name_out = NAMES[which]
    told = event({"usage": {name_in: value, name_out: value, "total_tokens": value}})
    assert dialect.usage(told, None) is None
    if which != "anthropic":  # whose later reports correct earlier ones, down to nothing as well
        before = Usage(1, 2)
        assert dialect.usage(told, before) is before


@pytest.mark.parametrize("usage", [{}, {"total_tokens": 9}, {"prompt_tokens_details": {}}], ids=str)
def test_usage_without_counts_of_input_and_output_is_none(usage: dict[str, Any]) -> None:
    for dialect in (OPENAI, ANTHROPIC, QIANFAN):
        assert dialect.usage(event({"usage": usage}), None) is None


@pytest.mark.parametrize("which", NAMES)
def test_a_count_beyond_all_reason_is_not_taken_and_the_largest_within_is(which: str) -> None:
    dialect, name_in, name_out = NAMES[which]
    told = event({"usage": {name_in: 2**64 - 1, name_out: MOST_TOKENS}})
    assert dialect.usage(told, None) == Usage(0, MOST_TOKENS)


def test_anthropic_later_report_that_cannot_be_read_takes_nothing_back() -> None:
    first = start(input_tokens=10, output_tokens=2)
    before = ANTHROPIC.usage(first, None)
    assert before == Usage(10, 2)
    assert ANTHROPIC.usage(delta(output_tokens=2**64 - 1), before) is before
    assert ANTHROPIC.usage(delta(output_tokens="7", input_tokens=11), before) == Usage(11, 2)


def test_anthropic_first_report_of_nothing_leaves_all_to_the_later_one() -> None:
    first = start(input_tokens=0, output_tokens=0)
    assert last_usage(ANTHROPIC, [first]) is None
    assert last_usage(ANTHROPIC, [first, delta(input_tokens=9, output_tokens=3)]) == Usage(9, 3)


class Unread(Event):
    """Fails the test when somebody parses it."""

    __slots__ = ()

    def json(self) -> Any:
        raise AssertionError("parsed")


@pytest.mark.parametrize("dialect", [OPENAI, ANTHROPIC], ids=lambda each: each.name)
def test_events_that_do_not_name_usage_are_not_parsed(dialect: Dialect) -> None:
    """Nearly all events of a stream: a look at their bytes must do."""
    before = Usage(1, 2)
    for data in (
        b'{"choices": [{"delta": {"content": "x"}}]}',
        b'{"choices":[{"delta":{"content":"x"}}],"usage":null}',
        b'{"type": "content_block_delta"}',
    ):
        plain = Unread(b"data: " + data)
        if b"usage" not in data or dialect is OPENAI:
            assert dialect.usage(plain, before) is before
        assert dialect.error_in(plain) is None
