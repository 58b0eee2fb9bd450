"""Who waits, and who is next: strict classes with ageing, weighted fair shares within a class.

Classes are numbers, 0 the highest. A waiter counts as one class higher for each `age_s` that it
has waited, up to the highest, so that none starves. Within a class the groups (teams) share by
weight: start-time fair queueing (Goyal, Vin, Chen 1996), each turn being one unit of work, so a
group with the weight 3 is served three times as often as one with 1 while both wait. Within a group
the first come is the first served.

The tags of fair queueing stand with the group, not with each waiter. So whoever leaves leaves
nothing behind, and was charged to nobody. Every step costs at most the logarithm of the number of
groups, but for `push_out`, which looks at all groups of one class.

`asyncio.PriorityQueue` and packages around it know an order, but neither shares nor a waiter that
leaves from the middle. Slots, waking and metrics are the filter's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush
from math import ceil
from typing import Generic, TypeVar

T = TypeVar("T")


class Waiter(Generic[T]):
    """One that waits. `rank` is the class it came with; `item` is whatever the caller needs."""

    __slots__ = ("came_at", "group", "item", "number", "rank", "weight", "where")

    def __init__(self, item: T, *, rank: int, group: str, weight: int) -> None:
        self.item = item
        self.rank = rank
        self.group = group
        self.weight = weight
        self.number = 0  # in the order of coming
        self.came_at = 0.0
        self.where: _Class[T] | None = None  # None: it does not wait

    @property
    def is_waiting(self) -> bool:
        return self.where is not None

    def __repr__(self) -> str:
        return f"<Waiter {self.number} {self.group} class {self.rank}>"


class FairQueue(Generic[T]):
    """The waiters of `classes` classes. `now` is any clock in seconds that never goes back."""

    def __init__(self, classes: int, *, age_s: float) -> None:
        self.age_s = age_s
        self._classes = [_Class[T](rank) for rank in range(classes)]
        self._count = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Waiter[T]]:
        """Everyone who waits, in no order."""
        for each in self._classes:
            yield from each

    def put(self, waiter: Waiter[T], now: float) -> None:
        """Let it wait, behind those of its group who came with the same class."""
        self._age(now)
        self._count += 1
        waiter.number = self._count
        waiter.came_at = now
        self._classes[waiter.rank].put(waiter)
        self._size += 1

    def remove(self, waiter: Waiter[T]) -> bool:
        """Let it leave; False when it does not wait any more."""
        if waiter.where is None:
            return False
        waiter.where.remove(waiter)
        self._size -= 1
        return True

    def pop(self, now: float) -> Waiter[T] | None:
        """Take out who is next; None when nobody waits."""
        if not self._size:
            return None
        self._age(now)
        for each in self._classes:
            if each.size:
                self._size -= 1
                return each.pop()
        raise AssertionError("somebody waits, and no class has them")

    def push_out(self, newcomer: Waiter[T], now: float) -> Waiter[T] | None:
        """Take out who must give way when the queue is full; None: the newcomer must go.

        That is the newest of the lowest class below the newcomer's. When none is below: the newest
        of the group that has the most waiters for its weight in the same class, if that group would
        still have more than the newcomer's after it came. So a group that fills the queue does not
        shut the others out.
        """
        self._age(now)
        for each in reversed(self._classes[newcomer.rank + 1 :]):
            if each.size:
                return self._taken(each.newest())
        greedy = self._classes[newcomer.rank].greediest(newcomer)
        return self._taken(greedy) if greedy is not None else None

    def _taken(self, waiter: Waiter[T]) -> Waiter[T]:
        self.remove(waiter)
        return waiter

    def ahead(self, newcomer: Waiter[T], now: float) -> int:
        """About how many would be served before `newcomer`, were nobody to come after it.

        All of the higher classes, its own group's, and of the other groups as many as have their
        turns until then.
        """
        self._age(now)
        higher = sum(each.size for each in self._classes[: newcomer.rank])
        return higher + self._classes[newcomer.rank].ahead(newcomer)

    def _age(self, now: float) -> None:
        """Move up whoever has waited long enough, first to come first."""
        for below, above in zip(self._classes[:0:-1], self._classes[-2::-1], strict=True):
            for rank, line in below.lines.items():
                until = now - (rank - above.rank) * self.age_s
                while line:
                    waiter = next(iter(line.values()))
                    if waiter.came_at > until:
                        break
                    below.remove(waiter)
                    above.put(waiter)

    def __repr__(self) -> str:
        return f"<FairQueue {' '.join(str(each.size) for each in self._classes)}>"


Line = OrderedDict[int, Waiter[T]]
"""Waiters by number, in the order of coming. An OrderedDict, not a dict: the first of a dict from
whose front much was removed takes long to find."""


class _Class(Generic[T]):
    """Those who count as one class at the moment, whichever they came with."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.size = 0
        self.lines: dict[int, Line[T]] = {}
        """By the class they came with: each in the order of coming, and of moving up."""
        self._groups: dict[str, _Group[T]] = {}
        self._weight = 0  # of all groups that have waiters
        self._turns: list[tuple[float, int, _Group[T]]] = []
        """A heap of groups by the start tag of their next turn, then by who came first. A group
        stands in it at most once; one that has nobody waiting is dropped when it comes up."""
        self._time = 0.0  # virtual: the start tag of the turn served last

    def __iter__(self) -> Iterator[Waiter[T]]:
        for line in self.lines.values():
            yield from line.values()

    def put(self, waiter: Waiter[T]) -> None:
        waiter.where = self
        self.lines.setdefault(waiter.rank, OrderedDict())[waiter.number] = waiter
        group = self._groups.get(waiter.group)
        if group is None:
            group = self._groups[waiter.group] = _Group()
        if group.size:
            self._weight -= group.weight
        group.weight = waiter.weight  # a reload may have changed it
        self._weight += group.weight
        group.put(waiter)
        self.size += 1
        if not group.has_turn:
            self._give_turn(group)

    def _give_turn(self, group: _Group[T]) -> None:
        group.has_turn = True
        start = max(self._time, group.finish)
        heappush(self._turns, (start, group.first.number, group))

    def remove(self, waiter: Waiter[T]) -> None:
        waiter.where = None
        del self.lines[waiter.rank][waiter.number]
        group = self._groups[waiter.group]
        group.remove(waiter)
        if not group.size:
            self._weight -= group.weight
        self.size -= 1
        if not self.size:  # nobody waits, so nobody is owed anything
            self._groups.clear()
            self._turns.clear()
            self._time = 0.0

    def pop(self) -> Waiter[T]:
        """Whose turn it is."""
        while True:
            start, _, group = heappop(self._turns)
            group.has_turn = False
            if not group.size:  # they all left
                continue
            self._time = start
            group.finish = start + 1 / group.weight
            waiter = group.first
            self.remove(waiter)
            if group.size:
                self._give_turn(group)
            return waiter

    def newest(self) -> Waiter[T]:
        return max(
            (next(reversed(line.values())) for line in self.lines.values() if line),
            key=lambda waiter: waiter.number,
        )

    def greediest(self, newcomer: Waiter[T]) -> Waiter[T] | None:
        """The newest of the group with the most waiters for its weight, if `newcomer`'s own would
        have less even with it."""
        own = self._groups.get(newcomer.group)
        share = ((own.size if own is not None else 0) + 1) / newcomer.weight
        group = max(self._groups.values(), key=_share, default=None)
        return group.newest if group is not None and _share(group) > share else None

    def ahead(self, newcomer: Waiter[T]) -> int:
        own = self._groups.get(newcomer.group)
        weight = newcomer.weight
        if own is None or not own.size:
            turns, all_weights = 1, self._weight + weight
        else:
            turns, all_weights = own.size + 1, self._weight - own.weight + weight
        return min(self.size, ceil(turns * all_weights / weight) - 1)


class _Group(Generic[T]):
    """One group's waiters in one class."""

    __slots__ = ("_lines", "finish", "has_turn", "size", "weight")

    def __init__(self) -> None:
        self.size = 0
        self.weight = 1
        self.finish = 0.0  # virtual time at which its last turn is over
        self.has_turn = False  # stands in the heap of turns
        self._lines: dict[int, Line[T]] = {}  # by the class they came with

    def put(self, waiter: Waiter[T]) -> None:
        self._lines.setdefault(waiter.rank, OrderedDict())[waiter.number] = waiter
        self.size += 1

    def remove(self, waiter: Waiter[T]) -> None:
        del self._lines[waiter.rank][waiter.number]
        self.size -= 1

    @property
    def first(self) -> Waiter[T]:
        """Who came first."""
        heads = (next(iter(line.values())) for line in self._lines.values() if line)
        return min(heads, key=lambda waiter: waiter.number)

    @property
    def newest(self) -> Waiter[T]:
        tails = (next(reversed(line.values())) for line in self._lines.values() if line)
        return max(tails, key=lambda waiter: waiter.number)


def _share(group: _Group[T]) -> float:
    return group.size / group.weight
