"""Request bodies as bytes that are equal when the requests are: what keys of caches are made of.

Where in doubt, two requests stay different: that costs a hit, while the other mistake would give
one caller the answer to another's question. 1 and 1.0, and 0.0 and -0.0, are different; names are
sorted, but inside of schemas, whose order providers say that answers follow (OpenAI, Structured
outputs). RFC 8785 writes numbers as JavaScript does, which makes 1 of 1.0, and packages for it
(rfc8785, jcs) are written in Python: 30 times the time. Who may share an answer, and which fields
say nothing of it, is for the cache.
"""

from __future__ import annotations

from typing import Any
from unicodedata import is_normalized, normalize

import orjson

from filters.algo.exact_json import has_large_float
from filters.algo.prompt_text import squeeze, with_texts

ORDERED = frozenset(
    {
        *("tools", "functions", "response_format", "text", "output_format", "output_config"),
        *("parameters", "guided_json", "structured_outputs", "format"),
    }
)
"""Top-level fields that may hold a JSON schema."""

_ROLES = frozenset({"user", "system"})


def canonical(
    json_body: dict[str, Any], *, skip: frozenset[str], normalise_text: bool
) -> bytes | None:
    """The request as JSON whose bytes are equal for equal requests; None when it cannot be said
    exactly, because of an integer beyond 64 bits or endless nesting: cache nothing then.

    Top-level fields in `skip` are left out. With `normalise_text` the texts of users and of the
    system are in Unicode's form NFC, with `\\n` as line end and without redundant white space
    (`filters.algo.prompt_text`); tool results and the model's own texts stay. That an object in the
    body has a name twice cannot be seen here any more: ask `is_exact` with its bytes.
    """
    fields = {name: value for name, value in json_body.items() if name not in skip}
    if normalise_text:
        fields = with_texts(fields, _normal, _ROLES)
    try:
        if ORDERED.isdisjoint(fields):
            data = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
        else:
            ordered = sorted(ORDERED.intersection(fields))
            schemas = [[name, fields.pop(name)] for name in ordered]
            data = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS) + orjson.dumps(schemas)
    except TypeError:
        return None
    return None if has_large_float(data) else data


def _normal(text: str, is_whole: bool) -> str:
    if not is_normalized("NFC", text):
        text = normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return squeeze(text, is_whole)
