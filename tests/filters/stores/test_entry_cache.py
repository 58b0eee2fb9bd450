"""What holds for every cache of answers, and that each of them is an aiocache."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiocache.base import BaseCache  # type: ignore[import-untyped]
from aiocache.plugins import HitMissRatioPlugin  # type: ignore[import-untyped]

from filters.stores.cache import CacheStoreSettings
from filters.stores.disk_cache import SCHEMA, DiskCache
from filters.stores.entry_cache import EntryCache
from filters.stores.memory_cache import MemoryCache
from filters.stores.redis import Redis
from filters.stores.redis_cache import RedisCache
from filters.stores.sqlite import Database
from sidecar.api import Secret, Usage
from sidecar.metrics import Metrics
from tests.support.cached import NOW, entry, figure
from tests.support.harness import FakeClock
from tests.support.valkey import Valkey

pytestmark = pytest.mark.usefixtures("patience")

numbers = itertools.count()
SETTINGS = CacheStoreSettings(max_entry_bytes=5_000)


class Bench:
    """One cache of each kind, with what it stands on."""

    def __init__(self, cache: EntryCache, metrics: Metrics, clock: FakeClock) -> None:
        self.cache: Any = cache
        self.metrics = metrics
        self.clock = clock


@pytest.fixture(params=["memory", "disk", "redis"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    clock, metrics = FakeClock(), Metrics()
    async with AsyncExitStack() as stack:
        cache: EntryCache
        if request.param == "memory":
            cache = MemoryCache(SETTINGS, clock, metrics)
        elif request.param == "disk":
            database = Database(tmp_path / "cache.db", SCHEMA)
            stack.push_async_callback(database.close)
            cache = DiskCache(database, SETTINGS, clock, metrics)
        else:
            valkey: Valkey = request.getfixturevalue("valkey")
            redis = Redis(Secret(valkey.url), f"contract-{next(numbers)}", Metrics())
            stack.push_async_callback(redis.close)
            redis.connect_soon()
            cache = RedisCache(redis, SETTINGS, clock, metrics)
        stack.push_async_callback(cache.close)
        yield Bench(cache, metrics, clock)


async def test_what_was_put_is_found_at_once(bench: Bench) -> None:
    cache = bench.cache
    for number in range(50):
        cache.put(f"k{number}", entry(b"%d" % number))
    for number in range(50):
        assert await cache.get(f"k{number}") == entry(b"%d" % number)
    assert await cache.get("another") is None


async def test_later_entry_takes_the_place_of_the_earlier(bench: Bench) -> None:
    bench.cache.put("k", entry(b"old", team="red"))
    bench.cache.put("k", entry(b"new", team="blue"))
    assert await bench.cache.get("k") == entry(b"new", team="blue")


async def test_entry_is_gone_when_its_time_is_up(bench: Bench) -> None:
    bench.cache.put("short", entry(expires_at=NOW + 10.0))
    bench.cache.put("long", entry(expires_at=NOW + 100.0))
    bench.clock.turn(10.0)
    assert await bench.cache.get("short") is None
    assert await bench.cache.get("long") is not None


async def test_expired_entry_is_not_kept(bench: Bench) -> None:
    bench.cache.put("k", entry(expires_at=NOW))
    assert await bench.cache.get("k") is None


async def test_too_large_entry_is_dropped_and_counted(bench: Bench) -> None:
    bench.cache.put("k", entry(bytes(5_000)))
    assert await bench.cache.get("k") is None
    assert figure(bench.metrics, "dropped", bench.cache.BACKEND, "too_large") == 1


async def test_entry_that_cannot_be_written_is_no_error(bench: Bench) -> None:
    bench.cache.put("k", entry(usage=Usage(2**64)))
    await bench.cache.get("k")
    await bench.cache.get("other")


async def test_purge_by_key_says_how_many(bench: Bench) -> None:
    cache = bench.cache
    cache.put("a", entry())
    cache.put("b", entry())
    assert await cache.purge(key="a") == 1
    assert await cache.purge(key="a") == 0
    assert await cache.get("a") is None
    assert await cache.get("b") is not None


async def test_purge_by_key_spares_what_is_of_another_team_or_model(bench: Bench) -> None:
    cache = bench.cache
    cache.put("a", entry(team="red", model="m"))
    assert await cache.purge(key="a", team="blue") == 0
    assert await cache.purge(key="a", team="red", model="n") == 0
    assert await cache.purge(key="a", team="red", model="m") == 1


@pytest.mark.parametrize(
    ("which", "left"),
    [
        ({"team": "red"}, {"bm", "bn"}),
        ({"model": "m"}, {"rn", "bn"}),
        ({"team": "red", "model": "m"}, {"rn", "bm", "bn"}),
        ({}, set()),
    ],
)
async def test_purge_takes_what_is_all_of_what_is_given(
    bench: Bench, which: dict[str, str], left: set[str]
) -> None:
    cache = bench.cache
    for team, model in itertools.product(("red", "blue"), "mn"):
        cache.put(f"{team[0]}{model}", entry(team=team, model=model))
    assert await cache.get("rm") is not None
    assert await cache.purge(**which) in (4 - len(left), None)
    keys = {"rm", "rn", "bm", "bn"}
    assert {key for key in keys if await cache.get(key) is not None} == left


async def test_what_is_put_after_a_purge_is_found(bench: Bench) -> None:
    cache = bench.cache
    for which in ({"team": "red"}, {}, {"team": "red", "model": "gpt-4o-mini"}):
        cache.put("k", entry(b"old"))
        await cache.purge(**which)
        assert await cache.get("k") is None
        cache.put("k", entry(b"new"))
        assert await cache.get("k") == entry(b"new")


async def test_look_of_a_caller_that_leaves_disturbs_nobody(bench: Bench) -> None:
    cache = bench.cache
    cache.put("k", entry())
    await cache.get("k")
    bench.clock.turn(5.0)
    looks = [asyncio.ensure_future(cache.get("k")) for _ in range(10)]
    await asyncio.sleep(0)
    for each in looks[::2]:
        each.cancel()
    found = await asyncio.gather(*looks, return_exceptions=True)
    assert found[1::2] == [entry()] * 5
    assert await cache.get("k") == entry()


# The interface of aiocache


async def test_cache_is_an_aiocache(bench: Bench) -> None:
    cache = bench.cache
    assert isinstance(cache, BaseCache)
    assert await cache.set("k", entry(b"x"), ttl=10.0)
    assert await cache.get("k") == entry(b"x", expires_at=NOW + 10.0)
    assert await cache.exists("k")
    with pytest.raises(ValueError, match="already"):
        await cache.add("k", entry())
    assert await cache.add("new", entry(b"n"))
    assert await cache.multi_set([("a", entry(b"a")), ("b", entry(b"b"))])
    assert await cache.multi_get(["a", "none", "b"]) == [entry(b"a"), None, entry(b"b")]
    assert await cache.get("none", default="x") == "x"
    assert await cache.delete("k") == 1
    assert not await cache.exists("k")
    assert await cache.clear()
    assert not await cache.exists("a")
    with pytest.raises(ValueError, match="namespaces"):
        await cache.clear(namespace="x")
    with pytest.raises(NotImplementedError):
        await cache.increment("a")


async def test_clear_leaves_no_timer_that_takes_a_later_entry(bench: Bench) -> None:
    cache = bench.cache
    await cache.set("k", entry(), ttl=0.001)
    await cache.clear()
    await cache.set("k", entry(), ttl=3600.0)
    bench.clock.turn(1.0)
    assert await cache.get("k") is not None
    assert not hasattr(cache, "_handlers")


async def test_plugins_of_aiocache_see_the_looks(bench: Bench) -> None:
    cache = bench.cache
    cache.plugins = [HitMissRatioPlugin()]
    cache.put("k", entry())
    await cache.get("k")
    await cache.get("none")
    assert cache.hit_miss_ratio["hits"] == 1
    assert cache.hit_miss_ratio["total"] == 2
