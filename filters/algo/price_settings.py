"""Prices as they stand in the configuration: with the names and units that `pricing.py` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PositiveInt, model_validator

from filters.algo.prices import PROVIDERS
from filters.algo.pricing import Window
from sidecar.api import FilterConfig

MOST = Decimal(1_000_000)
"""For a million tokens; whoever writes more has mistaken the unit."""
_MOST_DIGITS = 12
"""Behind the point: Decimal has 28 in all, so sums stay exact."""


def _decimal(value: Any) -> Decimal:
    """A number as it was written: 0.1 is a tenth, and not the double next to it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("expected a number")
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise ValueError("expected a number, such as 0.15") from None
    if not (number.is_finite() and 0 <= number <= MOST):
        raise ValueError(f"must be a number from 0 to {MOST}")
    if -int(number.normalize().as_tuple().exponent) > _MOST_DIGITS:
        raise ValueError(f"must have {_MOST_DIGITS} digits behind the point at most")
    return number


def _worth(value: Any) -> Decimal:
    number = _decimal(value)
    if not number:
        raise ValueError("must be greater than 0")
    return number


def _day(value: Any) -> date:
    if isinstance(value, date):
        return value
    try:
        return date.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError("expected a day, such as 2026-01-31") from None


def _currency(value: str) -> str:
    if not re.fullmatch(r"[A-Z]{3}", value):
        raise ValueError('write a currency by its three letters (ISO 4217), such as "USD" or "CNY"')
    return value


def _provider(value: str) -> str:
    if value not in PROVIDERS:
        raise ValueError(f"expected one of {', '.join(sorted(PROVIDERS))}")
    return value


def _several(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


Rate = Annotated[Decimal, BeforeValidator(_decimal)]
Worth = Annotated[Decimal, BeforeValidator(_worth)]
Day = Annotated[date, BeforeValidator(_day)]
Currency = Annotated[str, AfterValidator(_currency)]
Provider = Annotated[str, AfterValidator(_provider)]


class RateSettings(FilterConfig):
    """For a million tokens; what is not given costs as `Rates` says."""

    input: Rate | None = None
    cached_input: Rate | None = None
    cache_write: Rate | None = None
    cache_write_1h: Rate | None = None
    output: Rate | None = None
    reasoning: Rate | None = None
    thinking: Rate | None = None


class TierSettings(RateSettings):
    """Other rates for a longer input."""

    above_input_tokens: PositiveInt


class WindowSettings(FilterConfig):
    """Hours of some days."""

    hours_utc: list[str]
    weekdays: list[int] = [1, 2, 3, 4, 5, 6, 7]
    """1 is Monday."""

    @model_validator(mode="after")
    def _are_hours(self) -> WindowSettings:
        if not set(self.weekdays) <= set(range(1, 8)):
            raise ValueError("weekdays go from 1, which is Monday, to 7")
        Window.of(self.model_dump())
        return self


class OffPeakSettings(RateSettings):
    """Other rates at some hours."""

    windows: list[WindowSettings]


class PriceSettings(RateSettings):
    """One price: of its own, or the one of a model in the table."""

    request: Rate | None = None
    """For each answer, on top."""
    currency: Currency = "USD"
    valid_from: Day | None = None
    """The day from which it holds (UTC); None: always."""
    tiers: list[TierSettings] = []
    graduated: bool = False
    """Tiers hold for the tokens beyond them, and not for the whole input."""
    off_peak: OffPeakSettings | None = None
    like: str | None = None
    """`provider/model` of the shipped table, and nothing else."""

    @model_validator(mode="after")
    def _is_a_price(self) -> PriceSettings:
        if self.like is not None:
            if self.model_fields_set - {"like", "valid_from"}:
                raise ValueError("`like` stands alone: the price is the other model's")
        elif self.input is None or self.output is None:
            raise ValueError("needs `input` and `output`, 0 where nothing is charged, or `like`")
        return self


def _one_a_day(entries: Sequence[PriceSettings]) -> Sequence[PriceSettings]:
    days = [each.valid_from for each in entries]
    if not days or len(set(days)) < len(days):
        raise ValueError("needs one price for each `valid_from`, and one without it at most")
    return entries


PriceList = Annotated[list[PriceSettings], BeforeValidator(_several), AfterValidator(_one_a_day)]
"""One price, or several from different days on."""
