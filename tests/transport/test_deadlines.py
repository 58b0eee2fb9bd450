"""Many deadlines on one timer: called once, little too late, and never for nothing."""

from __future__ import annotations

import asyncio
from math import inf
from unittest.mock import create_autospec

from sidecar.transport.deadlines import LONGEST_TICK_S, SHARE, SHORTEST_TICK_S, Deadlines


class Loop:
    """A loop whose time is turned by hand; remembers the one timer there may be."""

    def __init__(self) -> None:
        self.now = 100.0
        self.delays: list[float] = []
        self.tick = lambda: None
        self.is_set = False

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, tick: object) -> asyncio.TimerHandle:
        assert not self.is_set
        self.delays.append(delay_s)
        self.tick = tick  # type: ignore[assignment]
        self.is_set = True
        handle = create_autospec(asyncio.TimerHandle, instance=True)
        handle.cancel.side_effect = lambda: setattr(self, "is_set", False)
        return handle  # type: ignore[no-any-return]

    def turn(self, seconds: float) -> None:
        """Let time pass, tick by tick."""
        until = self.now + seconds
        while self.is_set and self.now + self.delays[-1] <= until:
            self.now += self.delays[-1]
            self.is_set = False
            self.tick()
        self.now = until


class Member:
    def __init__(self, loop: Loop, again_s: float | None = None) -> None:
        self.due = inf
        self.called_at: list[float] = []
        self._loop = loop
        self._again_s = again_s

    def on_time(self) -> None:
        assert self.due == inf
        self.called_at.append(self._loop.now)
        if self._again_s is not None:
            self.due = self._loop.now + self._again_s


def make(loop: Loop) -> Deadlines:
    return Deadlines(loop)  # type: ignore[arg-type]


def test_a_deadline_is_met_once_and_at_most_an_eighth_late() -> None:
    loop = Loop()
    deadlines = make(loop)
    member = Member(loop)
    deadlines.members.add(member)
    member.due = deadlines.after(1.0)
    loop.turn(5.0)
    assert len(member.called_at) == 1
    assert 101.0 <= member.called_at[0] <= 101.0 + 1.0 / SHARE


def test_the_tick_follows_the_shortest_delay_within_its_bounds() -> None:
    loop = Loop()
    deadlines = make(loop)
    for delay_s in (120.0, 1.0, 0.001):
        deadlines.after(delay_s)
    assert loop.delays == [LONGEST_TICK_S, 1.0 / SHARE, SHORTEST_TICK_S]


def test_nothing_ticks_while_nothing_is_armed() -> None:
    loop = Loop()
    deadlines = make(loop)
    member = Member(loop)
    deadlines.members.add(member)
    member.due = deadlines.after(10.0)
    member.due = inf  # the exchange was over in time
    loop.turn(1.0)
    assert not loop.is_set
    assert member.called_at == []


def test_a_member_may_arm_itself_again_when_called_and_leave_meanwhile() -> None:
    loop = Loop()
    deadlines = make(loop)
    again, leaving = Member(loop, again_s=1.0), Member(loop)
    deadlines.members |= {again, leaving}
    again.due = deadlines.after(1.0)
    loop.turn(2.5)
    assert len(again.called_at) == 2
    deadlines.members.discard(leaving)
    loop.turn(1.0)
    assert leaving.called_at == []
