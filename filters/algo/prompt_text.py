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
_WHITE_CHARS = " \t\r\n"
_SPECIAL = ("", *_WHITE, "`", "~", ">", "-")
"""How lines begin that are looked at more closely."""
_QUOTED_OR_REMOVED = re.compile(r" *>|-(?! [^ ])").match
"""A line that somebody else wrote, or one that a patch takes out: `-x`, but no `- x` of a list."""

_DATA_STARTS = ("<?xml", "<!doctype", "<svg", "diff --git ", "-----begin ", "data:")
_DATA_LINE = re.compile(
    r"^(?:@@ -|diff --git |-----BEGIN |--- \S|\+|<<<<<<<|< )", re.MULTILINE
).search
"""Of keys, and of what `diff` and `git` write in any of their formats."""
_BLOCK = re.compile(
    r"""'{3} | "{3}                                                     # of many languages
    | <(?:pre|code|textarea|script|style|listing|xmp)\b | <!\[CDATA\[
    | \\begin\{
    | <<[-~]?["'\\]?\w                                                  # a shell's
    | (?:\w["']?:|^[ ]*-)[ ]+(?:[!&]\S+[ ]+)?[|>][-+\d]*[ ]*(?:\#.*)?\r?$ # YAML's
    | ::\r?$                                                            # reStructuredText's
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
).search
"""Where a block begins inside of which white space matters, or may be shown to a reader."""
_BLOCK_SIGNS = ("'''", '"""', "<", ">", "|", "\\", "::")
"""One of these is in each of them: looked for first, ten times as fast."""

_RUNS = re.compile(r" {2,}(?=[^ \r\n])").findall
_HEAD = re.compile(r" *(?:(?:[-*+•]|\w{1,9}[.)]) +)?").match
"""What says how deep a line stands: its indent, and the mark of a list with the spaces behind."""
_RULE_OR_QUOTED = re.compile(r"^(?:---| *>)", re.MULTILINE).search

_PAIRS = r"""
    (?<!`)(?P<ticks>`{1,2})[^`\n]+(?P=ticks)(?!`)
    | (?<![\w"#])"(?!\s)[^"\\\n]+(?<!\s)"(?![\w"#])
    | (?<![\w'])'(?!\s)[^'\\\n]+(?<!\s)'(?![\w'])
    | “[^“”„\n]*” | „[^„“”\n]*[“”] | ‘[^‘’\n]*’(?!\w) | ‚[^‚‘’\n]*[‘’](?!\w)
    | «[^«»\n]*» | ‹[^‹›\n]*› | 「[^「」\n]*」 | 『[^『』\n]*』
"""
_PAIR = re.compile(_PAIRS, re.VERBOSE).sub
"""What clearly stands in quotes, on one line."""
_RUN = re.compile(" {2,}").sub
_RUN_OR_PAIR = re.compile(rf"(?P<pair>{_PAIRS})|[ ]{{2,}}", re.VERBOSE).sub
_MARK = re.compile(
    r"""["`“”„‟«»‹›‘‚‛「」『』]
    | ['’](?: (?!\w) | (?<!\w\w.)(?<!\b[Ii].) | (?<=\b[bBfFrRuU][bBfFrR8].) )""",
    re.VERBOSE,
).search
"""A quotation mark, which an apostrophe within a word is not; that of `f'a'` is one."""


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
    if not is_only and any(map(_may_run_on, texts)):
        return content
    return _each(content, lambda part: _part(part, change, is_only))


def _part(part: Any, change: Change, is_only: bool) -> Any:
    if not _is_text(part):
        return part
    text = part["text"]
    new = change(text, is_only)
    return part if new is text else {**part, "text": new}


def _may_run_on(text: str) -> bool:
    """May code or data begin in this part, and end in another?"""
    return (
        any(mark in text for mark in _FENCE_MARKS)
        or _block(text) is not None
        or _DATA_LINE(text) is not None
    )


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

    Goes: spaces and tabs at the ends of lines, but for two spaces (Markdown's line break), carriage
    returns there, all but one of several blank lines. When `is_whole`, also blank lines at the
    beginning, white space at the end, and all but one of several spaces inside the only line that
    has any, if no line stands right above or below it: else they may be columns.

    Stays: how a line is indented, code between fences, indented by four spaces or a tab, quoted
    lines (`>`), lines with tabs inside or with a quotation mark that is not clearly one of a pair
    on that line, what stands in quotes on one line, and everything from the beginning of a block
    that may hold code. Whole texts stay that are JSON or XML, or hold a patch.
    """
    if not _has_redundant(text) or len(text) > MAX_CHARS or _is_data(text):
        return text
    squeezed = _squeeze_lines(text, is_whole)
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


def _squeeze_lines(text: str, is_whole: bool) -> str:
    lines = text.split("\n")
    block = _block(text)
    begin = len(lines) if block is None else text.count("\n", 0, block.start())
    last = text.rstrip(_WHITE_CHARS).count("\n") if is_whole else len(lines)
    kept: list[str] = []
    blank: list[str] = []  # lines since the last one with anything on it
    fence = ""  # what the code began with that we are in
    is_code = False  # the last line with anything on it is indented code
    runs: list[tuple[int, int]] = []  # lines with several spaces inside: where kept, and number
    for number, line in enumerate(lines):
        if fence:
            kept.append(line)
            if _closes(line, fence):
                fence = ""
            continue
        if (
            not blank
            and line[:1] not in _SPECIAL
            and "  " not in line
            and line[-1] not in _WHITE
            and number < begin
        ):
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
        if number >= begin or (found is not None and is_code):
            kept += lines[number:]  # a fence in a list, or code that shows one: where does it end?
            return "\n".join(kept)
        if found is not None:
            fence = found[1]
            kept.append(line)
        elif is_code:
            kept.append(line)
        else:
            if "  " in bare.lstrip(" "):
                runs.append((len(kept), number))
            kept.append(_squeeze_end(line, bare, number < last))
    if is_whole and len(runs) == 1:
        ((place, number),) = runs
        if _is_alone(lines, number) and _RULE_OR_QUOTED(text) is None:
            kept[place] = _squeeze_runs(kept[place], lines[: number + 1])
    if not is_whole:
        if not blank and not fence and kept:
            kept[-1] = kept[-1].rstrip(" \t\r") + _end_of(lines[-1])
        kept += blank
    return "\n".join(kept)


def _block(text: str) -> re.Match[str] | None:
    return _BLOCK(text) if any(sign in text for sign in _BLOCK_SIGNS) else None


def _end_of(line: str) -> str:
    return line[len(line.rstrip(" \t\r")) :]


def _closes(line: str, fence: str) -> bool:
    bare = line.strip(" \t\r")
    return len(bare) >= len(fence) and bare == fence[0] * len(bare) and _DEEP(line) is None


def _squeeze_end(line: str, bare: str, goes_on: bool) -> str:
    """One line of prose; `bare` is `line` without the white space at its end."""
    if len(bare) == len(line) or _QUOTED_OR_REMOVED(line) or "\t" in bare or "\r" in bare:
        return line
    if _is_quote_open(line):
        return line
    return bare + "  " if goes_on and line.rstrip("\r").endswith("  ") else bare


def _is_quote_open(text: str) -> bool:
    """Is there a quotation mark in it that is not clearly one of a pair?"""
    return _MARK(text) is not None and _MARK(_PAIR(" ", text)) is not None


def _is_alone(lines: list[str], number: int) -> bool:
    return not any(map(str.strip, [*lines[max(number - 1, 0) : number], *lines[number + 1 :][:1]]))


def _squeeze_runs(line: str, lines: list[str]) -> str:
    """`line`, as it is kept of the last of `lines`, with one space for several inside."""
    if _QUOTED_OR_REMOVED(line) or "\t" in line.rstrip() or "\r" in line.rstrip():
        return line
    if _is_quote_open("\n".join(lines)):
        return line  # does it stand inside, or outside?
    found = _HEAD(line)
    head = "" if found is None else found[0]
    bare = line.rstrip(" ")
    end, rest = line[len(bare) :], bare[len(head) :]
    if _MARK(rest) is None:  # a quarter of the time
        return head + _RUN(" ", rest) + end
    return head + _RUN_OR_PAIR(_one_space, rest) + end


def _one_space(found: re.Match[str]) -> str:
    return found["pair"] or " "
