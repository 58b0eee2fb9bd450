"""Circuits that several processes share: one script on the server, one round trip a question.

The rules are those of `filters.algo.circuit`, in Lua, by the server's clock. Reports go beside the
calls. Probes hold their places under a lease, so that those of a process that dies come free.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import count
from typing import Any

from filters.algo.circuit import Refusal, Rules, State, Verdict, View
from filters.stores.memory_circuits import ALL_MODELS, MemoryCircuits, Report, Shown, Sightings
from filters.stores.redis import Argument, Redis, Script, StoreDown
from filters.stores.rules import WhenDown
from sidecar.api import Counter, Kit, Rejected

KEEP_S = 86_400
"""A circuit that nobody asks for is forgotten after so long, or after four times its longest
recovery and lease, if that is more."""


class RedisCircuit:
    """One circuit on the server, and what holds while that is away."""

    def __init__(self, circuits: RedisCircuits, upstream: str, model: str) -> None:
        self._circuits = circuits
        self.upstream = upstream
        self.model = model
        self._keys = circuits.keys(upstream, model)
        self._forced: State | None = None  # as last heard

    async def admit(self, rules: Rules, when_down: WhenDown) -> Report | Refusal:
        """Whether an attempt may go: how to report it, or why not. While the store is away
        `when_down` says so, and with `closed` this raises `Rejected`."""
        token = self._circuits.next_token()
        waiter: asyncio.Future[Report | Refusal] = asyncio.get_running_loop().create_future()

        def done(answer: Any) -> None:
            if isinstance(answer, StoreDown):
                if not waiter.done():
                    waiter.set_exception(answer)
                return
            self.heard(answer)
            may_go, epoch, is_probe, wait_s = answer[5:]
            if may_go:
                report = partial(self._report, rules, token, bool(is_probe), epoch)
                if waiter.done():
                    report(Verdict.NONE)  # whoever asked is gone
                else:
                    waiter.set_result(report)
            elif not waiter.done():
                waiter.set_result(Refusal(float(wait_s) if wait_s else None))

        try:
            self._call("admit", rules, (token,), done)
            return await waiter
        except StoreDown:
            return self._without_store(rules, when_down)
        except asyncio.CancelledError:
            # The answer may have come in the turn that cancelled us: nobody else knows of it.
            if not waiter.cancelled() and waiter.done() and waiter.exception() is None:
                found = waiter.result()
                if not isinstance(found, Refusal):
                    found(Verdict.NONE)
            raise

    def heard(self, answer: Sequence[Any]) -> View:
        """Note what the server says of the circuit."""
        state, forced = State(answer[0].decode()), answer[3].decode()
        self._forced = State(forced) if forced else None
        retry_in_s = float(answer[2]) if answer[2] else None
        view = View(state, answer[1], retry_in_s, self._forced)
        if answer[4]:
            self._circuits.sightings.changed(self.upstream, self.model, view)
        else:
            self._circuits.sightings.saw(self.upstream, self.model, state)
        return view

    def _report(
        self, rules: Rules, token: str, is_probe: bool, epoch: bytes, verdict: Verdict
    ) -> None:
        args = (token, epoch, verdict.value, repr(self._circuits.rand()))
        if not is_probe and verdict is not Verdict.FAILURE:
            if verdict is Verdict.SUCCESS:
                self._post(rules, args)
            return
        try:
            self._call("report", rules, args, self._reported)
        except StoreDown:
            self._post(rules, args)  # which counts what is lost

    def _reported(self, answer: Any) -> None:
        if isinstance(answer, StoreDown):
            self._circuits.redis.count_dropped()
        else:
            self.heard(answer)

    def _without_store(self, rules: Rules, when_down: WhenDown) -> Report | Refusal:
        self._circuits.fallbacks[when_down].inc()
        if self._forced is State.OPEN:
            return Refusal(None)
        if self._forced is State.CLOSED or when_down == "open":
            return _ignore
        if when_down == "closed":
            message = "the store of circuits does not answer, and they may not be passed without it"
            raise Rejected(503, "store_unavailable", message, retry_after_s=1.0)
        circuit = self._circuits.local.circuit(self.upstream, self.model)
        found = circuit.admit(rules)
        self._circuits.sightings.saw(self.upstream, self.model, circuit.circuit.state)
        return found

    def _call(
        self, what: str, rules: Rules, args: Sequence[Argument], done: Callable[[Any], None]
    ) -> None:
        circuits = self._circuits
        circuits.redis.call(circuits.script, self._keys, self._args(what, rules, args), done)

    def _post(self, rules: Rules, args: Sequence[Argument]) -> None:
        circuits = self._circuits
        circuits.redis.post(circuits.script, self._keys, self._args("report", rules, args))

    def _args(self, what: str, rules: Rules, args: Sequence[Argument]) -> tuple[Argument, ...]:
        first = self._circuits.args(what, self.upstream, self.model, _keep_ms(rules))
        return (*first, *_rules_args(rules), *args)

    def __repr__(self) -> str:
        return f"<RedisCircuit {self.upstream} {self.model}>"


class RedisCircuits:
    """All circuits of the server. While it is away, every process has its own."""

    def __init__(
        self,
        redis: Redis,
        kit: Kit,
        *,
        now: Callable[[], float] | None = None,
        rand: Callable[[], float] = random.random,
    ) -> None:
        """`now` is for tests; None: the server's own clock."""
        self.redis = redis
        self.rand = rand
        self.script = Script.of("circuits.lua")
        self.sightings = Sightings(kit)
        self.local = MemoryCircuits(kit.clock, self.sightings, rand)
        fallbacks = kit.metrics.counter(
            "llm_sidecar_store_fallbacks",
            "Decisions that were made without the shared store, as it was away.",
            ("use", "answer"),
        )
        answers: tuple[WhenDown, ...] = ("open", "closed", "local_share")
        self.fallbacks: dict[WhenDown, Counter] = {
            each: fallbacks.child("circuits", each) for each in answers
        }
        self._now = now
        self._tokens = count(1)
        self._circuits: dict[tuple[str, str], RedisCircuit] = {}

    def circuit(self, upstream: str, model: str) -> RedisCircuit:
        """The circuit of this upstream and model."""
        circuit = self._circuits.get((upstream, model))
        if circuit is None:
            circuit = self._circuits[upstream, model] = RedisCircuit(self, upstream, model)
        return circuit

    async def show(self) -> list[Shown]:
        """Every circuit of the server, in no order; while it is away, those of this process."""
        try:
            names = await self.redis.run(INDEX, [self._all_key])
            found = await asyncio.gather(
                *(self._show(*each.decode().split("|", 1)) for each in names)
            )
        except StoreDown:
            return await self.local.show()
        return [each for each in found if each is not None]

    async def force(self, upstream: str, model: str, state: State | None) -> None:
        """Hold circuits in a state; `*` for all models of the upstream, also those to come. Raises
        ValueError when the store is away."""
        args = (*self.args("force", upstream, model, KEEP_S * 1000), state or "")
        try:
            answer = await self.redis.run(self.script, self.keys(upstream, model), args)
        except StoreDown:
            raise ValueError("the shared store does not answer: try again") from None
        if model != ALL_MODELS:
            self.circuit(upstream, model).heard(answer)

    async def _show(self, upstream: str, model: str) -> Shown | None:
        args = self.args("show", upstream, model, KEEP_S * 1000)
        answer = await self.redis.run(self.script, self.keys(upstream, model), args)
        if answer is None:
            return None
        return Shown(upstream, model, self.circuit(upstream, model).heard(answer))

    # For its circuits

    def keys(self, upstream: str, model: str) -> tuple[str, ...]:
        """The keys that the script of this circuit needs."""
        prefix = self.redis.prefix
        return f"{prefix}:circuit:{upstream}|{model}", f"{prefix}:circuits:forced", self._all_key

    def args(self, what: str, upstream: str, model: str, keep_ms: int) -> tuple[Argument, ...]:
        """The script's first arguments."""
        now = "" if self._now is None else repr(self._now())
        return what, now, keep_ms, upstream, model

    def next_token(self) -> str:
        """The name of one attempt, among all of all processes."""
        return f"{self.redis.replica}-{next(self._tokens)}"

    @property
    def _all_key(self) -> str:
        return f"{self.redis.prefix}:circuits"

    def __repr__(self) -> str:
        return f"<RedisCircuits {self.redis!r}>"


INDEX = Script("return redis.call('SMEMBERS', KEYS[1])")


@lru_cache(maxsize=256)
def _rules_args(rules: Rules) -> tuple[Argument, ...]:
    values = [getattr(rules, name) for name in Rules.__dataclass_fields__]
    return tuple("" if value is None else repr(value) for value in values)


@lru_cache(maxsize=256)
def _keep_ms(rules: Rules) -> int:
    longest = rules.recovery_timeout_s + rules.max_recovery_timeout_s + rules.probe_lease_s
    return round(max(KEEP_S, 4 * longest) * 1000)


def _ignore(verdict: Verdict) -> None:
    """The report of an attempt that no circuit let through."""
