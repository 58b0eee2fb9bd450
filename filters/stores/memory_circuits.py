"""Circuits in the memory of this process, and what is counted and logged of circuits.

They know nothing of attempts: who asks brings the rules and, later, the verdict.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from typing import NamedTuple

from filters.algo.circuit import (
    CLOSED,
    SUCCESS,
    Admission,
    Circuit,
    Refusal,
    Rules,
    State,
    Verdict,
    View,
)
from sidecar.api import Clock, Counter, Gauge, Kit

Report = Callable[[Verdict], None]
"""Tells a circuit how the attempt ended that it let through; once. Never raises."""

ALL_MODELS = "*"

LINES = {
    State.CLOSED: "circuit_closed",
    State.OPEN: "circuit_opened",
    State.HALF_OPEN: "circuit_half_open",
}


class Shown(NamedTuple):
    """A circuit and what there is to see of it."""

    upstream: str
    model: str
    view: View


class Sightings:
    """What this process saw of circuits, as metrics and lines of the log.

    The gauge shows the state that it saw last; over several workers it adds up to how many of them
    saw it. A change is counted and logged by the process that caused it, and by no other.
    """

    def __init__(self, kit: Kit) -> None:
        self._log = kit.log
        self._changes = kit.metrics.counter(
            "llm_sidecar_circuit_transitions",
            "Changes of a circuit's state.",
            ("upstream", "model", "to"),
        )
        self._states = kit.metrics.gauge(
            "llm_sidecar_circuits",
            "Circuits by the state that was seen last.",
            ("upstream", "model", "state"),
        )
        self._seen: dict[tuple[str, str], State] = {}

    def saw(self, upstream: str, model: str, state: State) -> None:
        """The circuit is in this state."""
        before = self._seen.get((upstream, model))
        if before is state:
            return
        self._seen[upstream, model] = state
        for each in State:
            gauge: Gauge = self._states.child(upstream, model or "-", each)
            gauge.set(1.0 if each is state else 0.0)

    def changed(self, upstream: str, model: str, view: View) -> None:
        """The circuit has come into this state, by what this process did."""
        counter: Counter = self._changes.child(upstream, model or "-", view.state)
        counter.inc()
        fields: dict[str, object] = {"upstream": upstream, "model": model}
        if view.forced is not None:
            fields["forced"] = True
        elif view.state is State.OPEN:
            fields |= {"failures": view.failures, "retry_in_s": round(view.retry_in_s or 0.0, 1)}
        level = logging.WARNING if view.state is State.OPEN else logging.INFO
        self._log.log(level, LINES[view.state], extra=fields)
        self.saw(upstream, model, view.state)


class MemoryCircuit:
    """One circuit of this process."""

    __slots__ = (
        "_clock",
        "_rand",
        "_report_closed",
        "_sightings",
        "circuit",
        "model",
        "upstream",
    )

    def __init__(
        self,
        upstream: str,
        model: str,
        clock: Clock,
        sightings: Sightings,
        rand: Callable[[], float],
    ) -> None:
        self.upstream = upstream
        self.model = model
        self.circuit = Circuit(f"{upstream} {model}" if model else upstream)
        self._clock = clock
        self._sightings = sightings
        self._rand = rand
        # Attempts that a closed circuit lets through in one epoch are all reported alike.
        self._report_closed = partial(self._report, Rules(), Admission(-1, 0))

    def admit(self, rules: Rules) -> Report | Refusal:
        """Whether an attempt may go: how to report it, or why not."""
        circuit = self.circuit
        if circuit.state is CLOSED:
            report = self._report_closed
            if report.args[1].epoch != circuit.epoch or report.args[0] is not rules:
                report = partial(self._report, rules, Admission(circuit.epoch, 0))
                self._report_closed = report
            return report
        before, now = circuit.state, self._clock.monotonic()
        # Every attempt of this process comes to its end: its place needs no lease.
        admission = circuit.admit(replace(rules, probe_lease_s=inf), now)
        self._look(before, now)
        if isinstance(admission, Refusal):
            return admission
        return partial(self._report, rules, admission)

    def force(self, state: State | None) -> None:
        before = self.circuit.state
        self.circuit.force(state)
        self._look(before, self._clock.monotonic())

    def shown(self) -> Shown:
        return Shown(self.upstream, self.model, self.circuit.view(self._clock.monotonic()))

    def _report(self, rules: Rules, admission: Admission, verdict: Verdict) -> None:
        circuit = self.circuit
        if (
            verdict is SUCCESS
            and circuit.state is CLOSED
            and not (circuit.failures or admission.probe)
            and rules.failure_rate is None
        ):
            return  # nothing to forget: nearly every attempt
        before, now = circuit.state, self._clock.monotonic()
        circuit.report(rules, admission, verdict, now, self._rand())
        self._look(before, now)

    def _look(self, before: State, now: float) -> None:
        if self.circuit.state is not before:
            self._sightings.changed(self.upstream, self.model, self.circuit.view(now))

    def __repr__(self) -> str:
        return repr(self.circuit)


class MemoryCircuits:
    """All circuits of this process, by upstream and model."""

    def __init__(
        self, clock: Clock, sightings: Sightings, rand: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._sightings = sightings
        self._rand = rand
        self._circuits: dict[tuple[str, str], MemoryCircuit] = {}
        self._forced: dict[str, State] = {}  # upstreams of which all models are

    def circuit(self, upstream: str, model: str) -> MemoryCircuit:
        """The circuit of this upstream and model, made when it is asked for first."""
        circuit = self._circuits.get((upstream, model))
        if circuit is None:
            circuit = MemoryCircuit(upstream, model, self._clock, self._sightings, self._rand)
            self._circuits[upstream, model] = circuit
            self._sightings.saw(upstream, model, State.CLOSED)
            if upstream in self._forced:
                circuit.force(self._forced[upstream])
        return circuit

    async def show(self) -> list[Shown]:
        """Every circuit, in no order."""
        return [circuit.shown() for circuit in self._circuits.values()]

    async def force(self, upstream: str, model: str, state: State | None) -> None:
        """Hold circuits in a state; `*` for all models of the upstream, also those to come."""
        if model != ALL_MODELS:
            self.circuit(upstream, model).force(state)
            return
        if state is None:
            self._forced.pop(upstream, None)
        else:
            self._forced[upstream] = state
        for circuit in self._circuits.values():
            if circuit.upstream == upstream:
                circuit.force(state)

    def __repr__(self) -> str:
        return f"<MemoryCircuits {list(self._circuits.values())}>"
