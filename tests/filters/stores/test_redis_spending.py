"""Spending on a real server: the same as in memory, and shared by all who count there."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from filters.stores import redis_spending
from filters.stores.memory_spending import MemorySpending
from filters.stores.redis import LEASE_S, Done, Redis, Script, StoreDown
from filters.stores.redis_spending import BEATS_AFTER, SLOW_BEATS, RedisHeld, RedisSpending
from filters.stores.rules import WhenDown
from filters.stores.spending import MOST, Account, Crossed, Held, Level, Line
from sidecar.api import CallFilter, Rejected, Secret
from sidecar.metrics import Metrics
from tests.support.harness import FakeClock, Harness
from tests.support.valkey import Valkey

pytestmark = pytest.mark.usefixtures("patience")

DAY = Account("tokens|day 2026-05-04|team=search", 4_000_000_000)
MONTH = Account("usd|month 2026-05-01|team=search", 4_000_000_000)
HARD = [Line(0, 1000)]
HEALS_WITHIN_S = 5.0
NOTHING = Script("return 0")

numbers = itertools.count()


class Replica:
    """One process that shares the store."""

    def __init__(self, url: str, prefix: str, clock: FakeClock, workers: int = 1) -> None:
        self.redis = Redis(Secret(url), prefix, Metrics())
        self.redis.connect_soon()
        self.harness = Harness(CallFilter, workers=workers)
        self.harness.clock = clock
        kit = self.harness._make(CallFilter).kit
        self.spending = RedisSpending(self.redis, kit, lambda: int(clock.wall() * 1e6))
        self.beats = True

    async def reserve(
        self,
        *amounts: int,
        accounts: Any = (DAY,),
        lines: Any = HARD,
        when_down: WhenDown = "local_share",
    ) -> Held | Crossed:
        return await self.spending.purse(accounts).reserve(amounts, lines, when_down)

    async def hold(self, *amounts: int, **more: Any) -> Held:
        found = await self.reserve(*amounts, **more)
        assert not isinstance(found, Crossed), found
        return found

    async def level(self, account: Account = DAY) -> Level:
        (found,) = await self.spending.purse([account]).levels()
        return found

    async def flush(self) -> None:
        """Return once all that was posted is done."""
        await self.redis.run(NOTHING, [])

    def fell_back(self, answer: str) -> float:
        name = "llm_sidecar_store_fallbacks"
        return float(self.harness.value(name, use="budgets", answer=answer))

    def falls_silent(self) -> None:
        """From now on it tells nothing by itself."""
        if self.beats:
            self.beats = False
            self.spending.close()

    async def close(self) -> None:
        self.falls_silent()
        await self.redis.close()


class Desk:
    """Replicas on one server, with one clock that is turned by hand."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.clock = FakeClock()
        self.prefix = f"test-{time.monotonic_ns()}"
        self.replicas: list[Replica] = []

    def replica(self, workers: int = 1) -> Replica:
        replica = Replica(self.valkey.url, self.prefix, self.clock, workers)
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

accounts = st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True)
amounts = st.sampled_from([0, 1, 3, 10, 2**50])
bounds = st.sampled_from([0, 5, 12, 40, 2**50, 2**52])
takes = st.tuples(
    st.just("reserve"),
    accounts,
    st.lists(amounts, min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), bounds), max_size=3),
)
settles = st.tuples(
    st.just("settle"), st.integers(0, 30), st.lists(amounts, min_size=3, max_size=3), st.just(0)
)
looks = st.tuples(st.just("look"), accounts, st.just(0), st.just(0))


@example([("reserve", ["a"], [10, 0, 0], [(0, 10)]), ("reserve", ["a"], [1, 0, 0], [(0, 10)])])
@given(st.lists(st.one_of(takes, takes, settles, looks), min_size=5, max_size=40))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150
)
async def test_server_and_memory_answer_the_same_to_the_same_questions(
    desk: Desk, steps: list[tuple[str, Any, Any, Any]]
) -> None:
    if not desk.replicas:
        desk.replica()
    replica, number = desk.replicas[0], next(numbers)
    memory = MemorySpending(replica.harness.filters[0].kit, None)
    held: list[tuple[Held, Held, int]] = []
    for word, first, second, third in steps:
        if word == "settle":
            if held:
                here, there, size = held[first % len(held)]  # some of them again
                here.settle(second[:size])
                there.settle(second[:size])
            continue
        asked = [Account(f"{name}{number}", 4_000_000_000) for name in first]
        ours, theirs = memory.purse(asked), replica.spending.purse(asked)
        if word == "look":
            assert await theirs.levels() == await ours.levels()
            continue
        lines = [Line(index % len(asked), most) for index, most in third]
        found = await ours.reserve(second[: len(asked)], lines, "open")
        answer = await theirs.reserve(second[: len(asked)], lines, "open")
        if isinstance(found, Crossed):
            assert answer == found
        else:
            assert not isinstance(answer, Crossed)
            assert answer.totals == found.totals
            held.append((found, answer, len(asked)))


# Shared


async def test_replicas_never_spend_more_together_than_the_limit(desk: Desk) -> None:
    replicas = [desk.replica() for _ in range(3)]
    granted: list[int] = []

    async def spend(replica: Replica, seed: int) -> None:
        for step in range(60):
            amount = 1 + (seed * 7 + step * 13) % 40
            found = await replica.reserve(amount)
            if not isinstance(found, Crossed):
                used = amount - (seed + step) % (amount + 1)
                granted.append(used)
                found.settle([used])

    await asyncio.gather(*(spend(each, seed) for seed, each in enumerate(replicas * 4)))
    for each in replicas:
        await each.flush()
    level = await replicas[0].level()
    assert level == Level(sum(granted), 0)
    assert 900 < level.spent <= 1000


async def test_what_one_reserves_the_other_cannot(desk: Desk) -> None:
    one, other = desk.replica(), desk.replica()
    held = await one.hold(600)
    assert await other.reserve(401) == Crossed(0, Level(0, 600))
    held.settle([100])
    await one.flush()
    assert (await other.hold(900)).totals == [1000]


async def test_what_a_replica_spent_stays_when_it_is_gone(desk: Desk) -> None:
    first = desk.replica()
    (await first.hold(600)).settle([500])
    await first.close()
    assert await desk.replica().level() == Level(500, 0)


async def test_reservations_of_a_replica_that_died_run_out(desk: Desk) -> None:
    one, other = desk.replica(), desk.replica()
    await one.hold(600)
    one.falls_silent()
    desk.clock.turn(LEASE_S / 2)
    assert await other.level() == Level(0, 600)
    desk.clock.turn(LEASE_S)
    assert await other.level() == Level(0, 0)
    await other.hold(1000)


async def test_reservations_of_one_that_lives_do_not(desk: Desk) -> None:
    one, other = desk.replica(), desk.replica()
    await one.hold(600)
    for _ in range(5):
        desk.clock.turn(LEASE_S / 2)
        one.spending._beat()
        await one.flush()
    assert await other.level() == Level(0, 600)


async def test_accounts_leave_the_server_a_day_after_their_period(desk: Desk) -> None:
    replica = desk.replica()
    account = Account("x", 4_000_000_000)
    (await replica.hold(5, accounts=[account])).settle([5])
    await replica.flush()
    answer = desk.valkey.command("PEXPIRETIME", f"{desk.prefix}:spent:x")
    assert answer == b":%d\r\n" % ((account.ends_at + 86_400) * 1000)


async def test_one_whose_caller_is_cancelled_is_given_back(desk: Desk) -> None:
    one, other = desk.replica(), desk.replica()
    await one.flush()
    task = asyncio.ensure_future(one.reserve(600))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await one.flush()
    await one.flush()
    assert await other.level() == Level(0, 0)


async def test_one_whose_caller_is_cancelled_as_the_answer_comes_is_given_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = desk.replica()
    call = Redis.call

    def answered_at_once(self: Redis, script: Script, keys: Any, args: Any, done: Done) -> None:
        def done_and_gone(answer: Any) -> None:
            done(answer)
            task.cancel()

        call(self, script, keys, args, done_and_gone)

    with monkeypatch.context() as patched:
        patched.setattr(Redis, "call", answered_at_once)
        task = asyncio.ensure_future(replica.reserve(600))
        with pytest.raises(asyncio.CancelledError):
            await task
    await replica.flush()
    assert await replica.level() == Level(0, 0)


# What gets lost


async def test_a_server_that_forgot_everything_knows_it_again(own_desk: Desk) -> None:
    one, other = own_desk.replica(), own_desk.replica()
    (await one.hold(300)).settle([200])
    held = await one.hold(100)
    (await other.hold(300)).settle([50])
    await asyncio.gather(one.flush(), other.flush())
    own_desk.valkey.stop()
    await asyncio.gather(until_up(one, False), until_up(other, False))
    own_desk.valkey.start()
    await asyncio.gather(until_up(one), until_up(other))
    await asyncio.gather(one.flush(), other.flush())
    assert await one.level() == Level(250, 100)
    held.settle([100])
    await one.flush()
    assert await other.level() == Level(350, 0)


async def test_what_is_told_twice_counts_once(desk: Desk) -> None:
    replica = desk.replica()
    (await replica.hold(300)).settle([200])
    for _ in range(5):
        replica.spending._beat()
    await replica.flush()
    assert await replica.level() == Level(200, 0)


async def test_an_amount_that_cannot_be_counted_fills_its_account_and_stops_no_other(
    desk: Desk,
) -> None:
    one, other = desk.replica(), desk.replica()
    (await one.hold(10, 10, accounts=[DAY, MONTH])).settle([2**64 - 1, 7])
    await one.flush()
    assert await other.level(DAY) == Level(MOST, 0)
    assert isinstance(await other.reserve(1), Crossed)
    assert await other.level(MONTH) == Level(7, 0)
    (await one.hold(1, 1, accounts=[DAY, MONTH], lines=[])).settle([1, 5])
    one.spending._beat()
    await one.flush()
    assert await other.level(MONTH) == Level(12, 0)
    assert (await other.level(DAY)).spent >= MOST


async def test_what_a_replica_told_is_in_the_sum_even_if_the_sum_could_not_take_it_at_once(
    desk: Desk,
) -> None:
    replica = desk.replica()
    key = f"{desk.prefix}:spent:{DAY.key}"
    desk.valkey.command("HSET", key, "total", "9223372036854775807")
    (await replica.hold(0, lines=[])).settle([5])
    await replica.flush()
    assert await replica.level() == Level(MOST, 0)


async def test_a_beat_does_not_give_back_what_is_just_being_reserved(desk: Desk) -> None:
    one, other = desk.replica(), desk.replica()
    await one.flush()
    task = asyncio.ensure_future(one.reserve(600))
    await asyncio.sleep(0)
    one.spending._beat()
    await task
    await one.flush()
    assert await other.level() == Level(0, 600)


async def test_beats_tell_what_changed_and_the_rest_now_and_then(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = desk.replica()
    (await replica.hold(300)).settle([200])
    await replica.flush()
    told: list[int] = []

    def post(script: Script, keys: Any, args: Any = ()) -> None:
        told.append(len(keys) // 2)

    replica.falls_silent()
    monkeypatch.setattr(replica.redis, "post", post)
    for _ in range(2 * SLOW_BEATS):
        replica.spending._beat()
    assert BEATS_AFTER <= len(told) <= BEATS_AFTER + 2


async def test_accounts_that_are_over_are_forgotten(desk: Desk) -> None:
    replica = desk.replica()
    account = Account("x", int(desk.clock.wall()) + 10)
    (await replica.hold(5, accounts=[account])).settle([5])
    desk.clock.turn(2 * 86_400)
    for _ in range(BEATS_AFTER + 2):
        replica.spending._beat()
    assert repr(replica.spending).endswith("accounts=0>")


async def test_accounts_that_rest_are_forgotten_when_there_are_many(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_spending, "MAX_ACCOUNTS", 2)
    replica = desk.replica()
    names = [Account(name, 4_000_000_000) for name in "abc"]
    (await replica.hold(100, accounts=names[:1])).settle([100])
    held = await replica.hold(100, accounts=names[1:2])
    for _ in range(BEATS_AFTER + 1):
        replica.spending._beat()
    await replica.hold(5, accounts=names[2:])
    assert set(replica.spending._sums) == {"b", "c"}
    (await replica.hold(100, accounts=names[:1])).settle([70])
    held.settle([50])
    await replica.flush()
    assert [await replica.level(each) for each in names] == [
        *(Level(170, 0), Level(50, 0), Level(0, 5))
    ]


# While the store is away


async def test_open_lets_all_in_and_tells_it_afterwards(own_desk: Desk) -> None:
    replica = own_desk.replica()
    await replica.hold(100)
    own_desk.valkey.stop()
    await until_up(replica, False)
    for _ in range(5):
        (await replica.hold(900, when_down="open")).settle([900])
    assert replica.fell_back("open") == 5
    own_desk.valkey.start()
    await until_up(replica)
    await replica.flush()
    assert await replica.level() == Level(4500, 100)


async def test_closed_lets_none_in(own_desk: Desk) -> None:
    replica = own_desk.replica()
    await replica.hold(100)
    own_desk.valkey.stop()
    await until_up(replica, False)
    with pytest.raises(Rejected) as caught:
        await replica.reserve(1, when_down="closed")
    assert (caught.value.status, caught.value.code) == (503, "store_unavailable")
    assert replica.fell_back("closed") == 1


async def test_a_share_is_of_what_was_left_when_the_store_went_away(own_desk: Desk) -> None:
    one, other = own_desk.replica(workers=2), own_desk.replica(workers=2)
    (await other.hold(300)).settle([200])
    await other.flush()
    held = await one.hold(200)  # 600 are left
    own_desk.valkey.stop()
    await until_up(one, False)
    assert await one.reserve(301) == Crossed(0, Level(200, 200))
    more = await one.hold(300)
    assert more.totals == [1000]
    assert isinstance(await one.reserve(1), Crossed)
    held.settle([100])  # 100 of its own come back
    assert isinstance(await one.reserve(101), Crossed)
    more.settle([0])
    (await one.hold(200)).settle([200])
    assert await one.level() == Level(500, 0)
    own_desk.valkey.start()
    await asyncio.gather(until_up(one), until_up(other))
    await asyncio.gather(one.flush(), other.flush())
    assert await other.level() == Level(500, 0)


async def test_before_anything_was_heard_each_worker_has_its_share(valkey: Valkey) -> None:
    desk = Desk(valkey)
    replica = Replica("redis://127.0.0.1:1/0", desk.prefix, desk.clock, workers=4)
    await until_down(replica)
    assert isinstance(await replica.reserve(251), Crossed)
    await replica.hold(250)
    await replica.close()


async def until_down(replica: Replica) -> None:
    async with asyncio.timeout(HEALS_WITHIN_S):
        while True:
            try:
                await replica.redis.run(NOTHING, [])
            except StoreDown:
                return


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_does_not_answer_makes_nobody_wait(own_desk: Desk) -> None:
    replica = own_desk.replica()
    await until_up(replica)
    own_desk.valkey.pause()
    loop = asyncio.get_running_loop()
    began = loop.time()
    held = await replica.hold(400)
    assert loop.time() - began < 1.0
    assert replica.fell_back("local_share") == 1
    own_desk.valkey.resume()
    await until_up(replica)
    await replica.flush()  # what it did late counts once
    assert isinstance(held, RedisHeld)
    assert (await replica.level()).reserved == 400
