"""A cache in memory: bounded, and asked without waiting. What all caches do: test_entry_cache."""

from __future__ import annotations

import asyncio

import pytest

from filters.stores import purge as purging
from filters.stores.cache import CacheStoreSettings
from filters.stores.entry import size_of
from filters.stores.memory_cache import MemoryCache
from sidecar.metrics import Metrics
from tests.support.cached import NOW, entry, figure
from tests.support.harness import FakeClock

ONE = size_of(entry())


def make(clock: FakeClock, metrics: Metrics, entries: int = 10) -> MemoryCache:
    settings = CacheStoreSettings(
        max_bytes=100 * ONE, max_entry_bytes=100 * ONE, max_entries=entries
    )
    return MemoryCache(settings, clock, metrics)


def test_entry_is_given_at_once_as_the_very_object() -> None:
    clock = FakeClock()
    cache = make(clock, Metrics())
    kept = entry(expires_at=NOW + 10.0)
    cache.put("k", kept)
    assert cache.get_now("k") is kept
    assert cache.get_now("other") is None
    clock.turn(10.0)
    assert cache.get_now("k") is None


def test_clock_of_the_wall_that_jumps_ends_no_entry() -> None:
    clock = FakeClock()
    cache = make(clock, Metrics())
    cache.put("k", entry(expires_at=NOW + 10.0))
    clock._wall += 1_000.0
    assert cache.get_now("k") is not None


def test_entry_used_last_stays_and_figures_tell_what_is_kept() -> None:
    metrics = Metrics()
    cache = make(FakeClock(), metrics, entries=3)
    for key in "abc":
        cache.put(key, entry())
    cache.get_now("a")
    cache.put("d", entry())
    assert [key for key in "abcd" if cache.get_now(key)] == ["a", "c", "d"]
    assert figure(metrics, "entries", "memory") == 3
    assert figure(metrics, "bytes", "memory") == 3 * ONE
    assert figure(metrics, "evictions", "memory") == 1
    assert repr(cache) == f"<MemoryCache entries=3 bytes={3 * ONE}>"


def test_bytes_are_bounded_too() -> None:
    metrics = Metrics()
    cache = make(FakeClock(), metrics, entries=1_000)
    for number in range(200):
        cache.put(f"{number}", entry())
    assert figure(metrics, "bytes", "memory") == 100 * ONE


async def test_figures_of_several_caches_add_up_and_go_with_them() -> None:
    metrics = Metrics()
    caches = [make(FakeClock(), metrics), make(FakeClock(), metrics)]
    for cache in caches:
        cache.put("k", entry())
    assert figure(metrics, "entries", "memory") == 2
    await caches[0].close()
    assert figure(metrics, "entries", "memory") == 1
    assert figure(metrics, "bytes", "memory") == ONE


async def test_long_purge_lets_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purging, "LOOKED_AT_TOGETHER", 2)
    cache = make(FakeClock(), Metrics(), entries=10)
    for number in range(6):
        cache.put(f"{number}", entry())
    purge = asyncio.ensure_future(cache.purge(team="red"))
    await asyncio.sleep(0)
    assert [cache.get_now(f"{number}") is None for number in range(6)] == [True] * 2 + [False] * 4
    cache.put("late", entry())
    assert await purge == 6
    assert cache.get_now("late") is not None
