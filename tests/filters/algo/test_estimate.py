"""How many tokens a request will take, from its bytes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from splintr import Tokenizer

from filters.algo.estimate import (
    MOST_OUTPUT,
    TOKENS_PER_MEDIUM,
    bounds_output,
    estimate,
    estimate_input,
    tokens_of,
    tokens_of_text,
)
from sidecar.dialects.endpoint import OTHER
from tests.support.harness import MODEL, Harness

SAMPLES = sorted((Path(__file__).parents[2] / "data" / "texts").glob("*.txt"))
"""English and Chinese prose, programs in Python and JavaScript, JSON."""
MOST_ERROR = 0.15

ENGLISH = "The quick brown fox jumps over the lazy dog, and then it sleeps for a while. " * 20
CHINESE = "今天天气很好，我们一起去公园散步，然后回家做饭。" * 20

Count = Callable[[str], int]


@pytest.fixture(scope="module")
def true_count() -> Count:
    """Tokens by OpenAI's o200k."""
    encode = Tokenizer.from_pretrained("o200k_base").encode_ordinary
    return lambda text: len(encode(text))


def body(text: str, *, ascii_only: bool = False) -> bytes:
    return json.dumps({"content": text}, ensure_ascii=ascii_only).encode()


def chat(*texts: str, ascii_only: bool = False) -> bytes:
    messages = [{"role": "user", "content": text} for text in texts]
    fields = {"model": "gpt-4o-mini", "messages": messages, "temperature": 0.2, "stream": True}
    return json.dumps(fields, ensure_ascii=ascii_only).encode()


def of_kind(kind: str) -> list[Path]:
    return [path for path in SAMPLES if path.name.startswith(kind)]


# Against real counts


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: str(path.stem))
def test_a_text_is_estimated_within_15_percent(path: Path, true_count: Count) -> None:
    text = path.read_text()
    assert tokens_of_text(text) == pytest.approx(true_count(text), rel=MOST_ERROR)


@pytest.mark.parametrize("ascii_only", [False, True], ids=["UTF-8", "escaped"])
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: str(path.stem))
def test_a_request_is_estimated_within_15_percent(
    path: Path, ascii_only: bool, true_count: Count
) -> None:
    text = path.read_text()
    asked = "Please explain this:"
    truth = true_count(text) + true_count(asked) + 2 * 4 + 3
    found = tokens_of(chat(asked, text, ascii_only=ascii_only))
    assert found == pytest.approx(truth, rel=MOST_ERROR)


@pytest.mark.parametrize("kind", ["english", "chinese", "python", "javascript", "json"])
def test_texts_of_a_kind_come_out_right_on_the_whole(kind: str, true_count: Count) -> None:
    texts = [path.read_text() for path in of_kind(kind)]
    assert len(texts) >= 3
    assert all(400 <= len(text) <= 4000 for text in texts)
    found, truth = sum(map(tokens_of_text, texts)), sum(map(true_count, texts))
    assert found == pytest.approx(truth, rel=0.07)


def test_framing_is_no_prose(true_count: Count) -> None:
    texts = [sentence for sentence in ENGLISH.split(", ") for _ in range(3)]
    truth = sum(map(true_count, texts)) + 4 * len(texts) + 3
    assert tokens_of(chat(*texts)) == pytest.approx(truth, rel=MOST_ERROR)
    parts = [{"role": "user", "content": [{"type": "text", "text": text}]} for text in texts]
    in_parts = orjson.dumps({"model": MODEL, "messages": parts})
    assert tokens_of(in_parts) == pytest.approx(truth, rel=MOST_ERROR)


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("Сегодня утром мы решили поехать за город, потому что погода стала тёплой. ", 0.2, 0.5),
        ("قررنا هذا الصباح أن نسافر إلى خارج المدينة لأن الطقس أصبح دافئا ومشمسا. ", 0.2, 0.5),
        ("Les élèves préfèrent réviser près de la forêt où l'été s'achève déjà. ", 0.2, 0.35),
        ("今朝は天気がよかったので、家族みんなで郊外まで出かけることにしました。", 0.6, 0.9),
        ("🎉🚀😀", 1.0, 2.0),
    ],
    ids=["Russian", "Arabic", "French", "Japanese", "emoji"],
)
def test_letters_of_other_scripts_are_not_taken_for_chinese(
    text: str, least: float, most: float
) -> None:
    assert least < tokens_of_text(text * 20) / len(text * 20) < most


def test_a_body_of_any_length_is_estimated_from_all_over_it(true_count: Count) -> None:
    text = ENGLISH * 100 + CHINESE * 200
    truth = 100 * true_count(ENGLISH) + 200 * true_count(CHINESE)
    for ascii_only in (False, True):
        found = tokens_of(chat(text, ascii_only=ascii_only))
        assert found == pytest.approx(truth, rel=MOST_ERROR)
    assert tokens_of_text(text) == pytest.approx(truth, rel=MOST_ERROR)


def test_no_text_has_no_tokens() -> None:
    assert tokens_of_text("") == 0
    assert tokens_of_text("\ud800") == 1  # a surrogate that stands alone


# By rule


def test_an_escaped_character_counts_as_the_character() -> None:
    for text in (CHINESE, "Un été à l'école", "😀" * 9, 'a "b"\n\tc\\d/e', "a\u0001b"):
        escaped = tokens_of(body(text * 9, ascii_only=True))
        assert escaped == pytest.approx(tokens_of(body(text * 9)), rel=0.15)


def test_escapes_may_stand_beside_characters_as_they_are() -> None:
    mixed = body(CHINESE)[:-2] + body(CHINESE, ascii_only=True)[13:]
    assert tokens_of(mixed) == pytest.approx(2 * tokens_of(body(CHINESE)), rel=0.05)


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
    text = tokens_of(body(ENGLISH))
    assert found == pytest.approx(text + 2 * TOKENS_PER_MEDIUM, rel=0.04)


def test_text_that_only_speaks_of_base64_is_text() -> None:
    text = 'data:image/png;base64, and "data": "' + ENGLISH * 3
    assert tokens_of(body(text)) == pytest.approx(3 * tokens_of(body(ENGLISH)), rel=0.1)
    text = "data:image/png;base64," + ENGLISH * 3
    assert tokens_of(body(text)) == pytest.approx(3 * tokens_of(body(ENGLISH)), rel=0.1)


@given(st.binary(max_size=4096))
def test_any_bytes_have_at_least_one_token_and_not_more_than_bytes(data: bytes) -> None:
    assert 1 <= tokens_of(data) <= max(1, len(data)) + TOKENS_PER_MEDIUM


def test_media_alone_are_more_than_nothing() -> None:
    data = base64.b64encode(bytes(3000)).decode()
    assert tokens_of(body(f"data:image/png;base64,{data}")) == TOKENS_PER_MEDIUM


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
    assert estimate_input(call) == first > 10 * len(ENGLISH) / 6


async def test_embeddings_have_no_output_and_an_unread_body_no_input() -> None:
    harness = Harness()
    call = harness.call({"model": MODEL, "input": "x", "max_tokens": 5}, path="/v1/embeddings")
    assert estimate(call, 1000)[1] == 0
    call = harness.call(b"RIFF", path="/fake/v1/audio/transcriptions")
    call.body = None
    assert estimate(call, 1000) == (0, 1000)
