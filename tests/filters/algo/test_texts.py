"""The texts of answers and requests in every dialect, and how many tokens they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo import texts
from filters.algo.estimate import TOKENS_PER_MEDIUM, estimate_input
from filters.algo.texts import (
    ANSWER_TOKENS,
    MESSAGE_TOKENS,
    READ_BYTES,
    REQUEST_BYTES,
    answer_text,
    count_answer,
    count_request,
    request_parts,
)
from filters.algo.tokens import Vocabularies
from tests.support.harness import MODEL, Harness

SSE, JSON = "text/event-stream", "application/json"
DATA = Path(__file__).parents[2] / "data" / "texts"
ENGLISH = (DATA / "english_harbour.txt").read_text()
CHINESE = (DATA / "chinese_tea.txt").read_text()


@pytest.fixture(scope="module")
def o200k() -> Vocabularies:
    vocabularies = Vocabularies(1)
    vocabularies.local_count(MODEL, "load it")
    for thread in vocabularies._loading.values():
        thread.join()
    return vocabularies


class Words(Vocabularies):
    """A word is a token."""

    def __init__(self) -> None:
        super().__init__(0)
        self.given: list[str] = []

    def local_count(self, model: str, text: str) -> int:
        self.given.append(text)
        return len(text.split())


def event(fields: Any, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(fields) + b"\n\n"


def openai_event(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    return event({"id": "c-1", "object": "chat.completion.chunk", "choices": [choice], **more})


def anthropic_event(text: str) -> bytes:
    delta = {"type": "text_delta", "text": text}
    fields = {"type": "content_block_delta", "index": 0, "delta": delta}
    return event(fields, "content_block_delta")


def dashscope_event(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"message": message, "finish_reason": "null"}
    return b"id:1\nevent:result\n:HTTP_STATUS/200\n" + event({"output": {"choices": [choice]}})


def qianfan_event(text: str) -> bytes:
    return event({"id": "as-1", "result": text, "is_end": False})


EVENTS = {
    "openai": openai_event,
    "anthropic": anthropic_event,
    "dashscope": dashscope_event,
    "qianfan": qianfan_event,
}


def pieces_of(text: str, size: int = 4) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


# What a model wrote


TOOL = {"function": {"name": "find", "arguments": '{"q":"x"}'}}


@pytest.mark.parametrize(
    ("dialect", "fields", "text"),
    [
        ("openai", {"choices": [{"delta": {"content": "ab"}}]}, "ab"),
        ("openai", {"choices": [{"delta": {"reasoning_content": "r"}}]}, "r"),
        ("openai", {"choices": [{"delta": {"reasoning": "r", "reasoning_content": "r"}}]}, "r"),
        ("openai", {"choices": [{"delta": {"refusal": "no"}}]}, "no"),
        ("openai", {"choices": [{"delta": {"tool_calls": [TOOL]}}]}, 'find{"q":"x"}'),
        ("openai", {"choices": [{"delta": {"function_call": TOOL["function"]}}]}, 'find{"q":"x"}'),
        (
            "openai",
            {"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]},
            "ab",
        ),
        ("openai", {"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]}, "a"),
        ("openai", {"choices": [{"index": 0, "text": "ab"}]}, "ab"),
        ("openai", {"choices": [], "usage": None}, ""),
        ("openai", {"choices": [None, {"delta": None}, {"delta": {"content": None}}]}, ""),
        ("openai", {"type": "response.output_text.delta", "delta": "ab"}, "ab"),
        ("openai", {"type": "response.output_text.done", "text": "ab"}, ""),
        ("openai", {"type": "response.refusal.delta", "delta": "no"}, "no"),
        ("openai", {"type": "response.reasoning_summary_text.delta", "delta": "r"}, "r"),
        ("openai", {"type": "response.function_call_arguments.delta", "delta": "{}"}, "{}"),
        ("openai", {"type": "response.audio.delta", "delta": "UklGRg=="}, ""),
        ("openai", {"type": "response.audio_transcript.delta", "delta": "ab"}, "ab"),
        (
            "openai",
            {"type": "response.output_item.added", "item": {"type": "function_call", "name": "f"}},
            "f",
        ),
        (
            "openai",
            {"type": "response.completed", "response": {"output": [{"content": [{"text": "ab"}]}]}},
            "",
        ),
        (
            "openai",
            {
                "object": "response",
                "output": [
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]},
                    {"type": "message", "content": [{"type": "output_text", "text": "ab"}]},
                    {"type": "function_call", "name": "f", "arguments": "{}"},
                ],
            },
            "rabf{}",
        ),
        ("openai", {"data": [{"embedding": [0.1]}]}, ""),
        ("anthropic", {"type": "message_start", "message": {"content": []}}, ""),
        (
            "anthropic",
            {
                "type": "content_block_start",
                "content_block": {"type": "tool_use", "name": "find", "input": {}},
            },
            "find",
        ),
        ("anthropic", {"type": "content_block_delta", "delta": {"text": "ab"}}, "ab"),
        ("anthropic", {"type": "content_block_delta", "delta": {"thinking": "t"}}, "t"),
        ("anthropic", {"type": "content_block_delta", "delta": {"partial_json": '{"a'}}, '{"a'),
        ("anthropic", {"type": "content_block_delta", "delta": {"signature": "xyz"}}, ""),
        ("anthropic", {"type": "ping"}, ""),
        (
            "anthropic",
            {
                "type": "message",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "text", "text": "ab"},
                    {"type": "tool_use", "name": "find", "input": {"q": "x"}},
                ],
            },
            'tabfind{"q":"x"}',
        ),
        ("dashscope", {"output": {"text": "ab", "finish_reason": "null"}}, "ab"),
        (
            "dashscope",
            {"output": {"choices": [{"message": {"content": "b", "reasoning_content": "r"}}]}},
            "br",
        ),
        ("dashscope", {"output": {"choices": [{"message": {"content": [{"text": "ab"}]}}]}}, "ab"),
        ("dashscope", {"code": "Throttling", "message": "slow down"}, ""),
        ("qianfan", {"result": "ab", "is_end": True}, "ab"),
        ("qianfan", {"result": "", "function_call": TOOL["function"]}, 'find{"q":"x"}'),
        ("qianfan", {"error_code": 18, "error_msg": "limit"}, ""),
    ],
    ids=repr,
)
def test_all_that_a_model_wrote_is_found_once(
    dialect: str, fields: dict[str, Any], text: str
) -> None:
    assert answer_text(dialect, fields) == text


FIELDS = ["choices", "delta", "message", "content", "output", "type", "text", "item", "input"]


@given(
    st.sampled_from(sorted(EVENTS)),
    st.recursive(
        st.none() | st.text(max_size=3) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(FIELDS),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
)
def test_answers_of_any_shape_are_read(dialect: str, fields: Any) -> None:
    if isinstance(fields, dict):
        assert isinstance(answer_text(dialect, fields), str)
        assert all(isinstance(each, str | int) for each in request_parts(dialect, fields))


# Counting answers


@pytest.mark.parametrize("dialect", EVENTS)
@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
async def test_a_stream_has_the_tokens_of_its_text(
    o200k: Vocabularies, dialect: str, text: str
) -> None:
    data = b"".join(map(EVENTS[dialect], pieces_of(text[:400]))) + b"data: [DONE]\n\n"
    count = o200k.local_count(MODEL, text[:400])
    assert count_answer(dialect, MODEL, [data], SSE, len(data), o200k) == count


async def test_it_does_not_matter_how_a_stream_was_cut_into_pieces(o200k: Vocabularies) -> None:
    data = b"".join(map(openai_event, pieces_of(CHINESE[:60])))
    count = o200k.local_count(MODEL, CHINESE[:60])
    for at in range(len(data)):
        pieces = [data[:at], data[at:]]
        assert count_answer("openai", MODEL, pieces, SSE, len(data), o200k) == count


@pytest.mark.parametrize("dialect", EVENTS)
def test_a_stream_that_is_cut_anywhere_has_the_words_so_far(dialect: str) -> None:
    data = b"".join(EVENTS[dialect](f" word{number}") for number in range(10))
    counts = [count_answer(dialect, MODEL, [data[:n]], SSE, n, Words()) for n in range(len(data))]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 10


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
async def test_what_was_not_kept_of_a_stream_counts_by_its_length(
    o200k: Vocabularies, dialect: str
) -> None:
    text = ENGLISH * 6
    data = b"".join(map(EVENTS[dialect], pieces_of(text)))
    assert len(data) > 4 * READ_BYTES
    for kept in (data[:READ_BYTES], data):
        found = count_answer(dialect, MODEL, [kept], SSE, len(data), o200k)
        assert found == pytest.approx(o200k.local_count(MODEL, text), rel=0.07)


async def test_a_stream_that_repeats_the_answer_so_far_counts_once(o200k: Vocabularies) -> None:
    parts = pieces_of(ENGLISH[:600], 12)
    so_far = ["".join(parts[: number + 1]) for number in range(len(parts))]
    data = b"".join(map(dashscope_event, so_far))
    count = o200k.local_count(MODEL, ENGLISH[:600])
    assert count_answer("dashscope", MODEL, [data], SSE, len(data), o200k) == count
    cut = data[:-40]
    found = count_answer("dashscope", MODEL, [cut], SSE, len(cut), o200k)
    assert found == pytest.approx(count, rel=0.05)


async def test_what_was_not_kept_of_such_a_stream_grows_with_the_square(
    o200k: Vocabularies,
) -> None:
    text = ENGLISH * 2
    parts = pieces_of(text, 12)
    so_far = ["".join(parts[: number + 1]) for number in range(len(parts))]
    data = b"".join(map(dashscope_event, so_far))
    found = count_answer("dashscope", MODEL, [data[:READ_BYTES]], SSE, len(data), o200k)
    assert found == pytest.approx(o200k.local_count(MODEL, text), rel=0.25)


@pytest.mark.parametrize("dump", [orjson.dumps, lambda value: json.dumps(value, indent=2).encode()])
async def test_an_answer_in_json_has_the_tokens_of_its_text(o200k: Vocabularies, dump: Any) -> None:
    text = ENGLISH + '\n"quoted" \\ and 中文\n'
    data = dump({"id": "x", "choices": [{"message": {"role": "assistant", "content": text}}]})
    count = o200k.local_count(MODEL, text)
    assert count_answer("openai", MODEL, [data], JSON, len(data), o200k) == count
    for at in range(len(data) - 60, len(data)):  # cut somewhere behind the text or in its end
        found = count_answer("openai", MODEL, [data[:at]], JSON, at, o200k)
        assert found == pytest.approx(count, abs=25)


async def test_a_long_answer_in_json_counts_by_its_beginning(o200k: Vocabularies) -> None:
    text = ENGLISH * 60
    data = orjson.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
    count = o200k.local_count(MODEL, text)
    for kept in (data, data[:READ_BYTES]):
        found = count_answer("openai", MODEL, [kept], JSON, len(data), o200k)
        assert found == pytest.approx(count, rel=0.03)


@given(st.text(min_size=1, max_size=40), st.integers(0, 200))
def test_json_may_be_cut_at_any_byte(text: str, at: int) -> None:
    data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()[:at]
    words = Words()
    count_answer("openai", MODEL, [data], JSON, len(data) + 1, words)
    assert all(text.startswith(given.replace("\ufffd", "")) for given in words.given)


@pytest.mark.parametrize(
    "pieces", [[], [b""], [b"\n"], [b"[]"], [b"data: nothing\n\n"], [b"{"], [b": still there\n\n"]]
)
def test_an_answer_without_text_has_no_tokens(pieces: Sequence[bytes]) -> None:
    for media_type in (SSE, JSON, ""):
        size = sum(map(len, pieces))
        assert count_answer("openai", MODEL, pieces, media_type, size, Words()) == 0


def test_of_an_answer_that_was_not_kept_the_length_counts() -> None:
    assert count_answer("openai", MODEL, [], SSE, 25_000, Words()) == 250
    assert count_answer("openai", MODEL, [], JSON, 25_000, Words()) == 5000


@pytest.mark.parametrize(
    "unit",
    [b"data: {}\n\n", b"\n\n:\n", b'data: {"choices":[{},{},{}]}\r\n\r\n', b"data: [\r\r", b"x"],
    ids=repr,
)
def test_only_the_beginning_of_a_stream_is_read(
    unit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed, events = 0, 0

    class Decoder(texts.Decoder):  # type: ignore[misc, name-defined]
        def feed(self, data: bytes) -> Any:
            nonlocal fed, events
            fed += len(data)
            found = super().feed(data)
            events += len(found)
            return found

    monkeypatch.setattr(texts, "Decoder", Decoder)
    data = unit * (200_000 // len(unit))
    count_answer("openai", MODEL, [data], SSE, len(data), Words())
    assert fed <= READ_BYTES
    assert events <= 1000


# Counting requests


def parts(body: dict[str, Any], dialect: str = "openai") -> list[str | int]:
    return list(request_parts(dialect, body))


@pytest.mark.parametrize(
    ("dialect", "body", "found"),
    [
        (
            "openai",
            {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]},
            [ANSWER_TOKENS, MESSAGE_TOKENS, "be", MESSAGE_TOKENS, "hi"],
        ),
        (
            "openai",
            {
                "messages": [
                    {
                        "content": [
                            {"type": "text", "text": "look"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,A"}},
                            {"type": "input_audio", "input_audio": {"data": "A"}},
                        ]
                    }
                ]
            },
            [ANSWER_TOKENS, MESSAGE_TOKENS, "look", TOKENS_PER_MEDIUM, TOKENS_PER_MEDIUM],
        ),
        (
            "openai",
            {
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [TOOL]},
                    {"role": "tool", "content": "found", "tool_call_id": "c"},
                ]
            },
            [ANSWER_TOKENS, MESSAGE_TOKENS, "find", '{"q":"x"}', MESSAGE_TOKENS, "found"],
        ),
        (
            "openai",
            {"tools": [{"type": "function", "function": {"name": "find"}}]},
            ['{"name":"find"}'],
        ),
        ("openai", {"prompt": "once"}, ["once"]),
        ("openai", {"prompt": ["once", "twice"]}, ["once", "twice"]),
        ("openai", {"prompt": [1, 2, 3]}, [3]),
        ("openai", {"input": [[1, 2], [3]]}, [2, 1]),
        ("openai", {"input": "a text", "instructions": "be"}, ["be", "a text"]),
        (
            "openai",
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                    {"type": "function_call", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "output": "3"},
                ]
            },
            [
                *(ANSWER_TOKENS, MESSAGE_TOKENS, "hi"),
                *(MESSAGE_TOKENS, "f", "{}", MESSAGE_TOKENS, "3"),
            ],
        ),
        (
            "anthropic",
            {
                "system": [{"type": "text", "text": "be"}],
                "tools": [{"name": "find", "input_schema": {}}],
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "name": "find", "input": {"q": 1}}],
                    },
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "content": [{"type": "text", "text": "3"}]},
                            {"type": "image", "source": {"type": "base64", "data": "A"}},
                            {"type": "document", "source": {"type": "text", "data": "a page"}},
                        ],
                    },
                ],
            },
            [
                *("be", '{"name":"find","input_schema":{}}', ANSWER_TOKENS),
                *(MESSAGE_TOKENS, "find", '{"q":1}'),
                *(MESSAGE_TOKENS, "3", TOKENS_PER_MEDIUM, "a page"),
            ],
        ),
        (
            "dashscope",
            {
                "input": {"messages": [{"content": [{"image": "http://x/y.png"}, {"text": "hi"}]}]},
                "parameters": {"tools": [{"function": {"name": "f"}}]},
            },
            ['{"name":"f"}', ANSWER_TOKENS, MESSAGE_TOKENS, TOKENS_PER_MEDIUM, "hi"],
        ),
        ("dashscope", {"input": {"prompt": "once"}}, ["once"]),
        ("dashscope", {"input": {"texts": ["a", "b"]}}, ["a", "b"]),
        (
            "qianfan",
            {"system": "be", "messages": [{"role": "user", "content": "hi"}]},
            ["be", ANSWER_TOKENS, MESSAGE_TOKENS, "hi"],
        ),
        ("openai", {"messages": "no list", "input": None, "tools": {}, "prompt": 7}, []),
    ],
    ids=repr,
)
def test_all_that_a_model_is_given_is_found(
    dialect: str, body: dict[str, Any], found: list[str | int]
) -> None:
    assert parts(body, dialect) == found


async def test_a_request_has_the_tokens_of_its_messages_and_their_marks(
    o200k: Vocabularies,
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ENGLISH}]
    call = Harness().call({"model": MODEL, "messages": messages})
    count = o200k.local_count(MODEL, ENGLISH) + o200k.local_count(MODEL, "Be brief.")
    assert count_request(call, MODEL, o200k) == count + 2 * MESSAGE_TOKENS + ANSWER_TOKENS


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
@pytest.mark.parametrize("times", [1, 100])
async def test_a_long_request_counts_by_its_beginning(
    o200k: Vocabularies, text: str, times: int
) -> None:
    messages = [{"role": "user", "content": text * (100 // times)}] * times
    call = Harness().call({"model": MODEL, "messages": messages})
    truth = 100 * o200k.local_count(MODEL, text) + times * MESSAGE_TOKENS
    assert count_request(call, MODEL, o200k) == pytest.approx(truth, rel=0.07)


@given(st.lists(st.text("ab 中é", max_size=3000), max_size=20))
def test_only_the_beginning_of_a_request_is_counted(contents: list[str]) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    words = Words()
    count_request(Harness().call({"model": MODEL, "messages": messages}), MODEL, words)
    assert len("".join(words.given).encode()) <= REQUEST_BYTES + 8  # the letters have at most three


async def test_a_request_of_many_small_messages_is_not_read_to_its_end() -> None:
    messages = [{"role": "user", "content": "word"}] * 20_000
    call, words = Harness().call({"model": MODEL, "messages": messages}), Words()
    assert count_request(call, MODEL, words) == pytest.approx(20_000 * 5, rel=0.1)
    assert len(words.given) <= 500


async def test_what_is_no_json_is_estimated() -> None:
    harness = Harness()
    call = harness.call(b"RIFF" * 300, path="/fake/v1/audio/transcriptions")
    assert count_request(call, MODEL, Words()) == estimate_input(call) > 100
    call.body = None
    assert count_request(call, MODEL, Words()) == 0
