"""The texts in requests and answers, and how many tokens they are: for what no provider reports.

What is read follows the API references of OpenAI, Anthropic, DashScope and Qianfan, and what
servers that speak like OpenAI add. Which vocabulary counts is for `tokens`.

The work is bounded, since it is done at once when a call ends: of an answer 32 KiB or 1,000 lines
are read, of a request 4 KiB of text or 500 pieces, and the rest is taken to be like that. A request
of 1 KB takes 10 to 35 µs, a stream of 32 KiB or more 0.4 to 0.9 ms, both together at most 1.5 ms
for all texts that were tried, with every vocabulary and none of them seen before (CPython 3.11).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from math import sqrt
from typing import Any

import orjson

from filters.algo.estimate import TOKENS_PER_MEDIUM, estimate_input, tokens_of_text
from filters.algo.tokens import Vocabularies
from sidecar.api import Call, Decoder, Rejected

MESSAGE_TOKENS = 4
"""Marks around each message, and its role (OpenAI's cookbook, "How to count tokens")."""
ANSWER_TOKENS = 3
"""Marks that begin the answer, at the end of the input (the same)."""

READ_BYTES = 32 * 1024
"""Of an answer; whoever keeps its beginning for `count_answer` need not keep more."""
READ_LINES = 1000
"""The same of a stream: 500 events of OpenAI's, 330 of Anthropic's."""
READ_PARTS = 500
"""Of a list in an answer, or of texts in one that is cut."""
_STEP_BYTES = 1024
REQUEST_BYTES = 4 * 1024
REQUEST_PARTS = 500
"""The same of a request."""

STREAM_BYTES_PER_TOKEN = 100
JSON_BYTES_PER_TOKEN = 5
"""Of an answer of which nothing was kept. OpenAI's events have 200 to 300 bytes and a token or
two, Anthropic's 130 and a few, in JSON a token is a token."""

Add = Callable[[str], object]


# Answers: the texts of one event, or of one whole JSON answer


def answer_text(dialect: str, event: Mapping[str, Any]) -> str:
    """All that the model wrote in one event of a stream, or in one whole answer: text, reasoning,
    refusals, calls of tools. What repeats earlier events is left out, but for DashScope's, which
    repeat the answer so far unless they were asked to be incremental."""
    found: list[str] = []
    _ANSWERS.get(dialect, _openai)(event, found.append)
    return "".join(found)


def _openai(event: Mapping[str, Any], add: Add) -> None:
    choices = event.get("choices")
    if type(choices) is list:
        for choice in _objects(choices):
            _message(choice.get("delta") or choice.get("message"), add)
            _content(choice.get("text"), add)
        return
    kind = event.get("type")
    if type(kind) is not str:
        for item in _objects(event.get("output")):
            _item(item, add)
    elif kind.endswith(".delta"):
        if "audio" not in kind or "transcript" in kind:
            _content(event.get("delta"), add)
    elif kind == "response.output_item.added":
        for item in _objects([event.get("item")]):
            _content(item.get("name"), add)


def _item(item: Mapping[str, Any], add: Add) -> None:
    """One of a response's output or input."""
    for name in ("content", "summary", "name", "arguments", "input", "output"):
        _content(item.get(name), add)


def _message(message: Any, add: Add) -> None:
    if type(message) is not dict:
        return
    _content(message.get("content"), add)
    _content(message.get("reasoning_content") or message.get("reasoning"), add)
    _content(message.get("refusal"), add)
    for call in _objects(message.get("tool_calls")):
        _function(call.get("function"), add)
    _function(message.get("function_call"), add)


def _function(function: Any, add: Add) -> None:
    if type(function) is dict:
        _content(function.get("name"), add)
        _content(function.get("arguments"), add)


def _content(value: Any, add: Add) -> None:
    """A text, or parts that have one."""
    if type(value) is str:
        add(value)
    elif type(value) is list:
        for part in value[:READ_PARTS]:
            if type(part) is dict:
                for name in ("text", "refusal", "thinking"):
                    _content(part.get(name), add)
            elif type(part) is str:
                add(part)


def _anthropic(event: Mapping[str, Any], add: Add) -> None:
    kind = event.get("type")
    if kind == "content_block_delta":
        delta = event.get("delta")
        if type(delta) is dict:
            for name in ("text", "partial_json", "thinking"):
                _content(delta.get(name), add)
    elif kind == "content_block_start":
        for block in _objects([event.get("content_block")]):
            _block(block, add)
    elif kind == "message":
        for block in _objects(event.get("content")):
            _block(block, add)


def _block(block: Mapping[str, Any], add: Add) -> None:
    for name in ("text", "thinking", "name"):
        _content(block.get(name), add)
    if block.get("input"):
        add(_json(block["input"]))


def _dashscope(event: Mapping[str, Any], add: Add) -> None:
    output = event.get("output")
    if type(output) is dict:
        _content(output.get("text"), add)
        for choice in _objects(output.get("choices")):
            _message(choice.get("message"), add)


def _qianfan(event: Mapping[str, Any], add: Add) -> None:
    _content(event.get("result"), add)
    _function(event.get("function_call"), add)


_ANSWERS = {
    "openai": _openai,
    "anthropic": _anthropic,
    "dashscope": _dashscope,
    "qianfan": _qianfan,
}


def _objects(values: Any) -> list[dict[str, Any]]:
    if type(values) is not list:
        return []
    return [each for each in values[:READ_PARTS] if type(each) is dict]


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


# Requests

_MEDIA = frozenset({"image", "audio", "video", "file", "document"})
"""Words in the types of parts; DashScope's parts have no type, and these as fields."""


def request_parts(dialect: str, body: Mapping[str, Any]) -> Iterator[str | int]:
    """What a model is given of a request, piece by piece: texts, and as numbers the tokens of what
    is none (media, marks around messages, prompts that are tokens already)."""
    if dialect == "dashscope":
        given, parameters = body.get("input"), body.get("parameters")
        body = {
            **(given if type(given) is dict else {}),
            "tools": parameters.get("tools") if type(parameters) is dict else None,
        }
    for name in ("system", "instructions"):
        yield from _given(body.get(name))
    for name in ("tools", "functions"):
        for tool in _objects(body.get(name)):
            yield _json(tool.get("function", tool))
    messages = body.get("messages")
    if type(messages) is list:
        yield ANSWER_TOKENS
        yield from _messages(messages)
    for name in ("prompt", "input", "texts"):
        value = body.get(name)
        if type(value) is dict:  # DashScope's embeddings have `texts` in it
            value = value.get("texts")
        if type(value) is list and value and type(value[0]) is dict:
            yield ANSWER_TOKENS
            yield from _messages(value)
        else:
            yield from _given(value)


def _messages(messages: list[Any]) -> Iterator[str | int]:
    for message in messages:
        if type(message) is dict:
            yield MESSAGE_TOKENS
            yield from _given(message.get("content"))
            found: list[str] = []
            _message({**message, "content": None}, found.append)
            for name in ("name", "arguments", "output"):  # items of a response, a tool's answer
                _content(message.get(name), found.append)
            yield from found


def _given(value: Any) -> Iterator[str | int]:
    """A text, parts of a message, or tokens."""
    if type(value) is str:
        yield value
    elif type(value) is list:
        if value and type(value[0]) is int:
            yield len(value)
            return
        for part in value:
            if type(part) is str:
                yield part
            elif type(part) is list:
                yield len(part)
            elif type(part) is dict:
                yield from _given_part(part)


def _given_part(part: Mapping[str, Any]) -> Iterator[str | int]:
    kind, source = part.get("type"), part.get("source")
    if type(source) is dict and source.get("type") == "text":
        yield from _given(source.get("data"))
    elif not _MEDIA.isdisjoint(part) or (
        type(kind) is str and not _MEDIA.isdisjoint(kind.split("_"))
    ):
        yield TOKENS_PER_MEDIUM
    else:
        found: list[str] = []
        _block(part, found.append)
        yield from found
        yield from _given(part.get("content"))  # of a tool's result


# Counting


def count_request(call: Call, model: str, vocabularies: Vocabularies) -> int:
    """Tokens of a call's input, for `model` as its provider names it; 0 when it has no body that
    was read."""
    try:
        parts = request_parts(call.dialect.name, call.json) if call.body else iter(())
    except Rejected:  # no JSON
        return estimate_input(call)
    total, left = 0, REQUEST_BYTES
    texts: list[str] = []
    of_texts = 0
    for number, part in enumerate(parts):
        if left <= 0 or number >= REQUEST_PARTS:
            break
        if isinstance(part, int):
            total += part
            continue
        text = part[: left if part.isascii() else left // 3 + 1]
        of_texts += vocabularies.local_count(model, text)
        texts.append(text)
        left -= len(text) if text.isascii() else 3 * len(text)
        if len(text) < len(part):
            break
    else:
        return total + of_texts
    weighed = sum(map(tokens_of_text, texts))
    rest = estimate_input(call) - weighed - total
    return total + of_texts + max(0, round(rest * of_texts / max(weighed, 1)))


def count_answer(
    dialect: str,
    model: str,
    pieces: Sequence[bytes],
    media_type: str,
    size: int,
    vocabularies: Vocabularies,
) -> int:
    """Tokens of an answer of `size` bytes that begins with `pieces`, cut anywhere."""
    data = b"".join(pieces)
    is_json = media_type.endswith("json") or data.lstrip()[:1] == b"{"
    if not data:
        return size // (JSON_BYTES_PER_TOKEN if is_json else STREAM_BYTES_PER_TOKEN)
    if is_json:
        text, scale = _text_of_json(dialect, data, size)
    else:
        text, scale = _text_of_stream(dialect, data, size)
    return round(vocabularies.local_count(model, text) * scale)


def _text_of_json(dialect: str, data: bytes, size: int) -> tuple[str, float]:
    """What was read of an answer, and how many times as much it is in all."""
    if len(data) == size <= READ_BYTES:
        try:
            answer = orjson.loads(data)
        except orjson.JSONDecodeError:
            pass
        else:
            return (answer_text(dialect, answer) if type(answer) is dict else ""), 1.0
    data = data[:READ_BYTES]
    text, read = _salvaged(data)
    return text, size / read


def _text_of_stream(dialect: str, data: bytes, size: int) -> tuple[str, float]:
    """The same of a stream of events."""
    decoder = Decoder()
    texts: list[str] = []
    lines = at = 0
    end = min(len(data), READ_BYTES)
    while at < end and lines < READ_LINES:
        step = data[at : min(at + _STEP_BYTES, end)]
        at += len(step)
        lines += step.count(b"\n") + step.count(b"\r")
        for event in decoder.feed(step):
            fields = event.json()
            if type(fields) is dict and (text := answer_text(dialect, fields)):
                texts.append(text)
    scale = size / at
    if dialect == "dashscope" and len(texts) > 1 and all(map(_goes_on, pairwise(texts))):
        return texts[-1], sqrt(scale)  # each event is as long as the answer was by then
    texts += [_salvaged(event.raw)[0] for event in decoder.finish()]  # cut there
    return "".join(texts), scale


def _goes_on(pair: tuple[str, str]) -> bool:
    return pair[1].startswith(pair[0])


_TEXT_FIELD = re.compile(
    rb'"(?:content|text|reasoning_content|reasoning|refusal|arguments|thinking|partial_json|result'
    rb'|name|delta)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)'
).finditer


def _salvaged(data: bytes) -> tuple[str, int]:
    """The texts of JSON that is cut somewhere, the last one as far as it goes; and how much of the
    data was read for them."""
    found = list(islice(_TEXT_FIELD(data), READ_PARTS))
    read = found[-1].end() if len(found) == READ_PARTS else len(data)
    return "".join([_unquoted(each[1]) for each in found]), read


def _unquoted(text: bytes) -> str:
    if b"\\" not in text:
        return text.decode("utf-8", "ignore")
    for end in (len(text), text.rfind(b"\\")):  # it may be cut inside of an escape
        try:
            return str(orjson.loads(b'"%b"' % text[:end].decode("utf-8", "ignore").encode()))
        except orjson.JSONDecodeError:
            continue
    return ""
