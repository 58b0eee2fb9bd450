"""Time, handed to whoever needs it, so that tests can turn it by hand."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What filters may ask of time. Both readings are in seconds."""

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps; for durations and deadlines."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch; for signatures and log lines."""
        ...

    async def sleep(self, delay_s: float) -> None:
        """Return after `delay_s` seconds; cancellable."""
        ...


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
