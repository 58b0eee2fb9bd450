"""Forgetting recorded answers that are in the memory of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from filters.stores.entry import Entry, is_of

LOOKED_AT_TOGETHER = 500
"""Entries that a purge looks at before the calls have their turn."""


class Kept(Protocol):
    """Entries by key."""

    def keys(self) -> Sequence[str]: ...
    def peek(self, key: str) -> Entry | None: ...
    def pop(self, key: str) -> Entry | None: ...


async def purge(kept: Kept, key: str | None, team: str | None, model: str | None) -> int:
    """Forget what is under `key`, of `team` and of `model` (None: any); how many there were."""
    purged = 0
    for number, each in enumerate(kept.keys() if key is None else [key], 1):
        entry = kept.peek(each)
        if entry is not None and is_of(entry, team, model):
            kept.pop(each)
            purged += 1
        if number % LOOKED_AT_TOGETHER == 0:
            await asyncio.sleep(0)
    return purged
