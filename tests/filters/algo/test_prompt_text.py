"""Redundant white space goes from prompts; code, data and everything else stay."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.prompt_text import MAX_CHARS, squeeze, tokens_saved, with_texts

PROSE = {
    "spaces": ("a   b    c", "a b c"),
    "spaces in a paragraph of its own": ("a\n\nb   c\n\nd", "a\n\nb c\n\nd"),
    "ends of lines": ("a \nb \t\nc\t\nd", "a\nb\nc\nd"),
    "carriage returns": ("a\r\nb\r\n\r\nc", "a\nb\n\nc"),
    "blank lines": ("a\n\n\n\nb\n \n \nc", "a\n\nb\n\nc"),
    "ends of the text": ("\n\na\n\n", "a"),
    "indents stay": ("a\n\n  - c  d", "a\n\n  - c d"),
    "an apostrophe": ("it's  the dog's  bone", "it's the dog's bone"),
    "around code": ("a  b `c  d` e  f", "a b `c  d` e f"),
    "around quotes": ('a  b "c  d" e  f', 'a b "c  d" e f'),
    "around a fence": (
        "a  b\n\n```py\nc  d \n\n\n\ne\n```\nf \ng",
        "a b\n\n```py\nc  d \n\n\n\ne\n```\nf\ng",
    ),
    "around tildes": ("a \nb\n~~~\n```\nc  d\n~~~\nf \ng", "a\nb\n~~~\n```\nc  d\n~~~\nf\ng"),
    "no code in one line": ("a ```b``` c\ne \nf", "a ```b``` c\ne\nf"),
    "behind a table": ("| a |\n| - |\n\n\nb \nc", "| a |\n| - |\n\nb\nc"),
    "behind I'm": ("I'm  here", "I'm here"),
    "before a block": ("a \n\n\nb\n<pre>\n\n\nc \n", "a\n\nb\n<pre>\n\n\nc \n"),
}


@pytest.mark.parametrize("name", PROSE)
def test_white_space_that_says_nothing_goes(name: str) -> None:
    before, after = PROSE[name]
    assert squeeze(before) == after


KEPT = {
    "nothing to do": "a b\n\nc",
    "a fence": "```\na  b  \n\n\n\nc\n```",
    "a fence that does not end": "```\na  b\n\n\n\n",
    "a longer fence": "````\na  b\n```\nc  d\n````",
    "a fence with more behind it": "```\na  b\n``` py\nc  d\n```",
    "a fence in a list": "- a\n\n      ```\n      b  c\n      ```\nd  e",
    "indented code": "a\n\n    b  c  \n\n\n    d  e",
    "code after a tab": "a\n\n\tb  c",
    "rows under a rule": "Totals\n\n---\n\na   b",
    "a table with tabs": "a\tb  c\td\t",
    "a quotation": "> a  b\n>   c",
    "single quotes": "where name = 'a  b'",
    "typographic quotes": "she said “a  b”",
    "quotes that do not end": 'a  5" screw',
    "quotes with escapes": r'"a \"b  c\" d"',
    "back quotes that do not end": "a ` b  c",
    "a letter before the quotes": "Mend it:\nprint(f'a  b')",
    "a letter before quotes alone": "b'a  b'",
    "a letter before quotes of a database": "name = N'a  b'",
    "low quotes": "Was heißt „a  b“?",
    "angle quotes": "« a   b »",
    "Chinese quotes": "「a  b」里有几个空格?",
    "single typographic quotes": "How is ‘a  b’ written?",
    "a string of several lines": 's = """\na   b \n\n\nc\n"""\n',
    "a string in three single quotes": "s = '''\na   b\n'''\n",
    "columns with empty cells": "NAME   READY   GATES\na-1    1/1\nb-1            gate1",
    "columns of fixed width": "id  name      age\n1             30\n2   Bob       41",
    "one row of columns": "id name\n1  Bob\n22 Eve",
    "a table": "| a    | b  |\n| ---  | -- |",
    "a list of columns": "- a  b\n  - c  d",
    "a patch without places": "--- a/x\n+++ b/x\n-a  b \n+a b",
    "lines that a patch takes out and puts in": "-a  b\n+a b",
    "a patch in the oldest format": "3c3\n< a  b\n---\n> a b",
    "a conflict": "<<<<<<< a\nb  c \n=======\nb c\n>>>>>>> d",
    "a scalar of YAML": "Check:\nmotd: |\n  a  b\n\n\n  c",
    "HTML that keeps its spaces": "<pre>\na   b\n</pre> is printed",
    "HTML with code": "a\n<code>\nb\n\n\n\nc\n</code>",
    "a break in Markdown": "Roses are red,  \nviolets are blue",
    "two letters before the quotes": "a = rb'a  b'if c else d",
    "a quotation that began above": 'He said "a\n\nb  c\n\nd"',
    "quotes in raw quotes": 'let s = r#"a "b  c" d"#',
    "white space in a quotation that goes on": 'say "a \nb"',
    "carriage returns inside a line": "a  b\rc",
    "how deep a list stands": "1.  a\n\n        b",
    "a text for a shell": "cat <<EOF\na  b \n\n\nEOF",
    "a list of scalars of YAML": "- |\n  a \n\n\n  b",
    "a literal block": "Like this::\n\n  a  b \n",
    "only what a patch takes out": "-    return  a \nb",
    "an object": '{"a":  1}',
    "a list": "[1,  2]\n\n",
    "XML": '<?xml version="1.0"?>\n<a>  b  </a>',
    "a patch": "Apply:\n@@ -1,2 +1,2 @@\n-a  b\n+a   b",
    "a key": "-----BEGIN KEY-----\nAAAA  \n-----END KEY-----",
    "only white space": " \n\n ",
}


@pytest.mark.parametrize("name", KEPT)
def test_code_and_data_stay(name: str) -> None:
    text = KEPT[name]
    assert squeeze(text) is text


def test_a_very_long_text_stays() -> None:
    text = "a  " * MAX_CHARS
    assert squeeze(text) is text


def test_a_break_in_markdown_stays_where_more_goes() -> None:
    assert squeeze("a  \r\nb    \nc \nd  \n") == "a  \nb  \nc\nd"


def test_several_lines_with_several_spaces_lose_only_their_ends_and_blank_lines() -> None:
    assert squeeze("a   b \n1   2 \n\n\n\nc   d\n") == "a   b\n1   2\n\nc   d"


def test_parts_of_a_text_keep_their_ends_for_they_stand_side_by_side() -> None:
    assert squeeze("\n\n a \nb \n\n", False) == "\n\n a\nb\n\n"
    assert squeeze("a \nb ", False) == "a\nb "


def test_parts_of_a_text_keep_spaces_inside_lines_for_columns_may_stand_in_several() -> None:
    assert squeeze("a  b", False) == "a  b"


TEXT = st.lists(
    st.sampled_from(
        [
            *("word", " ", "  ", "\n", "\n\n\n", "\t", "\r\n", "```", "~~~", "`", '"', "'", ">"),
            *("    ", "数据", "- ", "``", "{", "}", "\u00a0", "“", "”", "\\"),
        ]
    ),
    max_size=40,
).map("".join)


@given(TEXT, st.booleans())
def test_what_was_squeezed_stays_as_it_is(text: str, is_whole: bool) -> None:
    once = squeeze(text, is_whole)
    assert squeeze(once, is_whole) == once


@given(TEXT, st.booleans())
def test_nothing_but_white_space_goes_and_no_two_words_become_one(
    text: str, is_whole: bool
) -> None:
    once = squeeze(text, is_whole)
    assert len(once) <= len(text)
    assert re.split(r"[ \t\r\n]+", once.strip(" \t\r\n")) == (
        re.split(r"[ \t\r\n]+", text.strip(" \t\r\n"))
    )


@given(TEXT)
def test_every_fence_keeps_its_inside(code: str) -> None:
    code = code.replace("`", "").replace("~", "")
    text = f"a \nb\n```\n{code}\n```\nc \nd"
    assert squeeze(text).startswith(f"a\nb\n```\n{code}\n```\nc")


def test_what_may_begin_a_block_inside_a_fence_is_not_sure_to_end_with_it() -> None:
    assert squeeze('a \nb\n```\n"""\n```\nc \nd') == 'a\nb\n```\n"""\n```\nc \nd'


def test_tokens_are_counted_by_the_place_and_not_by_the_character() -> None:
    text = "a  b" + " " * 50 + "c\n\n\n\nd \ne\n\n\n\nf"
    assert tokens_saved(text, squeeze(text)) == round(5 * 2 / 3)


# Where texts stand


def upper(text: str, is_whole: bool) -> str:
    return text.upper() if is_whole else f"({text.upper()})"


ALL = frozenset({"user", "system"})

BODIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": (
        {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]},
    ),
    "a developer": (
        {"messages": [{"role": "developer", "content": "a"}]},
        {"messages": [{"role": "developer", "content": "A"}]},
    ),
    "one part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "x"}]}]},
    ),
    "several parts": (
        {"messages": [{"role": "user", "content": [{"text": "a"}, {"text": "b"}]}]},
        {"messages": [{"role": "user", "content": [{"text": "(A)"}, {"text": "(B)"}]}]},
    ),
    "Anthropic": (
        {"system": [{"type": "text", "text": "a"}], "messages": []},
        {"system": [{"type": "text", "text": "A"}], "messages": []},
    ),
    "responses": (
        {
            "instructions": "a",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "b"}]},
                {"type": "function_call_output", "output": "c"},
            ],
        },
        {
            "instructions": "A",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "B"}]},
                {"type": "function_call_output", "output": "c"},
            ],
        },
    ),
    "an input": ({"input": "a"}, {"input": "A"}),
    "prompts": ({"prompt": ["a", "b"]}, {"prompt": ["A", "B"]}),
    "DashScope": (
        {"input": {"messages": [{"role": "user", "content": [{"text": "a"}]}]}},
        {"input": {"messages": [{"role": "user", "content": [{"text": "A"}]}]}},
    ),
    "DashScope's prompt": ({"input": {"prompt": "a"}}, {"input": {"prompt": "A"}}),
}


@pytest.mark.parametrize("name", BODIES)
def test_texts_are_found_where_each_api_has_them(name: str) -> None:
    before, after = BODIES[name]
    assert with_texts(before, upper, ALL) == after


UNTOUCHED: dict[str, dict[str, Any]] = {
    "an answer": {"messages": [{"role": "assistant", "content": "a"}]},
    "a tool's result": {"messages": [{"role": "tool", "content": "a"}]},
    "a block with a tool's result": {
        "messages": [{"role": "user", "content": [{"type": "tool_result", "content": "a"}]}]
    },
    "arguments": {"messages": [{"role": "user", "tool_calls": [{"arguments": "a"}]}]},
    "media": {"messages": [{"role": "user", "content": [{"type": "image", "data": "a"}]}]},
    "a schema": {"tools": [{"description": "a"}], "response_format": {"name": "a"}},
    "tokens": {"prompt": [1, 2], "input": [[1], [2]]},
    "a stored prompt": {"prompt": {"id": "a"}},
    "texts to embed": {"input": {"texts": ["a"]}},
    "no messages": {"messages": "a", "system": 1, "input": None},
    "a fence through several parts": {
        "messages": [{"role": "user", "content": [{"text": "```\na"}, {"text": "b\n```"}]}]
    },
    "a string through several parts": {
        "messages": [{"role": "user", "content": [{"text": '"""a'}, {"text": 'b"""'}]}]
    },
    "a patch through several parts": {
        "messages": [{"role": "user", "content": [{"text": "+a"}, {"text": "b"}]}]
    },
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_everything_else_stays(name: str) -> None:
    body = UNTOUCHED[name]
    assert with_texts(body, upper, ALL) is body


def test_roles_that_are_not_asked_for_stay() -> None:
    body = {"system": "a", "messages": [{"role": "user", "content": "b"}], "prompt": "c"}
    only_system = with_texts(body, upper, frozenset({"system"}))
    assert only_system == {**body, "system": "A"}
    assert with_texts(body, upper, frozenset({"assistant"})) is body


def test_a_body_without_a_change_is_the_same_object() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "A"}]}]}
    assert with_texts(body, lambda text, is_whole: text, ALL) is body
