"""A circuit opens on failures, probes carefully, and is not fooled by what comes late."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.circuit import (
    MAX_WINDOW_S,
    PLACE_WAIT_S,
    Admission,
    Circuit,
    Refusal,
    Rules,
    State,
    Verdict,
    recovery_s,
)

GOOD, BAD, NONE = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NONE
RULES = Rules(recovery_jitter=0.0, probe_lease_s=inf)


class Bench:
    """A circuit on a clock turned by hand, without chance."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.rules = rules
        self.circuit = Circuit("openai")
        self.now = 1000.0

    def admit(self) -> Admission:
        admission = self.circuit.admit(self.rules, self.now)
        assert isinstance(admission, Admission), admission
        return admission

    def refused(self) -> float | None:
        refusal = self.circuit.admit(self.rules, self.now)
        assert isinstance(refusal, Refusal), refusal
        return refusal.wait_s

    def report(self, admission: Admission, verdict: Verdict) -> None:
        self.circuit.report(self.rules, admission, verdict, self.now, 0.5)

    def one(self, *verdicts: Verdict) -> None:
        for verdict in verdicts:
            self.report(self.admit(), verdict)

    def opened(self) -> Bench:
        self.one(*[BAD] * self.rules.failure_threshold)
        assert self.state is State.OPEN
        return self

    def half_open(self) -> Bench:
        """Open, and its time is over."""
        self.opened()
        self.now += self.rules.recovery_timeout_s
        return self

    @property
    def state(self) -> State:
        return self.circuit.state


# Opening


def test_it_opens_at_the_threshold_and_not_before() -> None:
    bench = Bench()
    bench.one(*[BAD] * 4)
    assert bench.state is State.CLOSED
    bench.one(BAD)
    assert bench.state is State.OPEN
    assert bench.refused() == 60.0


def test_failures_must_follow_each_other() -> None:
    bench = Bench()
    bench.one(BAD, BAD, BAD, BAD, GOOD, BAD, BAD, BAD, BAD)
    assert bench.state is State.CLOSED


def test_attempts_without_a_verdict_neither_count_nor_break_a_row_of_failures() -> None:
    bench = Bench()
    bench.one(BAD, NONE, BAD, NONE, BAD, NONE, BAD, *[NONE] * 10)
    assert bench.state is State.CLOSED
    bench.one(BAD)
    assert bench.state is State.OPEN


def test_late_failures_do_not_lengthen_an_open_circuit() -> None:
    bench = Bench()
    under_way = [bench.admit() for _ in range(20)]
    for admission in under_way[:5]:
        bench.report(admission, BAD)
    bench.now += 50.0
    for admission in under_way[5:]:
        bench.report(admission, BAD)
    assert bench.refused() == 10.0
    assert bench.circuit.failures == 5


# A rate over a window

RATE = replace(RULES, failure_rate=0.5, window_s=10, min_calls=10, failure_threshold=1)


def test_rate_opens_it_from_the_least_number_of_calls_on() -> None:
    bench = Bench(RATE)
    bench.one(*[BAD] * 9)
    assert bench.state is State.CLOSED
    bench.one(BAD)
    assert bench.state is State.OPEN


def test_rate_counts_successes_as_well() -> None:
    bench = Bench(RATE)
    bench.one(*[GOOD] * 11, *[BAD] * 10)
    assert bench.state is State.CLOSED
    bench.one(BAD)
    assert bench.state is State.OPEN


def test_row_of_failures_does_not_open_it_when_a_rate_is_set() -> None:
    bench = Bench(replace(RATE, min_calls=100))
    bench.one(*[BAD] * 50)
    assert bench.state is State.CLOSED


def test_rate_forgets_what_is_older_than_the_window() -> None:
    bench = Bench(RATE)
    bench.one(*[BAD] * 9)
    bench.now += 10.0
    bench.one(BAD)
    assert bench.state is State.CLOSED
    bench.one(*[GOOD] * 3)
    bench.now += 5.0
    bench.one(*[BAD] * 5)
    assert bench.state is State.CLOSED
    bench.one(BAD)
    assert bench.state is State.OPEN


def test_rate_begins_anew_when_it_was_open() -> None:
    bench = Bench(replace(RATE, success_threshold=1, recovery_timeout_s=1.0))
    bench.one(*[BAD] * 10)
    bench.now += 1.0
    bench.one(GOOD)
    assert bench.state is State.CLOSED
    bench.one(*[BAD] * 9)
    assert bench.state is State.CLOSED


def test_seconds_that_are_kept_are_bounded() -> None:
    bench = Bench(RATE)
    for _ in range(2 * MAX_WINDOW_S):
        bench.one(GOOD)
        bench.now += 1.0
    assert len(bench.circuit._cells) == MAX_WINDOW_S


# Half open


def test_half_open_lets_no_more_than_its_probes_out() -> None:
    bench = Bench().half_open()
    probes = [bench.admit() for _ in range(3)]
    assert len({each.probe for each in probes} - {0}) == 3
    assert bench.state is State.HALF_OPEN
    assert bench.refused() == PLACE_WAIT_S
    bench.report(probes[0], GOOD)
    bench.admit()
    assert bench.refused() == PLACE_WAIT_S


def test_wait_for_a_place_is_shorter_than_a_quick_recovery() -> None:
    bench = Bench(replace(RULES, recovery_timeout_s=0.5)).half_open()
    for _ in range(3):
        bench.admit()
    assert bench.refused() == 0.25


def test_probes_that_succeed_close_it() -> None:
    bench = Bench().half_open()
    bench.one(GOOD, GOOD)
    assert bench.state is State.HALF_OPEN
    bench.one(GOOD)
    assert bench.state is State.CLOSED
    assert bench.admit().probe == 0


def test_threshold_may_be_higher_than_the_number_of_probes_at_a_time() -> None:
    bench = Bench(replace(RULES, half_open_max=1, success_threshold=4)).half_open()
    for _ in range(4):
        assert bench.state is not State.CLOSED
        probe = bench.admit()
        bench.refused()
        bench.report(probe, GOOD)
    assert bench.state is State.CLOSED


def test_one_failed_probe_opens_it_again_for_twice_as_long() -> None:
    bench = Bench().half_open()
    bench.one(GOOD, GOOD, BAD)
    assert bench.state is State.OPEN
    assert bench.refused() == 120.0


def test_successes_of_an_earlier_half_open_time_do_not_count() -> None:
    bench = Bench().half_open()
    bench.one(GOOD, GOOD, BAD)
    bench.now += 120.0
    bench.one(GOOD)
    assert bench.state is State.HALF_OPEN
    bench.one(GOOD, GOOD)
    assert bench.state is State.CLOSED


def test_recovery_grows_up_to_the_longest_and_is_short_again_after_it_closed() -> None:
    bench = Bench().half_open()
    waits = []
    for _ in range(6):
        bench.one(BAD)
        waits.append(bench.refused())
        bench.now += waits[-1] or 0.0
    assert waits == [120.0, 240.0, 480.0, 600.0, 600.0, 600.0]
    bench.one(GOOD, GOOD, GOOD)
    bench.opened()
    assert bench.refused() == 60.0


def test_probe_without_a_verdict_gives_its_place_back_and_decides_nothing() -> None:
    bench = Bench(replace(RULES, half_open_max=1)).half_open()
    bench.one(GOOD, GOOD, NONE, NONE, NONE)
    assert bench.state is State.HALF_OPEN
    bench.one(GOOD)
    assert bench.state is State.CLOSED


# What comes late


@pytest.mark.parametrize("verdict", [GOOD, BAD])
def test_attempt_from_before_it_opened_changes_nothing_when_it_is_half_open(
    verdict: Verdict,
) -> None:
    bench = Bench()
    late = [bench.admit() for _ in range(10)]
    bench.half_open()
    probes = [bench.admit() for _ in range(3)]
    for admission in late:
        bench.report(admission, verdict)
    assert bench.state is State.HALF_OPEN
    assert bench.refused() is not None  # no place came free
    for probe in probes:
        bench.report(probe, GOOD)
    assert bench.state is State.CLOSED


def test_attempt_from_before_it_opened_does_not_count_after_it_closed() -> None:
    bench = Bench()
    late = [bench.admit() for _ in range(10)]
    bench.half_open().one(GOOD, GOOD, GOOD)
    for admission in late:
        bench.report(admission, BAD)
    assert bench.state is State.CLOSED
    assert bench.circuit.failures == 0


def test_late_success_does_not_break_a_row_of_failures_of_a_later_time() -> None:
    bench = Bench()
    late = bench.admit()
    bench.half_open().one(GOOD, GOOD, GOOD, BAD, BAD, BAD, BAD)
    bench.report(late, GOOD)
    bench.one(BAD)
    assert bench.state is State.OPEN


def test_probe_still_out_keeps_its_place_when_it_is_half_open_again() -> None:
    bench = Bench().half_open()
    slow, other, failing = (bench.admit() for _ in range(3))
    bench.report(failing, BAD)
    bench.now += 120.0
    bench.admit()
    assert bench.refused() == PLACE_WAIT_S  # two of the earlier ones are still out
    bench.report(slow, GOOD)
    bench.report(other, BAD)  # an earlier time's: it opens nothing
    assert bench.state is State.HALF_OPEN
    bench.admit()
    bench.admit()
    assert bench.refused() == PLACE_WAIT_S


def test_probe_still_out_when_it_closed_keeps_its_place_until_it_is_over() -> None:
    bench = Bench(replace(RULES, half_open_max=2)).half_open()
    slow = bench.admit()
    bench.one(GOOD, GOOD, GOOD)
    bench.half_open()
    bench.admit()
    assert bench.refused() == PLACE_WAIT_S
    bench.report(slow, GOOD)
    bench.admit()


def test_probe_still_out_when_it_closed_has_no_say_any_more() -> None:
    bench = Bench().half_open()
    slow = bench.admit()
    bench.one(GOOD, GOOD, GOOD)
    bench.report(slow, BAD)
    assert bench.state is State.CLOSED
    assert bench.circuit.failures == 0


def test_place_of_a_probe_that_nobody_reports_comes_free_with_its_lease() -> None:
    bench = Bench(replace(RULES, probe_lease_s=30.0)).half_open()
    lost = [bench.admit() for _ in range(3)]
    bench.now += 29.0
    bench.refused()
    bench.now += 1.0
    probes = [bench.admit() for _ in range(3)]
    bench.refused()
    bench.report(lost[0], NONE)
    bench.refused()  # its place is another's already
    bench.report(probes[0], NONE)
    bench.admit()


# By hand


def test_forced_open_lets_nothing_through_however_long() -> None:
    bench = Bench()
    bench.circuit.force(State.OPEN)
    bench.now += 1e6
    assert bench.refused() is None
    assert bench.circuit.view(bench.now).retry_in_s is None


def test_forced_closed_lets_everything_through_whatever_happens() -> None:
    bench = Bench().opened()
    bench.circuit.force(State.CLOSED)
    bench.one(*[BAD] * 100)
    assert bench.state is State.CLOSED


def test_let_go_it_is_as_new() -> None:
    bench = Bench().half_open()
    bench.one(BAD)
    bench.circuit.force(State.OPEN)
    bench.circuit.force(None)
    bench.one(*[BAD] * 4)
    assert bench.state is State.CLOSED
    bench.one(BAD)
    assert bench.refused() == 60.0


def test_attempts_from_a_forced_time_do_not_count_afterwards() -> None:
    bench = Bench()
    bench.circuit.force(State.CLOSED)
    late = [bench.admit() for _ in range(10)]
    bench.circuit.force(None)
    for admission in late:
        bench.report(admission, BAD)
    assert bench.state is State.CLOSED


def test_repr_says_how_it_stands() -> None:
    bench = Bench()
    assert repr(bench.circuit) == "<Circuit openai CLOSED failures=0>"
    bench.opened()
    bench.now += 48.0
    bench.refused()
    assert repr(bench.circuit) == "<Circuit openai OPEN failures=5 retry_in=12.0s>"
    bench.now += 12.0
    bench.admit()
    assert repr(bench.circuit) == "<Circuit openai HALF_OPEN failures=5 probes=1>"
    bench.circuit.force(State.OPEN)
    assert repr(bench.circuit) == "<Circuit openai OPEN failures=0 forced>"


# For all orders of events

rules = st.builds(
    Rules,
    failure_threshold=st.integers(1, 4),
    failure_rate=st.none() | st.sampled_from([0.25, 0.5, 1.0]),
    window_s=st.integers(1, 20),
    min_calls=st.integers(1, 5),
    recovery_timeout_s=st.floats(0.5, 10.0),
    max_recovery_timeout_s=st.floats(0.5, 40.0),
    recovery_jitter=st.floats(0.0, 0.5),
    success_threshold=st.integers(1, 4),
    half_open_max=st.integers(1, 4),
    probe_lease_s=st.just(inf),
)
events = st.lists(
    st.one_of(
        st.just("admit"),
        st.just("admit"),
        st.tuples(st.integers(0, 30), st.sampled_from(Verdict)),  # an attempt ends
        st.floats(0.0, 15.0),  # time passes
        st.sampled_from([State.OPEN, State.CLOSED, None]),  # an operator
    ),
    min_size=20,
    max_size=80,
)


@given(rules, events, st.floats(0.0, 1.0, exclude_max=True))
def test_never_more_probes_out_than_allowed_and_nothing_late_has_a_say(
    rules: Rules, events: list[object], rand: float
) -> None:
    circuit, now = Circuit("any"), 0.0
    out: list[Admission] = []
    for event in events:
        if event == "admit":
            before = circuit.view(now)
            admission = circuit.admit(rules, now)
            if isinstance(admission, Admission):
                out.append(admission)
                assert (admission.probe == 0) == (circuit.state is State.CLOSED)
            else:
                assert circuit.state is not State.CLOSED
                if before.retry_in_s:
                    assert admission.wait_s == before.retry_in_s
        elif isinstance(event, tuple):
            if out:
                index, verdict = event
                admission = out.pop(index % len(out))
                before, epoch = circuit.view(now), circuit.epoch
                circuit.report(rules, admission, verdict, now, rand)
                if admission.epoch != epoch or verdict is NONE or before.forced:
                    assert circuit.view(now) == before
                elif verdict is BAD and before.state is State.HALF_OPEN:
                    assert circuit.state is State.OPEN
        elif isinstance(event, float):
            now += event
        else:
            assert event is None or isinstance(event, State)
            circuit.force(event)
        probes = [each for each in out if each.probe]
        assert len(probes) <= rules.half_open_max
        assert circuit.probes == len(probes)


@given(rules, st.integers(0, 5000), st.floats(0.0, 1.0, exclude_max=True))
def test_recovery_time_stays_within_its_bounds(rules: Rules, reopened: int, rand: float) -> None:
    longest = max(rules.recovery_timeout_s, rules.max_recovery_timeout_s)
    found = recovery_s(rules, reopened, rand)
    plain = min(rules.recovery_timeout_s * 2.0 ** min(reopened, 100), longest)
    assert plain * (1 - rules.recovery_jitter) <= found <= plain
    assert recovery_s(rules, reopened + 1, rand) >= found


@given(rules, st.integers(0, 20), st.floats(0.0, 0.999), st.floats(0.0, 0.999))
def test_next_recovery_is_never_shorter_whatever_chance_says(
    rules: Rules, reopened: int, rand: float, other: float
) -> None:
    longest = max(rules.recovery_timeout_s, rules.max_recovery_timeout_s)
    if rules.recovery_timeout_s * 2.0 ** (reopened + 1) <= longest:
        assert recovery_s(rules, reopened + 1, other) >= recovery_s(rules, reopened, rand)


@given(rules, st.integers(0, 4))
def test_upstream_that_is_well_again_always_gets_its_circuit_closed(
    rules: Rules, reopened: int
) -> None:
    bench = Bench(replace(rules, failure_rate=None)).opened()
    for _ in range(reopened):
        bench.now += 60.0
        bench.one(BAD)
    bench.now += 60.0
    bench.one(*[GOOD] * rules.success_threshold)
    assert bench.state is State.CLOSED
