"""What the caches of recorded answers have in common: an aiocache, its bounds and its figures.

Each is an `aiocache.BaseCache` whose values are entries, so that aiocache's interface, its plugins
and its switch (`AIOCACHE_DISABLE`) hold for it. Of aiocache's own backends none is used: the one in
memory has no bound, and starts a timer for each key that its `clear` forgets to cancel; the one for
Redis opens pools of its own and clears by KEYS, which blocks the server. No operation has a
time-out by `wait_for` (three times the cost); a backend that waits has a bound of its own.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Protocol

from filters.stores.entry import Entry, size_of

# aiocache loads the clients of its own backends when they are installed, and we use none of these:
# 45 ms and 5 MB of every start.
_clients = [name for name in ("redis", "aiomcache") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_clients))  # type: ignore[arg-type]  # None: cannot be imported
try:
    from aiocache.base import BaseCache  # type: ignore[import-untyped]
    from aiocache.serializers import NullSerializer  # type: ignore[import-untyped]
finally:
    for _name in _clients:
        del sys.modules[_name]

from sidecar.api import Clock, Metrics  # noqa: E402


class Bounds(Protocol):
    """How much a cache may keep."""

    @property
    def max_bytes(self) -> int: ...
    @property
    def max_entries(self) -> int: ...
    @property
    def max_entry_bytes(self) -> int: ...


class Tally:
    """The figures of one cache."""

    def __init__(self, metrics: Metrics, backend: str, processes: int = 1) -> None:
        """`processes`: so many keep one cache together and say each its part of what is in it,
        since gauges add up."""
        self._entries = metrics.gauge(
            "llm_sidecar_cache_entries", "Answers that are kept.", ["backend"]
        ).child(backend)
        self._bytes = metrics.gauge(
            "llm_sidecar_cache_bytes", "Bytes that they are counted with.", ["backend"]
        ).child(backend)
        self._evictions = metrics.counter(
            "llm_sidecar_cache_evictions",
            "Answers that made room for others before their time.",
            ["backend"],
        ).child(backend)
        self._dropped = metrics.counter(
            "llm_sidecar_cache_dropped",
            "Answers that were not kept: too_large; busy: too much was waiting; down: the store is "
            "away or refuses; failed: could not be written.",
            ["backend", "reason"],
        )
        self._errors = metrics.counter(
            "llm_sidecar_cache_errors",
            "Looks into the cache that failed, and entries found damaged; all of them misses.",
            ["backend"],
        ).child(backend)
        self._backend = backend
        self._processes = processes
        self._said = (0, 0)

    def holds(self, entries: int, of_bytes: int) -> None:
        """So much is in it now."""
        said_entries, said_bytes = self._said
        if entries != said_entries:
            self._entries.inc((entries - said_entries) / self._processes)
        if of_bytes != said_bytes:
            self._bytes.inc((of_bytes - said_bytes) / self._processes)
        self._said = entries, of_bytes

    def evicted(self, entries: int) -> None:
        self._evictions.inc(entries)

    def dropped(self, reason: str) -> None:
        self._dropped.child(self._backend, reason).inc()

    def failed(self) -> None:
        self._errors.inc()


class EntryCache(BaseCache):  # type: ignore[misc]
    """A `CacheStore`, and an aiocache. A backend says how it looks, keeps and purges.

    `get`, `set`, `add`, `exists`, `delete`, `clear`, their `multi_` forms and `close` are
    aiocache's. An entry has its own end; a `ttl` that is given counts instead. What has no meaning
    for entries (`increment`, `expire`, `raw`) raises NotImplementedError, as aiocache has it.
    """

    BACKEND: ClassVar[str]

    def __init__(self, bounds: Bounds, clock: Clock, tally: Tally) -> None:
        super().__init__(serializer=NullSerializer(), timeout=0)
        self._max_entry_bytes = min(bounds.max_entry_bytes, bounds.max_bytes)
        self._clock = clock
        self._tally = tally

    # What a backend does

    async def _look(self, key: str) -> Entry | None:
        """The entry whose time is not up. Never raises."""
        raise NotImplementedError

    def _keep(self, key: str, entry: Entry, size: int) -> bool:
        """Keep it, beside the calls; False, with a reason in the tally: it will not be."""
        raise NotImplementedError

    async def purge(
        self, *, key: str | None = None, team: str | None = None, model: str | None = None
    ) -> int | None:
        """Forget the entries that are all of what is given; without anything, all entries. How
        many; None: not known. Raises ValueError, for an operator to read, when it cannot be done
        now."""
        raise NotImplementedError

    # Keeping

    def put(self, key: str, entry: Entry) -> None:
        """Keep the entry until it expires, or others need the room. Never waits, never raises:
        what is too large, or too much, is dropped and counted."""
        self._offer(key, entry)

    def _offer(self, key: str, entry: Entry) -> bool:
        size = size_of(entry)
        if size > self._max_entry_bytes:
            self._tally.dropped("too_large")
            return False
        return entry.expires_at > self._clock.wall() and self._keep(key, entry, size)

    # As aiocache calls it

    async def _get(self, key: str, encoding: Any = None, _conn: Any = None) -> Entry | None:
        return await self._look(key)

    async def _multi_get(
        self, keys: list[str], encoding: Any = None, _conn: Any = None
    ) -> list[Entry | None]:
        return [await self._look(key) for key in keys]

    async def _set(
        self,
        key: str,
        value: Entry,
        ttl: float | None = None,
        _cas_token: Any = None,
        _conn: Any = None,
    ) -> bool:
        if ttl is not None:
            value = value._replace(expires_at=self._clock.wall() + ttl)
        return self._offer(key, value)

    async def _multi_set(
        self, pairs: list[tuple[str, Entry]], ttl: float | None = None, _conn: Any = None
    ) -> bool:
        return all([await self._set(key, value, ttl) for key, value in pairs])

    async def _add(
        self, key: str, value: Entry, ttl: float | None = None, _conn: Any = None
    ) -> bool:
        if await self._look(key) is not None:
            raise ValueError(f"there is an entry {key} already")
        return await self._set(key, value, ttl)

    async def _exists(self, key: str, _conn: Any = None) -> bool:
        return await self._look(key) is not None

    async def _delete(self, key: str, _conn: Any = None) -> int:
        return await self.purge(key=key) or 0

    async def _clear(self, namespace: str | None = None, _conn: Any = None) -> bool:
        if namespace is not None:
            raise ValueError("entries have no namespaces: purge by team or model")
        await self.purge()
        return True
