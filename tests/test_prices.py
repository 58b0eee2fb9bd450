"""The shipped prices: the table, whose they are, how they are made, and what others say."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any

import genai_prices
import orjson
import pytest
import yaml

from filters.algo.prices import PROVIDERS, PriceTable, names_of, provider_of
from filters.algo.pricing import Price, Tariff
from scripts.make_prices import BY_HAND, by_hand, collect, entry_of, own_name, text_of
from sidecar.api import Usage

ROOT = Path(__file__).parent.parent
DATA = (files("filters") / "data" / "prices.json").read_bytes()
TABLE = PriceTable(DATA)
PRICES: dict[str, Any] = {key: value for key, value in orjson.loads(DATA).items() if key != "about"}
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def price_of(key: str) -> Price:
    price, _ = Tariff.of(TABLE.entry(key)).at(NOON.timestamp())
    assert price is not None
    return price


# The table


def test_every_entry_is_found_by_its_line_and_is_a_price() -> None:
    for key, value in PRICES.items():
        assert TABLE.entry(key) == value
        assert price_of(key).amount(Usage(1_000_000, 1_000_000)) > 0, key


def test_every_entry_belongs_to_a_provider_that_hosts_lead_to() -> None:
    assert {key.partition("/")[0] for key in PRICES} == set(PROVIDERS)


def test_chinese_providers_charge_yuan_and_the_others_dollars() -> None:
    in_yuan = {key.partition("/")[0] for key in PRICES if price_of(key).currency == "CNY"}
    in_dollars = {key.partition("/")[0] for key in PRICES if price_of(key).currency == "USD"}
    assert in_yuan == {
        *("dashscope-cn", "qianfan", "volcengine", "zhipu", "moonshot-cn", "hunyuan"),
    }
    assert not in_yuan & in_dollars


def test_source_version_and_date_stand_in_the_table_and_in_the_notice() -> None:
    about = TABLE.about()
    notice = (ROOT / "NOTICE").read_text()
    source = str(about["source"]).partition(",")[0]
    assert source.startswith("LiteLLM 1.")
    assert source in notice
    assert "Copyright (c) 2023 Berri AI" in notice
    assert "Permission is hereby granted" in notice
    assert "MIT" in about["licence"]
    assert date.fromisoformat(about["date"]) > date(2026, 1, 1)


def test_entries_by_hand_are_in_the_table_and_say_whether_they_were_verified() -> None:
    own = yaml.safe_load(BY_HAND.read_text())
    for key, value in by_hand(own).items():
        assert PRICES[key] == value, "run scripts/make_prices.py"
    said = TABLE.about()["by_hand"]
    assert set(said) == set(own)
    for section in said.values():
        assert isinstance(section["verified"], bool)
        assert date.fromisoformat(section["checked"])
        assert section["source"]


def test_the_table_costs_little() -> None:
    assert len(DATA) < 300_000
    best_s = 1.0
    for _ in range(5):
        begun = time.perf_counter()
        table = PriceTable((files("filters") / "data" / "prices.json").read_bytes())
        Tariff.of(table.entry("openai/gpt-4o"))
        best_s = min(best_s, time.perf_counter() - begun)
    assert best_s < 0.003


def test_what_is_not_in_the_table_is_nothing() -> None:
    assert TABLE.entry("openai/no-such") is None
    assert TABLE.entry("penai/gpt-4o") is None
    assert TABLE.find("openai", "", 'x","about') is None
    assert PriceTable(b"").find("openai", "", "gpt-4o") is None


# Whose they are


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("api.openai.com", ("openai", "")),
        ("API.openai.com:443", ("openai", "")),
        ("my-resource.openai.azure.com", ("azure", "")),
        ("api.anthropic.com", ("anthropic", "")),
        ("bedrock-runtime.eu-west-1.amazonaws.com", ("bedrock", "eu-west-1")),
        ("bedrock-mantle.us-east-1.api.aws", ("bedrock", "us-east-1")),
        ("generativelanguage.googleapis.com", ("gemini", "")),
        ("europe-west4-aiplatform.googleapis.com", ("vertex", "")),
        ("aiplatform.googleapis.com", ("vertex", "")),
        ("dashscope.aliyuncs.com", ("dashscope-cn", "")),
        ("dashscope-intl.aliyuncs.com", ("dashscope", "")),
        ("qianfan.baidubce.com", ("qianfan", "")),
        ("aip.baidubce.com", ("qianfan", "")),
        ("ark.cn-beijing.volces.com", ("volcengine", "")),
        ("open.bigmodel.cn", ("zhipu", "")),
        # Others, and those that only look like one of them.
        ("localhost", None),
        ("127.0.0.1:11434", None),
        ("[::1]:8000", None),
        ("[::1]", None),
        ("api.openai.com.example.org", None),
        ("apixopenai.com", None),
        ("eu.api.openai.com", None),
        ("openai.azure.com", None),
    ],
)
def test_a_provider_is_told_by_its_host(host: str, expected: tuple[str, str] | None) -> None:
    assert provider_of(host) == expected


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("gpt-4o", ["gpt-4o"]),
        ("gpt-4o-2024-08-06", ["gpt-4o-2024-08-06", "gpt-4o"]),
        ("claude-sonnet-4-5-20250929", ["claude-sonnet-4-5-20250929", "claude-sonnet-4-5"]),
        ("claude-sonnet-4-5@20250929", ["claude-sonnet-4-5@20250929", "claude-sonnet-4-5"]),
        ("claude-opus-5@default", ["claude-opus-5@default", "claude-opus-5"]),
        ("qwen-plus-latest", ["qwen-plus-latest", "qwen-plus"]),
        ("models/gemini-2.5-pro", ["models/gemini-2.5-pro", "gemini-2.5-pro"]),
        ("google/gemini-2.5-pro", ["google/gemini-2.5-pro", "gemini-2.5-pro"]),
        (
            "ft:gpt-4o-2024-08-06:mine::abc",
            ["ft:gpt-4o-2024-08-06:mine::abc", "ft:gpt-4o-2024-08-06"],
        ),
        ("doubao-seed-1-6-250615", ["doubao-seed-1-6-250615"]),
        ("gpt-4o-mini", ["gpt-4o-mini"]),
        ("us.anthropic.claude-opus-5", ["us.anthropic.claude-opus-5"]),
    ],
)
def test_a_model_is_looked_up_exactly_and_then_without_its_date(
    model: str, names: list[str]
) -> None:
    assert list(names_of(model)) == names


def test_a_snapshot_with_its_own_price_keeps_it() -> None:
    own = TABLE.find("openai", "", "gpt-4o-2024-05-13")
    assert (own["input"], own["output"]) == ("5", "15")
    assert TABLE.find("openai", "", "gpt-4o-2031-01-01") == TABLE.entry("openai/gpt-4o")


def test_a_model_is_never_taken_for_another_of_its_family() -> None:
    for model in ("gpt-4o-new", "gpt-4", "gpt-4o-m", "claude-sonnet", "gpt-99"):
        found = TABLE.find("openai", "", model)
        assert found == PRICES.get(f"openai/{model}")
    assert TABLE.find("anthropic", "", "gpt-4o") is None


def test_a_region_goes_before_the_price_for_all() -> None:
    key = "bedrock/us-gov-west-1/xai.grok-4.3"
    assert TABLE.find("bedrock", "us-gov-west-1", "xai.grok-4.3") == TABLE.entry(key)
    everywhere = TABLE.entry("bedrock/xai.grok-4.3")
    assert everywhere not in (None, TABLE.entry(key))
    assert TABLE.find("bedrock", "eu-west-1", "xai.grok-4.3") == everywhere


# How they are made


def test_names_of_the_source_become_those_of_the_providers() -> None:
    assert own_name("groq/openai/gpt-oss-120b") == "openai/gpt-oss-120b"
    assert own_name("bedrock/eu-west-1/deepseek.v3.2") == "eu-west-1/deepseek.v3.2"
    assert own_name("vertex_ai/xai/grok-4.3") == "xai/grok-4.3"
    assert own_name("gpt-4o") == "gpt-4o"


def test_costs_of_a_token_become_rates_of_a_million() -> None:
    model = {
        "mode": "chat",
        "input_cost_per_token": Decimal("1.5000000000000002e-07"),
        "cache_read_input_token_cost": Decimal("7.5e-8"),
        "cache_creation_input_token_cost": 0,
        "output_cost_per_token": Decimal("6e-07"),
        "output_cost_per_reasoning_token": Decimal("6e-07"),
        "input_cost_per_token_above_200k_tokens": Decimal("3e-07"),
        "input_cost_per_token_above_200k_tokens_batches": Decimal("1e-07"),
        "input_cost_per_token_priority": Decimal("9e-07"),
    }
    assert entry_of(model, has_modes=False) == {
        "input": "0.15",
        "cached_input": "0.075",
        "output": "0.6",
        "tiers": [{"above_input_tokens": 200_000, "input": "0.3"}],
    }


def test_a_cache_is_never_written_for_less_than_the_input_costs() -> None:
    for key, value in PRICES.items():
        for entry in value if isinstance(value, list) else [value]:
            for rates in (entry, *entry.get("tiers", ())):
                every = {**entry, **rates}
                least = Decimal(every["input"])
                assert Decimal(every.get("cache_write", least)) >= least, key
                assert Decimal(every.get("cache_write_1h", least)) >= least, key


def test_a_write_that_is_cheaper_than_input_is_left_out_in_tiers_too() -> None:
    model = {
        "mode": "chat",
        "input_cost_per_token": Decimal("2e-06"),
        "cache_creation_input_token_cost": Decimal("1e-06"),
        "output_cost_per_token": Decimal("6e-06"),
        "input_cost_per_token_above_200k_tokens": Decimal("4e-06"),
        "cache_creation_input_token_cost_above_200k_tokens": Decimal("2.5e-07"),
    }
    assert entry_of(model, has_modes=False) == {
        "input": "2",
        "output": "6",
        "tiers": [{"above_input_tokens": 200_000, "input": "4"}],
    }


def test_an_hour_in_anthropic_s_cache_costs_two_inputs_wherever_it_runs() -> None:
    checked = 0
    for key, entry in PRICES.items():
        if "claude" in key:
            for rates in (entry, *entry.get("tiers", ())):
                if "cache_write" in rates:
                    assert Decimal(rates["cache_write_1h"]) == 2 * Decimal(rates["input"]), key
                    checked += 1
    assert checked > 100
    written = Usage(1_000_000, cache_write=1_000_000, cache_write_1h=1_000_000)
    key = "bedrock/us.anthropic.claude-3-7-sonnet-20250219-v1:0"
    assert price_of(key).amount(written) == price_of(key).amount(Usage(2_000_000))


def test_ranges_become_tiers_above_the_first_one() -> None:
    def row(start: int, cost: str) -> dict[str, Any]:
        costs = {"input_cost_per_token": Decimal(cost), "output_cost_per_token": Decimal(cost)}
        return {**costs, "output_cost_per_reasoning_token": Decimal("1e-5"), "range": [start, None]}

    model = {"mode": "chat", "tiered_pricing": [row(32_000, "2e-6"), row(0, "1e-6")]}
    assert entry_of(model, has_modes=True) == {
        "input": "1",
        "output": "1",
        "thinking": "10",
        "tiers": [{"above_input_tokens": 32_768, "input": "2", "output": "2", "thinking": "10"}],
    }


@pytest.mark.parametrize(
    "model",
    [
        {"mode": "chat"},
        {"mode": "chat", "input_cost_per_token": 0, "output_cost_per_token": 0},
        {"mode": "chat", "input_cost_per_token": Decimal("1e-6")},
        {
            "mode": "chat",
            "input_cost_per_token": Decimal("1e-6"),
            "output_cost_per_token": Decimal("1e-6"),
            "output_cost_per_audio_token": Decimal("1e-5"),
        },
    ],
)
def test_a_model_without_a_whole_price_is_left_out_and_not_free(model: dict[str, Any]) -> None:
    assert entry_of(model, has_modes=False) is None


def test_embeddings_have_no_output() -> None:
    model = {"mode": "embedding", "input_cost_per_token": Decimal("2e-8")}
    assert entry_of(model, has_modes=False) == {"input": "0.02", "output": "0"}


def test_only_models_of_tokens_are_collected() -> None:
    costs = {"input_cost_per_token": Decimal("1e-6"), "output_cost_per_token": Decimal("1e-6")}
    theirs = {
        "gemini/a": {"litellm_provider": "gemini", "mode": "chat", **costs},
        "gemini/b": {"litellm_provider": "gemini", "mode": "image_generation", **costs},
        "c": {"litellm_provider": "somebody", "mode": "chat", **costs},
        "bedrock/*/1-month-commitment/d": {"litellm_provider": "bedrock", "mode": "chat", **costs},
    }
    assert set(collect(theirs)) == {"gemini/a"}


def test_entries_by_hand_share_and_derive_rates_and_may_have_days() -> None:
    section = {
        "all": {"currency": "CNY"},
        "of_input": {"cached_input": 0.2},
        "models": {
            "a b": {"input": 0.8, "output": 2, "tiers": [{"above_input_tokens": 9, "input": 1}]},
            "c": [
                {"input": 2, "output": 2},
                {"input": 1, "output": 1, "valid_from": date(2026, 5, 1)},
            ],
        },
    }
    made = by_hand({"p": section})
    assert made["p/a"] == made["p/b"]
    assert made["p/a"]["cached_input"] == "0.16"
    assert made["p/a"]["tiers"] == [
        {"above_input_tokens": 9, "input": "1", "cached_input": "0.2"},
    ]
    table = PriceTable(text_of({"date": "x"}, made).encode())
    price, _ = Tariff.of(table.entry("p/c")).at(NOON.timestamp())
    assert repr(price) == "<Price CNY 1/1 tiers=0>"


# What others say they are

USAGES = {
    "plain": (Usage(10_000, 500), {"input_tokens": 10_000, "output_tokens": 500}),
    "cached": (
        Usage(10_000, 500, cached=6_000),
        {"input_tokens": 10_000, "output_tokens": 500, "cache_read_tokens": 6_000},
    ),
    "written": (
        Usage(10_000, 500, cache_write=2_000),
        {"input_tokens": 10_000, "output_tokens": 500, "cache_write_tokens": 2_000},
    ),
    "long": (Usage(300_000, 500), {"input_tokens": 300_000, "output_tokens": 500}),
}
ALLOWED = {
    # The oracle doubles the rates above 200k tokens; our source has no tier for them.
    ("anthropic/claude-sonnet-4-5", "long"),
    ("anthropic/claude-sonnet-4-5-20250929", "long"),
    # The oracle has no rate of theirs for what is read from a cache.
    ("openai/ft:gpt-4o-2024-08-06", "cached"),
    ("openai/ft:gpt-4o-mini-2024-07-18", "cached"),
    ("openai/gpt-4o-search-preview", "cached"),
    ("openai/gpt-4o-search-preview-2025-03-11", "cached"),
    # Only our source knows a tier above 272k tokens.
    ("openai/gpt-5.6-cyber", "long"),
}
"""Where the oracle says otherwise, and why."""


def test_prices_of_openai_and_anthropic_are_those_of_an_independent_table() -> None:
    agreed, differing = set(), set()
    for key in PRICES:
        provider, _, model = key.partition("/")
        if provider not in ("openai", "anthropic"):
            continue
        for name, (usage, theirs) in USAGES.items():
            if name == "written" and provider == "openai":  # the oracle knows no such class there
                continue
            try:
                found = genai_prices.calc_price(
                    genai_prices.Usage(**theirs),
                    model,
                    provider_id=provider,
                    genai_request_timestamp=NOON,
                )
            except LookupError:
                continue
            if price_of(key).amount(usage) == found.total_price:
                agreed.add(key)
            else:
                differing.add((key, name))
    assert differing == ALLOWED
    assert len(agreed) >= 100
