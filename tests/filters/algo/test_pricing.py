"""What tokens cost: classes, tiers, days and hours; worked examples from usage objects to money."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from math import inf
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.pricing import Price, Tariff, plain
from sidecar.api import Event, Usage
from sidecar.dialects import ANTHROPIC, OPENAI, Dialect

MILLION = 1_000_000
SONNET = {
    "input": "3",
    "cached_input": "0.3",
    "cache_write": "3.75",
    "cache_write_1h": "6",
    "output": "15",
}
GPT_4O = {"input": "2.5", "cached_input": "1.25", "output": "10"}
GEMINI_PRO = {
    "input": "1.25",
    "cached_input": "0.125",
    "output": "10",
    "tiers": [
        {"above_input_tokens": 200_000, "input": "2.5", "cached_input": "0.25", "output": "15"}
    ],
}
DEEPSEEK = {
    "input": "1.32",
    "output": "3.96",
    "off_peak": {
        "input": "0.66",
        "output": "1.98",
        "windows": [
            {
                "hours_utc": ["00:00-01:00", "04:00-06:00", "10:00-24:00"],
                "weekdays": [1, 2, 3, 4, 5],
            },
            {"hours_utc": ["00:00-24:00"], "weekdays": [6, 7]},
        ],
    },
}


def money(entry: dict[str, Any], usage: Usage) -> Decimal:
    return Price.of(entry).amount(usage)


def reported(dialect: Dialect, usage: dict[str, Any]) -> Usage:
    """A provider's raw usage object, as the dialect reads it."""
    found = dialect.usage(Event(b"data: " + orjson.dumps({"usage": usage})), None)
    assert found is not None
    return found


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


# Worked examples


def test_openai_counts_cached_tokens_inside_of_the_input() -> None:
    """OpenAI, "Prompt caching": its example of `usage`; "Pricing": gpt-4o 2.50, 1.25 and 10."""
    usage = reported(
        OPENAI,
        {
            "prompt_tokens": 2006,
            "completion_tokens": 300,
            "total_tokens": 2306,
            "prompt_tokens_details": {"cached_tokens": 1920},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    )
    # 86 at 2.50, 1920 at 1.25, 300 at 10, all for a million
    assert money(GPT_4O, usage) == Decimal("0.005615")


def test_anthropic_counts_cached_tokens_outside_of_the_input() -> None:
    """Anthropic, "Prompt caching": all input is the sum of the three fields; reading costs 0.1 of
    input, writing 1.25, for an hour 2; "Pricing": Claude Sonnet 4.5, 3 and 15."""
    usage = reported(
        ANTHROPIC,
        {
            "input_tokens": 2048,
            "cache_read_input_tokens": 1800,
            "cache_creation_input_tokens": 556,
            "cache_creation": {"ephemeral_5m_input_tokens": 456, "ephemeral_1h_input_tokens": 100},
            "output_tokens": 503,
        },
    )
    # 2048 at 3, 1800 at 0.30, 456 at 3.75, 100 at 6, 503 at 15
    assert money(SONNET, usage) == Decimal("0.016539")


def test_the_same_numbers_mean_different_money_at_openai_and_anthropic() -> None:
    rates = {"input": "10", "cached_input": "1", "output": "0"}
    openai = {"prompt_tokens": 1000, "prompt_tokens_details": {"cached_tokens": 400}}
    anthropic = {"input_tokens": 1000, "cache_read_input_tokens": 400}
    assert money(rates, reported(OPENAI, openai)) == Decimal("0.0064")
    assert money(rates, reported(ANTHROPIC, anthropic)) == Decimal("0.0104")


def test_reasoning_costs_what_output_costs() -> None:
    """OpenAI, "Reasoning models": reasoning tokens "are billed as output tokens"."""
    usage = reported(
        OPENAI,
        {
            "input_tokens": 75,
            "output_tokens": 1186,
            "output_tokens_details": {"reasoning_tokens": 1024},
        },
    )
    # 75 at 1.25, 1186 at 10
    assert money({"input": "1.25", "output": "10"}, usage) == Decimal("0.01195375")


@pytest.mark.parametrize(
    ("tokens", "expected"), [(200_000, "0.26"), (200_001, "0.5150025"), (1, "0.01000125")]
)
def test_a_longer_input_makes_all_of_the_request_dearer(tokens: int, expected: str) -> None:
    """Google, "Gemini API pricing": Gemini 2.5 Pro, "prompts <= 200k tokens" and above."""
    assert money(GEMINI_PRO, Usage(tokens, 1000)) == Decimal(expected)


@pytest.mark.parametrize(
    ("tokens", "rate"), [(32_768, "2.5"), (32_769, "4"), (131_072, "4"), (131_073, "7")]
)
def test_alibaba_s_tiers_begin_beyond_their_borders(tokens: int, rate: str) -> None:
    """Alibaba Cloud, "Model pricing": qwen3-max in mainland China, "32K<Token<=128K"."""
    entry = {
        "currency": "CNY",
        "input": "2.5",
        "output": "10",
        "tiers": [
            {"above_input_tokens": 131_072, "input": "7", "output": "28"},
            {"above_input_tokens": 32_768, "input": "4", "output": "16"},
        ],
    }
    assert money(entry, Usage(tokens)) == Decimal(rate) * tokens / MILLION
    assert Price.of(entry).currency == "CNY"


def test_qwen_with_reasoning_costs_the_thinking_rate_for_all_of_its_output() -> None:
    """Alibaba Cloud, "Model pricing": qwen-plus, "thinking mode (chain of thought + answer)"."""
    entry = {"input": "0.8", "output": "2", "thinking": "8"}
    assert money(entry, Usage(0, 1000)) == Decimal("0.002")
    assert money(entry, Usage(0, 1000, reasoning=1)) == Decimal("0.008")


# Classes


def test_a_class_without_a_rate_costs_what_its_whole_costs() -> None:
    usage = Usage(1000, 1000, cached=300, cache_write=300, reasoning=500, cache_write_1h=100)
    assert money({"input": "1", "output": "2"}, usage) == Decimal("0.003")


def test_an_hour_in_the_cache_costs_as_writing_does_unless_it_is_said() -> None:
    usage = Usage(100, cache_write=100, cache_write_1h=100)
    assert money({"input": "1", "output": "0", "cache_write": "5"}, usage) == Decimal("0.0005")


def test_reasoning_may_have_its_own_rate() -> None:
    entry = {"input": "0", "output": "1", "reasoning": "3"}
    assert money(entry, Usage(0, 1000, reasoning=400)) == Decimal("0.0018")


def test_a_fee_comes_on_top_of_each_answer() -> None:
    assert money({"input": "1", "output": "1", "request": "0.005"}, Usage(1)) == Decimal("0.005001")


@pytest.mark.parametrize(
    "usage",
    [
        Usage(100, 10, cached=500),
        Usage(100, 10, cached=80, cache_write=80),
        Usage(100, 10, cache_write=50, cache_write_1h=90),
        Usage(100, 10, reasoning=90),
    ],
)
def test_parts_that_exceed_their_whole_are_not_charged(usage: Usage) -> None:
    entry = {**dict.fromkeys(SONNET, "1"), "reasoning": "1"}
    assert money(entry, usage) == Decimal("0.00011")


def test_rates_are_not_rounded() -> None:
    entry = {"input": "0.000000000001", "output": "999999.999999999999"}
    assert money(entry, Usage(1, 1)) == Decimal("1.000000000000000000")
    assert plain(money(entry, Usage(1))) == "0.000000000000000001"


# Tiers


def test_a_tier_keeps_the_rates_that_it_does_not_name() -> None:
    entry = {**SONNET, "tiers": [{"above_input_tokens": 100, "input": "6"}]}
    assert money(entry, Usage(200, 10)) == Decimal("0.00135")
    assert money(entry, Usage(200, cached=200)) == Decimal("0.00006")


def test_a_tier_s_cached_input_costs_the_tier_s_input_where_no_rate_is_given() -> None:
    entry = {"input": "1", "output": "1", "tiers": [{"above_input_tokens": 10, "input": "2"}]}
    assert money(entry, Usage(20, cached=10)) == Decimal("0.00004")


GRADUATED = {
    "input": "1",
    "cached_input": "0.1",
    "output": "10",
    "graduated": True,
    "tiers": [
        {"above_input_tokens": 100, "input": "2", "cached_input": "0.2", "output": "20"},
        {"above_input_tokens": 200, "input": "3", "cached_input": "0.3", "output": "30"},
    ],
}


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Usage(100, 1), 100 * 1 + 10),
        (Usage(101, 1), 100 * 1 + 1 * 2 + 20),
        (Usage(300, 1), 100 * 1 + 100 * 2 + 100 * 3 + 30),
        (Usage(300, 0, cached=150), 100 * Decimal("0.1") + 50 * Decimal("0.2") + 50 * 2 + 100 * 3),
        (Usage(0, 1), 10),
    ],
)
def test_graduated_tiers_hold_for_the_tokens_beyond_them(
    usage: Usage, expected: int | Decimal
) -> None:
    assert money(GRADUATED, usage) == Decimal(expected) / MILLION


def test_what_is_written_for_an_hour_stands_before_what_is_written_for_less() -> None:
    entry = {
        "input": "1",
        "output": "0",
        "cache_write": "2",
        "cache_write_1h": "4",
        "graduated": True,
        "tiers": [{"above_input_tokens": 10, "cache_write": "20", "cache_write_1h": "40"}],
    }
    usage = Usage(20, cache_write=20, cache_write_1h=10)
    assert money(entry, usage) == Decimal(10 * 4 + 10 * 20) / MILLION


TOKENS = st.integers(min_value=0, max_value=2_000_000)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    """Usage whose parts are no more than their wholes."""
    total, tokens_out = draw(TOKENS), draw(TOKENS)
    cached = draw(st.integers(0, total))
    written = draw(st.integers(0, total - cached))
    return Usage(
        total,
        tokens_out,
        cached,
        written,
        draw(st.integers(0, tokens_out)),
        draw(st.integers(0, written)),
    )


@given(usages())
def test_money_is_the_sum_of_its_classes(usage: Usage) -> None:
    plain_tokens = usage.input - usage.cached - usage.cache_write
    written_5m = usage.cache_write - usage.cache_write_1h
    expected = (
        *(plain_tokens * Decimal("3"), usage.cached * Decimal("0.3")),
        *(written_5m * Decimal("3.75"), usage.cache_write_1h * Decimal("6")),
        usage.output * Decimal("15"),
    )
    assert money(SONNET, usage) == sum(expected) / MILLION


@given(usages())
def test_graduated_tiers_at_one_rate_make_no_difference(usage: Usage) -> None:
    tiers = [{"above_input_tokens": 1000}, {"above_input_tokens": 500_000}]
    assert money({**SONNET, "tiers": tiers, "graduated": True}, usage) == money(SONNET, usage)


# Days


def test_the_price_of_the_day_counts_from_midnight_utc() -> None:
    tariff = Tariff.of(
        [
            {"input": "2", "output": "0", "valid_from": "2026-03-01"},
            {"input": "1", "output": "0"},
            {"input": "3", "output": "0", "valid_from": "2026-06-01"},
        ]
    )
    seen = []
    for moment in ("2020-01-01", "2026-02-28T23:59:59", "2026-03-01", "2026-06-01T12:00:00"):
        price, until = tariff.at(at(moment))
        assert price is not None
        seen.append((price.amount(Usage(MILLION)), until))
    assert seen == [
        (1, at("2026-03-01")),
        (1, at("2026-03-01")),
        (2, at("2026-06-01")),
        (3, inf),
    ]


def test_before_its_first_day_a_model_has_no_price() -> None:
    tariff = Tariff.of({"input": "1", "output": "1", "valid_from": "2026-03-01"})
    assert tariff.at(at("2026-02-01")) == (None, at("2026-03-01"))


# Hours


@pytest.mark.parametrize(
    ("moment", "rate", "until"),
    [
        ("2026-11-24T00:59:59", "0.66", "2026-11-24T01:00"),  # a Tuesday
        ("2026-11-24T01:00:00", "1.32", "2026-11-24T04:00"),
        ("2026-11-24T09:59:59", "1.32", "2026-11-24T10:00"),
        ("2026-11-24T23:59:59", "0.66", "2026-11-25T00:00"),
        ("2026-11-28T08:00:00", "0.66", "2026-11-29T00:00"),  # a Saturday
    ],
)
def test_off_peak_hours_are_cheaper(moment: str, rate: str, until: str) -> None:
    """DeepSeek, "Models & pricing": peak hours of working days."""
    price, border = Tariff.of(DEEPSEEK).at(at(moment))
    assert price is not None
    assert price.amount(Usage(MILLION)) == Decimal(rate)
    assert border == at(until)


@given(st.integers(min_value=int(at("2026-01-01")), max_value=int(at("2026-12-31"))))
def test_a_price_holds_until_its_border_and_borders_lead_on(moment: int) -> None:
    tariff = Tariff.of(DEEPSEEK)
    price, until = tariff.at(moment)
    assert moment < until <= moment + 86_400
    last, same_border = tariff.at(until - 1)
    assert same_border == until
    assert repr(last) == repr(price)


@pytest.mark.parametrize("hours", ["10:00-09:00", "24:00-24:00", "7:70-8:00", "-1:00-2:00", "x"])
def test_hours_that_are_none_are_refused(hours: str) -> None:
    off_peak = {"input": "0", "windows": [{"hours_utc": [hours], "weekdays": [1]}]}
    with pytest.raises(ValueError, match=r"."):
        Tariff.of({"input": "1", "output": "1", "off_peak": off_peak})


# Showing


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (Decimal("0E-7"), "0"),
        (Decimal("0.000123000"), "0.000123"),
        (Decimal("1.5E-7"), "0.00000015"),
        (Decimal("100"), "100"),
        (Decimal("1E+2"), "100"),
        (Decimal("12.3400"), "12.34"),
    ],
)
def test_amounts_are_written_without_exponents(amount: Decimal, text: str) -> None:
    assert plain(amount) == text


def test_a_price_tells_what_it_is() -> None:
    assert repr(Price.of(GEMINI_PRO)) == "<Price USD 1.25/10 tiers=1>"
