"""Opens the circuits that a configuration asks for, and shows them to operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from filters.algo.circuit import State
from filters.stores.memory_circuits import ALL_MODELS, MemoryCircuits, Shown, Sightings
from sidecar.api import Kit

if TYPE_CHECKING:
    from filters.stores.redis_circuits import RedisCircuits

PANEL = "circuits"
FORCES = {"open": State.OPEN, "closed": State.CLOSED, None: None}


class CircuitsPanel:
    """The circuits on the admin port.

    A command is `{"upstream": …, "model": …, "force": "open" | "closed" | null}`; without a model,
    or with `*`, it is for all of the upstream's, also those that nobody has called yet.
    """

    def __init__(self) -> None:
        # What live filters work with, by filter; the newest configuration's come last.
        self._owners: dict[object, tuple[MemoryCircuits | RedisCircuits, frozenset[str]]] = {}

    def shows(
        self, owner: object, circuits: MemoryCircuits | RedisCircuits, upstreams: Iterable[str]
    ) -> None:
        """A filter has started that asks these circuits."""
        self._owners[owner] = circuits, frozenset(upstreams)

    def forget(self, owner: object) -> None:
        """It has stopped; after a failed reload, those of before are shown again. Idempotent."""
        self._owners.pop(owner, None)

    @property
    def circuits(self) -> MemoryCircuits | RedisCircuits | None:
        return next(reversed(self._owners.values()))[0] if self._owners else None

    @property
    def upstreams(self) -> frozenset[str]:
        return next(reversed(self._owners.values()))[1] if self._owners else frozenset()

    async def show(self) -> list[dict[str, Any]]:
        """Each circuit with its state, its failures one after the other, and in how many seconds
        the next probe may go (null: only an operator ends it)."""
        if self.circuits is None:
            return []
        return [_fields(each) for each in sorted(await self.circuits.show())]

    async def act(self, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Force circuits, or let them be by themselves again, as new; shows the upstream's."""
        if unknown := sorted(command.keys() - {"upstream", "model", "force"}):
            raise ValueError(f"unknown: {', '.join(unknown)}; say upstream, model and force")
        upstream, model = command.get("upstream"), command.get("model", ALL_MODELS)
        if self.circuits is None or upstream not in [*self.upstreams]:
            known = ", ".join(sorted(self.upstreams))
            raise ValueError(f"upstream must be one of: {known}")
        if not isinstance(model, str):
            raise ValueError('model must be a text: a name, or "*" for all')
        shown = [each.model for each in await self.circuits.show() if each.upstream == upstream]
        if model != ALL_MODELS and model not in shown:
            known = ", ".join(map(repr, sorted(shown))) or "none yet"
            raise ValueError(f'no circuit of that model: there are {known}; "*" is for all')
        force = command.get("force", "")
        if not isinstance(force, str | None) or force not in FORCES:
            raise ValueError('force must be "open", "closed" or null')
        await self.circuits.force(upstream, model, FORCES[force])
        return [each for each in await self.show() if each["upstream"] == upstream]


def open_circuits(kit: Kit, owner: object) -> MemoryCircuits | RedisCircuits:
    """The circuits of this process, or those that it shares through the store; the same for all
    filters and through reloads. The panel shows them until `owner` has let go of them."""
    circuits = _memory(kit) if kit.store.url is None else _shared(kit)
    kit.panel(PANEL, CircuitsPanel).shows(owner, circuits, kit.origins)
    return circuits


def let_go(kit: Kit, owner: object) -> None:
    """`owner` has stopped. Idempotent."""
    kit.panel(PANEL, CircuitsPanel).forget(owner)


def _memory(kit: Kit) -> MemoryCircuits:
    return kit.resources.get(
        ("circuits", "memory"), lambda: MemoryCircuits(kit.clock, Sightings(kit))
    )


def _shared(kit: Kit) -> RedisCircuits:
    # Only with such a store: the package for it need not be there without one.
    from filters.stores.redis import open_redis
    from filters.stores.redis_circuits import RedisCircuits

    redis = open_redis(kit)  # for each snapshot, so that it is kept as long as the circuits
    return kit.resources.get(("circuits", kit.store), lambda: RedisCircuits(redis, kit))


def _fields(shown: Shown) -> dict[str, Any]:
    view = shown.view
    return {
        "upstream": shown.upstream,
        "model": shown.model,
        "state": view.state,
        "failures": view.failures,
        "retry_in_s": None if view.retry_in_s is None else round(view.retry_in_s, 3),
        "forced": view.forced,
    }
