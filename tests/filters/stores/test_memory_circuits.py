"""Circuits of one process: one for each place, forced together, counted once for each change."""

from __future__ import annotations

from typing import Any

import pytest

from filters.algo.circuit import Refusal, Rules, State, Verdict
from filters.circuit_breaker import CircuitBreaker
from filters.stores.memory_circuits import MemoryCircuit, MemoryCircuits, Report, Sightings
from tests.support.harness import Harness

GOOD, BAD = Verdict.SUCCESS, Verdict.FAILURE
RULES = Rules(failure_threshold=1, recovery_timeout_s=10.0, recovery_jitter=0.5)


class Ground:
    def __init__(self) -> None:
        self.harness = Harness(CircuitBreaker)
        self.clock = self.harness.clock
        self.chance = 0.0
        kit = self.harness.filters[0].kit
        self.circuits = MemoryCircuits(self.clock, Sightings(kit), lambda: self.chance)

    def changes(self, to: str) -> Any:
        return self.harness.value("llm_sidecar_circuit_transitions", upstream="u", model="m", to=to)


@pytest.fixture
def ground() -> Ground:
    return Ground()


def admitted(circuit: MemoryCircuit, rules: Rules = RULES) -> Report:
    report = circuit.admit(rules)
    assert not isinstance(report, Refusal)
    return report


def test_one_circuit_for_each_upstream_and_model(ground: Ground) -> None:
    get = ground.circuits.circuit
    assert get("u", "m") is get("u", "m")
    admitted(get("u", "m"))(BAD)
    assert isinstance(get("u", "m").admit(RULES), Refusal)
    admitted(get("u", "n"))
    admitted(get("v", "m"))
    assert repr(get("u", "")) == "<Circuit u CLOSED failures=0>"


@pytest.mark.parametrize(("chance", "wait_s"), [(0.0, 10.0), (0.5, 7.5)])
def test_chance_cuts_the_recovery(ground: Ground, chance: float, wait_s: float) -> None:
    ground.chance = chance
    circuit = ground.circuits.circuit("u", "m")
    admitted(circuit)(BAD)
    assert circuit.admit(RULES) == Refusal(wait_s)


def test_those_who_share_a_circuit_each_bring_their_rules(ground: Ground) -> None:
    circuit = ground.circuits.circuit("u", "m")
    patient, strict = Rules(failure_threshold=10), Rules(failure_threshold=3)
    for _ in range(5):
        admitted(circuit, patient)(BAD)
    assert circuit.circuit.state is State.CLOSED
    admitted(circuit, strict)(BAD)
    assert circuit.circuit.state is State.OPEN


def test_probe_of_this_process_keeps_its_place_however_long_it_takes(ground: Ground) -> None:
    circuit = ground.circuits.circuit("u", "m")
    rules = Rules(failure_threshold=1, half_open_max=1, probe_lease_s=1.0)
    admitted(circuit, rules)(BAD)
    ground.clock.turn(60.0)
    probe = admitted(circuit, rules)
    ground.clock.turn(100_000.0)
    assert isinstance(circuit.admit(rules), Refusal)
    probe(Verdict.NONE)
    admitted(circuit, rules)


def test_each_change_is_counted_once(ground: Ground) -> None:
    circuit = ground.circuits.circuit("u", "m")
    late = [admitted(circuit) for _ in range(5)]
    for report in late:
        report(BAD)
    ground.clock.turn(10.0)
    for _ in range(3):
        admitted(circuit)(GOOD)
    assert [ground.changes(each) for each in ("open", "half_open", "closed")] == [1, 1, 1]


async def test_forcing_what_is_so_already_is_no_change(ground: Ground) -> None:
    await ground.circuits.force("u", "m", State.CLOSED)
    await ground.circuits.force("u", "m", None)
    assert ground.changes("closed") == 0
    await ground.circuits.force("u", "m", State.OPEN)
    await ground.circuits.force("u", "*", State.OPEN)
    assert ground.changes("open") == 1
