"""What operators see of caches, and how they have answers forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from filters.stores.cache_panel import CachePanel


class Shelf:
    """A store that says how many it forgot."""

    def __init__(self, purged: int | None) -> None:
        self.asked: list[dict[str, str]] = []
        self._purged = purged

    async def purge(self, **where: Any) -> int | None:
        self.asked.append(where)
        return self._purged

    def holds(self) -> tuple[int, int] | None:
        return None if self._purged is None else (self._purged, 100 * self._purged)


def panel(*shelves: Shelf) -> CachePanel:
    made = CachePanel()
    for shelf in shelves:
        made.add("memory", shelf)
        made.add("memory", shelf)
    return made


async def test_each_store_is_shown_once() -> None:
    shown = await panel(Shelf(1), Shelf(None)).show()
    assert shown == [{"backend": "memory", "entries": 1, "bytes": 100}, {"backend": "memory"}]


@pytest.mark.parametrize(
    ("what", "where"),
    [("all", {}), ({"team": "red"}, {"team": "red"}), ({"key": "0a"}, {"key": "0a"})],
    ids=str,
)
async def test_all_stores_are_asked_and_their_figures_added(what: Any, where: Any) -> None:
    shelves = Shelf(1), Shelf(2)
    assert await panel(*shelves).act({"purge": what}) == {"purged": 3}
    assert [shelf.asked for shelf in shelves] == [[where], [where]]


async def test_figure_is_not_known_when_one_does_not_know() -> None:
    assert await panel(Shelf(1), Shelf(None)).act({"purge": "all"}) == {"purged": None}


@pytest.mark.parametrize(
    "command",
    [
        {},
        {"purge": None},
        {"purge": "some"},
        {"purge": {}},
        {"purge": {"team": ""}},
        {"purge": {"team": 1}},
        {"purge": {"other": "x"}},
        {"purge": {"team": "a", "model": "b"}},
        {"purge": "all", "more": 1},
    ],
    ids=str,
)
async def test_command_that_is_not_understood_forgets_nothing(command: Any) -> None:
    shelf = Shelf(1)
    with pytest.raises(ValueError, match="purge"):
        await panel(shelf).act(command)
    assert shelf.asked == []
