"""What pydantic found, in words that name the fix and never show a value.

A wrong value may be a secret in the wrong place, so messages speak of its type alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sidecar.config.document import Keys, follow

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
}
_LIMITS = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}
_LENGTHS = {
    "too_short": ("min_length", "needs at least {} entries"),
    "too_long": ("max_length", "may have {} entries at most"),
    "string_too_short": ("min_length", "needs at least {} characters"),
    "string_too_long": ("max_length", "may have {} characters at most"),
}


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake inside a section; `keys` start at the section."""

    keys: Keys
    message: str
    at_key: bool = False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean "burst"?` when something known is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f', did you mean "{close[0]}"?' if close else ""


def explain(error: ValidationError, model: type[BaseModel], raw: Any) -> list[Mistake]:
    """The mistakes in `raw`, which `model` has refused with `error`, one for each place."""
    expected: dict[Keys, list[str]] = {}
    mistakes: list[Mistake] = []
    for detail in error.errors(include_url=False, include_input=False):
        # pydantic's locations also name the members of unions.
        keys, value = follow(detail["loc"], raw)
        kind = detail["type"]
        if kind in _EXPECTED:
            # The members of a union each say what they expect; one sentence is enough.
            expected.setdefault(keys, []).append(_EXPECTED[kind])
        elif kind == "missing":
            mistakes.append(_missing(keys, value, model, detail["loc"]))
        elif kind == "extra_forbidden":
            known = _known_keys(model, detail["loc"])
            hint = did_you_mean(str(detail["loc"][-1]), known)
            if not hint:
                hint = f"; known here: {', '.join(sorted(known))}" if known else "; remove it"
            mistakes.append(Mistake(keys, f"unknown key{hint}", at_key=True))
        else:
            at_key = detail["loc"][-1:] == ("[key]",)
            mistakes.append(Mistake(keys, _message(detail, value), at_key))
    for keys, words in expected.items():
        _, value = follow(keys, raw)
        wanted = " or ".join(dict.fromkeys(words))
        quotes = "; write it in quotes" if words == ["text"] and _is_plain(value) else ""
        mistakes.append(Mistake(keys, f"expected {wanted}, found {_found(value)}{quotes}"))
    return mistakes


def _missing(keys: Keys, value: Any, model: type[BaseModel], location: Keys) -> Mistake:
    # A section that takes foreign keys cannot tell a misspelt one; here is who it was meant for.
    name = str(location[-1])
    strangers = set(value) - _known_keys(model, location) if isinstance(value, dict) else set()
    close = difflib.get_close_matches(name, strangers, n=1)
    hint = f'did you mean it by "{close[0]}"?' if close else "add it"
    return Mistake((*keys, name), f"is missing: {hint}")


def _message(detail: ErrorDetails, value: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        return f"{words} {str(context[key]).removesuffix('.0')}"
    if kind in _LENGTHS:
        key, words = _LENGTHS[kind]
        return words.format(context[key]).replace("1 entries", "1 entry")
    if kind in ("literal_error", "enum"):
        return _choice(context["expected"], value)
    if kind == "union_tag_invalid":
        tag = value.get(context["discriminator"].strip("'")) if isinstance(value, dict) else None
        return f"{context['discriminator']}: {_choice(context['expected_tags'], tag)}"
    if kind == "union_tag_not_found":
        return f"the key {context['discriminator']} is missing: add it"
    if kind == "finite_number":
        return "must be a finite number"
    # A rare type in a filter's settings. Some of pydantic's sentences quote what they cannot read.
    message = detail["msg"]
    return message.replace(value, "***") if isinstance(value, str) and value else message


def _choice(expected: str, value: Any) -> str:
    choices = re.findall(r"'([^']*)'", expected)
    words = f"expected {expected}".replace("'", '"')
    if not isinstance(value, str):
        return f"{words}, found {_found(value)}"
    return f"{words}{did_you_mean(value, choices)}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return "a whole number"
    if isinstance(value, float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "a mapping"


def _known_keys(model: type[BaseModel], location: Keys) -> set[str]:
    """The keys that would be right beside the last one of `location`."""
    types = _members(model)
    for key in location[:-1]:
        types = [t for each in types for t in _step(each, key)] or types
    return {
        field.alias or name
        for each in types
        if _is_model(each)
        for name, field in each.model_fields.items()
    }


def _step(annotation: Any, key: str | int) -> list[Any]:
    if _is_model(annotation):
        for name, field in annotation.model_fields.items():
            if key in (field.alias, name):
                return _members(field.annotation)
        return []
    origin, arguments = get_origin(annotation), get_args(annotation)
    if not isinstance(origin, type) or not arguments:
        return []
    return _members(arguments[-1] if issubclass(origin, Mapping) else arguments[0])


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
