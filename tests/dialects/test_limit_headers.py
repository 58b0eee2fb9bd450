"""What a limit of ours looks like in the headers that each dialect's clients read."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from sidecar.dialects import ANTHROPIC, DIALECTS, OPENAI
from sidecar.headers import field

WALL = 1_700_000_000.0  # 2023-11-14T22:13:20Z


def test_openai_says_in_how_long_the_limit_is_whole_again() -> None:
    assert OPENAI.limit_headers("requests", 600, 599, 0.1, WALL) == {
        "x-ratelimit-limit-requests": "600",
        "x-ratelimit-remaining-requests": "599",
        "x-ratelimit-reset-requests": "100ms",
    }
    assert OPENAI.limit_headers("tokens", 40_000, 0, 59.0004, WALL) == {
        "x-ratelimit-limit-tokens": "40000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "59001ms",
    }


def test_anthropic_says_at_what_time_the_limit_is_whole_again() -> None:
    assert ANTHROPIC.limit_headers("requests", 50, 49, 0.0, WALL) == {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "49",
        "anthropic-ratelimit-requests-reset": "2023-11-14T22:13:20Z",
    }
    assert ANTHROPIC.limit_headers("tokens", 40_000, 7, 59.5, WALL) == {
        "anthropic-ratelimit-tokens-limit": "40000",
        "anthropic-ratelimit-tokens-remaining": "7",
        "anthropic-ratelimit-tokens-reset": "2023-11-14T22:14:20Z",
    }


@pytest.mark.parametrize("wall", [WALL, WALL + 0.2, WALL + 0.999])
@pytest.mark.parametrize("reset_s", [0.0, 0.0001, 0.7, 1.0, 86_399.3])
def test_no_client_is_told_to_come_too_early(wall: float, reset_s: float) -> None:
    text = ANTHROPIC.limit_headers("requests", 1, 0, reset_s, wall)
    at = datetime.strptime(
        text["anthropic-ratelimit-requests-reset"], "%Y-%m-%dT%H:%M:%SZ"
    ).replace(tzinfo=UTC)
    assert 0.0 <= at.timestamp() - (wall + reset_s) < 1.0
    told = OPENAI.limit_headers("requests", 1, 0, reset_s, wall)["x-ratelimit-reset-requests"]
    assert 0.0 <= int(told.removesuffix("ms")) / 1000 - reset_s < 0.0011


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_every_dialect_has_words_that_a_head_may_carry(name: str) -> None:
    requests = DIALECTS[name].limit_headers("requests", 1, 0, 1.0, WALL)
    tokens = DIALECTS[name].limit_headers("tokens", 1, 0, 1.0, WALL)
    assert len({**requests, **tokens}) == 6
    for key, value in (*requests.items(), *tokens.items()):
        assert field(key, value)
