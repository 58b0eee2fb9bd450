"""What this process has learned of its providers' limits, for all teams and through reloads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from filters.algo.allowance import KINDS, Allowance
from sidecar.api import Clock

Allowances = dict[tuple[str, str], Allowance]
"""By the model's name at the upstream and the key's digest."""

MAX_ALLOWANCES = 10_000
"""Of one upstream: where callers' own keys pass, there may be many."""


class Learned:
    """Allowances by upstream; also a panel, where operators see them and make them forgotten."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._upstreams: dict[tuple[str, tuple[str, str]], Allowances] = {}

    def of(self, upstream: str, origin: tuple[str, str]) -> Allowances:
        """What is known of one upstream; another origin allows something else."""
        return self._upstreams.setdefault((upstream, origin), {})

    async def show(self) -> Any:
        now = self._clock.monotonic()
        shown: dict[str, list[dict[str, Any]]] = {}
        for (upstream, _), allowances in self._upstreams.items():
            # Of all its origins: after a reload there may be two, and either may be the old one.
            shown.setdefault(upstream, []).extend(
                {
                    "model": model,
                    "key": key[:8],  # enough to tell keys apart
                    "in_flight": each.in_flight,
                    "rests_s": round(max(0.0, each.rests_until - now), 3),
                    "remaining": {
                        KINDS[number]: quota.remaining for number, quota in each.quotas.items()
                    },
                }
                for (model, key), each in allowances.items()
            )
        return shown

    async def act(self, command: Mapping[str, Any]) -> Any:
        """`{"forget": "openai"}`: what is known of that upstream no longer holds attempts back."""
        name = command.get("forget")
        known = {upstream for upstream, _ in self._upstreams}
        if set(command) != {"forget"} or name not in known:
            raise ValueError(f'write {{"forget": NAME}} with one of: {", ".join(sorted(known))}')
        for (upstream, _), allowances in self._upstreams.items():
            if upstream == name:
                for each in allowances.values():
                    each.forget()
        return await self.show()
