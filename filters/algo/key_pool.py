"""Which of several keys signs the next attempt.

READY ──401/403──► ASIDE ──after set_aside_s, one probe──► READY or ASIDE
READY ──429──► RESTING ──after its time──► READY
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PROBE_S = 30.0
"""A key that was set aside signs one attempt, and another one only after so long, until one of
them was accepted."""


class AllResting(Exception):
    """Every key that is not set aside has been told to wait."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"{wait_s:.1f} s")
        self.wait_s = wait_s


class KeyState:
    """What the provider thinks of one key. Times are of one monotonic clock, in seconds."""

    __slots__ = ("aside_until", "refused_at", "rests_until")

    def __init__(self) -> None:
        self.rests_until = 0.0
        self.aside_until = 0.0  # 0: in use
        self.refused_at = 0.0

    @property
    def is_aside(self) -> bool:
        return self.aside_until > 0.0

    def __repr__(self) -> str:
        if self.is_aside:
            return f"<KeyState ASIDE until={self.aside_until:.1f}>"
        return f"<KeyState rests_until={self.rests_until:.1f}>"


class KeyPool:
    """Takes turns among keys that may be used; knows them by their place."""

    def __init__(self, states: Sequence[KeyState], *, set_aside_s: float) -> None:
        self._states = tuple(states)
        self._set_aside_s = set_aside_s
        self._next = 0

    def choose(self, now: float, full_s: Mapping[int, float] | None = None) -> int:
        """The key for the next attempt; not one of those that have no room for so long as is said.

        When all are set aside, the one whose turn to be tried again comes first: the provider's
        answer tells the caller what is wrong. Raises `AllResting` when waiting would help.
        """
        states, count = self._states, len(self._states)
        if count == 1 and not full_s:
            return 0
        for index in range(self._next, self._next + count):
            state = states[index % count]
            if state.rests_until > now or state.aside_until > now:
                continue
            if full_s and index % count in full_s:
                continue
            if state.is_aside:
                state.aside_until = now + PROBE_S
            self._next = (index + 1) % count
            return index % count
        waits = [
            max(state.rests_until - now, full_s.get(index, 0.0) if full_s else 0.0)
            for index, state in enumerate(states)
            if not state.aside_until > now
        ]
        if waits:
            raise AllResting(min(waits))
        return min(range(count), key=lambda index: states[index].aside_until)

    def accepted(self, index: int, chosen_at: float) -> bool:
        """The provider took the key in an attempt for which it was chosen then; whether that brings
        it back. It does not when the key was refused since."""
        state = self._states[index]
        if not state.is_aside or chosen_at < state.refused_at:
            return False
        state.aside_until = 0.0
        return True

    def refused(self, index: int, now: float) -> bool:
        """401 or 403; whether the key was in use until now."""
        state = self._states[index]
        was_aside = state.is_aside
        state.aside_until = now + self._set_aside_s
        state.refused_at = now
        return not was_aside

    def limited(self, index: int, now: float, rest_s: float) -> bool:
        """429: the key rests for so long, or as long as it does already; whether it was ready."""
        state = self._states[index]
        was_ready = state.rests_until <= now
        state.rests_until = max(state.rests_until, now + rest_s)
        return was_ready

    def __repr__(self) -> str:
        return f"<KeyPool {list(self._states)}>"
