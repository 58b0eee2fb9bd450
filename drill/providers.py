"""The providers of a drill, in this process, and their books by the callers' own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from drill.plan import FALLING, FLAKY
from sidecar.mock import MockProvider, Received, Script
from sidecar.mock.content import Told

NUMBER_HEADER = "x-drill-call"
"""Callers number their calls; the sidecar sends the header on with every attempt."""

_NUMBER_NAME = NUMBER_HEADER.encode()


@dataclass(slots=True)
class Attempt:
    """One request as a provider saw it. Times are those of the event loop."""

    arrived_at: float
    began_at: float | None  # a byte of a good answer's body went out
    finished_at: float
    is_answered: bool  # all of it was handed to the socket
    is_left: bool  # the sidecar closed the connection before
    told: Told | None  # the usage in what went out

    @property
    def broke(self) -> bool:
        """Whether the provider broke its answer off after the first byte."""
        return self.began_at is not None and not self.is_answered and not self.is_left


@dataclass(slots=True)
class Ledger:
    """The attempts of each call, in the order of their arrival."""

    attempts: dict[int, list[Attempt]] = field(default_factory=dict)
    strangers: int = 0  # requests without a number

    def add(self, received: Received) -> None:
        """Enter a request that is over."""
        number = next((v for name, v in received.raw_headers if name.lower() == _NUMBER_NAME), None)
        if number is None:
            self.strangers += 1
            return
        attempt = Attempt(
            arrived_at=received.arrived_at,
            began_at=received.answer_began_at,
            finished_at=received.finished_at or 0.0,
            is_answered=received.is_answered,
            is_left=received.client_gone,
            told=received.told,
        )
        entered = self.attempts.setdefault(int(number), [])
        entered.append(attempt)
        entered.sort(key=lambda each: each.arrived_at)


class Providers:
    """The flaky one, whose attempts fail by chance, and the falling one, which goes away whole."""

    def __init__(self, seed: int) -> None:
        self.ledger = Ledger()
        self._ports: dict[str, int] = {}
        self._providers = {
            name: MockProvider(
                script=Script.parse(text), keep_requests=0, seed=seed, on_done=self.ledger.add
            )
            for name, text in (("flaky", FLAKY), ("falling", FALLING))
        }

    async def start(self) -> Mapping[str, int]:
        """Both listen; returns their ports."""
        for name in self._providers:
            await self._listen(name)
        return self._ports

    async def fall(self) -> None:
        """The falling one closes its port and all connections."""
        await self._providers["falling"].stop()

    async def rise(self) -> None:
        """It is back on the same port."""
        await self._listen("falling")

    async def stop(self) -> None:
        for provider in self._providers.values():
            await provider.stop()

    @property
    def open_requests(self) -> int:
        return sum(provider.open_requests for provider in self._providers.values())

    @property
    def open_connections(self) -> int:
        """Of the sidecars, idle ones included."""
        return sum(provider.open_connections for provider in self._providers.values())

    async def _listen(self, name: str) -> None:
        address = await self._providers[name].start(port=self._ports.get(name, 0))
        self._ports[name] = int(address.rpartition(":")[2])
