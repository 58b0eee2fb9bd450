"""Limits on a real server: the same as in memory, and shared by all who ask there."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from filters.stores import redis as redis_module
from filters.stores.memory_limits import MemoryLimits
from filters.stores.redis import LEASE_S, Argument, Done, Redis, Script, StoreDown
from filters.stores.redis_limits import BEATS_AFTER, RedisLimits
from filters.stores.rules import Grant, Refusal, Rule, Slot
from sidecar.api import Secret
from sidecar.metrics import Metrics
from tests.support.harness import FakeClock
from tests.support.limits import Charge, take
from tests.support.valkey import Valkey

pytestmark = pytest.mark.usefixtures("patience")

MINUTE = Rule("requests_per_minute", 10, 60.0)
TOKENS = Rule("tokens_per_minute", 1_000, 60.0)
HEALS_WITHIN_S = 5.0
NOTHING = Script("return 0")

numbers = itertools.count()


class Replica:
    """One process that shares the store: its connection and its limits."""

    def __init__(self, url: str, prefix: str, clock: FakeClock | None) -> None:
        self.redis = Redis(Secret(url), prefix, Metrics())
        self.redis.connect_soon()

        def now_us() -> int:
            return 0 if clock is None else int(clock.monotonic() * 1e6 + 0.5)

        self.limits = RedisLimits(self.redis, now_us)

    async def take(self, *charges: Charge, slots: Sequence[Slot] = ()) -> Grant:
        result = await take(self.limits, charges, slots)
        assert isinstance(result, Grant), result
        return result

    async def refuse(self, *charges: Charge, slots: Sequence[Slot] = ()) -> Refusal:
        result = await take(self.limits, charges, slots)
        assert isinstance(result, Refusal), result
        return result

    async def flush(self) -> None:
        """Return once all that was posted is done."""
        await self.redis.run(NOTHING, [])

    async def close(self) -> None:
        self.limits.close()
        await self.redis.close()


class Desk:
    """Replicas on one server, with one clock that is turned by hand, or with the server's."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.clock = FakeClock()
        self.prefix = f"test-{time.monotonic_ns()}"
        self.replicas: list[Replica] = []

    def replica(self, *, by_server_time: bool = False) -> Replica:
        clock = None if by_server_time else self.clock
        replica = Replica(self.valkey.url, self.prefix, clock)
        self.replicas.append(replica)
        return replica

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.close()


@pytest.fixture
async def desk(valkey: Valkey) -> AsyncIterator[Desk]:
    desk = Desk(valkey)
    yield desk
    await desk.close()


@pytest.fixture
async def own_desk(own_valkey: Valkey) -> AsyncIterator[Desk]:
    desk = Desk(own_valkey)
    yield desk
    await desk.close()


async def until_up(replica: Replica, is_up: bool = True) -> None:
    async with asyncio.timeout(HEALS_WITHIN_S):
        while replica.redis.is_up is not is_up:  # noqa: ASYNC110 - another process changes
            await asyncio.sleep(0.002)


# The same as in memory

# Two windows and two paces, with limits that change; pauses of the size of a bucket, of a period,
# and of what a burst takes to drain.
pauses = st.sampled_from([0, 1, 9_999, 10_000, 33_333, 33_334, 100_000, 590_000])
periods = st.sampled_from([0.6, 2.0])
rules = st.one_of(
    st.builds(Rule, st.just("window"), st.integers(2, 6), periods, st.none()),
    st.builds(Rule, st.just("paced"), st.integers(0, 12), periods, st.integers(2, 6)),
)
charges = st.lists(
    st.builds(Charge, st.just("a"), rules, st.sampled_from([1, 1, 2, 0])),
    min_size=1,
    max_size=3,
    unique_by=lambda charge: (charge.rule.name, charge.rule.period_s),
)
slots = st.lists(
    st.builds(Slot, st.sampled_from(["x", "y"]), st.integers(1, 3)),
    max_size=2,
    unique_by=lambda slot: slot.key,
)
takes = st.tuples(st.just("take"), charges, slots)
settles = st.tuples(st.just("settle"), st.integers(0, 50), st.integers(0, 9))
releases = st.tuples(st.just("release"), st.integers(0, 50), st.just(0))
steps = st.tuples(pauses, st.one_of(takes, takes, takes, settles, releases))


def at_the_border_of_a_bucket(pause_us: int) -> list[tuple[int, tuple[str, Any, Any]]]:
    """Two charges so far apart, and one more that has to wait for the first."""
    take = ("take", [Charge("a", Rule("window", 2, 0.6))], [])
    return [(0, take), (pause_us, take), (0, take)]


@example(at_the_border_of_a_bucket(9_999))
@example(at_the_border_of_a_bucket(10_000))
@given(st.lists(steps, min_size=10, max_size=60))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150
)
async def test_server_and_memory_answer_the_same_to_the_same_questions(
    desk: Desk, steps: list[tuple[int, tuple[str, Any, Any]]]
) -> None:
    if not desk.replicas:
        desk.replica()
    shared, memory = desk.replicas[0], MemoryLimits(desk.clock)
    number = next(numbers)
    grants: list[tuple[Grant, Grant, int]] = []
    for pause_us, (word, first, second) in steps:
        desk.clock.turn(pause_us / 1e6)
        if word == "take":
            asked = [each._replace(key=f"{each.key}{number}") for each in first]
            slots = [each._replace(key=f"{each.key}{number}") for each in second]
            here = await take(memory, asked, slots)
            there = await take(shared.limits, asked, slots)
            if isinstance(here, Grant):
                assert isinstance(there, Grant)
                grants.append((here, there, len(asked)))
                for each in asked:  # what remains of it
                    much = [each._replace(amount=1_000)]
                    assert await take(shared.limits, much) == await take(memory, much)
            else:
                assert there == here
        elif grants:
            *both, charged = grants[first % len(grants)]
            for grant in both:
                if word == "release":
                    grant.release()
                elif charged:
                    grant.settle(first % charged, second)


# Shared


async def test_ten_thousand_calls_of_two_replicas_never_exceed_the_limit(desk: Desk) -> None:
    replicas = [desk.replica(by_server_time=True) for _ in range(2)]
    rule = Rule("requests_per_minute", 3_000, 60.0)
    granted = 0

    async def ask(replica: Replica, count: int) -> None:
        nonlocal granted
        for _ in range(count):
            result = await take(replica.limits, [Charge("a", rule)])
            granted += isinstance(result, Grant)

    await asyncio.gather(*(ask(replica, 250) for replica in replicas for _ in range(20)))
    assert granted == 3_000


async def test_slots_are_shared_and_never_more_are_out(desk: Desk) -> None:
    first, second = desk.replica(), desk.replica()
    grants = [await first.take(slots=[Slot("a", 3)]) for _ in range(2)]
    grants.append(await second.take(slots=[Slot("a", 3)]))
    assert await second.refuse(slots=[Slot("a", 3)]) == Refusal(0, 0.0, 0)
    grants[0].release()
    grants[0].release()
    await first.flush()
    await second.take(slots=[Slot("a", 3)])
    await second.refuse(slots=[Slot("a", 3)])


async def test_refusal_for_a_slot_charges_nothing(desk: Desk) -> None:
    replica = desk.replica()
    await replica.take(slots=[Slot("a", 1)])
    refusal = await replica.refuse(Charge("a", MINUTE, 10), slots=[Slot("a", 1)])
    assert refusal == Refusal(1, 0.0, 0)
    await replica.take(Charge("a", MINUTE, 10))


async def test_charge_larger_than_its_limit_is_never_granted(desk: Desk) -> None:
    refusal = await desk.replica().refuse(Charge("a", MINUTE, 11))
    assert refusal == Refusal(0, math.inf, 10)


async def test_a_debt_beyond_all_reason_leaves_like_any_other(desk: Desk) -> None:
    replica = desk.replica()
    await replica.take(Charge("a", TOKENS, 600))
    desk.clock.turn(2.0)
    (await replica.take(Charge("a", TOKENS, 1))).settle(0, 2**63)
    await replica.flush()
    desk.clock.turn(62.0)
    await replica.take(Charge("a", TOKENS, 1_000))
    refusal = await replica.refuse(Charge("a", TOKENS, 1))
    assert (refusal.remaining, refusal.wait_s) == (0, 60.0)


async def test_the_same_cannot_be_taken_twice_in_one_take(desk: Desk) -> None:
    with pytest.raises(ValueError, match="twice"):
        await desk.replica().take(Charge("a", MINUTE), Charge("a", MINUTE))


async def test_one_take_is_one_round_trip(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = desk.replica()
    await replica.take(Charge("a", MINUTE), Charge("a", TOKENS, 5), slots=[Slot("a", 5)])
    asked: list[Script] = []
    real = Redis.call

    def call(self: Redis, script: Script, *rest: Any) -> None:
        asked.append(script)
        real(self, script, *rest)

    monkeypatch.setattr(Redis, "call", call)
    await replica.take(Charge("a", MINUTE), Charge("a", TOKENS, 5), slots=[Slot("a", 5)])
    assert len(asked) == 1


async def test_keys_leave_the_server_by_themselves(desk: Desk) -> None:
    replica = desk.replica(by_server_time=True)
    rule = Rule("paced", 10, 1.0, burst=5)
    await replica.take(Charge("a", rule), slots=[Slot("a", 1)])
    for key, longest_ms in ((f"window:1000000:paced:{'a'}", 3_001), ("slots:a", LEASE_S * 1000)):
        answer = desk.valkey.command("PTTL", f"{desk.prefix}:{key}")
        assert 0 < int(answer[1:]) <= longest_ms


async def test_caller_that_is_cancelled_has_taken_nothing(desk: Desk) -> None:
    replica = desk.replica()
    await replica.flush()
    leaving = asyncio.ensure_future(replica.take(Charge("a", TOKENS, 1_000), slots=[Slot("a", 1)]))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait((leaving,))
    await replica.flush()
    await replica.flush()
    await replica.take(Charge("a", TOKENS, 1_000), slots=[Slot("a", 1)])


async def test_caller_that_is_cancelled_in_the_turn_of_its_answer_has_taken_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = desk.replica()
    await replica.flush()
    ask = replica.limits.take

    def ask_and_leave(keys: Sequence[str], args: Sequence[Argument], done: Done) -> None:
        def answered(answer: Any) -> None:
            done(answer)
            leaving.cancel()

        ask(keys, args, answered)

    with monkeypatch.context() as patch:
        patch.setattr(replica.limits, "take", ask_and_leave)
        leaving = asyncio.ensure_future(
            replica.take(Charge("a", TOKENS, 1_000), slots=[Slot("a", 1)])
        )
        await asyncio.wait((leaving,))
    assert leaving.cancelled()
    await replica.take(Charge("a", TOKENS, 1_000), slots=[Slot("a", 1)])


# Replicas that die, servers that forget


async def test_slots_of_a_replica_that_died_are_free_after_its_lease(desk: Desk) -> None:
    dead, alive = desk.replica(), desk.replica()
    await dead.take(slots=[Slot("a", 1)])
    dead.limits._held.clear()  # it says nothing any more
    desk.clock.turn(LEASE_S - 0.1)
    await alive.refuse(slots=[Slot("a", 1)])
    desk.clock.turn(0.1)
    await alive.take(slots=[Slot("a", 1)])


async def test_slots_of_a_replica_that_lives_stay_taken(desk: Desk) -> None:
    first, second = desk.replica(), desk.replica()
    grant = await first.take(slots=[Slot("a", 1)])
    for _ in range(10):
        desk.clock.turn(LEASE_S / 2)
        first.limits._beat()
        await first.flush()
        await second.refuse(slots=[Slot("a", 1)])
    grant.release()
    await first.flush()
    await second.take(slots=[Slot("a", 1)])


async def test_lease_is_renewed_also_while_answers_are_awaited(desk: Desk) -> None:
    first, second = desk.replica(), desk.replica()
    await first.take(slots=[Slot("a", 1)])
    for _ in range(4):
        desk.clock.turn(LEASE_S / 2)
        asking = asyncio.ensure_future(first.refuse(slots=[Slot("a", 1)]))
        await asyncio.sleep(0)
        first.limits._beat()
        await asking
        await first.flush()
        await second.refuse(slots=[Slot("a", 1)])


async def test_server_that_was_restarted_learns_again_who_holds_what(own_desk: Desk) -> None:
    first, second = own_desk.replica(), own_desk.replica()
    kept, returned = [await first.take(slots=[Slot("a", 2)]) for _ in range(2)]
    await asyncio.to_thread(own_desk.valkey.stop)
    await until_up(first, False)
    returned.release()  # nobody hears of it
    await asyncio.to_thread(own_desk.valkey.start)
    await until_up(first)
    await until_up(second)
    await first.flush()
    await second.take(slots=[Slot("a", 2)])
    await second.refuse(slots=[Slot("a", 2)])
    kept.release()
    await first.flush()
    await second.take(slots=[Slot("a", 2)])


@pytest.mark.usefixtures("impatient")
async def test_what_a_server_that_hung_did_late_is_undone(own_desk: Desk) -> None:
    replica, other = own_desk.replica(), own_desk.replica()
    await replica.flush()
    await other.flush()
    own_desk.valkey.pause()
    with pytest.raises(StoreDown):
        await replica.take(slots=[Slot("a", 1)])
    own_desk.valkey.resume()
    await until_up(replica)
    await until_up(other)
    await replica.flush()
    await other.take(slots=[Slot("a", 1)])


async def test_what_was_settled_after_the_server_forgot_gives_nothing_back(own_desk: Desk) -> None:
    replica = own_desk.replica()
    grant = await replica.take(Charge("a", TOKENS, 900))
    own_desk.valkey.command("FLUSHALL")
    own_desk.clock.turn(1.0)
    await replica.take(Charge("a", TOKENS, 1_000))
    grant.settle(0, 0)
    await replica.flush()
    await replica.refuse(Charge("a", TOKENS, 1))


async def test_server_whose_clock_was_set_back_does_not_refuse_until_then(desk: Desk) -> None:
    replica = desk.replica()
    paced = Rule("paced", 10, 60.0, burst=10)
    await replica.take(Charge("a", MINUTE, 10), Charge("a", paced, 10))
    desk.clock.turn(-3_600.0)
    await replica.take(Charge("a", MINUTE, 10), Charge("a", paced, 10))
    desk.clock.turn(-5.0)
    await replica.refuse(Charge("a", MINUTE, 1))


async def test_keys_that_hold_nothing_are_forgotten(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_module, "BEAT_S", 3600.0)
    replica = desk.replica()
    for number in range(300):
        (await replica.take(slots=[Slot(f"a{number}", 1)])).release()
    kept = await replica.take(slots=[Slot("kept", 1)])
    for _ in range(BEATS_AFTER + 1):
        replica.limits._beat()
    await replica.flush()
    assert list(replica.limits._held) == ["kept"]
    assert repr(replica.limits) == f"<RedisLimits {desk.valkey.url} held=1>"
    kept.release()


async def test_store_that_is_away_is_said_to_be(own_desk: Desk) -> None:
    replica = own_desk.replica()
    grant = await replica.take(Charge("a", TOKENS, 10), slots=[Slot("a", 1)])
    await asyncio.to_thread(own_desk.valkey.stop)
    await until_up(replica, False)
    with pytest.raises(StoreDown):
        await replica.take(Charge("a", TOKENS, 10), slots=[Slot("b", 1)])
    assert "b" not in replica.limits._held
    grant.settle(0, 5)
    grant.release()
