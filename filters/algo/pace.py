"""Evenly spread over the period, with at most a burst at once: GCRA.

Kept as the level of a bucket that leaks at the rate of the limit, which is the same as GCRA's
"theoretical arrival time" and stays in whole numbers: the unit is one charge times one microsecond
of the period, so that nothing is rounded and `filters/stores/limits_take.lua` agrees to the last
bit. Libraries: see `filters/algo/window.py`.
"""

from __future__ import annotations


class Pace:
    """How far the charges are ahead of an even pace. Nothing is given back: a pace is about when
    calls were let through, not what they turned out to cost.

    One period after the last charge nothing is left of it, as of a window: also when it was
    charged by a higher limit than the one that asks, another team's or that of before a reload.
    So a burst above the limit bounds nothing; the window beside it does.
    """

    __slots__ = ("_at_us", "_level", "_period_us")

    def __init__(self, period_us: int) -> None:
        self._period_us = period_us
        self._level = 0
        self._at_us = 0

    def wait_us(self, now_us: int, amount: int, limit: int, burst: int) -> int:
        """How long until `amount` may pass if nothing else does; 0: now. -1: never."""
        over = self._level_at(now_us, limit) + (amount - burst) * self._period_us
        if over <= 0:
            return 0
        if amount > burst or limit <= 0:
            return -1
        return max(0, self._at_us - now_us) - (-over // limit)

    def charge(self, now_us: int, amount: int, limit: int) -> None:
        """Count `amount`, whatever the burst."""
        self._level = self._level_at(now_us, limit) + amount * self._period_us
        self._at_us = max(self._at_us, now_us)

    def room(self, now_us: int, limit: int, burst: int) -> int:
        """How much may pass at once now."""
        return max(0, burst - -(-self._level_at(now_us, limit) // self._period_us))

    def _level_at(self, now_us: int, limit: int) -> int:
        level = min(self._level, self._period_us * limit)
        return max(0, level - max(0, now_us - self._at_us) * limit)

    def __repr__(self) -> str:
        return f"<Pace ahead={self._level / self._period_us:.3f}>"
