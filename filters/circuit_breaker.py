"""Stops asking an upstream that fails, and tries carefully whether it is well again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from filters.algo.circuit import MAX_WINDOW_S, SUCCESS, Refusal, Rules, Verdict
from filters.algo.retry_rules import CALLERS_FAULT
from filters.stores.circuits import let_go, open_circuits
from filters.stores.memory_circuits import MemoryCircuit, MemoryCircuits, Report
from filters.stores.rules import WhenDown
from sidecar.api import (
    COMPLETED,
    Attempt,
    AttemptFilter,
    AttemptNext,
    Counter,
    End,
    FilterConfig,
    Kit,
    Outcome,
    Phase,
    Reply,
    Retry,
    UpstreamError,
)

if TYPE_CHECKING:
    from filters.stores.redis_circuits import RedisCircuit, RedisCircuits

RATE_CODES = frozenset({"rate_limit_error", "rate_limit_exceeded"})
"""What providers call a 429, when it comes as the first event of a 200."""

CALLER_CODES = CALLERS_FAULT | {"content_policy_violation", "billing_error", "insufficient_quota"}
"""What they call other 4xx there."""


class CircuitBreaker(AttemptFilter):
    """Refuses attempts at an upstream that has failed too often, so that callers get their answer
    elsewhere, or a quick error, and the upstream gets its rest.

    Place it in the attempt list before the filters that take something for an attempt, such as
    `upstream_limits`, and before `sign`. There is a circuit for each upstream and model, by the
    model's name there.
    """

    class Config(FilterConfig):
        """When a circuit opens, and how it closes again. A section of an upstream says what is
        different there; what it leaves out is as here."""

        failure_threshold: int = Field(default=5, ge=1)
        """Failures one after the other that open the circuit."""
        failure_rate: float | None = Field(default=None, gt=0.0, le=1.0)
        """The share of failures that opens it instead, counted over `window_s`. null: it is not
        counted, `failure_threshold` holds."""
        window_s: int = Field(default=30, ge=1, le=MAX_WINDOW_S)
        """What `failure_rate` is counted over."""
        min_calls: int = Field(default=20, ge=1)
        """Fewer outcomes in `window_s` open nothing."""
        recovery_timeout_s: float = Field(default=60.0, gt=0.0)
        """So long it stays open; twice as long after each probe that failed."""
        max_recovery_timeout_s: float = Field(default=600.0, gt=0.0)
        """But not longer than this (or than `recovery_timeout_s`, if that is more)."""
        recovery_jitter: float = Field(default=0.1, ge=0.0, le=0.5)
        """Share of that time that is taken off at random, so that replicas do not probe in step."""
        success_threshold: int = Field(default=3, ge=1)
        """Probes that must succeed to close it."""
        half_open_max: int = Field(default=3, ge=1)
        """Probes that may be out at a time."""
        count_429: bool = False
        """Whether an answer 429 is a failure."""
        probe_lease_s: float = Field(default=120.0, gt=0.0)
        """With a shared store: a probe that nobody has reported for so long gives its place up, as
        its replica may be dead."""
        when_store_is_down: WhenDown = "local_share"
        """While the shared store is away: `local_share` (each process has circuits of its own),
        `open` (every attempt goes) or `closed` (none does)."""

    UpstreamConfig = Config

    config: Config

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._circuits: MemoryCircuits | RedisCircuits | None = None
        self._doors: dict[tuple[str, str], Door] = {}
        self._refused = kit.metrics.counter(
            "llm_sidecar_circuit_refused",
            "Attempts that a circuit refused.",
            ("upstream", "model"),
        )

    async def start(self) -> None:
        self._circuits = open_circuits(self.kit, self)

    async def stop(self) -> None:
        let_go(self.kit, self)

    def handle(self, attempt: Attempt, call_next: AttemptNext) -> Awaitable[Reply]:
        place = (attempt.upstream.name, attempt.target.model or attempt.call.label)
        door = self._doors.get(place) or self._make_door(*place)
        circuit = door.circuit
        if not isinstance(circuit, MemoryCircuit):
            return self._ask(door, circuit, attempt, call_next)
        report = circuit.admit(door.rules)
        if isinstance(report, Refusal):
            raise door.refused(report)
        attempt.on_end(door.debt(report))
        return call_next(attempt)

    async def _ask(
        self, door: Door, circuit: RedisCircuit, attempt: Attempt, call_next: AttemptNext
    ) -> Reply:
        """The same where the circuit is elsewhere."""
        report = await circuit.admit(door.rules, door.when_down)
        if isinstance(report, Refusal):
            raise door.refused(report)
        attempt.on_end(door.debt(report))
        return await call_next(attempt)

    def _make_door(self, upstream: str, model: str) -> Door:
        assert self._circuits is not None, "the filter was not started"
        own = self.kit.upstreams.get(upstream)
        said = own.model_dump(exclude_unset=True) if own is not None else {}
        settings = self.config.model_copy(update=said)
        circuit = self._circuits.circuit(upstream, model)
        door = Door(circuit, settings, self._refused.child(upstream, model or "-"))
        self._doors[upstream, model] = door
        return door


class Door:
    """A circuit with the settings that hold for it here."""

    __slots__ = ("_counts_429", "_debt", "_refused", "circuit", "rules", "when_down")

    def __init__(
        self,
        circuit: MemoryCircuit | RedisCircuit,
        settings: CircuitBreaker.Config,
        refused: Counter,
    ) -> None:
        names = Rules.__dataclass_fields__
        self.circuit = circuit
        self.rules = Rules(**{name: getattr(settings, name) for name in names})
        self.when_down = settings.when_store_is_down
        self._counts_429 = settings.count_429
        self._refused = refused
        self._debt = partial(self._ended, _nothing)

    def debt(self, report: Report) -> Callable[[End], None]:
        """What an attempt owes that was let through with this report."""
        debt = self._debt
        if debt.args[0] is not report:  # it is, for nearly every attempt
            debt = self._debt = partial(self._ended, report)
        return debt

    def _ended(self, report: Report, end: End) -> None:
        """Tell the circuit what the attempt's end says of the upstream."""
        if end.outcome is COMPLETED and end.status < 429:
            report(SUCCESS)
        else:
            report(verdict(end, counts_429=self._counts_429))

    def refused(self, refusal: Refusal) -> UpstreamError:
        """What the attempt fails with."""
        self._refused.inc()
        upstream = self.circuit.upstream
        if refusal.wait_s is None:
            text = f"the circuit of {upstream} is held open by an operator"
        else:
            text = f"{upstream} failed too often and is left alone for a while: try again later"
        return UpstreamError(
            Phase.ADMIT,
            Retry.ELSEWHERE,
            "circuit_open",
            text,
            status=503,
            retry_after_s=refusal.wait_s,
        )


def _nothing(verdict: Verdict) -> None:
    """A report of no attempt."""


def verdict(end: End, *, counts_429: bool) -> Verdict:
    """What the end of an attempt says of its upstream.

    A 4xx proves it alive. A client that left, and an attempt that we gave up or never sent, say
    nothing; but an answer of 5xx that is given up for another try is one.
    """
    outcome, error, is_429 = end.outcome, end.error, end.status == 429
    if outcome is Outcome.UPSTREAM_FAILED and isinstance(error, UpstreamError):
        if error.phase.is_ours:
            return Verdict.NONE
        if error.provider_code in CALLER_CODES:
            return Verdict.SUCCESS
        is_429 = is_429 or error.provider_code in RATE_CODES
    elif outcome is Outcome.DISCARDED:
        is_failure = end.status >= 500 or (is_429 and counts_429)
        return Verdict.FAILURE if is_failure else Verdict.NONE
    if outcome not in (COMPLETED, Outcome.UPSTREAM_FAILED):
        return Verdict.NONE
    if is_429:
        return Verdict.FAILURE if counts_429 else Verdict.SUCCESS
    return Verdict.FAILURE if end.upstream_fault else Verdict.SUCCESS
