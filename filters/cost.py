"""What calls cost."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from functools import partial
from importlib.resources import files
from math import inf
from typing import Any, NamedTuple

from pydantic import field_validator

from filters.algo.by_model import ByModel
from filters.algo.estimate import takes_tokens
from filters.algo.price_settings import Currency, PriceList, PriceSettings, Provider, Worth
from filters.algo.prices import PriceTable, provider_of
from filters.algo.pricing import PRICES, USD, ZERO, Price, Tariff, in_force, plain, wall_of
from filters.algo.served import may_have_served
from filters.algo.spend_limits import DEGRADED_TO
from sidecar.api import (
    CACHED,
    COST,
    LOST_USAGE,
    SIDE_CALLS,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Cost,
    Counter,
    End,
    FilterConfig,
    Kit,
    Reply,
    SideCall,
    Target,
    Usage,
)

COST_HEADER = b"x-sidecar-cost"
CURRENCY_HEADER = b"x-sidecar-currency"

MAX_BOUNDS = 4096
"""Models that callers name may be many."""
MAX_NAME = 256
"""A longer name of a model is a caller's joke."""
MAX_TOLD = 200
"""Models without a price of which the log tells."""


class CallCost(CallFilter):
    """Says what each call costs, by a shipped table of prices and your own.

    Switch it on for money in headers, metrics and the ledger, and for budgets of money. Place it
    outside of `budget`, `token_counter` and the cache, and inside of `ledger` and the access log,
    which write down what it says. It refuses nothing.
    """

    class Config(FilterConfig):
        prices: dict[str, PriceList] = {}
        """Prices that go before the shipped ones, by model: its name or a pattern with `*`, as
        callers or the upstream write it, or `UPSTREAM/NAME`. For a million tokens."""
        exchange: dict[Currency, Worth] = {}
        """What one unit of a currency is worth in USD, to add up and compare; none: currencies stay
        apart."""

        @field_validator("exchange")
        @classmethod
        def _is_of_others(cls, worth: dict[str, Decimal]) -> dict[str, Decimal]:
            if USD in worth:
                raise ValueError("a dollar is worth 1 USD: leave USD out")
            return worth

    class UpstreamConfig(FilterConfig):
        provider: Provider | None = None
        """Whose prices the upstream charges; null: told by its host."""

    config: Config

    gives = frozenset({PRICES, COST})
    reads = frozenset({USAGE})

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._charges = Charges(config, kit)
        self._amounts = kit.metrics.counter(
            "llm_api_cost", "What calls cost.", ("model", "upstream", "team", "currency")
        )
        self._unknown = kit.metrics.counter(
            "llm_sidecar_cost_unknown",
            "Calls of which nobody knows what they cost.",
            ("model", "upstream", "team"),
        )
        self._counters: dict[tuple[str, str, str], Counter] = {}

    async def start(self) -> None:
        table = files("filters") / "data" / "prices.json"
        self._charges.table = self.kit.resources.get(
            ("price_table",), lambda: PriceTable(table.read_bytes())
        )
        for name, prices in self.config.prices.items():
            for each in prices:
                if each.like is not None and self._charges.table.entry(each.like) is None:
                    fields = {"model": name, "like": each.like}
                    self.kit.log.warning("price_like_unknown", extra=fields)

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        charges = self._charges
        call[PRICES] = charges
        call.on_end(partial(self._settle, call))
        reply = await call_next(call)
        body = reply.body
        if USAGE in call and not body.is_stream:
            cost = charges.charge(call)
            if cost is not None:
                if call.attempts < 2 and SIDE_CALLS not in call and body.is_whole:
                    call[COST] = cost  # nothing can come on top any more
                call.put_reply_field(COST_HEADER, plain(cost.amount).encode())
                call.put_reply_field(CURRENCY_HEADER, cost.currency.encode())
        return reply

    def _settle(self, call: Call, end: End) -> None:
        cost = self._charges.charge(call)
        target = call.current_target
        label, upstream = call.label or "-", target.upstream.name if target is not None else "-"
        if cost is None:
            if call.attempts or SIDE_CALLS in call:
                self._unknown.child(label, upstream, self.kit.team).inc()
            return
        key = (label, upstream, cost.currency)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._amounts.child(label, upstream, self.kit.team, cost.currency)
            self._counters[key] = counter
        counter.value += float(cost.amount)


class Charges:
    """`Prices` for the calls of one team."""

    def __init__(self, config: CallCost.Config, kit: Kit) -> None:
        self.table = PriceTable(b"")
        """Nothing, until the filter has started."""
        self._own = config.prices
        self._patterns = [ByModel({name: each}) for name, each in config.prices.items()]
        self._worth = {USD: Decimal(1), **config.exchange}
        self._providers = {
            name: section.provider
            for name, section in kit.upstreams.items()
            if section.provider is not None
        }
        self._wall = kit.clock.wall
        self._log = kit.log
        self._told: set[tuple[str, str]] = kit.resources.get(("cost_told",), set)
        self._bounds: dict[tuple[str, str | None, str | None], Bound] = {}

    # What filters ask

    def charge(self, call: Call) -> Cost | None:
        known = call.get(COST)
        if known is not None:
            return known
        cost = self._work_out(call)
        if cost is not None and call.end is not None:
            call[COST] = cost
        return cost

    def estimate(self, call: Call, tokens_in: int, tokens_out: int) -> Cost | None:
        price = self._price_of(call)
        if price is None:
            return None
        return Cost(price.amount(Usage(tokens_in, tokens_out)), price.currency)

    def convert(self, cost: Cost, currency: str) -> Decimal | None:
        if cost.currency == currency:
            return cost.amount
        one, other = self._worth.get(cost.currency), self._worth.get(currency)
        return None if one is None or other is None else cost.amount * one / other

    def parts(self, call: Call) -> list[Cost | None]:
        used: list[tuple[Price | None, Usage]] = []
        if call.attempts and CACHED not in call:
            price = self._price_of(call)
            took = call.get(USAGE), call.get(LOST_USAGE)
            used += [(price, each) for each in took if each is not None]
        for target, _, usage, model in call.get(SIDE_CALLS, ()):
            used.append((self._price(target, model or None), usage))
        return [
            None if price is None else Cost(price.amount(usage), price.currency)
            for price, usage in used
        ]

    # A call

    def _work_out(self, call: Call) -> Cost | None:
        sides = call.get(SIDE_CALLS)
        cost: Cost | None
        if CACHED in call or (sides and not call.attempts):
            cost = _nothing(self._price_of(call))
        elif call.attempts:
            cost = self._of_attempts(call)
        else:
            return None
        return self._with_sides(cost, sides) if sides and cost is not None else cost

    def _of_attempts(self, call: Call) -> Cost | None:
        """What the upstream's work costs: of the answer, and of attempts that were given up."""
        usage, lost, end = call.get(USAGE), call.get(LOST_USAGE), call.end
        if usage is None and (end is None or (may_have_served(end) and takes_tokens(call))):
            return None  # not known yet, or never
        price = self._price_of(call)
        if usage is None and lost is None:
            return _nothing(price)
        if price is None:
            return None
        amount = ZERO if usage is None else price.amount(usage)
        return Cost(amount if lost is None else amount + price.amount(lost), price.currency)

    def _with_sides(self, cost: Cost, sides: Sequence[SideCall]) -> Cost | None:
        amount, currency = cost
        for target, _, usage, model in sides:
            price = self._price(target, model or None)
            if price is None:
                return None
            if not amount:
                currency = price.currency
            side = self.convert(Cost(price.amount(usage), price.currency), currency)
            if side is None:  # two kinds of money, and nobody said what one is worth
                return None
            amount += side
        return Cost(amount, currency)

    # Prices

    def _price_of(self, call: Call) -> Price | None:
        target = call.current_target
        if target is None:
            return None
        return self._price(target, call.get(DEGRADED_TO, call.model))

    def _price(self, target: Target, public: str | None) -> Price | None:
        """What `target` charges now for a model that callers name `public`."""
        key = (target.upstream.name, target.model, public)
        bound = self._bounds.get(key)
        if bound is None or (bound.until != inf and self._wall() >= bound.until):
            if public is not None and len(public) > MAX_NAME:
                return None
            if len(self._bounds) >= MAX_BOUNDS:
                self._bounds.clear()
            bound = self._bounds[key] = self._look_up(target, public, self._wall())
        return bound.price

    def _look_up(self, target: Target, public: str | None, wall: float) -> Bound:
        upstream, model = target.upstream.name, target.model or public
        if model is None:
            return Bound(None, inf)
        own, until = self._configured(upstream, model, public, wall)
        if own is not None:
            return Bound(own, until)
        provider, region = provider_of(target.upstream.host) or ("", "")
        named = self._providers.get(upstream, provider)
        entry = self.table.find(named, region if named == provider else "", model)
        if entry is not None:
            price, border = Tariff.of(entry).at(wall)
            if price is not None:
                return Bound(price, min(until, border))
            until = min(until, border)
        self._tell(upstream, model)
        return Bound(None, until)

    def _configured(
        self, upstream: str, model: str, public: str | None, wall: float
    ) -> tuple[Price | None, float]:
        """The price of one's own that holds at `wall`, and until when to go by that."""
        names = [f"{upstream}/{model}", model]
        if public is not None:
            names += f"{upstream}/{public}", public
        own = self._own_prices(names)
        if own is None:
            return None, inf
        several = sorted(own, key=lambda each: wall_of(each.valid_from))
        index, until = in_force([wall_of(each.valid_from) for each in several], wall)
        entry = self._entry(several[index]) if index >= 0 else None
        if entry is None:
            return None, until
        price, border = Tariff.of(entry).at(wall)
        return price, min(until, border)

    def _own_prices(self, names: Sequence[str]) -> Sequence[PriceSettings] | None:
        """Those of the first of `names` that has some, else of the first pattern that one fits."""
        for name in names:
            if name in self._own:
                return self._own[name]
        for pattern in self._patterns:
            for name in names:
                found = pattern.find(name)
                if found is not None:
                    return found
        return None

    def _entry(self, settings: PriceSettings) -> Any:
        """As the table has it."""
        if settings.like is not None:
            return self.table.entry(settings.like)
        return {**settings.model_dump(), "valid_from": None}

    def _tell(self, upstream: str, model: str) -> None:
        name = (upstream, model)
        if name not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(name)
            self._log.warning("price_unknown", extra={"upstream": upstream, "model": model})


class Bound(NamedTuple):
    """A price that was looked up, and until when it holds (Unix seconds)."""

    price: Price | None
    until: float


def _nothing(price: Price | None) -> Cost:
    """Nothing is nothing, whatever the price."""
    return Cost(ZERO, price.currency if price is not None else USD)
