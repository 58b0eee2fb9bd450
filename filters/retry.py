"""Another try at the same upstream, where that is safe and likely to help."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from enum import StrEnum
from random import random
from typing import Literal, NamedTuple

from pydantic import Field

from filters.algo.backoff import after_hint_s, backoff_s
from filters.algo.estimate import count_lost
from filters.algo.http_time import retry_after_s, unix_time
from filters.algo.refusals import Told, read_refusal
from filters.algo.reset_time import reset_wait_s
from filters.algo.retry_budget import RetryBudget
from filters.algo.retry_rules import PROVIDERS, Provider, Rules, Verdict, provider_of
from sidecar.api import (
    REPEATABLE_METHODS,
    TIMEOUT_HEADER,
    Call,
    CallFilter,
    CallNext,
    FilterConfig,
    Headers,
    Kit,
    Phase,
    Reply,
    Retry,
    Upstream,
    UpstreamError,
    forget_frames,
)

HELD_BACK = frozenset({Phase.ADMIT, Phase.SIGN})
"""Where an attempt ends that we did not make: a circuit, a limit or a resting key said no."""
BEFORE_SEND = HELD_BACK | {Phase.RESOLVE, Phase.POOL, Phase.CONNECT, Phase.TLS}
"""Where nothing of a request's body has been sent yet."""

ANSWER_UNKNOWN = frozenset({Phase.SEND, Phase.HEAD})
"""Where the upstream may have worked on a request, and charge for it, though it did not say so."""

LOOKED_AT_BYTES = 16 * 1024
"""Of an answer, to find why it was refused."""

SHORTEST_HOLD_S = 0.01
"""Between two questions whether we let an attempt out."""

SLOWER_BY = 4.0
"""For a window that is longer than usual, the backoff starts so much higher."""

IDEMPOTENCY_KEY = "idempotency-key"

UNKNOWN = frozenset({"pass_through", "other"})
"""Endpoints of which nobody knows what they do."""

SDK_RETRY_HEADER = "x-stainless-retry-count"
SHOULD_RETRY = "x-should-retry"
"""What the SDKs of OpenAI and Anthropic send, and obey."""


class Denied(StrEnum):
    """Why a failure that looks temporary is not tried again."""

    ATTEMPTS = "attempts"  # as many as configured were made
    BUDGET = "budget"  # the upstream had its share of retries
    DEADLINE = "deadline"  # the caller would be gone before
    HINT = "hint"  # it asks for a longer wait than `max_s`
    CODE = "code"  # the provider's code, or its `x-should-retry`, says that waiting does not help
    UPLOAD = "upload"  # the body streamed through and is gone
    REPEAT = "repeat"  # it may have been done, and to do it twice is not known to be safe

    @property
    def helps_nobody(self) -> bool:
        """Whether the caller should not try, either: it would multiply our tries, or in vain."""
        return self in (Denied.ATTEMPTS, Denied.BUDGET, Denied.CODE)


class Policy(NamedTuple):
    """How calls to one upstream are tried again."""

    upstream: str
    rules: Rules
    budget: RetryBudget
    max_attempts: int


class Course:
    """How far one call has come with its tries at one upstream."""

    __slots__ = ("call", "is_renewed", "kept_back_s", "policy", "tries")

    def __init__(self, call: Call, policy: Policy) -> None:
        self.call = call
        self.policy = policy
        self.tries = 0
        self.kept_back_s = 0.0  # waited for leave of our own circuits and limits
        self.is_renewed = False  # tried once with fresh credentials


class RetryCalls(CallFilter):
    """Tries a call again that failed before its first byte, for a reason that may pass.

    Switch it on unless every client retries well by itself. Place it last in the call chain: inside
    of cache, queue, router and fallback, so that each of their choices gets its own tries.
    """

    class Config(FilterConfig):
        max_attempts: int = Field(default=4, ge=1)
        """Tries of one call at one upstream, the first included."""
        base_s: float = Field(default=0.5, gt=0.0)
        """The longest wait before the first retry; it doubles with each further one."""
        max_s: float = Field(default=20.0, gt=0.0)
        """The longest wait, and the longest `Retry-After` that is waited for."""
        jitter: Literal["full", "equal"] = "full"
        """Wait by chance from 0 (full), or from a half (equal), to the whole backoff."""
        budget_share: float = Field(default=0.2, ge=0.0)
        """Retries that an upstream gets, as a share of first tries."""
        budget_min_per_s: float = Field(default=2.0, ge=0.0)
        """Retries a second that it gets beside, so that a quiet sidecar retries, too."""
        tell_client: bool = True
        """Answer `x-should-retry: false` where another try of the caller's makes no sense."""

    class UpstreamSettings(FilterConfig):
        """What is different at one upstream."""

        provider: Literal["auto", Provider] = "auto"
        """Whose error codes it speaks. auto: by its host, else its dialect; none: no codes."""
        also_retry: list[str | int] = []
        """Further statuses and codes that pass; `Word.*` is every code that begins so."""
        never_retry: list[str | int] = []
        """Statuses and codes that do not."""
        max_attempts: int | None = Field(default=None, ge=1)
        """Instead of the filter's."""

    UpstreamConfig = UpstreamSettings
    reads_beginnings = True

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._config = config
        self._clock = kit.clock
        self.rand = random
        self._policies: dict[str, Policy] = {}
        make = kit.metrics
        self._retries = make.counter(
            "llm_sidecar_retries", "Tries after the first one.", ("upstream", "reason")
        )
        self._denials = make.counter(
            "llm_sidecar_retries_denied",
            "Failures that look temporary and were not tried again.",
            ("upstream", "why"),
        )
        self._client_retries = make.counter(
            "llm_sidecar_client_retries", "Calls that are an SDK's own retries.", ("team",)
        ).child(kit.team)

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        target = call.current_target
        if target is None:
            return call_next(call)
        upstream = target.upstream
        policy = self._policies.get(upstream.name) or self._open(upstream)
        return self._run(call, call_next, policy)

    def _open(self, upstream: Upstream) -> Policy:
        config, name = self._config, upstream.name
        section: RetryCalls.UpstreamSettings
        section = self.kit.upstreams.get(name) or self.UpstreamSettings()
        provider = section.provider
        if provider == "auto":
            provider = provider_of(upstream.host, upstream.dialect.name)
        share, min_per_s = config.budget_share, config.budget_min_per_s
        budget = self.kit.resources.get(
            ("retry_budget", name, share, min_per_s),
            lambda: RetryBudget(share=share, min_per_s=min_per_s, now=self._clock.monotonic()),
        )
        rules = PROVIDERS[provider].with_own(section.also_retry, section.never_retry)
        policy = Policy(name, rules, budget, section.max_attempts or config.max_attempts)
        self._policies[name] = policy
        return policy

    async def _run(self, call: Call, call_next: CallNext, policy: Policy) -> Reply:
        now = self._clock.monotonic()
        if call.headers.get(SDK_RETRY_HEADER, "0") == "0":
            policy.budget.deposit(now)
        else:
            policy.budget.charge(now)
            if not call.attempts:  # a fallback outside comes by once more for each target
                self._client_retries.inc()
        course: Course | None = None
        while True:
            try:
                reply = await call_next(call)
            except UpstreamError as error:
                course = course or Course(call, policy)
                wait_s = self._after_error(error, course)
                if wait_s is None:
                    raise
                if error.phase in ANSWER_UNKNOWN:
                    count_lost(call)
                forget_frames(error)
            else:
                if reply.status < 400 and policy.rules.within_200 is None:
                    return reply
                course = course or Course(call, policy)
                try:
                    wait_s = await self._after_reply(reply, course)
                except asyncio.CancelledError:
                    reply.discard()
                    raise
                if wait_s is None:
                    return reply
                reply.discard()
                del reply  # not held while we wait
            await self._sleep(call, wait_s)

    async def _sleep(self, call: Call, wait_s: float) -> None:
        began_at = self._clock.monotonic()
        try:
            await self._clock.sleep(wait_s)
        finally:
            call.held_s += self._clock.monotonic() - began_at

    # What a failure asks for

    def _after_error(self, error: UpstreamError, course: Course) -> float | None:
        """Seconds until the next try; None: this error is the call's."""
        hint_s, reason = error.retry_after_s, error.phase.value
        if error.retry is Retry.NO or (error.retry is Retry.ELSEWHERE and hint_s is None):
            return None
        if error.retry is Retry.ELSEWHERE and hint_s is not None and error.phase in HELD_BACK:
            return self._concluded(self._wait_for_leave(hint_s, reason, course), error, course)
        course.tries += 1
        verdict = Verdict.AGAIN
        if error.phase is Phase.FIRST_EVENT and error.provider_code:
            verdict = course.policy.rules.judge_event(error.provider_code)
        if course.call.upload is not None and error.phase not in BEFORE_SEND:
            return self._concluded(Denied.UPLOAD, error, course)
        is_known = error.phase in BEFORE_SEND or error.provider_code  # that it was not done
        if not (is_known or _may_repeat(course.call)):
            return self._concluded(Denied.REPEAT, error, course)
        return self._concluded(self._decide(verdict, hint_s, reason, course), error, course)

    async def _after_reply(self, reply: Reply, course: Course) -> float | None:
        """Seconds until the next try; None: this reply is the call's. Its bytes stay in hand."""
        status, rules = reply.status, course.policy.rules
        if status >= 400:
            data = await reply.beginning(LOOKED_AT_BYTES)
        else:
            data = reply.peeked(LOOKED_AT_BYTES)
            if status != 200 or rules.within_200 is None or not rules.within_200.search(data):
                return None
        course.tries += 1
        told = read_refusal(data, reply.headers)
        verdict = rules.judge(status, told, reply.headers.get(SHOULD_RETRY))
        if verdict is Verdict.PASS:
            return None
        if course.call.upload is not None:
            return self._concluded(Denied.UPLOAD, reply, course)
        hint_s = self._hint_s(reply.headers, told)
        return self._concluded(self._decide(verdict, hint_s, str(status), course), reply, course)

    def _hint_s(self, headers: Headers, told: Told) -> float | None:
        """How long the provider asks to wait, by the clock of whoever wrote the dates."""
        date = unix_time(headers.get("date"))
        wall = self._clock.wall() if date is None else date
        for hint_s in (retry_after_s(headers, wall), reset_wait_s(headers, wall), told.delay_s):
            if hint_s is not None:
                return hint_s
        return None

    # Whether to wait, and how long

    def _decide(
        self, verdict: Verdict, hint_s: float | None, reason: str, course: Course
    ) -> float | Denied:
        """Seconds to wait for the next try, which is paid for; or why there is none."""
        config, policy = self._config, course.policy
        if verdict is Verdict.NEVER or (verdict is Verdict.ONCE and course.is_renewed):
            return Denied.CODE
        if course.tries >= policy.max_attempts:
            return Denied.ATTEMPTS
        if hint_s is not None and hint_s > config.max_s:
            return Denied.HINT
        if hint_s:
            wait_s = after_hint_s(hint_s, self.rand())
        else:
            wait_s = backoff_s(
                course.tries,
                base_s=config.base_s * (SLOWER_BY if verdict is Verdict.SLOWER else 1.0),
                max_s=config.max_s,
                jitter=config.jitter,
                rand=self.rand(),
            )
        now = self._clock.monotonic()
        if wait_s >= course.call.time_left(now):
            return Denied.DEADLINE
        if not policy.budget.take(now):
            return Denied.BUDGET
        course.is_renewed = course.is_renewed or verdict is Verdict.ONCE
        self._note(reason, wait_s, course)
        return wait_s

    def _wait_for_leave(self, hint_s: float, reason: str, course: Course) -> float | Denied:
        """Seconds until an attempt may be let out that we held back ourselves.

        It was no try, and a further one costs the upstream nothing: only the time is bounded.
        """
        call, max_s = course.call, self._config.max_s
        asked_s = max(hint_s, SHORTEST_HOLD_S)
        wait_s = after_hint_s(asked_s, self.rand())
        if wait_s >= call.time_left(self._clock.monotonic()):
            return Denied.DEADLINE
        # What an SDK says of its patience, ten minutes by default, is no wish to wait so long.
        is_wanted = TIMEOUT_HEADER in call.headers
        if asked_s > max_s or (course.kept_back_s + asked_s > max_s and not is_wanted):
            return Denied.HINT
        course.kept_back_s += asked_s
        self._note(reason, wait_s, course)
        return wait_s

    def _concluded(
        self, found: float | Denied, failure: Reply | UpstreamError, course: Course
    ) -> float | None:
        """The seconds that were found, or None: then the caller is told what it means for its own
        tries."""
        if not isinstance(found, Denied):
            return found
        self._denials.child(course.policy.upstream, found).inc()
        # With one attempt, the configuration leaves all retrying to the caller.
        is_left_to_caller = found is Denied.ATTEMPTS and course.policy.max_attempts == 1
        if self._config.tell_client and found.helps_nobody and not is_left_to_caller:
            failure.headers[SHOULD_RETRY] = "false"
        return None

    def _note(self, reason: str, wait_s: float, course: Course) -> None:
        upstream = course.policy.upstream
        self._retries.child(upstream, reason).inc()
        about = {"call": course.call.id, "reason": reason, "wait_s": round(wait_s, 3)}
        self.kit.log.debug("retry", extra={"upstream": upstream, **about})


def _may_repeat(call: Call) -> bool:
    """Whether a request that may have been worked on can be sent again. A call for a model can, but
    what we do not know may begin something, such as a batch. Source: RFC 9110, 9.2.2."""
    if call.endpoint.name not in UNKNOWN or call.method in REPEATABLE_METHODS:
        return True
    return IDEMPOTENCY_KEY in call.headers
