"""Budgets of money and tokens: what is reserved, settled, warned of, degraded and refused."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from filters.budget import MOST_PART, Budget
from filters.cost import CallCost
from filters.stores.memory_spending import MemoryPurse
from filters.stores.spending import MOST
from sidecar.api import (
    CACHED,
    LOST_USAGE,
    SIDE_CALLS,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Event,
    Filter,
    Phase,
    Rejected,
    Reply,
    Retry,
    SideCall,
    Target,
    UpstreamError,
    Usage,
)
from sidecar.chain import check_order
from sidecar.dialects import ANTHROPIC
from tests.contract.scenarios import SCENARIOS, Scenario
from tests.support.harness import MODEL, FakeUpstream, Harness, Run, Use

MESSAGES = [{"role": "user", "content": "hello"}]
EVENT = b'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n'
LAST = b"data: [DONE]\n\n"
PRICES = {
    MODEL: {"input": 1000, "output": 1000},
    "mini": {"input": 100, "output": 100},
    "mini-2": {"input": 100, "output": 100},
    "yuan": {"input": 1000, "output": 1000, "currency": "CNY"},
}
"""For a million tokens: one costs 0.001, or 0.0001."""
DAY_S = 86_400.0


class Counts(CallFilter):
    """Leaves the usage that is reported, and nothing else."""

    gives = frozenset({USAGE})
    taps_events = True

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)

        def read(event: Event) -> None:
            usage = call.dialect.usage(event, call.get(USAGE))
            if usage is not None:
                call[USAGE] = usage

        if reply.status == 200:
            reply.body.tap_events(read, containing=b'"usage"')
        return reply


def budgeted(
    settings: dict[str, Any],
    *inner: type[Filter] | Use,
    cost: dict[str, Any] | None = None,
    **more: Any,
) -> Harness:
    known = {"prices": PRICES, **(cost or {})}
    return Harness(Use(CallCost, known), Use(Budget, settings), *(inner or (Counts,)), **more)


def chat(harness: Harness, max_tokens: int | None = 100, model: str = MODEL, **more: Any) -> Call:
    body = {"model": model, "messages": MESSAGES, **more}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return harness.call(body)


def used(tokens_in: int, tokens_out: int) -> bytes:
    return orjson.dumps(
        {"usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}, "choices": []}
    )


def answering(harness: Harness, tokens_in: int, tokens_out: int) -> None:
    harness.upstream.answer = harness.upstream.whole(used(tokens_in, tokens_out))


def error(run: Run) -> Any:
    return orjson.loads(run.client.data)["error"]


async def rows(harness: Harness) -> list[dict[str, Any]]:
    """What the panel shows."""
    (panel,) = harness.resources.of_kind("panel").values()
    found: list[dict[str, Any]] = await panel.show()
    return found


async def spent(harness: Harness, budget: str = "tokens_per_day") -> float:
    return float(next(row["spent"] for row in await rows(harness) if row["budget"] == budget))


async def reserved(harness: Harness) -> float:
    return float((await rows(harness))[0]["reserved"])


def count(harness: Harness, what: str, budget: str) -> float:
    return float(harness.value(f"llm_sidecar_budget_{what}", team="tests", budget=budget))


# Refused


async def test_calls_are_refused_once_the_budget_is_used_up() -> None:
    async with budgeted({"tokens_per_day": 1000}) as harness:
        answering(harness, 500, 500)
        assert (await harness.run(chat(harness))).client.status == 200
        run = await harness.run(chat(harness))
        assert run.client.status == 402
        assert error(run)["code"] == "budget_exceeded"
        assert run.client.headers["x-should-retry"] == "false"
        assert len(harness.upstream.sent) == 1
        assert count(harness, "refused", "tokens_per_day") == 1
        assert count(harness, "spent", "tokens_per_day") == 1000


async def test_a_refusal_says_which_budget_what_was_spent_and_when_it_begins_anew() -> None:
    settings = {"usd_per_day": 0.5, "timezone": "Asia/Shanghai"}
    async with budgeted(settings) as harness:
        answering(harness, 250, 240)
        await harness.run(chat(harness))
        run = await harness.run(chat(harness, max_tokens=50))
        begins = datetime.fromtimestamp(harness.clock.wall(), UTC)
        assert begins.isoformat() == "2023-11-14T22:13:20+00:00"  # the 15th there
        message = error(run)["message"]
        assert (
            "the budget of team tests: 0.5 USD a day has 0.01 USD left (0.49 USD spent)" in message
        )
        assert "this call may take 0.0" in message
        assert "begins anew at 2023-11-16 00:00 CST" in message
        assert "name max_tokens" not in message  # it did


async def test_a_refusal_counts_what_calls_under_way_may_take() -> None:
    async with budgeted({"tokens_per_day": 1500}) as harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        open_run = harness.start(chat(harness, None))
        await open_run.begun()
        run = await harness.run(chat(harness, None))
        assert run.client.status == 402
        assert "reserved for calls under way" in error(run)["message"]
        assert error(run)["message"].endswith("; name max_tokens to reserve less")
        open_run.client_leaves()
        await open_run.ended()


async def test_refusals_come_in_the_envelope_of_the_dialect() -> None:
    async with budgeted({"tokens_per_day": 10}, upstream=FakeUpstream(dialect=ANTHROPIC)) as h:
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20}
        run = await h.run(h.call(body, path="/v1/messages"))
        assert run.client.status == 402
        assert orjson.loads(run.client.data)["type"] == "error"
        assert error(run)["type"] == "billing_error"


@pytest.mark.parametrize(
    ("setting", "days"), [("tokens_per_day", 1), ("tokens_per_week", 7), ("tokens_per_month", 31)]
)
async def test_a_budget_begins_anew_with_its_period(setting: str, days: int) -> None:
    async with budgeted({setting: 1000}) as harness:
        answering(harness, 500, 500)
        await harness.run(chat(harness))
        assert (await harness.run(chat(harness))).client.status == 402
        harness.clock.turn(days * DAY_S)
        assert (await harness.run(chat(harness))).client.status == 200


async def test_spending_belongs_to_the_period_in_which_the_call_began() -> None:
    async with budgeted({"tokens_per_day": 1000}) as harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        run = harness.start(chat(harness, 900))
        await run.begun()
        source = harness.upstream.source
        harness.clock.turn(DAY_S)
        other = harness.start(chat(harness, 900))
        await other.begun()
        assert other.client.status == 200  # a day of its own
        other.client_leaves()
        await other.ended()
        today = await spent(harness)
        source.finish(b"data: " + used(5, 5) + b"\n\n" + LAST)
        await run.ended()
        assert await spent(harness) == today


async def test_several_budgets_hold_together() -> None:
    async with budgeted(
        {"usd_per_month": 100.0, "usd_per_day": 1.0, "tokens_per_week": 10**6}
    ) as h:
        answering(h, 500, 490)
        assert (await h.run(chat(h, 10))).client.status == 200
        run = await h.run(chat(h, 10))
        assert "1 USD a day" in error(run)["message"]
        shown = {row["budget"]: row["spent"] for row in await rows(h)}
        assert shown == {"usd_per_month": 0.99, "usd_per_day": 0.99, "tokens_per_week": 990}


async def test_nothing_set_is_nothing_to_do() -> None:
    harness = Harness(Budget)
    assert harness.filters[0].is_idle
    async with harness:
        assert (await harness.run()).client.status == 200


# Whom, and what


async def test_models_are_counted_apart_when_told_to() -> None:
    more = {"models": {"mini": (Target(FakeUpstream()),)}}
    async with budgeted({"tokens_per_day": 1000, "per": ["team", "model"]}, **more) as harness:
        answering(harness, 500, 490)
        await harness.run(chat(harness))
        assert (await harness.run(chat(harness))).client.status == 402
        assert (await harness.run(chat(harness, model="mini"))).client.status == 200
        assert {row["counted"] for row in await rows(harness)} == {
            f"team tests, model {MODEL}",
            "team tests, model mini",
        }


async def test_keys_are_counted_apart_and_not_shown() -> None:
    settings = {"tokens_per_day": 1000, "per": ["key"], "output_reserve": 100}
    async with budgeted(settings) as harness:
        answering(harness, 500, 490)
        for key, status in (("sk-a", 200), ("sk-a", 402), ("sk-b", 200)):
            call = harness.call({"model": MODEL, "n": 1}, headers=[("x-api-key", key)])
            call[USAGE] = Usage()
            assert (await harness.run(call)).client.status == status
        assert {row["counted"] for row in await rows(harness)} == {"this key"}


async def test_only_the_named_models_are_counted() -> None:
    async with budgeted({"tokens_per_day": 10, "models": ["gpt-5*"]}) as harness:
        assert (await harness.run(chat(harness))).client.status == 200
        assert (await harness.run(chat(harness, model="gpt-5-pro"))).client.status == 402


@pytest.mark.parametrize(
    "asked",
    [
        {"body": b"", "method": "GET", "path": "/v1/models"},
        {"body": b"", "method": "GET", "path": "/fake/v1/files"},
    ],
    ids=lambda asked: str(asked["path"]),
)
async def test_what_takes_no_tokens_is_not_counted(asked: dict[str, Any]) -> None:
    async with budgeted({"tokens_per_day": 1, "unknown_price": "refuse"}) as harness:
        assert (await harness.run(harness.call(**asked))).client.status == 200
        assert await rows(harness) == []


# Warned


async def test_answers_carry_a_warning_from_a_share_on() -> None:
    async with budgeted({"tokens_per_day": 1000, "tokens_per_month": 10_000}) as harness:
        answering(harness, 400, 350)
        first = await harness.run(chat(harness, 10))
        assert "x-sidecar-budget-warning" not in first.client.headers
        answering(harness, 10, 10)
        second = await harness.run(chat(harness, 60))
        said = second.client.headers["x-sidecar-budget-warning"]
        assert said in ("tokens_per_day 82%", "tokens_per_day 83%", "tokens_per_day 84%")
        assert count(harness, "warned", "tokens_per_day") == 1
        assert count(harness, "warned", "tokens_per_month") == 0


async def test_warnings_can_be_switched_off() -> None:
    async with budgeted({"tokens_per_day": 1000, "warn_at": None}) as harness:
        answering(harness, 400, 500)
        for _ in range(2):
            run = await harness.run(chat(harness, 10))
        assert "x-sidecar-budget-warning" not in run.client.headers


async def test_a_soft_limit_refuses_nothing() -> None:
    limits = [{"tokens": 100, "per": "week", "then": "warn", "at": 0.5}]
    async with budgeted({"limits": limits}) as harness:
        answering(harness, 500, 500)
        for _ in range(3):
            run = await harness.run(chat(harness, 10))
            assert run.client.status == 200
        assert run.client.headers["x-sidecar-budget-warning"].startswith("tokens_per_week 20")
        assert len(harness.upstream.sent) == 3


async def test_two_warnings_stand_in_one_header() -> None:
    limits = [{"tokens": 100, "per": each, "then": "warn"} for each in ("day", "week")]
    async with budgeted({"limits": limits}) as harness:
        answering(harness, 5, 5)
        run = await harness.run(chat(harness, 200))
        words = [
            text.split()[0] for text in run.client.headers["x-sidecar-budget-warning"].split(", ")
        ]
        assert words == ["tokens_per_day", "tokens_per_week"]


# Degraded

DEGRADES = {"tokens": 1000, "per": "day", "then": "degrade", "to": "mini", "at": 0.5}


def degrading(*limits: dict[str, Any], **more: Any) -> tuple[Harness, FakeUpstream]:
    mini = more.pop("mini", None) or FakeUpstream("small")
    mini.answer = mini.whole(used(100, 100))
    models = {"mini": (Target(mini, "mini-2"),), "nano": (Target(mini, "nano-1"),)}
    return budgeted({"limits": list(limits) or [DEGRADES]}, models=models, **more), mini


async def test_calls_go_to_a_cheaper_model_when_the_budget_gets_low() -> None:
    harness, mini = degrading()
    async with harness:
        answering(harness, 200, 200)
        first = await harness.run(chat(harness, 100))
        assert "x-sidecar-degraded" not in first.client.headers
        second = await harness.run(chat(harness, 200))
        assert second.client.status == 200
        assert second.client.headers["x-sidecar-degraded"] == "mini"
        assert len(harness.upstream.sent) == 1
        (sent,) = mini.sent
        assert orjson.loads(sent.body)["model"] == "mini-2"
        assert count(harness, "degraded", "tokens_per_day") == 1
        assert await spent(harness) == 400 + 200


async def test_a_degraded_call_counts_at_the_price_of_its_new_model() -> None:
    harness, _ = degrading(
        {"usd": 1.0, "per": "day", "then": "degrade", "to": "mini", "at": 0.5},
        {"usd": 1.0, "per": "day"},
    )
    async with harness:
        answering(harness, 400, 400)
        await harness.run(chat(harness, 100))
        assert await spent(harness, "usd_per_day") == pytest.approx(0.8)
        # 900 tokens cost 0.9 there, which is left of nothing, and 0.09 here.
        run = await harness.run(chat(harness, 900))
        assert run.client.headers["x-sidecar-degraded"] == "mini"
        assert await spent(harness, "usd_per_day") == pytest.approx(0.82)
        run = await harness.run(chat(harness, 3000))
        assert run.client.status == 402
        assert "x-sidecar-degraded" not in run.client.headers
        assert count(harness, "degraded", "usd_per_day") == 1


async def test_of_two_steps_down_the_last_one_that_is_reached_counts() -> None:
    harness, mini = degrading({**DEGRADES, "at": 0.2}, {**DEGRADES, "to": "nano", "at": 0.8})
    async with harness:
        for tokens, to in ((10, None), (300, "mini"), (900, "nano")):
            answering(harness, 1, 1)
            mini.answer = mini.whole(used(1, 1))
            run = await harness.run(chat(harness, tokens))
            assert run.client.headers.get("x-sidecar-degraded") == to
        run = await harness.run(chat(harness, 900, model="mini"))
        assert run.client.headers.get("x-sidecar-degraded") == "nano"
        run = await harness.run(chat(harness, 900, model="nano"))
        assert "x-sidecar-degraded" not in run.client.headers


async def test_a_call_for_a_model_that_is_no_dearer_stays_where_it_is() -> None:
    limit = {"usd": 0.01, "per": "day", "then": "degrade", "to": "mini"}
    harness, mini = degrading(limit, cost={"prices": {"*": PRICES["mini"]}})
    async with harness:
        run = await harness.run(chat(harness, 900))
        assert run.client.status == 200
        assert "x-sidecar-degraded" not in run.client.headers
        assert mini.sent == []
        assert len(harness.upstream.sent) == 1


async def test_a_model_of_another_dialect_cannot_stand_in() -> None:
    harness, mini = degrading(mini=FakeUpstream("small", ANTHROPIC))
    async with harness:
        run = await harness.run(chat(harness, 900))
        assert run.client.status == 402
        assert error(run)["code"] == "budget_exceeded"
        assert "calls now go to mini, which speaks the anthropic dialect" in error(run)["message"]
        assert count(harness, "refused", "tokens_per_day") == 1
        assert mini.sent == []
        assert await reserved(harness) == 0


@pytest.mark.parametrize("path", ["/v1/embeddings", "/fake/v1/files"])
async def test_what_no_chat_model_can_answer_is_refused_instead(path: str) -> None:
    harness, mini = degrading()
    async with harness:
        run = await harness.run(harness.call({"model": MODEL, "input": "word " * 2000}, path=path))
        assert run.client.status == 402
        assert "which cannot answer this request" in error(run)["message"]
        assert mini.sent == []


async def test_a_model_that_is_not_there_keeps_the_configuration_from_going_live() -> None:
    harness = budgeted({"limits": [{**DEGRADES, "to": "gone"}]})
    with pytest.raises(ValueError, match='lead to "gone", which is not among `models`'):
        async with harness:
            pass
    await harness.filters[0].stop()
    await harness.resources.close()


# Money


async def test_money_of_another_currency_is_converted() -> None:
    async with budgeted({"usd_per_day": 1.0}, cost={"exchange": {"CNY": 0.14}}) as harness:
        answering(harness, 500, 500)
        await harness.run(chat(harness, model="yuan"))
        assert await spent(harness, "usd_per_day") == pytest.approx(0.14)
        assert harness.value("llm_sidecar_budget_unpriced", team="tests") == 0


async def test_both_currencies_are_counted_at_once() -> None:
    settings = {"usd_per_day": 1.0, "cny_per_day": 10.0}
    async with budgeted(settings, cost={"exchange": {"CNY": 0.5}}) as harness:
        answering(harness, 500, 500)
        await harness.run(chat(harness, model="yuan"))
        assert await spent(harness, "usd_per_day") == pytest.approx(0.5)
        assert await spent(harness, "cny_per_day") == pytest.approx(1.0)


@pytest.mark.parametrize("model", ["yuan", "nobody-knows"])
async def test_calls_without_a_price_pass_and_are_counted(model: str) -> None:
    async with budgeted({"usd_per_day": 0.001}) as harness:
        answering(harness, 500, 500)
        for _ in range(2):
            assert (await harness.run(chat(harness, model=model))).client.status == 200
        assert harness.value("llm_sidecar_budget_unpriced", team="tests") == 2
        assert await spent(harness, "usd_per_day") == 0


async def test_calls_without_a_price_are_refused_when_told_to() -> None:
    settings = {"usd_per_day": 10.0, "unknown_price": "refuse"}
    async with budgeted(settings) as harness:
        run = await harness.run(chat(harness, model="nobody-knows"))
        assert run.client.status == 402
        assert error(run)["code"] == "budget_price_unknown"
        assert "filters.cost.prices" in error(run)["message"]
        assert run.client.headers["x-should-retry"] == "false"
        assert (await harness.run(chat(harness))).client.status == 200


async def test_tokens_need_no_price() -> None:
    async with budgeted({"tokens_per_day": 5000, "unknown_price": "refuse"}) as harness:
        answering(harness, 5, 5)
        assert (await harness.run(chat(harness, model="nobody-knows"))).client.status == 200
        assert await spent(harness) == 10


async def test_money_is_counted_to_the_billionth_and_rounded_up() -> None:
    cost = {"prices": {MODEL: {"input": "0.0003", "output": "0.0003"}}}  # 0.3 billionths a token
    async with budgeted({"usd_per_day": 1.0}, cost=cost) as harness:
        answering(harness, 10, 1)
        await harness.run(chat(harness))
        assert await spent(harness, "usd_per_day") == 4e-9


async def test_what_nobody_could_price_at_its_end_has_taken_what_was_reserved() -> None:
    class GoesElsewhere(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            reply = await call_next(call)
            call.target = Target(FakeUpstream("elsewhere"), "nobody-knows")
            return reply

    cost = {"prices": {f"fake/{MODEL}": PRICES[MODEL]}}
    async with budgeted({"usd_per_day": 1.0}, Counts, GoesElsewhere, cost=cost) as harness:
        answering(harness, 1, 1)
        await harness.run(chat(harness, 100))
        assert 0.1 < await spent(harness, "usd_per_day") < 0.15
        assert harness.value("llm_sidecar_budget_unpriced", team="tests") == 1


def embedding(call: Call, model: str, tokens: int) -> None:
    """Stands for a semantic cache."""
    call[SIDE_CALLS] = [SideCall(Target(FakeUpstream("side"), model), "embeddings", Usage(tokens))]


@pytest.mark.parametrize(
    ("tokens_out", "expected"), [(1, (0.1, 0.15)), (500, (0.501, 0.5011))], ids=["less", "more"]
)
async def test_a_call_whose_price_is_not_wholly_known_takes_what_is_known_or_was_reserved(
    tokens_out: int, expected: tuple[float, float]
) -> None:
    async with budgeted({"usd_per_day": 1.0}) as harness:
        answering(harness, 1, tokens_out)
        call = chat(harness, 100)
        embedding(call, "nobody-knows", 200)
        await harness.run(call)
        least, most = expected
        assert least <= await spent(harness, "usd_per_day") < most
        assert harness.value("llm_sidecar_budget_unpriced", team="tests") == 1


async def test_what_is_known_in_the_currency_of_the_budget_counts_without_a_rate_of_exchange() -> (
    None
):
    async with budgeted({"usd_per_day": 1.0, "cny_per_day": 1.0}) as harness:
        answering(harness, 1, 500)
        call = chat(harness, 100)
        embedding(call, "yuan", 200)
        await harness.run(call)
        assert await spent(harness, "usd_per_day") == pytest.approx(0.501)
        assert await spent(harness, "cny_per_day") == pytest.approx(0.2)


async def test_one_call_takes_no_more_of_a_sum_than_stores_can_count() -> None:
    settings = {"tokens_per_day": 10**15, "usd_per_day": 5_000_000.0}

    class Boasts(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            call[USAGE] = Usage(2**64 - 1, 2**64 - 1)
            return await call_next(call)

    async with budgeted(settings, Boasts) as harness:
        answering(harness, 1, 1)
        for _ in range(2):
            assert (await harness.run(chat(harness))).client.status == 200
        assert await spent(harness) == 2 * MOST_PART
        assert await spent(harness, "usd_per_day") == 20_000
        assert 500 * MOST_PART < MOST


async def test_an_upstream_that_reports_nonsense_does_not_keep_other_budgets_from_the_file(
    tmp_path: Path,
) -> None:
    settings = {"limits": [{"tokens": 10**6, "per": "day", "then": "warn"}], "per": ["model"]}
    for expected in (9, 18):
        async with budgeted(settings, data_dir=tmp_path) as harness:
            answering(harness, 10, 2**64 - 1)
            await harness.run(chat(harness))
            answering(harness, 4, 5)
            await harness.run(chat(harness, model="mini"))
            assert expected in {row["spent"] for row in await rows(harness)}


async def test_embeddings_are_priced_by_the_name_that_callers_use() -> None:
    class Embeds(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            embedder = Target(FakeUpstream("embedder"), "at-home")
            call[SIDE_CALLS] = [SideCall(embedder, "embeddings", Usage(200), "mini")]
            return await call_next(call)

    async with budgeted({"usd_per_day": 10.0}, Counts, Embeds) as harness:
        answering(harness, 1000, 1000)
        await harness.run(chat(harness, 5))
        assert await spent(harness, "usd_per_day") == pytest.approx(2.02)


# Settled


async def test_what_was_used_takes_the_place_of_what_was_reserved() -> None:
    async with budgeted({"tokens_per_day": 1000}) as harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        run = harness.start(chat(harness, 500))
        await run.begun()
        assert 500 < await reserved(harness) < 550
        harness.upstream.source.finish(b"data: " + used(30, 12) + b"\n\n" + LAST)
        await run.ended()
        assert (await reserved(harness), await spent(harness)) == (0, 42)


async def test_more_than_was_reserved_counts_in_full() -> None:
    async with budgeted({"tokens_per_day": 1000}) as harness:
        answering(harness, 900, 1100)
        await harness.run(chat(harness, 10))
        assert await spent(harness) == 2000
        assert (
            "0 tokens left (2000 tokens spent)"
            in error(await harness.run(chat(harness)))["message"]
        )


class RefusesLater(CallFilter):
    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        raise Rejected(429, "queue_full", "no")


class Hit(CallFilter):
    """A cache that has the answer, and marks it when the call ends."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        call[USAGE] = Usage(500, 500)
        call.on_end(lambda end: call.__setitem__(CACHED, "hit"))
        return Reply.of(200, used(500, 500))


class Joined(CallFilter):
    """A cache in which the call has paid for an attempt, and got another one's answer."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)
        call[USAGE] = Usage(500, 500)
        call[CACHED] = "join"
        return reply


@pytest.mark.parametrize("inner", [RefusesLater, Hit, Joined])
async def test_all_is_given_back_when_no_upstream_worked_for_it(inner: type[CallFilter]) -> None:
    async with budgeted({"tokens_per_day": 1000, "usd_per_day": 10.0}, inner) as harness:
        for _ in range(5):
            await harness.run(chat(harness, 900))
        assert {(row["spent"], row["reserved"]) for row in await rows(harness)} == {(0, 0)}


async def test_embeddings_of_a_semantic_cache_count_even_when_it_hits() -> None:
    class Embeds(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            embedder = Target(FakeUpstream("embedder"), "mini")
            call[SIDE_CALLS] = [SideCall(embedder, "embeddings", Usage(200))]
            call[CACHED] = "hit"
            call[USAGE] = Usage(500, 500)
            return Reply.of(200, used(500, 500))

    async with budgeted({"tokens_per_day": 2000, "usd_per_day": 10.0}, Embeds) as harness:
        await harness.run(chat(harness))
        assert await spent(harness) == 200
        assert await spent(harness, "usd_per_day") == pytest.approx(0.02)


@pytest.mark.parametrize("phase", [Phase.ADMIT, Phase.CONNECT, Phase.FIRST_EVENT])
async def test_all_is_given_back_when_nothing_was_worked_on(phase: Phase) -> None:
    async with budgeted({"tokens_per_day": 1000, "usd_per_day": 10.0}) as harness:
        failure = UpstreamError(phase, Retry.SAME, "failed", "it failed")
        harness.upstream.answer = harness.upstream.failing(failure)
        await harness.run(chat(harness))
        assert {(row["spent"], row["reserved"]) for row in await rows(harness)} == {(0, 0)}


@pytest.mark.parametrize("status", [400, 429, 500])
async def test_all_is_given_back_for_an_error_without_usage(status: int) -> None:
    async with budgeted({"tokens_per_day": 1000}) as harness:
        harness.upstream.answer = harness.upstream.whole(b'{"error": {}}', status=status)
        await harness.run(chat(harness))
        assert await spent(harness) == 0


@pytest.mark.parametrize("how", ["completed", "died", "left", "aborted"])
async def test_the_reservation_stands_for_an_answer_of_which_nobody_knows_the_usage(
    how: str,
) -> None:
    settings = {"tokens_per_day": 1000, "usd_per_day": 10.0}
    async with budgeted(settings) as harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        run = harness.start(chat(harness, 300))
        await run.begun()
        held = await reserved(harness)
        if how == "completed":
            harness.upstream.source.finish(LAST)
        elif how == "died":
            harness.upstream.source.fail()
        elif how == "left":
            run.client_leaves()
        else:
            run.abort()
        await run.ended()
        shown = await rows(harness)
        assert {row["reserved"] for row in shown} == {0}
        assert held == await spent(harness, str(shown[0]["budget"]))
        assert 300 < await spent(harness) < 350
        assert 0.3 < await spent(harness, "usd_per_day") < 0.35


async def test_an_estimated_usage_counts_as_estimated() -> None:
    class Estimates(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            call.on_end(lambda end: call.__setitem__(USAGE, Usage(7, 5, is_estimated=True)))
            return await call_next(call)

    async with budgeted({"tokens_per_day": 1000, "usd_per_day": 1.0}, Estimates) as harness:
        harness.upstream.answer = harness.upstream.stream(EVENT)
        run = harness.start(chat(harness))
        await run.begun()
        run.client_leaves()
        await run.ended()
        assert await spent(harness) == 12
        assert await spent(harness, "usd_per_day") == pytest.approx(0.012)


@pytest.mark.parametrize("is_answered", [True, False])
async def test_attempts_that_were_given_up_count_on_top(is_answered: bool) -> None:
    async with budgeted({"tokens_per_day": 1000, "usd_per_day": 1.0}) as harness:
        answering(harness, 30, 12)
        if not is_answered:
            harness.upstream.answer = harness.upstream.failing()
        call = chat(harness)
        call[LOST_USAGE] = Usage(50, 8)
        await harness.run(call)
        tokens = 58 + 42 * is_answered
        assert await spent(harness) == tokens
        assert await spent(harness, "usd_per_day") == pytest.approx(tokens / 1000)


async def test_attempts_given_up_count_beside_a_reservation_that_stands() -> None:
    settings = {"tokens_per_day": 1000, "usd_per_day": 1.0}
    async with budgeted(settings) as harness:
        harness.upstream.answer = harness.upstream.whole(b"{}")
        call = chat(harness, 100)
        call[LOST_USAGE] = Usage(50, 8)
        await harness.run(call)
        tokens = await spent(harness)
        assert 158 < tokens < 200
        assert await spent(harness, "usd_per_day") == pytest.approx(tokens / 1000)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
async def test_each_reservation_is_settled_exactly_once_on_every_kind_of_end(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[Sequence[int]] = []
    settle = MemoryPurse.settle

    def count_and_settle(purse: MemoryPurse, held: Sequence[int], amounts: Sequence[int]) -> None:
        settled.append(held)
        settle(purse, held, amounts)

    monkeypatch.setattr(MemoryPurse, "settle", count_and_settle)
    filters = (Use(CallCost, {"prices": PRICES}), Use(Budget, {"usd_per_day": 100.0}), Counts)
    async with Harness(*scenario.before, *filters, *scenario.after) as harness:
        run = await scenario.play(harness)
        assert run.call.end is not None
        run.call.finish(run.call.end)
        reaches_it = scenario.name != "refused_by_the_edge"
        assert len(settled) == reaches_it
        assert {row["reserved"] for row in await rows(harness)} <= {0}


# Kept


async def test_what_was_spent_survives_a_restart(tmp_path: Path) -> None:
    settings = {"tokens_per_day": 1000, "usd_per_month": 5.0}
    for status in (200, 402):
        async with budgeted(settings, data_dir=tmp_path) as harness:
            answering(harness, 500, 500)
            assert (await harness.run(chat(harness))).client.status == status
            assert await spent(harness) == 1000
            assert await spent(harness, "usd_per_month") == 1.0


async def test_a_reload_keeps_what_was_spent_and_what_is_reserved() -> None:
    async with budgeted({"tokens_per_day": 1000}) as harness:
        answering(harness, 200, 200)
        await harness.run(chat(harness))
        harness.upstream.answer = harness.upstream.stream(EVENT)
        run = harness.start(chat(harness, 300))
        await run.begun()
        again = harness._make(Use(Budget, {"tokens_per_day": 2000}))
        await again.start()
        await harness.filters[1].stop()
        call = chat(harness, 1500)
        with pytest.raises(Rejected, match=r"\(400 tokens spent, 3.. tokens reserved"):
            again.handle(call, harness.run_call)  # type: ignore[attr-defined]
        run.client_leaves()
        await run.ended()
        assert len(await rows(harness)) == 2  # the limit and its warning, once
        await again.stop()


@pytest.mark.parametrize(("is_kept", "told"), [(True, 0), (False, 1)])
async def test_the_log_says_once_that_budgets_are_not_kept(
    is_kept: bool, told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harness = Harness(
        Use(CallCost, {}),
        *[Use(Budget, {"tokens_per_day": 1000})] * 2,
        data_dir=tmp_path if is_kept else None,
    )
    async with harness:
        await harness.filters[1].start()
    assert [record.message for record in caplog.records].count("budget_not_kept") == told


async def test_days_of_different_time_zones_are_counted_apart(tmp_path: Path) -> None:
    settings = {"tokens_per_day": 100_000, "warn_at": None}
    for zone, known in (("UTC", 0), ("Europe/Berlin", 0), ("UTC", 90), ("Europe/Berlin", 90)):
        async with budgeted({**settings, "timezone": zone}, data_dir=tmp_path) as harness:
            answering(harness, 40, 50)
            await harness.run(chat(harness))
            assert await spent(harness) == known + 90


async def test_what_is_known_of_callers_is_forgotten_with_their_period() -> None:
    async with budgeted({"tokens_per_day": 100_000, "per": ["model"]}) as harness:
        answering(harness, 40, 50)
        for model in (MODEL, "mini"):
            await harness.run(chat(harness, model=model))
        harness.clock.turn(DAY_S)
        await harness.run(chat(harness, model="mini"))
        budget = next(each for each in harness.filters if isinstance(each, Budget))
        assert [plan.periods[0].name for plan in budget._plans.values()] == ["day 2023-11-15"]


# For operators


async def test_panel_shows_each_budget_as_it_stands() -> None:
    limits = [{"tokens": 2000, "per": "day", "then": "degrade", "to": MODEL, "at": 0.75}]
    settings = {"usd_per_month": 10.0, "warn_at": None, "limits": limits}
    async with budgeted({**settings, "timezone": "Europe/Berlin"}) as harness:
        answering(harness, 500, 500)
        await harness.run(chat(harness))
        tokens, money = await rows(harness)
        assert money == {
            "team": "tests",
            "counted": "team tests",
            "budget": "usd_per_month",
            "then": "refuse",
            "period": "month 2023-11-01",
            "resets_at": "2023-12-01T00:00:00+01:00",
            "spent": 1.0,
            "reserved": 0.0,
            "limit": 10.0,
            "acts_beyond": 10.0,
            "share": 0.1,
        }
        assert tokens["then"] == f"degrade to {MODEL}"
        assert (tokens["acts_beyond"], tokens["share"]) == (1500, 0.5)


async def test_panel_takes_no_commands() -> None:
    async with budgeted({"tokens_per_day": 1000}) as harness:
        (panel,) = harness.resources.of_kind("panel").values()
        with pytest.raises(ValueError, match="no commands"):
            await panel.act({"reset": {}})


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"timezone": "Europe/Berln"}, 'did you mean "Europe/Berlin"?'),
        ({"limits": [{"per": "day"}]}, "a limit needs one amount"),
        ({"limits": [{"per": "day", "usd": 1.0, "tokens": 5}]}, "a limit needs one amount"),
        ({"limits": [{"per": "day", "usd": 1.0, "then": "degrade"}]}, "needs `to`"),
        ({"limits": [{"per": "day", "usd": 1.0, "to": "mini"}]}, "`to` is for"),
        ({"limits": [{"per": "year", "usd": 1.0}]}, "'day', 'week' or 'month'"),
        ({"limits": [{"per": "day", "usd": 1.0, "at": 1.5}]}, "less than or equal to 1"),
        ({"usd_per_day": 0.0}, "greater than 0"),
        ({"usd_per_day": 1e9}, "less than or equal to 5000000"),
        ({"tokens_per_day": 1.5}, "valid integer"),
        ({"week_starts": "Monday"}, "'monday'"),
    ],
)
def test_mistakes_are_told_at_load(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Budget.Config.model_validate(settings)
    assert words in str(caught.value)


def test_without_prices_or_somebody_who_counts_tokens_it_does_not_load() -> None:
    assert check_order([Budget, Counts], []) != []
    assert check_order([CallCost, Budget], []) != []
    assert check_order([CallCost, Budget, Counts], []) == []


async def test_a_budget_for_each_key_is_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filters.budget.MAX_PLANS", 3)
    settings = {"tokens_per_day": 1000, "per": ["key"], "output_reserve": 100}
    async with budgeted(settings) as harness:
        answering(harness, 500, 490)
        for number in range(8):
            for status in (200, 402):
                headers = [("x-api-key", f"sk-{number}")]
                run = await harness.run(harness.call({"model": MODEL, "n": 1}, headers=headers))
                assert run.client.status == status
        made = harness.filters[1]
        assert isinstance(made, Budget)
        assert len(made._plans) <= 3
