"""Limits on what is spent in a day, a week or a month: as they are written, and made out in parts.

Money is counted in billionths of its unit, tokens by the piece: whole numbers, which sum up exactly
wherever they are kept. What is done about a limit is left to the filter `budget`.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from math import ceil
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from filters.algo.periods import Unit
from filters.algo.pricing import plain
from sidecar.api import FilterConfig, Key

Kind = Literal["usd", "cny", "tokens"]
KINDS: tuple[Kind, ...] = ("usd", "cny", "tokens")
CURRENCIES: Mapping[Kind, str] = {"usd": "USD", "cny": "CNY"}

PARTS_OF_MONEY = 10**9
"""The cheapest token costs some twenty of them."""
MOST_MONEY = 5_000_000
MOST_TOKENS = 10**15
"""So many parts are still counted exactly by every store."""

DEGRADED_TO: Key[str] = Key("degraded_to")
"""The public name of the model that answers instead of the one that was asked for."""


class Limit(FilterConfig):
    """One limit: of what, in which period, and what happens then."""

    usd: float | None = Field(default=None, gt=0, le=MOST_MONEY)
    """Dollars; or else"""
    cny: float | None = Field(default=None, gt=0, le=MOST_MONEY)
    """yuan; or else"""
    tokens: int | None = Field(default=None, gt=0, le=MOST_TOKENS)
    """tokens, of input and output together."""
    per: Unit
    """The period."""
    then: Literal["refuse", "warn", "degrade"] = "refuse"
    """Refuse calls, mark their answers, or send them to another model."""
    to: str | None = None
    """The public name of that model."""
    at: float = Field(default=1.0, gt=0, le=1)
    """The share of the amount beyond which it acts."""

    @model_validator(mode="after")
    def _is_clear(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError("a limit needs one amount: `usd`, `cny` or `tokens`")
        if self.then == "degrade" and self.to is None:
            raise ValueError("`then: degrade` needs `to`, the name of a cheaper model")
        if self.then != "degrade" and self.to is not None:
            raise ValueError("`to` is for `then: degrade`")
        return self

    def act(self) -> Act:
        """The same, made out."""
        kind = next(kind for kind in KINDS if getattr(self, kind) is not None)
        amount = parts_of_setting(kind, getattr(self, kind))
        most = int(amount * Decimal(repr(self.at)))
        return Act(Sort(kind, self.per), amount, most, self.then, self.to or "")


class Sort(NamedTuple):
    """What one sum counts, and for how long."""

    kind: Kind
    unit: Unit

    @property
    def name(self) -> str:
        """`usd_per_day`, as in settings and metrics."""
        return f"{self.kind}_per_{self.unit}"


class Act(NamedTuple):
    """What happens to a call that may take its sum beyond `most`."""

    sort: Sort
    amount: int
    most: int
    """A share of the amount."""
    then: str
    to: str
    """The model that calls go to; empty: none."""

    @property
    def name(self) -> str:
        return self.sort.name

    @property
    def nearness(self) -> Decimal:
        """How near to the whole amount it acts."""
        return Decimal(self.most) / self.amount


def parts_of_setting(kind: Kind, amount: float) -> int:
    """An amount of the configuration, in parts."""
    return int(amount) if kind == "tokens" else parts_of_money(Decimal(repr(amount)))


def parts_of_money(amount: Decimal) -> int:
    """Rounded up: what costs anything is not free."""
    return ceil(amount * PARTS_OF_MONEY)


def number_of(parts: int, kind: Kind) -> float:
    """Parts as a number for people and metrics."""
    return parts if kind == "tokens" else parts / PARTS_OF_MONEY


def text_of(parts: int, kind: Kind) -> str:
    """Parts for people: `0.25 USD`, `1200 tokens`."""
    if kind == "tokens":
        return f"{parts} tokens"
    return f"{plain(Decimal(parts) / PARTS_OF_MONEY)} {CURRENCIES[kind]}"
