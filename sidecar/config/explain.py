"""What pydantic found, in words that name the fix and never show a value.

A wrong value may be a secret in the wrong place, so messages speak of its type alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sidecar.config.document import Keys, follow
from sidecar.config.secret import Secret

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


_NO_SECRET = "this setting is no secret: write the value itself"
_MOST_SUGGESTED = 5
_SHORTEST_PART = 3


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake inside a section; `keys` start at the section."""

    keys: Keys
    message: str
    at_key: bool = False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean "burst"?` when something known is close to `word`, else nothing."""
    found = [f'"{each}"' for each in _close(word, known)]
    return f", did you mean {' or '.join(found)}?" if found else ""


def _close(word: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that `word` may stand for, whatever its case: `TC3` is a part of one name,
    and a part that several share could mean each of them."""
    names: dict[str, str] = {}
    for each in known:
        names.setdefault(each.lower(), each)
    word = word.lower()
    if word in names:
        return [names[word]]
    if len(word) >= _SHORTEST_PART:
        holding = [name for folded, name in names.items() if word in folded]
        if 0 < len(holding) <= _MOST_SUGGESTED:
            return holding
    return [names[each] for each in difflib.get_close_matches(word, names, n=1)]


def _nowhere(keys: Keys) -> str:
    return ""


def explain(
    error: ValidationError,
    model: type[BaseModel],
    raw: Any,
    where_it_goes: Callable[[Keys], str] = _nowhere,
) -> list[Mistake]:
    """The mistakes in `raw`, which `model` has refused with `error`, one for each place.

    `where_it_goes` is asked about each unknown key, which may belong somewhere else: a hint, or
    nothing.
    """
    expected: dict[Keys, list[str]] = {}
    mistakes: list[Mistake] = []
    for detail in error.errors(include_url=False, include_input=False):
        # pydantic's locations also name the members of unions.
        keys, value = follow(detail["loc"], raw)
        kind = detail["type"]
        # The members of a union each say what they expect; one sentence is enough.
        if kind in _EXPECTED:
            expected.setdefault(keys, []).append(_EXPECTED[kind])
        elif kind in ("literal_error", "enum"):
            expected.setdefault(keys, []).append(detail["ctx"]["expected"].replace("'", '"'))
        elif kind == "missing":
            mistakes.append(_missing(keys, value, model, detail["loc"]))
        elif kind == "extra_forbidden":
            known = _known_keys(model, detail["loc"])
            if elsewhere := where_it_goes(keys):
                hint = f": {elsewhere}"
            else:
                hint = did_you_mean(str(detail["loc"][-1]), known)
            if not hint:
                hint = f"; known here: {', '.join(sorted(known))}" if known else "; remove it"
            mistakes.append(Mistake(keys, f"unknown key{hint}", at_key=True))
        else:
            at_key = detail["loc"][-1:] == ("[key]",)
            mistakes.append(Mistake(keys, _message(detail, value), at_key))
    places = [*expected, *(each.keys for each in mistakes)]
    for keys, words in expected.items():
        # One member of a union looked inside, and says more.
        if not any(each != keys and each[: len(keys)] == keys for each in places):
            _, value = follow(keys, raw)
            mistakes.append(Mistake(keys, _expected(list(dict.fromkeys(words)), value)))
    return mistakes


def _expected(wanted: list[str], value: Any) -> str:
    """The message for a value that is nothing of what is `wanted`: kinds, and words in quotes."""
    message = f"expected {' or '.join(wanted)}"
    choices = [each for words in wanted for each in re.findall(r'"([^"]*)"', words)]
    if not (choices and isinstance(value, str)):
        message += f", found {_found(value)}"
    if _is_reference(value) and not {"a list", "a mapping"} & set(wanted):
        return f"{message}; {_NO_SECRET}"
    if wanted == ["text"] and _is_plain(value):
        return f"{message}; write it in quotes"
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    if not hint and "a list" in wanted and (isinstance(value, str) or _is_plain(value)):
        hint = "; write a list in brackets: [a, b]"
    return message + hint


def _missing(keys: Keys, value: Any, model: type[BaseModel], location: Keys) -> Mistake:
    # A section that takes foreign keys cannot tell a misspelt one; here is who it was meant for.
    name = str(location[-1])
    strangers = set(value) - _known_keys(model, location) if isinstance(value, dict) else set()
    close = _close(name, sorted(strangers))
    if close:
        hint = f'did you mean it by "{close[0]}"?'
    else:
        hint = "add it, as env:NAME or file:PATH" if _is_secret(model, location) else "add it"
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
    if kind == "string_pattern_mismatch":
        if _is_reference(value):
            return _NO_SECRET
        if value == "":
            return "is empty: write a value"
        return f"has a character that is not allowed here: it must match {context['pattern']}"
    if kind == "union_tag_invalid":
        tag = value.get(context["discriminator"].strip("'")) if isinstance(value, dict) else None
        wanted = context["expected_tags"].replace("'", '"')
        return f"{context['discriminator']}: {_expected([wanted], tag)}"
    if kind == "union_tag_not_found":
        return f"the key {context['discriminator']} is missing: add it"
    if kind == "finite_number":
        return "must be a finite number"
    # A rare type in a filter's settings. Some of pydantic's sentences quote what they cannot read.
    message = detail["msg"]
    return message.replace(value, "***") if isinstance(value, str) and value else message


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("env:", "file:"))


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
    return {
        field.alias or name
        for each in _types(model, location[:-1])
        if _is_model(each)
        for name, field in each.model_fields.items()
    }


def _is_secret(model: type[BaseModel], location: Keys) -> bool:
    """Whether what belongs to `location` is a secret."""
    types = _types(model, location)
    return any(isinstance(each, type) and issubclass(each, Secret) for each in types)


def _types(model: type[BaseModel], location: Keys) -> list[Any]:
    types = _members(model)
    for key in location:
        types = [t for each in types for t in _step(each, key)] or types
    return types


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
