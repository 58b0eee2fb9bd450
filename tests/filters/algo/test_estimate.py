"""How many tokens a request will take, from its bytes."""

from __future__ import annotations

import base64
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.estimate import (
    MOST_OUTPUT,
    TOKENS_PER_MEDIUM,
    bounds_output,
    estimate,
    estimate_input,
    tokens_of,
)
from sidecar.dialects.endpoint import OTHER
from tests.support.harness import MODEL, Harness

ENGLISH = "The quick brown fox jumps over the lazy dog, and then it sleeps for a while. " * 20
CHINESE = "今天天气很好,我们一起去公园散步,然后回家做饭。" * 20


def body(text: str, *, ascii_only: bool = False) -> bytes:
    return json.dumps({"content": text}, ensure_ascii=ascii_only).encode()


def test_english_has_about_four_characters_a_token() -> None:
    assert tokens_of(body(ENGLISH)) == pytest.approx(len(ENGLISH) / 4, rel=0.05)


def test_a_chinese_character_is_nearly_a_token() -> None:
    assert 0.65 * len(CHINESE) < tokens_of(body(CHINESE)) < len(CHINESE)


def test_an_escaped_character_counts_as_the_character() -> None:
    assert tokens_of(body(CHINESE, ascii_only=True)) == pytest.approx(
        tokens_of(body(CHINESE)), rel=0.05
    )


def test_two_byte_letters_are_not_taken_for_chinese() -> None:
    russian = "Сегодня хорошая погода, пойдём гулять в парк. " * 20
    assert tokens_of(body(russian)) < 0.6 * len(russian)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,DATA"}},
        {"type": "input_audio", "input_audio": {"data": "DATA", "format": "wav"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "DATA"}},
    ],
    ids=lambda part: str(part["type"]),
)
@pytest.mark.parametrize(
    "dump",
    [
        orjson.dumps,
        lambda value: json.dumps(value).encode(),
        lambda value: json.dumps(value).replace("/", "\\/").encode(),
    ],
    ids=["compact", "spaced", "slashes escaped"],
)
def test_media_count_by_the_piece_and_not_by_their_length(part: Any, dump: Any) -> None:
    data = base64.b64encode(bytes(range(256)) * 400).decode()
    two = json.loads(json.dumps([part, part]).replace("DATA", data))
    found = tokens_of(dump({"messages": [{"role": "user", "content": two}], "text": ENGLISH}))
    assert found == pytest.approx(len(ENGLISH) / 4 + 2 * TOKENS_PER_MEDIUM, rel=0.1)


def test_text_that_only_speaks_of_base64_is_text() -> None:
    text = 'data:image/png;base64, and "data": "' + ENGLISH * 3
    assert tokens_of(body(text)) == pytest.approx(len(text) / 4, rel=0.05)
    text = "data:image/png;base64," + ENGLISH * 3
    assert tokens_of(body(text)) == pytest.approx(len(text) / 4, rel=0.05)


@given(st.binary(max_size=4096))
def test_any_bytes_have_at_least_one_token_and_not_more_than_bytes(data: bytes) -> None:
    assert 1 <= tokens_of(data) <= max(1, len(data)) + TOKENS_PER_MEDIUM


@given(st.text(max_size=600), st.booleans())
def test_more_text_is_never_fewer_tokens(text: str, ascii_only: bool) -> None:
    once = tokens_of(body(text, ascii_only=ascii_only))
    twice = tokens_of(body(text + text, ascii_only=ascii_only))
    assert twice + 1 >= once


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 1000),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8, "max_tokens": 7}, 8),
        ({"max_output_tokens": 9}, 9),
        ({"max_tokens": 7, "n": 3}, 21),
        ({"n": 2}, 2000),
        ({"max_tokens": None}, 1000),
        ({"max_tokens": True}, 1000),
        ({"max_tokens": -5, "n": 0}, 1000),
        ({"max_tokens": "7", "n": "2"}, 1000),
        ({"max_tokens": 10**18, "n": 10**9}, MOST_OUTPUT),
    ],
    ids=repr,
)
async def test_the_answer_may_have_what_the_caller_allows_for_each_choice(
    fields: Any, tokens: int
) -> None:
    assert estimate(Harness().call({"model": MODEL, **fields}), 1000)[1] == tokens


@pytest.mark.parametrize(
    ("fields", "is_bound"),
    [({}, False), ({"max_tokens": 0}, False), ({"max_output_tokens": 5, "n": 2}, True)],
)
async def test_a_caller_may_bound_the_answer(fields: dict[str, Any], is_bound: bool) -> None:
    assert bounds_output(Harness().call({"model": MODEL, **fields})) is is_bound


async def test_whoever_cannot_bound_the_answer_is_not_told_to() -> None:
    call = Harness().call(b"{no json", path="/fake/v1/other")
    assert bounds_output(call)
    call.endpoint = OTHER
    assert bounds_output(call)


async def test_a_call_that_is_long_is_estimated_once() -> None:
    call = Harness().call({"model": MODEL, "content": ENGLISH * 10})
    first = estimate_input(call)
    call.body = b"x" * len(call.body or b"")
    assert estimate_input(call) == first > 10 * len(ENGLISH) / 5


async def test_embeddings_have_no_output_and_an_unread_body_no_input() -> None:
    harness = Harness()
    call = harness.call({"model": MODEL, "input": "x", "max_tokens": 5}, path="/v1/embeddings")
    assert estimate(call, 1000)[1] == 0
    call = harness.call(b"RIFF", path="/fake/v1/audio/transcriptions")
    call.body = None
    assert estimate(call, 1000) == (0, 1000)
