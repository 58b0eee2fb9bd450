"""When a window opens again, in every provider's way of writing it."""

from __future__ import annotations

import pytest

from filters.algo.reset_time import duration_s, reset_wait_s, rfc3339_time
from sidecar.api import Headers

WALL = 1_719_820_800.0  # 2024-07-01T08:00:00Z


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12ms", 0.012),
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("1h2m3s", 3723.0),
        ("1m30.5s", 90.5),
        ("46.2s", 46.2),
        ("7.66s", 7.66),
        ("250µs", 0.00025),
        ("5us", 5e-6),
        ("80ns", 8e-8),
        ("0s", 0.0),
        ("59", 59.0),
        (" 2.5 ", 2.5),
    ],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", [None, "", "-1", "-1s", "soon", "1d", "1s2", "s", "1e3", "nan", "1,5s", "9" * 20]
)
def test_what_is_no_duration_is_none(text: str | None) -> None:
    assert duration_s(text) is None


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-07-01T08:00:00Z", WALL),
        ("2024-07-01T10:00:00+02:00", WALL),
        ("2024-07-01T08:00:00.500Z", WALL + 0.5),
        ("2024-07-01T08:00:00", WALL),
        ("soon", None),
        ("", None),
        (None, None),
        ("9999-99-99T00:00:00Z", None),
    ],
)
def test_rfc_3339_dates_are_read(text: str | None, moment: float | None) -> None:
    assert rfc3339_time(text) == moment


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        # OpenAI: Go durations, only of what is used up.
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "12ms",
                "x-ratelimit-remaining-tokens": "149984",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            0.012,
        ),
        ({"x-ratelimit-remaining-requests": "4", "x-ratelimit-reset-requests": "6m0s"}, None),
        ({"x-ratelimit-reset-requests": "6m0s"}, None),
        # Both used up: the later one.
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-project-tokens": "0",
                "x-ratelimit-reset-project-tokens": "1m1s",
            },
            61.0,
        ),
        # Azure: whole seconds; -1, and 0 with a reset of 0, mean nothing.
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "7"}, 7.0),
        ({"x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "7"}, None),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0"}, None),
        ({"x-ratelimit-remaining-tokens": "0"}, None),
        # Anthropic: dates, by the clock that wrote them.
        (
            {
                "anthropic-ratelimit-input-tokens-remaining": "0",
                "anthropic-ratelimit-input-tokens-reset": "2024-07-01T08:00:09Z",
                "anthropic-ratelimit-requests-remaining": "49",
                "anthropic-ratelimit-requests-reset": "2024-07-01T09:00:00Z",
            },
            9.0,
        ),
        (
            {
                "anthropic-priority-output-tokens-remaining": "0",
                "anthropic-priority-output-tokens-reset": "2024-07-01T08:00:03Z",
            },
            3.0,
        ),
        (
            {
                "anthropic-ratelimit-tokens-remaining": "0",
                "anthropic-ratelimit-tokens-reset": "2024-07-01T07:59:00Z",
            },
            None,
        ),
    ],
)
def test_wait_is_for_the_windows_that_are_used_up(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert reset_wait_s(Headers(headers), WALL) == (
        None if seconds is None else pytest.approx(seconds)
    )
