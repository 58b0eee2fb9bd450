"""Which keys are surely not in a cache that is not in our memory: such a look costs no round trip.

The cache may be filled by other processes, too, of which a filter in this one cannot know. So it is
made anew from the keys that are there, again and again, in a task beside the calls; that also makes
it forget keys that are gone, and lets it grow. Until it was made once, and when it could not be
made for a while, nothing is sure. What is wrong meanwhile is wrong to one side only: an answer that
another process has just put may be missed until the next making. Never is a wrong one found.

rbloom keeps the bits, in Rust: 0.04 µs a look, 0.08 a key that is added. Those written in Python
hash every key several times by hashlib. Bits on the server, in a Redis with such a module, would
cost the very round trip that is to be spared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from math import exp, inf, log
from typing import TYPE_CHECKING, Any, NamedTuple

from sidecar.api import Clock, Metrics

if TYPE_CHECKING:
    from rbloom import Bloom

RATE = 0.01
"""So many looks for a key that is not there go there in vain, at most."""
LEAST_KEYS = 4_096
"""The smallest filter has room for so many: 5 KB."""
PAUSE_S = 5.0
"""Between two makings: so long, and a little, another process's answers may be missed ..."""
PAUSE_FACTOR = 100.0
"""... or so many times what a making takes: it may cost a hundredth of the time."""
STALE_AFTER = 4.0
"""Not made anew for so many pauses, it is sure of nothing."""


class Page(NamedTuple):
    """Some of the keys that are there, and where to go on; None: these were the last."""

    keys: list[str]
    cursor: Any


ListKeys = Callable[[Any], Awaitable[Page | None]]
"""Gives the page at a cursor, the first one for None; no page: the cache cannot be read now."""


class SureMisses:
    """Says of a key that it is surely not there. See the module's docstring."""

    def __init__(
        self,
        list_keys: ListKeys,
        clock: Clock,
        metrics: Metrics,
        *,
        backend: str,
        processes: int,
    ) -> None:
        """Raises RuntimeError when the package rbloom is not installed."""
        try:
            from rbloom import Bloom
        except ImportError:
            raise RuntimeError(
                "the cache's Bloom filter needs the package rbloom: "
                "pip install 'llm-sidecar[bloom]', or remove `bloom: true`"
            ) from None
        self._make = Bloom
        self._list_keys = list_keys
        self._clock = clock
        self._processes = processes
        self._room = LEAST_KEYS
        self._bloom: Bloom | None = None
        self._growing: Bloom | None = None
        self._keys = 0.0  # in it, about
        self._sure_until = -inf
        self._wake = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._is_closed = False
        looks = metrics.counter(
            "llm_sidecar_cache_bloom",
            "Looks for keys: sure_miss spared a round trip; maybe did not; false_positive: one of "
            "those found nothing.",
            ["result"],
        )
        self._sure_misses = looks.child("sure_miss")
        self._maybes = looks.child("maybe")
        self._false_positives = looks.child("false_positive")
        self._rate = metrics.gauge(
            "llm_sidecar_cache_bloom_false_positive_rate",
            "Of looks for keys that are not there, the part expected to go there in vain; the mean "
            "of all workers.",
            ["backend"],
        ).child(backend)

    def is_absent(self, key: str) -> bool:
        """Whether the key is surely not there, as far as was known lately."""
        if self._keeper is None:
            self._begin()
        bloom = self._bloom
        if bloom is None or key in bloom or self._clock.monotonic() > self._sure_until:
            self._maybes.inc()
            return False
        self._sure_misses.inc()
        return True

    def was_in_vain(self) -> None:
        """The key that was not surely absent was not there."""
        self._false_positives.inc()

    def add(self, key: str) -> None:
        """It will be there in a moment."""
        if self._keeper is None:
            self._begin()
        for bloom in (self._bloom, self._growing):
            if bloom is not None:
                bloom.add(key)
        self._keys += 1
        if self._keys > self._room:
            self._wake.set()
        self._say_rate()

    async def close(self) -> None:
        self._is_closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))
        self._rate.set(0.0)

    # Making it

    def _begin(self) -> None:
        if not self._is_closed:
            loop = asyncio.get_running_loop()
            self._keeper = loop.create_task(self._make_again(), name="cache: sure misses")

    async def _make_again(self) -> None:
        while True:
            self._wake.clear()
            begun_at = self._clock.monotonic()
            is_made = await self._make_anew()
            if is_made and self._keys > self._room:
                self._room = 2 * round(self._keys)
                continue
            pause_s = max(PAUSE_S, PAUSE_FACTOR * (self._clock.monotonic() - begun_at))
            if is_made:
                self._sure_until = begun_at + STALE_AFTER * pause_s
            timer = self._clock.call_later(pause_s, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()

    async def _make_anew(self) -> bool:
        """A filter of the keys that are there now; False: they could not be read."""
        self._growing = bloom = self._make(self._room, RATE)
        try:
            page = await self._list_keys(None)
            while page is not None:
                bloom.update(page.keys)
                if page.cursor is None:
                    self._bloom = bloom
                    self._keys = bloom.approx_items
                    self._say_rate()
                    return True
                page = await self._list_keys(page.cursor)
            return False
        finally:
            self._growing = None

    def _say_rate(self) -> None:
        """The chance that all bits of a key are set by others (Bloom 1970)."""
        bits_a_key = -log(RATE) / log(2) ** 2
        hashes = bits_a_key * log(2)
        filled = 1.0 - exp(-hashes * self._keys / (bits_a_key * self._room))
        self._rate.set(float(filled**hashes) / self._processes)

    def __repr__(self) -> str:
        state = "unsure" if self._bloom is None else f"keys={self._keys:.0f}"
        return f"<SureMisses {state} room={self._room}>"
