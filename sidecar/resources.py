"""State that outlives a reload: pools, buckets, circuits, caches, by key."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

log = logging.getLogger(__name__)

T = TypeVar("T")


class Resources:
    """One object per key, made by whoever asks first and kept until nobody asks any more.

    Every snapshot marks the keys that it uses; when it has stopped, `drop_user` closes what no
    other uses. A resource that has a `close()` method, sync or async, is closed by it.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._users: dict[Hashable, set[int]] = {}

    def get(self, key: Hashable, make: Callable[[], T], *, user: int = 0) -> T:
        """The object under `key`; `make()` is called once, by the first who asks.

        `user` is the generation of the snapshot that asks; filters reach this through their kit,
        which fills it in.
        """
        if key not in self._made:
            self._made[key] = make()
        self._users.setdefault(key, set()).add(user)
        return cast(T, self._made[key])

    def of_kind(self, kind: str) -> dict[str, Any]:
        """What is kept under keys `(kind, name)`, by name."""
        return {
            key[1]: made
            for key, made in self._made.items()
            if isinstance(key, tuple) and len(key) == 2 and key[0] == kind
        }

    def __len__(self) -> int:
        return len(self._made)

    async def drop_user(self, user: int) -> None:
        """Forget that snapshot `user` uses anything, and close what nobody uses now."""
        for users in self._users.values():
            users.discard(user)
        unused = [key for key, users in self._users.items() if not users]
        # All of them leave at once, before the first is awaited: whoever asks for one of these
        # keys meanwhile gets a new object, and not one about to be closed.
        for key in unused:
            del self._users[key]
        await _close_all({key: self._made.pop(key) for key in unused})

    async def close(self) -> None:
        """Close everything. Idempotent."""
        made, self._made, self._users = self._made, {}, {}
        await _close_all(made)


async def _close_all(resources: dict[Hashable, object]) -> None:
    """Close them, newest first: one may use another that was there before it."""
    for key, resource in reversed(resources.items()):
        await _close(key, resource)


async def _close(key: Hashable, resource: object) -> None:
    close = getattr(resource, "close", None)
    if close is None:
        return
    try:
        result = close()
        if inspect.isawaitable(result):
            await result
    except Exception:
        log.exception("resource_close_failed", extra={"key": repr(key)})
