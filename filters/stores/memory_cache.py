"""Recorded answers in the memory of this process: half a microsecond a look."""

from __future__ import annotations

from filters.algo.lru import Lru
from filters.stores.entry import Entry
from filters.stores.entry_cache import Bounds, EntryCache, Tally
from filters.stores.purge import purge
from sidecar.api import Clock, Metrics


class MemoryCache(EntryCache):
    """Entries as they are, not encoded; those used last, by count and by bytes."""

    BACKEND = NAME = "memory"

    def __init__(self, bounds: Bounds, clock: Clock, metrics: Metrics) -> None:
        super().__init__(bounds, clock, Tally(metrics, self.BACKEND))
        self._monotonic = clock.monotonic
        self._lru: Lru[Entry] = Lru(bounds.max_bytes, bounds.max_entries)

    def get_now(self, key: str) -> Entry | None:
        """As `get`, at once: nothing to wait for."""
        return self._lru.get(key, self._monotonic())

    async def _look(self, key: str) -> Entry | None:
        return self._lru.get(key, self._monotonic())

    def _keep(self, key: str, entry: Entry, size: int) -> bool:
        # By the clock that never jumps: what is left of its life is known now.
        now = self._monotonic()
        due = now + entry.expires_at - self._clock.wall()
        evicted = self._lru.put(key, entry, size, due, now)
        if evicted:
            self._tally.evicted(evicted)
        self._say()
        return True

    async def purge(
        self, *, key: str | None = None, team: str | None = None, model: str | None = None
    ) -> int | None:
        purged = await purge(self._lru, key, team, model)
        self._say()
        return purged

    async def _close(self, *args: object, _conn: object = None, **kwargs: object) -> None:
        self._lru.clear()
        self._say()

    def holds(self) -> tuple[int, int]:
        return len(self._lru), self._lru.bytes

    def __len__(self) -> int:
        return len(self._lru)

    def _say(self) -> None:
        self._tally.holds(len(self._lru), self._lru.bytes)

    def __repr__(self) -> str:
        return f"<MemoryCache entries={len(self._lru)} bytes={self._lru.bytes}>"
