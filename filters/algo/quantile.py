"""A quantile of the last few hundred observations, exact.

The observations stand twice: in a ring, which knows the oldest, and sorted. So adding one costs a
search and two moves inside a short list, and reading a quantile one index. Sketches (t-digest,
P2) and their packages save memory that a few hundred numbers do not need, and P2 never forgets.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from math import ceil


class Quantile:
    """The last `size` observations of some quantity."""

    __slots__ = ("_next", "_ring", "_size", "_sorted")

    def __init__(self, size: int) -> None:
        self._size = size
        self._ring: list[float] = []
        self._next = 0  # where the oldest stands, once the ring is full
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        """Note `value` and forget the oldest, if there are `size` already."""
        if len(self._ring) < self._size:
            self._ring.append(value)
        else:
            oldest = self._ring[self._next]
            self._ring[self._next] = value
            self._next = (self._next + 1) % self._size
            del self._sorted[bisect_left(self._sorted, oldest)]
        insort(self._sorted, value)

    def at(self, share: float) -> float:
        """The smallest observation that at least `share` (0 to 1) of all do not exceed.

        Raises IndexError when there is none.
        """
        return self._sorted[max(0, ceil(share * len(self._sorted) - 1e-9) - 1)]
