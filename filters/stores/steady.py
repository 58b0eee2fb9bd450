"""Whether the wall clock can be trusted with deleting what is old.

A machine without a battery, or one whose clock is set by a wrong source, may be a year ahead for
some minutes; everything would be old then. The monotonic clock does not jump: as long as both go
on together the wall clock is believed.
"""

from __future__ import annotations

from sidecar.api import Clock

LEAP_S = 3_600.0
"""So far the clocks may drift apart."""
DOUBT_S = 6 * 3_600.0
"""After a leap the clocks must have gone together for so long again: whether the time before it or
the one after it is right, nobody knows."""


class SteadyClock:
    """Watches the clocks from the moment it is made."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._apart_s = clock.wall() - clock.monotonic()
        self._trusted_from = clock.monotonic()

    def is_trusted(self) -> bool:
        """Ask before each deletion; in between a leap that was taken back does no harm."""
        now = self._clock.monotonic()
        apart_s = self._clock.wall() - now
        if abs(apart_s - self._apart_s) > LEAP_S:
            self._apart_s = apart_s
            self._trusted_from = now + DOUBT_S
        return now >= self._trusted_from
