"""State by key: made once, kept while used, closed when nobody uses it."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.resources import Resources


class Pool:
    def __init__(self, name: str = "", closed: list[str] | None = None) -> None:
        self.name = name
        self.closed = [] if closed is None else closed

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed.append(self.name)


async def test_who_asks_for_the_same_key_gets_the_same_object() -> None:
    resources = Resources()
    first = resources.get("a", Pool, user=1)
    assert resources.get("a", Pool, user=2) is first
    assert resources.get("b", Pool, user=2) is not first
    assert len(resources) == 2


async def test_what_is_of_a_kind_is_found_by_name_while_somebody_uses_it() -> None:
    resources = Resources()
    circuits = resources.get(("panel", "circuits"), Pool, user=1)
    limits = resources.get(("panel", "limits"), Pool, user=2)
    for other in (("pool", "openai"), ("panel",), ("panel", "a", "b"), "panel"):
        resources.get(other, Pool, user=1)
    assert resources.of_kind("panel") == {"circuits": circuits, "limits": limits}
    assert resources.of_kind("none") == {}
    resources.of_kind("panel").clear()
    await resources.drop_user(1)
    assert resources.of_kind("panel") == {"limits": limits}
    assert circuits.closed == [""]


async def test_an_object_is_closed_when_its_last_user_leaves() -> None:
    resources = Resources()
    pool = resources.get("a", lambda: Pool("a"), user=1)
    resources.get("a", Pool, user=2)
    await resources.drop_user(1)
    assert pool.closed == []
    await resources.drop_user(2)
    assert pool.closed == ["a"]
    assert len(resources) == 0


async def test_a_sync_close_and_none_at_all_are_fine() -> None:
    class Sync:
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    resources = Resources()
    sync = resources.get("sync", Sync)
    resources.get("none", dict)
    await resources.close()
    assert sync.is_closed


async def test_the_newest_is_closed_first() -> None:
    resources, closed = Resources(), list[str]()
    for name in ("provider", "pool"):
        resources.get(name, lambda name=name: Pool(name, closed), user=1)  # type: ignore[misc]
    await resources.drop_user(1)
    assert closed == ["pool", "provider"]


async def test_a_key_asked_for_while_others_are_closed_is_not_closed_under_its_new_user() -> None:
    resources = Resources()
    again: Pool | None = None

    class AsksAgain(Pool):
        async def close(self) -> None:
            nonlocal again
            again = resources.get("older", Pool, user=2)
            await super().close()

    resources.get("older", Pool, user=1)
    resources.get("newer", AsksAgain, user=1)
    await resources.drop_user(1)
    assert again is not None
    assert again.closed == []
    assert resources.get("older", Pool, user=2) is again


async def test_a_close_that_fails_is_logged_and_keeps_no_other_from_closing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        def close(self) -> None:
            raise OSError("stuck")

    resources = Resources()
    pool = resources.get("pool", lambda: Pool("pool"))
    resources.get("broken", Broken)
    await resources.close()
    assert pool.closed == ["pool"]
    (record,) = caplog.records
    assert (record.getMessage(), vars(record)["key"]) == ("resource_close_failed", "'broken'")


async def test_a_factory_that_fails_leaves_no_trace() -> None:
    resources = Resources()

    def fail() -> Pool:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        resources.get("a", fail, user=1)
    assert len(resources) == 0
    assert isinstance(resources.get("a", Pool, user=1), Pool)
