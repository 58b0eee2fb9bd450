"""What all forms share: events taken apart, texts cut, and no form where there is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.restream import stream_of, whole_of
from filters.algo.restream.events import PIECE_CHARS, cut, read, write

TEXTS = st.text(st.characters(codec="utf-8"), max_size=700)


@given(TEXTS)
def test_pieces_of_a_text_are_short_and_make_the_text_again(text: str) -> None:
    pieces = list(cut(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= PIECE_CHARS for piece in pieces)


def test_words_are_not_torn_where_there_are_words() -> None:
    text = "some words of prose\n" * 40
    pieces = list(cut(text))
    assert len(pieces) == 4
    assert all(piece.endswith((" ", "\n")) for piece in pieces)


def test_characters_of_several_bytes_stay_whole() -> None:
    text = "数据🙂" * 100
    assert b"".join(piece.encode() for piece in cut(text)) == text.encode()


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_events_are_read_whatever_their_line_ends(line_end: bytes) -> None:
    stream = b'\xef\xbb\xbf: hello\n\nevent: a\ndata: {"b": 1}\n\n\ndata:[DONE]'
    events = read(stream.replace(b"\n", line_end))
    assert [(event.name, event.data) for event in events] == [
        (b"a", b'{"b": 1}'),
        (b"message", b"[DONE]"),
    ]


def test_an_event_is_written_with_its_name() -> None:
    assert write({"a": 1}, "b") == b'event: b\ndata: {"a":1}\n\n'


@pytest.mark.parametrize(
    ("dialect", "endpoint"),
    [("openai", "embeddings"), ("anthropic", "count_tokens"), ("other", "chat_completions")],
)
def test_an_api_without_streams_has_no_other_form(dialect: str, endpoint: str) -> None:
    assert whole_of(dialect, endpoint, b"data: {}\n\n") is None
    assert stream_of(dialect, endpoint, b"{}", include_usage=True) is None


KINDS = [
    ("openai", "chat_completions"),
    ("openai", "completions"),
    ("openai", "responses"),
    ("anthropic", "messages"),
    ("dashscope", "generation"),
    ("qianfan", "chat"),
]


@pytest.mark.parametrize(("dialect", "endpoint"), KINDS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"{",
        b'{"choices": 1}',
        b'{"choices": [1]}',
        b'{"choices": [{"index": 0}]}',
        b'{"output": []}',
        b'{"content": [1], "type": "message", "stop_reason": "end_turn", "usage": {}}',
        b'{"object": "response", "status": "completed", "output": [{"type": "new"}]}',
        b'{"result": 1}',
        b'{"error": {"message": "no", "type": "t", "code": null, "param": null}}',
        b'{"error_code": 18, "error_msg": "no"}',
        b'{"type": "error", "error": {"type": "overloaded_error", "message": "no"}}',
    ],
)
def test_what_is_no_answer_has_no_other_form(dialect: str, endpoint: str, data: bytes) -> None:
    assert stream_of(dialect, endpoint, data, include_usage=True) is None
    assert whole_of(dialect, endpoint, b"data: %b\n\ndata: [DONE]\n\n" % data) is None
    assert whole_of(dialect, endpoint, data) is None
