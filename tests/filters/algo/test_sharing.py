"""Who shares recorded answers: the parts of a key that are not of the request."""

from __future__ import annotations

import pytest

from filters.algo.sharing import Scope, Sharing
from sidecar.api import Call, Target
from tests.support.harness import FakeUpstream, Harness

ORIGINS = {"fake": ("https", "fake.test"), "other": ("https", "other.test")}


def call(key: str = "one", *targets: Target) -> Call:
    made = Harness().call(headers=[("authorization", f"Bearer {key}")])
    if targets:
        made.targets = targets
    return made


def sharing(scope: Scope = "team", team: str = "red") -> Sharing:
    return Sharing(scope, team, ORIGINS)


@pytest.mark.parametrize(
    ("scope", "other_team", "other_key"),
    [("team", False, True), ("key", False, False), ("all", True, True)],
)
def test_scope_says_who_has_the_same_parts(scope: Scope, other_team: bool, other_key: bool) -> None:
    parts = sharing(scope).parts(call())
    assert (sharing(scope, "blue").parts(call()) == parts) == other_team
    assert (sharing(scope).parts(call("two")) == parts) == other_key
    assert sharing(scope).parts(call()) == parts


def test_where_an_answer_would_come_from_is_a_part() -> None:
    places = [
        Target(FakeUpstream("fake"), "m"),
        Target(FakeUpstream("fake"), "n"),
        Target(FakeUpstream("other"), "m"),
    ]
    assert len({sharing().parts(call("one", place)) for place in places}) == 3
    moved = Sharing("team", "red", {"fake": ("https", "moved.test")})
    assert moved.parts(call("one", places[0])) != sharing().parts(call("one", places[0]))


def test_target_that_was_chosen_goes_before_those_that_may_be() -> None:
    one, other = Target(FakeUpstream("fake")), Target(FakeUpstream("other"))
    both = call("one", one, other)
    before = sharing().parts(both)
    both.target = other
    assert sharing().parts(both) == sharing().parts(call("one", other)) != before


def test_targets_of_a_label_may_change() -> None:
    shared = sharing()
    one, other = Target(FakeUpstream("fake")), Target(FakeUpstream("other"))
    assert shared.parts(call("one", one)) != shared.parts(call("one", other))


def test_caller_s_own_key_is_a_part_where_the_provider_gets_it() -> None:
    upstream = FakeUpstream("fake")
    upstream.passes_client_key = True
    own = Target(upstream)
    everybody = sharing("all")
    assert everybody.parts(call("one", own)) != everybody.parts(call("two", own))
