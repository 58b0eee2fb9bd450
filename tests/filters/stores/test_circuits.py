"""Which circuits a configuration gets, and that the panel shows them."""

from __future__ import annotations

from dataclasses import replace

from filters.algo.circuit import State
from filters.circuit_breaker import CircuitBreaker
from filters.stores.circuits import CircuitsPanel, let_go, open_circuits
from filters.stores.memory_circuits import MemoryCircuits
from filters.stores.redis_circuits import RedisCircuits
from sidecar.api import Kit, Secret
from sidecar.filter import KitResources, StoreAddress
from tests.support.harness import Harness, Use


def kit_of(harness: Harness, snapshot: int = 1, store: StoreAddress | None = None) -> Kit:
    """The kit of one snapshot of a configuration with the upstreams `a` and `b`."""
    return replace(
        harness.filters[0].kit,
        resources=KitResources(harness.resources, snapshot),
        origins={"a": ("https", "a.test"), "b": ("https", "b.test")},
        store=store or StoreAddress(),
    )


def harness() -> Harness:
    return Harness(Use(CircuitBreaker))


def panel_of(harness: Harness) -> CircuitsPanel:
    found = harness.resources.of_kind("panel")["circuits"]
    assert isinstance(found, CircuitsPanel)
    return found


OWNER = object()


async def test_circuits_of_memory_outlive_a_reload() -> None:
    async with harness() as ground:
        circuits = open_circuits(kit_of(ground, 1), OWNER)
        assert isinstance(circuits, MemoryCircuits)
        await circuits.force("a", "m", State.OPEN)
        assert open_circuits(kit_of(ground, 2), OWNER) is circuits
        await ground.resources.drop_user(1)
        (shown,) = await panel_of(ground).show()
        assert shown["forced"] == "open"


async def test_circuits_of_a_store_are_shared_by_all_filters_and_outlive_a_reload() -> None:
    store = StoreAddress(Secret("redis://127.0.0.1:1/0"), "test")
    async with harness() as ground:
        circuits = open_circuits(kit_of(ground, 1, store), OWNER)
        assert isinstance(circuits, RedisCircuits)
        assert open_circuits(kit_of(ground, 2, store), OWNER) is circuits
        await ground.resources.drop_user(1)
        assert open_circuits(kit_of(ground, 2, store), OWNER) is circuits
        assert not circuits.redis._is_closed


async def test_panel_shows_the_circuits_of_the_newest_configuration() -> None:
    async with harness() as ground:
        old = open_circuits(kit_of(ground, 1), OWNER)
        await old.force("a", "m", State.OPEN)
        store = StoreAddress(Secret("redis://127.0.0.1:1/0"), "test")
        other = object()
        new = open_circuits(kit_of(ground, 2, store), other)
        assert panel_of(ground).circuits is new
        assert [each for each in await panel_of(ground).show() if each["forced"]] == []


async def test_panel_shows_those_of_before_again_when_a_reload_has_failed() -> None:
    async with harness() as ground:
        old = open_circuits(kit_of(ground, 1), OWNER)
        other = object()
        kit = kit_of(ground, 2, StoreAddress(Secret("redis://127.0.0.1:1/0"), "test"))
        assert open_circuits(kit, other) is not old
        let_go(kit, other)
        let_go(kit, other)
        assert panel_of(ground).circuits is old


async def test_panel_shows_circuits_in_order() -> None:
    async with harness() as ground:
        circuits = open_circuits(kit_of(ground), OWNER)
        for upstream, model in (("b", "m"), ("a", "n"), ("a", "m"), ("a", "")):
            circuits.circuit(upstream, model)
        shown = await panel_of(ground).show()
        places = [(each["upstream"], each["model"]) for each in shown]
        assert places == [("a", ""), ("a", "m"), ("a", "n"), ("b", "m")]


async def test_panel_of_nothing_is_empty() -> None:
    assert await CircuitsPanel().show() == []
