"""The parts of answers: words, counts, sizes, tool arguments."""

from typing import Any

import orjson
import pytest

from sidecar.mock import Settings
from sidecar.mock.content import count_words, encode_pieces, make_content, make_tool_call, text_of


@pytest.mark.parametrize("text", ["", " ", "one", " one  two\n", "你好 世界\t"])
def test_pieces_joined_are_the_text(text: str) -> None:
    content = make_content(Settings(text=text), "", overhead_bytes=0, max_tokens=None)
    assert content.text == text.strip() or content.text == text
    assert len(content.pieces) == len(text.split())


@pytest.mark.parametrize(("count", "text"), [(1, "a"), (2, "a b"), (5, "a b a b a")])
def test_few_words_go_round_for_many_events(count: int, text: str) -> None:
    settings = Settings(text="a b", events=count)
    assert make_content(settings, "", overhead_bytes=0, max_tokens=1).text == text


def test_events_are_made_for_an_empty_text_too() -> None:
    settings = Settings(text="", events=2)
    assert make_content(settings, "", overhead_bytes=0, max_tokens=None).text == "mock mock"


def test_equal_pieces_share_one_event() -> None:
    first, second = encode_pieces(("a", "a"), b'{"x":"@","y":"@"}', b'"@"')
    assert first == b'{"x":"@","y":"a"}'
    assert first is second


def test_words_are_counted_in_text_parts_and_nested_content() -> None:
    parts = [{"type": "text", "text": "a b"}, {"type": "tool_result", "content": [{"text": "c"}]}]
    assert text_of(parts) == "a b c"
    assert count_words(parts, None, "d", {"image": 1}, 5) == 4


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"const": 4}, 4),
        ({"type": "string", "default": "d"}, "d"),
        ({"type": "string", "examples": ["e"]}, "e"),
        ({"type": "boolean"}, True),
        ({"type": "array"}, []),
        ({"type": "object"}, {}),
        ({"oneOf": [{"type": "integer"}]}, 1),
        ({"$ref": "#/$defs/absent"}, None),
        ({}, None),
        (True, None),
    ],
)
def test_argument_fits_its_schema(schema: object, value: object) -> None:
    call = make_tool_call("f", {"properties": {"a": schema}}, call_id="1")
    assert orjson.loads(call.arguments) == {"a": value}
    assert "".join(call.pieces) == call.arguments


def test_schema_that_refers_to_itself_ends() -> None:
    schema: Any = {"properties": {"child": {"$ref": "#"}}}
    assert make_tool_call("f", schema, call_id="1").arguments.startswith('{"child":{"child":')


@pytest.mark.parametrize("schema", [None, {"type": "string"}, 5])
def test_arguments_are_an_object_whatever_the_schema(schema: object) -> None:
    assert make_tool_call("f", schema, call_id="1").arguments == "{}"
