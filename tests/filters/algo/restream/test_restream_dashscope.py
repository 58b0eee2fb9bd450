"""DashScope: recorded frames as a whole answer, and the other way round."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.restream import stream_of, whole_of
from sidecar.mock import dashscope as mock
from sidecar.mock.script import Settings

GENERATION = ("dashscope", "generation")
USAGE = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}


def message(content: Any, finish: str | None = "null", **fields: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": content, **fields}
    return {"choices": [{"message": said, "finish_reason": finish}]}


def plain(text: str, finish: str | None = "null") -> dict[str, Any]:
    return {"text": text, "finish_reason": finish}


def answer(output: Any) -> dict[str, Any]:
    return {"output": output, "usage": USAGE, "request_id": "r-1"}


def frames(*outputs: Any) -> bytes:
    return b"".join(
        b"id:%d\nevent:result\n:HTTP_STATUS/200\ndata:%b\n\n" % (number, orjson.dumps(answer(each)))
        for number, each in enumerate(outputs, 1)
    )


def whole(*outputs: Any) -> Any:
    found = whole_of(*GENERATION, frames(*outputs))
    return found and orjson.loads(found)["output"]


PIECES = ["Bread ", "has a long", " history.", " It began before", " writing did."]
SO_FAR = ["".join(PIECES[: end + 1]) for end in range(len(PIECES))]
TEXT = SO_FAR[-1]


@pytest.mark.parametrize("form", [plain, message])
def test_frames_with_what_is_new_are_joined(form: Any) -> None:
    assert whole(*map(form, PIECES), form("", "stop")) == form(TEXT, "stop")


@pytest.mark.parametrize("form", [plain, message])
def test_of_frames_with_all_so_far_the_last_one_counts(form: Any) -> None:
    assert whole(*map(form, SO_FAR), form(TEXT, "stop")) == form(TEXT, "stop")


def test_parts_of_a_multimodal_answer_are_joined() -> None:
    outputs = [message([{"text": piece}]) for piece in PIECES]
    assert whole(*outputs, message([], "stop")) == message([{"text": TEXT}], "stop")


def test_reasoning_is_joined_beside_the_text() -> None:
    found = whole(
        message("", reasoning_content="Let me "),
        message("", reasoning_content="think."),
        message("Yes", reasoning_content=""),
        message("", "stop", reasoning_content=""),
    )
    assert found == message("Yes", "stop", reasoning_content="Let me think.")


def test_texts_that_could_be_either_are_refused() -> None:
    assert whole(plain("a"), plain("ab", "stop")) is None
    assert whole(plain("ha"), plain("haha"), plain("hahaha", "stop")) is None


def test_reasoning_so_far_does_not_make_the_answer_so_far_one_of_pieces() -> None:
    """Reasoning that ends with nothing could be in pieces; joined, it would be said twice."""
    found = whole(
        message("", reasoning_content="Let me think"),
        message("", reasoning_content="Let me think about it"),
        *(message(text, reasoning_content="") for text in SO_FAR),
        message(TEXT, "stop", reasoning_content=""),
    )
    assert found is None


def test_reasoning_in_pieces_beside_an_answer_so_far_is_told_apart_from_it() -> None:
    found = whole(
        message("", reasoning_content="Let me "),
        message("", reasoning_content="think."),
        *(message(text, reasoning_content="") for text in SO_FAR),
        message(TEXT, "stop", reasoning_content=""),
    )
    assert found == message(TEXT, "stop", reasoning_content="Let me think.")


def test_an_answer_in_pieces_beside_reasoning_so_far_is_told_apart_from_it() -> None:
    found = whole(
        *(message("", reasoning_content=text) for text in SO_FAR),
        *(message(piece, reasoning_content=TEXT) for piece in ("Yes", ", it", " is")),
        message("", "stop", reasoning_content=TEXT),
    )
    assert found == message("Yes, it is", "stop", reasoning_content=TEXT)


def test_a_frame_that_holds_the_one_before_it_among_others_that_do_not_is_refused() -> None:
    assert (
        whole(plain("Hello wor\ufffd"), plain("Hello world"), plain("Hello world!", "stop")) is None
    )
    assert whole(plain("Yes"), plain("    "), plain("    x", "stop")) is None


def test_short_pieces_may_repeat_by_chance() -> None:
    assert whole(plain("ha"), plain("hah"), plain("!", "stop")) == plain("hahah!", "stop")


def test_a_single_frame_is_the_answer() -> None:
    assert whole(message("Yes", "stop", tool_calls=[{"index": 0}])) == (
        message("Yes", "stop", tool_calls=[{"index": 0}])
    )


REFUSED = {
    "nothing": b"",
    "no end": frames(plain("a"), plain("b")),
    "an end in the middle": frames(plain("a", "stop"), plain("b", "stop")),
    "tools in pieces": frames(message("a", tool_calls=[{"index": 0}]), message("", "tool_calls")),
    "an unknown field": frames({**plain("a"), "search_info": {}}, plain("", "stop")),
    "parts that are no text": frames(message([{"image": "http://a"}]), message([], "stop")),
    "an error": frames(plain("a"))
    + b'event:error\n:HTTP_STATUS/429\ndata:{"code":"Throttling","message":"no"}\n\n',
    "an error in a frame": frames(plain("a", "stop")).replace(b'"usage"', b'"code":"X","usage"'),
}


@pytest.mark.parametrize("why", REFUSED)
def test_frames_that_may_say_more_or_less_are_no_whole_answer(why: str) -> None:
    assert whole_of(*GENERATION, REFUSED[why]) is None


def test_an_answer_becomes_one_frame_which_is_right_in_both_readings() -> None:
    value = answer(message(TEXT, "stop"))
    data = stream_of(*GENERATION, orjson.dumps(value), include_usage=False)
    assert data == frames(value["output"])
    assert whole_of(*GENERATION, data) == orjson.dumps(value)


@pytest.mark.parametrize("output", [plain("a"), {"embeddings": []}, {"task_status": "PENDING"}])
def test_an_answer_that_is_not_finished_is_no_stream(output: Any) -> None:
    data = orjson.dumps(answer(output))
    assert stream_of(*GENERATION, data, include_usage=False) is None


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1))
def test_what_is_new_is_joined_rightly_or_refused(pieces: list[str]) -> None:
    found = whole(*map(plain, pieces), plain("", "stop"))
    assert found in (plain("".join(pieces), "stop"), None)


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=2))
def test_pieces_too_short_to_mean_the_text_so_far_are_joined_unless_all_grow(
    pieces: list[str],
) -> None:
    if not all(after.startswith(before) for before, after in pairwise(pieces)):
        assert whole(*map(plain, pieces), plain("", "stop")) == plain("".join(pieces), "stop")


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1))
def test_all_so_far_is_read_rightly_or_refused(pieces: list[str]) -> None:
    so_far = ["".join(pieces[: end + 1]) for end in range(len(pieces))]
    found = whole(*map(plain, so_far), plain(so_far[-1], "stop"))
    assert found in (plain(so_far[-1], "stop"), None)


@pytest.mark.parametrize("is_incremental", [False, True])
@pytest.mark.parametrize("path", [mock.TEXT_PATH, mock.MULTIMODAL_PATH])
def test_what_a_provider_streams_is_what_it_answers_whole(path: str, is_incremental: bool) -> None:
    request = {
        "model": "qwen-plus",
        "input": {"messages": [{"role": "user", "content": "one two three four five"}]},
        "parameters": {"incremental_output": is_incremental, "result_format": "message"},
    }
    body = orjson.dumps(request)
    streamed = b"".join(mock.answer(path, body, Settings(), is_stream=True).events)
    answered = orjson.loads(mock.answer(path, body, Settings(), is_stream=False).body)
    found = whole_of(*GENERATION, streamed)
    assert found is not None
    assert orjson.loads(found) == answered
