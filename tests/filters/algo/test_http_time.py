"""How long an answer asks us to wait."""

from __future__ import annotations

import pytest

from filters.algo.http_time import retry_after_s, unix_time
from sidecar.api import Headers

WALL = 1_719_820_800.0  # Mon, 01 Jul 2024 08:00:00 GMT


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": " 3 "}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "Mon, 01 Jul 2024 08:00:30 GMT"}, 30.0),
        ({"retry-after": "Mon, 01 Jul 2024 07:00:00 GMT"}, 0.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
    ],
)
def test_wait_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(Headers(headers), WALL) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "nan",
        "inf",
        "1e999",
        "soon",
        "Mon, 99 Jul 2024 08:00:00 GMT",
        "\u0663",
        "1,5",
        "1_0",
    ],
)
def test_what_is_no_wait_is_none(text: str) -> None:
    assert retry_after_s(Headers({"retry-after": text}), WALL) is None


@pytest.mark.parametrize(
    "text",
    [
        "Mon, 01 Jul 2024 08:00:00 GMT",
        "Mon, 01 Jul 2024 08:00:00 -0000",
        "Mon, 01 Jul 2024 10:00:00 +0200",
        "Monday, 01-Jul-24 08:00:00 GMT",
        "Mon Jul  1 08:00:00 2024",
    ],
)
def test_date_is_read_in_every_form(text: str) -> None:
    assert unix_time(text) == WALL


@pytest.mark.parametrize("text", [None, "", "soon", "Mon, 99 Jul 2024 08:00:00 GMT", "\ud800"])
def test_what_is_no_date_is_none(text: str | None) -> None:
    assert unix_time(text) is None
