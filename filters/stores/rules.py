"""What limits are asked, and what they answer: the words that all their stores share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

WhenDown = Literal["open", "closed", "local_share"]
"""What holds while the shared store is away: everything is granted, nothing is, or each process
keeps the limit divided by the processes that were there last."""


class Rule(NamedTuple):
    """At most `limit` in any window of `period_s`. A reload may change the limit and the burst of
    a rule, and what was counted stays; another name or period is another rule. The name is a word
    without a colon."""

    name: str
    limit: int
    period_s: float
    burst: int | None = None
    """With it they are evenly spread as well, with at most so many at once."""


Rated = tuple[str, Rule]
"""A rule, and a key for whom it counts: `rate_limit|team=search` for example."""


class Slot(NamedTuple):
    """One of the `limit` calls that `key` may have in flight."""

    key: str
    limit: int


@dataclass(slots=True)
class Refusal:
    """Nothing was taken."""

    index: int
    """Which one does not fit: a place in the rated rules, and after them in the slots. Of several
    rules the one that takes longest."""
    wait_s: float
    """After so long, with nobody else, the same will be granted; `inf`: never, it is more than the
    limit. For a slot 0.0: nobody knows."""
    remaining: int
    """What is left there."""


class Grant:
    """Everything was taken. This one was taken of nothing: no limit holds."""

    __slots__ = ()

    def settle(self, index: int, amount: int) -> None:
        """What was taken of rule number `index` was really `amount`. Less is given back, where and
        as long as it still counts (a burst gets nothing back); more is a debt, which later calls
        wait for even when it exceeds the limit. Only the first call for an index counts; never
        raises."""

    def release(self, end: object = None) -> None:
        """Give the slots back. Idempotent, never raises. May be owed as a debt: which end it is
        does not matter."""


class Meter(Protocol):
    """What one kind of calls takes: of some rules an amount each, and its slots."""

    async def take(self, amounts: Sequence[int]) -> Grant | Refusal:
        """Take of each rule its amount, and all slots; or nothing. The amounts must not change
        afterwards. A caller that is cancelled has taken nothing."""
        ...


class Limits(Protocol):
    """Counts, somewhere."""

    def meter(self, rated: Sequence[Rated], slots: Sequence[Slot] = ()) -> Meter:
        """What is taken together, made out once for many calls: keep it. Raises ValueError when
        two rules have the same key, name and period, or two slots the same key."""
        ...


def share(limit: int, sharers: int) -> int:
    """The part of a limit that one of `sharers` may use without knowing of the others: at least
    one, as long as there is anything."""
    return limit if sharers <= 1 or limit <= 0 else limit // sharers or 1
