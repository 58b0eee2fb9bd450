import pytest

from sidecar.config.rules import is_loopback, may_meet


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        ("", "", True),
        ("a", "a", True),
        ("a", "b", False),
        ("a*", "*b", True),
        ("a*c", "ab?", True),
        ("a*c", "b*c", False),
        ("?", "", False),
        ("*", "", True),
        ("??", "a*", True),
        ("*a*", "b?b", True),
        ("*ab*", "b?b", True),
        ("*ab", "b?a", False),
        ("gpt-[45]o", "gpt-4o", False),
        ("gpt-[45]", "gpt-4o", False),
    ],
)
def test_two_patterns_meet_when_a_name_matches_both(first: str, second: str, meet: bool) -> None:
    assert may_meet(first, second) is meet
    assert may_meet(second, first) is meet


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.255.0.1:1", True),
        ("LOCALHOST:1", True),
        ("[::1]:1", True),
        ("unix:/run/x.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("128.0.0.1:1", False),
        ("localhost.example:1", False),
    ],
)
def test_only_this_machine_reaches_a_loopback_address(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
