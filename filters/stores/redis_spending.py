"""Spending that several processes share: one script on the server, one round trip a decision.

Each process knows what it has itself spent and reserved of each account, and tells the server the
whole of it: with each settlement, and again with the beats. So nothing is lost when the server does
not hear it, nothing counts twice when it hears it twice, and a server that forgot everything knows
it again, from all who live. What a process has reserved counts under a lease; what it has spent
stays.

While the server is away, the processes go on by what they heard last, each with its share of what
was left; what they spend meanwhile they tell afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from filters.stores.redis import LEASE_S, Argument, Redis, Script, StoreDown
from filters.stores.rules import WhenDown
from filters.stores.spending import Account, Crossed, Level, Line
from sidecar.api import Counter, Kit, Rejected

BEATS_AFTER = 3
"""An account is told again in so many beats after its last change, for what the server may have
missed or done late."""
SLOW_BEATS = 30
"""And in each so manieth beat, for a server that forgot."""
ACCOUNTS_IN_A_BEAT = 100
MAX_ACCOUNTS = 20_000
"""Of more, those that rest are forgotten here; the server knows them."""
KEEP_S = 86_400
"""So long after its period the server keeps an account, for calls that began in it."""

LEASE_US = round(LEASE_S * 1e6)
KEEP_MS = KEEP_S * 1000


class Sum:
    """One account: what this process has spent and reserved of it, and last heard of all."""

    __slots__ = (
        *("account", "beats", "keys", "known", "others", "pending", "reserved", "spent", "writer"),
    )

    def __init__(self, account: Account, keys: tuple[str, str], writer: str) -> None:
        self.account = account
        self.keys = keys
        self.writer = writer
        """Under which this process has its part there: one that is forgotten and counted anew must
        not put the new part in the place of the old."""
        self.spent = 0
        self.reserved = 0
        self.pending = 0  # asked for, and not answered yet
        self.beats = 0  # since it was changed
        self.others = 0  # spent and reserved by them, as last heard
        self.known = 0  # of our own, when that was heard: in it already

    @property
    def own(self) -> int:
        return self.spent + self.reserved

    def heard(self, spent: int, reserved: int, amount: int) -> None:
        """What the server says of all, and has reserved for us beyond that."""
        self.others = max(0, spent + reserved - self.own)
        self.known = self.own + amount


class RedisHeld:
    """Reserved for one call, here and on the server."""

    __slots__ = ("_amounts", "_purse", "_sums", "totals")

    def __init__(
        self,
        purse: RedisPurse,
        sums: Sequence[Sum],
        amounts: Sequence[int],
        totals: Sequence[int],
    ) -> None:
        self._purse: RedisPurse | None = purse
        self._sums = sums
        self._amounts = amounts
        self.totals = totals
        for each, amount in zip(sums, amounts, strict=True):
            each.reserved += amount

    def settle(self, amounts: Sequence[int]) -> None:
        purse, self._purse = self._purse, None
        if purse is not None:
            purse.settle(self._sums, self._amounts, amounts)

    def undo(self) -> None:
        """Nothing came of it."""
        self.settle([0] * len(self._amounts))


class RedisPurse:
    """What one kind of calls is counted in, on the server."""

    __slots__ = ("_accounts", "_spending")

    def __init__(self, spending: RedisSpending, accounts: Sequence[Account]) -> None:
        self._spending = spending
        self._accounts = accounts

    async def reserve(
        self, amounts: Sequence[int], lines: Sequence[Line], when_down: WhenDown
    ) -> RedisHeld | Crossed:
        spending = self._spending
        sums = spending.sums(self._accounts)
        waiter: asyncio.Future[RedisHeld | Crossed] = asyncio.get_running_loop().create_future()

        def done(answer: Any) -> None:
            for each in sums:
                each.pending -= 1
                each.beats = 0
            if isinstance(answer, StoreDown):
                if not waiter.done():
                    waiter.set_exception(answer)
                return
            line, *levels = answer
            if line >= 0:
                sums[lines[line].account].heard(*levels, 0)
                if not waiter.done():
                    waiter.set_result(Crossed(line, Level(*levels)))
                return
            totals = []
            for index, each in enumerate(sums):
                spent, reserved = levels[2 * index : 2 * index + 2]
                each.heard(spent, reserved, amounts[index])
                totals.append(spent + reserved + amounts[index])
            held = RedisHeld(self, sums, amounts, totals)
            if waiter.done():
                held.undo()  # whoever asked is gone
            else:
                waiter.set_result(held)

        try:
            spending.ask(sums, amounts, lines, done)
            for each in sums:  # not before: nobody counts them down while the store is away
                each.pending += 1
            return await waiter
        except StoreDown:
            return self._without_store(sums, amounts, lines, when_down)
        except asyncio.CancelledError:
            # Perhaps in the very turn in which the answer came: then nobody else gives it back.
            if not waiter.cancelled() and waiter.done() and waiter.exception() is None:
                found = waiter.result()
                if isinstance(found, RedisHeld):
                    found.undo()
            raise

    def _without_store(
        self,
        sums: Sequence[Sum],
        amounts: Sequence[int],
        lines: Sequence[Line],
        when_down: WhenDown,
    ) -> RedisHeld | Crossed:
        """Decide by what was heard last. Of what was left then, each process has its share."""
        spending = self._spending
        spending.fell_back(when_down)
        if when_down == "closed":
            message = "the store that budgets are counted in is away; try again in a second"
            raise Rejected(503, "store_unavailable", message, retry_after_s=1.0)
        sharers = spending.sharers()
        totals = []
        for each, amount in zip(sums, amounts, strict=True):
            more = each.own + amount - each.known
            totals.append(each.others + each.known + (more * sharers if more > 0 else more))
        if when_down == "local_share":
            for index, (account, most) in enumerate(lines):
                if totals[account] > most:
                    return Crossed(index, _guess(sums[account]))
        return RedisHeld(self, sums, amounts, totals)

    def settle(self, sums: Sequence[Sum], reserved: Sequence[int], amounts: Sequence[int]) -> None:
        """What was reserved is over, and so much was spent."""
        for each, less, more in zip(sums, reserved, amounts, strict=True):
            each.reserved -= less
            each.spent += more
            each.beats = 0
        self._spending.tell(sums, [f"-{less}" for less in reserved])

    async def levels(self) -> list[Level]:
        spending = self._spending
        sums = spending.sums(self._accounts)
        try:
            answer = await spending.look(sums)
        except StoreDown:
            return [_guess(each) for each in sums]
        return [Level(*answer[at : at + 2]) for at in range(1, len(answer), 2)]


def _guess(each: Sum) -> Level:
    """How an account stands as far as this process knows; what others reserve counts as spent."""
    return Level(each.others + each.spent, each.reserved)


class RedisSpending:
    """All accounts of the server."""

    def __init__(self, redis: Redis, kit: Kit, now_us: Callable[[], int] = lambda: 0) -> None:
        """`now_us` is for tests; 0: the server's own clock."""
        self._redis = redis
        self._wall = kit.clock.wall
        self._workers = kit.workers
        self._now_us = now_us
        self._script = Script.of("spending.lua")
        self._sums: dict[str, Sum] = {}
        self._serials = itertools.count()
        self._beats = 0
        fallbacks = kit.metrics.counter(
            "llm_sidecar_store_fallbacks",
            "Decisions that were made without the shared store, as it was away.",
            ("use", "answer"),
        )
        answers: tuple[WhenDown, ...] = ("open", "closed", "local_share")
        self._fallbacks: dict[WhenDown, Counter] = {
            each: fallbacks.child("budgets", each) for each in answers
        }
        redis.on_beat(self._beat)

    async def load(self) -> None:
        """The server knows it all."""

    def purse(self, accounts: Sequence[Account]) -> RedisPurse:
        return RedisPurse(self, accounts)

    def close(self) -> None:
        self._redis.off_beat(self._beat)

    # For purses

    def sums(self, accounts: Sequence[Account]) -> list[Sum]:
        """What is known here of these accounts. Good for as long as something is reserved there or
        asked, else until the next await."""
        found = self._sums
        return [found.get(account.key) or self._add(account) for account in accounts]

    def _add(self, account: Account) -> Sum:
        if len(self._sums) >= MAX_ACCOUNTS:
            self._forget_idle()
        prefix = self._redis.prefix
        keys = f"{prefix}:spent:{account.key}", f"{prefix}:reserved:{account.key}"
        writer = f"{self._redis.replica}.{next(self._serials)}"
        added = self._sums[account.key] = Sum(account, keys, writer)
        return added

    def ask(
        self,
        sums: Sequence[Sum],
        amounts: Sequence[int],
        lines: Sequence[Line],
        done: Callable[[Any], None],
    ) -> None:
        """Reserve on the server. Raises `StoreDown` when it is known to be away."""
        args: list[Argument] = [*self._first_args("reserve"), len(sums)]
        for each, amount in zip(sums, amounts, strict=True):
            args += (each.writer, amount, each.account.ends_at)
        for line in lines:
            args += line
        self._redis.call(self._script, _keys(sums), args, done)

    async def look(self, sums: Sequence[Sum]) -> Any:
        """What a reservation of nothing is answered. Raises `StoreDown`."""
        args: list[Argument] = [*self._first_args("reserve"), len(sums)]
        for each in sums:
            args += (each.writer, 0, each.account.ends_at)
        return await self._redis.run(self._script, _keys(sums), args)

    def tell(self, sums: Sequence[Sum], reserved: Sequence[Argument]) -> None:
        """Say what this process has spent in all, and what of its reservations is new."""
        args: list[Argument] = [*self._first_args("tell")]
        for each, said in zip(sums, reserved, strict=True):
            args += (each.writer, each.spent, said, each.account.ends_at)
        self._redis.post(self._script, _keys(sums), args)

    def fell_back(self, answer: WhenDown) -> None:
        self._fallbacks[answer].inc()

    def sharers(self) -> int:
        """Processes that were there last. Every worker is one, too; before the first answer we
        know of our own only."""
        return max(1, self._redis.replicas, self._workers)

    def _first_args(self, what: str) -> tuple[Argument, ...]:
        return what, self._now_us(), LEASE_US, KEEP_MS

    # Beats

    def _beat(self) -> None:
        self._beats += 1
        oldest = self._wall() - KEEP_S
        told = []
        for key, each in list(self._sums.items()):
            each.beats += 1
            if each.reserved or each.pending or each.beats <= BEATS_AFTER:
                told.append(each)
            elif each.account.ends_at < oldest:
                del self._sums[key]
            elif self._beats % SLOW_BEATS == 0:
                told.append(each)
        for start in range(0, len(told), ACCOUNTS_IN_A_BEAT):
            part = told[start : start + ACCOUNTS_IN_A_BEAT]
            # While something is asked for, only the answer will tell what is reserved.
            self.tell(part, ["~" if each.pending else each.reserved for each in part])

    def _forget_idle(self) -> None:
        """Forget what the server surely knows, and nobody uses now."""
        self._sums = {
            key: each
            for key, each in self._sums.items()
            if each.reserved or each.pending or each.beats <= BEATS_AFTER
        }

    def __repr__(self) -> str:
        return f"<RedisSpending {self._redis.address} accounts={len(self._sums)}>"


def _keys(sums: Sequence[Sum]) -> list[str]:
    return [key for each in sums for key in each.keys]
