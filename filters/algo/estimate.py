"""How many tokens a request will take, from its bytes: to reserve before the provider counts.

Fast and rough. Tokenizers cost 10 to 90 µs for each KB (splintr, toktok, tiktoken: measured), know
one family of models each, and are corrected by the provider's own figures seconds later all the
same. So this counts characters and leaves exactness to the settlement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sidecar.api import LOST_USAGE, Call, Key, Rejected, Usage

ASCII_PER_TOKEN = 4.0
"""Characters; English prose has 4.2 to 4.5, code and JSON 3 to 3.5 (o200k)."""
TOKENS_PER_WIDE = 0.8
"""Of a character beyond ASCII: Chinese 0.65 to 0.9, Japanese and Korean about as much."""
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

_ESCAPE_BYTES = 6  # \uXXXX
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
    if not body:
        tokens_in = 0
    elif len(body) < _SEARCHED_BYTES and b"\\" not in body and body.isascii():
        tokens_in = int(len(body) / ASCII_PER_TOKEN) or 1
    else:
        tokens_in = tokens_of(body)
    if endpoint.name in NO_OUTPUT:
        return tokens_in, 0, 0
    if not endpoint.has_model:  # whatever it is
        return tokens_in, 0, 1
    try:
        fields = call.json  # there since the model was looked for
    except Rejected:  # no JSON object
        return tokens_in, 0, 1
    choices = fields.get("n")
    return tokens_in, _bound(fields), choices if type(choices) is int and choices > 1 else 1


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
    """Tokens of a JSON body; at least 1.

    Characters beyond ASCII count as one each, written in UTF-8 or as `\\uXXXX`. Media in base64
    count by the piece, not by their length.
    """
    size, media = len(body), 0
    if size >= _SEARCHED_BYTES and (_IN_URL in body or _IN_FIELD in body):
        media, media_bytes = _media(body)
        size -= media_bytes
    wide = 0
    if not body.isascii():
        # A character beyond ASCII has mostly three bytes in UTF-8, two more than it is long.
        extra = len(body) - len(body.decode("utf-8", "replace"))
        wide = max(1, extra // 2)
        size -= 3 * wide
    if b"\\" in body:  # a twentieth of the time that counting takes
        escaped = body.count(b"\\u")
        wide += escaped
        size -= _ESCAPE_BYTES * escaped
    tokens = max(size, 0) / ASCII_PER_TOKEN + wide * TOKENS_PER_WIDE + media * TOKENS_PER_MEDIUM
    return int(tokens) or 1


def _media(body: bytes) -> tuple[int, int]:
    """How many pieces of base64 there are, and how many bytes they take."""
    pieces = total = 0
    at = body.find(_IN_URL)
    while at >= 0:
        start = at + len(_IN_URL)
        end = body.find(b'"', start)
        if end < 0:
            break
        if end - start >= _MEDIUM_BYTES and _IS_BASE64(body, start):
            pieces += 1
            total += end - start
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
                pieces += 1
                total += end - start
        at = body.find(_IN_FIELD, end)
    return pieces, total
