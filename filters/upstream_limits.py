"""What each upstream allows: as it is configured, and as its answers say."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from math import inf
from typing import Literal

from pydantic import Field, PositiveInt

from filters.algo.allowance import FRESH_S, Allowance, read
from filters.algo.estimate import estimate, takes_tokens
from filters.algo.http_time import retry_after_s, unix_time
from filters.algo.served import may_have_served, was_sent
from filters.stores.learned import MAX_ALLOWANCES, Learned
from filters.stores.limits import (
    Grant,
    MemoryMeter,
    Meter,
    Refusal,
    Rule,
    Slot,
    WhenDown,
    open_limits,
)
from sidecar.api import (
    COMPLETED,
    USAGE,
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    Clock,
    End,
    FilterConfig,
    Kit,
    Phase,
    Reply,
    Retry,
    UpstreamError,
)

CODE = "upstream_limit_reached"

RULES = {
    "requests_per_second": (1.0, "requests a second"),
    "requests_per_minute": (60.0, "requests a minute"),
    "tokens_per_minute": (60.0, "tokens a minute"),
}
"""Settings with their seconds and words; tokens last."""

SLOT_RETRY_S = 1.0
"""Nobody knows when an attempt in flight ends."""
SHORTEST_SLEEP_S = 0.001
"""uvloop's timers have whole milliseconds, and may be early by a half."""
OUTPUT_RESERVE = 1000
"""Tokens for an answer whose length the caller does not bound."""


class UpstreamLimits(AttemptFilter):
    """Keeps an upstream within what its provider allows, by configuration and by what the answers
    say is left. An attempt that has to wait long goes elsewhere, one that waits shortly waits.

    Switch it on where a provider answers 429, or before it does. Place it behind
    `circuit_breaker` and right before `sign`, which asks it for every key.
    """

    class Config(FilterConfig):
        max_wait_s: float = Field(default=1.0, ge=0.0)
        """An attempt that may go within so long waits here; one that may not is refused at once."""
        when_store_is_down: WhenDown = "local_share"
        """Let every attempt go, none, or each process its share."""

    class UpstreamConfig(FilterConfig):
        requests_per_second: PositiveInt | None = None
        """Attempts in any second."""
        requests_per_minute: PositiveInt | None = None
        """Attempts in any minute."""
        tokens_per_minute: PositiveInt | None = None
        """Input and output of attempts in any minute."""
        concurrency: PositiveInt | None = None
        """Attempts in flight."""
        per: list[Literal["model", "key"]] = []
        """The upstream allows this for each of these together: its `model`, our `key` there."""
        learn: bool = True
        """Heed what its answers say of the limits, too."""

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._places = {
            name: Place(name, settings, config.when_store_is_down, kit)
            for name, settings in kit.upstreams.items()
        }
        self.is_idle = not self._places
        self._max_wait_s = config.max_wait_s
        self._clock = kit.clock

    def handle(self, attempt: Attempt, call_next: AttemptNext) -> Awaitable[Reply]:
        place = self._places.get(attempt.upstream.name)
        return call_next(attempt) if place is None else self._pass(place, attempt, call_next)

    async def _pass(self, place: Place, attempt: Attempt, call_next: AttemptNext) -> Reply:
        passage = Passage(place, attempt)
        attempt.on_end(passage.ended)
        while True:
            if place.asks_by_key:
                attempt.key_gate = passage.use_key
            try:
                if place.takes_first and passage.grant is None:
                    has_room = passage.take("")
                    if not (has_room if isinstance(has_room, bool) else await has_room):
                        raise passage.no_room()
                reply = await call_next(attempt)
            except UpstreamError as error:
                if error.code != CODE:
                    raise
                if not self._may_wait(passage):
                    raise passage.no_room(error.retry_after_s) from None
            else:
                if place.asks_by_key:
                    passage.answered(reply)
                return reply
            # Nothing was sent, and what is not by key is kept.
            passage.is_waiting = True
            await self._clock.sleep(max(passage.wait_s, SHORTEST_SLEEP_S))
            passage.is_waiting, passage.wait_s = False, inf

    def _may_wait(self, passage: Passage) -> bool:
        """Whether the wait that the passage was told is short enough; counts the answer."""
        now, wait_s = self._clock.monotonic(), passage.wait_s
        if not passage.give_up_at:
            passage.give_up_at = now + self._max_wait_s
        may = now + wait_s <= passage.give_up_at and wait_s < passage.call.time_left(now)
        passage.place.count(passage.rule, "waited" if may else "refused")
        return may


class Place:
    """The limits of one upstream."""

    def __init__(
        self,
        upstream: str,
        settings: UpstreamLimits.UpstreamConfig,
        when_store_is_down: WhenDown,
        kit: Kit,
    ) -> None:
        self.upstream = upstream
        self.clock: Clock = kit.clock
        self.rules = [
            Rule(name, limit, period_s)
            for name, (period_s, _) in RULES.items()
            if (limit := getattr(settings, name)) is not None
        ]
        has_tokens = settings.tokens_per_minute is not None
        self.ones = (1,) * (len(self.rules) - has_tokens)
        """What an attempt takes of the rules; tokens come on top."""
        self.tokens_limit = settings.tokens_per_minute
        self.concurrency = settings.concurrency or 0
        self.has_limits = bool(self.rules or self.concurrency)
        self.by_model, self.by_key = "model" in settings.per, "key" in settings.per
        self.learns = settings.learn
        self.asks_by_key = self.learns or (self.has_limits and self.by_key)
        self.takes_first = self.has_limits and not self.by_key
        """Something is taken before any key is chosen."""
        self.quiet_until = 0.0
        """So long, answers need not be read that may be the first to say anything."""
        if self.has_limits:
            self.limits = open_limits(kit, when_store_is_down)
        learned = kit.panel("upstream_limits", lambda: Learned(kit.clock))
        self.allowances = learned.of(upstream, kit.origins[upstream])
        """Empty until an answer has said something."""
        self._meters: dict[tuple[str, str], Meter] = {}
        self.meter: Meter | None = None
        """What counts all attempts, when it is by nothing."""
        if self.has_limits and not settings.per:
            self.meter = self.meter_of("", "")
        self._limited = kit.metrics.counter(
            "llm_sidecar_upstream_limited",
            "Attempts that an upstream's limit held back, by what became of them.",
            ("upstream", "rule", "answer"),
        )

    def count(self, rule: str, answer: str) -> None:
        self._limited.child(self.upstream, rule, answer).inc()

    def allowance(self, model: str, key: str) -> Allowance:
        """What the provider's answers said for this model and key."""
        found = self.allowances.get((model, key))
        if found is None:
            if len(self.allowances) >= MAX_ALLOWANCES:
                self.allowances.clear()
            found = self.allowances[model, key] = Allowance()
        return found

    def meter_of(self, model: str, key: str) -> Meter:
        """What counts attempts of this model and key as it is configured."""
        names = (model if self.by_model else "", key if self.by_key else "")
        found = self._meters.get(names)
        if found is None:
            name = f"upstream_limits|upstream={self.upstream}"
            name += f",key={key[:16]}" if self.by_key else ""
            name += f",model={model}" if self.by_model else ""
            slots = [Slot(f"{name}|concurrency", self.concurrency)] if self.concurrency else []
            if len(self._meters) >= MAX_ALLOWANCES:
                self._meters.clear()
            found = self.limits.meter([(name, rule) for rule in self.rules], slots)
            self._meters[names] = found
        return found

    def words(self, rule: str) -> str:
        """A limit for people."""
        if rule == "concurrency":
            return f"{self.concurrency} requests at once"
        return next(f"{each.limit} {RULES[rule][1]}" for each in self.rules if each.name == rule)


class Passage:
    """One attempt's way through the limits of its upstream.

    It holds the call and not the attempt, which holds it.
    """

    # Most attempts leave these as they are.
    is_waiting = False
    give_up_at = 0.0  # has not waited yet
    wait_s = inf
    rule = ""
    """What has no room, and for how long; by key, the one that has some first."""
    grant: Grant | None = None
    """What was taken as it is configured."""
    _allowance: Allowance | None = None
    """What it goes out by, until its answer begins."""
    _tokens = (0, 0)
    """Of which it takes so many: input and output."""
    _was_asked = False
    _key = ""

    def __init__(self, place: Place, attempt: Attempt) -> None:
        self.place = place
        self.call: Call = attempt.call
        self._model = attempt.target.model or self.call.label or "-"
        self._passes_key = attempt.upstream.passes_client_key

    def use_key(self, key: str) -> float | Awaitable[float]:
        """`KeyGate`: take what is by key. Whoever asks again does not use the key of before; no
        key of ours (``""``) means the caller's own."""
        place = self.place
        if self._was_asked:
            self._leave_key()
        self._was_asked = True
        self._key = key
        if place.learns and place.allowances:
            allowance = place.allowance(self._model, key or self._callers_key())
            if not allowance.is_known:
                allowance.in_flight += 1
            elif wait_s := self._go(allowance):
                return wait_s
            self._allowance = allowance
        if not (place.by_key and place.has_limits):
            return 0.0
        has_room = self.take(key or self._callers_key())
        return self._took(has_room) if isinstance(has_room, bool) else self._took_later(has_room)

    def _took(self, has_room: bool) -> float:
        if has_room:
            return 0.0
        self._leave_key()
        return SLOT_RETRY_S if self.wait_s == inf else self.wait_s

    async def _took_later(self, has_room: Awaitable[bool]) -> float:
        return self._took(await has_room)

    def _callers_key(self) -> str:
        """What stands for the caller's own key, where the upstream gets it."""
        return self.call.key_id if self._passes_key else ""

    def _go(self, allowance: Allowance) -> float:
        """Go out by what was learned, or say how long to wait."""
        if allowance.knows_tokens and takes_tokens(self.call):
            self._tokens = estimate(self.call, 0)
        wait_s, kind = allowance.wait_s(self.place.clock.monotonic(), *self._tokens)
        if wait_s:
            self._no_room_in(f"learned-{kind}", wait_s)
        else:
            allowance.begin(*self._tokens)
        return wait_s

    def take(self, key: str) -> bool | Awaitable[bool]:
        """Take what is configured, or note what has no room."""
        place = self.place
        amounts = place.ones
        if (limit := place.tokens_limit) is not None:
            amount = 0
            if takes_tokens(self.call):
                amount = sum(estimate(self.call, OUTPUT_RESERVE))
            amounts = (*amounts, min(amount, limit))
        meter = place.meter or place.meter_of(self._model, key)
        if isinstance(meter, MemoryMeter):
            return self._hold(meter.take_now(amounts))
        return self._take_elsewhere(meter, amounts)

    async def _take_elsewhere(self, meter: Meter, amounts: Sequence[int]) -> bool:
        return self._hold(await meter.take(amounts))

    def _hold(self, taken: Grant | Refusal) -> bool:
        if not isinstance(taken, Refusal):
            self.grant = taken
            return True
        place = self.place
        if taken.index < len(place.rules):
            self._no_room_in(place.rules[taken.index].name, taken.wait_s)
        else:
            self._no_room_in("concurrency", inf)
        return False

    def _no_room_in(self, rule: str, wait_s: float) -> None:
        if wait_s <= self.wait_s:
            self.rule, self.wait_s = rule, wait_s

    def _leave_key(self) -> None:
        """Give back what was taken by a key that is not used after all."""
        allowance, self._allowance = self._allowance, None
        if allowance is not None:
            allowance.withdraw(*self._tokens)
        self._tokens = (0, 0)
        if self.place.by_key:
            self._undo()

    def _undo(self) -> None:
        """Give back what was taken as it is configured."""
        grant, self.grant = self.grant, None
        if grant is not None:
            grant.release()
            for index in range(len(self.place.rules)):
                grant.settle(index, 0)

    def answered(self, reply: Reply) -> None:
        """Learn from how the answer begins."""
        place, allowance = self.place, self._allowance
        if allowance is None:
            if self._was_asked and place.learns:
                self._listen(reply)
            return
        self._allowance = None
        clock, headers, status = place.clock, reply.headers, reply.status
        if allowance.fresh_until and status == 200 and clock.monotonic() < allowance.fresh_until:
            allowance.end(*self._tokens)
            return
        found = read(headers.raw())
        if found or allowance.is_known:
            allowance.end(*self._tokens, found, clock.monotonic(), clock.wall())
        else:
            allowance.said_nothing(clock.monotonic())
        if status == 429:
            their_time = unix_time(headers.get("date")) or clock.wall()
            rest_s = retry_after_s(headers, their_time)
            if rest_s is not None:
                allowance.rest(clock.monotonic(), rest_s)

    def _listen(self, reply: Reply) -> None:
        """Is this the first answer that says anything?"""
        place, now = self.place, self.place.clock.monotonic()
        if reply.status == 200 and now < place.quiet_until:
            return
        if reply.status == 429 or read(reply.headers.raw()):
            allowance = place.allowance(self._model, self._key or self._callers_key())
            allowance.in_flight += 1
            self._allowance = allowance
            self.answered(reply)
        else:
            place.quiet_until = now + FRESH_S

    def ended(self, end: End) -> None:
        """The attempt's debt: give back what it held, and settle what it took."""
        if self._allowance is not None:
            self._was_not_answered(self._allowance, end)
        grant = self.grant
        if grant is None:
            return
        if self.is_waiting or not was_sent(end):
            self._undo()
            return
        grant.release()
        if self.place.tokens_limit is not None:
            self._settle(grant, end)

    def _was_not_answered(self, allowance: Allowance, end: End) -> None:
        self._allowance = None
        if was_sent(end):
            allowance.end(*self._tokens)
        else:
            allowance.withdraw(*self._tokens)

    def _settle(self, grant: Grant, end: End) -> None:
        """Put the tokens that it took in the place of the estimate, as far as they are known."""
        index, usage = len(self.place.ones), self.call.get(USAGE)
        if not may_have_served(end):
            grant.settle(index, 0)
        elif usage is not None and end.outcome is COMPLETED:
            grant.settle(index, usage.input + usage.output)

    def no_room(self, wait_s: float | None = None) -> UpstreamError:
        """What the attempt fails with; `wait_s`: if another key is free before."""
        place = self.place
        if self.rule.startswith("learned-"):
            message = f"upstream {place.upstream} has asked to wait"
        else:
            message = f"the limit of upstream {place.upstream} is reached: {place.words(self.rule)}"
        return UpstreamError(
            *(Phase.ADMIT, Retry.ELSEWHERE, CODE, message),
            status=429,
            retry_after_s=wait_s or (SLOT_RETRY_S if self.wait_s == inf else self.wait_s),
        )
