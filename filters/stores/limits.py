"""Opens the limits that a configuration asks for: of this process, or shared with others.

This is all that filters import of limits. What stands behind it is theirs not to know, except that
a `MemoryMeter` answers at once (`take_now`): whoever asks it needs no coroutine.
"""

from __future__ import annotations

from filters.stores.memory_limits import MemoryLimits, MemoryMeter
from filters.stores.rules import Grant, Limits, Meter, Rated, Refusal, Rule, Slot, WhenDown
from sidecar.api import Kit

__all__ = [
    "Grant",
    "Limits",
    "MemoryMeter",
    "Meter",
    "Rated",
    "Refusal",
    "Rule",
    "Slot",
    "WhenDown",
    "open_limits",
]


def open_limits(kit: Kit, when_store_is_down: WhenDown) -> Limits:
    """The counts of this process, or those that it shares through the store; the same for all
    filters, and through reloads.

    Never waits longer than 50 ms, and never fails because the store is away: then
    `when_store_is_down` holds, and with `closed` that is a `Rejected`. Raises RuntimeError when
    the package for the store is not installed.
    """
    get = kit.resources.get
    if kit.store.url is None:
        return get(("limits", "memory"), lambda: MemoryLimits(kit.clock, kit.workers))
    # Only when it is asked for: what one process does not need it does not load.
    from filters.stores.fallback_limits import FallbackLimits
    from filters.stores.redis import open_redis
    from filters.stores.redis_limits import RedisLimits

    redis = open_redis(kit)
    local = get(("limits", "local share", kit.store), lambda: MemoryLimits(kit.clock))
    shared = get(("limits", "shared", kit.store), lambda: RedisLimits(redis))
    fallbacks = kit.metrics.counter(
        "llm_sidecar_store_fallbacks",
        "Decisions that were made without the shared store, as it was away.",
        ["use", "answer"],
    ).child("limits", when_store_is_down)

    def sharers() -> int:
        # Every worker is a replica, too. Before the first answer we know of our own only.
        return max(redis.replicas, kit.workers)

    return FallbackLimits(shared, local, sharers, when_store_is_down, fallbacks)
