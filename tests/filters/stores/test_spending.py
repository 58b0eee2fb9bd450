"""Which store a configuration gets for its budgets, and how operators see them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from filters.stores.memory_spending import MemorySpending
from filters.stores.redis_spending import RedisSpending
from filters.stores.spending import BudgetPanel, open_spending
from sidecar.api import CallFilter, Kit, Secret, StoreAddress
from tests.support.harness import Harness
from tests.support.valkey import Valkey


def kit_of(harness: Harness) -> Kit:
    return harness.filters[0].kit


async def test_without_a_place_to_keep_them_they_are_in_memory() -> None:
    async with Harness(CallFilter) as harness:
        found = open_spending(kit_of(harness))
        assert isinstance(found, MemorySpending)
        assert not found.is_kept
        assert open_spending(kit_of(harness)) is found


async def test_with_a_data_directory_they_are_in_a_file(tmp_path: Path) -> None:
    async with Harness(CallFilter, data_dir=tmp_path, workers=4) as harness:
        found = open_spending(kit_of(harness))
        assert repr(found) == "<MemorySpending budgets.db accounts=0>"
        assert isinstance(found, MemorySpending)
        assert found.sharers == 1
        assert open_spending(kit_of(harness)) is found
    assert (tmp_path / "budgets.db").exists()


async def test_a_shared_store_goes_before_the_file(valkey: Valkey, tmp_path: Path) -> None:
    store = StoreAddress(Secret(valkey.url), f"test-{tmp_path.name}")
    async with Harness(CallFilter, store=store, data_dir=tmp_path) as harness:
        found = open_spending(kit_of(harness))
        assert isinstance(found, RedisSpending)
        await found.load()
        assert open_spending(kit_of(harness)) is found
    assert os.listdir(tmp_path) == []


async def test_a_file_that_is_no_database_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "budgets.db").write_bytes(b"what was spent" * 100)
    async with Harness(CallFilter, data_dir=tmp_path) as harness:
        with pytest.raises(OSError, match=r"budgets\.db cannot be used"):
            open_spending(kit_of(harness))
    assert (tmp_path / "budgets.db").read_bytes().startswith(b"what was spent")


# The panel


def row(team: str, budget: str, spent: int) -> Mapping[str, Any]:
    return {"team": team, "counted": f"team {team}", "budget": budget, "then": "refuse", "n": spent}


async def test_panel_shows_all_teams_in_order_and_the_newest_configuration_of_each() -> None:
    panel = BudgetPanel()

    def shower(*rows: Mapping[str, Any]) -> Any:
        async def show() -> Sequence[Mapping[str, Any]]:
            return rows

        return show

    panel.shows("old", shower(row("b", "usd_per_day", 1), row("b", "usd_per_month", 1)))
    panel.shows("other", shower(row("a", "usd_per_day", 1)))
    panel.shows("new", shower(row("b", "usd_per_day", 2)))
    assert await panel.show() == [
        row("a", "usd_per_day", 1),
        row("b", "usd_per_day", 2),
        row("b", "usd_per_month", 1),
    ]
    panel.forget("old")
    panel.forget("old")
    assert await panel.show() == [row("a", "usd_per_day", 1), row("b", "usd_per_day", 2)]


async def test_panel_takes_no_commands() -> None:
    with pytest.raises(ValueError, match="change the limits in the configuration"):
        await BudgetPanel().act({})
