"""A cache is opened as it is configured, once for all teams, and lives through reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from filters.stores.cache import CacheStore, CacheStoreSettings, MemoryCache, open_cache
from filters.stores.disk_cache import DiskCache
from filters.stores.redis_cache import RedisCache
from sidecar.api import Filter, Kit, Secret
from sidecar.filter import KitResources, StoreAddress
from tests.support.cached import entry
from tests.support.harness import Harness
from tests.support.valkey import Valkey

pytestmark = pytest.mark.usefixtures("patience")


def kit_of(harness: Harness, generation: int = 1) -> Kit:
    """The kit that a snapshot's filters get."""
    made = harness._make(Filter).kit
    changes = {name: getattr(made, name) for name in Kit.__dataclass_fields__}
    return Kit(**changes | {"resources": KitResources(harness.resources, generation)})


def opened(harness: Harness, generation: int = 1, **settings: Any) -> CacheStore:
    return open_cache(kit_of(harness, generation), CacheStoreSettings.model_validate(settings))


async def test_memory_is_the_default_and_one_for_the_same_bounds() -> None:
    async with Harness() as harness:
        cache = opened(harness)
        assert isinstance(cache, MemoryCache)
        assert opened(harness) is cache
        assert opened(harness, max_entries=5) is not cache


async def test_cache_on_disk_survives_reloads_and_restarts(tmp_path: Path) -> None:
    async with Harness(data_dir=tmp_path) as harness:
        cache = opened(harness, 1, backend="disk")
        assert isinstance(cache, DiskCache)
        cache.put("k", entry())
        assert opened(harness, 2, backend="disk") is cache
        await harness.resources.drop_user(1)
        cache.put("l", entry())
        harness.clock.turn(10.0)
        assert await cache.get("k") == entry()  # the file is still open
        wider = opened(harness, 3, backend="disk", max_entries=50)
        await harness.resources.drop_user(2)
        assert await wider.get("l") == entry()
    async with Harness(data_dir=tmp_path) as harness:
        assert await opened(harness, backend="disk").get("k") == entry()
    assert (tmp_path / "cache.db").stat().st_mode & 0o777 == 0o600


async def test_damaged_file_does_not_keep_the_sidecar_from_starting(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"not a database, really" * 1_000)
    async with Harness(data_dir=tmp_path) as harness:
        cache = opened(harness, backend="disk")
        cache.put("k", entry())
        assert await cache.get("k") == entry()
    assert (tmp_path / "cache.db.broken").exists()


async def test_cache_in_the_store_has_a_connection_of_its_own(valkey: Valkey) -> None:
    store = StoreAddress(Secret(valkey.url), "open-cache")
    async with Harness(store=store) as harness:
        cache = opened(harness, 1, backend="redis")
        assert isinstance(cache, RedisCache)
        cache.put("k", entry())
        assert await cache.get("k") == entry()
        assert opened(harness, 2, backend="redis") is cache
        await harness.resources.drop_user(1)
        assert await cache.get("k") == entry()
        names = {family["name"] for family in harness.metrics.snapshot()}
        assert "llm_sidecar_cache_store_up" in names
        assert "llm_sidecar_store_up" not in names
        # It is no replica among those that divide the limits.
        assert valkey.command("EXISTS", "open-cache:replicas") == b":0\r\n"


async def test_backends_without_their_place_say_which_setting_is_missing() -> None:
    async with Harness() as harness:
        with pytest.raises(ValueError, match="set `data_dir`"):
            opened(harness, backend="disk")
        with pytest.raises(ValueError, match="set `store: redis"):
            opened(harness, backend="redis")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bytes": 10}, "max_entry_bytes must not be more than max_bytes"),
        ({"bloom": True}, "bloom is for the backends disk and redis"),
        ({"backend": "memcached"}, "memory"),
        ({"max_entries": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CacheStoreSettings.model_validate(settings)


async def test_bloom_filter_is_used_when_it_is_asked_for(tmp_path: Path) -> None:
    async with Harness(data_dir=tmp_path) as harness:
        cache = opened(harness, backend="disk", bloom=True)
        assert await cache.get("none") is None
        names = {family["name"] for family in harness.metrics.snapshot()}
        assert "llm_sidecar_cache_bloom" in names
