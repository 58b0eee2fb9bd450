"""How many tokens a text or a request will take, from its bytes: before the provider counts.

Fast and rough: characters are weighed by their kind. Tokenizers know one family of models each,
and are corrected by the provider's own figures seconds later all the same; `tokens` uses one for
what no provider reports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from typing import Any, AnyStr

from sidecar.api import LOST_USAGE, Call, Key, Rejected, Usage

# Tokens of a character, by its kind.

ASCII = 0.2
"""Of any ASCII character..."""
MARK = 0.3
"""... and so much more of a digit or a punctuation mark: most of them begin a token."""
WIDE = 0.79
"""From U+2000 up, three bytes in UTF-8. Chinese has 0.62 (manuals) to 0.9 (literature), Japanese
and Korean 0.75, typographic marks 0.9."""
NARROW = 0.4
"""Other letters: Cyrillic 0.3 to 0.45, Arabic 0.3, Greek and Thai 0.4, Latin with accents 0.4 to
0.7."""
ASTRAL = 1.4
"""Emoji and rare Chinese characters, four bytes in UTF-8."""

# Framing: what it weighs as text, less what a model is given for it.

BODY_FRAME = 12.0
"""The model's name and the parameters are no input."""
MESSAGE_FRAME = 6.0
"""`{"role":"user","content":""},` weighs 10; the marks between two messages are about 4 tokens."""
TEXT_FRAME = 4.7
"""Of each `"text"`; a part, `{"type":"text","text":""},`, has two."""

TOKENS_PER_MEDIUM = 800
"""Of one image, sound or document inside the body: providers count 85 to 1,600 for an image."""

NO_TOKENS = frozenset({"models", "count_tokens"})
"""Endpoints at which nothing is worked on."""
NO_OUTPUT = NO_TOKENS | {"embeddings"}
"""Endpoints whose answers are no tokens."""
OUTPUT_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
MOST_OUTPUT = 10_000_000
"""No answer has more, whatever its caller allows: sums stay figures that mean something."""

_ESTIMATE: Key[tuple[int, int, int]] = Key("token_estimate")

_MARKS = bytes(each for each in range(0x21, 0x7F) if not chr(each).isalpha() and each != 0x5C)
"""Without the backslash: what it escapes is counted."""
_NOT_FIRST = bytes((*range(0xC2), *range(0xF5, 0x100)))
"""All but the first bytes of longer characters (RFC 3629)."""
_FIRST_OF_2 = bytes(range(0xC2, 0xE0))
_FIRST_OF_4 = bytes(range(0xF0, 0xF5))
_FIRST_OF_NARROW = bytes(range(0xC2, 0xE2))

_SAMPLED_BYTES = 64 * 1024
"""Of a longer body a sample of so many is weighed..."""
_SAMPLED_CHARS = 32 * 1024
"""... of a longer text of so many characters..."""
_WINDOWS = 16
"""... in so many pieces, spread evenly."""
_SEARCHED_BYTES = 2048
"""A shorter body is not searched for media: what could be in it makes little difference."""
_MEDIUM_BYTES = 128
"""A shorter text is no medium."""
_IN_URL = b";base64,"
_IN_FIELD = b'"data":'
_BASE64 = rb"[A-Za-z0-9+/=_\\-]{64}"  # some clients write `\/`
_VALUE = re.compile(rb'"data":\s*"(' + _BASE64 + rb")").match
_IS_BASE64 = re.compile(_BASE64).match


def count_lost(call: Call) -> None:
    """An attempt was given up that its upstream has, and may charge for: its input, at least. What
    it wrote nobody counted."""
    lost = call.get(LOST_USAGE) or Usage()
    call[LOST_USAGE] = lost._replace(input=lost.input + estimate_input(call))


def takes_tokens(call: Call) -> bool:
    """Whether it asks for anything to be worked on: not when models are listed, tokens counted, or
    files looked after, which has no body."""
    return call.endpoint.name not in NO_TOKENS and bool(call.body or call.upload is not None)


def estimate(call: Call, reserve: int) -> tuple[int, int]:
    """Tokens that the request will take as input, and that the answer may have: what the caller
    allows, or `reserve`, for each choice. Made out once for each call.

    Of a body that streams through, which is no JSON, nothing is known: 0.
    """
    known = call.get(_ESTIMATE)
    if known is None:
        known = call[_ESTIMATE] = _estimate(call)
    tokens_in, bound, choices = known
    tokens_out = (bound or reserve) * choices
    return tokens_in, tokens_out if tokens_out < MOST_OUTPUT else MOST_OUTPUT


def estimate_input(call: Call) -> int:
    """The first of `estimate`."""
    return estimate(call, 0)[0]


def _estimate(call: Call) -> tuple[int, int, int]:
    """Tokens of the input, those that the caller allows for an answer (0: it does not say), and how
    many answers it wants. Source of the fields: the API references of OpenAI and Anthropic."""
    body, endpoint = call.body, call.endpoint
    tokens_in = tokens_of(body) if body else 0
    if endpoint.name in NO_OUTPUT:
        return tokens_in, 0, 0
    if not endpoint.has_model:  # whatever it is
        return tokens_in, 0, 1
    try:
        fields = call.json  # there since the model was looked for
    except Rejected:  # no JSON object
        return tokens_in, 0, 1
    choices = fields.get("n")
    bound = _bound(fields)
    if not bound and isinstance(parameters := fields.get("parameters"), dict):  # DashScope
        bound = _bound(parameters)
    return tokens_in, bound, choices if type(choices) is int and choices > 1 else 1


def bounds_output(call: Call) -> bool:
    """Whether the caller says how long the answer may be, or has no way to."""
    try:
        return not call.endpoint.has_model or _bound(call.json) > 0
    except Rejected:  # no JSON object
        return True


def _bound(fields: Mapping[str, Any]) -> int:
    """The tokens that a caller allows; 0: it does not say."""
    for name in OUTPUT_FIELDS:
        if name in fields and type(fields[name]) is int and fields[name] > 0:
            return int(fields[name])
    return 0


def tokens_of(body: bytes) -> int:
    """Tokens of a JSON body, without its framing; at least 1.

    Characters count as themselves, written in UTF-8 or escaped. Media in base64 count by the piece,
    not by their length.

    1 KB of English takes 2.3 µs, of Python 3.4, of Chinese 5.0 (CPython 3.11); 64 KiB and more at
    most 0.25 ms, and 0.8 µs for each KB that is searched for media. Splintr takes 5 to 25 µs for
    1 KB of text, once it is out of its JSON. Errors over the samples of the tests, in percent of
    the true count:

    =======  ==========  ==========  ==========  ===========  ==========  ==========
    .        o200k       cl100k      Qwen 3      DeepSeek V3  Kimi K2     Mistral v3
    =======  ==========  ==========  ==========  ===========  ==========  ==========
    English  -8 to -2    -10 to -3   -12 to -3   -10 to -3    -8 to -3    -13 to -3
    code     -6 to +7    -5 to +9    -6 to +8    -10 to +1    -6 to +7    -8 to +4
    JSON     -1 to +4    0 to +5     -17 to +4   -7 to +3     +1 to +4    -20 to +3
    Chinese  -13 to +3   -41 to -25  +7 to +24   +17 to +30   +25 to +42  -22 to -19
    =======  ==========  ==========  ==========  ===========  ==========  ==========

    Claude takes 1.0 (JSON) to 1.4 (Chinese) times the tokens of o200k, from 4.7 on 1.1 to 1.7
    (English): there it is too low by as much. See `tokens` for the rates.
    """
    media = 0
    if len(body) >= _SEARCHED_BYTES and (_IN_URL in body or _IN_FIELD in body):
        media, body = _without_media(body)
    size = len(body)
    if size > _SAMPLED_BYTES:
        body = _sample(body, _SAMPLED_BYTES)
    scale = size / (len(body) or 1)
    weight = -MESSAGE_FRAME * body.count(b'"role"') - TEXT_FRAME * body.count(b'"text"')
    if b"\\" in body:
        if b"\\u" in body:
            body = _unescaped(body)
        weight -= ASCII * body.count(b"\\")
    weight += _weight(body)
    tokens = min(int(weight * scale - BODY_FRAME), size)
    return max(tokens, 0 if media else 1) + media * TOKENS_PER_MEDIUM


def tokens_of_text(text: str) -> int:
    """Tokens of a text as it is, which is no JSON; 0 of none."""
    chars = len(text)
    if not chars:
        return 0
    if chars > _SAMPLED_CHARS:
        text = _sample(text, _SAMPLED_CHARS)
    return ceil(_weight(text.encode("utf-8", "replace")) * chars / len(text))


def _weight(data: bytes) -> float:
    """Tokens of text in UTF-8."""
    size = len(data)
    marks = size - len(data.translate(None, _MARKS))
    if data.isascii():
        return ASCII * size + MARK * marks
    first = data.translate(None, _NOT_FIRST)  # a byte for each character beyond ASCII
    chars = len(first)
    of_2 = chars - len(first.translate(None, _FIRST_OF_2))
    of_4 = chars - len(first.translate(None, _FIRST_OF_4))
    narrow = chars - len(first.translate(None, _FIRST_OF_NARROW))
    plain = size - 3 * chars + of_2 - of_4
    return (
        ASCII * max(plain, 0)
        + MARK * marks
        + WIDE * (chars - narrow - of_4)
        + NARROW * narrow
        + ASTRAL * of_4
    )


def _sample(data: AnyStr, size: int) -> AnyStr:
    """About `size` of `data`, from all over it."""
    window, step = size // _WINDOWS, len(data) // _WINDOWS
    return data[:0].join([data[at : at + window] for at in range(0, len(data), step)])


def _unescaped(body: bytes) -> bytes:
    """`body` with the characters that are written as `\\uXXXX` in UTF-8; other escapes stay."""
    if not body.isascii():
        body = body.decode("utf-8", "replace").encode("ascii", "backslashreplace")
    # Not `unicode_escape`: it warns of `\\/`, which JSON allows.
    return body.decode("raw_unicode_escape", "replace").encode("utf-8", "surrogatepass")


def _without_media(body: bytes) -> tuple[int, bytes]:
    """How many pieces of base64 there are, and what is left without them."""
    spans: list[tuple[int, int]] = []
    at = body.find(_IN_URL)
    while at >= 0:
        start = at + len(_IN_URL)
        end = body.find(b'"', start)
        if end < 0:
            break
        if end - start >= _MEDIUM_BYTES and _IS_BASE64(body, start):
            spans.append((start, end))
        at = body.find(_IN_URL, end)
    at = body.find(_IN_FIELD)
    while at >= 0:
        end = at + len(_IN_FIELD)
        found = _VALUE(body, at)
        if found is not None:
            start = found.start(1)
            end = body.find(b'"', start)
            if end < 0:
                break
            if end - start >= _MEDIUM_BYTES:
                spans.append((start, end))
        at = body.find(_IN_FIELD, end)
    kept, done = [], 0
    for start, end in sorted(spans):
        kept.append(body[done:start])
        done = end
    kept.append(body[done:])
    return len(spans), b"".join(kept)
