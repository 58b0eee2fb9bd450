"""Limits as they are written, and made out in whole parts."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from filters.algo.spend_limits import (
    MOST_MONEY,
    MOST_TOKENS,
    PARTS_OF_MONEY,
    Limit,
    Sort,
    number_of,
    parts_of_money,
    parts_of_setting,
    text_of,
)
from filters.stores.spending import MOST


def act(**fields: Any) -> Any:
    return Limit.model_validate({"per": "day", **fields}).act()


def test_limit_is_made_out_in_parts() -> None:
    found = act(usd=0.1, then="degrade", to="mini", at=0.7)
    assert found.sort == Sort("usd", "day")
    assert (found.amount, found.most) == (100_000_000, 70_000_000)
    assert (found.name, found.then, found.to) == ("usd_per_day", "degrade", "mini")
    assert act(tokens=1001, at=0.5).most == 500
    assert act(tokens=5).to == ""


def test_nearness_is_the_share_at_which_it_acts() -> None:
    assert act(usd=0.3, at=0.9).nearness == Decimal("0.9")
    assert act(tokens=10).nearness == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "a limit needs one amount: `usd`, `cny` or `tokens`"),
        ({"usd": 1.0, "cny": 1.0}, "a limit needs one amount"),
        (
            {"usd": 1.0, "then": "degrade"},
            "`then: degrade` needs `to`, the name of a cheaper model",
        ),
        ({"usd": 1.0, "then": "warn", "to": "x"}, "`to` is for `then: degrade`"),
        ({"tokens": 0}, "greater than 0"),
    ],
)
def test_unclear_limit_says_what_is_missing(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        act(**fields)
    assert words in str(caught.value)


def test_whole_numbers_of_yaml_are_amounts_too() -> None:
    assert act(usd=50).amount == 50 * PARTS_OF_MONEY


def test_amount_is_the_one_that_was_written_and_not_the_double_beside_it() -> None:
    assert parts_of_setting("usd", 0.1) == 100_000_000
    assert parts_of_setting("cny", 1.1) == 1_100_000_000
    assert parts_of_setting("tokens", 12) == 12


@pytest.mark.parametrize(
    ("amount", "parts"), [("0", 0), ("0.000000001", 1), ("0.0000000011", 2), ("1E-20", 1)]
)
def test_money_is_rounded_up(amount: str, parts: int) -> None:
    assert parts_of_money(Decimal(amount)) == parts


@given(st.decimals(0, MOST_MONEY, places=12))
def test_rounding_adds_less_than_a_part(amount: Decimal) -> None:
    parts = parts_of_money(amount)
    assert amount <= Decimal(parts) / PARTS_OF_MONEY < amount + Decimal("1e-9")


def test_largest_limits_are_sums_that_every_store_counts_exactly() -> None:
    assert parts_of_setting("usd", MOST_MONEY) < MOST
    assert MOST_TOKENS < MOST


def test_parts_are_shown_as_people_write_them() -> None:
    assert text_of(250_000_000, "usd") == "0.25 USD"
    assert text_of(50 * PARTS_OF_MONEY, "cny") == "50 CNY"
    assert text_of(1, "usd") == "0.000000001 USD"
    assert text_of(0, "usd") == "0 USD"
    assert text_of(1200, "tokens") == "1200 tokens"
    assert number_of(1200, "tokens") == 1200
    assert number_of(250_000_000, "usd") == 0.25
