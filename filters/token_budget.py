"""How many tokens calls may take in a minute, reserved before and settled after."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from math import ceil
from typing import NamedTuple

from pydantic import NonNegativeInt, PositiveInt

from filters.algo.counted import NameReader, Names, Per, key_of, words_of
from filters.algo.estimate import bounds_output, estimate, takes_tokens
from filters.algo.served import may_have_served
from filters.stores.limits import Grant, MemoryMeter, Meter, Refusal, Rule, WhenDown, open_limits
from sidecar.api import (
    CACHED,
    LOST_USAGE,
    REPORTED,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Counter,
    End,
    FilterConfig,
    Kit,
    Rejected,
    Reply,
    Usage,
)

KINDS = {
    "tokens_per_minute": (True, True, "tokens"),
    "input_tokens_per_minute": (True, False, "input tokens"),
    "output_tokens_per_minute": (False, True, "output tokens"),
}
"""Settings: whether input and output count, and the word for both."""

MINUTE_S = 60.0
LONG_WAIT_S = 120.0
"""A longer one, of a budget in debt, is nothing to sleep through: SDKs are told not to."""
NOTHING = Usage()
MAX_PLANS = 4096


class TokenBudget(CallFilter):
    """Bounds the tokens that calls take in a minute: what each may take is reserved before it goes
    out, and what its provider reports is settled at its end.

    Switch it on when tokens are what costs, or what a provider limits. Place it behind
    `rate_limit` and outside of a cache, of retries and of whatever waits; `token_counter` must be
    in the chain, too, for what is not reported stays as it was estimated.
    """

    class Config(FilterConfig):
        tokens_per_minute: PositiveInt | None = None
        """Input and output together, in any minute."""
        input_tokens_per_minute: PositiveInt | None = None
        """Of requests."""
        output_tokens_per_minute: PositiveInt | None = None
        """Of answers."""
        per: list[Per] = ["team"]
        """Tokens are counted for each of these together (`team`, `model`, `upstream`, `key`);
        empty: for all together."""
        output_reserve: NonNegativeInt = 1000
        """Reserved for an answer whose length the caller does not bound."""
        when_store_is_down: WhenDown = "local_share"
        """Let every call in, none, or each process its share."""

    reads = frozenset({USAGE})

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._budgets = [
            Budget(limit, has_input, has_output, name, f"{limit} {word} a minute")
            for name, (has_input, has_output, word) in KINDS.items()
            if (limit := getattr(config, name)) is not None
        ]
        self.is_idle = not self._budgets
        if self.is_idle:
            return
        self._output_reserve = config.output_reserve
        self._limits = open_limits(kit, config.when_store_is_down)
        self._read = NameReader(kit.team, config.per)
        self._plans: dict[Names, Plan] = {}
        self._plan = self._make_plan(Names(kit.team)) if self._read.is_fixed else None
        self._limited = kit.metrics.counter(
            "llm_sidecar_limited", "Calls refused by a limit.", ("team", "rule")
        )
        made = kit.metrics.counter(
            "llm_sidecar_budget_reservations", "Calls that tokens were reserved for.", ("team",)
        )
        self._reservations: Counter = made.child(kit.team)
        settled = kit.metrics.counter(
            "llm_sidecar_budget_settlements",
            "Calls whose tokens were settled, by what was known of them.",
            ("team", "source"),
        )
        tokens = kit.metrics.counter(
            "llm_sidecar_budget_tokens", "Tokens as they were settled.", ("team", "kind", "source")
        )
        self._reported, self._estimated = (
            Books(
                settled.child(kit.team, source),
                tokens.child(kit.team, "input", source),
                tokens.child(kit.team, "output", source),
            )
            for source in ("reported", "estimated")
        )
        self._refunds: Counter = settled.child(kit.team, "refunded")

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        if not takes_tokens(call):
            return call_next(call)
        plan = self._plan or self._plan_of(call)
        tokens_in, tokens_out = estimate(call, self._output_reserve)
        amounts = []
        for limit, has_input, has_output, name, words in self._budgets:
            if tokens_in > limit and has_input:
                raise self._too_small(name, f"{plan.words}: {words}", tokens_in)
            amount = has_input * tokens_in + has_output * tokens_out
            # One that may take more than the limit needs all of it.
            amounts.append(amount if amount < limit else limit)
        meter = plan.meter
        if not isinstance(meter, MemoryMeter):
            return self._ask(plan, amounts, tokens_in, tokens_out, call, call_next)
        taken = meter.take_now(amounts)
        if isinstance(taken, Refusal):
            raise self._refused(call, plan, taken, tokens_in, tokens_out)
        self._reservations.value += 1
        call.on_end(partial(self._settle, call, taken, tokens_in, tokens_out))
        return call_next(call)

    async def _ask(
        self,
        plan: Plan,
        amounts: list[int],
        tokens_in: int,
        tokens_out: int,
        call: Call,
        call_next: CallNext,
    ) -> Reply:
        """The same where the counts are elsewhere."""
        taken = await plan.meter.take(amounts)
        if isinstance(taken, Refusal):
            raise self._refused(call, plan, taken, tokens_in, tokens_out)
        self._reservations.value += 1
        call.on_end(partial(self._settle, call, taken, tokens_in, tokens_out))
        return await call_next(call)

    def _plan_of(self, call: Call) -> Plan:
        names = self._read(call)
        plan = self._plans.get(names)
        if plan is None:
            if len(self._plans) >= MAX_PLANS:  # callers' keys may be many
                self._plans.clear()
            plan = self._plans[names] = self._make_plan(names)
        return plan

    def _make_plan(self, names: Names) -> Plan:
        per = self.config.per
        key = f"token_budget|{key_of(per, names)}"
        rules = [Rule(budget.name, budget.limit, MINUTE_S) for budget in self._budgets]
        return Plan(self._limits.meter([(key, rule) for rule in rules]), words_of(per, names))

    # The end

    def _settle(
        self, call: Call, grant: Grant, reserved_in: int, reserved_out: int, end: End
    ) -> None:
        """Put what the call took in the place of what was reserved for it."""
        usage, lost = call.get(USAGE), call.get(LOST_USAGE)
        tokens_in = tokens_out = guessed_in = guessed_out = 0
        if not call.attempts or CACHED in call:
            self._refunds.value += 1
        elif usage is not None:
            reported = usage
            if usage.is_estimated:  # of an answer that was cut, a part may have been reported
                reported = call.get(REPORTED, NOTHING)
                guessed_in, guessed_out = (
                    usage.input - reported.input,
                    usage.output - reported.output,
                )
            tokens_in, tokens_out = reported.input, reported.output
            books = self._estimated if reported is NOTHING else self._reported
            books.settled.value += 1
            self._reported.input.value += tokens_in
            self._reported.output.value += tokens_out
        elif may_have_served(end):
            guessed_in, guessed_out = reserved_in, reserved_out
            self._estimated.settled.value += 1
            if lost is None:  # the reservation stands
                self._guess(guessed_in, guessed_out)
                return
        else:
            self._refunds.value += 1
        if lost is not None:
            guessed_in, guessed_out = guessed_in + lost.input, guessed_out + lost.output
        if guessed_in or guessed_out:
            self._guess(guessed_in, guessed_out)
            tokens_in, tokens_out = tokens_in + guessed_in, tokens_out + guessed_out
        for index, budget in enumerate(self._budgets):
            grant.settle(index, budget.has_input * tokens_in + budget.has_output * tokens_out)

    def _guess(self, tokens_in: int, tokens_out: int) -> None:
        """Enter what nobody reported."""
        self._estimated.input.value += tokens_in
        self._estimated.output.value += tokens_out

    # Refusals

    def _too_small(self, name: str, words: str, tokens_in: int) -> Rejected:
        """No waiting helps."""
        self._limited.child(self.kit.team, name).inc()
        message = (
            f"the budget of {words} is smaller than this request alone, of "
            f"about {tokens_in} tokens: make it shorter"
        )
        headers = {"x-should-retry": "false"}
        return Rejected(429, "token_budget_too_small", message, headers=headers)

    def _refused(
        self, call: Call, plan: Plan, refusal: Refusal, tokens_in: int, tokens_out: int
    ) -> Rejected:
        index, wait_s, remaining = refusal.index, refusal.wait_s, refusal.remaining
        budget = self._budgets[index]
        self._limited.child(self.kit.team, budget.name).inc()
        headers = call.dialect.limit_headers(
            *("tokens", budget.limit, remaining, wait_s, self.kit.clock.wall())
        )
        if wait_s > LONG_WAIT_S:
            headers["x-should-retry"] = "false"
        of_input, of_answer = budget.has_input * tokens_in, budget.has_output * tokens_out
        parts = []
        if of_input:
            parts.append(f"{of_input} of input")
        if of_answer:
            parts.append(f"{of_answer} reserved for the answer")
        message = (
            f"the budget of {plan.words}: {budget.words} has {remaining} left, and this call may "
            f"take {of_input + of_answer} ({', '.join(parts)}): try again in "
            f"{max(1, ceil(wait_s))} s"
        )
        if of_answer and not bounds_output(call):
            name = "max_output_tokens" if call.endpoint.name == "responses" else "max_tokens"
            message += f", or name {name} to reserve less"
        return Rejected(
            429, "token_budget_exceeded", message, retry_after_s=wait_s, headers=headers
        )


class Plan(NamedTuple):
    """What counts calls of the same names, and who they are."""

    meter: Meter
    words: str


class Budget(NamedTuple):
    """One limit, and what counts for it."""

    limit: int
    has_input: bool
    has_output: bool
    name: str
    words: str
    """The limit for people."""


class Books(NamedTuple):
    """What was settled, by where the figures came from."""

    settled: Counter
    input: Counter
    output: Counter
