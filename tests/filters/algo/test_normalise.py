"""Requests that are equal have equal bytes, and no others."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.normalise import canonical

NONE: frozenset[str] = frozenset()


def key(body: dict[str, Any], skip: frozenset[str] = NONE) -> bytes | None:
    return canonical(body, skip=skip, normalise_text=False)


def normal(content: Any, role: str = "user", **fields: Any) -> bytes | None:
    body = {"model": "m", "messages": [{"role": role, "content": content}], **fields}
    return canonical(body, skip=NONE, normalise_text=True)


def test_the_order_of_names_does_not_matter_at_any_depth() -> None:
    one = {"model": "m", "messages": [{"role": "user", "content": "a"}], "x": {"b": 1, "a": 2}}
    other = {"x": {"a": 2, "b": 1}, "messages": [{"content": "a", "role": "user"}], "model": "m"}
    assert key(one) == key(other)


@pytest.mark.parametrize("name", ["tools", "response_format", "text", "parameters"])
def test_the_order_of_a_schema_matters_for_answers_follow_it(name: str) -> None:
    one = {"model": "m", name: {"schema": {"properties": {"why": {}, "what": {}}}}}
    other = {"model": "m", name: {"schema": {"properties": {"what": {}, "why": {}}}}}
    assert key(one) != key(other)
    assert key(one) == key({name: one[name], "model": "m"})


def test_skipped_fields_are_left_out_at_the_top_only() -> None:
    skip = frozenset({"user", "tools"})
    assert key({"model": "m", "user": "a"}, skip) == key({"model": "m", "tools": [1]}, skip)
    assert key({"x": {"user": "a"}}, skip) != key({"x": {"user": "b"}}, skip)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (0.0, -0.0),
        (1, True),
        (0, False),
        (None, False),
        ("1", 1),
        ([], {}),
        ("", None),
        ([1, 2], [2, 1]),
        ("é", "e\u0301"),
        ("a", "a "),
    ],
)
def test_values_that_may_mean_something_else_are_different(one: Any, other: Any) -> None:
    assert key({"a": one}) != key({"a": other})


def test_a_field_that_is_missing_is_not_one_that_is_null() -> None:
    assert key({"a": None}) != key({})


def test_a_number_that_was_rounded_has_no_key() -> None:
    assert key(orjson.loads(b'{"seed": 18446744073709551616}')) is None
    assert key(orjson.loads(b'{"seed": 18446744073709551615}')) is not None
    assert key({"text": "1e+20"}) is not None


def test_endless_nesting_has_no_key() -> None:
    assert key(orjson.loads(b'{"a":' + b"[" * 400 + b"]" * 400 + b"}")) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text("ab ", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=6,
)
BODY = st.dictionaries(st.sampled_from(["model", "messages", "tools", "seed", "text"]), JSON)


@given(BODY, BODY)
def test_different_requests_never_have_the_same_key(one: Any, other: Any) -> None:
    if key(one) == key(other):
        assert one == other
        sort = orjson.OPT_SORT_KEYS  # Python takes 1, 1.0 and true for equal
        assert orjson.dumps(one, option=sort) == orjson.dumps(other, option=sort)


# Texts


def test_texts_are_as_they_came_unless_asked() -> None:
    body = {"messages": [{"role": "user", "content": "a  b"}]}
    assert key(body) != key({"messages": [{"role": "user", "content": "a b"}]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("a b", "a   b"),
        ("a\nb", "a \r\nb"),
        ("a\nb", "a\rb"),
        ("a", "a \n\n"),
        ("a\n\nb", "a\n\n\n\nb"),
        ([{"type": "text", "text": "a b"}], [{"type": "text", "text": "a   b "}]),
    ],
)
@pytest.mark.parametrize("role", ["user", "system", "developer"])
def test_white_space_and_the_form_of_characters_do_not_matter_when_told(
    one: Any, other: Any, role: str
) -> None:
    assert normal(one, role) == normal(other, role)


@pytest.mark.parametrize("name", ["system", "prompt", "input", "instructions"])
def test_texts_outside_of_messages_are_normalised_too(name: str) -> None:
    assert normal("a", **{name: "a  b"}) == normal("a", **{name: "a b"})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("```\na  b\n```", "```\na b\n```"),
        ("    a  b", "    a b"),
        ("`a  b`", "`a b`"),
        ('say "a  b"', 'say "a b"'),
        ("a b", "ab"),
        ("a\nb", "a b"),
        ("a\tb", "a b"),
        ('{"a":  1}', '{"a": 1}'),
        ([{"type": "tool_result", "content": "a  b"}], [{"type": "tool_result", "content": "a b"}]),
        (
            [{"type": "image", "source": {"data": "A  A"}}],
            [{"type": "image", "source": {"data": "A A"}}],
        ),
    ],
)
def test_code_and_data_stay_as_they_are(one: Any, other: Any) -> None:
    assert normal(one) != normal(other)


@pytest.mark.parametrize("role", ["assistant", "tool"])
def test_what_a_model_or_a_tool_said_stays_as_it_is(role: str) -> None:
    assert normal("a  b", role) != normal("a b", role)


def test_schemas_and_arguments_stay_as_they_are() -> None:
    def tools(text: str) -> Any:
        return [{"type": "function", "function": {"name": "f", "description": text}}]

    assert normal("a", tools=tools("a  b")) != normal("a", tools=tools("a b"))


def test_the_request_itself_is_not_changed() -> None:
    body = {"messages": [{"role": "user", "content": "a  b"}], "tools": [1]}
    canonical(body, skip=NONE, normalise_text=True)
    assert body == {"messages": [{"role": "user", "content": "a  b"}], "tools": [1]}
