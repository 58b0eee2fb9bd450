"""How much money, or how many tokens, calls may take in a day, a week or a month."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, field_validator

from filters.algo.by_model import ByModel
from filters.algo.counted import NameReader, Names, Per, key_of, words_of
from filters.algo.estimate import NO_OUTPUT, bounds_output, estimate, takes_tokens
from filters.algo.periods import UNITS, Calendar, Period, Weekday, clock_text, zone_of
from filters.algo.pricing import PRICES, Prices
from filters.algo.served import may_have_served
from filters.algo.spend_limits import (
    CURRENCIES,
    DEGRADED_TO,
    KINDS,
    MOST_MONEY,
    MOST_TOKENS,
    Act,
    Kind,
    Limit,
    Sort,
    number_of,
    parts_of_money,
    text_of,
)
from filters.stores.memory_spending import MemoryPurse
from filters.stores.rules import WhenDown
from filters.stores.spending import (
    PANEL,
    Account,
    BudgetPanel,
    Crossed,
    Held,
    Level,
    Line,
    Purse,
    Spending,
    open_spending,
)
from sidecar.api import (
    CACHED,
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
    Ground,
    Kit,
    Rejected,
    Reply,
    Target,
    field,
)

MAX_PLANS = 4096
MOST_PART = 10**13
"""One call takes no more of a sum, in parts: ten thousand dollars. An upstream that reports
nonsense must not bring a sum near to where stores stop to count exactly."""
WARNING_HEADER = "x-sidecar-budget-warning"
DEGRADED_HEADER = "x-sidecar-degraded"
NO_RETRY = {"x-should-retry": "false"}
"""For SDKs: it will be the same for hours."""


class Budget(CallFilter):
    """Bounds what calls cost in a day, week or month: warns, sends them to a cheaper model, or
    refuses them. What a call may take is reserved before it goes out; what it took is settled.

    Switch it on when somebody has to answer for the bill. Place it behind `cost`, which knows the
    prices, and outside of a cache, of retries and of whatever waits; `token_counter` must be in
    the chain, too.
    """

    class Config(FilterConfig):
        usd_per_day: float | None = Field(default=None, gt=0, le=MOST_MONEY)
        """Dollars a day; calls beyond are refused, as with the eight settings that follow."""
        usd_per_week: float | None = Field(default=None, gt=0, le=MOST_MONEY)
        """Dollars a week."""
        usd_per_month: float | None = Field(default=None, gt=0, le=MOST_MONEY)
        """Dollars a calendar month."""
        cny_per_day: float | None = Field(default=None, gt=0, le=MOST_MONEY)
        """Yuan a day."""
        cny_per_week: float | None = Field(default=None, gt=0, le=MOST_MONEY)
        """Yuan a week."""
        cny_per_month: float | None = Field(default=None, gt=0, le=MOST_MONEY)
        """Yuan a calendar month."""
        tokens_per_day: int | None = Field(default=None, gt=0, le=MOST_TOKENS)
        """Tokens a day, of input and output together."""
        tokens_per_week: int | None = Field(default=None, gt=0, le=MOST_TOKENS)
        """Tokens a week."""
        tokens_per_month: int | None = Field(default=None, gt=0, le=MOST_TOKENS)
        """Tokens a calendar month."""
        warn_at: float | None = Field(default=0.8, gt=0, le=1)
        """The share of these amounts beyond which answers carry a warning. null: none do."""
        limits: list[Limit] = []
        """Further limits: they may also warn or degrade, and each says from when."""
        per: list[Per] = ["team"]
        """Spending is counted for each of these together (`team`, `model`, `upstream`, `key`);
        empty: for all together."""
        models: list[str] = Field(default=["*"], min_length=1)
        """Models that it is for, by name or pattern (`*`, `?`); `*`: also calls that name none."""
        timezone: str = "UTC"
        """Whose days these are: an IANA name."""
        week_starts: Weekday = "monday"
        """The first day of a week."""
        output_reserve: NonNegativeInt = 1000
        """Tokens reserved for an answer whose length the caller does not bound."""
        unknown_price: Literal["allow", "refuse"] = "allow"
        """What happens to calls whose price nobody knows, where money is counted."""
        when_store_is_down: WhenDown = "local_share"
        """Let every call in, none, or each process its share of what is left."""

        def lacks(self, ground: Ground) -> Iterable[tuple[tuple[str | int, ...], str]]:
            for index, limit in enumerate(self.limits):
                if limit.to is not None and ground.dialect_of(limit.to) is None:
                    yield ("limits", index, "to"), f'"{limit.to}" is not among `models`'

        @field_validator("timezone")
        @classmethod
        def _is_known(cls, name: str) -> str:
            zone_of(name)
            return name

    gives = frozenset({DEGRADED_TO})
    needs = frozenset({PRICES})
    reads = frozenset({USAGE})

    config: Config

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._acts = list(_acts(config))
        self.is_idle = not self._acts
        if self.is_idle:
            return
        self._sorts = list(dict.fromkeys(act.sort for act in self._acts))
        self._kinds = [sort.kind for sort in self._sorts]
        self._currencies = {k: CURRENCIES[k] for k in dict.fromkeys(self._kinds) if k in CURRENCIES}
        self._zone = zone_of(config.timezone)
        self._calendars = [
            Calendar(sort.unit, self._zone, week_starts=config.week_starts) for sort in self._sorts
        ]
        self._models = None if "*" in config.models else ByModel(dict.fromkeys(config.models, True))
        self._read = NameReader(kit.team, config.per)
        self._plans: dict[Names, Plan] = {}
        self._plan: Plan | None = None
        self._spending: Spending | None = None
        self._find_bounds()
        self._make_metrics()

    def _find_bounds(self) -> None:
        """Which limits hold for which calls, in the order in which they are looked at."""
        refusing = [act for act in self._acts if act.then == "refuse"]
        # Of several that are crossed the last one wins: it leads to the cheapest model.
        degrading = [act for act in self._acts if act.then == "degrade"]
        degrading.sort(key=lambda act: act.nearness, reverse=True)
        self._refusing = self._bounds_of(refusing)
        self._all = self._bounds_of([*degrading, *refusing])
        # A call for a model that others are degraded to only goes further down.
        self._bounds: dict[str | None, Bounds] = {
            act.to: self._bounds_of([*degrading[:index], *refusing])
            for index, act in reversed([*enumerate(degrading)])
        }
        self._targets: dict[str, tuple[Target, ...]] = {}
        self._marks = {act.to: field(DEGRADED_HEADER, act.to) for act in degrading}

    def _bounds_of(self, acts: Sequence[Act]) -> Bounds:
        lines = [Line(self._sorts.index(act.sort), act.most) for act in acts]
        return Bounds(tuple(acts), tuple(lines))

    def _make_metrics(self) -> None:
        counter, team = self.kit.metrics.counter, self.kit.team
        labels = ("team", "budget")
        spent = counter("llm_sidecar_budget_spent", "What was spent: money or tokens.", labels)
        self._spent: list[Counter] = [spent.child(team, sort.name) for sort in self._sorts]
        warned = counter("llm_sidecar_budget_warned", "Calls answered with a warning.", labels)
        self._warnings = [
            Warned(self._sorts.index(act.sort), act, warned.child(team, act.name))
            for act in self._acts
            if act.then == "warn"
        ]
        self._refused = counter("llm_sidecar_budget_refused", "Calls that were refused.", labels)
        self._degraded = counter(
            "llm_sidecar_budget_degraded", "Calls that went to a cheaper model.", labels
        )
        self._unpriced: Counter = counter(
            "llm_sidecar_budget_unpriced", "Calls whose price was not known.", ("team",)
        ).child(team)

    async def start(self) -> None:
        if self.is_idle:
            return
        for name in self._marks:
            targets = self.kit.find_model(name)
            if not targets:
                raise ValueError(f'budget: limits lead to "{name}", which is not among `models`')
            self._targets[name] = tuple(targets)
        self._spending = open_spending(self.kit)
        await self._spending.load()
        self.kit.panel(PANEL, BudgetPanel).shows(self, self._show)

    async def stop(self) -> None:
        if not self.is_idle:
            self.kit.panel(PANEL, BudgetPanel).forget(self)

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        if not takes_tokens(call):
            return call_next(call)
        if self._models is not None and self._models.find(call.model) is None:
            return call_next(call)
        plan = self._plan_of(call)
        asked = self._ask_for(call)
        if not asked.is_priced:
            self._meet_unpriced(plan)
        purse = plan.purse
        if not isinstance(purse, MemoryPurse):
            return self._reserve(plan, asked, call, call_next)
        bounds = self._bounds.get(call.model, self._all)
        held = purse.reserve_now(asked.amounts, bounds.lines)
        act = None
        if isinstance(held, Crossed):
            act, asked = self._crossed(call, plan, bounds, held, asked)
            held = purse.reserve_now(asked.amounts, self._refusing.lines)
            if isinstance(held, Crossed):
                raise self._used_up(call, plan, self._refusing, held, asked)
        self._go(call, held, asked, act)
        return call_next(call)

    async def _reserve(self, plan: Plan, asked: Asked, call: Call, call_next: CallNext) -> Reply:
        """The same where the sums are elsewhere."""
        purse, when_down = plan.purse, self.config.when_store_is_down
        bounds = self._bounds.get(call.model, self._all)
        held = await purse.reserve(asked.amounts, bounds.lines, when_down)
        act = None
        if isinstance(held, Crossed):
            act, asked = self._crossed(call, plan, bounds, held, asked)
            held = await purse.reserve(asked.amounts, self._refusing.lines, when_down)
            if isinstance(held, Crossed):
                raise self._used_up(call, plan, self._refusing, held, asked)
        self._go(call, held, asked, act)
        return await call_next(call)

    def _go(self, call: Call, held: Held, asked: Asked, degraded: Act | None) -> None:
        """What the call owes, and what its caller is told."""
        call.on_end(partial(self._settle, call, held, asked))
        if degraded is not None:
            self._degraded.child(self.kit.team, degraded.name).inc()
            call.put_reply_field(*self._marks[degraded.to])
        if not self._warnings:
            return
        totals = held.totals
        told = []
        for account, act, warned in self._warnings:
            total = totals[account]
            if total > act.most:
                warned.value += 1
                told.append(f"{act.name} {total * 100 // act.amount}%")
        if told:
            call.set_reply_header(WARNING_HEADER, ", ".join(dict.fromkeys(told)))

    # Who is counted, and when

    def _plan_of(self, call: Call) -> Plan:
        now = self.kit.clock.wall()
        plan = self._plan
        if plan is not None and plan.starts_at <= now < plan.ends_at:
            return plan
        names = self._read(call)
        plan = self._plans.get(names)
        if plan is None or not plan.starts_at <= now < plan.ends_at:
            # All end at the same moment; and callers' keys may be many.
            one = next(iter(self._plans.values()), None)
            is_over = one is not None and not one.starts_at <= now < one.ends_at
            if is_over or len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            plan = self._plans[names] = self._make_plan(names, now)
        if self._read.is_fixed:
            self._plan = plan
        return plan

    def _make_plan(self, names: Names, now: float) -> Plan:
        assert self._spending is not None, "the filter was not started"
        per = self.config.per
        periods = [calendar.at(now) for calendar in self._calendars]
        models = "" if self._models is None else f"models={','.join(sorted(self.config.models))},"
        accounts = [
            Account(
                f"{kind}|{calendar.key_of(period)}|{models}{key_of(per, names)}", period.ends_at
            )
            for kind, calendar, period in zip(self._kinds, self._calendars, periods, strict=True)
        ]
        return Plan(
            self._spending.purse(accounts),
            words_of(per, names),
            periods,
            max(period.starts_at for period in periods),
            min(period.ends_at for period in periods),
        )

    # What a call may take

    def _ask_for(self, call: Call) -> Asked:
        tokens_in, tokens_out = estimate(call, self.config.output_reserve)
        parts: Parts = {"tokens": tokens_in + tokens_out}
        if self._currencies:
            prices = call[PRICES]
            self._enter(parts, prices, prices.estimate(call, tokens_in, tokens_out))
        amounts = [min(parts[kind] or 0, MOST_PART) for kind in self._kinds]
        return Asked(amounts, None not in parts.values())

    def _enter(self, parts: Parts, prices: Prices, cost: Cost | None) -> None:
        """Enter a cost in each currency that is counted."""
        for kind, currency in self._currencies.items():
            parts[kind] = _money(prices, cost, currency)

    def _meet_unpriced(self, plan: Plan) -> None:
        self._unpriced.value += 1
        if self.config.unknown_price == "refuse":
            message = (
                f"the price of this call is not known, and the budget of {plan.words} lets none "
                "in without: ask for a model that has one, or let an operator enter it in "
                "`filters.cost.prices`"
            )
            raise Rejected(402, "budget_price_unknown", message, headers=NO_RETRY)

    # The end

    def _settle(self, call: Call, held: Held, asked: Asked, end: End) -> None:
        """Put what the call took in the place of what was reserved for it."""
        amounts = self._taken(call, asked, end)
        held.settle(amounts)
        for kind, amount, spent in zip(self._kinds, amounts, self._spent, strict=True):
            spent.value += number_of(amount, kind)

    def _taken(self, call: Call, asked: Asked, end: End) -> list[int]:
        """What it took of each sum.

        An answer whose usage nobody knows, not even as an estimate, has taken what was reserved;
        one whose price is not known as a whole, what is known of it, if that is more.
        """
        usage, lost, side = call.get(USAGE), call.get(LOST_USAGE), call.get(SIDE_CALLS)
        was_asked = call.attempts > 0 and CACHED not in call
        stands = was_asked and usage is None and may_have_served(end)
        used = [usage] if was_asked and usage is not None else []
        if lost is not None:
            used.append(lost)
        if side is not None:
            used += [each.usage for each in side]
        if not used:
            return asked.amounts if stands else [0] * len(asked.amounts)
        parts: Parts = {"tokens": sum(each.input + each.output for each in used)}
        if self._currencies:
            prices = call[PRICES]
            self._enter(parts, prices, prices.charge(call))
        unknown = [kind for kind, part in parts.items() if part is None]
        if unknown and not self._enter_known(parts, unknown, call) and asked.is_priced:
            self._unpriced.value += 1
        amounts = []
        for kind, reserved in zip(self._kinds, asked.amounts, strict=True):
            part = parts[kind] or 0
            if stands:
                part += reserved
            elif kind in unknown and was_asked:
                part = max(part, reserved)
            amounts.append(min(part, MOST_PART))
        return amounts

    def _enter_known(self, parts: Parts, kinds: Sequence[Kind], call: Call) -> bool:
        """Enter what is known of a cost in currencies in which all of it is not. Whether all that
        was used has a price there, and only the usage of an answer is missing."""
        prices = call[PRICES]
        costs = prices.parts(call)
        is_priced = True
        for kind in kinds:
            amounts = [_money(prices, cost, CURRENCIES[kind]) for cost in costs]
            parts[kind] = sum(amount or 0 for amount in amounts)
            is_priced = is_priced and None not in amounts
        return is_priced

    # Beyond a limit

    def _crossed(
        self, call: Call, plan: Plan, bounds: Bounds, crossed: Crossed, asked: Asked
    ) -> tuple[Act | None, Asked]:
        """Send the call to the model that the limit leads to: the limit, and what the call may take
        there. The limit is None when that model is no cheaper: then the call stays as it is. Raises
        `Rejected` (402) when the limit refuses, or the model cannot answer the call."""
        act = bounds.acts[crossed.line]
        if not act.to:
            raise self._used_up(call, plan, bounds, crossed, asked)
        targets = self._targets[act.to]
        dialect = targets[0].upstream.dialect
        if dialect is not call.dialect:
            raise self._no_way(plan, act, crossed.level, f"speaks the {dialect.name} dialect")
        if not call.endpoint.has_model or call.endpoint.name in NO_OUTPUT or call.body is None:
            raise self._no_way(plan, act, crossed.level, "cannot answer this request")
        before = call.targets, call.target
        call.targets, call.target, call[DEGRADED_TO] = targets, None, act.to
        there = self._ask_for(call)
        if not there.is_priced and asked.is_priced:
            self._meet_unpriced(plan)
        elif there.is_priced and asked.is_priced and self._is_no_cheaper(there, asked):
            call.targets, call.target = before
            call[DEGRADED_TO] = call.model or ""
            return None, asked
        return act, there

    def _is_no_cheaper(self, there: Asked, here: Asked) -> bool:
        """False also where only tokens are counted: nobody knows."""
        for kind, new, old in zip(self._kinds, there.amounts, here.amounts, strict=True):
            if kind in CURRENCIES:
                return new >= old
        return False

    def _no_way(self, plan: Plan, act: Act, level: Level, why: str) -> Rejected:
        self._refused.child(self.kit.team, act.name).inc()
        message = (
            f"{_standing(plan, act, level)}: calls now go to {act.to}, which {why}. It begins anew "
            f"at {self._anew(plan, act)}"
        )
        return Rejected(402, "budget_exceeded", message, headers=NO_RETRY)

    def _used_up(
        self, call: Call, plan: Plan, bounds: Bounds, crossed: Crossed, asked: Asked
    ) -> Rejected:
        act, level = bounds.acts[crossed.line], crossed.level
        self._refused.child(self.kit.team, act.name).inc()
        may_take = asked.amounts[bounds.lines[crossed.line].account]
        message = (
            f"{_standing(plan, act, level)}, and this call may take "
            f"{text_of(may_take, act.sort.kind)}. It begins anew at {self._anew(plan, act)}"
        )
        if level.spent < act.most and not bounds_output(call):
            name = "max_output_tokens" if call.endpoint.name == "responses" else "max_tokens"
            message += f"; name {name} to reserve less"
        return Rejected(402, "budget_exceeded", message, headers=NO_RETRY)

    def _anew(self, plan: Plan, act: Act) -> str:
        period = plan.periods[self._sorts.index(act.sort)]
        return clock_text(period.ends_at, self._zone)

    # For operators

    async def _show(self) -> list[dict[str, Any]]:
        """A row for each limit of those who called in this period."""
        now = self.kit.clock.wall()
        rows = []
        for plan in list(self._plans.values()):
            if plan.starts_at <= now < plan.ends_at:
                levels = await plan.purse.levels()
                for act in self._acts:
                    index = self._sorts.index(act.sort)
                    rows.append(self._row(plan, plan.periods[index], levels[index], act))
        return rows

    def _row(self, plan: Plan, period: Period, level: Level, act: Act) -> dict[str, Any]:
        kind = act.sort.kind
        return {
            "team": self.kit.team,
            "counted": plan.words,
            "budget": act.name,
            "then": f"{act.then} to {act.to}" if act.to else act.then,
            "period": period.name,
            "resets_at": datetime.fromtimestamp(period.ends_at, self._zone).isoformat(),
            "spent": number_of(level.spent, kind),
            "reserved": number_of(level.reserved, kind),
            "limit": number_of(act.amount, kind),
            "acts_beyond": number_of(act.most, kind),
            "share": round(level.spent / act.amount, 4),
        }


Parts = dict[Kind, int | None]
"""An amount of each kind; None: not known."""


class Bounds(NamedTuple):
    """Limits that calls may not cross as they are, and the same for stores."""

    acts: tuple[Act, ...]
    lines: tuple[Line, ...]


class Warned(NamedTuple):
    """A limit that callers are only told of."""

    account: int
    act: Act
    calls: Counter


class Asked(NamedTuple):
    """What a call may take of each sum."""

    amounts: list[int]
    is_priced: bool
    """All of it is known."""


class Plan(NamedTuple):
    """What counts calls of the same names, for as long as none of its periods ends."""

    purse: Purse
    words: str
    periods: list[Period]
    starts_at: int
    ends_at: int


def _acts(config: Budget.Config) -> Iterator[Act]:
    """All limits: the settings for one amount each, with their warnings, and the further ones."""
    for kind in KINDS:
        for unit in UNITS:
            amount = getattr(config, Sort(kind, unit).name)
            if amount is not None:
                limit = {kind: amount, "per": unit}
                yield Limit.model_validate(limit).act()
                if config.warn_at is not None:
                    yield Limit.model_validate(
                        {**limit, "then": "warn", "at": config.warn_at}
                    ).act()
    for each in config.limits:
        yield each.act()


def _money(prices: Prices, cost: Cost | None, currency: str) -> int | None:
    """A cost in parts of a currency; None: in that one nobody knows it."""
    if cost is None:
        return None
    amount = cost.amount if cost.currency == currency else prices.convert(cost, currency)
    return None if amount is None else parts_of_money(amount)


def _standing(plan: Plan, act: Act, level: Level) -> str:
    """Which budget it is, and how it stands, for people."""
    kind = act.sort.kind
    left = max(0, act.most - level.spent - level.reserved)
    under_way = f", {text_of(level.reserved, kind)} reserved for calls under way"
    return (
        f"the budget of {plan.words}: {text_of(act.most, kind)} a {act.sort.unit} has "
        f"{text_of(left, kind)} left ({text_of(level.spent, kind)} spent"
        f"{under_way if level.reserved else ''})"
    )
