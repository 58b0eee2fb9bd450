"""Who calls, and which models they may name."""

from __future__ import annotations

import hashlib

import pytest
from multidict import CIMultiDict

from sidecar.call import Call, Target
from sidecar.reply import Reply
from sidecar.team import Callers, Models, Patterns, Policy, Team, is_pattern, offered_keys
from tests.support.harness import FakeUpstream

A, B = (Target(FakeUpstream(name)) for name in "ab")


async def nobody(call: Call) -> Reply:
    raise NotImplementedError


def policy(name: str, models: tuple[str, ...] = ("*",)) -> Policy:
    team = Team(name, "normal", Patterns(models), frozenset())
    return Policy(team=team, run=nobody, refuse=nobody)


# Patterns


def test_exact_name_wins_over_patterns_before_it() -> None:
    patterns = Patterns(["gpt-*", "gpt-4o", "*"])
    assert patterns.find("gpt-4o") == "gpt-4o"
    assert patterns.find("gpt-4") == "gpt-*"
    assert patterns.find("qwen") == "*"


def test_first_pattern_that_matches_wins() -> None:
    assert Patterns(["g*", "gp*"]).find("gpt") == "g*"
    assert Patterns(["gp*", "g*"]).find("gpt") == "gp*"


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("qwen-*", "qwen-max", True),
        ("qwen-*", "qwen-", True),
        ("qwen-*", "qwen", False),
        ("qwen-*", "my-qwen-max", False),
        ("qwen-*", "Qwen-max", False),
        ("qwen-*", "qwen-a/b\nc", True),
        ("gpt-?", "gpt-4", True),
        ("gpt-?", "gpt-4o", False),
        ("gpt-?", "gpt-", False),
        ("a.b", "aXb", False),
        ("a.b*", "aXb", False),
        ("(a)*", "(a)b", True),
    ],
)
def test_patterns_are_of_stars_and_question_marks(pattern: str, name: str, matches: bool) -> None:
    assert (Patterns([pattern]).find(name) is not None) is matches


def test_brackets_in_a_name_are_plain_characters() -> None:
    assert not is_pattern("claude-sonnet-4-5[1m]")
    patterns = Patterns(["claude-sonnet-4-5[1m]", "*-[1m]"])
    assert patterns.find("claude-sonnet-4-5[1m]") == "claude-sonnet-4-5[1m]"
    assert patterns.find("claude-sonnet-4-5m") is None
    assert patterns.find("x-[1m]") == "*-[1m]"
    assert patterns.find("x-1") is None


def test_no_names_match_nothing() -> None:
    assert Patterns([]).find("x") is None
    assert Patterns([]).names == ()


# Models


def test_models_are_found_with_the_name_they_are_configured_by() -> None:
    models = Models({"gpt-4o": (A, B), "qwen-*": (B,)})
    assert models.find("gpt-4o") == ("gpt-4o", (A, B))
    assert models.find("qwen-max") == ("qwen-*", (B,))
    assert models.find("claude") is None
    assert models.names == ("gpt-4o",)  # a pattern is no name to list


def test_label_of_a_model_comes_from_the_configuration_alone() -> None:
    models = Models({"qwen-*": (B,)})
    labels = {found[0] for i in range(50) if (found := models.find(f"qwen-{i}"))}
    assert labels == {"qwen-*"}


# Teams


def test_team_may_use_what_its_patterns_say() -> None:
    team = policy("t", ("gpt-4o", "qwen-*")).team
    assert team.may_use("gpt-4o")
    assert team.may_use("qwen-max")
    assert not team.may_use("claude")
    assert not team.may_use_all
    assert policy("t").team.may_use_all
    assert not policy("t", ()).team.may_use("gpt-4o")


# Callers

SEARCH, ADS, UNKNOWN = policy("search"), policy("ads"), policy("unknown")


@pytest.fixture
def callers() -> Callers:
    digests = {hashlib.sha256(key.encode()).hexdigest(): key for key in ("sk-search", "sk-ads")}
    by_key = {digest: SEARCH if key == "sk-search" else ADS for digest, key in digests.items()}
    return Callers(by_key, fixed=None, unknown=UNKNOWN)


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([("Authorization", "Bearer sk-search")], SEARCH),
        ([("authorization", "bearer   sk-search ")], SEARCH),
        ([("x-api-key", "sk-ads")], ADS),
        ([("api-key", "sk-ads")], ADS),
        ([("X-Api-Key", ""), ("api-key", "sk-ads")], ADS),
        ([("authorization", "Basic c2s="), ("x-api-key", "sk-ads")], ADS),
        ([("authorization", "Bearer sk-ads"), ("x-api-key", "sk-search")], ADS),
        ([("authorization", "Bearer wrong"), ("x-api-key", "sk-search")], None),
        ([("authorization", "sk-search")], None),
        ([("authorization", "Bearer ")], None),
        ([("authorization", "Bearer sk-search\udcff")], None),
        ([("x-api-key", "SK-SEARCH")], None),
        ([], None),
    ],
)
def test_caller_is_known_by_the_key(
    headers: list[tuple[str, str]], found: Policy | None, callers: Callers
) -> None:
    assert callers.identify(CIMultiDict(headers)) is found


def test_digest_of_a_key_is_no_key(callers: Callers) -> None:
    digest = hashlib.sha256(b"sk-search").hexdigest()
    assert callers.identify(CIMultiDict({"x-api-key": digest})) is None


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "sk-ads"}, {"authorization": "Bearer x"}])
def test_fixed_team_is_everybodys_whatever_the_key(headers: dict[str, str]) -> None:
    callers = Callers({}, fixed=SEARCH, unknown=UNKNOWN)
    assert callers.identify(CIMultiDict(headers)) is SEARCH


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ("sk-a", {"sk-a"}),
        (" Bearer  sk-a ", {"Bearer  sk-a", "sk-a"}),
        ("Bearer\tsk-a", {"Bearer\tsk-a", "sk-a"}),
        ("Bearer correct horse battery", {"Bearer correct horse battery", "correct horse battery"}),
        (
            "Basic dXNlcjpzay1hOmI=",
            {"Basic dXNlcjpzay1hOmI=", "dXNlcjpzay1hOmI=", "user", "sk-a:b"},
        ),
        ("", {""}),
        ("   ", {""}),
    ],
)
def test_every_key_that_a_header_may_mean_is_found(value: str, keys: set[str]) -> None:
    assert set(offered_keys(value)) == keys


def test_long_header_offers_few_keys() -> None:
    assert len(offered_keys("a " * 10_000)) <= 4
