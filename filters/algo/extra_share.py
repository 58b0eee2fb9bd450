"""How many extra attempts may be made: a share of the calls, and never more.

A bucket without a clock: what a call pays in does not depend on how long ago the last one was, so
a quiet hour pays for nothing. `filters/algo/retry_budget.py` is the other way round, because the
first failure of a quiet sidecar should be retried; nobody needs the first hedge.
"""

from __future__ import annotations

MOST_KEPT = 10.0
"""Extra attempts that may come at once after many calls that needed none."""


class ExtraShare:
    """Counts what is left. Of n calls, at most `share` x n are followed by an extra attempt; of any
    n calls in a row, `MOST_KEPT` more than that."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept = 0.0

    @property
    def has_one(self) -> bool:
        return self._kept >= 1.0

    def add_call(self, share: float) -> None:
        """A call came; `share` (0 to 1) of an extra attempt is added."""
        self._kept = min(MOST_KEPT, self._kept + share)

    def take(self) -> bool:
        """An extra attempt; False when there is none left."""
        if self._kept < 1.0:
            return False
        self._kept -= 1.0
        return True
