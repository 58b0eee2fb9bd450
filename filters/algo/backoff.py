"""How long to wait before the next try: growing, capped, and spread out by chance.

Whether there is a next try is decided elsewhere. Chance comes in as `rand` (0 to 1), so that a test
can say what it is. tenacity and stamina have the same formulas, but they wrap the call of a
function: 25 to 39 µs where nothing fails, and no place for an answer that is neither returned nor
raised (measured, tenacity 9.2).
"""

from __future__ import annotations

from typing import Literal

Jitter = Literal["full", "equal"]

SPREAD = 0.25
"""By so much more than asked for is waited at most: those who were all told the same do not come
back in the same moment."""


def backoff_s(retry: int, *, base_s: float, max_s: float, jitter: Jitter, rand: float) -> float:
    """Seconds before the retry of this number, from 1.

    The longest wait is `base_s`, doubled for each further retry, and never above `max_s`. `full`
    takes a part of it from 0 to all, `equal` from a half to all. Source: M. Brooker, "Exponential
    Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    longest_s = min(max_s, base_s * 2.0 ** min(retry - 1, 100))
    return longest_s * (rand if jitter == "full" else 0.5 + rand / 2)


def after_hint_s(hint_s: float, rand: float) -> float:
    """Seconds to wait when asked for `hint_s`: never less, and up to a quarter more."""
    return hint_s * (1.0 + SPREAD * rand)
