"""How many calls are let in: by time and at once, for whom, and what the others are told."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from filters.rate_limit import LONG_WAIT_S, LONGEST_NAME, RateLimit
from sidecar.api import AttemptFilter, AttemptNext, Call, Reply, Target, Team
from sidecar.chain import link_call
from sidecar.dialects import ANTHROPIC
from sidecar.team import Patterns
from tests.support.harness import MODEL, FakeUpstream, Harness, Run, Use


def limited(settings: dict[str, Any], **more: Any) -> Harness:
    return Harness(Use(RateLimit, settings), **more)


def chat(harness: Harness, model: str = MODEL, key: str = "sk-1") -> Call:
    return harness.call({"model": model}, headers=[("authorization", f"Bearer {key}")])


async def statuses(harness: Harness, count: int, **more: Any) -> list[int]:
    return [(await harness.run(chat(harness, **more))).client.status for _ in range(count)]


def error(run: Run) -> Any:
    return orjson.loads(run.client.data)["error"]


async def test_without_a_limit_every_call_passes_untouched() -> None:
    async with limited({}) as harness:
        (each,) = harness.filters
        assert isinstance(each, RateLimit)
        assert each.is_idle
        assert await statuses(harness, 3) == [200] * 3
        assert len(harness.resources) == 0


@pytest.mark.parametrize(
    ("setting", "period_s", "words"),
    [
        ("requests_per_second", 1.0, "3 requests a second"),
        ("requests_per_minute", 60.0, "3 requests a minute"),
        ("requests_per_day", 86_400.0, "3 requests a day"),
    ],
)
async def test_no_window_of_the_period_has_more_calls_than_the_limit(
    setting: str, period_s: float, words: str
) -> None:
    async with limited({setting: 3}) as harness:
        harness.clock.turn(period_s * 0.9)
        assert await statuses(harness, 3) == [200] * 3
        harness.clock.turn(period_s * 0.2)  # beyond the border of a fixed window
        run = await harness.run()
        assert run.client.status == 429
        assert error(run)["code"] == "rate_limited"
        assert f"team tests: {words}" in error(run)["message"]
        assert len(harness.upstream.sent) == 3
        assert harness.value("llm_sidecar_limited", team="tests", rule=setting) == 1


async def test_a_caller_that_waits_as_long_as_it_was_told_is_let_in() -> None:
    async with limited({"requests_per_minute": 2}) as harness:
        assert await statuses(harness, 2) == [200, 200]
        harness.clock.turn(20.5)
        run = await harness.run()
        told_s = int(run.client.headers["retry-after"])
        assert 39.5 <= told_s <= 42
        harness.clock.turn(told_s)
        assert (await harness.run()).client.status == 200


async def test_a_refusal_speaks_the_dialect_of_the_caller() -> None:
    async with limited({"requests_per_minute": 1}) as harness:
        await harness.run()
        headers = (await harness.run()).client.headers
        assert headers["x-ratelimit-limit-requests"] == "1"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-ratelimit-reset-requests"].endswith("ms")
    upstream = FakeUpstream(dialect=ANTHROPIC)
    async with limited({"requests_per_minute": 1}, upstream=upstream) as harness:
        for _ in range(2):
            run = await harness.run(harness.call(path="/v1/messages"))
        assert run.client.headers["anthropic-ratelimit-requests-limit"] == "1"
        assert run.client.headers["anthropic-ratelimit-requests-reset"].startswith("2023-11-14T")
        assert error(run)["type"] == "rate_limit_error"


async def test_an_sdk_is_told_not_to_sleep_through_a_long_wait() -> None:
    async with limited({"requests_per_day": 1}) as harness:
        await harness.run()
        headers = (await harness.run()).client.headers
        assert int(headers["retry-after"]) > LONG_WAIT_S
        assert headers["x-should-retry"] == "false"
    async with limited({"requests_per_minute": 1}) as harness:
        await harness.run()
        assert "x-should-retry" not in (await harness.run()).client.headers


async def test_a_burst_comes_at_once_and_the_others_evenly_spread() -> None:
    async with limited({"requests_per_minute": 60, "burst": 2}) as harness:
        assert await statuses(harness, 3) == [200, 200, 429]
        harness.clock.turn(1.0)
        assert await statuses(harness, 2) == [200, 429]
        run = await harness.run()
        assert "60 requests a minute, 2 at once" in error(run)["message"]


async def test_a_burst_does_not_spread_the_limit_of_a_longer_period() -> None:
    settings = {"requests_per_second": 10, "requests_per_day": 20, "burst": 1}
    async with limited(settings) as harness:
        for _ in range(20):
            assert await statuses(harness, 1) == [200]
            harness.clock.turn(1.0)
        run = await harness.run()
        assert "20 requests a day" in error(run)["message"]


# At once


async def test_a_call_holds_its_slot_to_the_end_of_its_stream() -> None:
    async with limited({"concurrency": 2}) as harness:
        harness.upstream.answer = harness.upstream.stream(b"data: 1\n\n")
        runs = [harness.start() for _ in range(2)]
        for run in runs:
            await run.begun()
        refused = await harness.run()
        assert refused.client.status == 429
        assert error(refused)["code"] == "concurrency_limited"
        assert "team tests: 2 calls at once" in error(refused)["message"]
        assert refused.client.headers["retry-after"] == "1"
        assert harness.value("llm_sidecar_limited", team="tests", rule="concurrency") == 1
        runs[0].client_leaves()
        again = harness.start()
        await again.begun()
        assert again.client.status == 200
        assert await statuses(harness, 1) == [429]
        for run in (runs[1], again):
            run.client_leaves()
            await run.ended()
        harness.upstream.answer = harness.upstream.whole(b"{}")
        assert await statuses(harness, 3) == [200] * 3


async def test_a_failed_call_gives_its_slot_back() -> None:
    async with limited({"concurrency": 1}) as harness:
        harness.upstream.answer = harness.upstream.failing()
        assert await statuses(harness, 3) == [502] * 3
        harness.upstream.answer = harness.upstream.whole(b"{}")
        assert await statuses(harness, 1) == [200]


async def test_a_call_refused_for_one_limit_has_taken_nothing_of_the_others() -> None:
    settings = {"requests_per_minute": 2, "concurrency": 1}
    async with limited(settings) as harness:
        harness.upstream.answer = harness.upstream.silent()
        run = harness.start()
        await harness.upstream.asked.wait()
        assert await statuses(harness, 3) == [429] * 3  # no slot
        run.client_leaves()
        await run.ended()
        harness.upstream.answer = harness.upstream.whole(b"{}")
        assert await statuses(harness, 2) == [200, 429]


class RefusesAttempts(AttemptFilter):
    async def handle(self, attempt: Any, call_next: AttemptNext) -> Reply:
        return Reply.of(503, b"{}")


async def test_a_call_that_fails_later_keeps_its_charge() -> None:
    async with Harness(Use(RateLimit, {"requests_per_minute": 1}), RefusesAttempts) as harness:
        assert await statuses(harness, 2) == [503, 429]


# For whom


async def test_teams_do_not_take_from_each_other() -> None:
    settings = {"requests_per_minute": 1}
    async with limited(settings) as harness:
        assert await statuses(harness, 2) == [200, 429]
        assert await statuses(beside(harness, settings), 2) == [200, 429]


async def test_without_a_team_in_per_all_teams_share_the_count() -> None:
    settings = {"requests_per_minute": 2, "per": ["model"]}
    async with limited(settings) as harness:
        assert await statuses(harness, 1) == [200]
        assert await statuses(beside(harness, settings), 2) == [200, 429]
        assert await statuses(harness, 1, model="other") == [200]


def beside(harness: Harness, settings: dict[str, Any]) -> Harness:
    """Another team of the same process."""
    other = Harness(team=Team("others", "normal", Patterns(["*"]), frozenset({"fake"})))
    other.resources, other.clock = harness.resources, harness.clock
    made = other._make(Use(RateLimit, settings))
    assert isinstance(made, RateLimit)
    other.run_call = link_call([made], other.run_call)
    return other


async def test_a_key_has_its_own_count_and_is_never_shown() -> None:
    async with limited({"requests_per_minute": 1, "per": ["team", "key"]}) as harness:
        assert await statuses(harness, 2, key="sk-one") == [200, 429]
        assert await statuses(harness, 1, key="sk-two") == [200]
        run = await harness.run(chat(harness, key="sk-one"))
        assert "team tests, this key: 1 requests a minute" in error(run)["message"]
        assert run.call.key_id not in repr(run.client.data)
        assert all("sk-one" not in repr(each) for each in harness.resources._made.values())


async def test_an_upstream_has_its_own_count() -> None:
    async with limited({"requests_per_minute": 1, "per": ["upstream"]}) as harness:
        assert await statuses(harness, 2) == [200, 429]
        call = chat(harness)
        call.targets = (Target(FakeUpstream("other")),)
        assert (await harness.run(call)).client.status == 200


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"models": ["m*", MODEL], "requests_per_minute": 1}, f"team tests for m*, {MODEL}: 1 req"),
        ({"models": [MODEL], "concurrency": 1}, f"team tests for {MODEL}: 1 calls at once"),
        ({"models": [MODEL], "requests_per_day": 1, "per": ["model"]}, f"of model {MODEL}: 1 req"),
    ],
)
async def test_a_refusal_by_a_rule_for_some_models_names_them(
    rule: dict[str, Any], words: str
) -> None:
    async with limited({"rules": [rule]}) as harness:
        harness.upstream.answer = harness.upstream.silent()
        first = harness.start(chat(harness))
        await harness.upstream.asked.wait()
        refused = await harness.run(chat(harness))
        assert refused.client.status == 429
        assert words in error(refused)["message"]
        first.client_leaves()
        await first.ended()


async def test_further_rules_hold_for_their_models() -> None:
    rules = [
        {"models": ["o1*", "gpt-5"], "requests_per_minute": 1},
        {"models": ["o1-pro"], "concurrency": 1, "per": ["model"]},
    ]
    async with limited({"requests_per_minute": 4, "rules": rules}) as harness:
        assert await statuses(harness, 2, model="o1-pro") == [200, 429]
        assert await statuses(harness, 1, model="gpt-5") == [429]  # with o1-pro together
        assert harness.value(
            "llm_sidecar_limited", team="tests", rule="rules[0].requests_per_minute"
        )
        assert await statuses(harness, 4, model="gpt-4o") == [200, 200, 200, 429]


async def test_a_rule_for_some_models_lets_calls_pass_that_name_none() -> None:
    async with limited({"rules": [{"models": ["o1*"], "requests_per_minute": 1}]}) as harness:
        for _ in range(2):
            run = await harness.run(harness.call(b"", method="GET", path="/v1/models"))
            assert run.client.status == 200


async def test_plans_for_callers_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filters.rate_limit.MAX_PLANS", 3)
    rules = [{"models": ["o1*"], "requests_per_minute": 3}]
    async with limited({"rules": rules}) as harness:
        for number in range(10):
            await harness.run(chat(harness, f"gpt-{number}"))
            assert await statuses(harness, 1, model="o1") == [200 if number < 3 else 429]
        (made,) = harness.filters
        assert isinstance(made, RateLimit)
        assert len(made._plans) <= 3


async def test_a_name_that_fills_a_body_is_not_remembered() -> None:
    rules = [{"models": ["o1*"], "requests_per_minute": 1}]
    async with limited({"rules": rules}) as harness:
        assert await statuses(harness, 2, model="o1" + "x" * LONGEST_NAME) == [200, 429]
        (made,) = harness.filters
        assert isinstance(made, RateLimit)
        assert not made._plans


async def test_a_reload_with_another_limit_keeps_what_was_counted() -> None:
    async with limited({"requests_per_minute": 2}) as harness:
        assert await statuses(harness, 2) == [200, 200]
        made = harness._make(Use(RateLimit, {"requests_per_minute": 3}))
        assert isinstance(made, RateLimit)
        harness.run_call = link_call([made], Harness().run_call)
        assert await statuses(harness, 2) == [200, 429]


async def test_several_workers_divide_the_limit() -> None:
    async with limited({"requests_per_minute": 4}, workers=2) as harness:
        assert await statuses(harness, 3) == [200, 200, 429]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"burst": 5}, "add one"),
        ({"burst": 5, "concurrency": 5}, "add one"),
        ({"rules": [{"models": ["a"]}]}, "a rule without a limit"),
        ({"rules": [{"concurrency": 1, "burst": 2}]}, "add one"),
        ({"concurrency": 1, "rules": [{"requests_per_day": 5}]}, "make them one"),
        (
            {"rules": [{"concurrency": 1, "models": ["a"]}, {"concurrency": 2, "models": ["a"]}]},
            "make them one",
        ),
        ({"concurrency": 1, "rules": [{"requests_per_day": 5, "models": ["*", "a"]}]}, "them one"),
        ({"requests_per_minute": 0}, "greater than 0"),
        ({"per": ["tenant"]}, "team"),
        ({"requests_per_hour": 5}, "not permitted"),
    ],
    ids=repr,
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RateLimit.Config.model_validate(settings)
