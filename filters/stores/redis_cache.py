"""Recorded answers on a Redis or Valkey, shared by all processes that have the same store.

The connection is the cache's own: an answer of a megabyte must not hold up the limits. While the
server is away a look is a miss, at once, and what is put is dropped; it heals by itself. An entry
leaves by the server's own clock; how much there may be of all of them is the server's to bound
(`maxmemory` and `maxmemory-policy`: allkeys-lru, for instance), here only the single one is.

Purging by team or model takes one command, however many entries there are: the purge is numbered,
every entry knows the number of the last purge before it, and who reads compares (cache_get.lua).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from filters.stores.bloom import Page, SureMisses
from filters.stores.entry import VERSION, Entry, decode, encode
from filters.stores.entry_cache import Bounds, EntryCache, Tally
from filters.stores.redis import Argument, Redis, Script, StoreDown
from sidecar.api import Clock, Kit, Metrics

MAX_WAITING = 256
MAX_WAITING_BYTES = 4 << 20
"""Of what is put and not confirmed yet; more is dropped. Whoever looks waits behind it, and a
server counts as away after 45 ms."""
KEYS_IN_A_PAGE = 1_000


class _OwnNames(Metrics):
    """The figures of a connection under the cache's names, apart from those of the limits'."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Any:
        return self._metrics.counter(_own(name), help_text, labels)

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Any:
        return self._metrics.gauge(_own(name), help_text, labels)


def _own(name: str) -> str:
    return name.replace("_store_", "_cache_store_")


def open_cache_redis(kit: Kit) -> Redis:
    """The cache's own connection to the store, which must be named. Raises RuntimeError when the
    package for it is not installed."""
    store = kit.store
    url = store.url
    if url is None:
        raise ValueError(
            "cache: the backend redis needs a store: set `store: redis://HOST:PORT/DB`, "
            "or choose the backend memory or disk"
        )
    redis = kit.resources.get(
        ("redis", store, "cache"),
        # Its prefix keeps it from being counted as one more replica among those of the limits.
        lambda: Redis(url, f"{store.prefix}:cache", _OwnNames(kit.metrics), ca_file=store.ca_file),
    )
    redis.connect_soon()
    return redis


class RedisCache(EntryCache):
    """See the module's docstring."""

    BACKEND = NAME = "redis"

    def __init__(
        self,
        redis: Redis,
        bounds: Bounds,
        clock: Clock,
        metrics: Metrics,
        *,
        processes: int = 1,
        has_bloom: bool = False,
    ) -> None:
        super().__init__(bounds, clock, Tally(metrics, self.BACKEND))
        self._redis = redis
        self._get_script = Script.of("cache_get.lua")
        self._put_script = Script.of("cache_marks.lua", "cache_put.lua")
        self._purge_script = Script.of("cache_marks.lua", "cache_purge.lua")
        self._keys_script = Script.of("cache_keys.lua")
        self._names = f"{redis.prefix}:{VERSION}:"
        self._pattern = re.sub(r"([*?\[\]\\])", r"\\\1", self._names) + "*"
        self._marks = f"{redis.prefix}:marks"
        self._waiting = 0
        self._waiting_bytes = 0
        self._sure: SureMisses | None = None
        if has_bloom:
            self._sure = SureMisses(
                self._list_keys, clock, metrics, backend=self.BACKEND, processes=processes
            )

    async def _look(self, key: str) -> Entry | None:
        if self._sure is not None and self._sure.is_absent(key):
            return None
        try:
            data = await self._redis.run(self._get_script, [self._names + key, self._marks])
        except StoreDown:
            self._tally.failed()
            return None
        entry = None
        if data is not None:
            entry = decode(data)
            if entry is None:
                self._tally.failed()
            elif entry.expires_at <= self._clock.wall():
                entry = None
        elif self._sure is not None:
            self._sure.was_in_vain()
        return entry

    def _keep(self, key: str, entry: Entry, size: int) -> bool:
        if self._waiting >= MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_BYTES:
            self._tally.dropped("busy")
            return False
        try:
            data = encode(entry)
        except ValueError:
            self._tally.dropped("failed")
            return False
        life_ms = max(1, round(1000 * (entry.expires_at - self._clock.wall())))

        def done(answer: Any) -> None:
            self._waiting -= 1
            self._waiting_bytes -= size
            if isinstance(answer, StoreDown):
                self._tally.dropped("down")

        try:
            self._redis.call(
                self._put_script,
                [self._names + key, self._marks],
                [
                    *(life_ms, _mark(entry.team, None), _mark(None, entry.model)),
                    *(_mark(entry.team, entry.model), data),
                ],
                done,
            )
        except StoreDown:
            self._tally.dropped("down")
            return False
        self._waiting += 1
        self._waiting_bytes += size
        if self._sure is not None:
            self._sure.add(key)
        return True

    async def purge(
        self, *, key: str | None = None, team: str | None = None, model: str | None = None
    ) -> int | None:
        keys = [f"{self._names}{key or ''}", self._marks]
        args: list[Argument] = [_mark(team, model)]
        if key is not None:
            args.append(1)
        try:
            purged: int = await self._redis.run(self._purge_script, keys, args)
        except StoreDown:
            raise ValueError("the cache's store does not answer: try again") from None
        return None if purged < 0 else purged

    async def _list_keys(self, cursor: str | None) -> Page | None:
        args: list[Argument] = [cursor or "0", self._pattern, KEYS_IN_A_PAGE]
        try:
            there, found = await self._redis.run(self._keys_script, [], args)
        except StoreDown:
            return None
        keys = [each.decode(errors="replace")[len(self._names) :] for each in found]
        return Page(keys, None if there == b"0" else there.decode())

    async def _close(self, *args: object, _conn: object = None, **kwargs: object) -> None:
        """The connection is closed by whoever opened it."""
        if self._sure is not None:
            await self._sure.close()

    def holds(self) -> None:
        return None  # the server is shared with others

    def __repr__(self) -> str:
        return f"<RedisCache {self._redis.address} waiting={self._waiting}>"


def _mark(team: str | None, model: str | None) -> str:
    """The name under which a purge of these is numbered."""
    if team is None and model is None:
        return "all"
    if model is None:
        return f"team:{team}"
    if team is None:
        return f"model:{model}"
    return f"both:{len(team)}:{team}:{model}"
