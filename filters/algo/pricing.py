"""What tokens cost: rates by class, tiers by length, prices from a day on or at some hours.

    Tariff   what one model costs over time        Rates   one price for each class of tokens
    Price    what it costs at one moment           PRICES  how filters ask for the cost of a call

Money is Decimal, and nothing is rounded. genai-prices works the same out in 64 µs a call, for
dollars alone and without Alibaba and Baidu (measured), so it is the tests' oracle and no more.
Which tariff is a model's is left to `prices.py`, which calls are charged for to the filter `cost`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from math import inf
from typing import Any, NamedTuple, Protocol

from sidecar.api import Call, Cost, Key, Usage

ZERO = Decimal(0)
USD = "USD"

_PER_MILLION = Decimal("0.000001")
_DAY_S = 86_400

CLASSES = (
    *("input", "cached_input", "cache_write", "cache_write_1h"),
    *("output", "reasoning", "thinking"),
)
"""Names of the rates in entries; `Rates` explains them."""


class Prices(Protocol):
    """What calls cost."""

    def charge(self, call: Call) -> Cost | None:
        """What the call costs, as far as it is known now; final once it has ended. None: unknown,
        or nothing that could cost."""
        ...

    def estimate(self, call: Call, tokens_in: int, tokens_out: int) -> Cost | None:
        """What so many tokens would cost, at `call.target` or the first of its targets. None:
        unknown."""
        ...

    def convert(self, cost: Cost, currency: str) -> Decimal | None:
        """The same money in another currency. None: no rate of exchange is configured."""
        ...

    def parts(self, call: Call) -> list[Cost | None]:
        """What each usage that is known of the call costs by itself, for when the whole is not
        known: of its answer, of attempts given up, of each side call. None: that has no price."""
        ...


PRICES: Key[Prices] = Key("prices")


class Rates(NamedTuple):
    """What one token costs, by its class."""

    input: Decimal
    """Neither read from a prompt cache nor written to it."""
    cached: Decimal
    write: Decimal
    """Written to the cache for the usual time."""
    write_1h: Decimal
    output: Decimal
    """No reasoning."""
    reasoning: Decimal | None
    """None: as the rest of it."""
    thinking: Decimal | None
    """All output of an answer with reasoning, where a provider charges by the mode (Alibaba);
    None: output and reasoning, each by itself."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Rates:
        """From rates for a million tokens. A class that is not there costs what providers charge
        that make no difference: reading and writing a cache is input, reasoning is output, and an
        hour in the cache is as good as five minutes."""
        found = {name: _rate(entry[name]) for name in CLASSES if entry.get(name) is not None}
        tokens_in, tokens_out = found["input"], found["output"]
        write = found.get("cache_write", tokens_in)
        return cls(
            input=tokens_in,
            cached=found.get("cached_input", tokens_in),
            write=write,
            write_1h=found.get("cache_write_1h", write),
            output=tokens_out,
            reasoning=found.get("reasoning"),
            thinking=found.get("thinking"),
        )

    def of_output(self, tokens: int, reasoning: int) -> Decimal:
        if reasoning:
            if self.thinking is not None:
                return self.thinking * tokens
            if self.reasoning is not None:
                reasoning = min(reasoning, tokens)
                return self.output * (tokens - reasoning) + self.reasoning * reasoning
        return self.output * tokens


class Tier(NamedTuple):
    """Other rates for a longer input."""

    above: int
    """Tokens of input; one with exactly so many is not longer."""
    rates: Rates


class Price:
    """What calls of one model cost at one moment, in `currency`."""

    __slots__ = ("_is_graduated", "_rates", "_request", "_tiers", "currency")

    def __init__(
        self,
        rates: Rates,
        *,
        currency: str = USD,
        request: Decimal = ZERO,
        tiers: Sequence[Tier] = (),
        is_graduated: bool = False,
    ) -> None:
        self.currency = currency
        self._rates = rates
        self._request = request
        self._tiers = sorted(tiers, key=lambda each: each.above)
        self._is_graduated = is_graduated

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Price:
        """From an entry of the price table, or of the configuration. A tier has the rates that it
        names, and those of the entry itself. Raises KeyError without `input` and `output`."""
        base = {name: entry[name] for name in CLASSES if entry.get(name) is not None}
        tiers = [
            Tier(each["above_input_tokens"], Rates.of({**base, **_given(each)}))
            for each in entry.get("tiers") or ()
        ]
        return cls(
            Rates.of(base),
            currency=entry.get("currency") or USD,
            request=Decimal(entry.get("request") or 0),
            tiers=tiers,
            is_graduated=bool(entry.get("graduated")),
        )

    def amount(self, usage: Usage) -> Decimal:
        """The money for one answer. Cached and written tokens are parts of the input, reasoning is
        a part of the output; what a provider reports beyond the whole is not charged."""
        tokens_in, tokens_out, cached, written, reasoning, written_1h, _ = usage
        rates = self._rates
        if self._tiers:
            if self._is_graduated:
                return self._graduated(usage)
            for tier in self._tiers:
                if tokens_in > tier.above:
                    rates = tier.rates
        if written:
            tokens_in, cached, written, written_1h = _parts(usage)
            amount = rates.input * tokens_in + rates.cached * cached
            amount += rates.write * written + rates.write_1h * written_1h
        elif cached:
            cached = min(cached, tokens_in)
            amount = rates.input * (tokens_in - cached) + rates.cached * cached
        else:
            amount = rates.input * tokens_in
        if tokens_out:
            amount += rates.of_output(tokens_out, reasoning)
        return amount + self._request if self._request else amount

    def _graduated(self, usage: Usage) -> Decimal:
        """Each part of the input at the rates of its own length, the output at the last ones.

        What is read from a cache is the beginning of an input, what is written follows (for an hour
        first: Anthropic requires that order), the rest comes last.
        """
        plain, cached, written, written_1h = _parts(usage)
        amount, start = self._request, 0
        reached = self._rates
        parts = ((cached, "cached"), (written_1h, "write_1h"), (written, "write"), (plain, "input"))
        for tokens, name in parts:
            end = start + tokens
            for low, high, rates in self._slices():
                overlap = min(end, high) - max(start, low)
                if overlap > 0:
                    amount += getattr(rates, name) * int(overlap)
                    reached = rates
            start = end
        return amount + reached.of_output(usage.output, usage.reasoning)

    def _slices(self) -> Iterator[tuple[float, float, Rates]]:
        low: float = 0
        rates = self._rates
        for tier in self._tiers:
            yield low, tier.above, rates
            low, rates = tier.above, tier.rates
        yield low, inf, rates

    def __repr__(self) -> str:
        rates = self._rates
        per_million = [plain(rate / _PER_MILLION) for rate in (rates.input, rates.output)]
        return f"<Price {self.currency} {'/'.join(per_million)} tiers={len(self._tiers)}>"


class Window(NamedTuple):
    """Hours of some days of the week, in UTC."""

    weekdays: frozenset[int]
    """1 is Monday."""
    start_s: int
    """Of the day."""
    end_s: int

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> list[Window]:
        """From `hours_utc` such as `"10:00-24:00"`, one or a list, and `weekdays`, by default all.
        Raises ValueError for no such hours."""
        hours = value["hours_utc"]
        weekdays = frozenset(value.get("weekdays") or range(1, 8))
        found = []
        for each in [hours] if isinstance(hours, str) else hours:
            start, _, end = each.partition("-")
            window = cls(weekdays, _seconds(start), _seconds(end))
            if window.start_s >= window.end_s:
                raise ValueError(f'"{each}" does not end after it begins: write two windows')
            found.append(window)
        return found


class Entry(NamedTuple):
    """A price and since when it holds."""

    from_wall: float
    price: Price
    off_peak: Price | None = None
    windows: tuple[Window, ...] = ()
    """When `off_peak` holds instead."""


class Tariff:
    """The prices of one model over time."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = sorted(entries, key=lambda each: each.from_wall)

    @classmethod
    def of(cls, entries: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Tariff:
        """From one entry, or several with the days from which they hold (UTC)."""
        several = [entries] if isinstance(entries, Mapping) else entries
        return cls([_entry(each) for each in several])

    def at(self, wall: float) -> tuple[Price | None, float]:
        """The price at `wall` (Unix seconds), and until when it holds; None: none yet."""
        index, until = in_force([each.from_wall for each in self._entries], wall)
        if index < 0:
            return None, until
        found = self._entries[index]
        if found.off_peak is None:
            return found.price, until
        is_off_peak, border = _look(found.windows, wall)
        return (found.off_peak if is_off_peak else found.price), min(until, border)


def in_force(starts: Sequence[float], wall: float) -> tuple[int, float]:
    """Which of what begins at `starts`, in order, holds at `wall`, and until when; -1: none yet."""
    count = bisect_right(starts, wall)
    return count - 1, (starts[count] if count < len(starts) else inf)


def _entry(entry: Mapping[str, Any]) -> Entry:
    off_peak = entry.get("off_peak")
    since = wall_of(entry.get("valid_from"))
    if not off_peak:
        return Entry(since, Price.of(entry))
    windows = [window for each in off_peak["windows"] for window in Window.of(each)]
    cheap = {**entry, "tiers": None, **_given(off_peak)}
    return Entry(since, Price.of(entry), Price.of(cheap), tuple(windows))


def _look(windows: Sequence[Window], wall: float) -> tuple[bool, float]:
    """Whether `wall` is inside of a window, and when to look again: some window then begins or
    ends, or a day does."""
    now = datetime.fromtimestamp(wall, UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    second = (now - midnight).total_seconds()
    is_inside, border = False, _DAY_S
    for window in windows:
        if now.isoweekday() not in window.weekdays:
            continue
        if window.start_s <= second < window.end_s:
            is_inside = True
        for each in (window.start_s, window.end_s):
            if second < each < border:
                border = each
    return is_inside, (midnight + timedelta(seconds=border)).timestamp()


def _parts(usage: Usage) -> tuple[int, int, int, int]:
    """The input's tokens: neither read from a cache nor written to it, read, written, and written
    for an hour. Never more than the input has."""
    cached = min(usage.cached, usage.input)
    written = min(usage.cache_write, usage.input - cached)
    written_1h = min(usage.cache_write_1h, written)
    return usage.input - cached - written, cached, written - written_1h, written_1h


def _given(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in CLASSES if entry.get(name) is not None}


def _rate(per_million: Any) -> Decimal:
    return Decimal(per_million) * _PER_MILLION


def plain(amount: Decimal) -> str:
    """`0.000123`: without an exponent, and without noughts at the end."""
    text = str(amount)  # a third of the time that formatting takes
    if "E" in text:
        text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _seconds(clock: str) -> int:
    hours, _, minutes = clock.strip().partition(":")
    seconds = int(hours) * 3600 + int(minutes) * 60
    if not 0 <= seconds <= _DAY_S or not 0 <= int(minutes) < 60:
        raise ValueError(f'"{clock}" is no time of a day')
    return seconds


def wall_of(day: date | str | None) -> float:
    """Midnight of `day` in UTC, as Unix seconds; None: always."""
    if day is None:
        return -inf
    if isinstance(day, str):
        day = date.fromisoformat(day)
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
