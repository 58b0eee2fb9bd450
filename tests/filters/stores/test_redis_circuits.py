"""Circuits on a real server: the same as in memory, shared, and replaced while it is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from filters.algo.circuit import Admission, Circuit, Refusal, Rules, State, Verdict
from filters.circuit_breaker import CircuitBreaker
from filters.stores import redis as redis_module
from filters.stores.memory_circuits import MemoryCircuits, Report, Sightings
from filters.stores.redis import Redis
from filters.stores.redis_circuits import RedisCircuits
from sidecar.api import Metrics, Rejected, Secret
from sidecar.filter import Kit, StoreAddress
from tests.support.harness import MODEL, FakeClock, Harness, Use
from tests.support.valkey import Valkey

GOOD, BAD, NONE = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NONE
RULES = Rules(recovery_jitter=0.0)
WhenDown = Literal["open", "closed", "local_share"]
patiently = pytest.mark.usefixtures("patient")


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with Valkey() as valkey:
        yield valkey


@pytest.fixture
def valkey(server: Valkey) -> Valkey:
    server.command("FLUSHALL")
    return server


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine does not make the server one that is away."""
    monkeypatch.setattr(redis_module, "ANSWER_S", 20.0)


class Replica:
    """The circuits of one process, on a clock turned by hand."""

    def __init__(self, valkey: Valkey, clock: FakeClock) -> None:
        self.harness = Harness(CircuitBreaker)
        self.kit: Kit = self.harness.filters[0].kit
        self.redis = Redis(Secret(valkey.url), "test", self.harness.metrics)
        self.circuits = RedisCircuits(self.redis, self.kit, now=clock.monotonic, rand=lambda: 0.5)

    async def ask(
        self, rules: Rules = RULES, when_down: WhenDown = "local_share", model: str = "m"
    ) -> Report | Refusal:
        return await self.circuits.circuit("u", model).admit(rules, when_down)

    async def admit(self, rules: Rules = RULES, when_down: WhenDown = "local_share") -> Report:
        found = await self.ask(rules, when_down)
        assert not isinstance(found, Refusal)
        return found

    async def from_the_server(self) -> Report:
        """As `admit`, though a busy machine may have made the server one that is away."""
        async with asyncio.timeout(10.0):
            while True:
                before = self.fallbacks("local_share")
                report = await self.admit()
                if self.fallbacks("local_share") == before:
                    return report
                await asyncio.sleep(0.01)

    async def refused(self, rules: Rules = RULES) -> float | None:
        found = await self.ask(rules)
        assert isinstance(found, Refusal)
        return found.wait_s

    async def one(self, *verdicts: Verdict) -> None:
        for verdict in verdicts:
            (await self.admit())(verdict)

    async def state(self) -> State:
        (shown,) = await self.circuits.show()
        return shown.view.state

    def changes(self, to: str) -> Any:
        return self.harness.value("llm_sidecar_circuit_transitions", upstream="u", model="m", to=to)

    def seen(self, state: str) -> Any:
        return self.harness.value("llm_sidecar_circuits", upstream="u", model="m", state=state)

    def fallbacks(self, answer: str) -> Any:
        return self.harness.value("llm_sidecar_store_fallbacks", use="circuits", answer=answer)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@asynccontextmanager
async def replica(valkey: Valkey, clock: FakeClock) -> AsyncIterator[Replica]:
    made = Replica(valkey, clock)
    try:
        yield made
    finally:
        await made.redis.close()


@asynccontextmanager
async def two_replicas(valkey: Valkey, clock: FakeClock) -> AsyncIterator[tuple[Replica, Replica]]:
    async with replica(valkey, clock) as one, replica(valkey, clock) as other:
        yield one, other


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not is_true():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


# The same as in memory

rules_of_tests = st.builds(
    Rules,
    failure_threshold=st.integers(1, 2),
    failure_rate=st.none() | st.none() | st.sampled_from([0.3, 0.5, 1.0]),
    window_s=st.integers(1, 20),
    min_calls=st.integers(1, 4),
    recovery_timeout_s=st.floats(0.5, 10.0),
    max_recovery_timeout_s=st.floats(0.5, 40.0),
    recovery_jitter=st.floats(0.0, 0.5),
    success_threshold=st.integers(1, 3),
    half_open_max=st.integers(1, 3),
    probe_lease_s=st.just(1e9),
)
models = st.sampled_from("aaaab")
admits = st.tuples(st.just("admit"), models)
ends = st.tuples(st.just("end"), st.integers(0, 20), st.sampled_from([GOOD, BAD, NONE]))
at_once = st.tuples(st.just("at once"), models, st.sampled_from([GOOD, BAD, BAD]))
waits = st.tuples(st.just("wait"), st.floats(0.0, 5.0) | st.just(40.0))
forces = st.tuples(
    st.just("force"), st.sampled_from("ab*"), st.sampled_from([State.OPEN, State.CLOSED, None])
)
shows = st.tuples(st.just("show"))
common = st.one_of(admits, admits, ends, ends, at_once, at_once, waits)


class Loop:
    """A loop with a connection, for many examples."""

    def __init__(self, runner: asyncio.Runner, redis: Redis) -> None:
        self.redis = redis
        self._runner = runner

    def run(self, play: Coroutine[Any, Any, None]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(redis_module, "ANSWER_S", 20.0)
            self._runner.run(play)


@pytest.fixture(scope="module")
def loop(server: Valkey) -> Iterator[Loop]:
    async def opened() -> Redis:
        return Redis(Secret(server.url), "test", Metrics())

    with asyncio.Runner() as runner:
        redis = runner.run(opened())
        yield Loop(runner, redis)
        runner.run(redis.close())


examples = settings(
    deadline=None,
    max_examples=60,
    # To shrink a failure against a server takes minutes.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)


class Both:
    """The same attempts here and there; what is decided must be the same."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.out: list[tuple[Callable[[Verdict], None], Report]] = []

    def admitted(self, here: Callable[[Verdict], None] | Refusal, there: Report | Refusal) -> bool:
        """Whether both let it go; it is out then."""
        if isinstance(here, Refusal) or isinstance(there, Refusal):
            assert here == there
            return False
        self.out.append((here, there))
        return True

    def end(self, index: int, verdict: Verdict) -> None:
        if self.out:
            for report in self.out.pop(index % len(self.out)):
                report(verdict)


@examples
@given(
    rules_of_tests,
    st.lists(common | common | common | common | forces | shows, min_size=40, max_size=100),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_server_and_memory_decide_the_same_whatever_happens(
    server: Valkey, loop: Loop, rules: Rules, events: list[tuple[Any, ...]], rand: float
) -> None:
    server.command("FLUSHALL")
    kit = Harness(CircuitBreaker).filters[0].kit

    async def play() -> None:
        both = Both(FakeClock())
        memory = MemoryCircuits(both.clock, Sightings(kit), lambda: rand)
        shared = RedisCircuits(loop.redis, kit, now=both.clock.monotonic, rand=lambda: rand)
        for what, *args in [*events, ("show",)]:
            if what in ("admit", "at once"):
                here = memory.circuit("u", args[0]).admit(rules)
                there = await shared.circuit("u", args[0]).admit(rules, "closed")
                if both.admitted(here, there) and what == "at once":
                    both.end(-1, args[1])
            elif what == "end":
                both.end(*args)
            elif what == "wait":
                both.clock.turn(args[0])
            elif what == "force":
                await memory.force("u", *args)
                await shared.force("u", *args)
            elif what == "show":
                assert sorted(await shared.show()) == sorted(await memory.show())

    loop.run(play())


@examples
@given(rules_of_tests, st.floats(0.5, 20.0), st.lists(common, min_size=40, max_size=100))
def test_leases_end_on_the_server_as_they_do_in_the_algorithm(
    server: Valkey, loop: Loop, rules: Rules, lease_s: float, events: list[tuple[Any, ...]]
) -> None:
    server.command("FLUSHALL")
    kit = Harness(CircuitBreaker).filters[0].kit
    rules = replace(rules, probe_lease_s=lease_s)

    async def play() -> None:
        both = Both(FakeClock())
        now = both.clock.monotonic
        circuit = Circuit("u")
        shared = RedisCircuits(loop.redis, kit, now=now, rand=lambda: 0.25)

        def report(admission: Admission, verdict: Verdict) -> None:
            circuit.report(rules, admission, verdict, now(), 0.25)

        for what, *args in events:
            if what in ("admit", "at once"):
                found = circuit.admit(rules, now())
                here = found if isinstance(found, Refusal) else partial(report, found)
                there = await shared.circuit("u", "m").admit(rules, "closed")
                if both.admitted(here, there) and what == "at once":
                    both.end(-1, args[1])
            elif what == "end":
                both.end(*args)
            elif what == "wait":
                both.clock.turn(args[0])
        for shown in await shared.show():
            assert shown.view == circuit.view(now())

    loop.run(play())


@patiently
async def test_server_s_own_clock_ends_a_recovery(valkey: Valkey, clock: FakeClock) -> None:
    async with replica(valkey, clock) as one:
        one.circuits._now = None
        rules = Rules(failure_threshold=1, recovery_timeout_s=0.05)
        (await one.admit(rules))(BAD)
        wait_s = await one.refused(rules)
        assert wait_s is not None
        assert 0 < wait_s <= 0.05
        async with asyncio.timeout(10.0):
            while isinstance(await one.ask(rules), Refusal):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert await one.state() is State.HALF_OPEN


# Shared


@patiently
async def test_failures_of_all_replicas_open_one_circuit(valkey: Valkey, clock: FakeClock) -> None:
    async with two_replicas(valkey, clock) as (one, other):
        await one.one(BAD, BAD, BAD)
        await one.state()
        await other.one(BAD, BAD)
        assert await other.refused() == 60.0
        assert await one.refused() == 60.0


@patiently
async def test_all_replicas_together_let_no_more_probes_out(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with two_replicas(valkey, clock) as (one, other):
        await one.one(*[BAD] * 5)
        clock.turn(60.0)
        asked = await asyncio.gather(*(each.ask() for each in (one, other) * 10))
        assert sum(not isinstance(each, Refusal) for each in asked) == 3


@patiently
async def test_places_of_a_replica_that_died_come_free_with_their_leases(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as other:
        async with replica(valkey, clock) as one:
            await one.one(*[BAD] * 5)
            clock.turn(60.0)
            for _ in range(3):
                await one.admit()
        clock.turn(119.0)
        assert await other.refused() == 1.0
        clock.turn(1.0)
        await other.one(GOOD, GOOD, GOOD)
        assert await other.state() is State.CLOSED


@patiently
async def test_change_is_counted_and_logged_by_one_replica_and_seen_by_all(
    valkey: Valkey, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with two_replicas(valkey, clock) as (one, other):
        await one.one(*[BAD] * 5)
        assert await one.state() is State.OPEN
        await other.refused()
        assert (one.changes("open"), other.changes("open")) == (1, 0)
        assert (one.seen("open"), other.seen("open")) == (1, 1)
        clock.turn(60.0)
        await other.one(GOOD, GOOD, GOOD)
        assert await other.state() is State.CLOSED
        assert (one.changes("closed"), other.changes("closed")) == (0, 1)
    names = [each.getMessage() for each in caplog.records if "circuit" in each.getMessage()]
    assert names == ["circuit_opened", "circuit_half_open", "circuit_closed"]


@patiently
async def test_question_is_one_round_trip_and_a_report_waits_for_nothing(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        await one.one(GOOD)
        await one.state()
        valkey.command("CONFIG", "RESETSTAT")
        for _ in range(10):
            await one.admit()
        stats = valkey.command("INFO", "commandstats").decode()
        assert "cmdstat_evalsha:calls=10," in stats


@patiently
async def test_caller_that_leaves_while_it_asks_gives_its_place_back(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        await one.one(*[BAD] * 5)
        clock.turn(60.0)
        asking = [asyncio.ensure_future(one.ask()) for _ in range(3)]
        await asyncio.sleep(0)
        for each in asking:
            each.cancel()
        await asyncio.wait(asking)
        assert (
            await one.state() is State.HALF_OPEN
        )  # their answers are here, and their reports sent
        await one.one(GOOD, GOOD, GOOD)
        assert await one.state() is State.CLOSED


@patiently
async def test_caller_that_leaves_in_the_turn_of_its_answer_gives_its_place_back(
    valkey: Valkey, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replica(valkey, clock) as one:
        await one.one(*[BAD] * 5)
        clock.turn(60.0)
        call = one.redis.call
        asking: list[asyncio.Future[Report | Refusal]] = []

        def leave_then(script: Any, keys: Any, args: Any, done: Callable[[Any], None]) -> None:
            def answered(answer: Any) -> None:
                done(answer)
                asking[-1].cancel()

            call(script, keys, args, answered)

        with monkeypatch.context() as patch:
            patch.setattr(one.redis, "call", leave_then)
            for _ in range(RULES.half_open_max):
                asking.append(asyncio.ensure_future(one.ask()))
                await asyncio.wait(asking)
                assert asking[-1].cancelled()
        await one.one(GOOD, GOOD, GOOD)
        assert await one.state() is State.CLOSED


@patiently
async def test_server_that_lost_everything_takes_late_reports_for_nothing(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        late = [await one.admit() for _ in range(10)]
        await one.one(*[BAD] * 5)
        clock.turn(60.0)
        probes = [await one.admit() for _ in range(3)]
        valkey.command("FLUSHALL")
        clock.turn(1.0)
        await one.admit()
        for report in (*late, *probes):
            report(BAD)
        assert await one.state() is State.CLOSED
        await one.one(*[BAD] * 4)
        assert await one.state() is State.CLOSED


@patiently
async def test_circuits_that_nobody_asks_for_are_forgotten(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        await one.one(BAD)
        await one.state()
        left = valkey.command("PTTL", "test:circuit:u|m")
        assert 86_000_000 < int(left[1:]) <= 86_400_000
        valkey.command("DEL", "test:circuit:u|m")
        assert await one.circuits.show() == []
        assert valkey.command("SCARD", "test:circuits") == b":0\r\n"


# By hand


@patiently
async def test_forced_on_one_replica_holds_on_all(valkey: Valkey, clock: FakeClock) -> None:
    async with two_replicas(valkey, clock) as (one, other):
        await one.circuits.force("u", "*", State.OPEN)
        assert await other.refused() is None
        assert isinstance(await other.ask(model="never called"), Refusal)
        await other.circuits.force("u", "m", None)
        await one.one(GOOD)
        assert isinstance(await one.ask(model="never called"), Refusal)


@patiently
async def test_forced_circuit_that_was_forgotten_is_still_forced(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        await one.circuits.force("u", "m", State.OPEN)
        valkey.command("DEL", "test:circuit:u|m")
        (shown,) = await one.circuits.show()
        assert shown.view.forced is State.OPEN
        assert await one.refused() is None


# While the store is away


async def test_without_the_store_each_process_has_a_circuit_of_its_own(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        (await one.from_the_server())(GOOD)
        valkey.pause()
        try:
            before = one.fallbacks("local_share")
            await one.one(*[BAD] * 5)
            assert await one.refused() == 60.0
            assert one.fallbacks("local_share") == before + 6
            assert one.seen("open") == 1
            (shown,) = await one.circuits.show()
            assert shown.view.state is State.OPEN
        finally:
            valkey.resume()
        await until(lambda: one.redis.is_up)
        await one.from_the_server()
        assert await one.state() is State.CLOSED


async def test_attempt_let_through_without_the_store_is_reported_where_it_was(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        (await one.from_the_server())(GOOD)
        valkey.pause()
        try:
            reports = [await one.admit() for _ in range(5)]
        finally:
            valkey.resume()
        await until(lambda: one.redis.is_up)
        for report in reports:
            report(BAD)
        await one.from_the_server()
        assert await one.state() is State.CLOSED
        assert repr(one.circuits.local.circuit("u", "m")).startswith("<Circuit u m OPEN failures=5")


async def test_report_while_the_store_is_away_is_dropped_and_counted(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        reports = [await one.from_the_server() for _ in range(2)]
        valkey.pause()
        try:
            await one.admit()  # finds out that it is away
            before = one.harness.value("llm_sidecar_store_dropped")
            reports[0](BAD)
            reports[1](GOOD)
            assert one.harness.value("llm_sidecar_store_dropped") == before + 2
        finally:
            valkey.resume()


async def test_open_lets_every_attempt_through_without_the_store(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        (await one.from_the_server())(GOOD)
        valkey.pause()
        try:
            for _ in range(20):
                (await one.admit(when_down="open"))(BAD)
            assert one.fallbacks("open") == 20
        finally:
            valkey.resume()


async def test_closed_refuses_every_attempt_without_the_store(
    valkey: Valkey, clock: FakeClock
) -> None:
    async with replica(valkey, clock) as one:
        (await one.from_the_server())(GOOD)
        valkey.pause()
        try:
            for _ in range(5):
                with pytest.raises(Rejected) as raised:
                    await one.admit(when_down="closed")
                assert (raised.value.status, raised.value.code) == (503, "store_unavailable")
                assert raised.value.retry_after_s == 1.0
            assert one.fallbacks("closed") == 5
        finally:
            valkey.resume()


@pytest.mark.parametrize("when_down", ["open", "closed", "local_share"])
async def test_what_an_operator_forced_holds_without_the_store(
    valkey: Valkey, clock: FakeClock, when_down: WhenDown
) -> None:
    async with replica(valkey, clock) as one:
        await one.circuits.force("u", "m", State.OPEN)
        await one.circuits.force("u", "other", State.CLOSED)
        valkey.pause()
        try:
            assert await one.ask(when_down=when_down) == Refusal(None)
            for _ in range(10):
                report = await one.ask(when_down=when_down, model="other")
                assert not isinstance(report, Refusal)
                report(BAD)
            with pytest.raises(ValueError, match="does not answer"):
                await one.circuits.force("u", "m", None)
        finally:
            valkey.resume()


# In the filter


@patiently
async def test_two_sidecars_share_a_circuit_and_its_probes(valkey: Valkey) -> None:
    def sidecar() -> Harness:
        section = CircuitBreaker.UpstreamConfig()
        use = Use(CircuitBreaker, {"failure_threshold": 4}, {"fake": section})
        return Harness(use, store=StoreAddress(Secret(valkey.url), "shared"))

    async with sidecar() as one, sidecar() as other:
        for each in (one, other):
            each.upstream.answer = each.upstream.whole(b'{"error": {}}', status=500)
        for each in (one, other, one, other):
            assert (await each.run()).client.status == 500
        for each in (one, other):
            run = await each.run()
            assert run.client.error is not None
            assert run.client.error.code == "circuit_open"
            assert len(each.upstream.sent) == 2
        panel = other.resources.of_kind("panel")["circuits"]
        (shown,) = await panel.show()
        assert (shown["upstream"], shown["model"], shown["state"]) == ("fake", MODEL, "open")
        (shown,) = await panel.act({"upstream": "fake", "force": "closed"})
        assert shown["forced"] == "closed"
        assert (await one.run()).client.status == 500
