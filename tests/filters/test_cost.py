"""What calls cost: in headers, metrics, and for other filters; what is unknown is never zero."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from filters.algo.pricing import PRICES
from filters.cost import CallCost, Charges
from filters.token_counter import TokenCounter
from sidecar.api import (
    CACHED,
    COST,
    LOST_USAGE,
    SIDE_CALLS,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Cost,
    End,
    Key,
    Reply,
    SideCall,
    Target,
    Usage,
)
from sidecar.config import explain
from sidecar.dialects import ANTHROPIC
from tests.support.harness import MODEL, FakeUpstream, Harness, Use

WHOLE = b'{"choices": [], "usage": {"prompt_tokens": 1000, "completion_tokens": 100}}'
OWN = {MODEL: {"input": 1, "output": 10}}
USED = Usage(1000, 100)
COSTS = Decimal("0.002")
"""What `USED` costs by `OWN`."""


def openai(host: str = "api.openai.com") -> FakeUpstream:
    upstream = FakeUpstream()
    upstream.host = host
    upstream.answer = upstream.whole(WHOLE)
    return upstream


def cost(**settings: Any) -> Use:
    return Use(CallCost, settings)


class Inner(CallFilter):
    """Stands for the filters inside: leaves facts on the call, before and after its answer."""

    before: Mapping[Key[Any], Any] = {}
    after: Mapping[Key[Any], Any] = {}

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        for key, value in self.before.items():
            call[key] = value
        reply = await call_next(call)
        for key, value in self.after.items():
            call[key] = value
        return reply


def inner(**facts: Mapping[Key[Any], Any]) -> type[CallFilter]:
    return type("Facts", (Inner,), facts)


class Answering(CallFilter):
    """Answers without an upstream, as a cache does."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        call[CACHED], call[USAGE] = "hit", USED
        return Reply.of(200, WHOLE)


def amount(harness: Harness, currency: str = "USD", model: str = MODEL) -> float:
    value = harness.value(
        "llm_api_cost", model=model, upstream="fake", team="tests", currency=currency
    )
    return float(value)


def unknown(harness: Harness, model: str = MODEL) -> float:
    value = harness.value("llm_sidecar_cost_unknown", model=model, upstream="fake", team="tests")
    return float(value)


# What it says


async def test_a_call_costs_what_the_table_of_its_provider_says() -> None:
    async with Harness(CallCost, TokenCounter, upstream=openai()) as harness:
        run = await harness.run()
        # gpt-4o-mini: 0.15 and 0.60 for a million
        assert run.call[COST] == Cost(Decimal("0.00021"), "USD")
        assert amount(harness) == pytest.approx(0.00021)
        assert unknown(harness) == 0


async def test_an_answer_that_is_no_stream_tells_its_cost_in_headers() -> None:
    async with Harness(cost(prices=OWN), inner(after={USAGE: USED}), upstream=openai()) as harness:
        run = await harness.run()
    assert run.client.headers["x-sidecar-cost"] == "0.002"
    assert run.client.headers["x-sidecar-currency"] == "USD"


async def test_an_answer_that_comes_in_pieces_tells_its_cost_in_headers_too() -> None:
    async with Harness(cost(prices=OWN), TokenCounter, upstream=openai()) as harness:
        upstream = harness.upstream
        upstream.answer = upstream.stream(WHOLE[:20], media_type="application/json")
        run = harness.start()
        await upstream.asked.wait()
        await asyncio.sleep(0)
        upstream.source.finish(WHOLE[20:])
        await run.ended()
    assert run.client.data == WHOLE
    assert run.client.headers["x-sidecar-cost"] == "0.002"


async def test_the_header_has_no_exponent() -> None:
    use = cost(prices={MODEL: {"input": 0.1, "output": 0, "currency": "CNY"}})
    async with Harness(use, inner(after={USAGE: Usage(1)}), upstream=openai()) as harness:
        run = await harness.run()
    assert run.client.headers["x-sidecar-cost"] == "0.0000001"
    assert run.client.headers["x-sidecar-currency"] == "CNY"


async def test_a_stream_has_no_header_and_is_priced_at_its_end() -> None:
    async with Harness(cost(prices=OWN), TokenCounter, upstream=openai()) as harness:
        upstream = harness.upstream
        upstream.answer = upstream.stream(b'data: {"choices": []}\n\n')
        run = harness.start()
        await run.begun()
        assert "x-sidecar-cost" not in run.client.headers
        assert run.call[PRICES].charge(run.call) is None  # nobody knows yet
        upstream.source.finish(b"data: " + WHOLE + b"\n\n")
        await run.ended()
        assert run.call[COST] == Cost(COSTS, "USD")


async def test_a_stream_that_reports_its_input_first_has_no_header() -> None:
    upstream = FakeUpstream(dialect=ANTHROPIC)
    start = b'event: message_start\ndata: {"message": {"usage": {"input_tokens": 9}}}\n\n'
    async with Harness(
        cost(prices={"*": {"input": 1, "output": 1}}),
        inner(after={USAGE: Usage(9)}),
        upstream=upstream,
    ) as harness:
        upstream.answer = upstream.stream(start)
        run = harness.start(harness.call({"model": "m", "messages": []}, path="/v1/messages"))
        await run.begun()
        upstream.source.finish()
        await run.ended()
    assert "x-sidecar-cost" not in run.client.headers


async def test_an_estimate_of_usage_is_priced_as_a_report_is() -> None:
    facts = inner(after={USAGE: USED._replace(is_estimated=True)})
    async with Harness(cost(prices=OWN), facts, upstream=openai()) as harness:
        assert (await harness.run()).call[COST].amount == COSTS


async def test_filters_outside_find_the_cost_at_the_end_and_those_inside_can_ask() -> None:
    seen: list[Any] = []

    class Ask(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            prices = call[PRICES]
            seen.append(prices.estimate(call, 1000, 100))
            call.on_end(lambda end: seen.append(prices.charge(call)))
            call.on_end(lambda end: seen.append(COST in call))
            return await call_next(call)

    class Outside(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            call.on_end(lambda end: seen.append(call[COST]))
            return await call_next(call)

    async with Harness(Outside, cost(prices=OWN), Ask, TokenCounter, upstream=openai()) as harness:
        harness.upstream.answer = harness.upstream.stream(b"data: " + WHOLE + b"\n\n")
        run = harness.start()
        await run.begun()
        harness.upstream.source.finish()
        await run.ended()
        assert amount(harness) == pytest.approx(float(COSTS))  # once, whoever asks
    expected = Cost(COSTS, "USD")
    assert seen == [expected, False, expected, expected]


# What costs nothing, and what nobody knows


async def test_a_cached_answer_costs_nothing_in_the_model_s_currency() -> None:
    use = cost(prices={MODEL: {"input": 1, "output": 1, "currency": "CNY"}})
    async with Harness(use, Answering, upstream=openai()) as harness:
        run = await harness.run()
        assert run.call[COST] == Cost(Decimal(0), "CNY")
        assert run.client.headers["x-sidecar-cost"] == "0"
        assert amount(harness, "CNY") == 0


async def test_a_cached_answer_of_a_model_without_a_price_costs_nothing_too() -> None:
    async with Harness(CallCost, Answering, upstream=openai("localhost")) as harness:
        run = await harness.run()
        assert run.call[COST] == Cost(Decimal(0), "USD")
        assert unknown(harness) == 0


async def test_a_call_that_asked_no_upstream_has_no_cost() -> None:
    class Refuse(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            return Reply.of(403, b"{}")

    async with Harness(cost(prices=OWN), Refuse, upstream=openai()) as harness:
        run = await harness.run()
        assert COST not in run.call
        assert unknown(harness) == 0


async def test_a_model_without_a_price_is_counted_as_unknown_and_not_as_zero(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Harness(
        CallCost, inner(after={USAGE: USED}), upstream=openai("localhost")
    ) as harness:
        with caplog.at_level(logging.WARNING):
            runs = [await harness.run() for _ in range(3)]
        assert [COST in run.call for run in runs] == [False] * 3
        assert "x-sidecar-cost" not in runs[0].client.headers
        assert unknown(harness) == 3
        assert harness.value("llm_api_cost", model=MODEL) == 0
    told = [each for each in caplog.records if each.getMessage() == "price_unknown"]
    assert [(each.__dict__["upstream"], each.__dict__["model"]) for each in told] == [
        ("fake", MODEL)
    ]


async def test_a_model_of_another_provider_s_table_has_no_price() -> None:
    async with Harness(CallCost, TokenCounter, upstream=openai("api.anthropic.com")) as harness:
        await harness.run()
        assert unknown(harness) == 1


async def test_an_answer_with_an_error_costs_nothing() -> None:
    async with Harness(cost(prices=OWN), TokenCounter, upstream=openai()) as harness:
        harness.upstream.answer = harness.upstream.whole(b"{}", status=500)
        run = await harness.run()
        assert run.call[COST] == Cost(Decimal(0), "USD")
        assert unknown(harness) == 0


async def test_an_answer_whose_usage_nobody_knows_is_unknown() -> None:
    async with Harness(cost(prices=OWN), upstream=openai()) as harness:
        run = await harness.run()
        assert COST not in run.call
        assert unknown(harness) == 1


async def test_counting_tokens_costs_nothing() -> None:
    upstream = FakeUpstream(dialect=ANTHROPIC)
    async with Harness(CallCost, upstream=upstream) as harness:
        call = harness.call({"model": "m", "messages": []}, path="/v1/messages/count_tokens")
        run = await harness.run(call)
        assert run.call[COST].amount == 0
        assert unknown(harness, "m") == 0


async def test_a_path_that_is_not_read_is_unknown_unless_it_asks_for_no_work() -> None:
    async with Harness(CallCost, upstream=openai()) as harness:
        await harness.run(harness.call(b"...", path="/fake/v1/audio"))
        assert unknown(harness, "-") == 1
        await harness.run(harness.call(b"", method="GET", path="/fake/v1/files"))
        assert unknown(harness, "-") == 1


# What comes on top


async def test_input_of_attempts_that_were_given_up_is_charged_too() -> None:
    facts = inner(after={USAGE: USED, LOST_USAGE: Usage(500)})
    async with Harness(cost(prices=OWN), facts, upstream=openai()) as harness:
        assert (await harness.run()).call[COST].amount == COSTS + Decimal("0.0005")


def side(usage: Usage, model: str = "embedder", upstream: FakeUpstream | None = None) -> SideCall:
    return SideCall(Target(upstream or FakeUpstream("side"), model), "embeddings", usage)


EMBEDDER = {"embedder": {"input": 2, "output": 0}}


async def test_calls_made_for_a_call_are_charged_with_it() -> None:
    facts = inner(before={SIDE_CALLS: [side(Usage(100)), side(Usage(50))]}, after={USAGE: USED})
    async with Harness(cost(prices=OWN | EMBEDDER), facts, upstream=openai()) as harness:
        assert (await harness.run()).call[COST].amount == COSTS + Decimal("0.0003")


async def test_a_side_call_has_the_price_of_the_name_that_callers_know_its_model_by() -> None:
    target = Target(FakeUpstream("side"), "bge-m3-local")
    made = SideCall(target, "embeddings", Usage(100), "embedder")
    facts = inner(before={SIDE_CALLS: [made]}, after={USAGE: USED})
    async with Harness(cost(prices=OWN | EMBEDDER), facts, upstream=openai()) as harness:
        assert (await harness.run()).call[COST].amount == COSTS + Decimal("0.0002")
        assert unknown(harness) == 0


async def test_a_hit_costs_what_was_paid_to_find_it() -> None:
    facts = inner(before={SIDE_CALLS: [side(Usage(100))]})
    use = cost(prices={"embedder": {"input": 2, "output": 0, "currency": "CNY"}})
    async with Harness(use, facts, Answering, upstream=openai()) as harness:
        assert (await harness.run()).call[COST] == Cost(Decimal("0.0002"), "CNY")


async def test_a_side_call_without_a_price_makes_the_sum_unknown() -> None:
    facts = inner(before={SIDE_CALLS: [side(Usage(100))]}, after={USAGE: USED})
    async with Harness(cost(prices=OWN), facts, upstream=openai()) as harness:
        assert COST not in (await harness.run()).call
        assert unknown(harness) == 1


@pytest.mark.parametrize(("exchange", "expected"), [({}, None), ({"CNY": 0.2}, "0.00204")])
async def test_two_currencies_are_added_up_only_where_a_rate_is_configured(
    exchange: dict[str, float], expected: str | None
) -> None:
    prices = OWN | {"embedder": {"input": 2, "output": 0, "currency": "CNY"}}
    facts = inner(before={SIDE_CALLS: [side(Usage(100))]}, after={USAGE: USED})
    async with Harness(cost(prices=prices, exchange=exchange), facts, upstream=openai()) as harness:
        found = (await harness.run()).call.get(COST)
        assert found == (Cost(Decimal(expected), "USD") if expected else None)
        assert unknown(harness) == (expected is None)


async def test_each_known_part_of_a_cost_is_told_where_the_whole_is_not_known() -> None:
    sides = [side(Usage(100)), side(Usage(50), "nobody-knows")]
    facts = inner(before={SIDE_CALLS: sides}, after={USAGE: USED, LOST_USAGE: Usage(500)})
    prices = OWN | {"embedder": {"input": 2, "output": 0, "currency": "CNY"}}
    async with Harness(cost(prices=prices), facts, upstream=openai()) as harness:
        call = (await harness.run()).call
        assert COST not in call
        assert call[PRICES].parts(call) == [
            *(Cost(COSTS, "USD"), usd("0.0005"), Cost(Decimal("0.0002"), "CNY"), None),
        ]
        call[CACHED] = "hit"
        assert call[PRICES].parts(call) == [Cost(Decimal("0.0002"), "CNY"), None]


@pytest.mark.parametrize(
    "usage",
    [
        b"{}",
        b'{"total_tokens": 9}',
        b'{"prompt_tokens": null, "completion_tokens": null}',
        b'{"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}',
        b'{"prompt_tokens": 18446744073709551615, "completion_tokens": -1}',
    ],
    ids=str,
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_answer_whose_usage_says_nothing_is_counted_and_not_free(
    usage: bytes, is_stream: bool
) -> None:
    async with Harness(cost(prices=OWN), TokenCounter) as harness:
        upstream = harness.upstream
        told = b'"usage":' + usage + b"}"
        if is_stream:
            upstream.answer = upstream.stream(
                b'data: {"choices":[{"delta":{"content":"one two three"}}]}\n\n'
            )
            run = harness.start()
            await run.begun()
            upstream.source.finish(b'data: {"choices":[],' + told + b"\n\ndata: [DONE]\n\n")
            await run.ended()
        else:
            upstream.answer = upstream.whole(
                b'{"choices":[{"message":{"content":"one two three"}}],' + told
            )
            run = await harness.run()
        assert run.call[USAGE].is_estimated
        assert run.call[USAGE].output >= 2
        assert run.call[COST].amount > 0


async def test_money_is_converted_at_the_configured_rate_alone() -> None:
    async with Harness(cost(exchange={"CNY": "0.125", "EUR": 1.25})) as harness:
        (each,) = harness.filters
        assert isinstance(each, CallCost)
        convert = each._charges.convert
        assert convert(Cost(Decimal(8), "CNY"), "USD") == 1
        assert convert(Cost(Decimal(1), "USD"), "CNY") == 8
        assert convert(Cost(Decimal(10), "CNY"), "EUR") == 1
        assert convert(Cost(Decimal(7), "GBP"), "GBP") == 7
        assert convert(Cost(Decimal(7), "GBP"), "USD") is None
        assert convert(Cost(Decimal(7), "USD"), "GBP") is None


# Which price


async def priced(harness: Harness, model: str = MODEL, there: str | None = None) -> Cost | None:
    """What a million tokens of input cost at `there`, the upstream's name of the model."""
    call = harness.call({"model": model, "messages": []})
    call.target = Target(harness.upstream, there)
    charges = next(each for each in harness.filters if isinstance(each, CallCost))._charges
    assert isinstance(charges, Charges)
    return charges.estimate(call, 1_000_000, 0)


def usd(amount: int | str) -> Cost:
    return Cost(Decimal(amount), "USD")


async def test_the_configured_price_goes_before_the_shipped_one() -> None:
    async with Harness(
        cost(prices={MODEL: {"input": 7, "output": 1}}), upstream=openai()
    ) as harness:
        assert await priced(harness) == usd(7)
        assert await priced(harness, "gpt-4o") == usd("2.5")


async def test_a_price_is_looked_up_by_upstream_then_by_its_name_there_then_by_the_caller_s() -> (
    None
):
    def rate(number: int) -> dict[str, int]:
        return {"input": number, "output": 0}

    prices = {
        "fake/there": rate(1),
        "there-*": rate(2),
        "fake/smart": rate(3),
        "smart": rate(4),
        "clever": rate(5),
        "*": rate(6),
    }
    async with Harness(cost(prices=prices), upstream=openai()) as harness:
        assert await priced(harness, "smart", "there") == usd(1)
        assert await priced(harness, "anything", "there-2") == usd(2)
        assert await priced(harness, "smart", "there-2") == usd(3)  # no pattern
        assert await priced(harness, "smart") == usd(3)
        assert await priced(harness, "anything") == usd(6)
    del prices["*"]
    async with Harness(cost(prices=prices), upstream=openai()) as harness:
        assert await priced(harness, "clever", "elsewhere") == usd(5)
        assert await priced(harness, "smart", "elsewhere") == usd(3)
        assert await priced(harness, "anything", "gpt-4o") == usd("2.5")


async def test_an_upstream_can_be_told_whose_prices_it_charges() -> None:
    section = CallCost.UpstreamConfig(provider="openai")
    gateway = openai("gateway.internal:8443")
    async with Harness(Use(CallCost, {}, {"fake": section}), upstream=gateway) as harness:
        assert await priced(harness, "gpt-4o") == usd("2.5")


async def test_a_price_can_be_like_another_model_s() -> None:
    prices = {"my-deployment": {"like": "openai/gpt-4o"}}
    async with Harness(cost(prices=prices), upstream=openai("x.openai.azure.com")) as harness:
        assert await priced(harness, "gpt-4o", "my-deployment") == usd("2.5")


async def test_a_price_like_one_that_there_is_not_is_told_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prices = {MODEL: {"like": "openai/gpt-nonesuch"}}
    async with Harness(cost(prices=prices), upstream=openai()) as harness:
        assert await priced(harness) == usd("0.15")  # its own, then
    (told,) = [each for each in caplog.records if each.getMessage() == "price_like_unknown"]
    assert told.__dict__["like"] == "openai/gpt-nonesuch"


async def test_the_price_in_force_changes_while_we_run() -> None:
    day = "2023-11-15"  # the harness' clock begins on the day before, at 22:13
    prices = {MODEL: {"input": 1, "output": 1, "valid_from": day}}
    async with Harness(cost(prices=prices), upstream=openai()) as harness:
        assert await priced(harness) == usd("0.15")  # the shipped one, until then
        midnight = datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
        harness.clock.turn(midnight - harness.clock.wall() - 1)
        assert await priced(harness) == usd("0.15")
        harness.clock.turn(1)
        assert await priced(harness) == usd(1)


async def test_prices_that_were_looked_up_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filters.cost.MAX_BOUNDS", 3)
    async with Harness(CallCost, upstream=openai()) as harness:
        (each,) = harness.filters
        assert isinstance(each, CallCost)
        for number in range(10):
            await priced(harness, f"gpt-4o-2024-01-{number:02}")
            assert len(each._charges._bounds) <= 3


async def test_names_of_callers_own_invention_have_no_price() -> None:
    async with Harness(CallCost, upstream=openai()) as harness:
        for name in ("x" * 10_000, 'gpt-4o":{"input', "gpt-4o\n", "\udcff", "../about"):
            call = harness.call()
            call.model = name
            (each,) = harness.filters
            assert isinstance(each, CallCost)
            assert each._charges.estimate(call, 1, 1) is None


async def test_the_log_tells_of_so_many_models_and_no_more(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("filters.cost.MAX_TOLD", 2)
    async with Harness(CallCost, upstream=openai()) as harness:
        for number in range(5):
            assert await priced(harness, f"nobody-{number}") is None
    assert len([each for each in caplog.records if each.getMessage() == "price_unknown"]) == 2


# Settings


def config(**prices: Any) -> CallCost.Config:
    return CallCost.Config.model_validate({"prices": prices})


def test_numbers_are_taken_as_they_are_written() -> None:
    entry = {"input": 0.1, "output": "0.30", "cached_input": 1, "cache_write": 1e-7}
    (price,) = config(m=entry).prices["m"]
    assert (price.input, price.output, price.cached_input, price.cache_write) == (
        *(Decimal("0.1"), Decimal("0.30"), Decimal(1), Decimal("0.0000001")),
    )


def test_a_whole_price_is_understood() -> None:
    found = config(
        m=[
            {"input": 1, "output": 2, "request": 0.005, "currency": "CNY"},
            {
                "input": 1,
                "output": 2,
                "valid_from": "2026-05-01",
                "tiers": [{"above_input_tokens": 200_000, "input": 2}],
                "graduated": True,
                "off_peak": {"input": 0.5, "windows": [{"hours_utc": ["10:00-24:00"]}]},
            },
        ]
    )
    assert len(found.prices["m"]) == 2


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"input": 1}, "needs `input` and `output`, 0 where nothing is charged, or `like`"),
        ({"input": -1, "output": 1}, "must be a number from 0 to 1000000"),
        ({"input": "nan", "output": 1}, "must be a number from 0 to 1000000"),
        ({"input": "a lot", "output": 1}, "expected a number, such as 0.15"),
        ({"input": True, "output": 1}, "expected a number"),
        ({"input": [1], "output": 1}, "expected a number"),
        ({"input": "0.0000000000001", "output": 1}, "must have 12 digits behind the point at most"),
        ({"input": 1, "output": 1, "currency": "yuan"}, "write a currency by its three letters"),
        ({"input": 1, "output": 1, "valid_from": "May"}, "expected a day, such as 2026-01-31"),
        ({"input": 1, "output": 1, "valid_from": 2026}, "expected a day, such as 2026-01-31"),
        ({"like": "openai/gpt-4o", "input": 1}, "`like` stands alone"),
        ([], "needs one price for each `valid_from`"),
        ([{"input": 1, "output": 1}] * 2, "needs one price for each `valid_from`"),
        (
            {"input": 1, "output": 1, "off_peak": {"windows": [{"hours_utc": ["9:00-8:00"]}]}},
            "does not end after it begins",
        ),
        (
            {
                "input": 1,
                "output": 1,
                "off_peak": {"windows": [{"hours_utc": ["9:00-10:00"], "weekdays": [0]}]},
            },
            "weekdays go from 1, which is Monday, to 7",
        ),
        ({"inptu": 1, "output": 1}, 'unknown key, did you mean "input"?'),
        ({"input": 1, "output": 1, "tiers": [{"input": 1}]}, "is missing: add it"),
    ],
)
def test_a_mistake_in_a_price_is_explained(entry: Any, words: str) -> None:
    values = {"prices": {"m": entry}}
    with pytest.raises(ValidationError) as caught:
        CallCost.Config.model_validate(values)
    mistakes = explain.explain(caught.value, CallCost.Config, values)
    assert words in " ".join(each.message for each in mistakes)
    assert all(each.keys[:2] == ("prices", "m") for each in mistakes)


@pytest.mark.parametrize("worth", [0, -1, "x"])
def test_a_rate_of_exchange_is_greater_than_nothing(worth: Any) -> None:
    with pytest.raises(ValidationError, match=r"greater than 0|from 0 to|expected a number"):
        CallCost.Config.model_validate({"exchange": {"CNY": worth}})


@pytest.mark.parametrize("worth", [2, 1])
def test_a_dollar_is_worth_a_dollar_and_is_not_among_the_rates_of_exchange(worth: int) -> None:
    with pytest.raises(ValidationError, match="leave USD out"):
        CallCost.Config.model_validate({"exchange": {"CNY": 0.14, "USD": worth}})


def test_an_unknown_provider_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValidationError, match=r"expected one of anthropic, azure, bedrock"):
        CallCost.UpstreamConfig(provider="opnai")


# The end


async def test_a_client_that_leaves_is_charged_what_was_seen() -> None:
    async with Harness(cost(prices=OWN), inner(after={USAGE: USED}), upstream=openai()) as harness:
        upstream = harness.upstream
        upstream.answer = upstream.stream(b"data: {}\n\n")
        run = harness.start()
        await run.begun()
        run.client_leaves()
        end: End = await run.ended()
        assert not end.upstream_fault
        assert run.call[COST].amount == COSTS
