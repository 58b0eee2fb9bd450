"""What pydantic found, in the words of this project: one sentence a place, and never a value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from sidecar.api import FilterConfig, Secret
from sidecar.config.document import dotted
from sidecar.config.explain import did_you_mean, explain

SCHEMES = (
    *("bearer", "header", "bce-auth-v1", "bce-bearer", "ACS3-HMAC-SHA256", "TC3-HMAC-SHA256"),
    *("volcengine-HMAC-SHA256", "AWS4-HMAC-SHA256", "zhipu-jwt-hs256", "iflytek-hmac-sha256"),
)


class Section(FilterConfig):
    region: str = Field(default="here", pattern=r"^[a-z-]+$")
    mode: Literal["fast", "exact"] = "fast"
    names: Literal["all"] | list[Annotated[str, Field(pattern=r"^\w+$")]] | None = None
    ids: list[str] = []
    wait_s: float = 1.0


class Keys(FilterConfig):
    key: Secret
    name: str


def told(model: type[FilterConfig], values: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    mistakes = explain(caught.value, model, values)
    return [f"{dotted(each.keys)}: {each.message}" for each in mistakes]


# Suggestions


@pytest.mark.parametrize("name", SCHEMES)
def test_name_in_another_case_is_the_one_that_is_meant(name: str) -> None:
    for word in (name.lower(), name.upper(), name):
        assert did_you_mean(word, SCHEMES) == f', did you mean "{name}"?'


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("tc3", ["TC3-HMAC-SHA256"]),
        ("ACS3", ["ACS3-HMAC-SHA256"]),
        ("jwt", ["zhipu-jwt-hs256"]),
        ("volcengine", ["volcengine-HMAC-SHA256"]),
        ("bce", ["bce-auth-v1", "bce-bearer"]),
        ("bearr", ["bearer"]),
        ("TC3-HMAC-SHA-256", ["TC3-HMAC-SHA256"]),
    ],
)
def test_part_of_a_name_finds_all_that_have_it(word: str, names: list[str]) -> None:
    words = " or ".join(f'"{name}"' for name in names)
    assert did_you_mean(word, SCHEMES) == f", did you mean {words}?"


@pytest.mark.parametrize("word", ["", "a", "v1", "nonsense", "secret"])
def test_word_that_is_close_to_nothing_finds_nothing(word: str) -> None:
    assert did_you_mean(word, SCHEMES) == ""


def test_part_that_many_names_share_finds_one_at_most() -> None:
    assert did_you_mean("key", [f"key_{number}" for number in range(9)]).count("key_") == 1
    assert did_you_mean("key", [f"key_of_a_team_{number}" for number in range(9)]) == ""


# Words


def test_text_with_a_character_that_is_not_allowed_is_told_with_the_pattern() -> None:
    assert told(Section, {"region": "a b"}) == [
        "region: has a character that is not allowed here: it must match ^[a-z-]+$"
    ]
    assert told(Section, {"region": ""}) == ["region: is empty: write a value"]


@pytest.mark.parametrize("reference", ["env:REGION", "file:region"])
def test_reference_where_no_secret_belongs_is_told_so(reference: str) -> None:
    no_secret = "this setting is no secret: write the value itself"
    assert told(Section, {"region": reference}) == [f"region: {no_secret}"]
    assert told(Section, {"mode": reference}) == [f'mode: expected "fast" or "exact"; {no_secret}']
    assert told(Section, {"wait_s": reference}) == [
        f"wait_s: expected a number, found text; {no_secret}"
    ]


@pytest.mark.parametrize("value", ["one", "env:ONE", 7])
def test_single_value_for_a_list_is_told_how_to_write_one(value: Any) -> None:
    (message,) = told(Section, {"ids": value})
    assert message.endswith("; write a list in brackets: [a, b]")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("host", 'names: expected "all" or a list; write a list in brackets: [a, b]'),
        ("al", 'names: expected "all" or a list, did you mean "all"?'),
        (
            7,
            'names: expected "all" or a list, found a whole number; write a list in brackets: '
            "[a, b]",
        ),
        ({}, 'names: expected "all" or a list, found a mapping'),
        ([7], "names[0]: expected text, found a whole number; write it in quotes"),
    ],
)
def test_value_of_no_member_of_a_union_is_one_mistake(value: Any, message: str) -> None:
    assert told(Section, {"names": value}) == [message]


def test_secret_that_is_missing_is_told_how_to_refer_to_it() -> None:
    assert told(Keys, {}) == [
        "key: is missing: add it, as env:NAME or file:PATH",
        "name: is missing: add it",
    ]
    assert told(Keys, {"name": "n", "API_KEY": "x"})[0] == (
        'key: is missing: did you mean it by "API_KEY"?'
    )
