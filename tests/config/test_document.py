import math
from typing import Any

import pytest

from sidecar.config.document import ALIAS_OF_NOTHING, Document, dotted, parse
from sidecar.errors import ConfigError


def read(text: str | bytes) -> Any:
    document, problems = parse("f", text.encode() if isinstance(text, str) else text)
    assert problems == []
    return document.value


def mistakes(text: str | bytes) -> list[str]:
    try:
        _, problems = parse("f", text.encode() if isinstance(text, str) else text)
    except ConfigError as error:
        problems = list(error.problems)
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:30", "12:30"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e3", 1000.0),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("'true'", "true"),
        ('"12"', "12"),
        ("1.2.3", "1.2.3"),
        ("0b1", "0b1"),
        ("=", "="),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = read(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(read("a: .NaN")["a"])


def test_text_over_several_lines_and_a_byte_order_mark_are_read() -> None:
    assert read("\ufeffa: |\n  x\n  y\nb: é\n") == {"a": "x\ny\n", "b": "é"}


def test_an_alias_stands_for_its_anchor() -> None:
    assert read("a: &x {k: [1, 2]}\nb: *x\nc: [*x]") == {
        "a": {"k": [1, 2]},
        "b": {"k": [1, 2]},
        "c": [{"k": [1, 2]}],
    }


def test_every_value_and_key_has_its_line_and_column() -> None:
    document, _ = parse("f", b"a:\n  b: [x, {c: 1}]\n  d:\n    e: 2\n")
    assert str(document.problem(("a", "b", 1, "c"), "m")) == "f:2:14: a.b[1].c: m"
    assert str(document.problem(("a", "b", 1, "c"), "m", at_key=True)) == "f:2:11: a.b[1].c: m"
    assert str(document.problem(("a", "d", "e"), "m")) == "f:4:8: a.d.e: m"


def test_a_block_stands_where_its_key_stands() -> None:
    document, _ = parse("f", b"a:\n  d:\n    e: 2\n")
    assert str(document.problem(("a", "d"), "m")) == "f:2:3: a.d: m"


def test_what_is_not_in_the_file_stands_at_the_nearest_thing_around_it() -> None:
    document, _ = parse("f", b"a: &x\n  b: 1\nc: *x\n")
    assert str(document.problem(("a", "z", 0), "m")) == "f:1:1: a.z[0]: m"
    assert str(document.problem(("c", "b"), "m")) == "f:3:4: c.b: m"
    assert str(document.problem(("y",), "m")) == "f:1:1: y: m"
    assert str(Document("f").problem((), "m")) == "f: m"


def test_a_key_with_dots_is_shown_in_quotes() -> None:
    assert dotted(("models", "gpt-4.1", 0)) == 'models["gpt-4.1"][0]'


def test_a_syntax_error_has_line_and_column() -> None:
    assert mistakes("a: [1, 2\nb: 3}") == [
        "f:2:2: is not YAML: while parsing a flow sequence, did not find expected ',' or ']'"
    ]


def test_a_control_character_has_line_and_column() -> None:
    assert mistakes("é: 1\nb: é\x07") == ["f:2:5: is not YAML: control characters are not allowed"]


def test_bytes_that_are_no_utf_8_have_line_and_column() -> None:
    assert mistakes(b"a: 1\nb: \xff") == ["f:2:4: is not UTF-8 text"]


def test_all_duplicate_keys_are_refused() -> None:
    assert mistakes("a: 1\na: {b: [1]}\nc: {d: 1, d: [2, {e: 3}]}\n") == [
        "f:2:1: a: duplicate key, first in line 1",
        "f:3:11: c.d: duplicate key, first in line 3",
    ]


def test_a_second_document_is_refused() -> None:
    assert mistakes("a: 1\n---\nb: 2") == [
        "f:2:1: a second document: a file holds one; remove the `---`"
    ]


def test_an_empty_file_is_refused() -> None:
    assert mistakes("# nothing\n") == ["f: is empty"]


def test_keys_that_are_no_text_are_refused() -> None:
    assert mistakes("1: a\n4.5: [b]\ntrue: c\n~: d\n? [x, [y]]\n: e\n") == [
        'f:1:1: a key must be text: write "1", in quotes',
        'f:2:1: a key must be text: write "4.5", in quotes',
        'f:3:1: a key must be text: write "true", in quotes',
        'f:4:1: a key must be text: write "~", in quotes',
        "f:5:3: a key must be text",
    ]


def test_an_alias_as_key_is_refused() -> None:
    assert mistakes("a: &x b\n*x : c\n") == ["f:2:1: a key must be text"]


def test_merge_keys_are_refused() -> None:
    assert mistakes("a: &x {b: 1}\nc: {<<: *x}\n") == [
        "f:2:5: c: no merge keys in YAML 1.2: write the keys out"
    ]


def test_tags_are_refused() -> None:
    assert mistakes("a: !!python/name:os.system x\n!!str b: !y [1]\n") == [
        "f:1:4: a: a YAML tag: write the plain value without `!`",
        "f:2:1: a YAML tag: write the plain key without `!`",
        "f:2:10: b: a YAML tag: write the plain value without `!`",
    ]


def test_an_alias_inside_its_own_anchor_is_refused() -> None:
    assert mistakes("a: &x [*x]") == [f"f:1:8: a[0]: {ALIAS_OF_NOTHING}"]


def test_aliases_cannot_multiply_without_end() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (mistake,) = mistakes("\n".join(lines))
    assert mistake.endswith("the file holds more than 100000 values")


def test_nesting_without_end_is_refused() -> None:
    (mistake,) = mistakes("a: " + "[" * 10_000)
    assert mistake.endswith("nested more than 64 levels deep")


def test_a_number_with_thousands_of_digits_is_refused() -> None:
    assert mistakes("a: " + "9" * 5000) == ["f:1:4: a: a number with too many digits"]
