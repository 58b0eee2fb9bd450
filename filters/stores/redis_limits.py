"""Limits that several processes share: one script on the server, one round trip a decision.

The algorithm is that of `filters.algo.window` and `filters.algo.pace`, in Lua, by the server's
clock. Slots are counted for each process under a lease, so that those of one that dies are free
after `LEASE_S`; and every beat says anew how many this process holds, so that neither a server that
was restarted nor a release that was lost leaves them wrong for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from filters.stores.redis import LEASE_S, Argument, Done, Redis, Script, StoreDown
from filters.stores.rules import Grant, Rated, Refusal, Rule, Slot

BEATS_AFTER = 3
"""A key whose last slot is free is told so in so many beats more, for what the server may have done
late: then it is forgotten."""
KEYS_IN_A_BEAT = 200

LEASE_US = round(LEASE_S * 1e6)


class _Held:
    """The slots of one key in this process."""

    __slots__ = ("beats", "count", "pending")

    def __init__(self) -> None:
        self.count = 0
        self.pending = 0  # asked for, and not answered yet
        self.beats = 0  # since it held none


class RedisGrant(Grant):
    """Taken on the server, and given back there, beside the calls."""

    __slots__ = ("_answer", "_holds", "_meter", "_taken")

    def __init__(self, meter: RedisMeter, amounts: Sequence[int], answer: Sequence[int]) -> None:
        self._meter = meter
        self._taken: list[int | None] = list(amounts)
        self._answer = answer
        self._holds = True

    def settle(self, index: int, amount: int) -> None:
        taken = self._taken[index]
        if taken is not None:
            self._taken[index] = None
            number, first_us = self._answer[1 + 2 * index : 3 + 2 * index]
            self._meter.settle(index, number, first_us, taken, amount)

    def release(self, end: object = None) -> None:
        if self._holds:
            self._holds = False
            self._meter.release()

    def undo(self) -> None:
        """Nothing came of it: all of it is given back."""
        for index in range(len(self._taken)):
            self.settle(index, 0)
        self.release()


def _undo(result: RedisGrant | Refusal) -> None:
    """Give everything back at once."""
    if isinstance(result, RedisGrant):
        result.undo()


class RedisMeter:
    """What one kind of calls takes on the server. `take` raises `StoreDown` when it is away."""

    __slots__ = ("_args", "_keys", "_limits", "_rated", "_slots")

    def __init__(
        self,
        limits: RedisLimits,
        rated: Sequence[Rated],
        slots: Sequence[Slot],
        keys: Sequence[str],
    ) -> None:
        self._limits = limits
        self._rated = rated
        self._slots = slots
        self._keys = keys
        # Of each rule, what the scripts want to know of it.
        self._args = [
            (rule.limit, round(rule.period_s * 1e6), -1 if rule.burst is None else rule.burst)
            for _, rule in rated
        ]

    async def take(self, amounts: Sequence[int]) -> Grant | Refusal:
        limits = self._limits
        args: list[Argument] = [*limits.first_args(), len(self._args)]
        for of_rule, amount in zip(self._args, amounts, strict=True):
            args += (*of_rule, amount)
        args += [slot.limit for slot in self._slots]
        waiter: asyncio.Future[RedisGrant | Refusal] = asyncio.get_running_loop().create_future()

        def done(answer: Any) -> None:
            for each in held:
                each.pending -= 1
                each.beats = 0
            if isinstance(answer, StoreDown):
                if not waiter.done():
                    waiter.set_exception(answer)
                return
            result: RedisGrant | Refusal
            if answer[0]:
                for each in held:
                    each.count += 1
                result = RedisGrant(self, amounts, answer)
            else:
                result = Refusal(answer[1], inf if answer[2] < 0 else answer[2] / 1e6, answer[3])
            if not waiter.done():
                waiter.set_result(result)
            else:  # whoever asked is gone
                _undo(result)

        limits.take(self._keys, args, done)
        held = limits.held(self._slots)  # not before: nobody forgets them while the store is away
        for each in held:
            each.pending += 1
        try:
            return await waiter
        except asyncio.CancelledError:
            # Perhaps in the very turn in which the answer came: then nobody else gives it back.
            if not waiter.cancelled() and waiter.done() and waiter.exception() is None:
                _undo(waiter.result())
            raise

    def settle(self, index: int, number: int, first_us: int, charged: int, amount: int) -> None:
        """What was `charged` into the bucket `number` was really `amount`."""
        if amount != charged:
            args = (*self._args[index], charged, amount, number, first_us)
            self._limits.settle(self._keys[index], args)

    def release(self) -> None:
        """One call that held the slots is over."""
        if self._slots:
            self._limits.leave([slot.key for slot in self._slots])


class RedisLimits:
    """Counts on the server."""

    def __init__(self, redis: Redis, now_us: Callable[[], int] = lambda: 0) -> None:
        """`now_us` is for tests; 0: the server's own clock."""
        self._redis = redis
        self._now_us = now_us
        self._take = Script.of("limits_common.lua", "limits_take.lua")
        self._settle = Script.of("limits_common.lua", "limits_settle.lua")
        self._say = Script.of("limits_common.lua", "limits_slots.lua")
        self._held: dict[str, _Held] = {}
        redis.on_beat(self._beat)

    def meter(self, rated: Sequence[Rated], slots: Sequence[Slot] = ()) -> RedisMeter:
        keys = [self._window_key(*each) for each in rated]
        keys += [self._slot_key(slot.key) for slot in slots]
        if len(set(keys)) != len(keys):
            raise ValueError(f"the same is taken twice at once: {keys}")
        return RedisMeter(self, rated, slots, keys)

    # For meters

    def first_args(self) -> tuple[Argument, ...]:
        """What the script that takes wants to know first."""
        return self._now_us(), self._redis.replica, LEASE_US

    def held(self, slots: Sequence[Slot]) -> list[_Held]:
        """What is known here of the keys of these slots."""
        return [self._held.setdefault(slot.key, _Held()) for slot in slots]

    def take(self, keys: Sequence[str], args: Sequence[Argument], done: Done) -> None:
        """Ask the server. Raises `StoreDown` when it is known to be away."""
        self._redis.call(self._take, keys, args, done)

    def settle(self, key: str, args: Sequence[Argument]) -> None:
        """Tell the server what was really taken."""
        self._redis.post(self._settle, [key], (self._now_us(), *args))

    def leave(self, keys: Sequence[str]) -> None:
        """One call of each of the keys is no longer in flight."""
        for key in keys:
            held = self._held[key]
            held.count -= 1
            held.beats = 0
        self._tell(keys, ["-"] * len(keys))

    def close(self) -> None:
        self._redis.off_beat(self._beat)

    def _beat(self) -> None:
        said: dict[str, Argument] = {}
        for key, held in list(self._held.items()):
            if held.pending:
                said[key] = "~"  # how many, only the answers on their way will tell
                continue
            said[key] = held.count
            if not held.count:
                held.beats += 1
                if held.beats > BEATS_AFTER:
                    del self._held[key]
        keys = list(said)
        for start in range(0, len(keys), KEYS_IN_A_BEAT):
            part = keys[start : start + KEYS_IN_A_BEAT]
            self._tell(part, [said[key] for key in part])

    def _tell(self, keys: Sequence[str], said: Sequence[Argument]) -> None:
        self._redis.post(
            self._say,
            [self._slot_key(key) for key in keys],
            (self._now_us(), self._redis.replica, LEASE_US, *said),
        )

    def _window_key(self, key: str, rule: Rule) -> str:
        return f"{self._redis.prefix}:window:{round(rule.period_s * 1e6)}:{rule.name}:{key}"

    def _slot_key(self, key: str) -> str:
        return f"{self._redis.prefix}:slots:{key}"

    def __repr__(self) -> str:
        held = sum(each.count for each in self._held.values())
        return f"<RedisLimits {self._redis.address} held={held}>"
