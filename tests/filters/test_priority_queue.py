"""Who gets in, who waits, who is refused and what they are told; and that no slot is ever lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest

from filters.priority_queue import PriorityQueue
from sidecar.api import (
    Attempt,
    Call,
    CallFilter,
    CallNext,
    End,
    FilterConfig,
    Headers,
    Kit,
    Outcome,
    Reply,
    Team,
)
from sidecar.filter import KitResources
from tests.contract.scenarios import FIRST, SCENARIOS, Scenario
from tests.support.harness import MODEL, TEAM, Harness, Run, ScriptedSource, Use

SEEDS = range(30)


class Teams(CallFilter):
    """One queue filter for each team, as their chains have."""

    class Config(FilterConfig):
        teams: dict[str, dict[str, Any]]

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self.queues = {
            team: PriorityQueue(
                PriorityQueue.Config.model_validate(settings), replace(kit, team=team)
            )
            for team, settings in config.teams.items()
        }

    async def start(self) -> None:
        for each in self.queues.values():
            await each.start()

    async def stop(self) -> None:
        for each in self.queues.values():
            await each.stop()

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        return await self.queues[call.team.name].handle(call, call_next)


class Scene:
    """A queue in front of an upstream that streams until the test says `end`."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.clock = harness.clock
        self.open: dict[str, ScriptedSource] = {}
        """Streams that run, by the name of their call."""
        self.runs: dict[str, Run] = {}
        harness.upstream.answer = self._answer

    async def _answer(self, attempt: Attempt) -> Reply:
        source = ScriptedSource()
        source.feed(FIRST)
        self.open[attempt.headers["x-name"]] = source
        return Reply(200, Headers({"content-type": "text/event-stream"}), source.body)

    async def come(
        self,
        *names: str,
        priority: str = "normal",
        team: str = TEAM.name,
        model: str = MODEL,
        **headers: str,
    ) -> None:
        """Calls come, one after the other."""
        for name in names:
            fields = [("x-name", name), *((k.replace("_", "-"), v) for k, v in headers.items())]
            call = self.harness.call({"model": model}, headers=fields)
            call.team = Team(team, priority, TEAM.models, TEAM.upstreams)
            self.runs[name] = self.harness.start(call)
            await turns()

    async def end(self, *names: str) -> str:
        """These streams end; the names of those who got in."""
        before = list(self.open)
        for name in names:
            self.open[name].finish()
            await self.runs[name].ended()
            del self.open[name]
        await turns()
        return "".join(name for name in self.open if name not in before)

    async def drain(self) -> str:
        """End one stream after the other, first come first; the names of those who got in."""
        order = ""
        while self.open:
            order += await self.end(next(iter(self.open)))
        return order

    async def refusal(self, name: str) -> tuple[int, str, str | None]:
        """Status, code and Retry-After of a call that was refused."""
        run = self.runs[name]
        end = await run.ended()
        assert end.outcome is Outcome.REJECTED
        error = orjson.loads(run.client.data)["error"]
        return run.client.status, error["code"], run.client.headers.get("retry-after")

    @property
    def in_flight(self) -> float:
        return float(self.harness.value("llm_sidecar_queue_in_flight"))

    def waiting(self, priority: str = "normal") -> float:
        return float(self.harness.value("llm_sidecar_queue_waiting", **{"class": priority}))

    def refused(self, why: str, priority: str = "normal") -> float:
        labels = {"class": priority, "why": why}
        return float(self.harness.value("llm_sidecar_queue_refused", **labels))


async def turns() -> None:
    """Let everybody run who can."""
    for _ in range(8):
        await asyncio.sleep(0)


@asynccontextmanager
async def scene(
    teams: Mapping[str, Mapping[str, Any]] | None = None, workers: int = 1, **settings: Any
) -> AsyncIterator[Scene]:
    use = Use(PriorityQueue, {"max_in_flight": 1, **settings})
    if teams is not None:
        of_teams = {name: {"max_in_flight": 1, **settings, **more} for name, more in teams.items()}
        use = Use(Teams, {"teams": of_teams})
    async with Harness(use, workers=workers) as harness:
        at = Scene(harness)
        yield at
        for run in at.runs.values():
            run.client_leaves()
            await run.ended()
        assert at.in_flight == 0
        assert [at.waiting(each) for each in ("high", "normal", "low")] == [0, 0, 0]
        assert harness.clock._timers == []


# Slots


async def test_calls_beyond_the_bound_wait_until_a_stream_has_ended() -> None:
    async with scene(max_in_flight=2) as at:
        await at.come("a", "b", "c")
        assert list(at.open) == ["a", "b"]
        assert (at.in_flight, at.waiting()) == (2, 1)
        at.open["a"].feed(FIRST)  # the head and some events are no end
        await turns()
        assert list(at.open) == ["a", "b"]
        assert await at.end("a") == "c"
        assert (at.in_flight, at.waiting()) == (2, 0)


async def test_a_free_slot_costs_no_coroutine() -> None:
    async with scene() as at:
        (queue,) = at.harness.filters
        reply = asyncio.get_running_loop().create_future()
        call = at.harness.call()
        assert queue.handle(call, lambda _: reply) is reply  # type: ignore[attr-defined]
        assert at.in_flight == 1
        call.finish(End(Outcome.DISCARDED))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
async def test_slot_comes_back_on_every_kind_of_end(scenario: Scenario) -> None:
    use = Use(PriorityQueue, {"max_in_flight": 1, "max_waiting": 0})
    async with Harness(*scenario.before, use, *scenario.after) as harness:
        for _ in range(3):
            run = await scenario.play(harness)
            assert run.client.status != 503 or scenario.call_end is Outcome.ABORTED
            assert harness.value("llm_sidecar_queue_in_flight") == 0
        assert harness.value("llm_sidecar_queue_refused", **{"class": "normal", "why": "full"}) == 0


async def test_workers_share_the_bounds_and_each_has_at_least_one() -> None:
    async with scene(max_in_flight=4, max_waiting=2, workers=2) as at:
        await at.come("a", "b", "c", "d")
        assert list(at.open) == ["a", "b"]
        assert await at.refusal("d") == (503, "queue_full", "1")
    async with scene(max_in_flight=4, max_waiting=2, workers=8) as at:
        await at.come("a", "b", "c")
        assert list(at.open) == ["a"]
        assert at.waiting() == 1


async def test_time_in_the_queue_is_held_time_and_not_overhead() -> None:
    async with scene() as at:
        await at.come("a", "b")
        at.clock.turn(3.0)
        await at.end("a")
        assert at.runs["a"].call.held_s == 0
        assert at.runs["b"].call.held_s == 3.0
        assert at.harness.value("llm_sidecar_queue_wait_seconds", **{"class": "normal"}) == 1


# Order


async def test_high_goes_before_normal_and_normal_before_low() -> None:
    async with scene() as at:
        await at.come("-")
        for name, priority in zip("lnhLNH", ("low", "normal", "high") * 2, strict=True):
            await at.come(name, priority=priority)
        assert [at.waiting(each) for each in ("high", "normal", "low")] == [2, 2, 2]
        assert await at.drain() == "hHnNlL"


async def test_one_that_waits_moves_up_and_is_served_before_higher_ones_that_came_later() -> None:
    async with scene(age_s=5.0) as at:
        await at.come("-")
        await at.come("l", priority="low")
        at.clock.turn(9.9)
        await at.come("h", priority="high")
        at.clock.turn(0.1)
        await at.come("H", priority="high")
        assert await at.drain() == "lhH"


async def test_a_low_call_is_served_though_high_ones_never_stop_coming() -> None:
    async with scene(age_s=5.0, max_wait_s=1000.0) as at:
        await at.come("-")
        await at.come("l", priority="low")
        order = ""
        for name in "ABCDEFGHIJKLMNOP":
            await at.come(name, priority="high")
            at.clock.turn(1.0)
            order += await at.end(next(iter(at.open)))
        assert order.index("l") == 9  # after ten seconds it is as important as they


async def test_teams_share_by_weight_whoever_comes_with_more() -> None:
    async with scene({"a": {"weight": 1}, "b": {"weight": 2}}) as at:
        await at.come("-", team="a")
        await at.come(*"aceg", team="a")
        await at.come(*"BDFH", team="b")
        order = await at.drain()
        assert sorted(order[:6]) == ["B", "D", "F", "H", "a", "c"]


async def test_calls_of_a_team_keep_their_order() -> None:
    async with scene() as at:
        await at.come("-", *"abcdef")
        assert await at.drain() == "abcdef"


# Classes


@pytest.mark.parametrize(
    ("settings", "call", "expected"),
    [
        ({}, {}, "normal"),
        ({}, {"priority": "high"}, "high"),  # of the team
        ({"priority": "low"}, {"priority": "high"}, "low"),
        ({"models": {"gpt-*": "high"}}, {"priority": "low"}, "high"),
        ({"models": {"qwen-*": "high"}}, {}, "normal"),
        ({"models": {"gpt-*": "high"}, "priority": "low"}, {}, "high"),
        ({}, {"x_priority": "low"}, "low"),
        ({}, {"x_priority": " LOW "}, "low"),
        ({}, {"x_priority": "high"}, "normal"),  # nobody raises itself
        ({"caller_may_raise": True}, {"x_priority": "high"}, "high"),
        ({"caller_may_raise": True}, {"x_priority": "low"}, "low"),
        ({}, {"x_priority": "urgent"}, "normal"),
        ({"header": "x-class"}, {"x_priority": "low"}, "normal"),
        ({"header": "x-class"}, {"x_class": "low"}, "low"),
        ({"header": None}, {"x_priority": "low"}, "normal"),
    ],
)
async def test_class_is_that_of_header_model_setting_or_team(
    settings: Mapping[str, Any], call: Mapping[str, str], expected: str
) -> None:
    async with scene(**settings) as at:
        await at.come("-")
        await at.come("x", **call)
        assert at.waiting(expected) == 1


# Full


async def test_a_full_queue_refuses_with_an_honest_retry_after() -> None:
    async with scene(max_waiting=2) as at:
        await at.come("-")
        at.clock.turn(8.0)
        await at.end("-")  # eight seconds in flight: what is known of calls
        await at.come("a", "b", "c", "d")
        assert await at.refusal("d") == (503, "queue_full", "24")  # b and c before it
        assert at.refused("full") == 1
        assert await at.drain() == "bc"


async def test_before_any_call_has_ended_retry_after_is_a_second() -> None:
    async with scene(max_waiting=0) as at:
        await at.come("a", "b")
        assert await at.refusal("b") == (503, "queue_full", "1")


async def test_newest_of_the_lowest_class_gives_way_to_a_higher_one() -> None:
    async with scene(max_waiting=3) as at:
        await at.come("-")
        await at.come("n", priority="normal")
        await at.come("l", "L", priority="low")
        await at.come("h", priority="high")
        assert (await at.refusal("L"))[:2] == (503, "queue_full")
        assert at.refused("pushed_out", "low") == 1
        assert (at.waiting("high"), at.waiting("normal"), at.waiting("low")) == (1, 1, 1)
        assert await at.drain() == "hnl"


async def test_nobody_gives_way_to_its_own_class() -> None:
    async with scene(max_waiting=1) as at:
        await at.come("-")
        await at.come("h", "H", priority="high")
        assert (await at.refusal("H"))[:2] == (503, "queue_full")
        assert await at.drain() == "h"


async def test_a_team_that_fills_the_queue_does_not_shut_the_others_out() -> None:
    async with scene({"a": {}, "b": {}}, max_waiting=4) as at:
        await at.come("-", *"cdef", team="a")
        await at.come(*"XYZ", team="b")
        assert (await at.refusal("f"))[1] == "queue_full"
        assert (await at.refusal("e"))[1] == "queue_full"
        assert (await at.refusal("Z"))[1] == "queue_full"  # two each by now
        assert sorted(await at.drain()) == ["X", "Y", "c", "d"]


# Time


async def test_who_has_waited_as_long_as_allowed_is_refused_then() -> None:
    async with scene(max_wait_s=10.0) as at:
        await at.come("-", "a")
        at.clock.turn(9.99)
        await turns()
        assert at.waiting() == 1
        at.clock.turn(0.01)
        assert await at.refusal("a") == (503, "queue_timeout", "1")
        assert at.refused("timeout") == 1
        assert at.waiting() == 0
        assert at.runs["a"].call.held_s == pytest.approx(10.0)


async def test_call_that_cannot_make_it_before_its_deadline_is_refused_at_once() -> None:
    async with scene() as at:
        await at.come("-")
        at.clock.turn(4.0)
        await at.end("-")
        await at.come("a", "b")
        await at.come("c", x_request_timeout="7.9")  # two turns of four seconds before it
        assert await at.refusal("c") == (503, "deadline_too_short", "8")
        assert at.refused("too_late") == 1
        await at.come("d", x_request_timeout="8.1")
        await at.come("e", priority="high", x_request_timeout="4.1")
        assert (at.waiting("high"), at.waiting()) == (1, 2)
        assert await at.drain() == "ebd"


async def test_call_that_is_refused_for_its_deadline_pushes_nobody_out() -> None:
    async with scene(max_waiting=1) as at:
        await at.come("-")
        at.clock.turn(4.0)
        await at.end("-")
        await at.come("a")
        await at.come("l", priority="low")
        await at.come("h", priority="high", x_request_timeout="3")
        assert (await at.refusal("h"))[1] == "deadline_too_short"
        assert at.waiting("low") == 1


async def test_deadline_that_passes_in_the_queue_ends_the_wait() -> None:
    async with scene() as at:
        await at.come("-")
        await at.come("a", x_request_timeout="2.5")
        at.clock.turn(2.4)
        await turns()
        assert at.waiting() == 1
        at.clock.turn(0.1)
        assert (await at.refusal("a"))[:2] == (504, "deadline_exceeded")
        assert at.refused("deadline") == 1


async def test_call_whose_deadline_has_passed_does_not_even_wait() -> None:
    async with scene() as at:
        await at.come("-")
        call = at.harness.call(headers=[("x-request-timeout", "1"), ("x-name", "a")])
        at.clock.turn(1.0)
        at.runs["a"] = at.harness.start(call)
        assert (await at.refusal("a"))[:2] == (504, "deadline_exceeded")


# Leaving


async def test_who_leaves_is_out_at_once_and_its_place_is_free() -> None:
    async with scene(max_waiting=2) as at:
        await at.come("-", "a", "b")
        at.runs["a"].client_leaves()
        assert (await at.runs["a"].ended()).outcome is Outcome.CLIENT_GONE
        assert at.waiting() == 1
        await at.come("c")
        assert at.waiting() == 2
        assert await at.drain() == "bc"


async def test_slot_given_to_one_who_leaves_in_the_same_turn_goes_to_the_next() -> None:
    async with scene() as at:
        await at.come("-", "a", "b")
        at.open["-"].finish()  # "a" has the slot now, and does not know yet
        assert (at.in_flight, at.waiting()) == (1, 1)
        at.runs["a"].client_leaves()
        await at.runs["a"].ended()
        await turns()
        del at.open["-"]
        assert list(at.open) == ["b"]
        assert (at.in_flight, at.waiting()) == (1, 0)


async def test_slot_that_comes_free_as_one_leaves_goes_to_the_next() -> None:
    async with scene() as at:
        await at.come("-", "a", "b")
        at.runs["a"].client_leaves()  # cancelled, and still among the waiters
        at.open.pop("-").finish()
        await turns()
        assert list(at.open) == ["b"]
        assert (await at.runs["a"].ended()).outcome is Outcome.CLIENT_GONE


async def test_time_that_is_over_in_the_turn_of_the_own_slot_changes_nothing() -> None:
    async with scene(max_wait_s=5.0) as at:
        await at.come("-", "a")
        at.open.pop("-").finish()
        at.clock.turn(5.0)
        await turns()
        assert list(at.open) == ["a"]
        assert at.in_flight == 1


async def test_pushed_out_and_gone_in_the_same_turn() -> None:
    async with scene(max_waiting=1) as at:
        await at.come("-")
        await at.come("l", priority="low")
        await at.come("h", priority="high")
        at.runs["l"].client_leaves()
        await at.runs["l"].ended()
        assert await at.drain() == "h"


async def test_shutdown_ends_those_who_wait() -> None:
    async with scene() as at:
        await at.come("-", "a")
        at.runs["a"].abort()
        assert (await at.runs["a"].ended()).outcome is Outcome.ABORTED
        assert at.waiting() == 0


# Reload


def reloaded(at: Scene, **settings: Any) -> PriorityQueue:
    """The filter of the next snapshot."""
    (old,) = at.harness.filters
    kit = replace(old.kit, resources=KitResources(at.harness.resources, 2))
    return PriorityQueue(PriorityQueue.Config.model_validate(settings), kit)


async def test_a_reload_with_more_slots_lets_waiters_in_at_once() -> None:
    async with scene() as at:
        await at.come(*"abcd")
        new = reloaded(at, max_in_flight=3)
        assert list(at.open) == ["a"]
        await new.start()
        await turns()
        assert list(at.open) == ["a", "b", "c"]
        await at.harness.filters[0].stop()
        assert await at.end("a") == "d"
        await new.stop()


async def test_a_reload_with_fewer_slots_lets_nobody_in_until_enough_have_ended() -> None:
    async with scene(max_in_flight=3) as at:
        await at.come(*"abcde")
        new = reloaded(at, max_in_flight=1)
        await new.start()
        assert await at.end("a", "b") == ""
        assert await at.end("c") == "d"
        await new.stop()


async def test_a_reload_that_fails_leaves_the_bounds_as_they_were() -> None:
    async with scene() as at:
        await at.come("a")
        new = reloaded(at, max_in_flight=3)
        await new.start()
        await new.stop()
        await at.come("b")
        assert list(at.open) == ["a"]


# Whatever happens


@pytest.mark.parametrize("seed", SEEDS)
async def test_never_more_in_flight_than_allowed_and_never_a_slot_idle(seed: int) -> None:
    chance = random.Random(seed)
    slots = chance.randint(1, 3)
    teams: dict[str, dict[str, Any]] = {"a": {"weight": 3}, "b": {}}
    async with scene(teams, max_in_flight=slots, max_waiting=5, max_wait_s=20.0) as at:
        for number in range(60):
            step = chance.random()
            if step < 0.5:
                priority = chance.choice(["high", "normal", "low"])
                await at.come(str(number), priority=priority, team=chance.choice("ab"))
            elif step < 0.7 and at.open:
                name = chance.choice(list(at.open))
                at.open.pop(name).finish()
            elif step < 0.9 and at.runs:
                name = chance.choice(list(at.runs))
                at.runs[name].client_leaves()
                at.open.pop(name, None)
            else:
                at.clock.turn(chance.choice([0.5, 5.0, 20.0]))
            if chance.random() < 0.5:  # else the next step comes in the same turn of the loop
                await turns()
                waiting = sum(at.waiting(each) for each in ("high", "normal", "low"))
                assert at.in_flight == len(at.open) <= slots
                assert waiting <= 5
                assert not waiting or at.in_flight == slots
        await turns()
        while at.open:
            at.open.popitem()[1].finish()
            await turns()
        for run in at.runs.values():
            async with asyncio.timeout(5.0):
                await run.ended()


async def test_a_retry_outside_does_not_make_a_call_wait_for_itself() -> None:
    twice = 2

    class Again(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            for _ in range(twice - 1):
                (await call_next(call)).discard()
            return await call_next(call)

    async with Harness(Again, Use(PriorityQueue, {"max_in_flight": 1})) as harness:
        run = await harness.run()
        assert run.client.status == 200
        assert len(harness.upstream.sent) == twice
        assert harness.value("llm_sidecar_queue_in_flight") == 0


async def test_what_the_sidecar_answers_itself_never_waits() -> None:
    async with scene(max_in_flight=1) as at:
        await at.come("a")
        run = await at.harness.run(at.harness.call(b"", method="GET", path="/v1/models"))
        assert run.client.status == 200
        assert at.in_flight == 1
        await at.end("a")
