"""A cache on a real server: shared, purged by one command, and a miss at once when it is away.

What all caches do is tested in test_entry_cache.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable

import pytest

from filters.stores import redis_cache
from filters.stores.cache import CacheStoreSettings
from filters.stores.entry import size_of
from filters.stores.redis import Redis, Script
from filters.stores.redis_cache import RedisCache
from sidecar.api import Secret
from sidecar.metrics import Metrics
from tests.support.cached import NOW, entry, figure
from tests.support.harness import FakeClock
from tests.support.valkey import Valkey

pytestmark = pytest.mark.usefixtures("patience")

numbers = itertools.count()
HEALS_WITHIN_S = 10.0
ONE = size_of(entry())


class Process:
    """One that has the store in common with others of the same prefix."""

    def __init__(self, url: str, prefix: str, *, has_bloom: bool = False) -> None:
        self.metrics = Metrics()
        self.clock = FakeClock()
        self.redis = Redis(Secret(url), prefix, Metrics())
        self.redis.connect_soon()
        settings = CacheStoreSettings()
        self.cache = RedisCache(self.redis, settings, self.clock, self.metrics, has_bloom=has_bloom)

    async def close(self) -> None:
        await self.cache.close()
        await self.redis.close()


class Group:
    """Processes to be closed after the test."""

    def __init__(self) -> None:
        self.prefix = f"cached[{next(numbers)}]*"  # a pattern's own characters
        self.processes: list[Process] = []

    def open(self, url: str, *, has_bloom: bool = False) -> Process:
        process = Process(url, self.prefix, has_bloom=has_bloom)
        self.processes.append(process)
        return process


@pytest.fixture
async def group() -> AsyncIterator[Group]:
    group = Group()
    yield group
    for process in group.processes:
        await process.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(HEALS_WITHIN_S):
        while not holds():  # noqa: ASYNC110 - it is another process that changes
            await asyncio.sleep(0.002)


async def settled(process: Process) -> None:
    """Return once the server has done all that was asked before."""
    await process.redis.run(Script("return 0"), [])


async def test_entries_are_shared(valkey: Valkey, group: Group) -> None:
    ours, theirs = group.open(valkey.url), group.open(valkey.url)
    ours.cache.put("k", entry())
    await settled(ours)
    assert await theirs.cache.get("k") == entry()


async def test_purge_holds_for_all_at_once(valkey: Valkey, group: Group) -> None:
    ours, theirs = group.open(valkey.url), group.open(valkey.url)
    for team in ("red", "blue"):
        ours.cache.put(team, entry(team=team))
    await settled(ours)
    assert await theirs.cache.purge(team="red") is None
    assert await ours.cache.get("red") is None
    assert await ours.cache.get("blue") is not None


async def test_purged_entry_is_freed_when_it_is_next_looked_for(
    valkey: Valkey, group: Group
) -> None:
    process = group.open(valkey.url)
    process.cache.put("k", entry())
    await process.cache.purge()
    key = process.cache._names + "k"
    assert valkey.command("EXISTS", key) == b":1\r\n"
    await process.cache.get("k")
    assert valkey.command("EXISTS", key) == b":0\r\n"


async def test_names_of_teams_and_models_are_never_taken_for_each_other(
    valkey: Valkey, group: Group
) -> None:
    cache = group.open(valkey.url).cache
    names = [("a:b", "c"), ("a", "b:c"), ("all", "all"), ("serial", "model:all"), ("team:a", "")]
    for team, model in names:
        for each in names:
            cache.put("/".join(each), entry(team=each[0], model=each[1]))
        await cache.purge(team=team, model=model)
        gone = [each for each in names if await cache.get("/".join(each)) is None]
        assert gone == [(team, model)]


async def test_entries_are_gone_with_the_record_of_purges(valkey: Valkey, group: Group) -> None:
    """A server short of memory may drop any key: what was purged must not come back by that."""
    cache = group.open(valkey.url).cache
    cache.put("purged", entry(team="red"))
    cache.put("other", entry(team="blue"))
    await cache.purge(team="red")
    valkey.command("DEL", cache._marks)
    assert await cache.get("purged") is None
    cache.put("new", entry())
    assert await cache.get("new") is not None
    assert await cache.get("other") is None


async def test_server_lets_entries_expire_by_itself(valkey: Valkey, group: Group) -> None:
    process = group.open(valkey.url)
    process.cache.put("k", entry(expires_at=NOW + 12.5))
    await settled(process)
    left_ms = int(valkey.command("PTTL", process.cache._names + "k")[1:])
    assert 2_500 < left_ms <= 12_500


async def test_torn_entry_is_a_miss_and_counted(valkey: Valkey, group: Group) -> None:
    process = group.open(valkey.url)
    process.cache.put("k", entry())
    await settled(process)
    valkey.command("HSET", process.cache._names + "k", "data", "LSCE torn")
    assert await process.cache.get("k") is None
    assert figure(process.metrics, "errors", "redis") == 1


async def test_caches_of_other_prefixes_are_left_alone(valkey: Valkey, group: Group) -> None:
    ours = group.open(valkey.url)
    theirs = Process(valkey.url, f"{group.prefix}:more")
    group.processes.append(theirs)
    theirs.cache.put("k", entry())
    await settled(theirs)
    await ours.cache.purge()
    assert await ours.cache.get("k") is None
    assert await theirs.cache.get("k") is not None


# The server is away


@pytest.mark.usefixtures("impatient")
async def test_look_is_a_miss_at_once_while_the_server_is_away_and_heals(
    own_valkey: Valkey, group: Group
) -> None:
    process = group.open(own_valkey.url)
    process.cache.put("k", entry())
    await settled(process)
    own_valkey.stop()
    await until(lambda: not process.redis.is_up)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for _ in range(100):
        assert await process.cache.get("k") is None
    assert loop.time() - begun < 0.5
    assert figure(process.metrics, "errors", "redis") >= 100
    process.cache.put("k", entry())
    assert figure(process.metrics, "dropped", "redis", "down") == 1
    with pytest.raises(ValueError, match="try again"):
        await process.cache.purge()
    own_valkey.start()
    await until(lambda: process.redis.is_up)
    process.cache.put("k", entry())
    assert await process.cache.get("k") == entry()


@pytest.mark.usefixtures("impatient")
async def test_look_waits_little_for_a_server_that_hangs(own_valkey: Valkey, group: Group) -> None:
    process = group.open(own_valkey.url)
    await settled(process)
    own_valkey.pause()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    process.cache.put("k", entry())
    assert await process.cache.get("k") is None
    assert loop.time() - begun < 1.0
    await until(lambda: process.cache._waiting_bytes == 0)
    assert figure(process.metrics, "dropped", "redis", "down") == 1
    own_valkey.resume()


async def test_more_than_the_connection_can_take_is_dropped_and_counted(
    valkey: Valkey, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_cache, "MAX_WAITING_BYTES", 3 * ONE)
    process = group.open(valkey.url)
    for key in "abcde":
        process.cache.put(key, entry())
    assert figure(process.metrics, "dropped", "redis", "busy") == 2
    await settled(process)
    process.cache.put("f", entry())
    found = [key for key in "abcdef" if await process.cache.get(key) is not None]
    assert found == list("abcf")
    monkeypatch.setattr(redis_cache, "MAX_WAITING", 2)
    for key in "ghi":
        process.cache.put(key, entry())
    assert figure(process.metrics, "dropped", "redis", "busy") == 3


async def test_server_without_memory_is_no_error(group: Group) -> None:
    with Valkey("--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as server:
        process = group.open(server.url)
        await settled(process)
        process.cache.put("k", entry(bytes(900_000)))
        process.cache.put("l", entry(bytes(900_000)))
        await settled(process)
        assert await process.cache.get("other") is None
        assert figure(process.metrics, "dropped", "redis", "down") >= 1
        await process.close()
        group.processes.remove(process)


# The Bloom filter


async def test_sure_miss_costs_no_round_trip(own_valkey: Valkey, group: Group) -> None:
    process = group.open(own_valkey.url, has_bloom=True)
    process.cache.put("k", entry())
    await settled(process)
    await until(lambda: process.cache._sure is not None and process.cache._sure._bloom is not None)
    calls = commands(own_valkey)
    for number in range(50):
        assert await process.cache.get(f"none{number}") is None
    assert figure(process.metrics, "bloom", "sure_miss") >= 48
    assert commands(own_valkey) - calls <= 3
    assert await process.cache.get("k") == entry()


def commands(valkey: Valkey) -> int:
    """Looks that the server has served."""
    stats = valkey.command("INFO", "commandstats").decode()
    lines = [line for line in stats.splitlines() if line.startswith("cmdstat_hmget:")]
    return int(lines[0].split("calls=")[1].split(",")[0]) if lines else 0


async def test_answer_of_another_process_is_found_after_the_next_making(
    valkey: Valkey, group: Group
) -> None:
    ours, theirs = group.open(valkey.url, has_bloom=True), group.open(valkey.url)
    sure = ours.cache._sure
    assert sure is not None
    await ours.cache.get("none")
    await until(lambda: sure._bloom is not None)
    for number in range(3_000):  # several pages
        theirs.cache.put(f"k{number}", entry())
        if number % 200 == 0:
            await settled(theirs)
    await settled(theirs)
    ours.clock.turn(5.0)
    await until(lambda: sure._keys > 2_900)
    for number in range(0, 3_000, 100):
        assert await ours.cache.get(f"k{number}") == entry()
