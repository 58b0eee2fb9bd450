"""What answers say of a provider's limits, and what follows for the next attempts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.allowance import (
    BLIND_REST_S,
    FRESH_S,
    IN_FLIGHT_REST_S,
    LONGEST_REST_S,
    Allowance,
    read,
)

NOW, WALL = 1_000.0, 1_700_000_000.0  # 2023-11-14T22:13:20Z


def openai(kind: str = "requests", **values: Any) -> dict[str, str]:
    return {f"x-ratelimit-{what}-{kind}": str(value) for what, value in values.items()}


def anthropic(kind: str = "requests", **values: Any) -> dict[str, str]:
    return {f"anthropic-ratelimit-{kind}-{what}": str(value) for what, value in values.items()}


def answered(
    allowance: Allowance, fields: dict[str, str], now: float = NOW, tokens: tuple[int, int] = (0, 0)
) -> None:
    """One attempt goes out, and its answer has these fields."""
    allowance.begin(*tokens)
    raw = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
    allowance.end(*tokens, read(raw), now, WALL)


def wait_s(allowance: Allowance, now: float = NOW, tokens: tuple[int, int] = (0, 0)) -> float:
    return allowance.wait_s(now, *tokens)[0]


@pytest.mark.parametrize(
    ("fields", "rest_s"),
    [
        (openai(limit=60, remaining=0, reset="30s"), 30.0),
        (openai(limit=60, remaining=0, reset="1m30s"), 90.0),
        (openai(limit=60, remaining=0, reset="120ms"), 0.12),
        (openai(limit=60, remaining=0, reset="30"), 30.0),  # Azure: whole seconds
        (openai(remaining=0, reset="30s"), 30.0),
        (openai("tokens", limit=60, remaining=0, reset="6s"), 6.0),
        (anthropic(limit=50, remaining=0, reset="2023-11-14T22:13:50Z"), 30.0),
        (anthropic("input-tokens", limit=50, remaining=0, reset="2023-11-14T22:14:20Z"), 60.0),
        (anthropic("output-tokens", limit=50, remaining=0, reset="2023-11-14T22:13:21Z"), 1.0),
        (openai(limit=60, remaining=0), BLIND_REST_S),  # Qianfan sends no reset
        (openai(limit=60, remaining=0, reset="soon"), BLIND_REST_S),
        (openai(limit=60, remaining=0, reset="999h"), LONGEST_REST_S),
        (anthropic(limit=50, remaining=0, reset="2023-11-14T22:13:00Z"), 0.0),  # past
    ],
    ids=str,
)
def test_nothing_goes_out_while_nothing_remains(fields: dict[str, str], rest_s: float) -> None:
    allowance = Allowance()
    answered(allowance, fields, tokens=(10, 10))
    assert wait_s(allowance, tokens=(10, 10)) == pytest.approx(rest_s)
    assert wait_s(allowance, NOW + rest_s, (10, 10)) == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        openai(limit=60, remaining=-1, reset="30s"),
        openai(limit=-1, remaining=0, reset="30s"),
        openai(limit=0, remaining=0, reset="0"),
        openai(remaining=0),
        openai(limit=60, remaining="none", reset="30s"),
        openai(limit=60, remaining="9" * 400, reset="30s"),
        openai(limit=60, remaining="1e3", reset="30s"),
        openai(limit=60, remaining="²", reset="30s"),
        openai(limit=60, reset="30s"),
    ],
    ids=str,
)
def test_nonsense_holds_nothing_back(fields: dict[str, str]) -> None:
    allowance = Allowance()
    answered(allowance, fields)
    assert wait_s(allowance) == 0.0


def test_a_date_is_seen_by_the_clock_of_whoever_wrote_it() -> None:
    allowance = Allowance()
    reset = anthropic(limit=50, remaining=0, reset="2023-11-14T22:23:50Z")
    answered(allowance, reset | {"date": "Tue, 14 Nov 2023 22:23:20 GMT"})  # ten minutes ahead
    assert wait_s(allowance) == pytest.approx(30.0)


def test_attempts_without_an_answer_are_taken_off_what_remains() -> None:
    allowance = Allowance()
    answered(allowance, openai(limit=60, remaining=2, reset="30s"))
    for _ in range(2):
        assert wait_s(allowance) == 0.0
        allowance.begin(0, 0)
    assert wait_s(allowance) == IN_FLIGHT_REST_S  # an answer may say that there is more
    allowance.end(0, 0, read([(b"x-ratelimit-remaining-requests", b"9")]), NOW, WALL)
    assert wait_s(allowance) == 0.0


def test_tokens_in_flight_are_taken_off_too() -> None:
    allowance = Allowance()
    answered(allowance, openai("tokens", limit=1000, remaining=500, reset="30s"))
    allowance.begin(200, 100)
    assert wait_s(allowance, tokens=(100, 100)) == 0.0
    assert wait_s(allowance, tokens=(100, 101)) == IN_FLIGHT_REST_S
    assert wait_s(allowance, tokens=(300, 300)) == pytest.approx(30.0)


def test_input_and_output_have_their_own_limits() -> None:
    allowance = Allowance()
    answered(
        allowance,
        anthropic("input-tokens", limit=1000, remaining=500, reset="2023-11-14T22:13:50Z")
        | anthropic("output-tokens", limit=100, remaining=50, reset="2023-11-14T22:13:30Z"),
    )
    assert allowance.knows_tokens
    assert allowance.wait_s(NOW, 500, 50)[0] == 0.0
    assert allowance.wait_s(NOW, 501, 50) == (30.0, "input-tokens")
    assert allowance.wait_s(NOW, 500, 51) == (10.0, "output-tokens")


def test_an_attempt_larger_than_the_limit_waits_for_all_of_it() -> None:
    allowance = Allowance()
    answered(allowance, openai("tokens", limit=1000, remaining=999, reset="1s"))
    assert wait_s(allowance, tokens=(5000, 0)) == pytest.approx(1.0)
    assert wait_s(allowance, NOW + 1.0, (5000, 0)) == 0.0


def test_after_the_reset_the_limit_is_there_again_and_no_more() -> None:
    allowance = Allowance()
    answered(allowance, openai(limit=3, remaining=0, reset="30s"))
    later = NOW + 30.0
    for _ in range(3):
        assert wait_s(allowance, later) == 0.0
        allowance.begin(0, 0)
    assert wait_s(allowance, later) > 0.0


def test_attempts_from_before_the_reset_are_taken_off_what_is_there_after_it() -> None:
    allowance = Allowance()
    answered(allowance, openai(limit=3, remaining=3, reset="30s"))
    for _ in range(3):
        allowance.begin(0, 0)
    assert wait_s(allowance, NOW + 30.0) == IN_FLIGHT_REST_S
    allowance.end(0, 0)
    assert wait_s(allowance, NOW + 30.0) > 0.0  # the provider has counted it
    allowance.withdraw(0, 0)
    assert wait_s(allowance, NOW + 30.0) == 0.0


def test_an_answer_that_says_nothing_counts_as_one_less() -> None:
    allowance = Allowance()
    answered(allowance, openai(limit=60, remaining=1, reset="30s"))
    allowance.begin(0, 0)
    allowance.end(0, 0)
    assert wait_s(allowance) == pytest.approx(30.0)


def test_an_attempt_that_was_never_sent_counts_nothing() -> None:
    allowance = Allowance()
    answered(allowance, openai(limit=60, remaining=1, reset="30s"))
    allowance.begin(0, 0)
    allowance.withdraw(0, 0)
    assert wait_s(allowance) == 0.0


def test_a_rest_is_kept_whatever_later_answers_say() -> None:
    allowance = Allowance()
    allowance.rest(NOW, 20.0)
    answered(allowance, openai(limit=60, remaining=59, reset="1s"))
    assert allowance.wait_s(NOW + 5.0, 0, 0) == (15.0, "retry-after")
    allowance.rest(NOW, 10.0)
    assert wait_s(allowance, NOW + 5.0) == 15.0
    assert wait_s(allowance, NOW + 20.0) == 0.0


def test_a_rest_is_bounded() -> None:
    allowance = Allowance()
    allowance.rest(NOW, 1e9)
    assert wait_s(allowance) == LONGEST_REST_S


def test_answers_need_not_be_read_while_half_of_everything_remains() -> None:
    allowance = Allowance()
    answered(allowance, openai(limit=60, remaining=30) | openai("tokens", limit=9, remaining=9))
    assert allowance.fresh_until == NOW + FRESH_S
    allowance = Allowance()
    answered(allowance, openai(limit=60, remaining=29) | openai("tokens", limit=9, remaining=9))
    assert allowance.fresh_until <= NOW


def test_what_is_forgotten_holds_nothing_back() -> None:
    allowance = Allowance()
    answered(allowance, openai(limit=60, remaining=0, reset="30s"))
    allowance.rest(NOW, 20.0)
    allowance.begin(1, 1)
    allowance.forget()
    assert wait_s(allowance) == 0.0
    assert repr(allowance) == "<Allowance {} in_flight=1 rests_until=0.0>"


steps = st.lists(
    st.tuples(
        st.sampled_from(["go", "answer", "lost", "unsent", "pass"]),
        st.integers(0, 5),
        st.floats(0, 3),
    ),
    max_size=60,
)


@given(steps)
def test_never_more_in_flight_than_the_last_answer_allowed(steps: list[Any]) -> None:
    allowance, now, running, allowed = Allowance(), NOW, 0, None
    for step, remaining, seconds in steps:
        if step == "go":
            if wait_s(allowance, now) == 0.0:
                allowance.begin(1, 1)
                running += 1
                assert allowed is None or running <= allowed
        elif step == "pass":
            now += seconds
        elif running:
            running -= 1
            if step == "answer":
                fields = openai(limit=5, remaining=remaining, reset="100s")
                raw = [(name.encode(), value.encode()) for name, value in fields.items()]
                allowance.end(1, 1, read(raw), now, WALL)
                allowed = remaining
            elif step == "lost":
                allowance.end(1, 1)
                allowed = None if allowed is None else max(0, allowed - 1)
            else:
                allowance.withdraw(1, 1)
        assert allowance.in_flight == running
        if now >= NOW + 90.0:  # the reset of the first answers comes near
            break
    assert (allowance.input, allowance.output) == (running, running)
