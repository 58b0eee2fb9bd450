"""Opens the cache of recorded answers that a configuration asks for: in memory, on disk, or shared.

This is all that filters import of it. What stands behind it is theirs not to know, except that a
`MemoryCache` answers at once (`get_now`): whoever asks it needs no coroutine.
"""

from __future__ import annotations

from typing import Literal, Protocol, Self

from pydantic import Field, model_validator

from filters.stores.entry import Entry, decode, encode, is_of, size_of
from filters.stores.memory_cache import MemoryCache
from sidecar.api import FilterConfig, Kit

__all__ = [
    "CacheStore",
    "CacheStoreSettings",
    "Entry",
    "MemoryCache",
    "decode",
    "encode",
    "is_of",
    "open_cache",
    "size_of",
]

MIB = 1 << 20


class CacheStoreSettings(FilterConfig):
    """Where answers are kept, and how many."""

    backend: Literal["memory", "disk", "redis"] = "memory"
    """`memory`: of each process; `disk`: in `data_dir`, kept through restarts; `redis`: in the
    `store`, shared."""
    max_bytes: int = Field(default=64 * MIB, ge=1)
    """Of all answers together; of each process with `memory`. The server's own bound holds for
    `redis` instead."""
    max_entries: int = Field(default=10_000, ge=1)
    """As `max_bytes`."""
    max_entry_bytes: int = Field(default=MIB, ge=1)
    """A larger answer is not kept."""
    bloom: bool = False
    """A filter in memory spares looks for what is surely not there; for `disk` and `redis`. What
    another process has put may be missed for some seconds. Needs the extra `[bloom]`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_entry_bytes > self.max_bytes:
            raise ValueError("max_entry_bytes must not be more than max_bytes")
        if self.bloom and self.backend == "memory":
            raise ValueError("bloom is for the backends disk and redis: memory answers at once")
        return self


class CacheStore(Protocol):
    """Recorded answers by key, each until it expires. Keys are short and of ASCII: digests."""

    async def get(self, key: str) -> Entry | None:
        """The entry. Never raises: a failure is a miss, and counted."""
        ...

    def put(self, key: str, entry: Entry) -> None:
        """Keep it, beside the calls; a `get` that follows finds it. Never raises, never waits: what
        is too large, or too much, is dropped and counted."""
        ...

    async def purge(
        self, *, key: str | None = None, team: str | None = None, model: str | None = None
    ) -> int | None:
        """Forget the entries that are all of what is given; without anything, all of them. How
        many; None: not known. Raises ValueError, for an operator to read, when it cannot be done
        now."""
        ...

    def holds(self) -> tuple[int, int] | None:
        """Entries and bytes; None: not known here."""
        ...

    async def close(self) -> None:
        """For the kit's resources, whose it is."""
        ...


def open_cache(kit: Kit, settings: CacheStoreSettings) -> CacheStore:
    """The cache of these settings; the same for all teams of the process, and through reloads.

    It may open a file: call it in `start`. Raises ValueError when the configuration names no
    `data_dir` for `disk`, or no `store` for `redis`; RuntimeError when a package that is asked for
    is not installed; OSError when the file cannot be used.
    """
    get, clock, metrics = kit.resources.get, kit.clock, kit.metrics
    key = ("cache", settings)
    if settings.backend == "memory":
        return get(key, lambda: MemoryCache(settings, clock, metrics))
    # Only when it is asked for: what one backend needs the others do not load.
    if settings.backend == "disk":
        from filters.stores.disk_cache import FILE, SCHEMA, DiskCache
        from filters.stores.sqlite import open_database

        if kit.data_dir is None:
            raise ValueError(
                "cache: the backend disk needs a directory: set `data_dir`, "
                "or choose the backend memory"
            )
        # Asked for each time, not only when the cache is made: as long as it is used, so are these.
        database = open_database(kit, FILE, SCHEMA, replace_broken=True)
        return get(
            (*key, database),
            lambda: DiskCache(
                database,
                settings,
                clock,
                metrics,
                processes=kit.workers,
                has_bloom=settings.bloom,
            ),
        )
    from filters.stores.redis_cache import RedisCache, open_cache_redis

    redis = open_cache_redis(kit)
    return get(
        (*key, redis),
        lambda: RedisCache(
            redis, settings, clock, metrics, processes=kit.workers, has_bloom=settings.bloom
        ),
    )
