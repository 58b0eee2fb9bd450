"""The last question of a request: what is compared by its meaning, and what exactly."""

from __future__ import annotations

from typing import Any

import pytest

from filters.algo.question import Question, question_of

HI = {"role": "user", "content": "How are you?"}


def asked(*messages: Any, **fields: Any) -> Question | None:
    return question_of("openai", "chat_completions", {"messages": list(messages), **fields})


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def rest(*messages: Any, **fields: Any) -> bytes:
    found = asked(*messages, **fields)
    assert found is not None
    return found.rest


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_question_is_what_the_user_said_last() -> None:
    found = asked(user("One?"), {"role": "assistant", "content": "Yes."}, user("Two?"))
    assert found is not None
    assert found.text == "Two?"
    assert b"One?" in found.rest
    assert b"Two?" not in found.rest


def test_what_stands_behind_it_is_a_part_of_the_rest() -> None:
    begun = {"role": "assistant", "content": "Well,"}
    found = asked(HI, begun)
    assert found is not None
    assert found.text == "How are you?"
    assert found.rest != rest(HI)


def test_of_several_parts_the_last_one_is_the_question() -> None:
    found = asked(user([part("A long document."), part("Who?", cache_control={"type": "x"})]))
    assert found is not None
    assert found.text == "Who?"
    assert b"A long document." in found.rest
    assert found.rest != rest(user([part("A long document."), part("Who?")]))


def test_wording_is_not_in_the_rest() -> None:
    assert rest(user("Who are you?")) == rest(user("And who might you be?"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5 km in miles?", "7 km in miles?"),
        ("From 3 to 4?", "From 4 to 3?"),
        ("In 2024?", "In 2025?"),
        ("1.5 or so?", "1,5 or so?"),
        ("٣ times?", "٤ times?"),
    ],
)
def test_numbers_are(one: str, other: str) -> None:
    assert rest(user(one)) != rest(user(other))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, HI],
        [user([part("How are you?")])],
        [{**HI, "name": "Ann"}],
        [HI, {"role": "assistant", "content": "Fine."}, HI],
    ],
    ids=["system", "parts", "name", "history"],
)
def test_everything_else_is(messages: list[Any]) -> None:
    assert rest(*messages) != rest(HI)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"functions": [{"name": "f"}]},
        {"mcp_servers": [{"url": "x"}]},
        {"web_search_options": {"search_context_size": "low"}},
        {"enable_search": True},
        {"audio": {"voice": "x"}},
        {"modalities": ["text", "audio"]},
        {"n": 2},
    ],
    ids=str,
)
def test_there_is_none_where_more_than_text_decides(fields: dict[str, Any]) -> None:
    assert asked(HI, **fields) is None


@pytest.mark.parametrize("fields", [{"tools": []}, {"n": 1}, {"modalities": ["text"]}], ids=str)
def test_there_is_one_where_no_more_is_asked_for(fields: dict[str, Any]) -> None:
    assert asked(HI, **fields) is not None


@pytest.mark.parametrize(
    "message",
    [
        user([part("What is this?"), {"type": "image_url", "image_url": {"url": "x"}}]),
        user([{"type": "image", "source": {}}, part("What is this?")]),
        user([{"type": "input_audio", "input_audio": {}}]),
        user([{"type": "document", "source": {}}, part("What?")]),
        user([{"type": "tool_result", "tool_use_id": "x"}]),
        user([{"text": "no type"}]),
        user([{"type": "text"}]),
        user(["text"]),
        user({"text": "x"}),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]},
        {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
        {"role": "tool", "content": "x", "tool_call_id": "y"},
        {"role": "function", "content": "x", "name": "y"},
        {"content": "no role"},
        {"role": ["user"], "content": "x"},
        "no message",
    ],
    ids=str,
)
def test_there_is_none_where_any_message_is_more_than_text(message: Any) -> None:
    assert asked(message, HI) is None
    assert asked(HI, message) is None


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "Be brief."}],
        [user("")],
        [user(" \n")],
        [user([])],
        [user(None)],
    ],
    ids=str,
)
def test_there_is_none_where_nothing_is_asked(messages: list[Any]) -> None:
    assert asked(*messages) is None


@pytest.mark.parametrize("messages", [None, "x", {"role": "user"}], ids=str)
def test_there_is_none_in_what_is_no_list_of_messages(messages: Any) -> None:
    assert question_of("openai", "chat_completions", {"messages": messages}) is None


def test_anthropic_s_messages_have_one() -> None:
    found = question_of("anthropic", "messages", {"system": "Be brief.", "messages": [HI]})
    assert found is not None
    assert found.text == "How are you?"


@pytest.mark.parametrize(
    ("dialect", "endpoint"),
    [("openai", "responses"), ("openai", "embeddings"), ("dashscope", "generation")],
)
def test_other_requests_have_none(dialect: str, endpoint: str) -> None:
    assert question_of(dialect, endpoint, {"messages": [HI]}) is None


def test_endless_nesting_has_none() -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"x": deep}
    assert asked({**HI, "extra": deep}) is None
