"""How many retries an upstream may get, so that they do not become a storm.

When everything fails, four attempts a call are four times the load on an upstream that is down
already. A budget lets through a share of the calls as retries, and no more. Finagle's `RetryBudget`
and Envoy's are the models; no Python library has one (tenacity, stamina and backoff count the tries
of one call only).
"""

from __future__ import annotations

from math import exp

KEPT_S = 10.0
"""What is not used fades with this time constant: an hour without failures does not pay for a
storm of a minute."""

MOMENT_S = 0.05
"""What comes within it counts as of its beginning: nearly every first try, and so a little less."""


class RetryBudget:
    """A bucket of retries: each first try adds `share`, each retry takes one.

    `min_per_s` is added all the time, so that a few calls an hour are retried, too. Idle, it holds
    `min_per_s` times `KEPT_S`. Over any time the retries are at most what was held, `share` of the
    first tries, and `min_per_s` for each second.
    """

    __slots__ = ("_at", "_held", "_idle", "_share")

    def __init__(self, *, share: float, min_per_s: float, now: float) -> None:
        self._share = share
        self._idle = min_per_s * KEPT_S
        self._held = self._idle
        self._at = now

    def deposit(self, now: float) -> None:
        """A first try."""
        if now - self._at > MOMENT_S:
            self._pass_time(now)
        self._held += self._share

    def take(self, now: float) -> bool:
        """A retry; False when the budget does not have it."""
        self._pass_time(now)
        if self._held < 1.0:
            return False
        self._held -= 1.0
        return True

    def charge(self, now: float) -> None:
        """A retry that somebody else decided; the budget has less for ours."""
        self._pass_time(now)
        self._held = max(0.0, self._held - 1.0)

    def _pass_time(self, now: float) -> None:
        elapsed_s = now - self._at
        if elapsed_s > 0.0:
            self._at = now
            self._held = self._idle + (self._held - self._idle) * exp(-elapsed_s / KEPT_S)

    def __repr__(self) -> str:
        return f"<RetryBudget held={self._held:.1f}>"
