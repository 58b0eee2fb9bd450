"""Where the prompts of a request stand, and which of their white space says nothing.

Only texts that people or applications write are looked at: never tool results, tool arguments, JSON
schemas, media or ids. What to do with them is for others: `prompt_saver` sends less, the keys of
caches become equal. There are Markdown parsers, but none that gives back the source it has read;
and where a rule here is in doubt, the text stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

Change = Callable[[str, bool], str]
"""A text, and whether it is all that its message says, to the text in its place."""

MAX_CHARS = 200_000
"""A longer text is a document rather than a prompt, and stays as it is."""

TOKENS_PER_PLACE = 2 / 3
"""Of a place with redundant white space (o200k: 0.55 to 0.8)."""

_TEXT_TYPES = frozenset({"text", "input_text"})
_SYSTEM_ROLES = frozenset({"system", "developer"})

_FENCE = re.compile(r"[ \t]*(`{3,}(?=[^`]*$)|~{3,})").match
_FENCE_MARKS = ("```", "~~~")
_DEEP = re.compile(r" {0,3}\t| {4}").match
_WHITE = (" ", "\t", "\r")
_SPECIAL = ("", *_WHITE, "`", "~", ">")
"""How lines begin that are looked at more closely."""
_RUN = re.compile(" {2,}").sub
_HAS_QUOTES = re.compile("[\"'`“]").search
_RUN_OR_QUOTED = re.compile(r"""(`+[^`]*`+|"[^"]*"|“[^”]*”|(?<!\w)'[^']*'(?!\w))| {2,}""").sub
_RUNS = re.compile(r" {2,}(?=[^ \r\n])").findall
_DATA_STARTS = ("<?xml", "<!doctype", "<svg", "diff --git ", "-----begin ", "data:")
_DATA_LINE = re.compile(r"^(?:@@ -|diff --git |-----BEGIN )", re.MULTILINE).search


# Where they stand


def with_texts(body: dict[str, Any], change: Change, roles: Collection[str]) -> dict[str, Any]:
    """`body` with `change` made to the texts of messages of `roles` (`user`, `system`,
    `assistant`), or `body` itself when that changes nothing. `body` stays as it is.

    Source: the API references of OpenAI (chat, completions, responses, embeddings), Anthropic,
    DashScope and Qianfan. A developer's message is one of the system's; a prompt or an input that
    is no message is the user's. Messages are looked at one by one, so that the same message always
    becomes the same.
    """
    is_system, is_user = "system" in roles, "user" in roles
    changed: dict[str, Any] = {}
    for name, value in body.items():
        new = value
        if name == "messages":
            new = _messages(value, change, roles)
        elif name == "input" and type(value) is dict:  # DashScope
            new = with_texts(value, change, roles)
        elif name == "input" and type(value) is list and value and type(value[0]) is dict:
            new = _messages(value, change, roles)
        elif name in ("prompt", "input"):
            new = _prompts(value, change) if is_user else value
        elif name in ("system", "instructions"):
            new = _content(value, change) if is_system else value
        if new is not value:
            changed[name] = new
    return {**body, **changed} if changed else body


def _messages(messages: Any, change: Change, roles: Collection[str]) -> Any:
    if type(messages) is not list:
        return messages
    return _each(messages, lambda message: _message(message, change, roles))


def _message(message: Any, change: Change, roles: Collection[str]) -> Any:
    if type(message) is not dict or message.get("type", "message") != "message":
        return message
    role = message.get("role")
    if role not in roles and not (role in _SYSTEM_ROLES and "system" in roles):
        return message
    content = message.get("content")
    new = _content(content, change)
    return message if new is content else {**message, "content": new}


def _content(content: Any, change: Change) -> Any:
    """A text, or a list of parts some of which are texts."""
    if type(content) is str:
        return change(content, True)
    if type(content) is not list:
        return content
    texts = [part["text"] for part in content if _is_text(part)]
    is_only = len(texts) == 1
    if not is_only and any(mark in text for text in texts for mark in _FENCE_MARKS):
        return content  # code may begin in one and end in another
    return _each(content, lambda part: _part(part, change, is_only))


def _part(part: Any, change: Change, is_only: bool) -> Any:
    if not _is_text(part):
        return part
    text = part["text"]
    new = change(text, is_only)
    return part if new is text else {**part, "text": new}


def _is_text(part: Any) -> bool:
    return (
        type(part) is dict
        and part.get("type", "text") in _TEXT_TYPES
        and type(part.get("text")) is str
    )


def _prompts(value: Any, change: Change) -> Any:
    """A text or a list of texts; tokens, which are numbers, stay."""
    if type(value) is str:
        return change(value, True)
    if type(value) is not list:
        return value
    return _each(value, lambda text: change(text, True) if type(text) is str else text)


def _each(values: Sequence[Any], change: Callable[[Any], Any]) -> Sequence[Any]:
    """The values changed one by one; `values` itself when all of them stay."""
    new = [change(value) for value in values]
    return values if all(map(_is_same, new, values)) else new


def _is_same(one: object, other: object) -> bool:
    return one is other


# What is redundant


def squeeze(text: str, is_whole: bool = True) -> str:
    """`text` without redundant white space; `text` itself when there is none, or it may be data.

    Goes: spaces and tabs at the ends of lines, carriage returns there, all but one of several
    spaces inside a line, all but one of several blank lines; when `is_whole`, blank lines at the
    beginning and white space at the end. Stays: how a line is indented, code between fences,
    indented by four spaces or a tab, or between back quotes, what stands in quotes, quoted lines
    (`>`), lines with tabs inside, patches, and whole texts of JSON or XML.
    """
    if not _has_redundant(text) or len(text) > MAX_CHARS or _is_data(text):
        return text
    squeezed = _squeeze_lines(text.split("\n"), is_whole)
    return squeezed if squeezed and squeezed != text else text


def tokens_saved(before: str, after: str) -> int:
    """About how many tokens less `after`, which is `before` squeezed, has.

    A run of white space is one or two tokens, however long it is. So places count, not characters:
    of o200k two tokens for three places, within a quarter for spaces, line ends and blank lines.
    """
    return round((_places(before) - _places(after)) * TOKENS_PER_PLACE)


def _places(text: str) -> int:
    ends = text.count(" \n") + text.count("\r\n") + text.count("\n\n\n")
    return len(_RUNS(text)) + ends


def _has_redundant(text: str) -> bool:
    return (
        "  " in text
        or " \n" in text
        or "\n\n\n" in text
        or "\r" in text
        or "\t\n" in text
        or text[:1] == "\n"
        or text[-1:] in ("\n", " ", "\t")
    )


def _is_data(text: str) -> bool:
    bare = text.strip()
    if bare[:1] in ("{", "[") and bare[-1:] in ("}", "]"):
        return True
    if bare[:12].lower().startswith(_DATA_STARTS):
        return True
    return _DATA_LINE(text) is not None


def _squeeze_lines(lines: list[str], is_whole: bool) -> str:
    kept: list[str] = []
    blank: list[str] = []  # lines since the last one with anything on it
    fence = ""  # what the code began with that we are in
    is_code = False  # the last line with anything on it is indented code
    for number, line in enumerate(lines):
        if fence:
            kept.append(line)
            if _closes(line, fence):
                fence = ""
            continue
        if not blank and line[:1] not in _SPECIAL and "  " not in line and line[-1] not in _WHITE:
            is_code = False
            kept.append(line)  # nearly every line
            continue
        bare = line.rstrip(" \t\r")
        if not bare:
            blank.append(line)
            continue
        was_code, is_code = is_code, _DEEP(line) is not None
        if blank:
            if (was_code and is_code) or not (kept or is_whole):
                kept += blank
            elif kept:
                kept.append("")
            blank = []
        found = _FENCE(line)
        if found is not None:
            if is_code:  # of a list item, or code that shows a fence: nobody knows where it ends
                kept += lines[number:]
                return "\n".join(kept)
            fence = found[1]
            kept.append(line)
        elif is_code:
            kept.append(line)
        else:
            kept.append(_squeeze_line(line, bare))
    if not is_whole:
        if not blank and not fence and kept:
            kept[-1] = kept[-1].rstrip(" \t\r") + _end_of(lines[-1])
        kept += blank
    return "\n".join(kept)


def _end_of(line: str) -> str:
    return line[len(line.rstrip(" \t\r")) :]


def _closes(line: str, fence: str) -> bool:
    bare = line.strip(" \t\r")
    return len(bare) >= len(fence) and bare == fence[0] * len(bare) and _DEEP(line) is None


def _squeeze_line(line: str, bare: str) -> str:
    """One line of prose; `bare` is `line` without the white space at its end."""
    text = bare.lstrip(" ")
    if text[0] == ">" or "\t" in text:
        return line
    if "  " not in text:
        return bare
    if text.count('"') % 2 or text.count("`") % 2 or ('"' in text and "\\" in text):
        return bare  # what is inside of the quotes, and what outside?
    if _HAS_QUOTES(text) is None:  # a quarter of the time
        return bare[: len(bare) - len(text)] + _RUN(" ", text)
    return bare[: len(bare) - len(text)] + _RUN_OR_QUOTED(_one_space, text)


def _one_space(found: re.Match[str]) -> str:
    return found[1] or " "
