"""Whom a limit counts together."""

from __future__ import annotations

from itertools import permutations

from filters.algo.counted import NameReader, Names, Per, key_of, words_of
from tests.support.harness import MODEL, Harness

ALL: tuple[Per, ...] = ("team", "model", "upstream", "key")


async def test_names_are_read_off_the_call_when_something_counts_by_them() -> None:
    call = Harness().call(headers=[("authorization", "Bearer sk-1")])
    assert NameReader("search", ["team"])(call) == Names("search")
    everything = NameReader("search", ALL)(call)
    assert everything == Names("search", "fake", call.key_id, MODEL)
    assert len(everything.key) == 16


async def test_a_call_without_upstream_key_or_model_has_a_name_all_the_same() -> None:
    call = Harness().call(b"", method="GET", path="/v1/models")
    assert NameReader("search", ALL)(call) == Names("search", "-", "-", "-")


def test_names_are_fixed_when_only_the_team_counts() -> None:
    assert NameReader("search", ["team"]).is_fixed
    assert NameReader("search", []).is_fixed
    assert not NameReader("search", ["team", "model"]).is_fixed


def test_the_order_of_the_setting_makes_no_other_key() -> None:
    names = Names("search", "openai", "0123456789abcdef", "gpt-4o")
    keys = {key_of(per, names) for per in permutations(ALL)}
    assert keys == {"team=search,upstream=openai,key=0123456789abcdef,model=gpt-4o"}
    assert key_of([], names) == "all"


def test_no_two_calls_that_are_counted_apart_have_the_same_key() -> None:
    tricky = Names("a", "b", "c", "x,upstream=b")
    assert key_of(ALL, tricky) != key_of(ALL, Names("a", "b", "c", "x"))
    assert key_of(["team", "model"], Names("a", model="b")) != key_of(["team", "key"], Names("a"))


def test_words_for_people_never_show_a_key() -> None:
    names = Names("search", "openai", "0123456789abcdef", "gpt-4o")
    assert words_of(ALL, names) == "team search, upstream openai, this key, model gpt-4o"
    assert words_of([], names) == "all callers"
