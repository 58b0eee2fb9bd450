"""Shared limits while their store answers, and the configured answer while it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from filters.stores.memory_limits import MemoryLimits, MemoryMeter
from filters.stores.redis import StoreDown
from filters.stores.redis_limits import RedisLimits, RedisMeter
from filters.stores.rules import Grant, Rated, Refusal, Slot, WhenDown
from sidecar.api import Counter, Rejected


class FallbackMeter:
    """What one kind of calls takes: on the server, or here while that is away."""

    __slots__ = ("_limits", "_local", "_shared")

    def __init__(self, limits: FallbackLimits, shared: RedisMeter, local: MemoryMeter) -> None:
        self._limits = limits
        self._shared = shared
        self._local = local

    async def take(self, amounts: Sequence[int]) -> Grant | Refusal:
        try:
            return await self._shared.take(amounts)
        except StoreDown:
            pass
        return self._limits.fall_back(self._local, amounts)


class FallbackLimits:
    """Never waits longer than 50 ms, and never fails because the store is away.

    A grant knows where it was taken and goes back there. The local share counts from zero when the
    store goes away, and what it counted is not told the store afterwards: around such a moment a
    process may grant its share of the limit once more.
    """

    def __init__(
        self,
        shared: RedisLimits,
        local: MemoryLimits,
        sharers: Callable[[], int],
        when_store_is_down: WhenDown,
        fallbacks: Counter,
    ) -> None:
        """`sharers`: how many processes divide a limit while the store is away."""
        self._shared = shared
        self._local = local
        self._sharers = sharers
        self._when_down = when_store_is_down
        self._fallbacks = fallbacks

    def meter(self, rated: Sequence[Rated], slots: Sequence[Slot] = ()) -> FallbackMeter:
        return FallbackMeter(
            self, self._shared.meter(rated, slots), self._local.meter(rated, slots)
        )

    def fall_back(self, meter: MemoryMeter, amounts: Sequence[int]) -> Grant | Refusal:
        """Decide without the store, as it was configured."""
        self._fallbacks.inc()
        if self._when_down == "local_share":
            self._local.divide(self._sharers())
            return meter.take_now(amounts)
        if self._when_down == "open":
            return Grant()
        message = "the store that limits are counted in is away; try again in a second"
        raise Rejected(503, "store_unavailable", message, retry_after_s=1.0)

    def __repr__(self) -> str:
        return f"<FallbackLimits {self._shared!r} when_store_is_down={self._when_down}>"
