"""At most so much in any period: a sliding window that is kept in up to 61 buckets.

A bucket takes what comes within a sixtieth of the period after its first charge, and leaves as a
whole one period after its last. So a charge counts for one period at least and for 61/60 of it at
most, whatever comes after it, and no window of a period ever holds more than the limit. A fixed
window lets twice the limit through around its border.

No library: `limits`, `throttled-py`, `aiolimiter` and `pyrate-limiter` take 1 to 13 µs a decision
against 0.1 here (0.5 with its store), and none can charge several windows or none of them, give
part of a charge back into the moment where it was taken, and say exactly how long to wait.

`filters/stores/limits_take.lua` is the same algorithm. Times are whole microseconds, so that
the two agree to the last bit.
"""

from __future__ import annotations

from collections import deque

BUCKETS = 60


class Bucket:
    """What was charged close together."""

    __slots__ = ("amount", "first_us", "has_left", "last_us")

    def __init__(self, now_us: int) -> None:
        self.first_us = now_us
        self.last_us = now_us
        self.amount = 0
        self.has_left = False

    def __repr__(self) -> str:
        return f"<Bucket {self.first_us}..{self.last_us} amount={self.amount}>"


class Window:
    """What was charged in the last period. The limit is the caller's, and may change."""

    __slots__ = ("_buckets", "_full_at_us", "_newest", "_period_us", "_width_us", "used")

    def __init__(self, period_us: int) -> None:
        self._period_us = period_us
        self._width_us = -(-period_us // BUCKETS)
        self._buckets: deque[Bucket] = deque()
        self._newest = Bucket(0)
        self._full_at_us = 0  # from then on the newest takes nothing more; 0: there is none
        self.used = 0
        """What counts, as of the last call of a method; no more than that counts now."""

    def wait_us(self, now_us: int, amount: int, limit: int) -> int:
        """How long until `amount` fits into `limit` if nothing else is charged; 0: it does now.
        -1: it never will. With a debt even nothing has to wait."""
        buckets, period_us = self._buckets, self._period_us
        if buckets and buckets[0].last_us + period_us <= now_us:
            self._leave(now_us)
        over = self.used + amount - limit
        if over <= 0:
            return 0
        if amount > limit:
            return -1
        for bucket in buckets:
            over -= bucket.amount
            if over <= 0:
                return bucket.last_us + period_us - now_us
        raise AssertionError(f"{self!r} holds other than its buckets do")

    def charge(self, now_us: int, amount: int) -> Bucket:
        """Count `amount`, whatever the limit. The bucket is where it can be given back."""
        bucket = self._newest
        if now_us >= self._full_at_us:
            bucket = self._open(now_us)
        elif now_us > bucket.last_us:  # clocks of servers do go back
            bucket.last_us = now_us
        bucket.amount += amount
        self.used += amount
        return bucket

    def _open(self, now_us: int) -> Bucket:
        self._leave(now_us)  # so that there are never many, also when nobody asks before
        self._newest = bucket = Bucket(now_us)
        self._full_at_us = now_us + self._width_us
        self._buckets.append(bucket)
        return bucket

    def give_back(self, bucket: Bucket, amount: int) -> None:
        """So much of what was charged into `bucket` was not needed: it is free where it was taken,
        if it still counts."""
        if not bucket.has_left:
            bucket.amount -= amount
            self.used -= amount

    def is_idle(self, now_us: int) -> bool:
        """Nothing counts any more."""
        self._leave(now_us)
        return not self._buckets

    def _leave(self, now_us: int) -> None:
        buckets = self._buckets
        while buckets and buckets[0].last_us + self._period_us <= now_us:
            bucket = buckets.popleft()
            bucket.has_left = True
            self.used -= bucket.amount
        if not buckets:
            self._full_at_us = 0

    def __repr__(self) -> str:
        return f"<Window used={self.used} buckets={len(self._buckets)}>"
