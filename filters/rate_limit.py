"""How many calls are let in, by time and at once."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator, Sequence
from math import ceil
from typing import NamedTuple, Self

from pydantic import Field, PositiveInt, model_validator

from filters.algo.by_model import ByModel
from filters.algo.counted import NameReader, Names, Per, key_of, words_of
from filters.stores.limits import (
    MemoryMeter,
    Meter,
    Rated,
    Refusal,
    Rule,
    Slot,
    WhenDown,
    open_limits,
)
from sidecar.api import Call, CallFilter, CallNext, FilterConfig, Kit, Rejected, Reply

PERIODS = {
    "requests_per_second": (1.0, "second"),
    "requests_per_minute": (60.0, "minute"),
    "requests_per_day": (86_400.0, "day"),
}
"""Settings with their seconds and words, the shortest first."""

EVERY = ["*"]
"""The pattern of all models, and of calls that name none."""

SLOT_RETRY_S = 1.0
"""Nobody knows when a call in flight ends."""
LONG_WAIT_S = 120.0
"""A longer one is nothing to sleep through: SDKs are told not to, and not all know themselves."""
MAX_PLANS = 4096
LONGEST_NAME = 256
"""Of a model, in characters: for a longer one a plan is made each time. With a pattern among the
configured models, names are what callers say, and only a body's size bounds them."""


class FurtherRule(FilterConfig):
    """One more set of limits, beside those of the filter."""

    models: list[str] = Field(default=["*"], min_length=1)
    """Models that it is for, by name or pattern (`*`, `?`); `*`: also calls that name none."""
    requests_per_second: PositiveInt | None = None
    """Calls in any second."""
    requests_per_minute: PositiveInt | None = None
    """Calls in any minute."""
    requests_per_day: PositiveInt | None = None
    """Calls in any 24 hours."""
    burst: PositiveInt | None = None
    """Calls at once; the others of the shortest period come evenly spread. null: all at once."""
    concurrency: PositiveInt | None = None
    """Calls that are being answered."""
    per: list[Per] = ["team"]
    """Calls are counted for each of these together; empty: for all together."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if not _limits(self):
            raise ValueError("a rule without a limit: give it one, such as `requests_per_minute`")
        _check_burst(self)
        return self


class RateLimit(CallFilter):
    """Bounds how many calls come in a second, minute or day, and how many run at once.

    Switch it on so that one team, model or key cannot take what all share. Place it near the
    outside, behind those who observe: a call that it refuses has cost nothing else.
    """

    class Config(FilterConfig):
        requests_per_second: PositiveInt | None = None
        """Calls in any second."""
        requests_per_minute: PositiveInt | None = None
        """Calls in any minute."""
        requests_per_day: PositiveInt | None = None
        """Calls in any 24 hours."""
        burst: PositiveInt | None = None
        """Calls at once; the others of the shortest period come evenly spread. null: all at
        once."""
        concurrency: PositiveInt | None = None
        """Calls that are being answered."""
        per: list[Per] = ["team"]
        """Calls are counted for each of these together (`team`, `model`, `upstream`, `key`);
        empty: for all together."""
        rules: list[FurtherRule] = []
        """Further limits, of some models or counted by something else. All must have room."""
        when_store_is_down: WhenDown = "local_share"
        """Let every call in, none, or each process its share."""

        @model_validator(mode="after")
        def _is_clear(self) -> Self:
            _check_burst(self)
            seen = {(frozenset(EVERY), frozenset(self.per))} if _limits(self) else set()
            for index, rule in enumerate(self.rules):
                models = EVERY if EVERY[0] in rule.models else rule.models
                what = (frozenset(models), frozenset(rule.per))
                if what in seen:
                    raise ValueError(
                        f"rules[{index}] counts the same calls as limits before it: make them one"
                    )
                seen.add(what)
            return self

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._rules = list(_rules(config))
        self.is_idle = not self._rules
        if self.is_idle:
            return
        self._limits = open_limits(kit, config.when_store_is_down)
        self._read = NameReader(kit.team, [each for rule in self._rules for each in rule.per])
        self._by_model = any(rule.models is not None for rule in self._rules)
        self._plans: dict[tuple[str | None, Names], Plan] = {}
        self._plan = None
        if self._read.is_fixed and not self._by_model:
            self._plan = self._make_plan(None, Names(kit.team))
        self._limited = kit.metrics.counter(
            "llm_sidecar_limited", "Calls refused by a limit.", ("team", "rule")
        )

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        plan = self._plan or self._plan_of(call)
        meter = plan.meter
        if not isinstance(meter, MemoryMeter):
            return self._ask(plan, call, call_next)
        taken = meter.take_now(plan.amounts)
        if isinstance(taken, Refusal):
            raise self._refused(call, plan, taken)
        if plan.has_slots:
            call.on_end(taken.release)
        return call_next(call)

    async def _ask(self, plan: Plan, call: Call, call_next: CallNext) -> Reply:
        """The same where the counts are elsewhere."""
        taken = await plan.meter.take(plan.amounts)
        if isinstance(taken, Refusal):
            raise self._refused(call, plan, taken)
        if plan.has_slots:
            call.on_end(taken.release)
        return await call_next(call)

    def _plan_of(self, call: Call) -> Plan:
        model = call.model if self._by_model else None
        names = self._read(call)
        if model is not None and len(model) > LONGEST_NAME:
            return self._make_plan(model, names)
        plan = self._plans.get((model, names))
        if plan is None:
            if len(self._plans) >= MAX_PLANS:  # names of models, and keys, are the callers'
                self._plans.clear()
            plan = self._plans[model, names] = self._make_plan(model, names)
        return plan

    def _make_plan(self, model: str | None, names: Names) -> Plan:
        fitting = [rule for rule in self._rules if rule.is_for(model)]
        rated: list[Rated] = []
        slots, words, labels = [], [], []
        for each in fitting:
            key = f"{each.key}|{key_of(each.per, names)}"
            for limit in each.timed:
                rated.append((key, limit.rule))
                words.append(f"{words_of(each.per, names)}{each.words}: {limit.words}")
                labels.append(limit.label)
        for each in fitting:
            if each.concurrency:
                key = f"{each.key}|{key_of(each.per, names)}|concurrency"
                slots.append(Slot(key, each.concurrency))
                who = f"{words_of(each.per, names)}{each.words}"
                words.append(f"{who}: {each.concurrency} calls at once")
                labels.append(f"{each.label}concurrency")
        meter = self._limits.meter(rated, slots)
        return Plan(meter, (1,) * len(rated), bool(slots), rated, words, labels)

    def _refused(self, call: Call, plan: Plan, refusal: Refusal) -> Rejected:
        """The 429; it says which limit it is, and how long to wait at least."""
        index, wait_s, remaining = refusal.index, refusal.wait_s, refusal.remaining
        self._limited.child(self.kit.team, plan.labels[index]).inc()
        words = plan.words[index]
        if index >= len(plan.rated):
            message = f"the limit of {words} is reached: try again when one of them is over"
            return Rejected(429, "concurrency_limited", message, retry_after_s=SLOT_RETRY_S)
        headers = call.dialect.limit_headers(
            *("requests", plan.rated[index][1].limit, remaining, wait_s, self.kit.clock.wall())
        )
        if wait_s > LONG_WAIT_S:
            headers["x-should-retry"] = "false"
        message = f"the limit of {words} is reached: try again in {max(1, ceil(wait_s))} s"
        return Rejected(429, "rate_limited", message, retry_after_s=wait_s, headers=headers)


class Plan(NamedTuple):
    """What calls of the same names take; words and labels go over the rules, then the slots."""

    meter: Meter
    amounts: tuple[int, ...]
    has_slots: bool
    rated: list[Rated]
    words: list[str]
    labels: list[str]


class Timed(NamedTuple):
    """One limit of calls in a period."""

    rule: Rule
    words: str
    label: str
    """For metrics: where it stands in the settings."""


class Compiled(NamedTuple):
    """One set of limits."""

    key: str
    """Of its counts, whatever the limits and wherever it stands: a reload keeps them."""
    label: str
    models: ByModel[bool] | None
    """None: all."""
    words: str
    """The models for people: ` for gpt-4o, o1*`; nothing for all, or when each is named."""
    per: Sequence[Per]
    timed: tuple[Timed, ...]
    concurrency: int

    def is_for(self, model: str | None) -> bool:
        return self.models is None or self.models.find(model) is not None


def _rules(config: RateLimit.Config) -> Iterator[Compiled]:
    if _limits(config):
        yield _compiled(config, "", EVERY)
    for index, rule in enumerate(config.rules):
        yield _compiled(rule, f"rules[{index}].", rule.models)


def _compiled(
    settings: RateLimit.Config | FurtherRule, label: str, models: Sequence[str]
) -> Compiled:
    timed = []
    burst = settings.burst
    for name in _limits(settings):
        if name != "concurrency":
            period_s, word = PERIODS[name]
            limit = getattr(settings, name)
            words = f"{limit} requests a {word}"
            if burst is not None:
                words += f", {burst} at once"
            timed.append(Timed(Rule(name, limit, period_s, burst), words, f"{label}{name}"))
            burst = None  # of the shortest period alone: a day's limit is not to be spread
    is_for_all = EVERY[0] in models
    return Compiled(
        key="rate_limit" if is_for_all else f"rate_limit|models={','.join(sorted(models))}",
        label=label,
        models=None if is_for_all else ByModel(dict.fromkeys(models, True)),
        words="" if is_for_all or "model" in settings.per else f" for {', '.join(models)}",
        per=settings.per,
        timed=tuple(timed),
        concurrency=settings.concurrency or 0,
    )


def _limits(settings: RateLimit.Config | FurtherRule) -> list[str]:
    """The limits that are set, by name."""
    return [name for name in (*PERIODS, "concurrency") if getattr(settings, name) is not None]


def _check_burst(settings: RateLimit.Config | FurtherRule) -> None:
    if settings.burst is not None and not set(_limits(settings)) & set(PERIODS):
        raise ValueError("`burst` goes with a limit such as `requests_per_minute`: add one")
