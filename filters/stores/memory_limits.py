"""Limits of one process, in memory: about half a microsecond a decision."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from filters.algo.pace import Pace
from filters.algo.window import Bucket, Window
from filters.stores.rules import Grant, Rated, Refusal, Slot, share
from sidecar.api import Clock

MANY = 10_000
"""From so many counted things on, those that count nothing now are looked for and dropped."""


class Count:
    """What one rule has counted for one key."""

    __slots__ = ("pace", "window")

    def __init__(self, period_us: int) -> None:
        self.window = Window(period_us)
        self.pace = Pace(period_us)
        """Charged by rules with a burst alone."""


class InFlight:
    """How many slots of one key are taken."""

    __slots__ = ("taken",)

    def __init__(self) -> None:
        self.taken = 0


Seat = tuple[InFlight, int]
"""Where a slot is taken, and how many there may be."""


class MemoryGrant(Grant):
    """Taken from the windows and slots of this process, and given back there."""

    __slots__ = ("_amounts", "_buckets", "_meter", "_seats")

    def __init__(
        self,
        meter: MemoryMeter,
        amounts: Sequence[int],
        buckets: list[Bucket | None],
        seats: Sequence[Seat],
    ) -> None:
        self._meter = meter
        self._amounts = amounts
        self._buckets = buckets
        self._seats = seats

    def settle(self, index: int, amount: int) -> None:
        bucket = self._buckets[index]
        if bucket is not None:
            self._buckets[index] = None
            more = amount - self._amounts[index]
            if more > 0:
                self._meter.charge(index, more)
            elif more:
                self._meter.windows[index].give_back(bucket, -more)

    def release(self, end: object = None) -> None:
        for in_flight, _ in self._seats:
            in_flight.taken -= 1
        self._seats = ()


class MemoryMeter:
    """What one kind of calls takes of the counts of this process.

    A charge that is larger than the share of its limit, but not than the limit, is granted when
    nothing else counts: it could never be otherwise.
    """

    __slots__ = (
        "_is_paced",
        "_limits",
        "_most",
        "_paces",
        "_rated",
        "_seats",
        "_slots",
        "_version",
        "windows",
    )

    def __init__(self, limits: MemoryLimits, rated: Sequence[Rated], slots: Sequence[Slot]) -> None:
        self._limits = limits
        self._rated = rated
        self._slots = slots
        self._is_paced = any(rule.burst is not None for _, rule in rated)
        # Found when they are needed, and again when they may have changed.
        self._version = 0
        self.windows: list[Window] = []
        self._most: list[int] = []  # that may be used without another look; -1: nothing
        self._paces: list[Pace] = []
        self._seats: list[Seat] = []

    async def take(self, amounts: Sequence[int]) -> Grant | Refusal:
        return self.take_now(amounts)

    def take_now(self, amounts: Sequence[int]) -> MemoryGrant | Refusal:
        """`Meter.take`, without waiting for anything."""
        limits = self._limits
        now_us = int(limits.monotonic() * 1e6 + 0.5)
        if self._version != limits.version:
            self._find(now_us)
        windows, most = self.windows, self._most
        # Counted by hand in both loops: `enumerate` takes twice as long.
        index = 0
        for window in windows:
            if window.used + amounts[index] > most[index]:
                refusal = self._refusal(now_us, amounts)
                if refusal is not None:
                    return refusal
                break
            index += 1  # noqa: SIM113
        seats = self._seats
        for seat in seats:
            in_flight, limit = seat
            if in_flight.taken >= limit:
                return Refusal(len(windows) + seats.index(seat), 0.0, 0)
        for in_flight, _ in seats:
            in_flight.taken += 1
        index = 0
        buckets: list[Bucket | None] = []
        for window in windows:
            buckets.append(window.charge(now_us, amounts[index]))
            index += 1  # noqa: SIM113
        if self._is_paced:
            for index, amount in enumerate(amounts):
                self._charge_pace(index, now_us, amount)
        return MemoryGrant(self, amounts, buckets, seats)

    def charge(self, index: int, amount: int) -> None:
        """Count a debt."""
        now_us = int(self._limits.monotonic() * 1e6 + 0.5)
        if self._version != self._limits.version:
            self._find(now_us)
        self.windows[index].charge(now_us, amount)
        self._charge_pace(index, now_us, amount)

    def _charge_pace(self, index: int, now_us: int, amount: int) -> None:
        _, rule = self._rated[index]
        if rule.burst is not None:
            self._paces[index].charge(now_us, amount, share(rule.limit, self._limits.sharers))

    def _find(self, now_us: int) -> None:
        limits = self._limits
        counts, in_flight = limits.find(self._rated, self._slots, now_us)
        self._version, sharers = limits.version, limits.sharers
        self.windows = [count.window for count in counts]
        self._paces = [count.pace for count in counts]
        self._most = [
            rule.limit if sharers <= 1 and rule.burst is None else -1 for _, rule in self._rated
        ]
        self._seats = [
            (each, share(slot.limit, sharers))
            for each, slot in zip(in_flight, self._slots, strict=True)
        ]

    def _refusal(self, now_us: int, amounts: Sequence[int]) -> Refusal | None:
        """Of the rule that takes longest; None when there is room in all."""
        longest_s, longest = 0.0, 0
        for index, amount in enumerate(amounts):
            wait_s = self._wait_s(index, now_us, amount)
            if wait_s > longest_s:
                longest_s, longest = wait_s, index
        return Refusal(longest, longest_s, self._left(longest, now_us)) if longest_s else None

    def _wait_s(self, index: int, now_us: int, amount: int) -> float:
        _, rule = self._rated[index]
        sharers = self._limits.sharers
        limit = _room_for(amount, rule.limit, sharers)
        wait_us = self.windows[index].wait_us(now_us, amount, limit)
        if wait_us >= 0 and rule.burst is not None:
            burst, rate = _room_for(amount, rule.burst, sharers), share(rule.limit, sharers)
            pace_us = self._paces[index].wait_us(now_us, amount, rate, burst)
            wait_us = pace_us if pace_us < 0 else max(wait_us, pace_us)
        return inf if wait_us < 0 else wait_us / 1e6

    def _left(self, index: int, now_us: int) -> int:
        _, rule = self._rated[index]
        sharers = self._limits.sharers
        limit = share(rule.limit, sharers)
        left = limit - self.windows[index].used
        if rule.burst is not None:
            room = self._paces[index].room(now_us, limit, share(rule.burst, sharers))
            left = min(left, room)
        return max(0, left)


class MemoryLimits:
    """Counts what this process grants."""

    def __init__(self, clock: Clock, sharers: int = 1) -> None:
        self.monotonic = clock.monotonic
        self.sharers = sharers
        """So many such processes divide each limit among them."""
        self.version = 1
        """When it is another one, meters look up anew what they count with."""
        self._counts: dict[tuple[str, str, float], Count] = {}
        self._in_flight: dict[str, InFlight] = {}
        self._sweep_at = MANY

    def divide(self, sharers: int) -> None:
        """From now on the limits are divided among so many."""
        if sharers != self.sharers:
            self.sharers = sharers
            self.version += 1

    def meter(self, rated: Sequence[Rated], slots: Sequence[Slot] = ()) -> MemoryMeter:
        if len({(key, rule.name, rule.period_s) for key, rule in rated}) != len(rated):
            raise ValueError(f"two rules of one meter are the same: {rated}")
        if len({slot.key for slot in slots}) != len(slots):
            raise ValueError(f"two slots of one meter have the same key: {slots}")
        return MemoryMeter(self, rated, slots)

    def find(
        self, rated: Sequence[Rated], slots: Sequence[Slot], now_us: int
    ) -> tuple[list[Count], list[InFlight]]:
        """The counts of these rules and slots. They are good for as long as `version` is the same,
        and those that count something for longer."""
        if len(self) >= self._sweep_at:
            self._sweep(now_us)
        counts = []
        for key, rule in rated:
            place = (key, rule.name, rule.period_s)
            count = self._counts.get(place)
            if count is None:
                count = self._counts[place] = Count(round(rule.period_s * 1e6))
            counts.append(count)
        return counts, [self._in_flight.setdefault(slot.key, InFlight()) for slot in slots]

    def _sweep(self, now_us: int) -> None:
        """Drop what counts nothing; the next time when there are twice as many as are left."""
        # While a window empties, its pace drains: both were charged the same, and at most the
        # limit.
        self._counts = {
            place: count
            for place, count in self._counts.items()
            if not count.window.is_idle(now_us)
        }
        self._in_flight = {key: each for key, each in self._in_flight.items() if each.taken}
        self._sweep_at = max(MANY, 2 * len(self))
        self.version += 1

    def __len__(self) -> int:
        """How many things are counted."""
        return len(self._counts) + len(self._in_flight)

    def __repr__(self) -> str:
        in_flight = sum(each.taken for each in self._in_flight.values())
        return f"<MemoryLimits counts={len(self._counts)} in_flight={in_flight}>"


def _room_for(amount: int, limit: int, sharers: int) -> int:
    part = share(limit, sharers)
    return amount if part < amount <= limit else part
