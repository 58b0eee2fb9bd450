"""What caches keep, as operators see it, and how they have it forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sidecar.api import Panel


class Purgeable(Protocol):
    """A place where answers are kept."""

    def holds(self) -> tuple[int, int] | None:
        """Entries and bytes; None: not known here."""
        ...

    async def purge(
        self, *, key: str | None = None, team: str | None = None, model: str | None = None
    ) -> int | None:
        """Forget the entries that are all of what is given; without anything, all of them. How
        many; None: not known. Raises ValueError, for an operator to read, when it cannot be done
        now."""
        ...


class CachePanel(Panel):
    """The stores of one kind of cache; several, when teams have theirs in different places."""

    def __init__(self) -> None:
        self._stores: dict[int, tuple[str, Purgeable]] = {}
        self.purges = 0
        """How many there were: what was asked before one is not kept after it."""

    def add(self, backend: str, store: Purgeable) -> None:
        self._stores[id(store)] = (backend, store)

    async def show(self) -> Any:
        shown: list[dict[str, Any]] = []
        for backend, store in self._stores.values():
            held = store.holds()
            figures = {} if held is None else {"entries": held[0], "bytes": held[1]}
            shown.append({"backend": backend, **figures})
        return shown

    async def act(self, command: Mapping[str, Any]) -> Any:
        """`{"purge": "all"}`, or `{"purge": {"key": …}}`, `{"team": …}`, `{"model": …}`."""
        what: Any = command.get("purge")
        if set(command) != {"purge"} or not (what == "all" or _names_one(what)):
            raise ValueError(
                'write {"purge": "all"}, or {"purge": {"key": "…"}} with one of key, team, model'
            )
        self.purges += 1
        where = {} if what == "all" else what
        purged = [await store.purge(**where) for _, store in self._stores.values()]
        known = [each for each in purged if each is not None]
        return {"purged": sum(known) if len(known) == len(purged) else None}


def _names_one(what: Any) -> bool:
    return (
        isinstance(what, dict)
        and len(what) == 1
        and set(what) <= {"key", "team", "model"}
        and all(isinstance(each, str) and each for each in what.values())
    )
